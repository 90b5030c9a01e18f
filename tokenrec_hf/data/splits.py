"""Leave-one-out (section III-A of TokenRec, arXiv 2406.10450) and temporal splits, as data sets of ids and as rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict

from ..models.codes import check_ids
from .cleaning import encode_column, time_order, timestamp_unit, whole_columns
from .files import quoted
from .interaction_matrix import InteractionMatrix

_ISO_8601 = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?\s?(Z|UTC|[-+]\d{2}:?\d{2})?)?")
SPLITS = ("train", "validation", "test")
# Ids read at once by `fingerprint`, so that it holds few strings in memory.
BLOCK = 1 << 16


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
        `train`, `validation` and `test` with the columns of `interactions`, ids as text and times as numbers, users in order of
        their first appearance.
        `validation` and `test` hold one row for each user with enough interactions, in the same order.

    Raises:
        ValueError: a column or a value is missing, a time or an id is none, `min_interactions` is too small, or no user has enough
            interactions.
    """
    if min_interactions < 3:
        raise ValueError(f"min_interactions is {min_interactions}; it must be 3 or more, one for each split.")
    table, users, timestamps = _columns(interactions)
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


def temporal_split(interactions: Dataset, at: str | float) -> DatasetDict:
    """Holds out what users did next at one moment in time, the same for all.

    The test item of a user is the first one from `at` on, the validation item the last one before. All other interactions
    before `at` are for training. Those after the test item are left out, so that no model knows anything of the time from `at` on.

    Args:
        interactions: columns `user_id`, `item_id` and `timestamp`.
        at: a date (ISO 8601, UTC), or the share of all interactions that come before, between 0 and 1.

    Returns:
        `train`, `validation` and `test` with the columns of `interactions`, ids as text and times as numbers, users in order of
        their first appearance.
        `validation` and `test` hold one row for each user with two interactions before `at` and one later, in the same order.

    Raises:
        ValueError: a column or a value is missing, a time or an id is none, `at` is neither a date nor a share, or no user can be
            evaluated.
    """
    table, users, timestamps = _columns(interactions)
    if timestamps is None:
        raise ValueError("the interactions have no column 'timestamp', so there is no moment to split them at.")
    order = time_order(users, timestamps)
    before = timestamps[order] < _moment(timestamps, at)
    counts = np.bincount(users)
    past = np.bincount(users[order], before, minlength=len(counts)).astype(np.int64)
    evaluated = (past >= 2) & (counts > past)
    if not evaluated.any():
        raise ValueError(
            f"no user has two interactions before {at} and one later, so nothing can be held out; choose another."
        )
    first = (np.cumsum(counts) - counts + past)[evaluated]
    before[first - 1] = False
    rows = {"train": np.flatnonzero(before), "validation": first - 1, "test": first}
    return DatasetDict({split: Dataset(table.take(order[chosen])) for split, chosen in rows.items()})


def _columns(interactions: Dataset) -> tuple[pa.Table, np.ndarray, np.ndarray | None]:
    """The table, the number of the user of each row, and the timestamps if there are any."""
    for column in ("user_id", "item_id"):
        if column not in interactions.column_names:
            raise ValueError(
                f"the interactions have no column {column!r} but {quoted(interactions.column_names)}; "
                "read them with load_interactions."
            )
    return whole_columns(interactions.with_format("arrow")[:], "the data set")


def _moment(timestamps: np.ndarray, at: str | float) -> float:
    """A date, or the quantile of a share, in the unit of the timestamps."""
    try:
        share = float(at)
    except (TypeError, ValueError):
        share = None
    if share is not None:
        if not 0 < share < 1:
            raise ValueError(f"at is {at}; it must be a date such as 2024-05-17 or a share between 0 and 1.")
        return np.sort(timestamps)[int(share * len(timestamps))]
    try:
        # pandas takes 05/11/2023 for a day in May, and "now".
        seconds = pd.Timestamp(str(at) if _ISO_8601.fullmatch(str(at)) else "").timestamp()
    except ValueError:
        raise ValueError(f"at is {at!r}; it must be a date such as 2024-05-17 or a share between 0 and 1.") from None
    unit = timestamp_unit(timestamps.max())
    if unit is None:
        raise ValueError(f"the timestamps are no times since 1970, so {at} cannot be found in them; give a share.")
    return seconds * unit


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
        for start in range(0, len(column), BLOCK):
            digest.update(("\n" * (start > 0) + "\n".join(column[start : start + BLOCK])).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
