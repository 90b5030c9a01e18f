"""The split of histories into a past that is known and targets to retrieve (sections II-D1 and II-E1 of TokenRec).

The collaborative model and T5 train on the same split. Its random choices are hashes of (seed, epoch, user), see
[`stateless_random`].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..models.embedding_store import Ragged
from .stateless_random import bounded, stateless_random


class HistorySplit(NamedTuple):
    """Histories split in two.

    Args:
        past: the items known of each user.
        positions: the place of each item of `past` in its history, from 0 for the oldest, int64 `[number of past items]`.
        targets: the items to retrieve for each user.
    """

    past: Ragged
    positions: np.ndarray
    targets: Ragged


def split_histories(
    histories: Ragged,
    users: np.ndarray,
    *,
    longest_past: np.ndarray,
    num_targets: np.ndarray | int,
    shuffle: bool,
    seed: int,
    epoch: int,
    order_draw: int,
    size_draw: int,
) -> HistorySplit:
    """Splits each history into a past of random size and the targets that follow it.

    Args:
        histories: the items of each of B users, in time order.
        users: the user row of each history, int64 `[B]`.
        longest_past: the largest size of the past, int64 `[B]`. The size is uniform from 1 to this number. A user with 0
            has no past; without `shuffle`, the targets of this user are the latest items.
        num_targets: the largest number of targets, int64 `[B]` or one number for all.
        shuffle: put each history in random order before it is split; else the past ends at a random moment.
        seed, epoch: see [`stateless_random`].
        order_draw, size_draw: the numbers of the draws for the order and for the size of the past.
    """
    lengths, rows, ranks = histories.lengths, histories.rows, histories.ranks
    items, positions = histories.values, ranks
    if shuffle:
        order = shuffled_order(users, rows, ranks, seed, epoch, order_draw)
        items, positions = items[order], ranks[order]
    random = stateless_random(seed, epoch, users, 1, size_draw)[:, 0]
    sizes = np.where(longest_past > 0, 1 + bounded(random, np.maximum(longest_past, 1)), 0)
    first_without_past = 0 if shuffle else np.maximum(lengths - num_targets, 0)
    first = np.where(longest_past > 0, sizes, first_without_past)
    counts = np.minimum(lengths - first, num_targets)
    known, wanted = ranks < sizes[rows], (ranks >= first[rows]) & (ranks < (first + counts)[rows])
    return HistorySplit(
        Ragged.from_lengths(sizes, items[known]), positions[known], Ragged.from_lengths(counts, items[wanted])
    )


def shuffled_order(
    users: np.ndarray, rows: np.ndarray, positions: np.ndarray, seed: int, epoch: int, draw: int
) -> np.ndarray:
    """An order that keeps each history together and is random within it.

    Args:
        users: the user row of each history, int64 `[B]`.
        rows: the history of each item, int64 `[n]`, ascending.
        positions: the place of each item in its history, int64 `[n]`.
        seed, epoch, draw: see [`stateless_random`].

    Returns:
        int64 `[n]`.
    """
    element = users[rows].astype(np.uint64) << np.uint64(32) | positions.astype(np.uint64)
    return np.lexsort((stateless_random(seed, epoch, element, 1, draw)[:, 0], rows))
