"""The benchmarks of examples/benchmarks: what is measured, and how it is shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from tokenrec_hf import EmbeddingStore

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of the folder, by name."""
    monkeypatch.syspath_prepend(FOLDER)
    yield __import__
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_ratio_is_the_time_of_the_peer_divided_by_ours(benchmarks, monkeypatch):
    measure, clock = benchmarks("measure"), [0.0]
    monkeypatch.setattr(measure.time, "process_time", lambda: clock[0])

    def takes(seconds):
        def run():
            clock[0] += seconds

        return run

    row = measure.compare("work", takes(0.2), "peer", takes(0.5), amount=100, unit="ms")
    assert (row.ours, row.theirs) == (pytest.approx(2), pytest.approx(5))
    assert row.ratio == pytest.approx([2.5] * 3)
    assert row.cells() == ["work", "2 ms", "peer", "5 ms", "2.50 (2.50-2.50)", ""]


def test_a_table_has_only_the_columns_that_are_used(benchmarks):
    row = benchmarks("measure").Row
    lines = benchmarks("run").table([row("one", 1, "s"), row("two", 0.5, "s", bar="≤ 1 s")]).splitlines()
    assert lines == [
        "| what | ours | bar |",
        "| --- | --- | --- |",
        "| one | 1 s |  |",
        "| two | 0.5 s | ≤ 1 s |",
    ]


def test_every_module_is_a_benchmark_that_can_be_chosen(benchmarks):
    names = benchmarks("run").NAMES
    assert {*names} == {path.stem for path in FOLDER.glob("*.py")} - {"run", "measure"}
    for name in names:
        assert "def rows() -> list[Row]:" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def test_made_up_ratings_are_prepared(benchmarks):
    rows, splits, data = benchmarks("preparation").prepared(3_000)
    assert all(row.ours >= 0 for row in rows)
    assert sum(map(len, splits.values())) == len(data.interactions) + len(data.holdout.users) <= 3_000


def test_a_service_is_loaded_and_a_cold_command_timed(benchmarks, trained_repository, monkeypatch):
    pytest.importorskip("fastapi")
    serving = benchmarks("serving")
    for name, value in {"SECONDS": 0.3, "TURNS": 1, "CLIENTS": (2,), "BATCHES": (3,)}.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving, "IMPORTS", [sys.executable, "-c", ""])
    users = EmbeddingStore.open(trained_repository).ids("user")
    found = {row.what.split(": ")[-1]: row.ours for row in serving.loads(str(trained_repository), users)}
    assert list(found) == ["requests", "p50", "p99", "CPU time"]
    assert found["requests"] >= 1 and 0 < found["p50"] <= found["p99"] and found["CPU time"] > 0
    row = serving.cold(str(trained_repository), users[0])
    assert row.ours > row.theirs > 0


def test_a_benchmark_that_does_not_exist_is_refused():
    command = [sys.executable, str(FOLDER / "run.py"), "--only", "nothing"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "nothing" in found.stderr
