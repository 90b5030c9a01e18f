"""Measures speed and size of a code table of ten million ids, in one run of this machine.

    python examples/benchmarks/code_table.py [--ids 10000000]

Ids look like Amazon's (ten characters), each has three codes of 256. Making the table takes a minute and happens in a process of
its own, so that its memory is not that of the measurement. Ten million ids take about 4 GB of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from tokenrec_hf.models.codes import CodeTable, IdIndex, load_tables, save_tables

CODEBOOKS, CODEBOOK_SIZE, ASKED = 3, 256, 100_000
Result = TypeVar("Result")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ids", type=int, default=10_000_000)
    count = parser.parse_args().ids
    print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "codes.safetensors")
        process = multiprocessing.get_context("spawn").Process(target=make, args=(path, count))
        process.start()
        process.join()
        measure(path, count)


def make(path: str, count: int) -> None:
    """Writes a table of `count` ids."""
    codes = np.random.default_rng(0).integers(CODEBOOK_SIZE, size=(count, CODEBOOKS))
    index = timed(f"making {count} ids", lambda: IdIndex(map(name, range(count))))
    table = CodeTable("item", index, codes, CODEBOOK_SIZE)
    timed("save", lambda: save_tables({"item": table}, path))
    print(f"  on disk                         {Path(path).stat().st_size / count:10.1f} bytes an id")


def name(row: int) -> str:
    """The id of a row."""
    return f"B{row:09d}"


def measure(path: str, count: int) -> None:
    """Loads the table, looks up random and unknown ids, and gives a thousand new ids codes."""
    before = peak()
    table = timed("load", lambda: load_tables(path, {"item": [CODEBOOKS, CODEBOOK_SIZE]})["item"])
    rows = np.random.default_rng(1).integers(count, size=ASKED)
    ids = [name(row) for row in rows]
    timed("first look-up", lambda: table.rows(ids[:1]))
    found = timed(f"codes of {ASKED} random ids", lambda: table.codes[table.rows(ids)])
    assert (found == table.codes[rows]).all()
    unknown = timed(f"look-up of {ASKED} unknown ids", lambda: table.index.rows([f"x{row}" for row in rows]))
    assert (unknown < 0).all()
    print(f"  most memory so far              {(peak() - before) / count:10.1f} bytes an id")
    codes = np.zeros((1_000, CODEBOOKS), dtype=np.int64)
    timed("codes for 1,000 new ids", lambda: table.updated([f"new-{row}" for row in range(1_000)], codes))


def timed(what: str, run: Callable[[], Result]) -> Result:
    """Runs a function and prints its time, and the CPU time, which other processes disturb less."""
    started = time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"  {what:32}{wall:10.2f} s {cpu:8.2f} s of CPU", flush=True)
    return result


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
