"""Tables of interactions from files and data sets, in Arrow.

Delimited and JSON-lines files are read by pandas, with ids always as text. Parquet files and data sets stay in Arrow. The
values are not checked here; the cleaning is in `interactions.py`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from datasets import Dataset, IterableDataset

# Common column names in order of preference, in small letters and without other characters than letters and digits.
_ALIASES = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "visitorid"),
    "item": ("itemid", "item", "iid", "asin", "movieid", "artistid", "productid", "parentasin"),
    "rating": ("rating", "overall", "score", "weight"),
    "timestamp": ("timestamp", "time", "unixtimestamp", "unixreviewtime", "unixtime", "datetime", "date"),
}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
# Rows read at once. Columns that are not needed are dropped before the next rows are read.
_BATCH_ROWS = 20_000


@dataclass(frozen=True)
class RawFile:
    """A file of interactions, or a folder with `train.txt` and `test.txt`.

    Args:
        path: the file or folder.
        member: the file inside, if `path` is a zip archive.
        delimiter: the separator of columns, if the file extension does not tell it.
        columns: the names of the columns, if the file has no header.
    """

    path: Path
    member: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        """The file extension in small letters, without `.gz`: `.csv` for `log.csv.gz`."""
        return Path(self.path.name.removesuffix(".gz")).suffix.lower()

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the unpacked file for reading bytes.

        Raises:
            ValueError: the archive is damaged or lacks the member.
        """
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                    yield member
            else:
                with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as stream:
                    yield cast(IO[bytes], stream)
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(f"{self} cannot be unpacked ({error}); delete it and fetch it again.") from error


