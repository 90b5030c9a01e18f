"""Ids, metadata and seen items as Milvus takes them: text that can stand in a filter expression and only be what it is.

A part of the embedding store on Milvus. Knows no client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ..models.item_metadata import WITHDRAWN

# Bytes of seen items in one row; a field holds 65,535.
SEEN_BYTES = 60_000


def encoded(one: str) -> str:
    """An id or a value in letters, digits and `%._~-` only, so that it can stand between quotes."""
    return quote(one, safe="", errors="surrogatepass")


def one_of(field: str, ids: Sequence[str]) -> str:
    """The filter for rows whose field is one of `ids`."""
    return f"{field} in " + json.dumps([encoded(one) for one in ids])


def field_of(name: str) -> str:
    """The field that holds the values of a name of metadata."""
    return f"m_{name}"


def value_of(value: Any) -> str:
    """A value of metadata as text that is equal for equal values only; of `None`, text that no value has."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"s.{encoded(value)}"
    return f"b.{value}" if isinstance(value, bool) else f"n.{float(value)!r}"


def filter_of(where: Mapping[str, Sequence[Any]]) -> str:
    """The expression for items that are not withdrawn and have one of the values of every name."""
    parts = [f"{WITHDRAWN} == false"]
    parts += [
        f"{field_of(name)} in {json.dumps([value_of(value) for value in wanted])}" for name, wanted in where.items()
    ]
    return " and ".join(parts)


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The encoded seen items of each user, from rows in any order."""
    lists: dict[str, list[str]] = {}
    parts = {row["user"]: row["parts"] for row in rows if row["part"] == 0}
    for row in sorted(rows, key=lambda row: row["part"]):
        if row["part"] < parts.get(row["user"], 0):
            lists.setdefault(row["user"], []).extend(row["items"].split())
    return lists


def parted(user: str, items: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a user's seen items, all encoded; each tells how many there are, so that one that is left over is none."""
    parts: list[list[str]] = [[]]
    size = 0
    for item in items:
        size += len(item) + 1
        if size > SEEN_BYTES:
            parts.append([])
            size = len(item) + 1
        parts[-1].append(item)
    for part, of_part in enumerate(parts):
        yield {"id": f"{user}/{part}", "user": user, "part": part, "parts": len(parts), "items": " ".join(of_part)}
