"""The scripts that measure cold-start users and items run on the demo data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "paper"
SCRIPT = FOLDER / "unseen_users.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["users", "items"])
def test_unseen_users_and_items_are_served(kind, tmp_path):
    command = [sys.executable, str(SCRIPT), "--dataset", "demo", "--recipe", "quickstart", "--no-refit"]
    run = subprocess.run(
        [*command, "--kind", kind, "--output_dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "unseen.json").read_text())
    assert results["added"][kind] == {"users": 50, "items": 15}[kind]
    groups = results["metrics"]["added"]
    assert groups["unseen"]["users"] + groups["seen"]["users"] == 1000
    # Of 300 items, 20 at random would hold the target of 7 % of the users.
    assert groups["seen"]["hr@20"] > 0.14
    assert groups["unseen"]["hr@20"] > 0
    assert "unseen" in run.stdout


def test_new_items_are_ranked_nearly_as_if_they_had_been_trained(fism_repository):
    command = [sys.executable, str(FOLDER / "new_items.py"), "--repository", str(fism_repository)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if " / " in line and "HR" not in line]
    found = {line[:22].strip(): [float(one) for one in line[22:].replace("/", " ").split()] for line in lines}
    assert list(found) == ["as trained", "not there", "propagated", "folded in"]
    overall = {name: numbers[1] for name, numbers in found.items()}
    assert found["not there"][3] < 0.05
    assert overall["folded in"] > overall["not there"]
    assert overall["folded in"] > 0.7 * overall["as trained"]


def test_new_items_asks_for_fism(trained_repository):
    command = [sys.executable, str(FOLDER / "new_items.py"), "--repository", str(trained_repository)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "has no FISM; train it with --recipe best" in run.stderr
