"""The embedding store: where the collaborative vectors of users and items live, and where items are retrieved from.

Holds, in memory, the ids, the raw vectors, what each user has already interacted with and what is known about items,
and finds the items whose vectors have the highest cosine with a query (Eq. 19 of TokenRec, arXiv 2406.10450), exactly.
The vectors are the source of truth for everything downstream. Knows nothing about how they were made, about codes,
prompts or models; it only carries the hashes (`space_ids`) of the MQ-Tokenizers that the codes were made with.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from .codes import IdIndex, check_ids

# Rows scored at once. 16,384 items was the fastest of the sizes measured; both bound the memory of a search.
ITEM_CHUNK, QUERY_CHUNK = 16_384, 1_024
# Candidates of a query that are collected from chunks before the best of them are chosen.
CANDIDATES = 1_024
# Scores whose highest stands for all of them when the best are looked for.
GROUP = 32


def exact_search(
    queries: torch.Tensor,
    items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items of highest cosine with each query, best first, equal scores in row order.

    Args:
        queries: float32 `[B, d]`, unit rows.
        items: chunks of item vectors in row order, each float32 `[c, d]` with its `inverse_lengths` `[c]`.
        top_k: how many items to return for each query.
        exclude_queries: int64 `[m]`, with `exclude_items` the pairs that must not be returned: a row of `queries`,
        exclude_items: int64 `[m]`, and a row of all items; pairs with an item that there is not are ignored.
        allowed: boolean `[n]`, the items that may be returned at all; by default all.

    Returns:
        Rows of the items, int64 `[B, top_k]`, and their cosines, float32 `[B, top_k]`; -1 and `-inf` where none is left.
    """
    rows = torch.full((len(queries), top_k), -1)
    scores = torch.full((len(queries), top_k), -torch.inf)
    for start in range(0, len(queries), QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, len(queries))
        mine = (exclude_queries >= start) & (exclude_queries < end)
        best = _search(queries[start:end], items, top_k, exclude_queries[mine] - start, exclude_items[mine], allowed)
        rows[start:end, : best[0].shape[1]], scores[start:end, : best[1].shape[1]] = best
    return rows.masked_fill_(scores == -torch.inf, -1), scores


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the k highest scores of each row, best first, equal scores in column order.

    `torch.topk` alone does not say which of several equal scores it takes.

    Args:
        scores: float `[B, n]` without NaN.
        k: how many.

    Returns:
        Columns, int64 `[B, min(k, n)]`, and their scores. Columns of score `-inf` may be any.
    """
    return _ordered(*_topk(scores, min(k, scores.shape[1])))


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """The rows of `vectors` `[n, d]` scaled to length 1, as new memory; a zero row stays zero."""
    # Scaled by the largest element first, so that the squares of tiny and huge values neither vanish nor overflow.
    scale = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / torch.where(scale > 0, scale, 1.0)
    length = scaled.norm(dim=1, keepdim=True)
    return scaled.div_(torch.where(length > 0, length, 1.0))


def inverse_lengths(vectors: torch.Tensor) -> torch.Tensor:
    """1 / length of each row of `vectors` `[n, d]`, float32 `[n]`.

    NaN where the row is zero, or so short or long that the product of the two would not be exact: `unit_rows` must be
    taken instead.
    """
    lengths = torch.cat([part.norm(dim=1) for part in vectors.split(ITEM_CHUNK)]) if len(vectors) else vectors[:, 0]
    return torch.where((lengths > 1e-15) & (lengths < 1e15), 1 / lengths, torch.nan)


def _cosines(queries: torch.Tensor, vectors: torch.Tensor, inverse: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Cosines of unit `queries` `[B, d]` with the rows of a chunk `[c, d]`, in `memory` of at least B * c numbers: `[B, c]`."""
    scores = memory[: len(queries) * len(vectors)].view(len(queries), len(vectors))
    if inverse.isnan().any():
        return torch.mm(queries, unit_rows(vectors).T, out=scores)
    # Whatever is smaller is scaled: the scores [B, c] or the vectors [c, d].
    if len(queries) < vectors.shape[1]:
        return torch.mm(queries, vectors.T, out=scores).mul_(inverse)
    return torch.mm(queries, (vectors * inverse[:, None]).T, out=scores)


