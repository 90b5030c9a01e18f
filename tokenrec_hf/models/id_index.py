"""Identifiers to row numbers, as arrays.

A catalogue may hold ten million ids, so there is no Python dictionary here: the ids are one UTF-8 blob with offsets, found
through a sorted table of 64-bit hashes and compared byte by byte, about 24 bytes an id beside the id itself. Knows nothing
about vectors, codes or models. Used by the embedding store and by the tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

MAX_ID_LENGTH = 256


def check_ids(ids: Iterable[str], kind: str = "id") -> list[str]:
    """Returns `ids` as a list of strings after checking each one.

    Raises:
        ValueError: an id is empty, longer than 256 characters, contains white space, or is not Unicode text.
    """
    checked = [str(one) for one in ids]
    for one in checked:
        # str.split() drops every kind of white space, so a clean id is its own only part.
        clean = one.split() == [one] and (one.isascii() or one == _encoded(one).decode(errors="replace"))
        if not clean or len(one) > MAX_ID_LENGTH:
            problem = (
                "is empty" if not one else "contains white space" if one.split() != [one] else "is not Unicode text"
            )
            if len(one) > MAX_ID_LENGTH:
                problem = f"has {len(one)} characters, more than {MAX_ID_LENGTH}"
            raise ValueError(
                f"{kind} {one[:60]!r} {problem}; ids are strings of 1 to {MAX_ID_LENGTH} characters without white space."
            )
    return checked


def _encoded(one: str) -> bytes:
    # A half of a surrogate pair has no UTF-8; it is passed on as bytes that no valid id has.
    return one.encode(errors="surrogatepass")


def _hashes(encoded: Sequence[bytes]) -> np.ndarray:
    digest = b"".join([blake2b(one, digest_size=8).digest() for one in encoded])
    return np.frombuffer(digest, dtype=np.uint64)


class IdIndex:
    """An ordered set of string ids; the row of an id is its position.

    Args:
        ids: the ids, unique, in row order.

    Raises:
        ValueError: an id is given twice, or is not a valid id.
    """

    def __init__(self, ids: Iterable[str] = (), kind: str = "id"):
        encoded = [one.encode() for one in check_ids(ids, kind)]
        self._blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum([len(one) for one in encoded], dtype=np.int64)]).astype(np.int64)
        hashes = _hashes(encoded)
        self._order = np.argsort(hashes, kind="stable").astype(np.int64)
        self._hashes = hashes[self._order]
        rows = self.rows([one.decode() for one in encoded])
        repeated = np.flatnonzero(rows != np.arange(len(encoded)))
        if len(repeated):
            raise ValueError(f"{kind} {encoded[repeated[0]].decode()!r} is given more than once; ids must be unique.")

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> IdIndex:
        """Rebuilds an index from `arrays()`, without hashing any id again.

        Raises:
            ValueError: the arrays do not fit together.
        """
        index = cls.__new__(cls)
        index._blob, index._offsets = arrays["blob"], arrays["offsets"]
        index._order, index._hashes = arrays["order"], arrays["hashes"]
        count = len(index._offsets) - 1
        if len(index._order) != count or len(index._hashes) != count or index._offsets[-1] != len(index._blob):
            raise ValueError("the id table is damaged: its arrays have different lengths.")
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays that make up the index: `blob`, `offsets`, `order` and `hashes`, for a safetensors file."""
        return {"blob": self._blob, "offsets": self._offsets, "order": self._order, "hashes": self._hashes}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self._bytes(range(len(self))[row]).decode()

    def __contains__(self, one: str) -> bool:
        return bool(self.rows([one])[0] >= 0)

    def _bytes(self, row: int) -> bytes:
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes()

    def ids(self, rows: np.ndarray | Sequence[int] | None = None) -> list[str]:
        """The ids at `rows`, in that order (all of them by default)."""
        if rows is None:
            blob, offsets = self._blob.tobytes(), self._offsets.tolist()
            return [blob[a:b].decode() for a, b in zip(offsets, offsets[1:])]
        return [self._bytes(row).decode() for row in np.asarray(rows, dtype=np.int64)]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id as int64 `[len(ids)]`; -1 where the id is not in the index."""
        encoded = [_encoded(str(one)) for one in ids]
        found = np.full(len(encoded), -1, dtype=np.int64)
        if not len(self) or not encoded:
            return found
        hashes = _hashes(encoded)
        position = np.searchsorted(self._hashes, hashes)
        for i in np.flatnonzero(self._hashes[np.minimum(position, len(self) - 1)] == hashes):
            at = int(position[i])
            # Two ids may share a hash: walk the (nearly always single) run of equal hashes.
            while at < len(self) and self._hashes[at] == hashes[i]:
                if self._bytes(self._order[at]) == encoded[i]:
                    found[i] = self._order[at]
                    break
                at += 1
        return found

    def extended(self, ids: Sequence[str], kind: str = "id") -> IdIndex:
        """A new index with `ids`, none of which may be present, appended in order."""
        new = IdIndex(ids, kind)
        present = self.rows(ids)
        if (present >= 0).any():
            raise ValueError(f"{kind} {ids[int(np.argmax(present >= 0))]!r} is already present.")
        index = IdIndex.__new__(IdIndex)
        index._blob = np.concatenate([self._blob, new._blob])
        index._offsets = np.concatenate([self._offsets, new._offsets[1:] + self._offsets[-1]])
        # Both are sorted, so one is put into the other: no sorting of millions for a handful.
        places = np.searchsorted(self._hashes, new._hashes, side="right")
        index._hashes = np.insert(self._hashes, places, new._hashes)
        index._order = np.insert(self._order, places, new._order + len(self))
        return index

    def kept(self, keep: np.ndarray) -> IdIndex:
        """A new index with the rows where the boolean array `keep` `[n]` is true, in the same order."""
        index = IdIndex.__new__(IdIndex)
        lengths = np.diff(self._offsets)
        index._blob = self._blob[np.repeat(keep, lengths)]
        index._offsets = np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64)
        stays = keep[self._order]
        index._hashes = self._hashes[stays]
        index._order = (np.cumsum(keep) - 1)[self._order[stays]]
        return index


def save_indexes(indexes: Mapping[str, IdIndex], path: str | os.PathLike) -> None:
    """Writes the ids of several kinds into one safetensors file."""
    save_file(
        {f"{kind}.{name}": array for kind, index in indexes.items() for name, array in index.arrays().items()}, path
    )


def load_indexes(path: str | os.PathLike) -> dict[str, IdIndex]:
    """Reads what `save_indexes` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    try:
        for name, array in load_file(path).items():
            parts.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = array
        return {kind: IdIndex.from_arrays(arrays) for kind, arrays in parts.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again.") from error
