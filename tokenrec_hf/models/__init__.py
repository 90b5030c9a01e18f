"""What travels to the Hub with a trained repository: files that import siblings, torch, transformers, safetensors and numpy only."""
