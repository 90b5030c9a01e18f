import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "paper" / "unseen_users.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["users", "items"])
def test_unseen_users_and_items_are_served(kind, tmp_path):
    command = [sys.executable, str(SCRIPT), "--dataset", "demo", "--recipe", "quickstart", "--no-refit"]
    run = subprocess.run(
        [*command, "--kind", kind, "--output_dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "unseen.json").read_text())
    assert results["added"][kind] == {"users": 20, "items": 15}[kind]
    groups = results["metrics"]["added"]
    assert groups["unseen"]["users"] + groups["seen"]["users"] == 400
    # Of 300 items, 20 at random would hold the target of 7 % of the users.
    assert groups["seen"]["hr@20"] > 0.14
    assert groups["unseen"]["hr@20"] > 0
    assert "unseen" in run.stdout
