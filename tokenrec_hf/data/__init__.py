"""Interactions: reading, named data sets, splits, the interaction matrix and the collator."""
