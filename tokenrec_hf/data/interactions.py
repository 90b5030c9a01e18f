"""Interactions from files: read, checked, cleaned and reduced to a k-core.

Every source becomes a `datasets.Dataset` of string ids in which the rows of a user are together and in time order; all
later steps rely on this. The cleaning is that of section III-A of TokenRec (arXiv 2406.10450).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from ..models.codes import check_ids
from .demo import demo_interactions
from .named_datasets import DATA_SOURCES, locate
from .reading import RawFile, read_table

logger = logging.getLogger(__name__)

# The address of data sets on the Hub, as in `datasets` and `fsspec`.
HUB = "hf://datasets/"

_TIMES = [pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC")]


def load_interactions(
    source: Any,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    timestamp_column: str | None = None,
    min_rating: float | None = None,
    k_core: int | None = None,
) -> Dataset:
    """Reads and cleans interactions.

    Ids become strings (numbers without `.0`). Rows below `min_rating` are dropped first. If a user interacted with an item
    several times, the first interaction in time remains. Users and items outside the k-core are dropped last.

    Args:
        source: one of
            - a name: `demo` (made up), `ml-100k`, `ml-1m`, `lastfm`, `beauty`, `clothing` or `toys`, see
              [`~named_datasets.locate`];
            - a folder with `train.txt`, a line `user item item ...` for each user in time order, and optionally
              `test.txt`, the same lines with one more item at the end;
            - a text file with columns, a JSON file (`.jsonl`, `.json`: a line an object, or an array), or a Parquet file.
              The separator (`,`, tab, `;`, `|`, `::` or a space), a header, and the encoding (UTF-8, UTF-16, else Latin-1)
              are found from the content. The file may be packed (`.gz`, `.bz2`, `.xz`, `.zst`, `.zip`);
            - a folder of such files, which are read in the order of their names;
            - `hf://datasets/organisation/name`, a data set on the Hub (its split `train`), optionally with `@revision`;
            - a `datasets.Dataset`, an `IterableDataset` (streaming), a `DatasetDict` of one split, a data frame (pandas,
              polars), a table of Arrow, or a list of dicts. Only the needed columns are kept.
        user_column: the column of user ids; by default found by its name (`user_id`, `userID`, `reviewerID`, ...). In a file
            without header, its number, from 1; by default users, items, ratings and times are taken to come in this order.
        item_column: the column of item ids; by default found by its name (`item_id`, `asin`, `movieId`, ...).
        rating_column: the column of ratings; by default found by its name (`rating`, `overall`, `score`, ...).
        timestamp_column: the column of times, numbers or ISO 8601 dates; by default found by its name (`timestamp`,
            `unixReviewTime`, `datetime`, ...). Without times, the order of the rows is the order of time.
        min_rating: drop interactions with a smaller rating; by default all count.
        k_core: drop users and items with fewer interactions than this, repeatedly. By default 1 (none is dropped), and 5
            for `ml-1m` and the archive of `lastfm`.

    Returns:
        Columns `user_id` and `item_id` (strings) and, if times are known, `timestamp` (int64, or float64 if there are
        fractions; dates become seconds since 1970). Users are in the order of their first row. The rows of a user are
        together and in time order; rows with equal or unknown times are in file order.

    Raises:
        ValueError: a column is missing, a row cannot be used, or no row is left.
        FileNotFoundError: there is no such file and no such name, or a named set cannot be downloaded.
    """
    if k_core is not None and k_core < 1:
        raise ValueError(f"k_core is {k_core}; it must be 1 (drop no user and no item) or more.")
    asked = {"user": user_column, "item": item_column, "rating": rating_column, "timestamp": timestamp_column}
    known = DATA_SOURCES.get(source) if isinstance(source, str) else None
    raw = _find(source)
    origin = str(raw) if isinstance(raw, RawFile) else "the data set"
    table = read_table(raw, asked, origin)
    if min_rating is not None and "rating" not in table.column_names:
        raise ValueError(
            f"min_rating={min_rating} needs ratings, but {origin} has no rating column; name it by rating_column."
        )
    # A prepared folder is taken as it is. An owner's file is prepared like the paper's data.
    standard = known.k_core if known and isinstance(raw, RawFile) and not raw.path.is_dir() else 1
    interactions = _clean(table, origin, min_rating, k_core or standard)
    counts = len(interactions.unique("user_id")), len(interactions.unique("item_id")), len(interactions)
    if isinstance(raw, RawFile):
        text = "%s: %d rows; %d users, %d items and %d interactions are kept."
        logger.info(text, origin, table.num_rows, *counts)
    if known and min_rating is None and k_core is None and counts != known.counts:
        text = "%s gives %d users, %d items and %d interactions, but %s is known to have %d, %d and %d."
        logger.warning(text, origin, *counts, known.name, *known.counts)
    return interactions


# ----------------------------------------------------------------------------------------------------------------------


def _find(source: Any) -> RawFile | Dataset | IterableDataset:
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, pd.DataFrame):
        return Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, pa.Table) or hasattr(source, "to_arrow"):  # a table of Arrow, or a frame of polars
        return Dataset(source if isinstance(source, pa.Table) else source.to_arrow())
    if isinstance(source, list) and source and all(isinstance(row, dict) for row in source):
        return Dataset.from_list(source)
    if isinstance(source, DatasetDict) and len(source) == 1:
        return next(iter(source.values()))
    if not isinstance(source, (str, os.PathLike)):
        found = f"a {type(source).__name__}" + f" of {', '.join(source)}" * isinstance(source, DatasetDict)
        raise TypeError(
            f"interactions come from a name, a path, one datasets.Dataset, a data frame or a list of dicts, not from {found}."
        )
    if source == "demo":
        return demo_interactions()
    if isinstance(source, str) and source in DATA_SOURCES:
        return locate(source)
    if isinstance(source, str) and source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
        try:
            return load_dataset(name, revision=revision or None, split="train")
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"{source} could not be read ({reason}); check the name and the connection, and log in with "
                "`hf auth login` if it is private."
            ) from error
    path = Path(source).expanduser()
    if not path.exists():
        names = ", ".join(["demo", *DATA_SOURCES])
        raise FileNotFoundError(
            f"{str(source)!r} is neither a file, a folder nor a known data set ({names}); a data set on the Hub is "
            f"{HUB}organisation/name."
        )
    return RawFile(path)


def _clean(table: pa.Table, origin: str, min_rating: float | None, k_core: int) -> Dataset:
    if not table.num_rows:
        raise ValueError(f"{origin} holds no interactions.")
    users, user_ids = _ids(table["user"], "user id", origin)
    items, item_ids = _ids(table["item"], "item id", origin)
    ratings, timestamps = (
        _numbers(table[name], name, origin) if name in table.column_names else None for name in ("rating", "timestamp")
    )

    order = time_order(users, timestamps)
    if min_rating is not None and ratings is not None:
        order = order[ratings[order] >= min_rating]
    pairs = users[order] * len(item_ids) + items[order]
    order = order[np.sort(np.unique(pairs, return_index=True)[1])]  # the first of each pair
    order = order[_in_k_core(users[order], items[order], k_core)]
    if not len(order):
        filters = [f"min_rating={min_rating}"] * (min_rating is not None) + [f"k_core={k_core}"] * (k_core > 1)
        raise ValueError(
            f"none of the {table.num_rows} interactions of {origin} is left after {' and '.join(filters)}; ask for less."
        )
    columns = {"user_id": user_ids.take(pa.array(users[order])), "item_id": item_ids.take(pa.array(items[order]))}
    if timestamps is not None:
        columns["timestamp"] = pa.array(timestamps[order])
    return Dataset(pa.table(columns))


def encode_column(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value as a number, int64 `[n]`, and the distinct values in order of first appearance."""
    encoded = column.dictionary_encode("encode").unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def time_order(users: np.ndarray, timestamps: np.ndarray | None) -> np.ndarray:
    """Rows grouped by user and in time order; rows of equal time keep their order. int64 `[n]`."""
    return np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))


