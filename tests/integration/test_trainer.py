"""`examples/train_with_trainer.py` as a user runs it: alone, in two processes, interrupted, and with the usual options."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenrec_hf import Recommender, Repository, load_interactions

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_trainer.py"
STEPS = 50  # two epochs of 1,000 users in batches of 40
# A low learning rate, because differences by rounding grow with it.
QUIET = ("--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--learning_rate", "0.0005")

# Runs the script named by its first argument and writes down the negatives that its training prompts get, by epoch and user.
SPY = """
import json, os, runpy, sys
from tokenrec_hf import DataCollatorForGenerativeRetrieval as Collator
drawn, call = {}, Collator.__call__
def spy(self, features):
    batch = call(self, features)
    if "target" not in features[0]:
        for feature, negatives in zip(features, batch["negative_ids"].tolist()):
            drawn[f"{feature['epoch']}-{feature['user']}"] = negatives
    return batch
Collator.__call__ = spy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
with open(f"drawn-{os.environ.get('RANK', '0')}.json", "w") as file:
    json.dump(drawn, file)
"""


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("train_with_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["train_with_trainer"] = module  # where dataclasses look it up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["train_with_trainer"]


def arguments(repository, output, *more):
    return ["--repository", str(repository), "--dataset", "demo", "--output_dir", str(output), *QUIET, *map(str, more)]


def command(repository, output, *more):
    return [sys.executable, str(EXAMPLE), *arguments(repository, output, *more)]


def fifty_steps(batch_size, *more):
    sizes = ("--max_steps", STEPS, "--per_device_train_batch_size", batch_size)
    return (*sizes, "--save_strategy", "no", *more)


def losses(state):
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(found) == STEPS and all(map(math.isfinite, found))
    return found


def assert_equal_but_for_rounding(found, expected):
    """Sums in another order differ in the last bits, which grows from step to step, on some machines faster."""
    assert found[:10] == pytest.approx(expected[:10], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def reference(example, trained_repository, tmp_path_factory):
    """The losses of one process without any option."""
    output = tmp_path_factory.mktemp("reference")
    trainer = example.main(arguments(trained_repository, output, *fifty_steps(16)))
    return losses(vars(trainer.state))


def test_the_store_follows_a_t5_that_reads_histories(example, fism_repository, tmp_path):
    example.main(arguments(fism_repository, tmp_path / "tuned", *fifty_steps(16, "--learning_rate", 0.005)))
    tuned, before = Recommender.from_pretrained(tmp_path / "tuned"), Recommender.from_pretrained(fism_repository)
    items = before.store.ids("item")
    found, dim = tuned.store.vectors("item"), tuned.model.config.embedding_dim
    assert torch.equal(found[:, :dim], before.store.vectors("item")[:, :dim])
    assert not torch.allclose(found, before.store.vectors("item"), atol=1e-2)
    assert torch.allclose(found, tuned.model.item_vectors(found, tuned.tokenizer.item_tokens(items)), atol=1e-6)
    assert len(tuned.recommend(["u001"], top_k=3)[0]) == 3


def test_the_output_does_what_the_repository_did(example, fism_repository, tmp_path, capsys):
    output = tmp_path / "tuned"
    example.main(arguments(fism_repository, output, "--max_steps", 1, "--per_device_train_batch_size", 8))
    tuned, before = Recommender.from_pretrained(output), Recommender.from_pretrained(fism_repository)
    history = before.store.ids("item")[3:6]
    for found, expected in zip(tuned.history_encoder.encode([history]), before.history_encoder.encode([history])):
        assert np.array_equal(found, expected)
    rows = [{"user_id": "late", "item_id": item} for item in [*history, "brand-new"]]
    assert (
        Repository(output).add(interactions=load_interactions([*rows, {"user_id": "u001", "item_id": "brand-new"}]))[
            "items"
        ]
        == 1
    )
    assert Repository(output).info()["retraining_due"] == []
    assert not {"training", "metrics.json"} & {path.name for path in output.iterdir()}
    with pytest.raises(SystemExit):
        example.main(arguments(output, output))
    assert "is the repository" in capsys.readouterr().err


def test_the_example_trains_logs_stops_early_and_writes_the_best_model_as_a_repository(trained_repository, tmp_path):
    pytest.importorskip("tensorboard")
    output = tmp_path / "tuned"
    options = ("--per_device_train_batch_size", 16, "--learning_rate", 0.1, "--num_train_epochs", 9)
    options += ("--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", "--patience", 1)
    options += ("--report_to", "tensorboard")
    finished = subprocess.run(command(trained_repository, output, *options), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "ndcg@20" in finished.stdout
    assert list(output.glob("runs/*/events.out.tfevents.*"))
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["best_global_step"] < state["global_step"] < state["max_steps"]
    best = output / f"checkpoint-{state['best_global_step']}" / "model.safetensors"
    assert (output / "model.safetensors").read_bytes() == best.read_bytes()
    recommended = Recommender.from_pretrained(output).recommend(["u001", "u002"], top_k=3)
    assert [len(items) for items in recommended] == [3, 3]


def test_gradient_accumulation_does_not_change_the_losses(example, trained_repository, reference, tmp_path):
    options = fifty_steps(8, "--gradient_accumulation_steps", 2)
    trainer = example.main(arguments(trained_repository, tmp_path, *options))
    assert_equal_but_for_rounding(losses(vars(trainer.state)), reference)


def test_activation_checkpointing_does_not_change_the_losses(example, trained_repository, reference, tmp_path):
    trainer = example.main(arguments(trained_repository, tmp_path, *fifty_steps(16, "--activation_checkpointing")))
    assert trainer.model.is_activation_checkpointing
    assert_equal_but_for_rounding(losses(vars(trainer.state)), reference)


def test_bf16_trains_as_well(example, trained_repository, reference, tmp_path):
    trainer = example.main(arguments(trained_repository, tmp_path, *fifty_steps(16, "--bf16")))
    found = losses(vars(trainer.state))
    assert found[0] != reference[0] and found[0] == pytest.approx(reference[0], rel=0.01)
    # Rounding grows from step to step; what is learned does not suffer.
    assert sum(found[-10:]) == pytest.approx(sum(reference[-10:]), rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo on loopback")
def test_two_processes_give_the_losses_of_one_and_draw_their_own_negatives(trained_repository, tmp_path):
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    repository = shutil.copytree(trained_repository, tmp_path / "repository")
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | {"loss_type": "cosine_ranking"}))
    states, drawn = {}, {}
    for name, start, batch_size in (("one", [sys.executable], 40), ("two", two, 20)):
        work = tmp_path / name
        work.mkdir()
        options = fifty_steps(batch_size, "--save_strategy", "steps", "--save_steps", STEPS)
        line = [*start, str(spy), str(EXAMPLE), *arguments(repository, work / "out", *options)]
        finished = subprocess.run(
            line, cwd=work, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert finished.returncode == 0, finished.stderr
        states[name] = json.loads((work / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        drawn[name] = [json.loads(path.read_text()) for path in sorted(work.glob("drawn-*.json"))]
    assert_equal_but_for_rounding(losses(states["two"]), losses(states["one"]))
    (whole,), (first, second) = drawn["one"], drawn["two"]
    assert len(whole) == 2000 and {**first, **second} == whole
    # Each process has prompts of its own, in each epoch half of them, with negatives of their own.
    assert len(first) == len(second) == 1000 and not set(first) & set(second)
    assert list(first.values()) != list(second.values())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_killed_in_mid_epoch_and_resumed_ends_with_the_same_bits(example, trained_repository, tmp_path):
    repository = shutil.copytree(trained_repository, tmp_path / "repository")
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.1}))
    # Epochs have 25 steps, so that the 40th is in the middle of the second one.
    options = ("--max_steps", 80, "--save_steps", 10, "--per_device_train_batch_size", 16)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(repository, killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-40").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    # The state is written last: without it, the checkpoint is the one that was being written.
    whole = [int(path.parent.name.split("-")[1]) for path in killed.glob("checkpoint-*/trainer_state.json")]
    last = max(step for step in whole if step % 25)
    assert 25 < last < 80
    example.main(arguments(repository, killed, *options, "--resume_from_checkpoint", killed / f"checkpoint-{last}"))
    straight = tmp_path / "straight"
    example.main(arguments(repository, straight, *options))
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert torch.get_num_threads() == 1  # or the comparison would mean less
