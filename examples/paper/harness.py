"""The protocol that every row of a table goes through, the same for all models.

Settings are chosen from a model's grid by NDCG@20 on validation, with seed 0. Then for each seed a fit on the training
interactions gives the length (the best epoch on validation), and a fresh model, fit on training + validation interactions for
that length, is evaluated on the test items once. TokenRec goes through the same steps in `tokenrec_hf.train`.

Each fit is a process of its own and leaves one JSON file, so a second run repeats nothing and an interrupted one goes on.
The files do not know the code that made them: delete those of a model whose code has changed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baselines.base import SELECT_BY, TRIALS
from baselines.registry import BASELINES, load_baseline

from tokenrec_hf import load_recipe
from tokenrec_hf.repository.build import VARIANTS

TOKENREC = {
    **{f"tokenrec-{recipe}": recipe for recipe in ("paper", "best", "cpu")},
    "tokenrec-paper-small": "paper",
    "tokenrec-paper-scratch": "paper",
}
# The recipe `paper` where T5-small's weights are not at hand: its vectors, codes and loss, with a T5 from scratch of one layer
# (small), or of the sizes of T5-small (scratch), which wants a GPU.
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
_SUFFIXES = dict(
    zip(
        (*VARIANTS, VECTORS),
        ("", ", user id only", ", unseen prompt", ", history only", ", its vectors without T5"),
    )
)
MOST_SEEDS = 10
FIT_ONE = Path(__file__).parent / "fit_one.py"


@dataclass(frozen=True)
class Job:
    """One fit and its evaluation.

    Args:
        dataset: whatever `tokenrec train --dataset` takes.
        model: one of `MODELS`.
        phase: `validation`; `test`, the refit; or `both` for TokenRec, which does one after the other.
        seed: of everything random.
        settings: an entry of the model's grid, or TokenRec's recipe.
        epochs: the length of a refit, where there is one to choose.
    """

    dataset: str
    model: str
    phase: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    def path(self, results: Path) -> Path:
        """Where the record is kept."""
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return results / Path(self.dataset).name / self.model / f"{self.phase}-seed{self.seed}-{settings}.json"


class FitError(RuntimeError):
    """A fit ended without a record."""


class Fits:
    """Runs jobs whose records are not there yet.

    Args:
        results: the folder of the records.
        work: where TokenRec's checkpoints and repositories go.
        log: is told of each fit that begins.
    """

    def __init__(self, results: Path, work: Path, log: Callable[[str], None] = lambda line: None):
        self.results, self.work, self.log = results, work, log

    def __call__(self, job: Job) -> dict[str, Any]:
        """The record of a job.

        Raises:
            FitError: the process ended without one.
        """
        path = job.path(self.results)
        # The length of a refit is not in the name: where another one was chosen since, the fit is out of date.
        if path.is_file() and (record := json.loads(path.read_text(encoding="utf-8")))["job"] == asdict(job):
            return record
        self.log(f"{job.dataset} {job.model} {job.phase} seed {job.seed}: {describe(job)}")
        self.run(job, path)
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, job: Job, path: Path) -> None:
        """Fits in a process of its own, which writes the record."""
        arguments = ["--job", json.dumps(asdict(job)), "--output", str(path), "--work", str(self.work)]
        code = subprocess.run([sys.executable, str(FIT_ONE), *arguments], check=False).returncode
        if code:
            raise FitError(f"{job.model} on {job.dataset} ended with exit code {code}; its own message is above.")


def describe(job: Job) -> str:
    """The settings of a job in one line."""
    if job.model in TOKENREC:
        return f"recipe {_name(job.model)}"
    return ", ".join(f"{name}={value}" for name, value in job.settings.items()) or "nothing to choose"


def study(dataset: str, model: str, seeds: int, fits: Callable[[Job], dict], trials: int = TRIALS) -> list[dict]:
    """The rows of a model in a table.

    Args:
        dataset: whatever `tokenrec train --dataset` takes.
        model: one of `MODELS`.
        seeds: runs whose mean and spread are reported; a model without randomness has one.
        fits: runs a job, see [`Fits`].
        trials: settings tried, the first ones of the grid.

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


def recorded(dataset: str, model: str, results: Path) -> tuple[int, int]:
    """Seeds and settings of a model for which `study` would find all records; no seeds where it is not finished."""

    def count(phase: str, changes: Sequence[Mapping[str, Any]]) -> int:
        jobs = [Job(dataset, model, phase, **{"seed": 0, **change}) for change in changes]
        return next((n for n, job in enumerate(jobs) if not job.path(results).is_file()), len(jobs))

    if model in TOKENREC:
        return count("both", [{"seed": seed, "settings": _recipe(model)} for seed in range(MOST_SEEDS)]), 1
    grid = [dict(settings) for settings in load_baseline(model).grid]
    trials = count("validation", [{"settings": settings} for settings in grid])
    tested = [count("test", [{"seed": s, "settings": one} for s in range(MOST_SEEDS)]) for one in grid[:trials]]
    return max(tested, default=0), trials


def _recipe(model: str) -> dict[str, Any]:
    recipe = load_recipe(TOKENREC[model], overrides=CHANGES.get(model))
    del recipe["seed"]
    return recipe


def _name(model: str) -> str:
    """How a table calls a recipe, and what is changed in it."""
    return TOKENREC[model] + _CALLED.get(model, "")


def _study_tokenrec(dataset: str, model: str, seeds: int, fits: Callable[[Job], dict]) -> list[dict]:
    recipe = _recipe(model)
    records = [fits(Job(dataset, model, "both", seed, recipe)) for seed in range(seeds)]
    rows = []
    for variant, suffix in _SUFFIXES.items():
        validation, test = ([one["metrics"][phase][variant] for one in records] for phase in ("validation", "test"))
        row = _row(model, f"TokenRec ({_name(model)}{suffix})", validation, test, records)
        rows.append({**row, "settings": f"recipe `{TOKENREC[model]}`" + ", changed" * (model in CHANGES), "trials": 1})
    return rows


def _row(model: str, title: str, validation: Sequence, test: Sequence, records: Sequence) -> dict[str, Any]:
    """A row's measurements: metrics by name, one dictionary a seed, and what the fits of the tested models took.

    Time and memory are those of the fits without a GPU, where there are any: the others cannot be compared with them.
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
