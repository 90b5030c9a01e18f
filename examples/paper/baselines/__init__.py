"""The baselines of TokenRec's tables II and III (arXiv 2406.10450) and a few honest ones more, each in a file of its own."""
