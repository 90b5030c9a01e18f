"""A trained repository beside baselines on the same test items, with bootstrap intervals of the differences.

Every method is tuned on the validation items and trained again on training + validation interactions, as TokenRec is, and ranks
all items that a user has not seen (section III-A of TokenRec, arXiv 2406.10450).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict

from ..data.splits import IndexedSplits, index_splits
from ..evaluation.baselines import BASELINES, baseline_ranks, best_settings
from ..evaluation.metrics import embedding_ranks, ndcg, user_ndcg
from ..evaluation.ranking import retrieval_queries
from ..evaluation.sequence import SASRec
from ..evaluation.variants import COMPARED
from ..models.codes import atomic_write, check_repository
from ..models.recommender import Recommender
from ..training.recipe import Recipe
from ..training.stages import train_collaborative
from .repository import COMPARISON, Repository

RESAMPLES, LEVEL = 1000, 0.95
# Resamples that are drawn at once.
CHUNK = 50
# EASE inverts a matrix of items by items; 20,000 items are 5 GB and minutes.
MOST_ITEMS = 20_000


def compare(
    splits: DatasetDict,
    repository: Repository | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compares popularity, ItemKNN, EASE, iALS, LightGCN and SASRec with each other, and with a trained repository.

    EASE is left out of large catalogues, and iALS where `implicit` is not installed.

    Args:
        splits: of [`leave_one_out`] or [`temporal_split`]; for a repository, its own.
        repository: a finished repository of these splits, which keeps the result in `training/comparison.json`.
        seed: seed of the bootstrap.
        log: receives a line about each method.

    Returns:
        The number of test `users`, the `reference`, and for each of `methods`: its `name`, the `settings` that were chosen, `hr@20`,
        `ndcg@20`, and for both the `difference` to the reference with its 95 % interval as `[mean, low, high]`. The reference
        is TokenRec, or without a repository the baseline with the best NDCG@20.
    """
    validation, test = (index_splits(splits, name) for name in ("validation", "test"))
    ranks, settings = {}, {}
    for name, kind in BASELINES.items():
        if name == "ease" and len(test.item_ids) > MOST_ITEMS:
            log(f"EASE is left out: {len(test.item_ids)} items are more than {MOST_ITEMS}")
        elif name == "ials" and find_spec("implicit") is None:
            log('iALS is left out: it needs pip install "tokenrec-hf[compare]"')
        else:
            log(f"fitting {COMPARED[name]}")
            settings[name] = best_settings(kind, validation)
            ranks[name] = baseline_ranks(kind(test.interactions, **settings[name]), test.interactions, test.holdout)
    for name, fit in {"lightgcn": _lightgcn, "sasrec": _sasrec}.items():
        log(f"fitting {COMPARED[name]}")
        settings[name], ranks[name] = fit(validation, test)
    if repository is not None:
        if not repository.metrics["refit"]:
            log("there was no refit: the baselines have learned from the validation items, and TokenRec has not")
        log("ranking with TokenRec")
        ranks |= _repository_ranks(repository, test)
    values = {
        name: {"hr@20": (own < 20).double().numpy(), "ndcg@20": user_ndcg(own, 20).numpy()}
        for name, own in ranks.items()
    }
    reference = "tokenrec" if repository is not None else max(values, key=lambda name: values[name]["ndcg@20"].mean())
    methods = [
        {
            "name": name,
            "settings": settings.get(name, {}),
            **{metric: float(one.mean()) for metric, one in own.items()},
            "difference": None
            if name == reference
            else {metric: bootstrap(one - values[reference][metric], seed) for metric, one in own.items()},
        }
        for name, own in values.items()
    ]
    result = {"users": len(test.holdout.users), "reference": reference, "methods": methods}
    if repository is not None:
        with atomic_write(repository.record(COMPARISON)) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def bootstrap(values: np.ndarray, seed: int = 0) -> list[float]:
    """The mean of a value of each user, `[U]`, and its 95 % interval by 1,000 resamples of the users: `[mean, low, high]`."""
    random = np.random.default_rng(seed)
    draws = (random.integers(0, len(values), (CHUNK, len(values))) for _ in range(RESAMPLES // CHUNK))
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in draws])
    return [float(values.mean()), *np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()]


def _lightgcn(validation: IndexedSplits, test: IndexedSplits) -> tuple[dict[str, float], torch.Tensor]:
    """The epochs of the best validation result, of recipe `paper`'s LightGCN, and the ranks of the test items."""
    settings = Recipe.load("paper").collaborative
    with tempfile.TemporaryDirectory() as folder:
        selection, refit = Path(folder, "selection"), Path(folder, "refit")
        chosen = train_collaborative(validation.interactions, settings, selection, holdout=validation.holdout)
        model = train_collaborative(test.interactions, settings, refit, epochs=chosen.epochs).model
    users, seen = test.holdout.users, test.interactions.of_users(test.holdout.users)
    vectors = model.user_embeddings()[users], model.item_embeddings()
    return {"epochs": chosen.epochs}, embedding_ranks(*vectors, test.holdout.targets, *seen, cosine=False)


def _sasrec(validation: IndexedSplits, test: IndexedSplits) -> tuple[dict[str, float], torch.Tensor]:
    """The settings and epochs of the best validation result of SASRec, and the ranks of the test items."""
    tried = []
    for settings in SASRec.grid:
        model = SASRec(**settings)
        model.fit(validation.interactions, validation.holdout)
        value = ndcg(baseline_ranks(model, validation.interactions, validation.holdout), 20)
        tried.append((value, settings, model.epochs))
    _, settings, epochs = max(tried, key=lambda one: one[0])
    model = SASRec(**settings)
    model.fit(test.interactions, None, epochs)
    return {**settings, "epochs": epochs}, baseline_ranks(model, test.interactions, test.holdout)


def _repository_ranks(repository: Repository, data: IndexedSplits) -> dict[str, torch.Tensor]:
    """The ranks of the held-out items by the collaborative vectors and by T5."""
    check_repository(repository.folder)
    recipe, store = repository.recipe, Recommender.from_pretrained(repository.folder).store
    items = store.get("item", data.item_ids)
    queries = {
        "collaborative_cosine": store.get("user", [data.user_ids[row] for row in data.holdout.users]),
        "tokenrec": retrieval_queries(
            repository.folder,
            data,
            recipe.collator_arguments,
            batch_size=recipe.retrieval.training["per_device_eval_batch_size"],
        )["tokenrec"],
    }
    seen = data.interactions.of_users(data.holdout.users)
    return {
        name: embedding_ranks(own, items, data.holdout.targets, *seen, cosine=True) for name, own in queries.items()
    }
