"""How the benchmarks measure: CPU time of one thread, both sides in turns in one process, the median and its spread."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

TURNS, SHORTEST_TURN = 9, 0.05
UNITS = {"s": 1, "ms": 1e-3, "µs": 1e-6}


@dataclass
class Row:
    """A line of the table.

    Args:
        what: what is measured.
        ours: the median, in `unit`.
        unit: of `ours` and `theirs`.
        peer: the other side, if there is one.
        theirs: its median.
        ratio: quartiles of theirs / ours over the turns; above 1, ours is faster.
        bar: what the ratio, or without a peer `ours`, should be.
    """

    what: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    ratio: list[float] | None = None
    bar: str = ""

    def cells(self) -> list[str]:
        """The cells of a Markdown table."""
        ours, theirs = ("" if time is None else f"{_rounded(time)} {self.unit}" for time in (self.ours, self.theirs))
        ratio = "" if self.ratio is None else f"{self.ratio[1]:.2f} ({self.ratio[0]:.2f}-{self.ratio[2]:.2f})"
        return [self.what, ours, self.peer, theirs, ratio, self.bar]


def compare(
    what: str,
    ours: Callable[[], Any],
    peer: str = "",
    theirs: Callable[[], Any] | None = None,
    *,
    amount: int = 1,
    unit: str = "ms",
    bar: str = "",
    turns: int = TURNS,
) -> Row:
    """Times a function, and the peer in turns with it.

    Args:
        what, peer, bar: see [`Row`].
        ours, theirs: do the same work.
        amount: how much they do; times are divided by it.
        unit: a name in `UNITS`.
        turns: how often each side is timed. A turn repeats a short function.
    """
    sides = [ours] if theirs is None else [ours, theirs]
    repeats = [math.ceil(SHORTEST_TURN / max(_seconds(run, 1), 1e-7)) for run in sides]
    times = np.array([[_seconds(run, count) for run, count in zip(sides, repeats)] for _ in range(turns)])
    medians = (np.median(times, axis=0) / amount / UNITS[unit]).tolist()
    if theirs is None:
        return Row(what, medians[0], unit, bar=bar)
    ratio = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75]).tolist()
    return Row(what, medians[0], unit, peer, medians[1], ratio, bar)


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - started) / repeats


@contextmanager
def once(rows: list[Row], what: str, *, amount: int = 1, unit: str = "s", bar: str = "") -> Iterator[None]:
    """Adds a row for what runs only once."""
    started = time.process_time()
    yield
    rows.append(Row(what, (time.process_time() - started) / amount / UNITS[unit], unit, bar=bar))


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
