"""Tables of interactions from files and data sets, in Arrow.

Delimited and JSON files are read by pandas, with ids always as text. Parquet files and data sets stay in Arrow. How a delimited
file is laid out (separator, header, encoding) is found from its first lines. The values are not checked here; the cleaning is in
`interactions.py`.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from datasets import Dataset, IterableDataset

from ..models.embedding_store import WITHDRAWN
from .cleaning import MISSING, without_points
from .files import RawFile, quoted

logger = logging.getLogger(__name__)

# Common column names in order of preference, in small letters and without other characters than letters and digits.
_ALIASES = {
    "user": (
        *("userid", "user", "uid", "username", "reviewerid", "customerid", "visitorid", "memberid", "accountid"),
        *("clientid", "sessionid", "customer", "member", "account", "client"),
    ),
    "item": (
        *("itemid", "item", "iid", "parentasin", "asin", "movieid", "artistid", "productid", "businessid", "bookid"),
        *("trackid", "songid", "articleid", "gmapid", "animeid", "gameid", "appid", "recipeid", "venueid", "isbn"),
        *("sku", "movie", "film", "product", "book", "track", "song", "article", "game", "recipe", "artist"),
    ),
    "rating": ("rating", "overall", "score", "stars", "weight"),
    "timestamp": (
        *("timestamp", "time", "unixtimestamp", "unixreviewtime", "unixtime", "datetime", "date"),
        *("eventtime", "eventdate", "createdat", "ts", "when"),
    ),
    "event": ("event", "eventtype", "behavior", "behaviour", "behaviortype", "action", "actiontype"),
}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
# Separators that are looked for, where the file extension does not tell or is wrong. Of equally good ones the first is taken.
_SEPARATORS = ("::", "\t", ";", "|", ",", " ")
_NOT_TEXT = (".xlsx", ".xls", ".pkl", ".pickle", ".npy", ".npz", ".feather", ".arrow", ".db", ".sqlite", ".h5", ".hdf5")
_ENCODINGS = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16", "latin-1": "Latin-1"}
# Bytes and lines that the layout of a file is found from.
_HEAD, _HEAD_LINES = 1 << 16, 50
# Rows read at once. Columns that are not needed are dropped before the next rows are read.
_BATCH_ROWS = 20_000
# Text that is a number: not 007, 1e3 (but 1e-05, as pandas writes it) or longer than a float64 holds.
_DATE = re.compile(r"\s*\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d.*)?\s*$")
_PLAIN_NUMBER = re.compile(r"\s*-?(?:0|[1-9]\d{0,14})(?:\.\d+)?(?:e[-+]\d\d+)?\s*")


@dataclass(frozen=True)
class TableFormat:
    """How a table was read.

    Args:
        name: the format, in words.
        columns: the column of each role.
        reasons: why it is this column, for each role.
        unused: the other columns.
    """

    name: str
    columns: dict[str, str]
    reasons: dict[str, str]
    unused: list[str]


@dataclass(frozen=True)
class _Layout:
    """How a delimited file is laid out.

    Args:
        delimiter: the separator of columns.
        encoding: of the text.
        has_header: whether the first line names the columns.
        names: the names of the columns; their numbers, from 1, if there is no header.
        rows: the fields of the first lines, without the header.
    """

    delimiter: str
    encoding: str
    has_header: bool
    names: list[str]
    rows: list[list[str]]


def read_table(
    source: RawFile | Dataset | IterableDataset, asked: Mapping[str, str | None], origin: str
) -> tuple[pa.Table, TableFormat]:
    """Reads the columns of some roles: "user", "item", "rating", "timestamp" and "event".

    Args:
        source: a file, a folder with `train.txt` or of such files, or a data set.
        asked: the column that holds each role; None finds it by its name.
        origin: the name of the source in messages.

    Returns:
        A table with the columns "user", "item" and, of the other roles asked for, those that are present; and how it was read.

    Raises:
        ValueError: the file is damaged or of an unknown kind, or a column is missing.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        names = source.column_names or list(next(iter(source), {}))
        chosen = _choose_columns(names, asked, origin)
        arrow = source.select_columns(list(chosen.values())).with_format("arrow")
        table = arrow[:] if isinstance(arrow, Dataset) else pa.concat_tables(arrow.iter(batch_size=_BATCH_ROWS))
        return _by_role(table, chosen), _format("columns in memory", names, chosen, asked)
    if source.path.is_dir():
        return _read_folder(source.path, asked)
    with _readable(origin):
        if source.suffix in (".jsonl", ".json"):
            return _read_json(source, asked)
        if source.suffix == ".parquet":
            file = pa_parquet.ParquetFile(source.path)
            names = file.schema_arrow.names
            chosen = _choose_columns(names, asked, origin)
            return _by_role(file.read(list(chosen.values())), chosen), _format("Parquet", names, chosen, asked)
        if source.suffix not in _NOT_TEXT:
            return _read_delimited(source, asked)
    raise ValueError(
        f"{origin} has an unknown file extension; give a text file with columns, a .jsonl, .json or .parquet file, or a folder "
        "with such files or train.txt."
    )


