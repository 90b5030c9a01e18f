"""Leave-one-out splits (section III-A of TokenRec, arXiv 2406.10450), as data sets of ids and as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict

from ..models.codes import check_ids
from .files import quoted
from .interaction_matrix import InteractionMatrix
from .interactions import encode_column, time_order

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
    """Splits in rows.

    Args:
        user_ids: the id of each user row, of all splits, in order of first appearance.
        item_ids: the id of each item row, of all splits, in order of first appearance.
        interactions: the interactions to train on.
        holdout: the items to evaluate on.
    """

    user_ids: list[str]
    item_ids: list[str]
    interactions: InteractionMatrix
    holdout: Holdout


def leave_one_out(interactions: Dataset, min_interactions: int = 3) -> DatasetDict:
    """Holds out the last two interactions of each user: the last is the test target, the one before the validation target.

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
            f"no user has {min_interactions} interactions or more (the most is {counts.max(initial=0)}), so no item can "
            "be held out for validation and test; give more interactions per user."
        )
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(users))
    held_out = np.where(np.repeat(counts, counts) >= min_interactions, from_end, 0)
    rows = {"train": (held_out == 0) | (held_out > 2), "validation": held_out == 2, "test": held_out == 1}
    return DatasetDict({split: Dataset(table.take(order[chosen])) for split, chosen in rows.items()})


def index_splits(splits: DatasetDict, evaluate_on: str) -> IndexedSplits:
    """Splits in rows, for a run that trains on the splits before `evaluate_on`.

    Args:
        splits: `train`, `validation` and `test`, with columns `user_id` and `item_id`.
        evaluate_on: `"validation"` (train on `train`) or `"test"` (train on `train` and `validation`).

    Raises:
        ValueError: an id is empty, too long or contains white space.
    """
    tables = [splits[name].select_columns(["user_id", "item_id"]).with_format("arrow")[:] for name in SPLITS]
    ends = np.cumsum([table.num_rows for table in tables])
    columns = pa.concat_tables(tables, promote_options="permissive")
    users, user_ids = encode_column(columns["user_id"])
    items, item_ids = encode_column(columns["item_id"])
    place = SPLITS.index(evaluate_on)
    trained, held_out = slice(0, ends[place - 1]), slice(ends[place - 1], ends[place])
    interactions = InteractionMatrix(users[trained], items[trained], len(user_ids), len(item_ids))
    return IndexedSplits(
        check_ids(user_ids.to_pylist(), "user"),
        check_ids(item_ids.to_pylist(), "item"),
        interactions,
        Holdout(users[held_out], items[held_out]),
    )


def fingerprint(*columns: Sequence[str]) -> str:
    """16 hex digits that distinguish columns of ids from all others."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update("\n".join(column).encode() + b"\0")
    return digest.hexdigest()[:16]