def _ids(column: pa.ChunkedArray, kind: str, origin: str) -> tuple[np.ndarray, pa.Array]:
    """Each id as a number, int64 `[n]`, and the distinct ids as checked text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = column.is_null(nan_is_null=True)
    if count := pc.sum(missing).as_py():
        raise ValueError(
            f"{origin}: {count} of {len(column)} rows have no {kind}, the first of them row "
            f"{pc.index(missing, True).as_py() + 1}; remove or complete them."
        )
    if pa.types.is_floating(column.type) and pc.all(pc.equal(column, pc.floor(column))).as_py():
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise ValueError(f"{origin}: the {kind}s are of type {column.type}; ids are text or whole numbers.")
    if _is_text(column.type):
        column = pc.utf8_trim_whitespace(column)
    codes, values = encode_column(column)
    values = values.cast(pa.string())
    if pc.all(pc.match_substring_regex(values, r"^-?\d+\.0$")).as_py():
        values = pc.utf8_slice_codeunits(values, 0, -2)
    try:
        check_ids(values.to_pylist(), kind)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return codes, values


def _numbers(column: pa.ChunkedArray, name: str, origin: str) -> np.ndarray:
    """Ratings or timestamps `[n]`: int64 if all are whole, else float64. Text is read as the first type that fits all of it."""
    kinds, expected = [pa.int64(), pa.float64()], "a number"
    if name == "timestamp":
        kinds, expected = kinds + _TIMES, "a number or an ISO 8601 date such as 2024-05-17T09:30:00"
    if _is_text(column.type):
        kind = next((kind for kind in kinds if _fits(column, kind)), None)
        if kind is None:
            for row, value in enumerate(column, 1):
                if not any(_fits(value, kind) for kind in kinds):
                    raise ValueError(f"{origin}: the {name} {value.as_py()!r} of row {row} is not {expected}.")
            raise ValueError(
                f"{origin}: the {name}s are written in more than one way; each must be {expected}, all alike."
            )
        column = column.cast(kind)
    if name == "timestamp" and (pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)):
        # float64 holds microseconds of our time; nanoseconds are cut off.
        unit = pa.timestamp("us", getattr(column.type, "tz", None))
        microseconds = column.cast(options=pc.CastOptions(unit, allow_time_truncate=True)).cast(pa.int64())
        column = pc.divide(microseconds.cast(pa.float64()), 1e6)
    try:
        values = column.to_numpy() if pa.types.is_integer(column.type) else column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(f"{origin}: the {name}s are of type {column.type}, not numbers.") from error
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{origin}: {bad.sum()} of {len(values)} rows have no finite {name}, the first of them row "
            f"{np.argmax(bad) + 1}; remove or complete them."
        )
    if values.dtype.kind == "f" and (values == np.floor(values)).all() and np.abs(values).max() < 2**53:
        return values.astype(np.int64)
    return values


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _fits(text: pa.ChunkedArray | pa.Scalar, kind: pa.DataType) -> bool:
    try:
        text.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _in_k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """The positions of the interactions in the k-core. To drop a user may push an item below k, and so on."""
    rows = np.arange(len(users))
    while True:
        user_counts, item_counts = np.bincount(users[rows]), np.bincount(items[rows])
        keep = (user_counts[users[rows]] >= k) & (item_counts[items[rows]] >= k)
        if keep.all():
            return rows
        rows = rows[keep]