def _search(
    queries: torch.Tensor,
    items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_search` of a single chunk of queries, without padding: `[B, min(top_k, n)]`."""
    exclude_items, order = exclude_items.sort()
    exclude_queries = exclude_queries[order]
    rows = [torch.empty(len(queries), 0, dtype=torch.int64)]
    scores = [torch.empty(len(queries), 0)]
    start = collected = 0
    # Asked for once: fresh memory for every chunk would cost as much as the product in it.
    memory = torch.empty(len(queries) * max((len(vectors) for vectors, _ in items), default=0))
    for vectors, inverse in items:
        end = start + len(vectors)
        chunk = _cosines(queries, vectors, inverse, memory)
        low, high = torch.searchsorted(exclude_items, torch.tensor([start, end])).tolist()
        chunk[exclude_queries[low:high], exclude_items[low:high] - start] = -torch.inf
        if allowed is not None:
            chunk.masked_fill_(~allowed[start:end], -torch.inf)
        columns, best = _topk(chunk, min(top_k, len(vectors)))
        rows.append(columns + start)
        scores.append(best)
        start, collected = end, collected + best.shape[1]
        if collected > max(CANDIDATES, 2 * top_k):
            columns, best = _ordered(torch.cat(rows, dim=1), torch.cat(scores, dim=1))
            rows, scores, collected = [columns[:, :top_k]], [best[:, :top_k]], top_k
    columns, best = _ordered(torch.cat(rows, dim=1), torch.cat(scores, dim=1))
    return columns[:, :top_k], best[:, :top_k]


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `[B, k]` and values of the k highest scores, of equal ones those of the lowest columns, in any order."""
    width = scores.shape[1] // GROUP * GROUP
    if 4 * k * GROUP > width:
        return _plain_topk(scores, k)
    # The best k lie in the k groups with the highest maxima (equal ones: the first): else each of these had a better one.
    groups = scores[:, :width].unflatten(1, (-1, GROUP))  # [B, width / GROUP, GROUP]
    chosen = _plain_topk(groups.amax(dim=2), k)[0].sort(dim=1).values  # [B, k]
    columns = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=chosen.device)).flatten(1)  # [B, k * GROUP]
    rest = torch.arange(width, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    best, values = _plain_topk(scores.gather(1, columns), k)
    return columns.gather(1, best), values


def _plain_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`_topk` for few columns."""
    # One more than asked for shows whether the last place is tied.
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if scores.shape[1] > k:
        tied = (values[:, k] == values[:, k - 1]) & (values[:, k] > -torch.inf)
        if tied.any():
            cut = values[tied, k - 1 : k]
            above, equal = scores[tied] > cut, scores[tied] == cut
            places = k - above.sum(dim=1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=1) <= places))
            columns[tied, :k] = chosen.nonzero()[:, 1].view(-1, k)
            values[tied, :k] = scores[tied].gather(1, columns[tied, :k])
    return columns[:, :k], values[:, :k]


def _ordered(columns: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both `[B, k]` with the highest values first, equal ones in column order."""
    columns, order = columns.sort(dim=1)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, best), values


KINDS = ("user", "item")


def check_vectors(
    embedding_dim: int, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray
) -> tuple[list[str], torch.Tensor]:
    """`ids`, each once, and their vectors `[n, d]` in memory of their own; the last one of an id counts."""
    names = check_ids(check_id_list(check_kind(kind), ids), kind)
    matrix = check_matrix(embedding_dim, vectors, f"{kind} vectors", "n")
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} {kind} ids were given with {len(matrix)} vectors; give one vector for each id.")
    for start in range(0, len(names), ITEM_CHUNK):
        bad = ~torch.isfinite(matrix[start : start + ITEM_CHUNK]).all(dim=1)
        if bad.any():
            name = names[start + int(bad.nonzero()[0])]
            raise ValueError(
                f"the vector of {kind} {name!r} holds NaN or an infinity; leave {kind} {name!r} out or mend its vector."
            )
    last = {name: position for position, name in enumerate(names)}
    if len(last) < len(names):
        return list(last), matrix[list(last.values())]
    return names, matrix.clone() if isinstance(vectors, torch.Tensor) else matrix


def check_queries(embedding_dim: int, queries: torch.Tensor | np.ndarray, top_k: int) -> torch.Tensor:
    """Queries as a float32 CPU tensor `[B, embedding_dim]`, or a ValueError that says what is wrong with them or `top_k`."""
    matrix = check_matrix(embedding_dim, queries, "queries", "B")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; ask for at least 1 item.")
    bad = ~torch.isfinite(matrix).all(dim=1)
    if bad.any():
        raise ValueError(f"query {int(bad.nonzero()[0])} holds NaN or an infinity; no item can be compared with it.")
    return matrix


def check_matrix(embedding_dim: int, vectors: torch.Tensor | np.ndarray, what: str, count: str) -> torch.Tensor:
    """`vectors` as a float32 CPU tensor of shape `[count, embedding_dim]`, or a ValueError that names `what`."""
    if isinstance(vectors, torch.Tensor):
        matrix = vectors.detach().to("cpu", torch.float32)
    else:
        matrix = torch.from_numpy(np.array(vectors, dtype=np.float32))
    if matrix.ndim != 2:
        raise ValueError(
            f"{what} have shape {list(matrix.shape)} but the store expects [{count}, {embedding_dim}]; pass a "
            "matrix with one row each."
        )
    if matrix.shape[1] != embedding_dim:
        raise ValueError(
            f"{what} have {matrix.shape[1]} dimensions but the store holds vectors of {embedding_dim}; pass "
            f"vectors of {embedding_dim} or make a store with embedding_dim={matrix.shape[1]}."
        )
    return matrix


def check_kind(kind: str) -> str:
    """`kind`, or a ValueError where it is neither `"user"` nor `"item"`."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'user' or 'item'.")
    return kind


def check_id_list(kind: str, ids: Sequence[str]) -> Sequence[str]:
    """`ids`, or a ValueError where they are a single string."""
    if isinstance(ids, str):
        raise ValueError(f"{kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
    return ids


def list_lengths(lists: Sequence[Sequence[str]], expected: int, what: str, of: str) -> np.ndarray:
    """The length of each list, int64 `[expected]`; ValueError where there is not one list for each."""
    if len(lists) != expected or str in set(map(type, lists)):
        found = "strings" if len(lists) == expected else f"{len(lists)} lists of item ids"
        raise ValueError(f"{what} holds {found}; pass one list of item ids for each {of}, {expected} in all.")
    return np.fromiter(map(len, lists), dtype=np.int64, count=expected)


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


class Ragged:
    """Lists of different lengths in one array (CSR): list r is `values[indptr[r] : indptr[r + 1]]`.

    Args:
        indptr: int64 `[num_lists + 1]`, from 0 to the number of values, ascending.
        values: `[indptr[-1]]`.
    """

    def __init__(self, indptr: np.ndarray, values: np.ndarray):
        self.indptr, self.values = indptr, values

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, values: np.ndarray) -> Ragged:
        """Lists of these lengths `[num_lists]`, one after the other."""
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, num_lists: int) -> Ragged:
        """Each of `values` `[n]` in the list that `rows` `[n]` names, in the order given."""
        order = np.argsort(rows, kind="stable")
        return cls.from_lengths(np.bincount(rows, minlength=num_lists), values[order])

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, int64 `[num_lists]`."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """The list of each value, int64 `[n]`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def ranks(self) -> np.ndarray:
        """The place of each value in its list, from 0, int64 `[n]`."""
        return np.arange(len(self.values)) - np.repeat(self.indptr[:-1], self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists at `rows` `[m]`, in that order."""
        lengths = self.lengths[rows]
        taken = Ragged.from_lengths(lengths, self.values)
        taken.values = self.values[
            np.arange(taken.indptr[-1]) + np.repeat(self.indptr[rows] - taken.indptr[:-1], lengths)
        ]
        return taken

    def padded(self, fill: int) -> np.ndarray:
        """A rectangle `[num_lists, longest]` (at least one column) filled up with `fill`."""
        table = np.full((len(self), max(1, int(self.lengths.max(initial=0)))), fill, dtype=np.int64)
        table[self.rows, self.ranks] = self.values
        return table


class SeenItems:
    """The items of each user, oldest first; an item may come up again.

    Args:
        indptr: int64 `[num_users + 1]`.
        items: int32 `[indptr[-1]]`.

    Raises:
        ValueError: the two do not fit together.
    """

    def __init__(self, indptr: np.ndarray | None = None, items: np.ndarray | None = None):
        self.indptr = np.zeros(1, dtype=np.int64) if indptr is None else indptr
        self.items = np.empty(0, dtype=np.int32) if items is None else items
        if not len(self.indptr) or self.indptr[-1] != len(self.items):
            raise ValueError("the seen items do not fit the users and items.")

    @property
    def num_users(self) -> int:
        """The number of users."""
        return len(self.indptr) - 1

    def add_users(self, count: int) -> None:
        """Adds users, who have seen nothing, at the end."""
        self.indptr = np.append(self.indptr, np.full(count, self.indptr[-1]))

    def add(self, users: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> None:
        """Appends to the lists of `users` `[n]` the `lengths` `[n]` next of `items`."""
        self._set_pairs(
            np.concatenate([self._owners(), np.repeat(users, lengths)]),
            np.concatenate([self.items, items]),
            self.num_users,
        )

    def replace(self, users: np.ndarray, lengths: np.ndarray, items: np.ndarray) -> None:
        """As `add`, instead of what these users have seen; of a user given twice the last list counts."""
        positions = np.arange(len(users))
        last = np.full(self.num_users, -1)
        last[users] = positions
        counts = np.repeat(last[users] == positions, lengths)
        untouched = np.repeat(last < 0, np.diff(self.indptr))
        self._set_pairs(
            np.concatenate([self._owners()[untouched], np.repeat(users, lengths)[counts]]),
            np.concatenate([self.items[untouched], items[counts]]),
            self.num_users,
        )

    def keep_users(self, keep: np.ndarray) -> None:
        """Removes the users where boolean `keep` `[num_users]` is false; those after them move up."""
        owners = self._owners()
        stays = keep[owners]
        self._set_pairs((np.cumsum(keep) - 1)[owners[stays]], self.items[stays], int(keep.sum()))

    def keep_items(self, keep: np.ndarray) -> None:
        """Removes the items where boolean `keep` `[num_items]` is false; the rows after them move up."""
        stays = keep[self.items]
        self._set_pairs(self._owners()[stays], (np.cumsum(keep) - 1)[self.items[stays]], self.num_users)

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists of several users.

        Args:
            users: int64 `[n]`; -1 for a user who has seen nothing.

        Returns:
            `(indptr, items)`, int64 `[n + 1]` and int64 `[indptr[-1]]`.
        """
        # Row -1 is a valid index for NumPy; what it finds is replaced.
        starts = np.where(users < 0, 0, self.indptr[users])
        ends = np.where(users < 0, 0, self.indptr[np.asarray(users) + 1])
        indptr = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], ends - starts)
        return indptr, self.items[positions].astype(np.int64)

    def _owners(self) -> np.ndarray:
        """The user row of each entry of `items`."""
        return np.repeat(np.arange(self.num_users), np.diff(self.indptr))

    def _set_pairs(self, users: np.ndarray, items: np.ndarray, num_users: int) -> None:
        """Makes (user row, item row) pairs, for each user in order, the seen items."""
        order = np.argsort(users, kind="stable")
        counts = np.bincount(users, minlength=num_users)
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.items = items[order].astype(np.int32)


FORMAT_VERSION = 1
MANIFEST = "store.json"
CHANGES = "changes"

_DATA_FILE = re.compile(r"[a-z]+-[0-9a-f]{8}\.safetensors")


Arrays = dict[str, np.ndarray]


def save_files(folder: str | os.PathLike, facts: dict[str, Any], arrays: dict[str, Arrays]) -> dict[str, Any]:
    """Writes a store to a folder, replacing the one that is there.

    Args:
        folder: made if absent.
        facts: what `store.json` says besides its format version and the files.
        arrays: by the name of a file, in small letters, its arrays by name.

    Returns:
        The content of `store.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        files = {name: _save(folder, Path(temporary), name, contents) for name, contents in arrays.items()}
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files, "changes": []}
        _replace_manifest(folder, Path(temporary), manifest)
    remove_leftovers(folder)
    return manifest