def read_table(source: RawFile | Dataset | IterableDataset, asked: Mapping[str, str | None], origin: str) -> pa.Table:
    """Reads the columns of users, items and, if present, ratings and times.

    Args:
        source: a file, a folder with `train.txt`, or a data set.
        asked: the column that holds each of "user", "item", "rating" and "timestamp"; None finds it by its name.
        origin: the name of the source in messages.

    Returns:
        A table with the columns "user", "item" and, if present, "rating" and "timestamp".

    Raises:
        ValueError: the file is damaged or of an unknown kind, or a column is missing.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        names = source.column_names or list(next(iter(source), {}))
        chosen = _choose_columns(names, asked, origin)
        arrow = source.select_columns(list(chosen.values())).with_format("arrow")
        table = arrow[:] if isinstance(arrow, Dataset) else pa.concat_tables(arrow.iter(batch_size=_BATCH_ROWS))
        return pa.table({role: table[name] for role, name in chosen.items()})
    if source.path.is_dir():
        return _read_sequences(source.path)
    delimiter = source.delimiter or _DELIMITERS.get(source.suffix)
    try:
        if delimiter:
            return _read_delimited(source, delimiter, asked)
        if source.suffix in (".jsonl", ".json"):
            return _read_json(source, asked)
        if source.suffix == ".parquet":
            file = pa_parquet.ParquetFile(source.path)
            chosen = _choose_columns(file.schema_arrow.names, asked, origin)
            table = file.read(columns=list(chosen.values()))
            return pa.table({role: table[name] for role, name in chosen.items()})
    except UnicodeError as error:
        raise ValueError(f"{origin} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except (pa.ArrowException, pd.errors.ParserError) as error:
        raise ValueError(f"{origin} cannot be read: {str(error).strip()}") from error
    raise ValueError(
        f"{origin} has an unknown file extension; give a .csv, .tsv, .jsonl, .json, .inter or .parquet file, or a folder "
        "with train.txt."
    )


def quoted(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(repr(name) for name in names)


# Formats --------------------------------------------------------------------------------------------------------------


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


def _read_delimited(raw: RawFile, delimiter: str, asked: Mapping[str, str | None]) -> pa.Table:
    with raw.open() as stream:
        names = list(raw.columns or next(csv.reader([stream.readline().decode("utf-8-sig")], delimiter=delimiter), []))
        if len(names) == 1:
            raise ValueError(f"{raw} has a single column, {names[0]!r}; separate its columns by {delimiter!r}.")
        chosen = {role: names.index(name) for role, name in _choose_columns(names, asked, str(raw)).items()}
        stream.seek(0)  # so that errors count lines from the start
        if delimiter == "::":  # pandas is fast with a single character only
            stream, delimiter = io.BytesIO(stream.read().replace(b"::", b"\t")), "\t"
        try:
            chunks = pd.read_csv(
                stream,
                sep=delimiter,
                header=None,
                skiprows=0 if raw.columns else 1,
                names=range(len(names)),
                # "007" is not 7, and "NA" is an id. An empty field is missing.
                dtype=object,
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_NONE if raw.suffix == ".inter" else csv.QUOTE_MINIMAL,
                # Columns that are not needed may be in any encoding.
                encoding_errors="surrogateescape",
                chunksize=_BATCH_ROWS,
            )
        except pd.errors.EmptyDataError:
            raise ValueError(f"{raw} holds no interactions.") from None
        tables = []
        for chunk in chunks:
            # pandas takes surplus fields of the first row for an index.
            if not isinstance(chunk.index, pd.RangeIndex):
                raise ValueError(f"{raw} cannot be read: row 1 has more fields than the {len(names)} columns.")
            tables.append(pa.table({role: pa.array(chunk[place], pa.string()) for role, place in chosen.items()}))
    return pa.concat_tables(tables)


def _read_json(raw: RawFile, asked: Mapping[str, str | None]) -> pa.Table:
    names: dict[str, None] = {}
    frames = []
    with raw.open() as stream:
        lines = enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1)
        filled = ((number, line) for number, line in lines if line.strip())
        while batch := list(islice(filled, _BATCH_ROWS)):
            frame = pd.DataFrame(_objects(batch, raw))
            names |= dict.fromkeys(frame.columns)
            frames.append(frame[list(dict.fromkeys(_match_columns(list(frame.columns), asked).values()))])
    chosen = _choose_columns(list(names), asked, str(raw))
    # The types are those of all rows: the first rating may be 5 and the second 4.5, or the first id 7 and the second "A7".
    frame = pd.concat(frames, ignore_index=True)
    columns = {
        role: frame[name].map(_as_text) if frame[name].dtype == object else frame[name] for role, name in chosen.items()
    }
    return pa.table({role: pa.array(column, from_pandas=True) for role, column in columns.items()})


def _objects(batch: Sequence[tuple[int, str]], raw: RawFile) -> list[dict[str, object]]:
    """The JSON objects of numbered lines."""
    wanted = f"{raw} must hold one JSON object on each line, but line"
    try:
        # A single call is twice as fast as a call for each line.
        found = json.loads("[" + ",".join(line for _, line in batch) + "]")
    except json.JSONDecodeError as error:
        number = batch[min(error.lineno, len(batch)) - 1][0]
        raise ValueError(f"{wanted} {number} is not valid JSON ({error.msg}).") from error
    for (number, _), record in zip(batch, found):
        if not isinstance(record, dict):
            raise ValueError(f"{wanted} {number} is a {type(record).__name__}.")
    return found


def _as_text(value: object) -> object:
    """A number as text; other values unchanged."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(value) if is_number else value


# Columns --------------------------------------------------------------------------------------------------------------


def _match_columns(names: Sequence[str], asked: Mapping[str, str | None]) -> dict[str, str]:
    """The column of each role ("user", "item", "rating", "timestamp") that has one."""
    # The header of an atomic file has types: "user_id:token".
    exact = {name.split(":")[0]: name for name in reversed(names)} | {name: name for name in names}
    loose = {re.sub(r"[\W_]", "", name.split(":")[0].lower()): name for name in reversed(names)}
    found = {}
    for role, aliases in _ALIASES.items():
        wanted, known = (aliases, loose) if asked[role] is None else ((asked[role],), exact)
        if name := next((known[name] for name in wanted if name in known), None):
            found[role] = name
    return found


def _choose_columns(names: Sequence[str], asked: Mapping[str, str | None], origin: str) -> dict[str, str]:
    """[`_match_columns`], with errors for required columns that are missing."""
    if not names:
        raise ValueError(f"{origin} is empty.")
    chosen = _match_columns(names, asked)
    for role in _ALIASES:
        if role not in chosen and asked[role] is not None:
            raise ValueError(f"{origin} has no column {asked[role]!r}; its columns are {quoted(names)}.")
        if role not in chosen and role in ("user", "item"):
            raise ValueError(
                f"{origin} has no {role} column with a common name; its columns are {quoted(names)}. "
                f"Name the right one by {role}_column."
            )
    return chosen
