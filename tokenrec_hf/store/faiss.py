"""Approximate nearest neighbours by FAISS, over an embedded store that goes on changing.

The index is built at the first search. Vectors that changed since are searched exactly and merged, until they are a tenth of the
items and the index is built again. An index misses items, so it pays only where exact search takes a share of the time that
matters: see docs/scale_out.md for measurements.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..models.embedding_store import EmbeddingStore, Lockable, Store, Vectors, check_search
from ..models.functional import ITEM_CHUNK, unit_rows

INDEXES = ("ivf", "hnsw")
REBUILD_SHARE = 0.1


def _of_store(method: Callable[..., Any]) -> Any:
    """A method that calls the same method of the embedded store."""

    @functools.wraps(method)
    def call(self: FaissStore, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.store, method.__name__)(*args, **kwargs)

    return call


class FaissStore(Lockable, Store):
    """An [`EmbeddingStore`] that is searched approximately; all other methods are those of the store.

    Changes of items must go through this object, which would not notice them otherwise; then the next search finds them. The index
    is not saved. A search with a filter is exact, withdrawn and excluded items are never returned, and queries for which the index
    finds fewer than `top_k` items are searched exactly.

    Args:
        store: the store to search.
        index: `"ivf"` (about 4 * sqrt(n) lists; small, quick to build) or `"hnsw"` (32 links; larger, slow to build).
        nprobe: lists that a search of `"ivf"` looks into (default 64): more is slower and misses less.
        ef_search: candidates that a search of `"hnsw"` keeps (default 128): more is slower and misses less.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: an unknown index, or a parameter of the other index.
    """

    def __init__(
        self, store: EmbeddingStore, index: str = "ivf", nprobe: int | None = None, ef_search: int | None = None
    ):
        try:
            import faiss  # noqa: F401
        except ImportError:
            raise ImportError('an approximate index needs FAISS: pip install "tokenrec-hf[faiss]".') from None
        if index not in INDEXES:
            raise ValueError(f"there is no index {index!r}; choose {' or '.join(INDEXES)}.")
        if (ef_search if index == "ivf" else nprobe) is not None:
            raise ValueError(f"nprobe belongs to index 'ivf' and ef_search to 'hnsw', but index is {index!r}.")
        self.store, self.index, self.embedding_dim = store, index, store.embedding_dim
        self.nprobe, self.ef_search = nprobe or 64, ef_search or 128
        self._lock = threading.RLock()
        self._faiss: Any = None
        # The present row of each entry of the index, -1 if it has none any more; and which rows have an entry.
        self._rows = np.empty(0, dtype=np.int64)
        self._covered = np.zeros(store.count("item"), dtype=bool)

    def __repr__(self) -> str:
        return f"FaissStore({self.store!r}, index={self.index!r})"

    def search(
        self,
        queries: Vectors,
        top_k: int,
        exclude: Sequence[Sequence[str]] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """As [`EmbeddingStore.search`], but items may be missed."""
        with self._lock:
            unit, lists, lengths = check_search(self.embedding_dim, queries, top_k, exclude)
            if where or not len(unit) or not self.count("item"):
                return self.store.search(queries, top_k, exclude, where)
            excluded = self.store.rows("item", list(chain.from_iterable(lists)))
            found, scores = self._nearest(unit, top_k, np.split(excluded, np.cumsum(lengths)[:-1]))
            names = self.ids("item")
            ids = [[names[row] for row in rows] for rows in found]
            short = [at for at, rows in enumerate(found) if len(rows) < min(top_k, len(names))]
            if short:
                exact = self.store.search(unit[short], top_k, [lists[at] for at in short])
                for at, of_ids, of_scores in zip(short, *exact):
                    ids[at], scores[at] = of_ids, of_scores
            return ids, scores

    def upsert(self, kind: str, ids: Sequence[str], vectors: Vectors) -> None:
        """As [`EmbeddingStore.upsert`]."""
        with self._lock:
            self.store.upsert(kind, ids, vectors)
            if kind == "item":
                added = self.count("item") - len(self._covered)
                self._covered = np.append(self._covered, np.zeros(added, dtype=bool))
                self._covered[self.store.rows("item", ids)] = False
                entries = np.flatnonzero(self._rows >= 0)
                self._rows[entries[~self._covered[self._rows[entries]]]] = -1

    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """As [`EmbeddingStore.delete`]."""
        with self._lock:
            rows = self.store.rows(kind, ids)
            self.store.delete(kind, ids)
            if kind == "item" and len(self._covered):
                keep = ~np.isin(np.arange(len(self._covered)), rows)
                moved = np.where(keep, np.cumsum(keep) - 1, -1)
                self._rows = np.where(self._rows >= 0, moved[self._rows], -1)
                self._covered = self._covered[keep]

    @property
    def space_ids(self) -> dict[str, str | None]:  # type: ignore[override]
        """The hashes of the MQ-Tokenizers."""
        return self.store.space_ids

    @space_ids.setter
    def space_ids(self, space_ids: dict[str, str | None]) -> None:
        self.store.space_ids = space_ids

    get = _of_store(EmbeddingStore.get)
    contains = _of_store(EmbeddingStore.contains)
    ids = _of_store(EmbeddingStore.ids)
    count = _of_store(EmbeddingStore.count)
    vectors = _of_store(EmbeddingStore.vectors)
    set_seen = _of_store(EmbeddingStore.set_seen)
    add_seen = _of_store(EmbeddingStore.add_seen)
    seen = _of_store(EmbeddingStore.seen)
    popular = _of_store(EmbeddingStore.popular)
    set_metadata = _of_store(EmbeddingStore.set_metadata)
    metadata = _of_store(EmbeddingStore.metadata)
    save_pretrained = _of_store(EmbeddingStore.save_pretrained)
    close = _of_store(EmbeddingStore.close)

    def _nearest(
        self, unit: torch.Tensor, top_k: int, excluded: Sequence[np.ndarray]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Rows and cosines of the items nearest to unit queries `[B, d]`, best first, `top_k` of each or fewer.

        `excluded` holds for each query the rows that must not be returned.
        """
        items, allowed = self.vectors("item"), self.store.allowed()
        if self._faiss is None or (~self._covered).sum() > REBUILD_SHARE * len(items):
            self._build(items)
        if self.index == "ivf":
            self._faiss.nprobe = self.nprobe
        else:
            self._faiss.hnsw.efSearch = self.ef_search
        scores, found = self._faiss.search(unit.numpy(), min(top_k + max(map(len, excluded)), len(self._rows)))
        rows = np.where(found >= 0, self._rows[found], -1)
        changed = np.flatnonzero(~self._covered)
        scores = np.concatenate([scores, (unit @ unit_rows(items[changed]).T).numpy()], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(changed, (len(unit), len(changed)))], axis=1)
        if allowed is not None:
            rows = np.where((rows >= 0) & allowed[rows], rows, -1)
        best_rows, best_scores = [], []
        for own_rows, own_scores, without in zip(rows, scores, excluded):
            left = np.flatnonzero((own_rows >= 0) & ~np.isin(own_rows, without))
            order = left[np.lexsort((own_rows[left], -own_scores[left]))][:top_k]
            best_rows.append(own_rows[order].tolist())
            best_scores.append(own_scores[order].tolist())
        return best_rows, best_scores

    def _build(self, items: torch.Tensor) -> None:
        import faiss

        index: Any
        count, size = items.shape
        if self.index == "ivf":
            lists = max(1, min(round(4 * count**0.5), count // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = 0
            sample = np.random.default_rng(0).permutation(count)[: 64 * lists]
            index.train(unit_rows(items[np.sort(sample)]).numpy())
        else:
            index = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 80
        for chunk in items.split(ITEM_CHUNK):
            index.add(unit_rows(chunk).numpy())
        self._faiss, self._rows, self._covered = index, np.arange(count), np.ones(count, dtype=bool)
