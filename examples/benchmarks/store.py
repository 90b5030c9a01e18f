"""Measures a store of a million items, side by side with FAISS and with the bare matrix product, in one run of this machine.

    python examples/benchmarks/store.py [--items 1000000] [--indexes ivf hnsw] [--repository out]

Vectors are random with a spectrum that falls like that of collaborative vectors. `--indexes` also builds approximate indexes over
all items, which takes minutes, and `--repository` measures them on the items of a trained repository. OMP_NUM_THREADS sets the
number of threads of both libraries. Times are those of the fastest of three runs; changes of the store run once.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenrec_hf import EmbeddingStore, FaissStore

DIM, QUERIES, TOP_K, ADDED, CHUNK = 64, 256, 20, 1_000, 16_384
SETTINGS = {"ivf": ("nprobe", (8, 32, 64, 128)), "hnsw": ("ef_search", (64, 128, 256))}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--indexes", nargs="*", choices=list(SETTINGS), default=[], help="approximate indexes to build")
    parser.add_argument("--repository", help="a trained repository, on whose items the approximate indexes are tried")
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"\n{arguments.items} x {DIM} ({arguments.items * DIM * 4 / 2**20:.0f} MB of vectors)")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that its memory is not that of the measurement.
        in_a_process(save, folder, arguments.items)
        in_a_process(add, folder)
        store = search(folder, arguments.items)
        approximate(store, vectors(QUERIES, 1), arguments.indexes)
    if arguments.repository:
        store = EmbeddingStore.open(arguments.repository)
        print(
            f"\nItems of {arguments.repository}: {store.count('item')} x {store.embedding_dim}, its users are queries"
        )
        approximate(store, store.vectors("user")[:QUERIES], list(SETTINGS))


def save(folder: str, count: int) -> None:
    """Makes the store and writes it."""
    store = EmbeddingStore(DIM)
    ids, matrix = [f"item-{row}" for row in range(count)], vectors(count, 0)
    timed("upsert of all into an empty store", lambda: store.upsert("item", ids, matrix), repeats=1)
    timed("save", lambda: store.save_pretrained(folder))


def add(folder: str) -> None:
    """What adding new items to a repository costs its store."""
    ids, matrix = [f"new-{row}" for row in range(ADDED)], vectors(ADDED, 2)

    def run() -> None:
        store = EmbeddingStore.open(folder)
        store.upsert("item", ids, matrix)
        store.save_pretrained(folder)

    timed(f"open, upsert of {ADDED:,} and save", run)


def search(folder: str, count: int) -> EmbeddingStore:
    """Opens and searches the store, also by hand and by FAISS, and changes it in memory."""
    size, before = count * DIM * 4 / 2**20, peak()
    queries = vectors(QUERIES, 1)
    timed("open", lambda: EmbeddingStore.open(folder))
    store = EmbeddingStore.open(folder)
    ours = timed(f"search of {QUERIES}, top {TOP_K}", lambda: store.search(queries, TOP_K))
    timed(f"search of 1, top {TOP_K}", lambda: store.search(queries[:1], TOP_K))
    print(f"  most memory so far                 {(peak() - before) / size:8.2f} x the vectors")
    ids, changes = [f"item-{row}" for row in range(ADDED)], vectors(ADDED, 3)
    timed(f"upsert of {ADDED:,} that are present", lambda: store.upsert("item", ids, changes))
    timed(f"upsert of {ADDED:,} new ones", lambda: store.upsert("item", [f"x{one}" for one in ids], changes), repeats=1)
    timed(f"delete of {ADDED:,}", lambda: store.delete("item", [f"x{one}" for one in ids]), repeats=1)
    print(f"  most memory so far                 {(peak() - before) / size:8.2f} x the vectors")

    import faiss

    unit = torch.nn.functional.normalize(store.vectors("item"))
    unit_queries = torch.nn.functional.normalize(queries)

    def bare() -> Any:
        found = [(unit_queries @ chunk.T).topk(TOP_K, dim=1) for chunk in unit.split(CHUNK)]
        return torch.cat([one.values for one in found], dim=1).topk(TOP_K, dim=1)

    by_hand = timed("bare product in chunks with top-k", bare)
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit.numpy())
    by_faiss = timed("FAISS IndexFlatIP", lambda: flat.search(unit_queries.numpy(), TOP_K))
    print(f"  bare product / ours                {by_hand / ours:8.2f} x")
    print(f"  FAISS IndexFlatIP / ours           {by_faiss / ours:8.2f} x")
    return store


def approximate(store: EmbeddingStore, queries: torch.Tensor, indexes: Sequence[str]) -> None:
    """Recall and speed of approximate indexes against exact search."""
    expected, _ = store.search(queries, TOP_K)
    for index in indexes:
        exact = timed("exact", lambda: store.search(queries, TOP_K))
        parameter, values = SETTINGS[index]
        indexed = FaissStore(store, index)
        started = time.perf_counter()
        indexed.search(queries[:1], TOP_K)
        print(f"  {index}: built in {time.perf_counter() - started:.1f} s")
        for value in values:
            setattr(indexed, parameter, value)
            found, _ = indexed.search(queries, TOP_K)
            recall = sum(len(set(a) & set(b)) for a, b in zip(found, expected)) / sum(map(len, expected))
            own = timed(
                f"{index}, {parameter} {value}, recall {recall:.3f}", functools.partial(indexed.search, queries, TOP_K)
            )
            print(f"  exact / {index}                        {exact / own:8.2f} x")


def vectors(count: int, seed: int) -> torch.Tensor:
    """Random vectors `[count, DIM]` with a falling spectrum."""
    spectrum = torch.arange(1.0, DIM + 1).rsqrt()
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * spectrum


def timed(name: str, run: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of some runs, in seconds; also prints the CPU time of its threads, which other processes disturb less."""
    best = (float("inf"), 0.0)
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        run()
        best = min(best, (time.perf_counter() - started[0], time.process_time() - started[1]))
    print(f"  {name:34} {best[0]:8.3f} s {best[1]:8.3f} s of CPU", flush=True)
    return best[0]


def in_a_process(run: Callable[..., None], *arguments: Any) -> None:
    """Runs a function in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