def append_changes(
    folder: str | os.PathLike, manifest: dict[str, Any], facts: dict[str, Any], changes: Arrays
) -> dict[str, Any]:
    """Adds a file of changes to a store on disk; the cost is that of the changes, whatever the size of the store.

    Args:
        folder: where the store is.
        manifest: its `store.json`, as `save_files`, `load_files` or this function gave it.
        facts: what takes the place of the facts in it.
        changes: the arrays of the file.

    Returns:
        The new content of `store.json`.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        entry = _save(folder, Path(temporary), CHANGES, changes)
        manifest = {**manifest, **facts, "changes": [*manifest["changes"], entry]}
        _replace_manifest(folder, Path(temporary), manifest)
    return manifest


def is_current(folder: str | os.PathLike, manifest: dict[str, Any]) -> bool:
    """Whether `manifest` is what `store.json` of the folder says now."""
    path = Path(folder) / MANIFEST
    return path.is_file() and path.read_bytes() == _manifest_bytes(manifest)


def load_files(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Arrays], list[Arrays]]:
    """Reads what [`save_files`] and [`append_changes`] wrote: the whole `store.json`, the arrays, and those of the changes.

    The arrays are memory maps of the files: read when they are used, and copied, page by page, where they are changed.

    Raises:
        ValueError: a file is missing, damaged or of another format version.
    """
    path = Path(folder) / MANIFEST
    files: dict[str, tuple[str, int, str]] = {}
    changes: list[tuple[str, int, str]] = []
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            for name, entry in manifest["files"].items():
                files[name] = _described(entry)
            changes = [_described(entry) for entry in manifest.setdefault("changes", [])]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, f"it does not describe a store: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version} but this tokenrec_hf reads version {FORMAT_VERSION}; install the "
            "version that wrote it or rebuild the store by `tokenrec train`."
        )
    arrays = {name: _load(Path(folder), *entry) for name, entry in files.items()}
    return manifest, arrays, [_load(Path(folder), *entry) for entry in changes]


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the data files that `store.json` does not name, and what interrupted saves left."""
    manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    keep = {entry["file"] for entry in [*manifest["files"].values(), *manifest.get("changes", [])]}
    for path in Path(folder).iterdir():
        if path.name.startswith(".saving-"):
            shutil.rmtree(path, ignore_errors=True)
        elif _DATA_FILE.fullmatch(path.name) and path.name not in keep:
            # A file that somebody still reads cannot be removed on Windows; the next save tries again.
            with suppress(OSError):
                path.unlink()


