"""Interactions as integer arrays: the user-item matrix, with negative sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..models.embedding_store import Ragged
from .stateless_random import bounded, stateless_random


class InteractionMatrix:
    """The item columns of each user row, in time order.

    Args:
        users: user row of each interaction, int `[n]`. The interactions of a user are in time order.
        items: item column of each interaction, int `[n]`.
        num_users: the number of rows.
        num_items: the number of columns.

    Attributes:
        histories: the items of each user, one list a user row.
        users: user row of each interaction, int64 `[n]`, ascending.
        items: item column of each interaction, int64 `[n]`, grouped by user.
        indptr: int64 `[num_users + 1]`. The items of user u are `items[indptr[u] : indptr[u + 1]]`.
    """

    def __init__(
        self, users: np.ndarray | Sequence[int], items: np.ndarray | Sequence[int], num_users: int, num_items: int
    ):
        users, items = np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64)
        self.num_users, self.num_items = num_users, num_items
        self.histories = Ragged.from_pairs(users, items, num_users)
        self.users, self.items, self.indptr = self.histories.rows, self.histories.values, self.histories.indptr

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def _keys(self) -> np.ndarray:
        """The pairs as one number each, ascending; needed only to draw negatives.

        Without repetitions, so that the number of a user's keys tells whether an item is left.
        """
        return np.unique(self.users * self.num_items + self.items)

    @property
    def lengths(self) -> np.ndarray:
        """Number of interactions of each user, int64 `[num_users]`."""
        return self.histories.lengths

    def of(self, user: int) -> np.ndarray:
        """Items of one user, in time order, int64 `[number of interactions]`."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def of_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR rows of several users: `(indptr [n + 1], items)`."""
        taken = self.histories.take(users)
        return taken.indptr, taken.values

    def popularity(self) -> np.ndarray:
        """Number of interactions of each item, int64 `[num_items]`."""
        return np.bincount(self.items, minlength=self.num_items)

    def contains(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each (user, item) pair is an interaction; boolean of the shape of `items`."""
        keys = users * self.num_items + items
        if not len(self._keys):
            return np.zeros(np.shape(keys), dtype=bool)
        position = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[position] == keys

    def sample_negatives(
        self, users: np.ndarray, num_negatives: int, *, seed: int, epoch: int, examples: np.ndarray, first_draw: int = 0
    ) -> np.ndarray:
        """Draws items uniformly from those that each user has not interacted with.

        Args:
            users: user row of each example, int64 `[n]`.
            num_negatives: draws for each example, with replacement.
            seed, epoch, examples, first_draw: see [`stateless_random`].

        Returns:
            int64 `[n, num_negatives]`.

        Raises:
            ValueError: a user has interacted with every item, so that there is no negative.
        """
        first, end = np.searchsorted(self._keys, [users * self.num_items, (users + 1) * self.num_items])
        full = np.flatnonzero(end - first == self.num_items)
        if len(full):
            raise ValueError(
                f"user row {users[full[0]]} has interacted with all {self.num_items} items, so it has no negative item; "
                "remove this user or add items."
            )
        negatives = bounded(stateless_random(seed, epoch, examples, num_negatives, first_draw), self.num_items)
        draw = (first_draw + 1) << 32
        bad = np.argwhere(self.contains(users[:, None], negatives))
        while len(bad):
            # A rejected draw is replaced from a stream that no other `first_draw` has: uniform over the items left.
            row, column = bad[:, 0], bad[:, 1]
            fresh = stateless_random(seed, epoch, examples[row] * num_negatives + column, 1, draw)
            negatives[row, column] = bounded(fresh[:, 0], self.num_items)
            bad = bad[self.contains(users[row], negatives[row, column])]
            draw += 1
        return negatives
