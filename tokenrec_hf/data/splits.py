"""Leave-one-out splits (section III-A of TokenRec, arXiv 2406.10450), as data sets of ids and as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict

from ..models.codes import IdIndex
from .interaction_matrix import InteractionMatrix
from .interactions import encode_column, quoted, time_order

SPLITS = ("train", "validation", "test")


@dataclass
class Holdout:
    """Users and the item held out for each of them, in rows.

    Args:
        users: int64 `[n]`.
        targets: int64 `[n]`.
    """

    users: np.ndarray
    targets: np.ndarray


@dataclass
class IndexedSplits:
    """Splits in rows: ids, the interactions that a run trains on, and the items held out.

    Args:
        user_ids, item_ids: the id of each row, of all splits, in order of first appearance.
        interactions: what is trained on, of users in rows.
        holdout: what is evaluated on.
    """

    user_ids: list[str]
    item_ids: list[str]
    interactions: InteractionMatrix
    holdout: Holdout


def index_splits(splits: DatasetDict, evaluate_on: str) -> IndexedSplits:
    """Rows for a run that is evaluated on `"validation"` (and trained on train) or `"test"` (on train + validation)."""
    columns = {name: (splits[name]["user_id"][:], splits[name]["item_id"][:]) for name in SPLITS}
    user_ids = list(dict.fromkeys(user for name in SPLITS for user in columns[name][0]))
    item_ids = list(dict.fromkeys(item for name in SPLITS for item in columns[name][1]))
    user_index, item_index = IdIndex(user_ids, "user"), IdIndex(item_ids, "item")
    rows = {name: (user_index.rows(users), item_index.rows(items)) for name, (users, items) in columns.items()}
    trained = SPLITS[: SPLITS.index(evaluate_on)]
    users, items = (np.concatenate([rows[name][side] for name in trained]) for side in (0, 1))
    interactions = InteractionMatrix(users, items, len(user_ids), len(item_ids))
    return IndexedSplits(user_ids, item_ids, interactions, Holdout(*rows[evaluate_on]))


def leave_one_out(interactions: Dataset, min_interactions: int = 3) -> DatasetDict:
    """Holds out each user's last two interactions: the last one is the test target, the one before the validation target.

    Args:
        interactions: columns `user_id` and `item_id`, in time order unless there is a column `timestamp`.
        min_interactions: users with fewer interactions, at least 3, are in `train` only.

    Returns:
        `train`, `validation` and `test` with the columns of `interactions`, users in order of their first appearance.
        `validation` and `test` hold one row for each user with enough interactions, in the same order.

    Raises:
        ValueError: a column is missing, `min_interactions` is too small, or no user has enough interactions.
    """
    if min_interactions < 3:
        raise ValueError(f"min_interactions is {min_interactions}; it must be 3 or more, one for each split.")
    for column in ("user_id", "item_id"):
        if column not in interactions.column_names:
            raise ValueError(
                f"the interactions have no column {column!r} but {quoted(interactions.column_names)}; "
                "read them with load_interactions."
            )
    table = interactions.with_format("arrow")[:]
    users = encode_column(table["user_id"])[0]
    timestamps = table["timestamp"].to_numpy() if "timestamp" in table.column_names else None
    order = time_order(users, timestamps)
    counts = np.bincount(users)
    if not len(users) or counts.max() < min_interactions:
        raise ValueError(
            f"no user has {min_interactions} interactions or more (the most is {counts.max(initial=0)}), so none can be held out "
            "for validation and test; give more interactions per user."
        )
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(users))
    held_out = np.where(np.repeat(counts, counts) >= min_interactions, from_end, 0)
    rows = {"train": (held_out == 0) | (held_out > 2), "validation": held_out == 2, "test": held_out == 1}
    return DatasetDict({split: Dataset(table.take(order[chosen])) for split, chosen in rows.items()})


def fingerprint(*columns: Sequence[str]) -> str:
    """16 hex digits that tell columns of ids from all others."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update("\n".join(column).encode() + b"\0")
    return digest.hexdigest()[:16]
