"""Interactions from files: read, checked, cleaned and reduced to a k-core.

Every source becomes a `datasets.Dataset` of string ids in which the rows of a user are together and in time order; all
later steps rely on this. The cleaning is that of section III-A of TokenRec (arXiv 2406.10450).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from ..models.codes import check_ids
from .demo import demo_interactions
from .files import RawFile, counted, quoted
from .named_datasets import DATA_SOURCES, locate
from .reading import TableFormat, read_table

logger = logging.getLogger(__name__)

# The address of data sets on the Hub, as in `datasets` and `fsspec`.
HUB = "hf://datasets/"

# Spellings of a value that is not there.
_MISSING = ("", "NULL", "null", "Null", "NaN", "nan", "NAN", "N/A", "n/a", r"\N", "<NA>", "NaT")
# By the largest timestamp: how many make a second. Seconds of 1973 to 5138 are 1e8 to 1e11.
_UNITS = ((1e8, 1), (1e11, 10**3), (1e14, 10**6), (1e17, 10**9))
_TIMES = [pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC")]


@dataclass(frozen=True)
class ReadingOptions:
    """The options of [`load_interactions`], which describes them.

    Raises:
        ValueError: an option is impossible.
    """

    user_column: str | None = None
    item_column: str | None = None
    rating_column: str | None = None
    timestamp_column: str | None = None
    event_column: str | None = None
    events: Sequence[str] | None = None
    min_rating: float | None = None
    keep: Literal["first", "last"] = "first"
    drop_incomplete: bool = False
    k_core: int | None = None

    def __post_init__(self) -> None:
        if self.k_core is not None and self.k_core < 1:
            raise ValueError(f"k_core is {self.k_core}; it must be 1 (drop no user and no item) or more.")
        if self.keep not in ("first", "last"):
            raise ValueError(f"keep is {self.keep!r}; of repeated interactions the 'first' or the 'last' is kept.")

    @property
    def columns(self) -> dict[str, str | None]:
        """The columns to look for, by role. Ratings and events are only read where they are used."""
        used = {"rating": self.min_rating is not None, "event": self.events is not None}
        columns = {role: getattr(self, f"{role}_column") for role in ("user", "item", "rating", "timestamp", "event")}
        return {role: column for role, column in columns.items() if column is not None or used.get(role, True)}

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, for JSON."""
        changed = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        return {name: value for name, value in asdict(self).items() if name in changed}


@dataclass(frozen=True)
class ReadingReport:
    """What was read, dropped and kept.

    Args:
        source: the file or data set.
        format: the format, and the columns with reasons.
        rows: rows that were read.
        dropped: the number of dropped rows by reason.
        users: users that are kept.
        items: items that are kept.
        interactions: interactions that are kept.
        first: the first time, ISO 8601, or the timestamp itself if its unit is not known. None without times.
        last: the last time.
    """

    source: str
    format: TableFormat
    rows: int
    dropped: dict[str, int]
    users: int
    items: int
    interactions: int
    first: str | None
    last: str | None

    def __str__(self) -> str:
        """The report as one paragraph."""
        columns = [
            f"{role}s from column {name!r} ({self.format.reasons[role]})" for role, name in self.format.columns.items()
        ]
        if self.format.unused:
            columns.append(f"not used: {quoted(self.format.unused[:10])}{', ...' * (len(self.format.unused) > 10)}")
        dropped = [f"{number} {reason}" for reason, number in self.dropped.items() if number]
        lost = f" {', '.join(dropped)} {'is' if sum(self.dropped.values()) == 1 else 'are'} dropped;" if dropped else ""
        counts = (counted(self.users, "user"), counted(self.items, "item"), counted(self.interactions, "interaction"))
        span = (
            f", from {self.first} to {self.last}" if self.first else ", in the order of the rows (there are no times)"
        )
        return (
            f"{self.source}: {'; '.join([self.format.name, ', '.join(columns)]).removesuffix('; ')}. "
            f"{counted(self.rows, 'row')};{lost} {counts[0]}, {counts[1]} and {counts[2]} are kept{span}."
        )


