"""Recommendations for many users, written to a file batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from tqdm.auto import tqdm

from ..models.codes import atomic_write
from ..models.recommender import OnUnknown, Recommender
from .repository import space_named
from .reranking import answer_reranked

# Users at once; more are no faster and take more memory.
BATCH = 1024
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.string()),
        ("score", pa.float32()),
        ("title", pa.string()),
        ("note", pa.string()),
    ]
)


class _Writer(Protocol):
    def write_table(self, table: pa.Table) -> None:
        """Appends rows."""


def export_recommendations(
    recommender: Recommender,
    path: str | os.PathLike,
    users: Sequence[str] | None = None,
    *,
    top_k: int = 10,
    exclude_seen: bool = True,
    where: Mapping[str, Any] | None = None,
    on_unknown: OnUnknown = "error",
    diversity: float = 0.0,
    max_per: Mapping[str, int] | None = None,
    titles: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Writes the best items of users, by their histories in the store; memory does not grow with their number.

    Args:
        recommender: an open repository.
        path: a `.parquet`, `.csv` or `.jsonl` file, which is replaced whole or not at all. Its columns are `user_id`, `rank` (from
            1), `item_id`, `score` (the cosine), `title` and `note` (what was left out of the request). A user without items has
            no row, or one with the note alone.
        users: their ids; by default all users of the store.
        top_k, exclude_seen, where, on_unknown: see [`Recommender.recommend`].
        diversity, max_per: see [`rerank`].
        titles: of items that have no `title` in their metadata.

    Returns:
        The number of users, and of those of whom something was left out.

    Raises:
        KeyError: users are unknown; all are counted, and the first are named.
        ValueError: the file extension is another one.
    """
    path, asked = Path(path), recommender.store.ids("user") if users is None else list(users)
    if path.suffix.lower() not in (".parquet", ".csv", ".jsonl"):
        raise ValueError(f"{path} is not a .parquet, .csv or .jsonl file; choose one of these extensions.")
    if users is not None:
        # All at once, not batch by batch.
        recommender.known(asked, [()] * len(asked), on_unknown)
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"top_k": top_k, "exclude_seen": exclude_seen, "where": where, "on_unknown": on_unknown}
    options |= {"diversity": diversity, "max_per": max_per}
    noted = 0
    found: Sequence[Sequence[Mapping[str, Any]]]
    starts = range(0, len(asked), BATCH)
    with (
        space_named(path, "nothing was written"),
        atomic_write(path) as temporary,
        _writer(temporary, path.suffix.lower()) as writer,
    ):
        for start in tqdm(starts, desc="recommending", unit="batch", disable=None):
            batch = asked[start : start + BATCH]
            inputs = recommender.tokenize(batch, on_unknown=on_unknown)
            noted += sum(map(bool, inputs["notes"]))
            found = answer_reranked(recommender, inputs, **options)
            # A user who was left out has the note alone.
            notes = ([{"item": None, "score": None, "note": note}] * bool(note) for note in inputs["notes"])
            found = [rows or own for rows, own in zip(found, notes)]
            items = [row["item"] for rows in found for row in rows]
            named = [item for item in items if item is not None]
            known = {item: values.get("title") for item, values in zip(named, recommender.store.metadata(named))}
            columns = {
                "user_id": [user for user, rows in zip(batch, found) for _ in rows],
                "rank": [row["item"] and rank for rows in found for rank, row in enumerate(rows, 1)],
                "item_id": items,
                "score": [row["score"] for rows in found for row in rows],
                "title": [
                    str(title) if (title := known.get(item) or (titles or {}).get(item)) else None for item in items
                ],
                "note": [row.get("note") for rows in found for row in rows],
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))
    return len(asked), noted


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[_Writer]:
    if suffix == ".parquet":
        with pa_parquet.ParquetWriter(path, SCHEMA) as parquet:
            yield parquet
    elif suffix == ".csv":
        with pa_csv.CSVWriter(path, SCHEMA) as table:
            yield table
    else:
        with open(path, "w", encoding="utf-8") as stream:
            yield _JsonLines(stream)


class _JsonLines:
    def __init__(self, stream: Any):
        self.stream = stream

    def write_table(self, table: pa.Table) -> None:
        """Appends a line for each row."""
        # A rank stays whole where another row has none.
        frame = table.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype()}.get)
        frame.to_json(self.stream, orient="records", lines=True, force_ascii=False)
