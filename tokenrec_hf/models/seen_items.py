"""What users have interacted with, in rows (CSR): user row u has seen the item rows items[indptr[u] : indptr[u + 1]].

A part of the embedding store. Knows neither ids nor files.
"""

from __future__ import annotations

import numpy as np


class SeenItems:
    """The items of each user, oldest first; an item may come up again.

    Args:
        indptr: int64 `[num_users + 1]`.
        items: int32 `[indptr[-1]]`.

    Raises:
        ValueError: the two do not fit together.
    """

    def __init__(self, indptr: np.ndarray | None = None, items: np.ndarray | None = None):
        self.indptr = np.zeros(1, dtype=np.int64) if indptr is None else indptr
        self.items = np.empty(0, dtype=np.int32) if items is None else items
        if not len(self.indptr) or self.indptr[-1] != len(self.items):
            raise ValueError("the seen items do not fit the users and items.")

    @property
    def num_users(self) -> int:
        """The number of users."""
        return len(self.indptr) - 1

    def add_users(self, count: int) -> None:
        """Adds users, who have seen nothing, at the end."""
        self.indptr = np.append(self.indptr, np.full(count, self.indptr[-1]))

    def add(self, users: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> None:
        """Appends to the lists of `users` `[n]` the `lengths` `[n]` next of `items`."""
        self._set_pairs(
            np.concatenate([self._owners(), np.repeat(users, lengths)]),
            np.concatenate([self.items, items]),
            self.num_users,
        )

    def replace(self, users: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> None:
        """As `add`, instead of what these users have seen; of a user given twice the last list counts."""
        positions = np.arange(len(users))
        last = np.full(self.num_users, -1)
        last[users] = positions
        counts = np.repeat(last[users] == positions, lengths)
        untouched = np.repeat(last < 0, np.diff(self.indptr))
        self._set_pairs(
            np.concatenate([self._owners()[untouched], np.repeat(users, lengths)[counts]]),
            np.concatenate([self.items[untouched], items[counts]]),
            self.num_users,
        )

    def keep_users(self, keep: np.ndarray) -> None:
        """Removes the users where boolean `keep` `[num_users]` is false; those after them move up."""
        owners = self._owners()
        stays = keep[owners]
        self._set_pairs((np.cumsum(keep) - 1)[owners[stays]], self.items[stays], int(keep.sum()))

    def keep_items(self, keep: np.ndarray) -> None:
        """Removes the items where boolean `keep` `[num_items]` is false; the rows after them move up."""
        stays = keep[self.items]
        self._set_pairs(self._owners()[stays], (np.cumsum(keep) - 1)[self.items[stays]], self.num_users)

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists of several users.

        Args:
            users: int64 `[n]`; -1 for a user who has seen nothing.

        Returns:
            `(indptr, items)`, int64 `[n + 1]` and int64 `[indptr[-1]]`.
        """
        # Row -1 is a valid index for NumPy; what it finds is replaced.
        starts = np.where(users < 0, 0, self.indptr[users])
        ends = np.where(users < 0, 0, self.indptr[np.asarray(users) + 1])
        indptr = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], ends - starts)
        return indptr, self.items[positions].astype(np.int64)

    def _owners(self) -> np.ndarray:
        """The user row of each entry of `items`."""
        return np.repeat(np.arange(self.num_users), np.diff(self.indptr))

    def _set_pairs(self, users: np.ndarray, items: np.ndarray, num_users: int) -> None:
        """Makes (user row, item row) pairs, for each user in order, the seen items."""
        order = np.argsort(users, kind="stable")
        counts = np.bincount(users, minlength=num_users)
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.items = items[order].astype(np.int32)