def load_interactions(
    source: Any,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    timestamp_column: str | None = None,
    event_column: str | None = None,
    events: Sequence[str] | None = None,
    min_rating: float | None = None,
    keep: Literal["first", "last"] = "first",
    drop_incomplete: bool = False,
    k_core: int | None = None,
) -> Dataset:
    """Reads and cleans interactions.

    Ids become strings (numbers without `.0`), without spaces around them. Rows of other `events` are dropped first, then
    incomplete rows and those below `min_rating`. If a user interacted with an item several times, one interaction remains.
    Users and items outside the k-core are dropped last.

    An empty value, `NULL`, `nan` or `N/A` is missing, and so are the spellings of databases and pandas. Columns that are not used may lack values.

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
        event_column: the column of kinds of events; by default found by its name (`event`, `behavior`, `action`, ...).
        events: the kinds of events that count, such as `["cart", "purchase"]`; by default all rows count alike.
        min_rating: drop interactions with a smaller rating; by default all count.
        keep: the `"first"` or the `"last"` in time of a user's interactions with the same item. All of them cannot be kept:
            seen items are never recommended, and a repeated one could not be evaluated.
        drop_incomplete: drop rows without a user, an item, or a rating or time that is used; by default they are an error.
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
    options = ReadingOptions(
        user_column,
        item_column,
        rating_column,
        timestamp_column,
        event_column,
        events,
        min_rating,
        keep,
        drop_incomplete,
        k_core,
    )
    interactions, report = read_interactions(source, options)
    logger.info("%s", report)
    return interactions


def read_interactions(source: Any, options: ReadingOptions) -> tuple[Dataset, ReadingReport]:
    """[`load_interactions`] with a report of what was read, dropped and kept."""
    known = DATA_SOURCES.get(source) if isinstance(source, str) else None
    raw = _find(source)
    origin = str(raw) if isinstance(raw, RawFile) else "the data set"
    table, table_format = read_table(raw, options.columns, origin)
    for role, asked in (("rating", options.min_rating), ("event", options.events)):
        if asked is not None and role not in table.column_names:
            name = "min_rating" if role == "rating" else "events"
            raise ValueError(
                f"{name}={asked} needs {role}s, but {origin} has no {role} column; name it by {role}_column."
            )
    # A prepared folder is taken as it is. An owner's file is prepared like the paper's data.
    standard = known.k_core if known and isinstance(raw, RawFile) and not raw.path.is_dir() else 1
    k_core = options.k_core or standard
    interactions, dropped = _clean(table, origin, options, k_core)
    counts = len(interactions.unique("user_id")), len(interactions.unique("item_id")), len(interactions)
    if known and options.min_rating is None and options.k_core is None and counts != known.counts:
        text = "%s gives %d users, %d items and %d interactions, but %s is known to have %d, %d and %d."
        logger.warning(text, origin, *counts, known.name, *known.counts)
    span = _span(
        interactions.with_format("arrow")["timestamp"][:] if "timestamp" in interactions.column_names else None
    )
    return interactions, ReadingReport(origin, table_format, table.num_rows, dropped, *counts, *span)


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


def _clean(table: pa.Table, origin: str, options: ReadingOptions, k_core: int) -> tuple[Dataset, dict[str, int]]:
    """The interactions that are kept, and the number of dropped rows by reason."""
    if not table.num_rows:
        raise ValueError(f"{origin} holds no interactions.")
    kept = [("", table.num_rows)]
    table = table.append_column("row", pa.array(np.arange(1, table.num_rows + 1)))
    if options.events is not None:
        table = _of_events(table, options.events, origin)
    kept.append(("of other events", table.num_rows))
    unused = {"event"} if options.min_rating is not None else {"event", "rating"}
    table = _complete(table.select([name for name in table.column_names if name not in unused]), origin, options)
    kept.append(("incomplete", table.num_rows))
    rows = table["row"].to_numpy()
    users, user_ids = _ids(table["user"], "user id", origin)
    items, item_ids = _ids(table["item"], "item id", origin)
    ratings, timestamps = (
        _numbers(table[name], name, rows, origin) if name in table.column_names else None
        for name in ("rating", "timestamp")
    )
    if timestamps is not None:
        _check_unit(timestamps, rows, origin)

    order = time_order(users, timestamps)
    if options.min_rating is not None and ratings is not None:
        order = order[ratings[order] >= options.min_rating]
    kept.append((f"rated below {options.min_rating or 0:g}", len(order)))
    order = order[_distinct(users[order] * len(item_ids) + items[order], options.keep)]
    kept.append((f"repeated (the {options.keep} of each pair counts)", len(order)))
    order = order[_in_k_core(users[order], items[order], k_core)]
    kept.append((f"outside the {k_core}-core", len(order)))
    dropped = {reason: before - after for (_, before), (reason, after) in pairwise(kept) if before > after}
    if not len(order):
        filters = options.given() | ({"k_core": k_core} if k_core > 1 else {})
        names = [
            f"{name}={filters[name]}"
            for name in ("events", "drop_incomplete", "min_rating", "k_core")
            if name in filters
        ]
        raise ValueError(
            f"none of the {kept[0][1]} interactions of {origin} is left after {' and '.join(names)}; ask for less."
        )
    columns = {"user_id": user_ids.take(pa.array(users[order])), "item_id": item_ids.take(pa.array(items[order]))}
    if timestamps is not None:
        columns["timestamp"] = pa.array(timestamps[order])
    return Dataset(pa.table(columns)), dropped


def _of_events(table: pa.Table, events: Sequence[str], origin: str) -> pa.Table:
    """The rows of some kinds of events."""
    column = _with_nulls(table["event"]).cast(pa.string())
    known = [event for event in pc.unique(column).to_pylist() if event is not None]
    if unknown := [event for event in events if event not in known]:
        text = f"{origin} has no event {quoted(unknown)}; its events are {quoted(sorted(known)[:10])}."
        if any("=" in event for event in unknown):
            raise ValueError(f"{text} Events have no weights; name the ones that count.")
        if len(unknown) == len(events):
            raise ValueError(text)
        # Of a day, some kinds may be missing.
        logger.warning(text)
    return table.filter(pc.is_in(column, pa.array(events, pa.string())))


def _complete(table: pa.Table, origin: str, options: ReadingOptions) -> pa.Table:
    """The rows without missing values, with nulls in place of their spellings.

    Raises:
        ValueError: rows are incomplete and are not to be dropped.
    """
    columns = {name: _with_nulls(table[name]) for name in table.column_names}
    missing = {name: column.is_null(nan_is_null=True) for name, column in columns.items()}
    table, incomplete = pa.table(columns), reduce(pc.or_, missing.values())
    if not pc.any(incomplete).as_py():
        return table
    if options.drop_incomplete:
        return table.filter(pc.invert(incomplete))
    problems = []
    for name, flags in missing.items():
        if count := pc.sum(flags).as_py():
            rows = ", ".join(map(str, table["row"].filter(flags)[:3].to_pylist()))
            label = f"{name} id" if name in ("user", "item") else name
            places = f"row{'s' * (count > 1)} {rows}{', ...' * (count > 3)}"
            problems.append(f"{count} of {len(table)} rows without {label} ({places})")
    raise ValueError(
        f"{origin} has {' and '.join(problems)}; complete them, or drop them by drop_incomplete, which drops "
        f"{counted(pc.sum(incomplete).as_py(), 'row')}."
    )


def _with_nulls(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without spaces around its texts, and with nulls in place of texts that say that there is no value."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if not _is_text(column.type):
        return column
    column = pc.utf8_trim_whitespace(column)
    is_missing = pc.is_in(column, pa.array(_MISSING, column.type))
    return pc.if_else(is_missing, pa.scalar(None, column.type), column)


def _distinct(pairs: np.ndarray, keep: str) -> np.ndarray:
    """The place of the first or the last of each pair, ascending."""
    if keep == "first":
        return np.sort(np.unique(pairs, return_index=True)[1])
    return np.sort(len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1])


def _span(timestamps: pa.ChunkedArray | None) -> tuple[str | None, str | None]:
    """The first and the last time; without times, None."""
    if timestamps is None:
        return None, None
    ends = pc.min_max(timestamps).as_py().values()
    unit = timestamp_unit(max(ends))
    first, last = (str(time) if unit is None else str(pd.Timestamp(time // unit, unit="s")) for time in ends)
    return first, last


def _check_unit(timestamps: np.ndarray, rows: np.ndarray, origin: str) -> None:
    """Makes sure that not some timestamps are in seconds and others in milliseconds, which would be in a wrong order."""
    places = np.argmin(timestamps), np.argmax(timestamps)
    first, last = (timestamp_unit(timestamps[place]) for place in places)
    if first and first != last:
        examples = " and ".join(f"{timestamps[place]} of row {rows[place]}" for place in places)
        raise ValueError(f"{origin}: the timestamps {examples} are in different units; convert all to one.")


def timestamp_unit(timestamp: float) -> int | None:
    """How many units of a timestamp since 1970 make a second, by its size; None if it is too small for that."""
    return next((unit for least, unit in reversed(_UNITS) if timestamp >= least), None)


def encode_column(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value as a number, int64 `[n]`, and the distinct values in order of first appearance."""
    encoded = column.dictionary_encode("encode").unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def time_order(users: np.ndarray, timestamps: np.ndarray | None) -> np.ndarray:
    """Rows grouped by user and in time order; rows of equal time keep their order. int64 `[n]`."""
    return np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))


