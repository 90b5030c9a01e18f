"""One fit in a process of its own, so that its memory, its time and its crash are its own; `harness.py` starts it.

python examples/paper/fit_one.py --job '{"dataset": "demo", "model": "ease", ...}' --results results --work out-paper
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from baselines.base import product_type
from baselines.registry import load_baseline
from datasets import DatasetDict
from harness import CHANGES, TOKENREC, VECTORS
from records import Record, Records

from tokenrec_hf import Recipe, leave_one_out, load_interactions, train
from tokenrec_hf.data.splits import SPLITS, index_splits
from tokenrec_hf.evaluation.baselines import evaluate_baseline
from tokenrec_hf.evaluation.fitting import device
from tokenrec_hf.evaluation.variants import VARIANTS

# ru_maxrss is in bytes on macOS and in KiB everywhere else.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Fits, and adds the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--job", required=True, type=json.loads, help="fields of a `records.Job`")
    parser.add_argument("--results", required=True, type=Path, help="folder of the records")
    parser.add_argument("--work", required=True, type=Path, help="TokenRec's checkpoints and repositories")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # products in TF32
    record = fit_one(arguments.job, arguments.work)
    Records(arguments.results).put(arguments.job["dataset"], [record])


def fit_one(job: dict[str, Any], work: Path) -> Record:
    """The record of a job: the measurements, a digest of the data, and the versions.

    Args:
        job: the fields of a `records.Job`.
        work: folder of TokenRec's checkpoints and repositories.
    """
    splits = leave_one_out(load_interactions(job["dataset"]))
    result = fit_tokenrec(job, splits, work) if job["model"] in TOKENREC else fit_baseline(job, splits)
    return {
        "job": job,
        **result,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        "data": digest(splits),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("tokenrec-hf", "torch", "transformers", "numpy")},
        },
    }


def fit_baseline(job: dict[str, Any], splits: DatasetDict) -> dict[str, Any]:
    """A baseline on the training interactions and evaluated on validation, or refit with those too and evaluated on test."""
    data = index_splits(splits, job["phase"])
    baseline = load_baseline(job["model"])(seed=job["seed"], **job["settings"])
    clock = _Clock()
    if job["phase"] == "validation":
        baseline.fit(data.interactions, data.holdout)
    else:
        baseline.fit(data.interactions, None, job["epochs"])
    fitted = clock.lap()
    with torch.no_grad():
        metrics = evaluate_baseline(baseline, data.interactions, data.holdout)
    return {"metrics": metrics, "epochs": baseline.epochs, "fit": fitted, "evaluation": clock.lap()}


def fit_tokenrec(job: dict[str, Any], splits: DatasetDict, work: Path) -> dict[str, Any]:
    """TokenRec from all stages, selection and (phase `both`) refit; an interrupted training continues.

    The time is the sum of the recorded stages, so that it is complete after an interruption too; it is wall-clock time.
    The T5s of `CHANGES` are trained in bfloat16 if the CPU has instructions for it, as the baselines with a T5 are; the record
    says so.
    """
    bf16 = job["model"] in CHANGES and device().type == "cpu" and product_type() == torch.bfloat16
    recipe = Recipe.from_dict({**job["settings"], "seed": job["seed"]})
    if bf16:
        recipe = recipe.changed(**{"retrieval.training": {**recipe.retrieval.training, "bf16": True, "use_cpu": True}})
    name = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    refit = job["phase"] == "both"
    folder = work / job["dataset"] / f"{job['model']}-{job['phase']}-seed{job['seed']}-{name}"
    repository = train(splits, recipe, folder, dataset_name=job["dataset"], refit=refit, log=print)
    found, checks = repository.metrics, repository.audit()
    if leaks := [check.finding for check in checks if check.passed is False]:
        raise RuntimeError(f"the audit of {folder} found that {leaks[0]}")
    stages = found["seconds"]["refit" if refit else "selection"]
    phases = ("validation", "test") if refit else ("validation",)
    return {
        "metrics": {phase: {one: found[phase][one] for one in (*VARIANTS, VECTORS)} for phase in phases},
        "codes": found["codes"],
        "audit": {
            "passed": sum(check.passed is True for check in checks),
            "unknown": sum(check.passed is None for check in checks),
        },
        "bf16": bf16,
        "epochs": found["epochs"],
        "fit": {"seconds": sum(spent for stage, spent in stages.items() if stage != "evaluation")},
        "evaluation": {"seconds": stages["evaluation"]},
    }


def digest(splits: DatasetDict) -> str:
    """A digest that differs between data sets, and between splits of the same data."""
    sha = hashlib.sha256()
    for name in SPLITS:
        for column in ("user_id", "item_id"):
            sha.update("\n".join(splits[name][column][:]).encode() + b"\0")
    return sha.hexdigest()[:16]


class _Clock:
    """Seconds since the last lap: wall clock, and CPU time of this process, which a busy machine does not stretch."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        last = getattr(self, "last", (wall, cpu))
        self.last = wall, cpu
        return {"seconds": round(wall - last[0], 2), "cpu_seconds": round(cpu - last[1], 2)}


if __name__ == "__main__":
    main()
