"""The installed `tokenrec` command as a user runs it: processes, files and exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tokenrec_hf.cli.app import main

TOKENREC = Path(sys.executable).with_name("tokenrec.exe" if os.name == "nt" else "tokenrec")

CONFIG = {
    "collaborative": {
        "config": {"embedding_dim": 8, "num_layers": 2},
        "training": {"num_train_epochs": 10, "per_device_train_batch_size": 256},
    },
    "mq_tokenizer": {
        "config": {"num_codebooks": 2, "codebook_size": 8, "codebook_dim": 8, "hidden_dim": 16},
        "evaluate_every": 50,
        "training": {"max_steps": 50},
    },
    "retrieval": {
        "config": {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1, "projection_dim": 16},
        "evaluate_every": 0.34,  # after every step
        "patience": 100,
        "training": {"num_train_epochs": 8, "per_device_train_batch_size": 16, "warmup_steps": 5},
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with a table of 48 users and 24 items in two tastes, and a config.yaml."""
    folder = tmp_path_factory.mktemp("work")
    rows = [
        f"{user:02d},{(2 * ((user // 2 + 5 * step) % 12) + user % 2):02d},{step}"
        for user in range(48)
        for step in range(7)
    ]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def command(*argv, python_module=False):
    start = [sys.executable, "-m", "tokenrec_hf.cli.app"] if python_module else [str(TOKENREC)]
    return [*start, *map(str, argv)]


def run(work, *argv, **kwargs):
    return subprocess.run(command(*argv, **kwargs), cwd=work, capture_output=True, text=True)


def train(out, *argv):
    return ("train", "--dataset", "interactions.csv", "--config", "config.yaml", "--output-dir", out, *argv)


def assert_one_line(out, err, says):
    """The last line says what failed, after the notes on earlier steps."""
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("tokenrec: error: ") and says in err.splitlines()[-1]


def numbers(folder):
    """What was measured, without the time it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics


@pytest.fixture(scope="module")
def trained(work):
    finished = run(work, *train("out", "--json"))
    assert finished.returncode == 0, finished.stderr
    assert "missing keys" not in finished.stderr
    recorded = json.loads((work / "out" / "metrics.json").read_text())
    assert json.loads(finished.stdout) == {"repository": "out", **recorded}
    return work / "out"


def test_a_second_identical_train_repeats_nothing(work, trained):
    stages = ("training/selection.json", "training/refit.json", "model.safetensors", "store/store.json")
    before = {name: (trained / name).stat().st_mtime_ns for name in stages}
    finished = run(work, *train("out"), python_module=True)
    assert finished.returncode == 0, finished.stderr
    assert {name: (trained / name).stat().st_mtime_ns for name in stages} == before
    assert finished.stderr.count("is finished already") == 2
    # Nor is there any noise of the libraries.
    assert "arning" not in finished.stderr and "Loading weights" not in finished.stderr


def test_a_fresh_process_with_auto_classes_recommends_the_same_bit_for_bit(work, trained):
    argv = ("recommend", "out", "--user", "03", "--history", "01", "11", "--top-k", "7", "--json")
    finished = run(work, *argv)
    assert finished.returncode == 0, finished.stderr
    script = """
import json
import tokenrec_hf
from transformers import AutoModel, AutoTokenizer
from tokenrec_hf import EmbeddingStore, Recommender
model, tokenizer = AutoModel.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
recommender = Recommender(model, tokenizer, EmbeddingStore.open("out"))
print(json.dumps(recommender.recommend(["03"], [["01", "11"]], top_k=7)[0]))
"""
    fresh = subprocess.run([sys.executable, "-c", script], cwd=work, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    shown = json.loads(finished.stdout)["recommendations"]
    assert [{"item": row["item"], "score": row["score"]} for row in shown] == json.loads(fresh.stdout)
    assert len(shown) == 7 and not {"01", "11"} & {row["item"] for row in shown}


def test_evaluate_and_info_give_what_was_recorded(work, trained, monkeypatch, capsys):
    recorded = json.loads((trained / "metrics.json").read_text())
    monkeypatch.chdir(work)
    assert main(["evaluate", "out", "--json"]) == 0
    for name, values in json.loads(capsys.readouterr().out)["metrics"].items():
        assert values == pytest.approx(recorded["test"][name], abs=1e-6)
    info = json.loads(run(work, "info", "out", "--json").stdout)
    assert (info["test"], info["counts"]) == (recorded["test"], {"user": 48, "item": 24})


def test_a_changed_setting_in_the_same_folder_is_refused(work, trained, monkeypatch, capsys):
    monkeypatch.chdir(work)
    assert main(list(train("out", "--learning_rate", "0.1"))) == 1
    assert_one_line(*capsys.readouterr(), says="retrieval.training.learning_rate")


def test_a_half_written_folder_says_how_to_continue(work, trained, monkeypatch, capsys):
    half = shutil.copytree(trained, work / "half")
    for name in ("metrics.json", "config.json"):
        (half / name).unlink()
    monkeypatch.chdir(work)
    assert main(["recommend", "half", "--user", "03"]) == 1
    assert_one_line(*capsys.readouterr(), says="run the same `tokenrec train` again to continue")


def test_a_backbone_that_cannot_be_fetched_is_named(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    assert main(list(train("none", "--retrieval.backbone", "nobody/no-such-t5"))) == 1
    assert_one_line(*capsys.readouterr(), says="'nobody/no-such-t5'")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_killed_while_a_checkpoint_is_written_ends_like_an_uninterrupted_one(work, trained):
    out = work / "killed"
    checkpoints = out / "training" / "checkpoints" / "selection" / "retrieval"
    process = subprocess.Popen(
        command(*train(out.name)), cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (out / "metrics.json").exists()
    assert list(checkpoints.glob("checkpoint-*"))
    resumed = run(work, *train(out.name))
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(out) == numbers(trained)
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
