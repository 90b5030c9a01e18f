"""Ids and their codes, as arrays: which codes a user or item has, and which id has given codes.

The codes are the K codewords of Eq. 5-6 of TokenRec (arXiv 2406.10450). They are kept beside the vocabulary, in one
safetensors file, so that the vocabulary stays small for any number of ids. Knows nothing about tokens, text or vectors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .id_index import IdIndex


class CodeTable:
    """The ids of one kind and their codes. Never changed: `updated` makes a new table.

    Args:
        kind: `"user"` or `"item"`.
        index: the `n` ids.
        codes: integers `[n, K]` of values in `[0, L)`.
        codebook_size: L.

    Raises:
        ValueError: the codes are not integers, not as many as the ids, or out of range.
    """

    def __init__(self, kind: str, index: IdIndex, codes: np.ndarray, codebook_size: int):
        if codes.dtype.kind not in "iu" or codes.ndim != 2 or len(codes) != len(index):
            found = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"the {kind} codes are {found} but should be integers [{len(index)}, K]")
        if codes.size and not 0 <= codes.min() <= codes.max() < codebook_size:
            raise ValueError(
                f"{kind} codes go from {codes.min()} to {codes.max()} but should be in [0, {codebook_size})"
            )
        self.kind, self.index, self.codebook_size = kind, index, codebook_size
        self.codes = np.ascontiguousarray(codes, dtype=np.uint16 if codebook_size <= 1 << 16 else np.uint32)
        # The most bytes of an id, and so at least its characters: no longer text can be one.
        self.longest = int(np.diff(index.arrays()["offsets"]).max(initial=0))
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __getstate__(self) -> dict[str, Any]:
        # What `owners` has built is not state: the fingerprint that `datasets` takes of a tokenizer must not change with it.
        return {**self.__dict__, "_sorted": None}

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`.

        Raises:
            KeyError: an id is not in the table.
        """
        if isinstance(ids, str):
            raise ValueError(f"{self.kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
        rows = self.index.rows(ids)
        if (rows < 0).any():
            one = ids[int(np.argmax(rows < 0))]
            raise KeyError(
                f"{self.kind} {one!r} is unknown to this tokenizer; add it with `tokenrec add`, or give it codes with "
                f"add_{self.kind}s."
            )
        return rows

    def owners(self, codes: np.ndarray) -> np.ndarray:
        """The row that has these codes `[m, K]`, int64 `[m]`; -1 where none has, or more than one."""
        if self._sorted is None:
            keys = _keys(self.codes)
            order = np.argsort(keys, kind="stable")
            self._sorted = keys[order], order
        keys, order = self._sorted
        wanted = _keys(codes)
        first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        owners = np.full(len(codes), -1, dtype=np.int64)
        for i in np.flatnonzero(first < last):
            rows = order[first[i] : last[i]]
            rows = rows[(self.codes[rows] == codes[i]).all(axis=1)]
            if len(rows) == 1:
                owners[i] = rows[0]
        return owners

    def updated(self, ids: Sequence[str], codes: np.ndarray) -> CodeTable:
        """A table in which `ids`, each once, have `codes` `[m, K]`: those known instead of their old ones, the others at the end."""
        rows = self.index.rows(ids)
        is_new = rows < 0
        merged = np.concatenate([self.codes, codes[is_new]])
        merged[rows[~is_new]] = codes[~is_new]
        index = self.index.extended([one for one, new in zip(ids, is_new) if new], self.kind)
        return CodeTable(self.kind, index, merged, self.codebook_size)

    def without(self, ids: Sequence[str]) -> CodeTable:
        """A table without `ids`; those that are not in it are ignored."""
        rows = self.index.rows(ids)
        keep = np.ones(len(self), dtype=bool)
        keep[rows[rows >= 0]] = False
        return CodeTable(self.kind, self.index.kept(keep), self.codes[keep], self.codebook_size)


def save_tables(tables: Mapping[str, CodeTable], path: str) -> None:
    """Writes the tables of all kinds into one safetensors file, whole or not at all."""
    arrays = {}
    for kind, table in tables.items():
        arrays[f"{kind}.codes"] = table.codes
        arrays.update({f"{kind}.{name}": np.ascontiguousarray(one) for name, one in table.index.arrays().items()})
    save_file(arrays, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_tables(path: str, codebooks: Mapping[str, Sequence[int]]) -> dict[str, CodeTable]:
    """Reads what `save_tables` wrote.

    Args:
        path: the file.
        codebooks: K and L of each kind.

    Raises:
        ValueError: the file is damaged, or does not fit `codebooks`.
    """
    tables = {}
    try:
        arrays = load_file(path)
        for kind, (num_codebooks, codebook_size) in codebooks.items():
            parts = {name.partition(".")[2]: one for name, one in arrays.items() if name.startswith(f"{kind}.")}
            tables[kind] = CodeTable(kind, IdIndex.from_arrays(parts), parts["codes"], codebook_size)
            if tables[kind].codes.shape[1] != num_codebooks:
                found = tables[kind].codes.shape[1]
                raise ValueError(f"each {kind} has {found} codes but there are {num_codebooks} codebooks")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again, or make the tokenizer again with from_components."
        ) from error
    return tables


def forget_ids(path: str | os.PathLike, kind: str) -> None:
    """Removes all ids of one kind, and their codes, from a file that `save_tables` wrote; the number of codebooks stays."""
    tables = load_file(path)
    tables[f"{kind}.codes"] = tables[f"{kind}.codes"][:0]
    tables.update({f"{kind}.{name}": one for name, one in IdIndex([]).arrays().items()})
    save_file(tables, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def _keys(codes: np.ndarray) -> np.ndarray:
    """One uint64 a row of codes `[n, K]`: the same for equal rows, and nearly always, not surely, another for different ones."""
    keys = np.zeros(len(codes), dtype=np.uint64)
    for column in codes.T:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64)
    return keys
