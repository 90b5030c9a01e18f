"""The protocol behind every row of a table, the same for all models.

Settings are chosen from a model's grid by NDCG@20 on validation with seed 0. For each seed, a fit on the training
interactions then gives the length (the best epoch on validation), and a fresh model, fit on training + validation interactions
for that length, is evaluated once on the test items. TokenRec goes through the same steps in `tokenrec_hf.train`.

Each fit is a process of its own that adds one record, see `records`. A second run repeats nothing, and an interrupted run
continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baselines.base import SELECT_BY, TRIALS
from baselines.registry import BASELINES, load_baseline
from records import Job, Record, Recorded, Records

from tokenrec_hf import Recipe
from tokenrec_hf.evaluation.variants import VARIANTS

TOKENREC = {
    **{f"tokenrec-{recipe}": recipe for recipe in ("paper", "best")},
    "tokenrec-paper-small": "paper",
    "tokenrec-paper-scratch": "paper",
}
# Recipe `paper` without T5-small's weights: its vectors, codes and loss, with a T5 from scratch of one layer (small) or of the
# sizes of T5-small (scratch, which needs a GPU).
CHANGES: dict[str, dict[str, Any]] = {
    "tokenrec-paper-small": {
        "retrieval.backbone": None,
        "retrieval.config": {
            "d_model": 256,
            "d_kv": 64,
            "num_heads": 4,
            "d_ff": 512,
            "num_layers": 1,
            "projection_dim": 1024,
        },
        "retrieval.training": {"num_train_epochs": 120},
        "retrieval.evaluate_every": 5,
        "retrieval.patience": 20,
        "retrieval.most_steps": 7000,
        "prompts.train_history": 30,
    },
    "tokenrec-paper-scratch": {
        "retrieval.backbone": None,
        "retrieval.most_steps": 4000,
        "prompts.train_history": 30,
    },
}
_CALLED = {"tokenrec-paper-small": ", small T5", "tokenrec-paper-scratch": ", T5-small from scratch"}
MODELS = (*BASELINES, *TOKENREC)
VECTORS = "collaborative_cosine"
# The rows of a TokenRec: an evaluation, and how tables call it.
_SUFFIXES = dict(
    zip(
        (*VARIANTS, VECTORS),
        ("", ", user id only", ", unseen prompt", ", history only", ", its vectors without T5"),
    )
)
MOST_SEEDS = 10
FIT_ONE = Path(__file__).parent / "fit_one.py"
# Answers a job with its record: `Fits`, or `Recorded`, which never fits.
Answer = Callable[[Job], Record]
Row = dict[str, Any]


class FitError(RuntimeError):
    """A fit ended without a record."""


class Fits:
    """Answers jobs from the records, and runs those that have none.

    Args:
        results: folder of the records.
        work: folder of TokenRec's checkpoints and repositories.
        log: receives a line for each fit that begins.
    """

    def __init__(self, results: Path, work: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self.records, self.work, self.log = Records(results), work, log

    def __call__(self, job: Job) -> Record:
        """The record of a job.

        Raises:
            FitError: the process ended without a record.
        """
        if record := self.records.get(job):
            return record
        self.log(f"{job.dataset} {job.model} {job.phase} seed {job.seed}: {describe(job)}")
        self.run(job)
        record = self.records.get(job)
        if record is None:
            raise FitError(f"{job.model} on {job.dataset} ended without a record in {self.records.path(job.dataset)}.")
        return record

    def run(self, job: Job) -> None:
        """Fits in a process of its own, which adds the record."""
        arguments = ["--job", json.dumps(asdict(job)), "--results", str(self.records.folder), "--work", str(self.work)]
        code = subprocess.run([sys.executable, str(FIT_ONE), *arguments], check=False).returncode
        if code:
            raise FitError(f"{job.model} on {job.dataset} ended with exit code {code}; its own message is above.")


def describe(job: Job) -> str:
    """The settings of a job in one line."""
    if job.model in TOKENREC:
        return f"recipe {TOKENREC[job.model]}{_CALLED.get(job.model, '')}"
    return ", ".join(f"{name}={value}" for name, value in job.settings.items()) or "nothing to choose"


def study(dataset: str, model: str, seeds: int, fits: Answer, trials: int = TRIALS) -> list[Row]:
    """The rows of a model in a table.

    Args:
        dataset: a data set as in `tokenrec train --dataset`.
        model: one of `MODELS`.
        seeds: runs behind mean and spread; a deterministic model has one.
        fits: answers a job.
        trials: number of settings tried, the first ones of the grid.

    Returns:
        A dictionary for each row, with lists over seeds: see [`_row`].
    """
    if model in TOKENREC:
        return _study_tokenrec(dataset, model, seeds, fits)
    baseline = load_baseline(model)
    grid = [dict(settings) for settings in baseline.grid[:trials]]
    best = grid[0]
    if len(grid) > 1:
        tried = [fits(Job(dataset, model, "validation", 0, settings)) for settings in grid]
        best = max(tried, key=lambda record: record["metrics"][SELECT_BY])["job"]["settings"]
    chosen, tested = [], []
    for seed in range(1 if baseline.deterministic else seeds):
        chosen.append(fits(Job(dataset, model, "validation", seed, best)))
        tested.append(fits(Job(dataset, model, "test", seed, best, chosen[-1]["epochs"])))
    row = _row(model, baseline.title, [one["metrics"] for one in chosen], [one["metrics"] for one in tested], tested)
    return [{**row, "settings": describe(Job(dataset, model, "test", 0, best)), "trials": len(grid)}]


def recorded_rows(dataset: str, results: Path, models: Sequence[str] = MODELS) -> list[Row]:
    """The rows of all models that have been measured, with as many seeds and settings as have records. Nothing is fit."""
    rows = []
    for model in models:
        seeds, trials = recorded(dataset, model, results)
        if seeds:
            rows += study(dataset, model, seeds, Recorded(results), trials)
    return rows


def recorded(dataset: str, model: str, results: Path) -> tuple[int, int]:
    """Number of seeds and of settings for which `study` finds all records; no seeds if the model is not finished."""
    found = Recorded(results)

    def count(phase: str, changes: Sequence[Mapping[str, Any]]) -> int:
        return found.count([Job(dataset, model, phase, **change) for change in changes])

    if model in TOKENREC:
        return count("both", [{"seed": seed, "settings": _recipe(model)} for seed in range(MOST_SEEDS)]), 1
    grid = [dict(settings) for settings in load_baseline(model).grid]
    trials = count("validation", [{"settings": settings} for settings in grid])
    tested = [count("test", [{"seed": s, "settings": one} for s in range(MOST_SEEDS)]) for one in grid[:trials]]
    return max(tested, default=0), trials


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of a job with a recipe: all but the seed."""
    return {name: value for name, value in recipe.to_dict().items() if name != "seed"}


