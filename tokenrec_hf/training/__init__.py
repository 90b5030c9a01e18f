"""Recipes, the stages around the stock `Trainer`, and the closed forms that need no training."""
