"""How fast and how large a code table of ten million ids is, in one run of this machine.

    python examples/benchmarks/code_table.py [--ids 10000000]

Ids look like Amazon's (ten characters), each has three codes of 256. Making the table takes a minute or two and happens in a
process of its own, so that its memory is not that of the measurement.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokenrec_hf.models.codes import CodeTable, IdIndex, load_tables, save_tables

CODEBOOKS, CODEBOOK_SIZE, ASKED = 3, 256, 100_000


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
    started = time.perf_counter()
    index = IdIndex(map(name, range(count)))
    codes = np.random.default_rng(0).integers(CODEBOOK_SIZE, size=(count, CODEBOOKS))
    save_tables({"item": CodeTable("item", index, codes, CODEBOOK_SIZE)}, path)
    print(
        f"  making {count} ids {time.perf_counter() - started:10.1f} s, {Path(path).stat().st_size / count:.1f} bytes an id on disk"
    )


def name(row: int) -> str:
    """The id of a row."""
    return f"B{row:09d}"


def measure(path: str, count: int) -> None:
    """Loads the table, asks for random ids and for strangers, and gives a thousand newcomers codes."""
    before = peak()
    started = time.perf_counter()
    table = load_tables(path, {"item": [CODEBOOKS, CODEBOOK_SIZE]})["item"]
    print(f"  load                       {time.perf_counter() - started:10.2f} s")
    generator = np.random.default_rng(1)
    rows = generator.integers(count, size=ASKED)
    ids = [name(row) for row in rows]
    started = time.perf_counter()
    found = table.codes[table.rows(ids)]
    print(f"  codes of {ASKED} random ids {time.perf_counter() - started:8.2f} s")
    assert (found == table.codes[rows]).all()
    started = time.perf_counter()
    assert not (table.index.rows([f"stranger-{row}" for row in rows]) >= 0).any()
    print(f"  {ASKED} ids that are not in it {time.perf_counter() - started:5.2f} s")
    held = table.codes.nbytes + sum(array.nbytes for array in table.index.arrays().values())
    print(f"  memory                     {held / count:10.1f} bytes an id, at most {(peak() - before) / count:.1f}")
    started = time.perf_counter()
    table.updated([f"new-{row}" for row in range(1_000)], np.zeros((1_000, CODEBOOKS), dtype=np.int64))
    print(f"  1,000 newcomers            {time.perf_counter() - started:10.2f} s")


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
