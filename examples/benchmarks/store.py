"""How fast a store of a million items is, side by side with doing by hand what it does, in one run of this machine.

    python examples/benchmarks/store.py [--items 1000000] [--repository out]

Vectors are random with a spectrum that falls like that of collaborative vectors. With `--repository`, the approximate indexes
are also measured on the items of a trained repository. A few minutes; each time is the fastest of three.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tokenrec_hf import EmbeddingStore

DIM, QUERIES, TOP_K, CHANGED, CHUNK = 64, 256, 20, 10_000, 16_384


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--repository", help="a trained repository, whose items the approximate indexes are tried on")
    parser.add_argument("--hnsw", action="store_true", help="also build HNSW over all items, which takes minutes")
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.items)
        measure(Path(folder), arguments)
    if arguments.repository:
        store = EmbeddingStore.open(arguments.repository)
        print(
            f"\nItems of {arguments.repository}: {store.count('item')} x {store.embedding_dim}, queries are its users"
        )
        approximate(store, store.vectors("user")[:QUERIES], ("ivf", "hnsw"))


def make(folder: Path, count: int) -> None:
    """Writes the store in a process of its own, so that its memory is not that of the measurement."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_make, args=(folder, count))
    process.start()
    process.join()


def _make(folder: Path, count: int) -> None:
    store = EmbeddingStore(DIM)
    store.upsert("item", [f"item-{i}" for i in range(count)], _vectors(count, 0))
    store.save_pretrained(folder)


def _vectors(count: int, seed: int) -> torch.Tensor:
    spectrum = torch.arange(1.0, DIM + 1).rsqrt()
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * spectrum


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Opens, searches, changes and saves the store."""
    size = arguments.items * DIM * 4 / 2**20
    queries = _vectors(QUERIES, 1)
    before = _peak()
    started = time.perf_counter()
    store = EmbeddingStore.open(folder)
    print(f"\n{arguments.items} x {DIM} ({size:.0f} MB of vectors)")
    print(f"  open by memory map                 {time.perf_counter() - started:8.3f} s")
    ours = timed(f"search of {QUERIES}, top {TOP_K}", lambda: store.search(queries, TOP_K))
    timed("search of 1", lambda: store.search(queries[:1], TOP_K))
    ids = [f"item-{i}" for i in range(CHANGED // 2)] + [f"new-{i}" for i in range(CHANGED // 2)]
    changes = _vectors(CHANGED, 2)
    timed(f"upsert of {CHANGED}", lambda: store.upsert("item", ids, changes))
    timed("saving the changes", lambda: store.save_pretrained(folder), repeats=1)
    print(f"  peak memory so far                 {(_peak() - before) / size:8.2f} x the vectors")
    timed("delete of 1,000", lambda: store.delete("item", ids[:1_000]), repeats=1)

    unit = torch.nn.functional.normalize(store.vectors("item"))
    unit_queries = torch.nn.functional.normalize(queries)

    def bare():
        found = [(unit_queries @ chunk.T).topk(TOP_K, dim=1) for chunk in unit.split(CHUNK)]
        return torch.cat([one.values for one in found], dim=1).topk(TOP_K, dim=1)

    by_hand = timed("bare product in chunks with top-k", bare)
    print(f"  ratio to the bare product          {ours / by_hand:8.2f} x")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit.numpy())
    flat_time = timed("FAISS IndexFlatIP", lambda: flat.search(unit_queries.numpy(), TOP_K))
    print(f"  FAISS exact / ours                 {flat_time / ours:8.2f} x")
    approximate(store, queries, ("ivf", *["hnsw"] * arguments.hnsw))


def approximate(store: EmbeddingStore, queries: torch.Tensor, kinds: tuple[str, ...]) -> None:
    """Recall and speed of the approximate indexes against exact search."""
    store.use_index(None)
    expected, _ = store.search(queries, TOP_K)
    exact = timed("exact", lambda: store.search(queries, TOP_K))
    efforts = {"ivf": (8, 32, 64, 128), "hnsw": (64, 128, 256)}
    for kind in kinds:
        store.use_index(kind)
        started = time.perf_counter()
        store.search(queries[:1], TOP_K)
        print(f"  {kind}: built in {time.perf_counter() - started:.1f} s")
        for effort in efforts[kind]:
            store.use_index(kind, effort)
            store.search(queries[:1], TOP_K)
            found, _ = store.search(queries, TOP_K)
            recall = sum(len(set(a) & set(b)) for a, b in zip(found, expected)) / sum(map(len, expected))
            own = timed(f"{kind}, effort {effort}, recall {recall:.3f}", lambda: store.search(queries, TOP_K))
            print(f"  exact / {kind}                        {exact / own:8.2f} x")
    store.use_index(None)


def timed(name: str, run: Callable, repeats: int = 3) -> float:
    """The fastest of some runs, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    print(f"  {name:34} {best:8.3f} s")
    return best


def _peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
