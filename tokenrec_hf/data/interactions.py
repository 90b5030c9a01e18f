"""Interactions from files: read, checked, cleaned and reduced to a k-core.

Every source becomes a `datasets.Dataset` of string ids in which the rows of a user are together and in time order; all
later steps rely on this. The cleaning is that of section III-A of TokenRec (arXiv 2406.10450).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from .cleaning import clean, timestamp_unit
from .demo import demo_interactions
from .files import RawFile, counted, quoted
from .named_datasets import DATA_SOURCES, HUB, existing, locate
from .reading import TableFormat, read_table

logger = logging.getLogger(__name__)


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
        if isinstance(self.events, str):
            raise ValueError(f"events is the single string {self.events!r}; pass a list of names.")
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
        found = "; ".join(filter(None, (self.format.name, ", ".join(columns))))
        return f"{self.source}: {found}. {counted(self.rows, 'row')};{lost} {counts[0]}, {counts[1]} and {counts[2]} are kept{span}."


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

    An empty value, `NULL`, `nan` or `N/A` is missing, and so are the spellings of databases and pandas. Columns that are not
    used may lack values.

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
    table_kept, dropped = clean(
        table,
        origin,
        events=options.events,
        min_rating=options.min_rating,
        keep=options.keep,
        drop_incomplete=options.drop_incomplete,
        k_core=options.k_core or standard,
    )
    interactions = Dataset(table_kept)
    counts = len(interactions.unique("user_id")), len(interactions.unique("item_id")), len(interactions)
    if known and options.min_rating is None and options.k_core is None and counts != known.counts:
        text = "%s gives %d users, %d items and %d interactions, but %s is known to have %d, %d and %d."
        logger.warning(text, origin, *counts, known.name, *known.counts)
    return interactions, ReadingReport(origin, table_format, table.num_rows, dropped, *counts, *_span(table_kept))


# ----------------------------------------------------------------------------------------------------------------------


def _find(source: Any) -> RawFile | Dataset | IterableDataset:
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    is_list = _is_rows(source)
    if isinstance(source, pd.DataFrame) or is_list:
        try:
            return Dataset.from_list(source) if is_list else Dataset.from_pandas(source, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"a column of the interactions has values of several types ({reason}); make ids text."
            ) from None
    if isinstance(source, pa.Table) or hasattr(source, "to_arrow"):  # a table of Arrow, or a frame of polars
        return Dataset(source if isinstance(source, pa.Table) else source.to_arrow())
    if isinstance(source, DatasetDict) and len(source) == 1:
        return next(iter(source.values()))
    if not isinstance(source, (str, os.PathLike)):
        found = f"a {type(source).__name__}"
        if isinstance(source, (DatasetDict, list)):
            found += f" of {', '.join(source if isinstance(source, DatasetDict) else {type(row).__name__ for row in source})}"
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
        except (OSError, ValueError, IndexError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"{source} could not be read ({reason}); check the name and the connection, and log in with "
                "`hf auth login` if it is private."
            ) from error
    return RawFile(existing(source))


def _is_rows(source: Any) -> bool:
    """Whether `source` is a list of dicts, or a ValueError if it is an empty list."""
    if isinstance(source, list) and not source:
        raise ValueError("the list of interactions is empty; pass a dict for each.")
    return isinstance(source, list) and all(isinstance(row, dict) for row in source)


def _span(interactions: pa.Table) -> tuple[str | None, str | None]:
    """The first and the last time; without times, None."""
    if "timestamp" not in interactions.column_names:
        return None, None
    ends = pc.min_max(interactions["timestamp"]).as_py().values()
    unit = timestamp_unit(max(ends))
    first, last = (str(time) if unit is None else str(pd.Timestamp(time // unit, unit="s")) for time in ends)
    return first, last
