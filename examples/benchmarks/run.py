"""The speed of the package, side by side with the usual ways, as one table.

    pip install -c constraints.txt ".[bench,serve]"
    OMP_NUM_THREADS=1 python examples/benchmarks/run.py [--only NAME ...] [--plot docs/images/growth.png] > docs/performance.md

Each benchmark is a module of this folder with a function `rows`, and runs in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import date
from pathlib import Path

from measure import Row

NAMES = (
    "preparation",
    "tokens",
    "training",
    "ranking",
    "recommending",
    "engines",
    "serving",
    "search",
    "store",
    "code_table",
    "growth",
    "ml20m",
    "modules_entered",
)
HEAD = ("what", "ours", "peer", "its time", "ratio", "bar")


def main() -> None:
    """Runs the benchmarks and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="benchmarks to run (default: all)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the rows of `growth`")
    arguments = parser.parse_args()
    print(introduction(), flush=True)
    found = {}
    for name in arguments.only:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            title, notes, rows = pool.submit(run, name).result()
        found[name] = [asdict(row) for row in rows]
        print("\n\n".join([f"\n## {title}", *notes, f"`--only {name}`", table(rows)]), flush=True)
        if name == "growth" and arguments.plot:
            importlib.import_module(name).plot(rows, arguments.plot)
            print(f"\n![Costs by size, with the fitted lines](images/{arguments.plot.name})", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run(name: str) -> tuple[str, list[str], list[Row]]:
    """The first line of a benchmark's docstring, its paragraphs, and its rows."""
    module = importlib.import_module(name)
    # What a benchmark prints is no part of the page.
    with redirect_stdout(sys.stderr):
        title, *notes = module.__doc__.strip().split("\n\n")
        return title.rstrip("."), [textwrap.fill(" ".join(note.split()), 100) for note in notes], module.rows()


def introduction() -> str:
    """How and where the table was made."""
    text = (
        f"Made by `OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python examples/benchmarks/run.py` on "
        f"{date.today()}: {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}. Times are CPU times, "
        "medians over turns in which both sides alternate in one process. A ratio is the peer's time divided by ours, with its "
        "quartiles: above 1, ours is faster. Where no random start makes the results differ, the benchmarks check that both "
        "sides give the same."
    )
    return f"# Performance\n\n{textwrap.fill(text, 100)}"


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows: list[Row]) -> str:
    """A table in Markdown, without the columns that are empty."""
    cells = [row.cells() for row in rows]
    used = [number for number, column in enumerate(zip(*cells)) if any(column)]
    lines = [HEAD, ["---"] * len(HEAD), *cells]
    return "\n".join(f"| {' | '.join(line[number] for number in used)} |" for line in lines)


if __name__ == "__main__":
    main()
