"""A trained repository in the hands of a stranger: a fresh virtual environment with transformers, torch and safetensors only."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tokenrec_hf import Recommender
from tokenrec_hf.repository.repository import Repository

WANTED = ("transformers", "torch", "safetensors")
BATCH = 4
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="symbolic links")]
REFUSALS = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
loaders = {one.__name__: one.from_pretrained for one in (AutoConfig, AutoModel, AutoTokenizer)}
loaders["pipeline"] = lambda repository: pipeline("generative-retrieval", model=repository)
said = {}
for name, load in loaders.items():
    try:
        said[name] = f"loaded {type(load(sys.argv[1]))}"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(said))
"""
RECOMMEND = """
import importlib.util, json, sys
from transformers import AutoModel, AutoTokenizer, pipeline
assert importlib.util.find_spec("tokenrec_hf") is None
repository, requests, batch_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
trust = {"trust_remote_code": True}
model = AutoModel.from_pretrained(repository, **trust)
tokenizer = AutoTokenizer.from_pretrained(repository, **trust)
recommend = pipeline("generative-retrieval", model=repository, device="cpu", **trust)
prompts = [f"What comes next after item_{one['history'][0]} item_{one['history'][1]} ?" for one in requests]
inputs = tokenizer(prompts, padding=True, return_tensors="pt")
for name in ("mq_user", "mq_item", "collaborative"):
    AutoModel.from_pretrained(repository, subfolder=name, **trust)
print(json.dumps({
    "tokens": inputs["input_ids"].tolist(),
    "queries": model.encode_queries(**inputs).tolist(),
    "found": recommend(requests, batch_size=batch_size, top_k=7),
}))
"""
HANDLE = """
import json, runpy, sys
from huggingface_hub import snapshot_download
folder = snapshot_download(sys.argv[1])
handler = runpy.run_path(f"{folder}/handler.py")["EndpointHandler"](folder)
print(json.dumps(handler({"inputs": json.loads(sys.argv[2]), "parameters": {"top_k": 7}})))
"""


def requirements(names):
    """The installed distributions of `names` and of all that they require, without extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            required = map(Requirement, found[name].requires or ())
            waiting += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Runs code with the interpreter of an environment that has never seen the package, and reads the JSON it prints last.

    The environment has links to the distributions that an installation of `WANTED` would bring, and nothing else.
    """
    home = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    [packages] = (home / "venv").glob("lib/python*/site-packages")
    for distribution in requirements(WANTED):
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))

    def run(code, *arguments, **environment):
        done = subprocess.run(
            [python, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=home,
            env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(home / "cache"), **environment},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def local(trained_repository):
    """Requests, and what a stranger must get for them."""
    here = Recommender.from_pretrained(trained_repository)
    users = here.store.ids("user")[:6]
    histories = [seen[: n + 2] for n, seen in enumerate(here.store.seen(users))]
    prompts = [f"What comes next after item_{one[0]} item_{one[1]} ?" for one in histories]
    inputs = here.tokenizer(prompts, padding=True, return_tensors="pt")
    found = []
    for start in range(0, len(users), BATCH):
        batch = slice(start, start + BATCH)
        found += here.recommend(users[batch], histories[batch], top_k=7)
    return {
        "requests": [{"user": user, "history": history} for user, history in zip(users, histories)],
        "tokens": inputs["input_ids"].tolist(),
        "queries": here.model.encode_queries(**inputs).tolist(),
        "found": found,
    }


def test_a_stranger_who_trusts_a_folder_gets_the_same_recommendations(stranger, trained_repository, local):
    printed = stranger(RECOMMEND, trained_repository, json.dumps(local["requests"]), BATCH)
    assert printed == {name: local[name] for name in ("tokens", "queries", "found")}


def test_a_stranger_gets_the_same_recommendations_from_the_hub(stranger, hub, trained_repository, local, tmp_path):
    Repository(shutil.copytree(trained_repository, tmp_path / "own")).push_to_hub(
        "tester/demo", private=True, include_users=True
    )
    requests, environment = json.dumps(local["requests"]), hub.environment(tmp_path / "cache")
    printed = stranger(RECOMMEND, "tester/demo", requests, BATCH, **environment)
    assert printed == {name: local[name] for name in ("tokens", "queries", "found")}
    handled = stranger(HANDLE, "tester/demo", json.dumps(local["requests"][0]), **environment)
    assert [row["item"] for row in handled] == [row["item"] for row in local["found"][0]]


def test_a_stranger_gets_for_a_history_what_its_user_gets_here(stranger, hub, fism_repository, tmp_path):
    Repository(shutil.copytree(fism_repository, tmp_path / "own")).push_to_hub("tester/histories")
    here = Recommender.from_pretrained(fism_repository)
    users = here.store.ids("user")[:4]
    requests = json.dumps([{"history": seen} for seen in here.store.seen(users)])
    printed = stranger(RECOMMEND, "tester/histories", requests, BATCH, **hub.environment(tmp_path / "cache"))
    assert printed["found"] == here.recommend(users, top_k=7)


def test_a_stranger_who_does_not_trust_it_gets_nothing(stranger, trained_repository):
    said = stranger(REFUSALS, trained_repository)
    assert set(said) == {"AutoConfig", "AutoModel", "AutoTokenizer", "pipeline"}
    for name, message in said.items():
        assert message.startswith("ValueError: ") and "trust_remote_code=True" in message, (name, message)