def flush_names(folder: str | os.PathLike) -> None:
    """Brings the names in a folder to the disk, where a folder can be opened: a power failure must not undo a renaming."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def damaged(path: Path, problem: str) -> ValueError:
    """The error that says that a file of a store is unusable, why, and what to do."""
    return ValueError(
        f"{path} is damaged ({problem}); restore the store from a copy or rebuild it by `tokenrec train`."
    )


def _described(entry: dict[str, Any]) -> tuple[str, int, str]:
    return str(entry["file"]), entry["bytes"], entry["sha256"]


def _save(folder: Path, temporary: Path, name: str, contents: Arrays) -> dict[str, Any]:
    """Writes a data file, brings it to its place, and describes it."""
    new = temporary / name
    save_file({key: np.ascontiguousarray(array) for key, array in contents.items()}, new)
    _flush(new)
    sha256 = _sha256(new)
    file = f"{name}-{sha256[:8]}.safetensors"
    size = new.stat().st_size
    os.replace(new, folder / file)
    return {"file": file, "bytes": size, "sha256": sha256}


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _replace_manifest(folder: Path, temporary: Path, manifest: dict[str, Any]) -> None:
    new = temporary / MANIFEST
    new.write_bytes(_manifest_bytes(manifest))
    _flush(new)
    os.replace(new, folder / MANIFEST)
    flush_names(folder)


def _load(folder: Path, file: str, size: int, sha256: str) -> Arrays:
    path = folder / file
    if not _DATA_FILE.fullmatch(file):
        raise damaged(folder / MANIFEST, f"{file!r} is not the name of a data file")
    if not path.is_file():
        raise damaged(path, "it is missing")
    if path.stat().st_size != size:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {size}")
    if _sha256(path) != sha256:
        raise damaged(path, "its content is not what was saved")
    try:
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise damaged(path, f"it is not a safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Brings a file to the disk: after a power failure its new name must not stand for missing content."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


METHODS = ("upsert", "delete", "set_seen", "add_seen", "set_metadata")


def pack_changes(changes: Sequence[tuple[str, list[Any], torch.Tensor | None]]) -> dict[str, np.ndarray]:
    """Changes as arrays: the calls as JSON, and their vectors."""
    calls = json.dumps([[method, arguments] for method, arguments, _ in changes]).encode()
    arrays = {f"vectors.{at}": vectors.numpy() for at, (_, _, vectors) in enumerate(changes) if vectors is not None}
    return {"calls": np.frombuffer(calls, dtype=np.uint8), **arrays}


def unpack_changes(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, list[Any], np.ndarray | None]]:
    """The changes that `pack_changes` was given."""
    calls = json.loads(arrays["calls"].tobytes())
    unknown = {method for method, _ in calls} - set(METHODS)
    if unknown:
        raise ValueError(f"there is no change of the name {unknown.pop()!r}.")
    return [(method, arguments, arrays.get(f"vectors.{at}")) for at, (method, arguments) in enumerate(calls)]


class VectorTable:
    """Raw vectors, one a row.

    Args:
        vectors: float32 `[n, d]`, taken over, not copied; changes are made in it.
    """

    def __init__(self, vectors: torch.Tensor):
        self._blocks = [vectors]
        self._inverse: list[torch.Tensor | None] = [None]

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def all(self) -> torch.Tensor:
        """All vectors `[n, d]`: the table's own memory, to be read only."""
        if len(self._blocks) > 1:
            self._blocks, self._inverse = [torch.cat(self._blocks)], [None]
        return self._blocks[0]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The vectors at `rows` `[m]`, as new memory `[m, d]`."""
        taken = self._blocks[0].new_empty(len(rows), self._blocks[0].shape[1])
        for block, _, chosen, inside in self._located(rows):
            taken[chosen] = block[inside]
        return taken

    def put(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """Replaces the vectors at `rows` `[m]`, each given once, by `vectors` `[m, d]`."""
        for block, number, chosen, inside in self._located(rows):
            block[inside] = vectors[chosen]
            inverse = self._inverse[number]
            if inverse is not None:
                inverse[inside] = inverse_lengths(vectors[chosen])

    def append(self, vectors: torch.Tensor) -> None:
        """Adds rows `[m, d]`, taken over, at the end."""
        # Blocks shrink by halves, so n rows were copied log(n) times at most however they came.
        while len(self._blocks) > 1 and len(self._blocks[-1]) < 2 * len(vectors) or not len(self._blocks[-1]):
            vectors = torch.cat([self._blocks.pop(), vectors])
            self._inverse.pop()
            if not self._blocks:
                break
        self._blocks.append(vectors)
        self._inverse.append(None)

    def keep(self, mask: torch.Tensor) -> None:
        """Removes the rows where boolean `mask` `[n]` is false and closes the gaps, within the memory that is there."""
        start = 0
        for number, block in enumerate(self._blocks):
            inside = mask[start : start + len(block)]
            start += len(block)
            filled = 0
            for chunk, chosen in zip(block.split(ITEM_CHUNK), inside.split(ITEM_CHUNK)):
                kept = chunk[chosen]
                block[filled : filled + len(kept)] = kept
                filled += len(kept)
            inverse = self._inverse[number]
            self._blocks[number] = block[:filled]
            self._inverse[number] = None if inverse is None else inverse[inside]

    def chunks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of all vectors in row order, at most `[ITEM_CHUNK, d]` each, with their inverse lengths."""
        found = []
        for number, block in enumerate(self._blocks):
            inverse = self._inverse[number]
            if inverse is None:
                inverse = self._inverse[number] = inverse_lengths(block)
            if len(block):
                found += list(zip(block.split(ITEM_CHUNK), inverse.split(ITEM_CHUNK)))
        return found

    def _located(self, rows: torch.Tensor):
        """For each block that holds some of `rows`: the block, its number, which of `rows`, and where in the block."""
        start = 0
        for number, block in enumerate(self._blocks):
            chosen = ((rows >= start) & (rows < start + len(block))).nonzero()[:, 0]
            if len(chosen):
                yield block, number, chosen, rows[chosen] - start
            start += len(block)


