"""The baselines of TokenRec's tables II and III (arXiv 2406.10450), and popularity, ItemKNN, EASE and iALS; a file each."""
