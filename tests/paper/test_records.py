"""Records as JSON lines: whole, sorted, found by their job, and safe with several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import records
from records import Job, Recorded, Records


def record(job, value=0.5):
    return {"job": vars(job), "metrics": {"ndcg@20": value}}


def test_a_record_is_found_by_its_job_and_replaced_by_one_with_the_same_settings(tmp_path):
    kept = Records(tmp_path / "results")
    short, long = (Job("demo", "m", "test", 0, {"a": 1}, epochs) for epochs in (5, 7))
    other = Job("demo", "m", "test", 1, {"a": 1}, 5)
    assert kept.find(short) is None
    kept.put("demo", [record(other), record(short)])
    assert kept.get(short) == record(short)
    assert kept.get(long) is None and kept.find(long) == record(short)
    kept.put("demo", [record(long, 0.7)])
    assert kept.get(short) is None and kept.get(long)["metrics"]["ndcg@20"] == 0.7
    assert kept.get(other) == record(other)


def test_settings_are_compared_by_content_and_not_by_order(tmp_path):
    kept = Records(tmp_path)
    kept.put("demo", [record(Job("demo", "m", "both", 0, {"a": 1, "b": {"c": 2, "d": 3.0}}))])
    assert kept.get(Job("demo", "m", "both", 0, {"b": {"d": 3, "c": 2}, "a": 1}))
    assert kept.get(Job("demo", "m", "both", 0, {"b": {"d": 4, "c": 2}, "a": 1})) is None


def test_lines_are_the_same_in_any_order_of_arrival(tmp_path):
    jobs = [
        Job("demo", model, phase, seed) for model in ("b", "a") for phase in ("validation", "test") for seed in (1, 0)
    ]
    for folder, order in (("one", jobs), ("two", jobs[::-1])):
        for job in order:
            Records(tmp_path / folder).put("demo", [record(job)])
    one, two = ((tmp_path / folder / "demo.jsonl").read_text() for folder in ("one", "two"))
    assert one == two
    found = [json.loads(line)["job"] for line in one.splitlines()]
    assert [(job["model"], job["phase"], job["seed"]) for job in found[:3]] == [
        ("a", "test", 0),
        ("a", "test", 1),
        ("a", "validation", 0),
    ]


def test_processes_do_not_lose_each_others_records(tmp_path):
    program = """
import sys
from pathlib import Path
from records import Job, Records
for seed in range(10):
    Records(Path(sys.argv[1])).put("demo", [{"job": vars(Job("demo", sys.argv[2], "test", seed))}])
"""
    environment_path = str(Path(records.__file__).parent)
    program = f"import sys; sys.path.insert(0, {environment_path!r})" + program
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), model]) for model in ("a", "b", "c")]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = Recorded(tmp_path)
    for model in ("a", "b", "c"):
        assert found.count([Job("demo", model, "test", seed) for seed in range(11)]) == 10


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "demo.jsonl").write_text('{"job": {}}\n{"job": \n')
    with pytest.raises(ValueError, match="line 2 of .*demo.jsonl is not JSON"):
        Records(tmp_path).find(Job("demo", "m", "test"))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    kept = Records(tmp_path)
    kept.put("demo", [record(Job("demo", "m", "test"))])
    before = (tmp_path / "demo.jsonl").read_bytes()
    with pytest.raises(TypeError):
        kept.put("demo", [record(Job("demo", "m", "test"), value=object())])
    assert (tmp_path / "demo.jsonl").read_bytes() == before


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(LookupError, match=r"demo.jsonl has no record of m, test, seed 3; run it first"):
        Recorded(tmp_path)(Job("demo", "m", "test", 3))
