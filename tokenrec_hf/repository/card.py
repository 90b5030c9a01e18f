"""The card of a trained repository: what it is, how to use it and how good it is, from nothing but what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..models.embedding_store import EmbeddingStore

TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
MARK = "<!-- Made by tokenrec."
TASK = "generative-retrieval"
METHODS = {
    "popularity": "popularity",
    "collaborative": "collaborative model, dot product",
    "tokenrec": "**TokenRec**",
    "tokenrec_user_id_only": "TokenRec, user id only",
    "tokenrec_unseen_prompt": "TokenRec, unseen prompt",
    "tokenrec_history_only": "TokenRec, history only",
}
SHOWN = ("hr@10", "hr@20", "ndcg@20")
STATISTICS = {
    "usage": "codewords used",
    "perplexity": "perplexity",
    "unique": "own codes",
    "reconstruction_error": "error",
}


def model_card(folder: str | os.PathLike, repo_id: str | None = None) -> str:
    """The text of the card.

    Args:
        folder: a finished trained repository.
        repo_id: its name on the Hub, for the code that the card shows; by default that of the folder.

    Raises:
        FileNotFoundError: the folder is no finished repository.
    """
    folder = Path(folder)
    metrics, tokenizer = (_read(folder / name) for name in ("metrics.json", "tokenizer_config.json"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    tested = metrics.get("test") or metrics["validation"]
    name = repo_id or folder.resolve().name
    codebooks = tokenizer["codebooks"]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=name.rstrip("/").split("/")[-1],
        name=name,
        dataset=_dataset(metrics),
        num_users=metrics["users"],
        num_items=metrics["items"],
        num_interactions=metrics["interactions"],
        user_codes="K={}, L={}".format(*codebooks["user"]),
        item_codes="K={}, L={}".format(*codebooks["item"]),
        history=json.dumps(EmbeddingStore.open(folder).ids("item")[:2], ensure_ascii=False),
        refit=_refit(metrics),
        results=_results(metrics),
        codes=_codes(metrics["codes"]),
        recipe=metrics["recipe"],
        seed=metrics["seed"],
        epochs=", ".join(f"{stage} {count:g}" for stage, count in metrics["epochs"].items()),
        settings=_settings(recipe),
        popularity=f"{tested['tokenrec']['popularity@20']:.4f}",
        coverage=f"{tested['tokenrec']['coverage@20']:.4f}",
    )
    return f"---\n{_metadata(metrics, recipe, name).to_yaml()}\n---\n\n{text}"


def write_model_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Writes the card of a finished trained repository to its README.md, whole or not at all; a card of one's own stays.

    Args:
        folder: the repository.
        repo_id: as in [`model_card`].

    Returns:
        The file.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() or MARK in path.read_text(encoding="utf-8"):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(model_card(folder, repo_id), encoding="utf-8")
        temporary.replace(path)
    return path


def _metadata(metrics: Mapping[str, Any], recipe: Mapping[str, Any], name: str) -> ModelCardData:
    backbone, split = recipe["retrieval"]["backbone"], "test" if metrics.get("test") else "validation"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=_dataset(metrics),
            dataset_name=_dataset(metrics),
            dataset_split=split,
            metric_type=key.replace("hr@", "hit_rate@"),
            metric_name=key.upper(),
            metric_value=metrics[split]["tokenrec"][key],
        )
        for key in SHOWN
    ]
    # A folder is nobody else's base model.
    base_model = backbone if backbone and not Path(backbone).exists() else None
    return ModelCardData(
        model_name=name.rstrip("/").split("/")[-1],
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["tokenrec", "recommendation", TASK],
        datasets=[_dataset(metrics)],
        base_model=base_model,
        eval_results=results,
    )


def _dataset(metrics: Mapping[str, Any]) -> str:
    return metrics["dataset"].rstrip("/")


def _refit(metrics: Mapping[str, Any]) -> str:
    if not metrics["refit"]:
        return ""
    return (
        " Lengths of training were chosen on validation; the model of this repository was then trained once more on training "
        "and validation interactions, and tested."
    )


def _results(metrics: Mapping[str, Any]) -> str:
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    header = ["", *(f"{split} {key.upper()}" for split in splits for key in SHOWN)]
    rows = [
        [label, *(f"{metrics[split][method][key]:.4f}" for split in splits for key in SHOWN)]
        for method, label in METHODS.items()
    ]
    return _table([header, *rows])


def _codes(codes: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[f"{kind}s", *(f"{values[key]:.4f}" for key in STATISTICS)] for kind, values in codes.items()]
    return _table([["", *STATISTICS.values()], *rows])


def _settings(recipe: Mapping[str, Any]) -> str:
    """The settings that matter most, one a row."""
    collaborative, quantiser, retrieval = recipe["collaborative"], recipe["mq_tokenizer"], recipe["retrieval"]
    rows = [
        ["collaborative model", f"{collaborative['model']}, {_pairs(collaborative['config'])}"],
        ["MQ-Tokenizers", _pairs(quantiser["config"])],
        ["T5", f"{retrieval['backbone'] or 'from scratch'}, {_pairs(retrieval['config'])}"],
    ]
    return _table([["stage", "settings"], *rows])


def _pairs(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to make a model card from; finish `tokenrec train` first.")
    return json.loads(path.read_text(encoding="utf-8"))
