"""What a trained repository holds, how it was made and how good it is: read from its files, without loading a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGES = ("collaborative", "mq_user", "mq_item", "retrieval", "evaluation")
# It is time to train anew: newcomers are more than this share of what was trained on, or their codes
# lose this many times the variance that training lost (or half of the floor, where training lost next to nothing).
DUE_SHARE, DUE_ERROR, DUE_FLOOR = 0.2, 2.0, 0.1


def describe_repository(folder: str | os.PathLike) -> dict[str, Any]:
    """Counts, settings, results and sizes of a repository, also of one whose training has not finished.

    Raises:
        FileNotFoundError: the folder holds no trained repository.
        ValueError: a file of it is damaged.
    """
    folder = Path(folder)
    found = {
        name: read_json(path) if (path := folder / place).is_file() else {}
        for name, place in {
            "model": "config.json",
            "tokenizer": "tokenizer_config.json",
            "store": "store/store.json",
            "metrics": "metrics.json",
            "additions": "additions.json",
            "run": "training/run.json",
            "collaborative": "collaborative/config.json",
        }.items()
    }
    if not found["run"] and "codebooks" not in found["tokenizer"]:
        raise FileNotFoundError(f"{folder} is no trained repository; give the --output_dir of `tokenrec train`.")
    metrics = found["metrics"]
    recipe = found["run"].get("recipe", {})
    document = {
        "finished": bool(metrics) or not found["run"],
        "dataset": metrics.get("dataset"),
        "recipe": metrics.get("recipe") or recipe.get("recipe"),
        "seed": metrics.get("seed", recipe.get("seed")),
        "refit": metrics.get("refit", found["run"].get("refit")),
        "counts": found["store"].get("counts"),
        "interactions": metrics.get("interactions"),
        "embedding_dim": found["store"].get("embedding_dim"),
        "codebooks": found["tokenizer"].get("codebooks"),
        "space_ids": found["model"].get("space_ids") or found["tokenizer"].get("space_ids"),
        "additions": found["additions"] or None,
        "retraining_due": _retraining_due(
            found["additions"], metrics, is_fism=found["collaborative"].get("model_type") == "tokenrec_fism"
        ),
        **{name: metrics.get(name) for name in ("codes", "epochs", "seconds", "validation", "test")},
        "bytes": _size(folder) - _size(folder / "training"),
        "training_bytes": _size(folder / "training"),
    }
    if not document["finished"]:
        runs = ("selection", "refit") if found["run"]["refit"] else ("selection",)
        records = {name: folder / "training" / f"{name}.json" for name in runs}
        document["stages"] = {
            run: [stage for stage in STAGES if path.is_file() and stage in read_json(path)]
            for run, path in records.items()
        }
    return document


def _retraining_due(additions: Mapping[str, Any], metrics: Mapping[str, Any], is_fism: bool) -> list[str]:
    """Why the repository should be trained anew, if it should: newcomers that are too many, or that its codes describe badly.

    With FISM new items get part of their length in directions that codes need not describe, see `fold_in_items`.
    """
    reasons = []
    for kind, added in additions.items():
        trained, error = metrics[f"{kind}s"], metrics["codes"][kind]["reconstruction_error"]
        if added["count"] > DUE_SHARE * trained:
            reasons.append(f"{added['count']} {kind}s were added to {trained}")
        told_by_codes = kind == "user" or not is_fism
        if told_by_codes and added["reconstruction_error"] > DUE_ERROR * max(error, DUE_FLOOR):
            reasons.append(
                f"the codes of new {kind}s lose {added['reconstruction_error']:.0%} of the variance, in training {error:.0%}"
            )
    return reasons


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a repository.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or train in another folder.") from error


def _size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
