"""README and docs as they stand: the commands and Python blocks of each page, in order, in a folder with the files they name.

Trainings are short. What is not run is a skipped test with the reason.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import typer

from tokenrec_hf import Recipe
from tokenrec_hf.cli import app as cli
from tokenrec_hf.cli.arguments import repeat_options
from tokenrec_hf.repository import build

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USERS, ITEMS = [f"{number:02}" for number in range(1, 41)], [f"{number:02}" for number in range(1, 31)]
SHORT = {"collaborative.most_steps": 20, "mq_tokenizer.user_codebooks": 4, "retrieval.most_steps": 20}
# The beginning of a command, and why it is not run here.
NOT_RUN = {
    "pip ": "installs packages, as continuous integration does",
    "pytest": "tests, as continuous integration does",
    "tokenrec demo ": "serves until it is interrupted: tests/cli/test_demo_page.py",
    "tokenrec serve ": "serves until it is interrupted: tests/cli/test_serve.py",
    "curl ": "needs the service: tests/cli/test_serve.py",
    "python examples/paper/": "takes hours: tests/paper run the scripts on less data",
    "python examples/train_with_trainer.py ": "tests/integration/test_trainer.py runs it",
    "python examples/lora.py ": "tests/models/test_peft.py runs it",
    "torchrun ": "tests/integration/test_trainer.py runs it; FSDP needs GPUs",
    "milvus-lite server ": "needs a server: tests/store/test_milvus.py",
    "TOKENREC_MILVUS_URI=": "needs a server: tests/store/test_milvus.py",
    "tokenrec recommend tuned ": "needs the script before it",
}


def steps(page):
    """The commands and the Python blocks of a page: line, language, text."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S):
        line, language, block = text[: match.start()].count("\n") + 2, *match.groups()
        if language == "python":
            yield line, language, block
            continue
        for command in block.replace("\\\n", " ").splitlines():
            for part in command.split("&&"):
                yield line, language, part.split(" # ")[0].strip()


def why_not(page, language, text):
    """Why a step is not run, or None."""
    if page.name == "train_with_trainer.md" and language == "python":
        return "needs the adapter of examples/lora.py: tests/models/test_peft.py"
    return next((reason for start, reason in NOT_RUN.items() if language == "bash" and text.startswith(start)), None)


def not_run():
    """The steps that are not run, and why."""
    for page in PAGES:
        for line, language, text in steps(page):
            if (reason := why_not(page, language, text)) is not None:
                yield pytest.param(text, reason, id=f"{page.name}:{line} {text.splitlines()[0][:40]}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files of the pages: the quickstart, own interactions, and what is trained from them."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    rows = [(user, item) for user in USERS for item in random.permutation(ITEMS)[: random.integers(8, 15)]]
    table = pd.DataFrame(rows, columns=["user_id", "item_id"])
    table["rating"] = random.choice([3, 4, 5], len(table), p=[0.1, 0.4, 0.5])
    table["timestamp"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(random.integers(0, 360, len(table))), "D")
    table.to_csv(folder / "interactions.csv", index=False)
    new = pd.DataFrame({"user_id": ["41", "41", "03"], "item_id": ["08", "31", "31"], "timestamp": "2025-01-02"})
    new.assign(rating=5).to_csv(folder / "today.csv", index=False)
    pd.DataFrame({"id": ITEMS, "title": [f"Book {item}" for item in ITEMS]}).to_csv(folder / "items.csv", index=False)
    vectors = pd.DataFrame({"id": [*ITEMS, "99"], "vector": list(random.normal(size=(31, 16)).astype(np.float32))})
    vectors.to_parquet(folder / "items.parquet")
    known = pd.DataFrame({"id": ["98", "99"], "genre": "jazz", "in_stock": True})
    known["vector"] = list(random.normal(size=(2, 128)).astype(np.float32))
    known.to_parquet(folder / "vectors.parquet")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.chdir(folder)
        assert cli.main(["quickstart"]) == 0
        assert cli.main(["train", "--dataset", "interactions.csv", "--output-dir", "out"]) == 0
    return folder


def shorten(patch):
    """Makes recipe `best` and `quickstart` stop after a few steps."""
    load = Recipe.load

    def short(name="best", config=None, overrides=None):
        return load(name, config, {**(SHORT if name != "paper" and config is None else {}), **(overrides or {})})

    patch.setattr(Recipe, "load", short)
    patch.setattr(build, "USER_VECTORS", 100)


def to_run(page):
    return [step for step in steps(page) if why_not(page, *step[1:]) is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(to_run, PAGES)), ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page, world, hub, tmp_path, monkeypatch):
    folder = shutil.copytree(world, tmp_path / "world", copy_function=os.link)
    shorten(monkeypatch)
    monkeypatch.chdir(folder)
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "cache",
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    names: dict = {}
    for line, language, text in to_run(page):
        if language == "python":
            exec(compile(text, f"{page.name}:{line}", "exec"), names)
        else:
            command, *arguments = shlex.split(text)
            assert command == "tokenrec", f"{page.name}:{line} has no reason for not being run: {text}"
            assert cli.main(arguments) == 0, f"{page.name}:{line} {text}"


@pytest.mark.parametrize(("command", "reason"), list(not_run()))
def test_what_is_not_run_is_a_command_at_least_and_has_a_reason(command, reason):
    program, *arguments = shlex.split(command)
    if program == "tokenrec":
        parsed = typer.main.get_command(cli.app).commands[arguments[0]]
        parsed.make_context(arguments[0], repeat_options(arguments, parsed)[1:])
    pytest.skip(reason)
