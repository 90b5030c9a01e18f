"""Modules of the package that a call enters, from a request or a vector to its answer.

The table of docs/architecture.md. A small repository is trained on the demo data. `sys.setprofile` then notes every module of `tokenrec_hf` in which a function
is called between the start and the end of each path; imports do not count.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from measure import Row

import tokenrec_hf
from tokenrec_hf import NewVectors, Recipe, Repository, leave_one_out, load_interactions, train
from tokenrec_hf.cli.app import main as tokenrec

PACKAGE = Path(tokenrec_hf.__file__).parent
SMALL = {
    "collaborative.training.num_train_epochs": 2,
    "mq_tokenizer.training.max_steps": 10,
    "mq_tokenizer.evaluate_every": 10,
    "retrieval.training.num_train_epochs": 1,
}


def entered(run: Callable[[], object], until: str) -> list[str]:
    """The modules entered by `run` until a function of this qualified name returns (`name`), or begins (`name(`)."""
    modules: dict[str, None] = {}
    name, at_begin = until.rstrip("("), until.endswith("(")
    done = False

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal done
        code = frame.f_code
        if done or not code.co_filename.startswith(str(PACKAGE)) or event not in ("call", "return"):
            return
        if event == "call" and code.co_name != "<module>" and "__qualname__" not in code.co_names:
            path = Path(code.co_filename).relative_to(PACKAGE).with_suffix("")
            modules[".".join(path.parts)] = None
        done = code.co_qualname == name and (event == "call") == at_begin

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    if not done:
        raise RuntimeError(f"{name} was not reached.")
    return list(modules)


def rows() -> list[Row]:
    """One row for each path."""
    splits = leave_one_out(load_interactions("demo"))
    recipe = Recipe.load("quickstart", overrides=SMALL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "out"
        paths = {
            "`train`'s splits to the T5 stage": entered(
                lambda: train(splits, recipe, folder, refit=False), "train_retrieval("
            ),
            "`tokenrec recommend` to the answer": entered(
                lambda: tokenrec(["recommend", str(folder), "--user", "u001"]), "Recommender.answer"
            ),
            "a cold-start vector to its code": entered(
                lambda: Repository(folder).add(
                    items=NewVectors(["f999"], torch.randn(1, Repository(folder).info()["embedding_dim"]))
                ),
                "MQTokenizerModel.encode",
            ),
        }
    return [Row(f"{path}: {', '.join(modules)}", len(modules), "modules") for path, modules in paths.items()]
