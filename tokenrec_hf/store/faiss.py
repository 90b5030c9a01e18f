"""Approximate nearest neighbours by FAISS, beside a store that goes on changing.

The index is built once; what has changed since is searched exactly and merged, until it is a tenth of the items and the
index is built anew. Worth its loss only where exact search takes a share of the time that matters: see docs/scale_out.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.embedding_store import VectorTable, unit_rows

KINDS = ("ivf", "hnsw")
REBUILD_SHARE = 0.1


class ApproximateIndex:
    """A FAISS index of item vectors by cosine.

    Args:
        kind: `"ivf"` (about 4 * sqrt(n) lists; small, quick to build) or `"hnsw"` (32 links; larger, slow to build, quicker).
        effort: lists looked into (`ivf`, 64 by default) or candidates kept (`hnsw`, 128 by default): more is slower and misses
            less.
        num_items: how many items there are already.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str, effort: int | None = None, num_items: int = 0):
        try:
            import faiss
        except ImportError:
            raise ImportError('an approximate index needs FAISS: pip install "tokenrec-hf[faiss]".') from None
        if kind not in KINDS:
            raise ValueError(f"there is no index {kind!r}; choose {' or '.join(KINDS)}.")
        self._faiss, self.kind, self.effort = faiss, kind, effort or (64 if kind == "ivf" else 128)
        # The present row of each entry of the index, ascending where it is not -1; and which rows an entry covers.
        self._rows = np.empty(0, dtype=np.int64)
        self._covered = np.zeros(num_items, dtype=bool)
        self._index: Any = None

    def added(self, count: int) -> None:
        """Rows were added at the end."""
        self._covered = np.append(self._covered, np.zeros(count, dtype=bool))

    def replaced(self, rows: np.ndarray) -> None:
        """The vectors of some rows were replaced."""
        self._covered[rows] = False
        self._rows[~self._covered[self._rows] & (self._rows >= 0)] = -1

    def kept(self, keep: np.ndarray) -> None:
        """Rows were removed where boolean `keep` `[n]` is false, and those after them moved up."""
        moved = np.where(keep, np.cumsum(keep) - 1, -1)
        self._rows = np.where(self._rows >= 0, moved[self._rows], -1)
        self._covered = self._covered[keep]

    def search(
        self, queries: torch.Tensor, items: VectorTable, top_k: int, excluded: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows and cosines of the items nearest to unit `queries` `[B, d]`, best first, `top_k` of each or fewer.

        Args:
            queries: float32 `[B, d]`, unit rows.
            items: all vectors.
            top_k: how many.
            excluded: for each query the rows that must not be returned.
        """
        if self._index is None or (~self._covered).sum() > REBUILD_SHARE * max(len(items), 1):
            self._build(items)
        fresh = np.flatnonzero(~self._covered)
        limit = min(top_k + max(map(len, excluded), default=0), max(len(self._rows), 1))
        if self.kind == "ivf":
            self._index.nprobe = self.effort
        else:
            self._index.hnsw.efSearch = self.effort
        scores, found = self._index.search(queries.numpy(), limit)
        rows = np.where(found >= 0, self._rows[found], -1)
        if len(fresh):
            vectors = unit_rows(items.take(torch.from_numpy(fresh)))
            scores = np.concatenate([scores, (queries @ vectors.T).numpy()], axis=1)
            rows = np.concatenate([rows, np.broadcast_to(fresh, (len(queries), len(fresh)))], axis=1)
        best_rows, best_scores = [], []
        for own, of_rows, without in zip(scores, rows, excluded):
            allowed = np.flatnonzero((of_rows >= 0) & ~np.isin(of_rows, without))
            order = allowed[np.lexsort((of_rows[allowed], -own[allowed]))][:top_k]
            best_rows.append(of_rows[order])
            best_scores.append(own[order])
        return best_rows, best_scores

    def _build(self, items: VectorTable) -> None:
        faiss, size = self._faiss, items.all().shape[1]
        if self.kind == "ivf":
            lists = max(1, min(round(4 * len(items) ** 0.5), len(items) // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = 0
            sample = np.random.default_rng(0).permutation(len(items))[: 64 * lists]
            index.train(unit_rows(items.take(torch.from_numpy(np.sort(sample)))).numpy())
        else:
            index = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 80
        for vectors, _ in items.chunks():
            index.add(unit_rows(vectors).numpy())
        self._index = index
        self._rows, self._covered = np.arange(len(items)), np.ones(len(items), dtype=bool)
