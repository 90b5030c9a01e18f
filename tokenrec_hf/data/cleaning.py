"""Cleaning of interactions: missing values, ids and times checked, rows chosen, repetitions dropped, reduced to a k-core.

The result is in the order of users, and each user's in time order. The cleaning is that of section III-A of TokenRec (arXiv
2406.10450).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..models.codes import check_ids
from .files import counted, quoted

logger = logging.getLogger(__name__)

# Spellings of a value that is not there.
MISSING = ("", "NULL", "null", "Null", "NaN", "nan", "NAN", "N/A", "n/a", r"\N", "<NA>", "NaT")
# By the largest timestamp: how many make a second. Seconds of 1973 to 5138 are 1e8 to 1e11.
_UNITS = ((1e8, 1), (1e11, 10**3), (1e14, 10**6), (1e17, 10**9))
_TIMES = [pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC")]


def clean(
    table: pa.Table,
    origin: str,
    *,
    events: Sequence[str] | None,
    min_rating: float | None,
    keep: str,
    drop_incomplete: bool,
    k_core: int,
) -> tuple[pa.Table, dict[str, int]]:
    """Cleans a table of interactions; [`~interactions.load_interactions`] describes the options.

    Args:
        table: as [`~reading.read_table`] returns it, with the columns that the options need.
        origin: the name of the source in messages.
        events, min_rating, keep, drop_incomplete, k_core: the options.

    Returns:
        The interactions that are kept, and the number of dropped rows by reason.

    Raises:
        ValueError: a row cannot be used, or no row is left.
    """
    if not table.num_rows:
        raise ValueError(f"{origin} holds no interactions.")
    kept = [("", table.num_rows)]
    table = table.append_column("row", pa.array(np.arange(1, table.num_rows + 1)))
    if events is not None:
        table = _of_events(table, events, origin)
    kept.append(("of other events", table.num_rows))
    unused = {"event"} if min_rating is not None else {"event", "rating"}
    table = _complete(table.drop_columns(list(unused & set(table.column_names))), origin, drop_incomplete)
    kept.append(("incomplete", table.num_rows))
    rows = table["row"].to_numpy()
    users, user_ids = _ids(table["user"], "user id", origin)
    items, item_ids = _ids(table["item"], "item id", origin)
    ratings, timestamps = (
        _numbers(table[name], name, rows, origin) if name in table.column_names else None
        for name in ("rating", "timestamp")
    )
    if timestamps is not None and len(timestamps):
        _check_unit(timestamps, rows, origin)

    order = time_order(users, timestamps)
    if ratings is not None:
        order = order[ratings[order] >= min_rating]
    kept.append((f"rated below {min_rating or 0:g}", len(order)))
    order = order[_distinct(users[order] * len(item_ids) + items[order], keep)]
    kept.append((f"repeated (the {keep} of each pair counts)", len(order)))
    order = order[_in_k_core(users[order], items[order], k_core)]
    kept.append((f"outside the {k_core}-core", len(order)))
    dropped = {reason: before - after for (_, before), (reason, after) in pairwise(kept) if before > after}
    if not len(order):
        filters = {
            "events": events,
            "drop_incomplete": drop_incomplete or None,
            "min_rating": min_rating,
            "k_core": k_core if k_core > 1 else None,
        }
        names = [f"{name}={value}" for name, value in filters.items() if value is not None]
        raise ValueError(
            f"none of the {kept[0][1]} interactions of {origin} is left after {' and '.join(names)}; ask for less."
        )
    columns = {"user_id": user_ids.take(pa.array(users[order])), "item_id": item_ids.take(pa.array(items[order]))}
    if timestamps is not None:
        columns["timestamp"] = pa.array(timestamps[order])
    return pa.table(columns), dropped


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


def _complete(table: pa.Table, origin: str, drop: bool) -> pa.Table:
    """The rows without missing values, with nulls in place of their spellings.

    Raises:
        ValueError: rows are incomplete and are not to be dropped.
    """
    columns = {name: _with_nulls(table[name]) for name in table.column_names}
    missing = {name: column.is_null(nan_is_null=True) for name, column in columns.items()}
    table, incomplete = pa.table(columns), reduce(pc.or_, missing.values())
    if not pc.any(incomplete).as_py():
        return table
    if drop:
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
    is_missing = pc.is_in(column, pa.array(MISSING, column.type))
    return pc.if_else(is_missing, pa.scalar(None, column.type), column)


def _distinct(pairs: np.ndarray, keep: str) -> np.ndarray:
    """The place of the first or the last of each pair, ascending."""
    if keep == "first":
        return np.sort(np.unique(pairs, return_index=True)[1])
    return np.sort(len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1])


def _check_unit(timestamps: np.ndarray, rows: np.ndarray, origin: str) -> None:
    """Makes sure that not some timestamps are in seconds and others in milliseconds, which would be in a wrong order."""
    places = np.argmin(timestamps), np.argmax(timestamps)
    first, last = (timestamp_unit(timestamps[place]) for place in places)
    if first and first != last:
        examples = " and ".join(f"{timestamps[place]} of row {rows[place]}" for place in places)
        raise ValueError(f"{origin}: the timestamps {examples} are in different units; convert all to one.")


def whole_columns(table: pa.Table, origin: str) -> tuple[pa.Table, np.ndarray, np.ndarray | None]:
    """Interactions with ids as text and times as numbers, as [`~interactions.load_interactions`] returns them.

    Args:
        table: columns `user_id` and `item_id`, and perhaps `timestamp`.
        origin: the name of the table in messages.

    Returns:
        The table, the number of the user of each row, int64 `[n]`, and the timestamps if there are any, `[n]`.

    Raises:
        ValueError: a value is missing, or is neither an id nor a time; or there are no rows.
    """
    if not table.num_rows:
        raise ValueError(f"{origin} holds no interactions.")
    times = "timestamp" in table.column_names
    is_plain = all(_is_text(table[name].type) and not table[name].null_count for name in ("user_id", "item_id"))
    if times and is_plain:
        column = table["timestamp"]
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        is_plain = is_number and not column.null_count and bool(np.isfinite(column.to_numpy()).all())
    if not is_plain:
        names = {"user": "user_id", "item": "item_id"} | ({"timestamp": "timestamp"} if times else {})
        rows = np.arange(1, table.num_rows + 1)
        part = _complete(
            pa.table({role: table[name] for role, name in names.items()} | {"row": rows}), origin, drop=False
        )
        for role in ("user", "item"):
            codes, ids = _ids(part[role], f"{role} id", origin)
            table = table.set_column(table.column_names.index(names[role]), names[role], ids.take(pa.array(codes)))
        if times:
            values = pa.array(_numbers(part["timestamp"], "timestamp", rows, origin))
            table = table.set_column(table.column_names.index("timestamp"), "timestamp", values)
    return table, encode_column(table["user_id"])[0], table["timestamp"].to_numpy() if times else None


def timestamp_unit(timestamp: float) -> int | None:
    """How many units of a timestamp since 1970 make a second, by its size; None if it is too small for that."""
    return next((unit for least, unit in reversed(_UNITS) if timestamp >= least), None)


def encode_column(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value as a number, int64 `[n]`, and the distinct values in order of first appearance."""
    # A filtered data set has a chunk for each row, and every chunk would get a dictionary of its own.
    column = pa.table({"values": column}).combine_chunks()["values"]
    encoded = column.dictionary_encode("encode").unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


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
    values = without_points(values.cast(pa.string()), kind, origin)
    try:
        check_ids(values.to_pylist(), kind)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return codes, values


def without_points(ids: pa.Array, kind: str, origin: str) -> pa.Array:
    """Ids in text as they are, but without `.0` where all are whole numbers with it, as pandas writes a column with gaps."""
    if not len(ids) or not pc.all(pc.match_substring_regex(ids, r"^-?\d+\.0$")).as_py():
        return ids
    shorter = pc.utf8_slice_codeunits(ids, 0, -2)
    logger.warning("%s: the %ss are all written like %s and are read like %s.", origin, kind, ids[0], shorter[0])
    return shorter


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
    if values.dtype.kind == "f" and (values == np.floor(values)).all() and np.abs(values).max(initial=0) < 2**53:
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