class StoreHubMixin:
    """Loads a store from a repository and uploads it; needs `open` and `save_pretrained` of the class it is mixed into."""

    open: Any
    save_pretrained: Any

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike,
        subfolder: str = "store",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Any:
        """Loads the store of a trained repository: a local folder or a Hub repository (only `subfolder` is downloaded).

        Args:
            repo_or_folder: a folder (of a repository, or of a store itself), or the id of a Hub repository.
            subfolder: the folder of the store in the repository.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
            cache_dir: where downloads are kept; by default the Hub's cache.

        Raises:
            FileNotFoundError: there is no such folder, or no store in it.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        if Path(repo_or_folder).is_dir():
            inside = Path(repo_or_folder) / subfolder
            return cls.open(inside if (inside / MANIFEST).is_file() else repo_or_folder)
        try:
            snapshot = huggingface_hub.snapshot_download(
                str(repo_or_folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=f"{subfolder}/*",
            )
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{repo_or_folder} is neither a folder nor the id of a Hub repository; check the path."
            ) from error
        if not (Path(snapshot) / subfolder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"the Hub repository {repo_or_folder} has no {subfolder}/{MANIFEST}; it holds no embedding store, or "
                "not in that subfolder."
            )
        return cls.open(Path(snapshot) / subfolder)

    def push_to_hub(
        self,
        repo_id: str,
        include_users: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload embedding store",
    ) -> huggingface_hub.CommitInfo:
        """Uploads the store to the `store/` folder of a Hub model repository, which is made if absent.

        Args:
            repo_id: `name` or `organisation/name`.
            include_users: whether users' ids, vectors and seen items go up too. They are personal data: left out unless
                asked for, and then those of an earlier upload are removed from the branch.
            private: whether a repository that is made here is private; by default what the organisation prescribes.
            token: Hub token; by default the one that is logged in.
            revision: the branch, made if absent; by default the main one.
            commit_message: the message of the commit.
        """
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_users=include_users)
            return huggingface_hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo="store",
                token=token,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=["users-*.safetensors", "items-*.safetensors", "changes-*.safetensors"],
            )


# A store on disk is written anew when it has more files of changes than this, or when these hold more than a quarter of it.
MAX_CHANGES, MAX_CHANGED_SHARE = 16, 4


def _extra(module: str) -> Any:
    """A sibling that needs what only an extra installs."""
    # Not by an import statement: code on the Hub takes along all that it imports.
    return importlib.import_module(f"tokenrec_hf.store.{module}")


def _locked(method: Callable) -> Callable:
    """Makes a method of a store exclude all others of the same store while it runs."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class EmbeddingStore(StoreHubMixin):
    """Ids, raw vectors and seen items of users and items, in memory, with exact cosine search over the items.

    Rows keep the order in which ids were first added; deleting closes the gaps. Every change is checked before anything
    is touched, so a call that raises has changed nothing. A change costs a pass over the ids: pass many ids a call.
    Threads may read and write at once: each call sees the store before or after another one, never in between.

    Args:
        embedding_dim: d, the number of dimensions of users' and items' vectors.
        space_ids: for `"user"` and `"item"`, the hash of that kind's MQ-Tokenizer (encoder and codebooks); `None` as
            long as the kind is not tied to one.

    Raises:
        ValueError: `embedding_dim` is not positive, or `space_ids` has another key than `"user"` and `"item"`.
    """

    def __init__(self, embedding_dim: int, space_ids: dict[str, str] | None = None):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be at least 1.")
        self.embedding_dim = int(embedding_dim)
        self.space_ids: dict[str, str | None] = dict.fromkeys(KINDS)
        for kind, space_id in (space_ids or {}).items():
            self.space_ids[check_kind(kind)] = space_id
        self._lock = threading.RLock()
        self._index = {kind: IdIndex() for kind in KINDS}
        self._vectors = {kind: VectorTable(torch.empty(0, self.embedding_dim)) for kind in KINDS}
        self._seen = SeenItems()
        self._metadata = ItemMetadata()
        self._approximate: Any = None
        # Where the store was opened from or last saved to, with its manifest, and what has changed since, call by call.
        self._saved: tuple[Path, dict[str, Any]] | None = None
        self._changes: list[tuple[str, list[Any], torch.Tensor | None]] = []

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"EmbeddingStore(embedding_dim={self.embedding_dim}, {counts})"

    # ---- open, save, share

    @classmethod
    def open(cls, path_or_uri: str | os.PathLike, token: str | None = None) -> EmbeddingStore:
        """Opens the store in a folder, in the `store/` folder of a trained repository, or on Milvus.

        The files are memory-mapped, so a large store opens at once and takes memory as it is used.

        Args:
            path_or_uri: a folder; the path of a Milvus Lite database, which ends in `.db`; or the address of a Milvus
                server or cluster, `http://host:19530` or `https://...`. See [`MilvusEmbeddingStore`].
            token: of the Milvus server.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        if str(path_or_uri).startswith(("http://", "https://")) or str(path_or_uri).endswith(".db"):
            return _extra("milvus").MilvusEmbeddingStore(str(path_or_uri), token=token)
        for folder in (Path(path_or_uri), Path(path_or_uri) / "store"):
            if (folder / MANIFEST).is_file():
                return cls._load(folder)
        raise FileNotFoundError(
            f"there is no embedding store in {path_or_uri} ({MANIFEST} is missing); give the folder of a store or of a "
            "trained repository, or make one with `tokenrec train`."
        )

    @_locked
    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder, replacing the store that is there.

        In the folder that the store was opened from or last saved to, only what has changed since is written, as long as
        it is little and nobody was deleted. Whoever stops in between leaves the former store whole, and what was saved
        when this returns is on the disk.

        Args:
            folder: made if absent.
            include_users: whether users' ids, vectors and seen items are written. Without them, those of a former store
                in the folder are removed.
        """
        folder, kinds = Path(folder).resolve(), KINDS if include_users else ("item",)
        facts = {
            "embedding_dim": self.embedding_dim,
            "space_ids": dict(self.space_ids),
            "counts": {kind: self.count(kind) for kind in kinds},
        }
        manifest = self._manifest_to_extend(folder, facts)
        if manifest is None:
            facts["metadata"] = self._metadata.values
            manifest = save_files(folder, facts, {f"{kind}s": self._arrays(kind) for kind in kinds})
        elif self._changes:
            manifest = append_changes(folder, manifest, facts, pack_changes(self._changes))
        if include_users:
            self._saved, self._changes = (folder, manifest), []

    def close(self) -> None:
        """Nothing: there is nothing to close here, as there is in stores on a server."""

    # ---- ids and vectors

    @_locked
    def upsert(self, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray) -> None:
        """Adds vectors, or replaces those of ids that are present.

        Args:
            kind: `"user"` or `"item"`.
            ids: n ids; of an id that is given twice the last vector counts. New ids are appended in the order given.
            vectors: `[n, embedding_dim]`, any float type; stored as float32, not normalised.

        Raises:
            ValueError: an id or the shape is wrong, or a vector holds NaN or an infinity. Nothing was changed then.
        """
        names, matrix = check_vectors(self.embedding_dim, kind, ids, vectors)
        rows = self._index[kind].rows(names)
        new = rows < 0
        if new.any():
            self._index[kind] = self._index[kind].extended([names[i] for i in np.flatnonzero(new)], kind)
            self._vectors[kind].append(matrix if new.all() else matrix[torch.from_numpy(new)])
            (self._seen.add_users if kind == "user" else self._metadata.add_items)(int(new.sum()))
        if not new.all():
            self._vectors[kind].put(torch.from_numpy(rows[~new]), matrix[torch.from_numpy(~new)])
        if kind == "item" and self._approximate is not None:
            self._approximate.added(int(new.sum()))
            self._approximate.replaced(rows[~new])
        self._record("upsert", [kind, names], matrix)

    @_locked
    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """Removes ids, their vectors, and their part in the seen items; ids that are not present are ignored."""
        rows = self.rows(kind, ids)
        rows = rows[rows >= 0]
        if not len(rows):
            return
        keep = np.ones(self.count(kind), dtype=bool)
        keep[rows] = False
        if kind == "user":
            self._seen.keep_users(keep)
            # Nothing of a user may be left in the files: they are written anew.
            self._saved = None
        else:
            self._seen.keep_items(keep)
            self._metadata.keep(keep)
            if self._approximate is not None:
                self._approximate.kept(keep)
        self._index[kind] = self._index[kind].kept(keep)
        self._vectors[kind].keep(torch.from_numpy(keep))
        self._record("delete", [kind, list(ids)])

    @_locked
    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """The raw vectors of `ids`, float32 `[n, embedding_dim]`, in the order asked.

        Raises:
            KeyError: an id is not in the store.
        """
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            raise KeyError(f"{kind} {ids[int(np.argmax(rows < 0))]!r} is not in the store; add it with upsert.")
        return self._vectors[kind].take(torch.from_numpy(rows))

    @_locked
    def rows(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`; -1 where the id is not in the store."""
        return self._index[check_kind(kind)].rows(check_id_list(kind, ids))

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """Whether each id is in the store, boolean `[n]`."""
        return self.rows(kind, ids) >= 0

    @_locked
    def ids(self, kind: str) -> list[str]:
        """All ids, in row order."""
        return self._index[check_kind(kind)].ids()

    @_locked
    def count(self, kind: str) -> int:
        """The number of ids."""
        return len(self._index[check_kind(kind)])

    @_locked
    def vectors(self, kind: str) -> torch.Tensor:
        """All raw vectors, float32 `[count, embedding_dim]`, in row order: the store's own tensor, to be read only."""
        return self._vectors[check_kind(kind)].all()

    def check_space(self, kind: str, space_id: str, who: str) -> None:
        """Makes sure that the store belongs to the MQ-Tokenizer that somebody else uses; one not tied yet passes.

        Args:
            kind: `"user"` or `"item"`.
            space_id: the hash of the MQ-Tokenizer that the other side uses.
            who: the other side, for the message, for example `"the tokenizer"`.

        Raises:
            ValueError: the two hashes differ.
        """
        own = self.space_ids[check_kind(kind)]
        if own not in (None, space_id):
            raise ValueError(
                f"the {kind} vectors of the store belong to MQ-Tokenizer {own} but {who} was made with {space_id}; "
                "load store and tokenizer of the same repository, or make the codes again from this store."
            )

    # ---- seen items

    @_locked
    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Replaces what users have already interacted with.

        Args:
            user_ids: n users of the store; of a user who is given twice the last list counts.
            item_ids_per_user: for each user, ids of items of the store, oldest first; an item may come up again.

        Raises:
            ValueError: a user or an item is not in the store, or the lengths differ. Nothing was changed then.
        """
        self._seen.replace(*self._checked_seen(user_ids, item_ids_per_user))
        self._record("set_seen", [list(user_ids), [list(one) for one in item_ids_per_user]])

    @_locked
    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Appends to what users have already interacted with; arguments and errors of [`~EmbeddingStore.set_seen`]."""
        self._seen.add(*self._checked_seen(user_ids, item_ids_per_user))
        self._record("add_seen", [list(user_ids), [list(one) for one in item_ids_per_user]])

    @_locked
    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """The ids of the items that each user has interacted with, oldest first; an empty list for an unknown user."""
        indptr, items = self._seen.of(self.rows("user", user_ids))
        names = self._index["item"].ids(items)
        return [names[start:end] for start, end in zip(indptr.tolist(), indptr[1:].tolist())]

    # ---- what is known about items

    @_locked
    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Records what is known about items, to filter a search by; names that are not given stay as they are.

        Args:
            item_ids: n items of the store.
            metadata: for each item values by name, `{"category": "jazz", "in_stock": True}`: strings, booleans or finite
                numbers; `None` takes a name away. Names are made of letters, digits and underscores, 64 at most.

        Raises:
            ValueError: an item is not in the store, or a name or a value is not as said. Nothing was changed then.
        """
        checked = check_metadata(metadata)
        if len(checked) != len(item_ids):
            raise ValueError(f"there is metadata for {len(checked)} items but {len(item_ids)} ids; pass one for each.")
        rows = self._rows_of("item", item_ids, "the metadata")
        self._metadata.set(rows, checked)
        self._record("set_metadata", [list(item_ids), checked])

    @_locked
    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What is known about each item, values by name.

        Raises:
            ValueError: an item is not in the store.
        """
        return self._metadata.get(self._rows_of("item", item_ids, "the metadata"))

    def withdraw(self, item_ids: Sequence[str]) -> None:
        """Withdraws items for good: no search returns them any more, while histories may go on to name them.

        What is recorded is `"withdrawn": True` in their metadata; new vectors and interactions do not change it.

        Raises:
            ValueError: an item is not in the store.
        """
        self.set_metadata(item_ids, [{WITHDRAWN: True}] * len(item_ids))

    # ---- search

    @_locked
    def search(
        self,
        queries: torch.Tensor | np.ndarray,
        top_k: int,
        exclude: Sequence[Sequence[str]] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """The items of highest cosine with each query, best first (Eq. 19).

        Args:
            queries: `[B, embedding_dim]`; need not be normalised.
            top_k: how many items to return for each query; fewer come back only where fewer remain.
            exclude: for each query, ids of items that must not be returned; ids that are not in the store are ignored.
            where: only items whose metadata has these values: `{"category": ["jazz", "folk"], "in_stock": True}` stands
                for either category and in stock. An item without the name is left out.

        Returns:
            For each query, item ids and their cosines. Items of equal score come in row order; a zero vector scores 0.

        Raises:
            ValueError: `queries` has the wrong shape or holds NaN or an infinity, `top_k` is below 1, `exclude` has not
                one list for each query, or `where` has a wrong name or value.
        """
        unit = unit_rows(check_queries(self.embedding_dim, queries, top_k))
        lengths = np.zeros(len(unit), dtype=np.int64)
        items = np.empty(0, dtype=np.int64)
        if exclude is not None:
            lengths = list_lengths(exclude, len(unit), "exclude", "query")
            items = self._index["item"].rows(list(chain.from_iterable(exclude)))
        allowed = self._metadata.allowed(check_where(where or {}))
        # Beyond the number of items there is only padding.
        top_k = min(top_k, max(self.count("item"), 1))
        if self._approximate is not None and allowed is None and len(unit) and self.count("item"):
            rows, scores = self._nearly(unit, top_k, lengths, items)
        else:
            rows, scores = self._exactly(unit, top_k, lengths, items, allowed)
        names = iter(self._index["item"].ids(np.concatenate([np.empty(0, dtype=np.int64), *rows])))
        return [[next(names) for _ in found] for found in rows], [own.tolist() for own in scores]

    @_locked
    def use_index(self, kind: str | None, effort: int | None = None) -> None:
        """Searches approximately from now on, by FAISS; the index is not saved.

        It is built when it is first needed. What changes later is found at once, a search with a filter and one of withdrawn
        items is exact, and so is the search of a query for which the index has not found `top_k` items. The T5 pass takes 10
        to 100 times as long as an exact search among a million items in batches, so measure before you use this.

        Args:
            kind: `"ivf"` or `"hnsw"`; `None` searches exactly again.
            effort: lists looked into (`ivf`, by default 64) or candidates kept (`hnsw`, 128); more misses less.

        Raises:
            ImportError: FAISS is not installed (`pip install "tokenrec-hf[faiss]"`).
            ValueError: an unknown kind.
        """
        changed = _extra("faiss").ApproximateIndex(kind, effort, self.count("item")) if kind is not None else None
        if changed is not None and self._approximate is not None and self._approximate.kind == kind:
            self._approximate.effort = changed.effort
        else:
            self._approximate = changed

    def _exactly(self, unit, top_k, lengths, items, allowed) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows and cosines for unit queries `[B, d]`; `items` are the excluded rows, `lengths` of them for each query."""
        rows, scores = exact_search(
            unit,
            self._vectors["item"].chunks(),
            top_k,
            torch.from_numpy(np.repeat(np.arange(len(unit)), lengths)),
            torch.from_numpy(items),
            None if allowed is None else torch.from_numpy(allowed),
        )
        found = (rows >= 0).sum(dim=1).tolist()
        return (
            [row[:count] for row, count in zip(rows.numpy(), found)],
            [row[:count] for row, count in zip(scores.numpy(), found)],
        )

    def _nearly(self, unit, top_k, lengths, items) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As `_exactly`, by the approximate index, and exactly where that has found too few."""
        excluded = np.split(items, np.cumsum(lengths)[:-1])
        rows, scores = self._approximate.search(unit, self._vectors["item"], top_k, excluded)
        for at, found in enumerate(rows):
            if len(found) < top_k:
                [rows[at]], [scores[at]] = self._exactly(
                    unit[at : at + 1], top_k, lengths[at : at + 1], excluded[at], None
                )
        return rows, scores

    # ---- checks

    def _checked_seen(
        self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """User rows `[n]`, lengths of the lists `[n]` and the item rows of all lists one after the other."""
        lengths = list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        users = self._rows_of("user", user_ids, "the seen items")
        return users, lengths, self._rows_of("item", list(chain.from_iterable(item_ids_per_user)), "the seen items")

    def _rows_of(self, kind: str, ids: Sequence[str], what: str) -> np.ndarray:
        """The row of each id, or a ValueError that names the first that is not in the store."""
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            name = ids[int(np.argmax(rows < 0))]
            raise ValueError(f"{kind} {name!r} of {what} is not in the store; add it first with upsert({kind!r}, ...).")
        return rows

    # ---- files

    def _record(self, method: str, arguments: list[Any], vectors: torch.Tensor | None = None) -> None:
        """Notes a change for the next save, unless the next save writes everything anyway."""
        if self._saved is not None:
            self._changes.append((method, arguments, vectors))
        else:
            self._changes.clear()

    def _manifest_to_extend(self, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest of a folder that holds this store as it was before the changes, if they are few enough to go beside it."""
        if self._saved is None or self._saved[0] != folder or facts["counts"].keys() != set(KINDS):
            return None
        manifest = self._saved[1]
        changed = sum(entry["bytes"] for entry in manifest["changes"])
        changed += sum(vectors.nbytes for _, _, vectors in self._changes if vectors is not None)
        few = len(manifest["changes"]) < MAX_CHANGES and MAX_CHANGED_SHARE * changed <= sum(
            entry["bytes"] for entry in manifest["files"].values()
        )
        same = all(manifest[name] == facts[name] for name in ("embedding_dim", "space_ids"))
        return manifest if few and same and is_current(folder, manifest) else None

    def _arrays(self, kind: str) -> dict[str, np.ndarray]:
        """Everything that the store knows of a kind, by the names in its file."""
        arrays = {f"ids.{name}": array for name, array in self._index[kind].arrays().items()}
        arrays["vectors"] = self._vectors[kind].all().numpy()
        if kind == "user":
            return arrays | {"seen.indptr": self._seen.indptr, "seen.items": self._seen.items}
        return arrays | {f"metadata.{name}": column for name, column in self._metadata.columns.items()}

    @classmethod
    def _load(cls, folder: Path) -> EmbeddingStore:
        manifest, arrays, changes = load_files(folder)
        try:
            store = cls(manifest["embedding_dim"], manifest["space_ids"])
            # Items first: the users' seen items point to their rows.
            for kind in sorted(manifest["counts"]):
                store._fill(kind, arrays[f"{kind}s"], manifest.get("metadata", {}))
            for method, arguments, vectors in chain.from_iterable(map(unpack_changes, changes)):
                getattr(store, method)(*arguments, *([] if vectors is None else [vectors]))
            for kind, count in manifest["counts"].items():
                if store.count(kind) != count:
                    raise ValueError(f"there are no {count} {kind}s with an id and a vector each.")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"it does not fit its files: {error}") from error
        if store.space_ids.keys() == manifest["counts"].keys():
            store._saved = folder.resolve(), manifest
        return store

    def _fill(self, kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Sequence[Any]]) -> None:
        """Takes over what `_arrays` gave, after checking that it fits together."""
        vectors = torch.from_numpy(arrays["vectors"])
        index = IdIndex.from_arrays({key[4:]: array for key, array in arrays.items() if key.startswith("ids.")})
        if vectors.dtype != torch.float32 or vectors.shape != (len(index), self.embedding_dim):
            raise ValueError(
                f"there are no {len(index)} float32 {kind} vectors of {self.embedding_dim} dimensions with an id each."
            )
        self._index[check_kind(kind)], self._vectors[kind] = index, VectorTable(vectors)
        if kind == "user":
            self._seen = SeenItems(arrays["seen.indptr"], arrays["seen.items"])
            if self._seen.num_users != len(index) or self._seen.items.max(initial=-1) >= self.count("item"):
                raise ValueError("the seen items do not fit the users and items.")
        else:
            columns = {key[9:]: array for key, array in arrays.items() if key.startswith("metadata.")}
            self._metadata = ItemMetadata(len(index), columns, metadata)
