"""Interactions from files: read, checked, cleaned, reduced to a k-core, and split leave-one-out.

Whatever the format, what comes out is a `datasets.Dataset` of string ids in which each user's rows stand together in time
order; everything after it may rely on that. Splits are those of section III-A of TokenRec (arXiv 2406.10450). Knows nothing
about vectors, tokens or models.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet
from datasets import Dataset, IterableDataset, load_dataset

from ..models.codes import check_ids
from .data_sources import DATA_SOURCES, DataSource, RawFile, demo_interactions, locate

logger = logging.getLogger(__name__)

# Where the Hub keeps data sets, as `datasets` and `fsspec` write it.
HUB = "hf://datasets/"

# Names under which the columns are known, in order of preference, in small letters and without anything but letters and digits.
_ALIASES = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "visitorid"),
    "item": ("itemid", "item", "iid", "asin", "movieid", "artistid", "productid", "parentasin"),
    "rating": ("rating", "overall", "score", "weight"),
    "timestamp": ("timestamp", "time", "unixtimestamp", "unixreviewtime", "unixtime", "datetime", "date"),
}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_INTEGERS_WITH_POINT = r"^-?\d+\.0$"


def load_interactions(
    source: str | os.PathLike | Dataset,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    timestamp_column: str | None = None,
    min_rating: float | None = None,
    k_core: int | None = None,
) -> Dataset:
    """Reads and cleans interactions.

    Ids become strings (numbers without `.0`). Of several interactions of a user with the same item, the first in time
    remains. Rows below `min_rating` are dropped before that, users and items outside the k-core after it.

    Args:
        source: one of
            - a name: `demo` (made up), `ml-100k`, `ml-1m`, `lastfm`, `beauty` or `clothing`
              (see [`~data_sources.locate`] for where they come from);
            - a folder with `train.txt`, a line `user item item ...` per user in time order, and optionally `test.txt`, the
              same lines with one more item at the end;
            - a CSV, TSV, JSON-lines (`.jsonl`, `.json`), atomic `.inter` (each also with `.gz`) or Parquet file;
            - `hf://datasets/organisation/name`, a data set on the Hub (its split `train`), also with `@revision` at the end;
            - a `datasets.Dataset`, or an `IterableDataset` (streaming), of which only the columns needed are kept.
        user_column: the column of user ids; by default found by its name (`user_id`, `userID`, `reviewerID`, ...).
        item_column: the column of item ids; by default found by its name (`item_id`, `asin`, `movieId`, ...).
        rating_column: the column of ratings; by default found by its name (`rating`, `overall`, `score`, ...).
        timestamp_column: the column of times, numbers or ISO 8601 dates; by default found by its name (`timestamp`,
            `unixReviewTime`, `datetime`, ...). Without one, the order of the rows is the order of time.
        min_rating: drop interactions with a smaller rating; by default all count.
        k_core: drop users and items with fewer interactions than this, until none is left to drop. By default 1 (none is
            dropped), for `ml-1m` and the archive of `lastfm` 5.

    Returns:
        Columns `user_id` and `item_id` (strings) and, where the times are known, `timestamp` (int64, or float64 where there
        are fractions; dates become seconds since 1970). Users in the order in which they first appear; the rows of a
        user together, in time order, and in file order where times are equal or unknown.

    Raises:
        ValueError: a column is missing, a row cannot be used, or nothing is left.
        FileNotFoundError: there is no such file and no such name, or a named set is neither on this machine nor to be had.
    """
    if k_core is not None and k_core < 1:
        raise ValueError(f"k_core is {k_core}; it must be 1 (drop nobody) or more.")
    asked = {"user": user_column, "item": item_column, "rating": rating_column, "timestamp": timestamp_column}
    known = DATA_SOURCES.get(source) if isinstance(source, str) else None
    raw = source if isinstance(source, (Dataset, IterableDataset)) else _locate(source)
    table, origin = _read(raw, asked)
    if min_rating is not None and "rating" not in table.column_names:
        raise ValueError(
            f"min_rating={min_rating} needs ratings, but {origin} has no rating column; name it by rating_column."
        )
    # A prepared folder is taken as it is; an owner's file is prepared as the paper's authors did.
    standard = known.k_core if known and isinstance(raw, RawFile) and not raw.path.is_dir() else 1
    interactions = _clean(table, origin, min_rating, k_core or standard)
    if known and min_rating is None and k_core is None:
        _compare_counts(interactions, known, origin)
    return interactions


# Reading --------------------------------------------------------------------------------------------------------------


def _locate(source: str | os.PathLike) -> RawFile | Dataset:
    if isinstance(source, str) and source == "demo":
        return demo_interactions()
    if isinstance(source, str) and source in DATA_SOURCES:
        return locate(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"interactions come from a name, a path or one datasets.Dataset, not from a {type(source).__name__}."
        )
    if isinstance(source, str) and source.startswith(HUB):
        return _from_hub(source)
    path = Path(source).expanduser()
    if not path.exists():
        names = ", ".join(["demo", *DATA_SOURCES])
        raise FileNotFoundError(
            f"{str(source)!r} is neither a file, a folder nor a known data set ({names}); one on the Hub is "
            f"{HUB}organisation/name."
        )
    return RawFile(path)


def _from_hub(uri: str) -> Dataset:
    name, _, revision = uri.removeprefix(HUB).partition("@")
    try:
        return load_dataset(name, revision=revision or None, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{uri} could not be read ({reason}); check the name, log in with `hf auth login` if it is private, and connect."
        ) from error


def _read(source: RawFile | Dataset | IterableDataset, asked: dict[str, str | None]) -> tuple[pa.Table, str]:
    """The columns "user", "item" and, where present, "rating" and "timestamp" of a source, and its name for messages."""
    if isinstance(source, Dataset):
        chosen = _choose_columns(source.column_names, asked, "the data set")
        table = source.select_columns(list(chosen.values())).with_format("arrow")[:]
        return _renamed(table, chosen), "the data set"
    if isinstance(source, IterableDataset):
        names = source.column_names or list(next(iter(source), {}))
        chosen = _choose_columns(names, asked, "the data set")
        parts = source.select_columns(list(chosen.values())).with_format("arrow").iter(batch_size=10_000)
        return _renamed(pa.concat_tables(parts), chosen), "the data set"
    if source.path.is_dir():
        return _read_sequences(source.path)
    delimiter = source.delimiter or _DELIMITERS.get(source.suffix)
    try:
        if delimiter:
            table = _read_delimited(source, delimiter, asked)
        elif source.suffix in (".jsonl", ".json"):
            table = _read_json(source, asked)
        elif source.suffix == ".parquet":
            file = pa_parquet.ParquetFile(source.path)
            chosen = _choose_columns(file.schema_arrow.names, asked, str(source))
            table = _renamed(file.read(columns=list(chosen.values())), chosen)
        else:
            raise ValueError(
                f"{source} is of no known kind; give a .csv, .tsv, .jsonl, .json, .inter or .parquet file, or a folder with train.txt."
            )
    except pa.ArrowException as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    return table, str(source)


def _read_sequences(folder: Path) -> tuple[pa.Table, str]:
    train_path, test_path = folder / "train.txt", folder / "test.txt"
    if not train_path.is_file():
        raise ValueError(f"the folder {folder} has no train.txt, a line `user item item ...` for each user.")
    train = _lines(train_path)
    path, sequences = (test_path, _lines(test_path)) if test_path.is_file() else (train_path, train)
    for number, sequence in enumerate(sequences, 1):
        if len(sequence) < 2:
            raise ValueError(
                f"line {number} of {path} must hold a user and at least one item, not {' '.join(sequence)!r}."
            )
    if path == test_path:
        for number, (before, after) in enumerate(zip(train, sequences), 1):
            if before != after[:-1]:
                raise ValueError(
                    f"line {number} of {test_path} must be line {number} of {train_path} and one more item, but they differ."
                )
        if len(train) != len(sequences):
            raise ValueError(
                f"{train_path} has {len(train)} lines but {test_path} has {len(sequences)}; they must be the same users."
            )
    users, lengths = [one[0] for one in sequences], [len(one) - 1 for one in sequences]
    last_line = {user: number for number, user in enumerate(users, 1)}
    if len(last_line) < len(users):
        user = next(user for number, user in enumerate(users, 1) if last_line[user] != number)
        raise ValueError(
            f"line {last_line[user]} of {path} is a second line of user {user!r}; put a user's items on one line."
        )
    rows = pa.array(np.repeat(np.arange(len(users)), lengths))
    items = pa.array([item for sequence in sequences for item in sequence[1:]], pa.string())
    return pa.table({"user": pa.array(users, pa.string()).take(rows), "item": items}), str(path)


def _lines(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return [line.split() for line in lines] if lines != [""] else []


def _read_delimited(raw: RawFile, delimiter: str, asked: dict[str, str | None]) -> pa.Table:
    names: Sequence[str] | None = raw.columns
    with raw.open() as stream:
        if names is None:
            header = stream.readline().decode("utf-8-sig", errors="replace")
            names = next(csv.reader([header], delimiter=delimiter), [])
        content = stream.read()
    chosen = _choose_columns(names, asked, str(raw))
    if not content.strip():
        return pa.table({role: pa.array([], pa.string()) for role in chosen})
    if delimiter == "::":
        # Arrow takes only a single character between columns.
        content, delimiter = content.replace(b"::", b"\t"), "\t"
    quoted = raw.suffix != ".inter"
    table = pa_csv.read_csv(
        pa.BufferReader(content),
        pa_csv.ReadOptions(column_names=names),
        pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted),
        # Ids are text, whatever they look like: "007" is not 7.
        pa_csv.ConvertOptions(
            include_columns=list(chosen.values()),
            column_types=dict.fromkeys(chosen.values(), pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    return _renamed(table, chosen)


def _read_json(raw: RawFile, asked: dict[str, str | None]) -> pa.Table:
    with raw.open() as stream:
        first = next((line for line in stream if line.strip()), b"{}")
    try:
        record = json.loads(first)
    except ValueError as error:
        raise ValueError(
            f"{raw} must hold one JSON object on each line, but its first line is not one ({error})."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{raw} must hold one JSON object on each line, but its first line is a {type(record).__name__}."
        )
    chosen = _choose_columns(list(record), asked, str(raw))
    types = {role: pa.infer_type([record[name]]) for role, name in chosen.items()}
    # The first rating may be 5 and the second 4.5.
    types |= {
        role: pa.float64() for role in ("rating", "timestamp") if role in types and pa.types.is_integer(types[role])
    }
    with raw.open() as stream:
        table = pa_json.read_json(
            stream,
            pa_json.ReadOptions(block_size=1 << 24),
            pa_json.ParseOptions(
                explicit_schema=pa.schema([(name, types[role]) for role, name in chosen.items()]),
                unexpected_field_behavior="ignore",
            ),
        )
    return _renamed(table, chosen)


def _choose_columns(names: Sequence[str], asked: dict[str, str | None], origin: str) -> dict[str, str]:
    """The column of each role ("user", "item", "rating", "timestamp"); the latter two only where present."""
    if not names:
        raise ValueError(f"{origin} is empty.")
    # The header of an atomic file gives types: "user_id:token".
    exact = {name.split(":")[0]: name for name in reversed(names)} | {name: name for name in names}
    loose = {re.sub(r"[\W_]", "", name.split(":")[0].lower()): name for name in reversed(names)}
    chosen = {}
    for role, aliases in _ALIASES.items():
        wanted = asked[role]
        name = exact.get(wanted) if wanted is not None else next((loose[one] for one in aliases if one in loose), None)
        if name is not None:
            chosen[role] = name
        elif wanted is not None:
            raise ValueError(f"{origin} has no column {wanted!r}; its columns are {quoted(names)}.")
        elif role in ("user", "item"):
            raise ValueError(
                f"{origin} has no {role} column that can be told by its name; its columns are {quoted(names)}. "
                f"Name the right one by {role}_column."
            )
    return chosen


def _renamed(table: pa.Table, chosen: dict[str, str]) -> pa.Table:
    return pa.table({role: table[name] for role, name in chosen.items()})


def quoted(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(repr(name) for name in names)


# Cleaning -------------------------------------------------------------------------------------------------------------


def _clean(table: pa.Table, origin: str, min_rating: float | None, k_core: int) -> Dataset:
    if not table.num_rows:
        raise ValueError(f"{origin} holds no interactions.")
    users, user_ids = _ids(table["user"], "user id", origin)
    items, item_ids = _ids(table["item"], "item id", origin)
    timestamps = _timestamps(table["timestamp"], origin) if "timestamp" in table.column_names else None
    ratings = _ratings(table["rating"], origin) if "rating" in table.column_names else None

    order = time_order(users, timestamps)
    if min_rating is not None and ratings is not None:
        order = order[ratings[order] >= min_rating]
    order = order[_first_of_each(users[order], items[order])]
    order = order[_in_k_core(users[order], items[order], k_core)]
    if not len(order):
        asked = [f"min_rating={min_rating}"] * (min_rating is not None) + [f"k_core={k_core}"] * (k_core > 1)
        raise ValueError(
            f"none of the {table.num_rows} interactions of {origin} is left after {' and '.join(asked)}; ask for less."
        )
    columns = {"user_id": user_ids.take(pa.array(users[order])), "item_id": item_ids.take(pa.array(items[order]))}
    if timestamps is not None:
        columns["timestamp"] = pa.array(timestamps[order])
    return Dataset(pa.table(columns))


def encode_column(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value as a number, int64 `[n]`, and the different values in order of first appearance."""
    encoded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def _ids(column: pa.ChunkedArray, kind: str, origin: str) -> tuple[np.ndarray, pa.Array]:
    """Each id as a number, int64 `[n]`, and the different ids as checked text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if column.null_count:
        first = pc.index(column.is_null(), True).as_py() + 1
        raise ValueError(
            f"{origin}: {column.null_count} of {len(column)} rows have no {kind}, the first of them row {first}; "
            "remove or complete them."
        )
    if pa.types.is_floating(column.type) and pc.all(pc.equal(column, pc.floor(column))).as_py():
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise ValueError(f"{origin}: the {kind}s are of type {column.type}; ids are text or whole numbers.")
    codes, values = encode_column(column)
    values = values.cast(pa.string())
    if pc.all(pc.match_substring_regex(values, _INTEGERS_WITH_POINT)).as_py():
        values = pc.utf8_slice_codeunits(values, 0, -2)
    try:
        check_ids(values.to_pylist(), kind)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return codes, values


def _ratings(column: pa.ChunkedArray, origin: str) -> np.ndarray:
    return _finite(_parsed(column, [pa.float64()], "rating", "a number", origin), "rating", origin)


def _timestamps(column: pa.ChunkedArray, origin: str) -> np.ndarray:
    """Times as int64, or as float64 where some have fractions."""
    kinds = [pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")]
    column = _parsed(column, kinds, "timestamp", "a number or an ISO 8601 date such as 2024-05-17T09:30:00", origin)
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        seconds = column.cast(pa.timestamp("us", getattr(column.type, "tz", None))).cast(pa.int64())
        column = pc.divide(seconds.cast(pa.float64()), 1e6)
    values = _finite(column, "timestamp", origin)
    if values.dtype.kind == "f" and (values == np.floor(values)).all() and np.abs(values).max() < 2**53:
        return values.astype(np.int64)
    return values


def _parsed(
    column: pa.ChunkedArray, kinds: list[pa.DataType], what: str, expected: str, origin: str
) -> pa.ChunkedArray:
    """Text as the first of the Arrow types `kinds` that fits all of it; other columns as they are."""
    if not _is_text(column.type):
        return column
    for kind in kinds:
        if _fits(column, kind):
            return column.cast(kind)
    for row, value in enumerate(column, 1):
        if not any(_fits(value, kind) for kind in kinds):
            raise ValueError(f"{origin}: the {what} {value.as_py()!r} of row {row} is not {expected}.")
    raise ValueError(f"{origin}: the {what}s are written in more than one way; each must be {expected}, all alike.")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _fits(text: pa.ChunkedArray | pa.Scalar, kind: pa.DataType) -> bool:
    try:
        text.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _finite(column: pa.ChunkedArray, what: str, origin: str) -> np.ndarray:
    try:
        values = column.to_numpy() if pa.types.is_integer(column.type) else column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(f"{origin}: the {what}s are of type {column.type}, not numbers.") from error
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"{origin}: {bad.sum()} of {len(values)} rows have no finite {what}, the first of them row {np.argmax(bad) + 1}; "
            "remove or complete them."
        )
    return values


def time_order(users: np.ndarray, timestamps: np.ndarray | None) -> np.ndarray:
    """Rows grouped by user, each user's in time order; rows of equal time keep their order."""
    return np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))


def _first_of_each(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The positions of the first of each (user, item) pair, ascending."""
    pairs = users * (items.max(initial=0) + 1) + items
    return np.sort(np.unique(pairs, return_index=True)[1])


def _in_k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """The positions of the interactions of the k-core: dropping one user may push an item below k, and so on."""
    rows = np.arange(len(users))
    while True:
        user_counts, item_counts = np.bincount(users[rows]), np.bincount(items[rows])
        keep = (user_counts[users[rows]] >= k) & (item_counts[items[rows]] >= k)
        if keep.all():
            return rows
        rows = rows[keep]


def _compare_counts(interactions: Dataset, known: DataSource, origin: str) -> None:
    users, items = len(interactions.unique("user_id")), len(interactions.unique("item_id"))
    found, expected = (users, items, len(interactions)), (known.num_users, known.num_items, known.num_interactions)
    if found != expected:
        logger.warning(
            "%s gives %d users, %d items and %d interactions, but %s is known to have %d, %d and %d.",
            origin, *found, known.name, *expected,
        )  # fmt: skip
