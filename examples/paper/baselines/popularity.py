"""Popularity: everyone is recommended what most have interacted with."""

from __future__ import annotations

import torch

from .base import Baseline


class Popularity(Baseline):
    """The number of interactions of an item is its score."""

    name, title = "popularity", "Popularity"
    deterministic = True

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.counts = torch.from_numpy(train.popularity()).float()

    def scores(self, users):  # noqa: D102
        return self.counts.expand(len(users), -1)