@contextmanager
def _readable(origin: str) -> Iterator[None]:
    """Names the file in the errors of its readers."""
    try:
        yield
    except UnicodeError as error:
        raise ValueError(f"{origin} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except (pa.ArrowException, pd.errors.ParserError) as error:
        raise ValueError(f"{origin} cannot be read: {str(error).strip()}") from error


def read_items(path: str | os.PathLike) -> tuple[list[str], list[dict[str, Any]]]:
    """Reads a table of items: a column of ids, and others that describe them, such as `title`.

    Args:
        path: a text file with columns and a header, a JSON-lines or a Parquet file.

    Returns:
        The ids, and for each item its values by name, without missing ones; see [`item_metadata`].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, has no column of ids, or two columns have one name.
    """
    raw = RawFile(Path(path))
    if not raw.path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a table with a column of item ids.")
    with _readable(str(path)):
        frame = _read_frame(raw)
    columns = [str(name) for name in frame.columns]
    found = _match_columns(columns, {"item": "id" if "id" in columns else None}).get("item")
    if found is None:
        raise ValueError(f"{path} has no column of item ids; its columns are {quoted(columns)}. Call it id or item_id.")
    return read_ids(frame.pop(found).tolist(), found, str(path)), item_metadata(frame, str(path))


def _read_frame(raw: RawFile) -> pd.DataFrame:
    """All columns of a table of items: text, or the values of a file with types."""
    if raw.suffix == ".parquet":
        return pa_parquet.read_table(raw.path).to_pandas(integer_object_nulls=True)
    if raw.suffix in (".jsonl", ".json"):
        with raw.open() as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            filled = [(number, line) for number, line in enumerate(_one_a_line(text, raw), 1) if line.strip()]
        return pd.DataFrame(_objects(filled, raw), dtype=object)
    layout = _layout(raw, {})
    _check_distinct(layout.names, str(raw))
    places = dict(zip(layout.names, range(len(layout.names))))
    try:
        return _read_columns(raw, layout, places, layout.encoding).to_pandas()
    except UnicodeError:
        return _read_columns(raw, layout, places, "latin-1").to_pandas()


def read_ids(values: Sequence[Any], column: str, origin: str) -> list[str]:
    """Ids of any type as text, those of a whole column written as `7.0` as `7`.

    Raises:
        ValueError: a row has none.
    """
    ids = ["" if value is None or value != value else str(as_text(value)).strip() for value in values]
    if (row := next((row for row, name in enumerate(ids, 1) if name in MISSING), None)) is not None:
        raise ValueError(f"{origin}: row {row} has no {column}; give every row an id.")
    return without_points(pa.array(ids, pa.string()), column, origin).to_pylist()


def item_metadata(frame: pd.DataFrame, origin: str) -> list[dict[str, Any]]:
    """The values of each row by name, as a store takes them, without missing ones.

    Names are made of letters, digits and underscores. A column of numbers has numbers, also if they are written as text, unless
    one is written otherwise than a number usually is, as 007 is; a title is always text. Times become ISO 8601 text, and a list
    of tags `"rock, jazz"`.

    Args:
        frame: a row an item.
        origin: the name of the source in messages.

    Raises:
        ValueError: two columns have one name, or one has the name that marks withdrawn items.
    """
    names = [re.sub(r"\W|^(?=\d|$)", "_", str(name).split(":")[0], flags=re.ASCII)[:64] for name in frame.columns]
    _check_distinct(names, origin)
    if WITHDRAWN in names:
        raise ValueError(
            f"{origin} has a column {WITHDRAWN!r}; drop it, and withdraw items with `tokenrec remove --items`."
        )
    described: dict[str, list[Any]] = {}
    for name, (_, column) in zip(names, frame.items()):
        values = [None if _is_missing(value) else value for value in map(_without_type, column.tolist())]
        numbers = [_number(value) for value in values]
        is_text = any(number is None and value is not None for number, value in zip(numbers, values))
        labels = [None if value is None else str(value) for value in values]
        described[name] = labels if is_text or name == "title" else numbers
    rows = [dict(zip(described, values)) for values in zip(*described.values())] if described else [{}] * len(frame)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _check_distinct(names: Sequence[str], origin: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{origin} has two columns of one name, as {quoted(sorted(names))} shows; rename one.")


def _without_type(value: Any) -> Any:
    """A list as `"rock, jazz"`, a time as ISO 8601 text, a decimal as a float; other values unchanged."""
    if not pd.api.types.is_scalar(value):
        return ", ".join(map(str, value))
    if isinstance(value, datetime.datetime) and not pd.isna(value):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    return float(value) if isinstance(value, Decimal) else value


def _is_missing(value: Any) -> bool:
    return bool(pd.isna(value)) or value in MISSING


def _number(value: Any) -> int | float | bool | None:
    """A finite number, or a text that is one; None for other values."""
    if isinstance(value, str):
        kind = float if "." in value or "e" in value else int
        return kind(value) if _PLAIN_NUMBER.fullmatch(value) else None
    return value if isinstance(value, (bool, int, float)) and math.isfinite(value) else None


# Formats --------------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, asked: Mapping[str, str | None]) -> tuple[pa.Table, TableFormat]:
    """Reads `train.txt` and `test.txt`, or all files as parts of one table."""
    parts = [path for path in sorted(folder.glob("[!._]*")) if path.is_file()]
    if {"train.txt", "test.txt"} & {path.name for path in parts} or not parts:
        return _read_sequences(folder), TableFormat("a line of items for each user", {}, {}, [])
    tables, formats = zip(*(read_table(RawFile(path), asked, str(path)) for path in parts))
    name = f"{len(parts)} files, {formats[0].name}"
    if any(table.schema != tables[0].schema for table in tables):
        # Ids may be numbers in some files and text in others.
        tables = tuple(table.cast(pa.schema([(role, pa.string()) for role in table.schema.names])) for table in tables)
    return pa.concat_tables(tables, promote_options="permissive"), replace(formats[0], name=name)


def _read_sequences(folder: Path) -> pa.Table:
    """Reads `test.txt`, or `train.txt` if there is no `test.txt`, with a line for each user."""
    train_path, test_path = folder / "train.txt", folder / "test.txt"
    if not train_path.is_file():
        raise ValueError(f"the folder {folder} has no train.txt, a line `user item item ...` for each user.")
    path = test_path if test_path.is_file() else train_path
    train, sequences = _lines(train_path), _lines(path)
    if len(train) != len(sequences):
        raise ValueError(
            f"{train_path} has {len(train)} lines but {test_path} has {len(sequences)}; they must be the same users."
        )
    items: dict[str, list[str]] = {}
    for number, (before, sequence) in enumerate(zip(train, sequences), 1):
        problem = None
        if len(sequence) < 2:
            problem = f"must hold a user and at least one item, not {' '.join(sequence)!r}"
        elif path == test_path and before != sequence[:-1]:
            problem = f"must be line {number} of {train_path} and one more item, but they differ"
        elif sequence[0] in items:
            problem = f"is a second line of user {sequence[0]!r}; put a user's items on one line"
        if problem:
            raise ValueError(f"line {number} of {path} {problem}.")
        items[sequence[0]] = sequence[1:]
    users = [user for user, own in items.items() for _ in own]
    return pa.table({"user": pa.array(users, pa.string()), "item": pa.array(chain(*items.values()), pa.string())})


def _lines(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    return [line.split() for line in lines] if lines != [""] else []


def _layout(raw: RawFile, asked: Mapping[str, str | None]) -> _Layout:
    """Finds the layout of a delimited file from its first lines.

    Raises:
        ValueError: the file is empty, is no text, or has a single column.
    """
    with raw.open() as stream:
        head = stream.read(_HEAD)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if encoding != "utf-16" and b"\0" in head:
        raise ValueError(f"{raw} is no text file; give a text file with columns, or a .parquet file.")
    text = head.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "ignore")
    lines = text.splitlines()[: _HEAD_LINES + 1]
    # The last line may be cut.
    lines = [line for line in (lines[:-1] if len(head) == _HEAD and len(lines) > 1 else lines) if line.strip()]
    if not lines:
        raise ValueError(f"{raw} is empty.")
    usual = raw.delimiter or _DELIMITERS.get(raw.suffix)
    delimiter = usual if usual and _fields(lines, usual) else None
    if delimiter is None:
        possible = {one: fields for one in _SEPARATORS if (fields := _fields(lines, one))}
        delimiter = max(possible, key=lambda one: len(possible[one][0]), default=None)
    if delimiter is None:
        first = next(csv.reader([lines[0]], delimiter=usual if usual and len(usual) == 1 else ","))
        if len(first) > 1:
            delimiter = usual or ","
        else:
            raise ValueError(f"{raw} has a single column, {lines[0][:80]!r}; separate its columns by {usual or ','!r}.")
    rows = _split(lines, delimiter)
    if raw.columns:
        return _Layout(delimiter, encoding, False, list(raw.columns), rows)
    has_header = raw.suffix == ".inter" or _is_header(rows[0], rows[1:], asked)
    names = rows[0] if has_header else [str(number) for number in range(1, len(rows[0]) + 1)]
    return _Layout(delimiter, encoding, has_header, names, rows[has_header:])


def _split(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    if len(delimiter) > 1:
        return [line.split(delimiter) for line in lines]
    return [row for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if row]


def _fields(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The fields of all lines, if a separator gives every line as many, at least two; else none."""
    rows = _split(lines, delimiter)
    return rows if len(rows[0]) > 1 and {len(row) for row in rows} == {len(rows[0])} else []


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?\s*", text) is not None


def _is_header(first: Sequence[str], rows: Sequence[Sequence[str]], asked: Mapping[str, str | None]) -> bool:
    """Whether the first line of a file names the columns."""
    wanted = [name for name in asked.values() if name is not None]
    if set(wanted) & set(first) or {"user", "item"} <= set(_match_columns(first, dict.fromkeys(("user", "item")))):
        return True
    numeric = [
        place for place in range(len(first)) if rows and all(_is_number(row[place]) for row in rows if place < len(row))
    ]
    if any(not _is_number(first[place]) for place in numeric):
        return True
    # Of text alone, nothing tells names from values, but who gives a number knows that there are no names.
    return not numeric and not any(name.isdecimal() for name in wanted)


def _without_header(layout: _Layout, asked: Mapping[str, str | None]) -> dict[str, str | None]:
    """The columns of a file without header that are not asked for, in the usual order: user, item, rating, time."""
    chosen = dict(asked)
    taken = {name for name in asked.values() if name}
    for role in ("user", "item"):
        if chosen[role] is None:
            chosen[role] = next((name for name in layout.names if name not in taken), None)
            taken.add(str(chosen[role]))
    numeric = {}
    for place, name in enumerate(layout.names):
        values = [row[place] for row in layout.rows if place < len(row)]
        if name not in taken and values and all(map(_is_number, values)):
            numeric[name] = [float(value.replace(",", ".")) for value in values]
    found: dict[str, str] = {}
    for name, numbers in numeric.items():
        if kind := "timestamp" if min(numbers) > 1e8 else "rating" if max(numbers) <= 100 else None:
            found.setdefault(kind, name)
    for place, name in enumerate(layout.names):
        values = [row[place] for row in layout.rows if place < len(row)]
        if name not in taken and values and all(map(_DATE.match, values)):
            found.setdefault("timestamp", name)
    if "timestamp" not in found and len(layout.names) == 4 and len(numeric) == 2:
        found["timestamp"] = layout.names[-1]
    for role, name in found.items():
        if role in chosen and chosen[role] is None:
            chosen[role] = name
    return chosen


def _read_delimited(raw: RawFile, asked: Mapping[str, str | None]) -> tuple[pa.Table, TableFormat]:
    layout = _layout(raw, asked)
    names = layout.names
    # A number stands for a column, unless a column has that name.
    asked = {
        role: names[int(name) - 1]
        if name and name not in names and name.isdecimal() and 0 < int(name) <= len(names)
        else name
        for role, name in asked.items()
    }
    completed = asked if layout.has_header or raw.columns else _without_header(layout, asked)
    by_name = _choose_columns(names, completed, str(raw))
    chosen = {role: names.index(name) for role, name in by_name.items()}
    encoding = layout.encoding
    try:
        table = _read_columns(raw, layout, chosen, encoding)
    except UnicodeError:
        encoding = "latin-1"
        logger.warning("%s is not UTF-8 text and is read as Latin-1; if names look wrong, save it as UTF-8.", raw)
        table = _read_columns(raw, layout, chosen, encoding)
    header = "with a header" if layout.has_header else "without a header"
    kind = f"{_ENCODINGS[encoding]} text, columns separated by {layout.delimiter!r}, {header}"
    guessed = [role for role in completed if completed[role] != asked[role]]
    return table, _format(kind, names, by_name, asked, guessed)


def _read_columns(raw: RawFile, layout: _Layout, chosen: Mapping[str, int], encoding: str) -> pa.Table:
    """The columns at these places, as text."""
    delimiter = layout.delimiter
    has_quotes = raw.suffix != ".inter" and delimiter != "::"
    # Columns that are not needed may be in any encoding.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    with raw.open() as packed:
        stream: Any = packed
        if delimiter == "::":  # pandas is fast with a single character only
            stream, delimiter = io.StringIO(packed.read().decode(encoding, errors).replace("::", "\t")), "\t"
        try:
            chunks = pd.read_csv(
                stream,
                sep=delimiter,
                header=0 if layout.has_header else None,
                names=range(len(layout.names)),
                # "007" is not 7, and "NA" is an id. An empty field is missing.
                dtype=object,
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE,
                skipinitialspace=True,
                encoding=encoding,
                encoding_errors=errors,
                chunksize=_BATCH_ROWS,
            )
        except pd.errors.EmptyDataError:
            raise ValueError(f"{raw} holds no interactions.") from None
        tables = []
        for chunk in chunks:
            # pandas takes surplus fields of the first row for an index.
            if not isinstance(chunk.index, pd.RangeIndex):
                raise ValueError(f"{raw} cannot be read: row 1 has more fields than the {len(layout.names)} columns.")
            tables.append(pa.table({role: pa.array(chunk[place], pa.string()) for role, place in chosen.items()}))
    return pa.concat_tables(tables)


def _read_json(raw: RawFile, asked: Mapping[str, str | None]) -> tuple[pa.Table, TableFormat]:
    names: dict[str, None] = {}
    frames = []
    with raw.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        lines = enumerate(_one_a_line(text, raw), 1)
        filled = ((number, line) for number, line in lines if line.strip())
        while batch := list(islice(filled, _BATCH_ROWS)):
            # As objects: a column of numbers with a gap would become floats, which do not hold long ids.
            frame = pd.DataFrame(_objects(batch, raw), dtype=object)
            names |= dict.fromkeys(frame.columns)
            frames.append(frame[list(dict.fromkeys(_match_columns(list(frame.columns), asked).values()))])
    chosen = _choose_columns(list(names), asked, str(raw))
    # The types are those of all rows: the first rating may be 5 and the second 4.5, or the first id 7 and the second "A7".
    frame = pd.concat(frames, ignore_index=True)
    columns = {
        role: frame[name] if role in ("user", "item") else frame[name].infer_objects() for role, name in chosen.items()
    }
    columns |= {role: column.map(as_text) for role, column in columns.items() if column.dtype == object}
    table = pa.table({role: pa.array(column, from_pandas=True) for role, column in columns.items()})
    return table, _format("JSON", list(names), chosen, asked)


def _one_a_line(text: IO[str], raw: RawFile) -> Iterator[str]:
    """The lines of a JSON-lines file, or the entries of a JSON array as lines."""
    first = next((line for line in text if line.strip()), "")
    if not first.lstrip().startswith("["):
        return chain([first], text)
    try:
        found = json.loads(first + text.read())
    except json.JSONDecodeError as error:
        raise ValueError(f"{raw} is not valid JSON ({error}).") from error
    if not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{raw} must hold one JSON object on each line, but line 1 is a list.")
    return map(json.dumps, found)


def _objects(batch: Sequence[tuple[int, str]], raw: RawFile) -> list[dict[str, object]]:
    """The JSON objects of numbered lines."""
    wanted = f"{raw} must hold one JSON object on each line, but line"
    try:
        # A single call is twice as fast as a call for each line. A comma after a line break would be taken for the next line's.
        found = json.loads("[" + ",\n".join(line.rstrip("\r\n") for _, line in batch) + "]")
    except json.JSONDecodeError as error:
        number = batch[min(error.lineno, len(batch)) - 1][0]
        raise ValueError(f"{wanted} {number} is not valid JSON ({error.msg}).") from error
    for (number, _), record in zip(batch, found):
        if not isinstance(record, dict):
            raise ValueError(f"{wanted} {number} is a {type(record).__name__}.")
    return found


def as_text(value: object) -> object:
    """A number as text; other values unchanged."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(value) if is_number else value


# Columns --------------------------------------------------------------------------------------------------------------


def _match_columns(names: Sequence[str], asked: Mapping[str, str | None]) -> dict[str, str]:
    """The column of each role that is asked for and has one."""
    # The header of an atomic file has types: "user_id:token".
    exact = {name.split(":")[0]: name for name in reversed(names)} | {name: name for name in names}
    loose = {re.sub(r"[\W_]", "", name.split(":")[0].lower()): name for name in reversed(names)}
    found = {}
    for role, column in asked.items():
        wanted, known = (_ALIASES[role], loose) if column is None else ((column,), exact)
        if name := next((known[name] for name in wanted if name in known), None):
            found[role] = name
    return found


def _choose_columns(names: Sequence[str], asked: Mapping[str, str | None], origin: str) -> dict[str, str]:
    """[`_match_columns`], with errors for required columns that are missing."""
    if not names:
        raise ValueError(f"{origin} is empty.")
    chosen = _match_columns(names, asked)
    for role, column in asked.items():
        if role not in chosen and column is not None:
            raise ValueError(f"{origin} has no column {column!r}; its columns are {quoted(names)}.")
        if role not in chosen and role in ("user", "item"):
            raise ValueError(
                f"{origin} has no {role} column with a common name; its columns are {quoted(names)}. "
                f"Name the right one by {role}_column, or give its number, from 1, if the file has no header."
            )
    return chosen


def _by_role(table: pa.Table, chosen: Mapping[str, str]) -> pa.Table:
    return pa.table({role: table[name] for role, name in chosen.items()})


def _format(
    name: str,
    names: Sequence[str],
    chosen: Mapping[str, str],
    asked: Mapping[str, str | None],
    guessed: Collection[str] = (),
) -> TableFormat:
    """The format of a table with columns `names`; the columns of the roles `guessed` have no names to go by."""
    found = {role: "by its name" for role in chosen}
    found |= {role: "by its place" if role in ("user", "item") else "by its values" for role in guessed}
    reasons = {role: found[role] if asked[role] is None else "as asked" for role in chosen}
    return TableFormat(name, dict(chosen), reasons, [one for one in names if one not in chosen.values()])
