"""Exact search of the top 20, beside FAISS and a matrix product by hand.

"The product alone" has no top 20 and no ids: its ratio is the share of our time that is neither choice nor ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import torch
from measure import Row, compare
from torch.nn import functional as F

from tokenrec_hf import EmbeddingStore

DIM, TOP_K, CHUNK = 64, 20, 16_384


def rows() -> list[Row]:
    """One query at a time, and batches."""
    found = []
    for items in (10_000, 100_000, 1_000_000):
        store, flat = indexes(items)
        for count in (1, 256) if items < 1_000_000 else (1,):
            ours, theirs, by_hand, product = searches(store, flat, count)
            if ours()[0] != [[f"i{row}" for row in found_rows] for found_rows in theirs()[1].tolist()]:
                raise SystemExit("the searches do not agree.")
            what = f"{'a query' if count == 1 else f'{count} queries'} among {items:,} items"
            bar = "≥ 0.83" if count == 1 else "≥ 3"
            found.append(compare(what, ours, "FAISS IndexFlatIP", theirs, bar=bar))
            if count > 1:
                found.append(compare(what, ours, "product and top-k in chunks", by_hand, bar="≥ 0.91"))
            found.append(compare(what, ours, "the product alone", product))
    return found


def indexes(items: int) -> tuple[EmbeddingStore, faiss.IndexFlatIP]:
    """A store and a FAISS index of the same random items."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = torch.randn(items, DIM, generator=torch.Generator().manual_seed(0))
    store, flat = EmbeddingStore(DIM), faiss.IndexFlatIP(DIM)
    store.upsert("item", [f"i{row}" for row in range(items)], vectors)
    flat.add(F.normalize(vectors).numpy())
    return store, flat


def searches(
    store: EmbeddingStore, flat: faiss.IndexFlatIP, count: int
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Three functions that search the same items, and one that only computes the scores."""
    queries = F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(1)))
    parts = F.normalize(store.vectors("item")).split(CHUNK)

    def by_hand() -> Any:
        best = [(queries @ part.T).topk(min(TOP_K, len(part)), dim=1) for part in parts]
        return torch.cat([one.values for one in best], dim=1).topk(TOP_K, dim=1)

    return (
        lambda: store.search(queries, TOP_K),
        lambda: flat.search(queries.numpy(), TOP_K),
        by_hand,
        lambda: [queries @ part.T for part in parts],
    )
