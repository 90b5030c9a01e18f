"""Tests of HR@K and NDCG@K as modules of `evaluate`."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokenrec_hf
from tokenrec_hf.evaluation.metrics import hit_rate, ndcg

evaluate = pytest.importorskip("evaluate")

FOLDER = Path(tokenrec_hf.__file__).parent / "evaluation" / "modules"
MODULES = ("hit_rate_at_k", "ndcg_at_k")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a module from a copy of its folder, which is all that there is of it."""

    def load(name):
        copy = tmp_path / name
        shutil.copytree(FOLDER / name, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return evaluate.load(str(copy), cache_dir=str(tmp_path / "cache"))

    return load


@pytest.fixture(scope="module")
def lists():
    """Lists of 12 of 40 items, and a relevant item that half of them hold."""
    random = np.random.default_rng(0)
    predictions = [random.permutation(40)[:12].tolist() for _ in range(60)]
    references = [int(random.choice(items)) if row % 2 else 99 for row, items in enumerate(predictions)]
    return predictions, references


@pytest.mark.parametrize("ids", [int, "item {}".format], ids=["integers", "strings"])
def test_modules_agree_with_a_loop_and_with_the_package(load, lists, ids):
    predictions, references = lists
    ranks = [items.index(one) if one in items else 1000 for items, one in zip(predictions, references)]
    named = [[ids(item) for item in items] for items in predictions], [ids(one) for one in references]
    hits = load("hit_rate_at_k").compute(predictions=named[0], references=named[1], k=[1, 5, 10])
    gains = load("ndcg_at_k").compute(predictions=named[0], references=named[1], k=[1, 5, 10])
    for k in (1, 5, 10):
        first = [rank for rank in ranks if rank < k]
        assert hits[f"hr@{k}"] == pytest.approx(len(first) / 60) == pytest.approx(hit_rate(np.array(ranks), k))
        expected = sum(1 / math.log2(rank + 2) for rank in first) / 60
        assert gains[f"ndcg@{k}"] == pytest.approx(expected) == pytest.approx(ndcg(np.array(ranks), k))


@pytest.mark.parametrize("name", MODULES)
def test_batches_and_users_one_by_one_give_the_same(load, lists, name):
    predictions, references = lists
    metric = load(name)
    whole = metric.compute(predictions=predictions, references=references)
    metric.add_batch(predictions=predictions[:50], references=references[:50])
    for items, one in zip(predictions[50:], references[50:]):
        metric.add(prediction=items, reference=one)
    assert metric.compute(k=10) == whole


def test_modules_combine(load, lists):
    predictions, references = lists
    combined = evaluate.combine([load(name) for name in MODULES])
    assert set(combined.compute(predictions=predictions, references=references)) == {"hr@10", "ndcg@10"}


@pytest.mark.parametrize("name", MODULES)
def test_lengths_are_whole_and_at_least_one(load, name):
    metric = load(name)
    for k in (0, [5, 0], 2.5, []):
        with pytest.raises(ValueError, match=re.escape(f"k is {k!r} but must be a whole number of at least 1")):
            metric.compute(predictions=[["a"]], references=["a"], k=k)
    found = metric.compute(predictions=[["a"]], references=["a"], k=np.int64(2))
    assert list(found.values()) == [1.0]


@pytest.mark.parametrize("name", MODULES)
def test_nobody_has_no_mean(load, name):
    with pytest.raises(ValueError, match="there is no user to compute"):
        load(name).compute(predictions=[], references=[])


@pytest.mark.parametrize("name", MODULES)
def test_the_folder_is_a_space(name):
    import yaml

    card = yaml.safe_load((FOLDER / name / "README.md").read_text().split("---")[1])
    assert {"title", "sdk", "app_file"} <= set(card)
    assert (FOLDER / name / card["app_file"]).is_file()
    assert {"metric", "evaluate"} <= set(card["tags"])


def test_a_module_is_shared_as_a_space(hub, tmp_path):
    script = f"""
import evaluate
from huggingface_hub import create_repo, upload_folder

create_repo("tester/ndcg_at_k", repo_type="space", space_sdk="gradio", exist_ok=True)
upload_folder(repo_id="tester/ndcg_at_k", repo_type="space", folder_path={str(FOLDER / "ndcg_at_k")!r})
print(evaluate.load("tester/ndcg_at_k").compute(predictions=[["a", "b"]], references=["b"], k=2))
"""
    environment = {**os.environ, **hub.environment(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr + str(hub.log)
    assert ran.stdout.strip() == str({"ndcg@2": 1 / math.log2(3)})