def _recipe(model: str) -> dict[str, Any]:
    return settings_of(Recipe.load(TOKENREC[model], overrides=CHANGES.get(model)))


def _study_tokenrec(dataset: str, model: str, seeds: int, fits: Answer) -> list[Row]:
    recipe = _recipe(model)
    records = [fits(Job(dataset, model, "both", seed, recipe)) for seed in range(seeds)]
    title = f"TokenRec `{TOKENREC[model]}`{_CALLED.get(model, '')}"
    settings = f"recipe `{TOKENREC[model]}`" + ", changed" * (model in CHANGES)
    rows = []
    for variant, suffix in _SUFFIXES.items():
        validation, test = ([one["metrics"][phase][variant] for one in records] for phase in ("validation", "test"))
        rows.append(_row(model, title + suffix, validation, test, records) | {"settings": settings, "trials": 1})
    return rows


def _row(model: str, title: str, validation: Sequence[dict], test: Sequence[dict], records: Sequence[Record]) -> Row:
    """A row's measurements: metrics by name, one dictionary a seed, and the time and memory of the fits of the tested models.

    Time and memory are those of fits without a GPU, if there are any; fits with a GPU cannot be compared with them.
    """
    timed = [one for one in records if not one["accelerator"]] or records
    return {
        "model": model,
        "title": title,
        "validation": validation,
        "test": test,
        "epochs": [one["job"]["epochs"] or one["epochs"] for one in records],
        "fit_seconds": [one["fit"].get("cpu_seconds", one["fit"]["seconds"]) for one in timed],
        "peak_bytes": [one["peak_bytes"] for one in timed],
        "data": sorted({one["data"] for one in records}),
        "threads": sorted({one["threads"] for one in records}),
        "accelerators": sorted({one["accelerator"] or "none" for one in records}),
    }
