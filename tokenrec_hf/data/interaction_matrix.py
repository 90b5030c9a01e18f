"""Interactions as integer arrays: the user-item matrix in CSR form and randomness without state.

Everything that trains here draws its negatives, masks of history and prompt choices from `stateless_random`: a hash of
(seed, epoch, example, draw). A draw therefore does not depend on batch size, worker, process or on where training was
interrupted, which is what makes a resumed run equal to an uninterrupted one. Knows nothing about files, models or tokens.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit integers whose output passes statistical tests."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def stateless_random(seed: int, epoch: int, examples: np.ndarray, num_draws: int, first_draw: int = 0) -> np.ndarray:
    """Random 64-bit integers that depend on their arguments only.

    Args:
        seed: the run's seed.
        epoch: the training epoch, from 0.
        examples: the number of each example, int64 `[n]`.
        num_draws: how many integers each example gets.
        first_draw: the number of the first draw; disjoint ranges are independent streams.

    Returns:
        uint64 `[n, num_draws]`.
    """
    run = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN) + _mix(np.array([epoch], dtype=np.uint64) + _MIX_1)
    example = _mix(run + np.asarray(examples).astype(np.uint64) * _GOLDEN)
    draws = np.arange(first_draw + 1, first_draw + num_draws + 1, dtype=np.uint64) * _GOLDEN
    return _mix(example[:, None] + draws[None, :])


def bounded(random: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Maps random uint64 to int64 in `[0, bound)` (the bias, bound / 2^64, is beyond measuring)."""
    return (random % np.asarray(bound, dtype=np.uint64)).astype(np.int64)


class InteractionMatrix:
    """Who interacted with what: for each user row, the item columns in time order (CSR without values).

    Args:
        users: user row of each interaction, int `[n]`; a user's interactions are in time order.
        items: item column of each interaction, int `[n]`.
        num_users: number of rows.
        num_items: number of columns.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, num_users: int, num_items: int):
        users, items = np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64)
        order = np.argsort(users, kind="stable")
        self.num_users, self.num_items = num_users, num_items
        self.users, self.items = users[order], items[order]
        self.indptr = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))]).astype(np.int64)
        # Without repetitions, so that the number of a user's keys tells whether an item is left.
        self._keys = np.unique(self.users * num_items + self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """Number of interactions of each user, int64 `[num_users]`."""
        return np.diff(self.indptr)

    def of(self, user: int) -> np.ndarray:
        """Items of one user, in time order."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def of_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR rows of several users: `(indptr [n + 1], items)`."""
        lengths = self.lengths[users]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(self.indptr[users] - indptr[:-1], lengths)
        return indptr, self.items[positions]

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
        """Items drawn uniformly from those that each user has not interacted with.

        Args:
            users: user row of each example, int64 `[n]`.
            num_negatives: draws per example, with replacement.
            seed, epoch, examples, first_draw: see [`stateless_random`].

        Returns:
            int64 `[n, num_negatives]`.

        Raises:
            ValueError: a user has interacted with every item, so that no negative exists.
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
            # A rejected draw is replaced from a stream that no other `first_draw` has: uniform over what is left.
            row, column = bad[:, 0], bad[:, 1]
            fresh = stateless_random(seed, epoch, examples[row] * num_negatives + column, 1, draw)
            negatives[row, column] = bounded(fresh[:, 0], self.num_items)
            bad = bad[self.contains(users[row], negatives[row, column])]
            draw += 1
        return negatives
