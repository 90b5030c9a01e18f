"""Popularity, ItemKNN and EASE, as the package has them, with the budget of settings of all baselines."""

from __future__ import annotations

from typing import ClassVar

from tokenrec_hf.evaluation import baselines

from .base import Baseline


class _ClosedForm(Baseline):
    kind: ClassVar[type[baselines.Baseline]]
    deterministic = True

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.fitted = self.kind(train, **self.settings)

    def scores(self, users):  # noqa: D102
        return self.fitted.scores(users)


class Popularity(_ClosedForm):
    """The score of an item is its number of interactions."""

    name, title, kind = "popularity", "Popularity", baselines.Popularity


class ItemKNN(_ClosedForm):
    """Cosine similarity of items by their users, with shrinkage (Sarwar et al., 2001)."""

    name, title, kind = "itemknn", "ItemKNN", baselines.ItemKNN
    grid = (
        {"neighbours": 100, "shrinkage": 10},
        {"neighbours": 100, "shrinkage": 0},
        {"neighbours": 100, "shrinkage": 100},
        {"neighbours": 30, "shrinkage": 10},
        {"neighbours": 500, "shrinkage": 0},
        {"neighbours": 500, "shrinkage": 10},
    )


class EASE(_ClosedForm):
    """A linear autoencoder of items without self-similarity (Steck, 2019)."""

    name, title, kind = "ease", "EASE", baselines.EASE
    grid = tuple({"l2": l2} for l2 in (100, 20, 50, 200, 500, 1000))
