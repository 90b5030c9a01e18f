"""What is known about items besides their vectors, by row, to filter a search by: category, in stock, language.

A part of the embedding store. Columns hold small integers that name values, so a million items take 4 MB a column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WITHDRAWN = "withdrawn"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def check_metadata(metadata: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each item's names and values as a plain dict; a value of `None` stands for no value.

    Raises:
        ValueError: a name is no identifier of up to 64 characters, or a value is no string, boolean or finite number.
    """
    return [{_checked_name(name): _checked_value(name, value) for name, value in one.items()} for one in metadata]


def check_where(where: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A filter with a list of values for every name; errors of [`check_metadata`]."""
    return {
        _checked_name(name): [
            _checked_value(name, value)
            for value in (wanted if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted])
        ]
        for name, wanted in where.items()
    }


class ItemMetadata:
    """Names and values of each item, as columns.

    Args:
        num_items: n.
        columns: by name, int32 `[n]`: the position of an item's value in `values`, -1 where it has none.
        values: by name, the values.

    Raises:
        ValueError: the columns do not fit `values` or the number of items.
    """

    def __init__(
        self,
        num_items: int = 0,
        columns: Mapping[str, np.ndarray] | None = None,
        values: Mapping[str, Sequence[Any]] | None = None,
    ):
        self.num_items = num_items
        self.columns = dict(columns or {})
        self._numbers = {
            name: {_key(value): number for number, value in enumerate(column)}
            for name, column in (values or {}).items()
        }
        fits = self.columns.keys() == self._numbers.keys() and all(
            len(column) == num_items and column.max(initial=-1) < len(self._numbers[name])
            for name, column in self.columns.items()
        )
        if not fits:
            raise ValueError("the metadata does not fit the items.")

    @property
    def values(self) -> dict[str, list[Any]]:
        """By name, the values that its column's numbers stand for."""
        return {name: [value for _, value in numbers] for name, numbers in self._numbers.items()}

    def set(self, rows: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Merges checked names and values into those of items; `None` takes a name away."""
        for row, one in zip(rows, metadata):
            for name, value in one.items():
                if value is None:
                    if name in self.columns:
                        self.columns[name][row] = -1
                    continue
                if name not in self.columns:
                    self.columns[name], self._numbers[name] = np.full(self.num_items, -1, dtype=np.int32), {}
                numbers = self._numbers[name]
                self.columns[name][row] = numbers.setdefault(_key(value), len(numbers))

    def get(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The names and values of items."""
        values = self.values
        found = {name: column[rows].tolist() for name, column in self.columns.items()}
        return [
            {name: values[name][numbers[at]] for name, numbers in found.items() if numbers[at] >= 0}
            for at in range(len(rows))
        ]

    def allowed(self, where: Mapping[str, Sequence[Any]]) -> np.ndarray | None:
        """Which items a search may return, boolean `[n]`: not withdrawn, with one of the values of every name; `None` for all."""
        allowed = None
        if WITHDRAWN in self.columns:
            allowed = ~self._holds(WITHDRAWN, [True])
        for name, wanted in where.items():
            holds = self._holds(name, wanted)
            allowed = holds if allowed is None else allowed & holds
        return allowed

    def add_items(self, count: int) -> None:
        """Adds items, of which nothing is known, at the end."""
        self.num_items += count
        for name, column in self.columns.items():
            self.columns[name] = np.append(column, np.full(count, -1, dtype=np.int32))

    def keep(self, keep: np.ndarray) -> None:
        """Removes the items where boolean `keep` `[n]` is false; those after them move up."""
        self.num_items = int(keep.sum())
        self.columns = {name: column[keep] for name, column in self.columns.items()}

    def _holds(self, name: str, wanted: Sequence[Any]) -> np.ndarray:
        numbers = self._numbers.get(name, {})
        sought = [numbers[_key(value)] for value in wanted if _key(value) in numbers]
        if not sought:
            return np.zeros(self.num_items, dtype=bool)
        return np.isin(self.columns[name], sought)


def _key(value: Any) -> tuple[bool, Any]:
    """Equal for equal values only: Python takes True for 1."""
    return isinstance(value, bool), value


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"the metadata name {str(name)[:80]!r} is not made of letters, digits and underscores, 64 at most; rename it."
        )
    return name


def _checked_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value):
        return value.item() if isinstance(value, np.generic) else value
    raise ValueError(
        f"the metadata {name!r} is {str(value)[:80]!r} ({type(value).__name__}); give a string, a boolean or a finite number."
    )
