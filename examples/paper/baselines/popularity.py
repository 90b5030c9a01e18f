"""Popularity: items ranked by their number of interactions, the same for all users."""

from __future__ import annotations

import torch

from .base import Baseline


class Popularity(Baseline):
    """The score of an item is its number of interactions."""

    name, title = "popularity", "Popularity"
    deterministic = True

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.counts = torch.from_numpy(train.popularity()).float()

    def scores(self, users):  # noqa: D102
        return self.counts.expand(len(users), -1)
