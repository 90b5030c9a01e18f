"""The model card of a trained repository, made from its measurements and settings alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.variants import LABELS, SHOWN
from ..models.codes import atomic_write, read_json
from ..models.embedding_store import EmbeddingStore
from ..training.recipe import Recipe, Setting
from .repository import Repository

TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
MARK = "<!-- Made by tokenrec."
TASK = "generative-retrieval"
REFIT_NOTE = (
    " The lengths of training were chosen on validation; the model of this repository was then trained once more on training "
    "and validation interactions, and tested."
)
STATISTICS = {
    "usage": "codewords used",
    "perplexity": "perplexity",
    "unique": "own codes",
    "reconstruction_error": "error",
}


LEAVE_ONE_OUT = "Leave-one-out: the last item of each user is the test item, the last but one the validation item."
TEMPORAL = (
    "Temporal split at {}: the first item of each user from then on is the test item, the last one before the validation item; "
    "nothing later than the split is trained on."
)


def model_card(repository: Repository, repo_id: str | None = None) -> str:
    """The text of the card.

    Args:
        repository: a finished repository.
        repo_id: its name on the Hub, for the code example; by default the name of the folder.

    Raises:
        FileNotFoundError: the repository is unfinished.
    """
    if not repository.parts.metrics.is_file():
        raise FileNotFoundError(
            f"there is no {repository.parts.metrics} to make a model card from; finish `tokenrec train` first."
        )
    metrics, recipe = repository.metrics, repository.recipe
    codebooks = read_json(repository.folder / "tokenizer_config.json")["codebooks"]
    tested = (metrics.get("test") or metrics["validation"])["tokenrec"]
    name = repo_id or repository.folder.resolve().name
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=name.rstrip("/").split("/")[-1],
        name=name,
        dataset=_dataset(metrics),
        num_users=metrics["users"],
        num_items=metrics["items"],
        num_interactions=metrics["interactions"],
        user_codes="K={}, L={}".format(*codebooks["user"]),
        item_codes="K={}, L={}".format(*codebooks["item"]),
        history=json.dumps(EmbeddingStore.open(repository.parts.store).ids("item")[:2], ensure_ascii=False),
        protocol=LEAVE_ONE_OUT if metrics.get("split_at") is None else TEMPORAL.format(metrics["split_at"]),
        refit=REFIT_NOTE if metrics["refit"] else "",
        results=_results(metrics),
        codes=_codes(metrics["codes"]),
        recipe=metrics["recipe"],
        seed=metrics["seed"],
        epochs=", ".join(f"{stage} {count:g}" for stage, count in metrics["epochs"].items()),
        settings=_settings(recipe),
        popularity=f"{tested['popularity@20']:.4f}",
        coverage=f"{tested['coverage@20']:.4f}",
    )
    return f"---\n{_metadata(metrics, recipe, name).to_yaml()}\n---\n\n{text}"


def write_model_card(repository: Repository, repo_id: str | None = None) -> Path:
    """Writes the card of a finished repository to its README.md; a README without the mark of a made card stays.

    Args:
        repository: the repository.
        repo_id: as in [`model_card`].

    Returns:
        The file.
    """
    path = repository.folder / "README.md"
    if not path.is_file() or MARK in path.read_text(encoding="utf-8"):
        with atomic_write(path) as temporary:
            temporary.write_text(model_card(repository, repo_id), encoding="utf-8")
    return path


def _metadata(metrics: Mapping[str, Any], recipe: Recipe, name: str) -> ModelCardData:
    backbone, split = recipe.retrieval.backbone, "test" if metrics.get("test") else "validation"
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
    return ModelCardData(
        model_name=name.rstrip("/").split("/")[-1],
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["tokenrec", "recommendation", TASK],
        datasets=[_dataset(metrics)],
        # A local folder means nothing on the Hub.
        base_model=backbone if backbone and not Path(backbone).exists() else None,
        eval_results=results,
    )


def _dataset(metrics: Mapping[str, Any]) -> str:
    return metrics["dataset"].rstrip("/")


def _results(metrics: Mapping[str, Any]) -> str:
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    header = ["", *(f"{split} {key.upper()}" for split in splits for key in SHOWN)]
    rows = [
        [label, *(f"{metrics[split][row][key]:.4f}" for split in splits for key in SHOWN)]
        for row, label in LABELS.items()
    ]
    return _table([header, *rows])


def _codes(codes: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[f"{kind}s", *(f"{values[key]:.4f}" for key in STATISTICS)] for kind, values in codes.items()]
    return _table([["", *STATISTICS.values()], *rows])


def _settings(recipe: Recipe) -> str:
    """The most important settings, a row for each stage."""
    collaborative, retrieval = recipe.collaborative, recipe.retrieval
    rows = [
        ["collaborative model", f"{collaborative.model}, {_pairs(collaborative.config)}"],
        ["MQ-Tokenizers", _pairs(recipe.mq_tokenizer.config)],
        ["T5", f"{retrieval.backbone or 'from scratch'}, {_pairs(retrieval.config)}"],
    ]
    return _table([["stage", "settings"], *rows])


def _pairs(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
