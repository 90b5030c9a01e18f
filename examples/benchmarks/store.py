"""A store of a million items over its life, and approximate search."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
from measure import Row, compare, once, peak

from tokenrec_hf import EmbeddingStore, FaissStore

ITEMS, DIM, QUERIES, TOP_K, ADDED = 1_000_000, 64, 256, 20, 1_000
NPROBES = (8, 32, 64, 128)


def rows() -> list[Row]:
    """Save, open, change, and search by an index of FAISS."""
    queries, size = vectors(QUERIES, 2), ITEMS * DIM * 4 / 2**30
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, because the most memory of this one is measured.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(make, folder).result()
        before = peak()
        with once(found, "open, with all checks"):
            store = EmbeddingStore.open(folder)
        with once(found, f"search of {QUERIES} queries, top {TOP_K}"):
            store.search(queries, TOP_K)
        found.append(Row("memory, opened and searched", (peak() - before) / size, "x the vectors"))
        ids, matrix = [f"new-{row}" for row in range(ADDED)], vectors(ADDED, 1)
        with once(found, f"upsert of {ADDED:,} new items"):
            store.upsert("item", ids, matrix)
        with once(found, f"upsert of {ADDED:,} that are present"):
            store.upsert("item", ids, matrix)
        with once(found, "save of the changed store"):
            store.save_pretrained(folder)
        with once(found, f"delete of {ADDED:,}"):
            store.delete("item", ids)
        found.append(Row("memory, then changed and saved", (peak() - before) / size, "x the vectors"))
        return found + approximate(store, queries)


def make(folder: str) -> list[Row]:
    """Writes a store of random items."""
    found: list[Row] = []
    store, matrix = EmbeddingStore(DIM), vectors(ITEMS, 0)
    with once(found, f"upsert of {ITEMS:,} into an empty store"):
        store.upsert("item", [f"item-{row}" for row in range(ITEMS)], matrix)
    with once(found, "save"):
        store.save_pretrained(folder)
    return found


def approximate(store: EmbeddingStore, queries: torch.Tensor) -> list[Row]:
    """Recall and speed of an approximate index beside exact search."""
    found: list[Row] = []
    expected, _ = store.search(queries, TOP_K)
    indexed = FaissStore(store, "ivf")
    with once(found, "building an IVF index"):
        indexed.search(queries[:1], TOP_K)
    for nprobe in NPROBES:
        indexed.nprobe = nprobe
        names, _ = indexed.search(queries, TOP_K)
        recall = sum(len(set(a) & set(b)) for a, b in zip(names, expected)) / sum(map(len, expected))
        what = f"{QUERIES} queries, nprobe {nprobe}, recall {recall:.2f}"
        search = functools.partial(indexed.search, queries, TOP_K)
        exact = functools.partial(store.search, queries, TOP_K)
        found.append(compare(what, search, "exact search", exact, turns=3))
    return found


def vectors(count: int, seed: int) -> torch.Tensor:
    """Random vectors `[count, DIM]` with a spectrum that falls like that of collaborative vectors."""
    spectrum = torch.arange(1.0, DIM + 1).rsqrt()
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * spectrum