def _ids(column: pa.ChunkedArray, kind: str, origin: str) -> tuple[np.ndarray, pa.Array]:
    """Each id as a number, int64 `[n]`, and the distinct ids as checked text."""
    if pa.types.is_floating(column.type) and pc.all(pc.equal(column, pc.floor(column))).as_py():
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise ValueError(f"{origin}: the {kind}s are of type {column.type}; ids are text or whole numbers.")
    codes, values = encode_column(column)
    values = values.cast(pa.string())
    if pc.all(pc.match_substring_regex(values, r"^-?\d+\.0$")).as_py():
        values = pc.utf8_slice_codeunits(values, 0, -2)
    try:
        check_ids(values.to_pylist(), kind)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return codes, values


def _numbers(column: pa.ChunkedArray, name: str, rows: np.ndarray, origin: str) -> np.ndarray:
    """Ratings or timestamps `[n]`: int64 if all are whole, else float64. Text is read as the first type that fits all of it."""
    kinds, expected = [pa.int64(), pa.float64()], "a number"
    if name == "timestamp":
        kinds, expected = kinds + _TIMES, "a number or an ISO 8601 date such as 2024-05-17T09:30:00"
    if _is_text(column.type):
        if name == "timestamp":
            column = pc.replace_substring_regex(column, " UTC$", "Z")
        kind = next((kind for kind in kinds if _fits(column, kind)), None)
        if kind is None:
            for row, value in zip(rows, column):
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
            f"{origin}: {bad.sum()} of {len(values)} rows have an infinite {name}, the first of them row {rows[np.argmax(bad)]}; "
            "correct them."
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
