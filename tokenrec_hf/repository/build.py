"""From interactions and a recipe to a trained repository: all stages, selection and refit (II-E1, III-A of TokenRec).

Everything is chosen on validation items in a first run on the training interactions (`training/selection` of the output
folder). The chosen lengths are then trained once more on training + validation interactions (the refit, the output folder
itself), and the test items are looked at once. A stage that is finished is not repeated; one that was interrupted goes on.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import set_seed
from transformers.dynamic_module_utils import custom_object_save

from ..data.collator import DataCollatorForGenerativeRetrieval
from ..data.splits import SPLITS, Holdout, IndexedSplits, fingerprint, index_splits
from ..evaluation.ranking import evaluate_baselines, evaluate_retrieval
from ..models.codes import read_json
from ..models.configuration_tokenrec import T5GenerativeRetrievalConfig
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import CollaborativeModel, augment_norm, load_collaborative, save_collaborative
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from ..models.pipeline_generative_retrieval import GenerativeRetrievalPipeline
from ..models.prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES
from ..models.recommender import check_repository
from ..models.tokenization_tokenrec import TokenRecTokenizer
from ..training.recipe import Recipe, load_recipe, save_recipe
from ..training.stages import SELECT_BY, train_collaborative, train_mq_tokenizer, train_retrieval
from ..training.training_data import past_user_embeddings
from .card import write_model_card

# What `half_life: auto` chooses from on validation: whether the order of a history matters.
HALF_LIVES = (None, 8)
# Vectors that codebooks for users are fit to where there are fewer users: parts of their histories are added.
USER_VECTORS = 12_000
VARIANTS = ("tokenrec", "tokenrec_user_id_only", "tokenrec_unseen_prompt", "tokenrec_history_only")


def train(
    splits: DatasetDict,
    recipe: Recipe | Mapping[str, Any],
    output_dir: str | os.PathLike,
    *,
    dataset_name: str = "custom",
    refit: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains a recommender and writes it to `output_dir`; goes on where an earlier call with the same arguments stopped.

    Args:
        splits: `train`, `validation` and `test`, as `leave_one_out` makes them.
        recipe: as `load_recipe` gives it.
        output_dir: becomes a trained repository.
        dataset_name: for the records.
        refit: train once more on training + validation interactions and evaluate on the test items. Without it the selection
            run is the result, and its test numbers, if asked for later, are those of a model that never saw the validation items.
        log: is told, in one line each, what happens.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: the folder holds a run of other settings or data, a setting is wrong, or this is one of several processes.
    """
    recipe = recipe.to_dict() if isinstance(recipe, Recipe) else Recipe.from_dict(recipe).to_dict()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "the three stages run in one process, but WORLD_SIZE says that there are "
            f"{os.environ['WORLD_SIZE']}; start `tokenrec train` without torchrun, and use examples/train_with_trainer.py to "
            "train T5 in several processes."
        )
    output = Path(output_dir)
    training = output / "training"
    training.mkdir(parents=True, exist_ok=True)
    _claim(training, splits, recipe, refit)
    _save_splits(splits, training / "interactions")
    metrics: dict[str, Any] = {
        "dataset": dataset_name,
        "recipe": recipe["recipe"],
        "seed": recipe["seed"],
        "refit": refit,
    }
    selection_folder = training / "selection" if refit else output
    chosen = _Run("selection", selection_folder, training, recipe, log)
    data = index_splits(splits, "validation")
    metrics["users"], metrics["items"] = len(data.user_ids), len(data.item_ids)
    metrics["interactions"] = sum(len(splits[name]) for name in SPLITS)
    metrics["validation"] = chosen.complete(data)
    metrics["epochs"], metrics["codes"], metrics["seconds"] = chosen.epochs, chosen.codes, {"selection": chosen.seconds}
    if refit:
        final = _Run("refit", output, training, chosen.resolved, log, epochs=chosen.epochs)
        metrics["test"] = final.complete(index_splits(splits, "test"))
        metrics["codes"] = final.codes
        metrics["seconds"]["refit"] = final.seconds
    save_recipe(chosen.resolved, output / "recipe.yaml")
    _write_json(output / "metrics.json", metrics)
    write_model_card(output)
    return metrics


def load_splits(output_dir: str | os.PathLike) -> DatasetDict:
    """The interactions that a repository was trained and evaluated on.

    Raises:
        FileNotFoundError: they are not there, for example because the repository was pulled from the Hub.
    """
    folder = Path(output_dir) / "training" / "interactions"
    missing = [name for name in SPLITS if not (folder / f"{name}.parquet").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}.parquet, so there is nothing to evaluate on; evaluate in the folder that "
            "`tokenrec train` wrote."
        )
    return DatasetDict(
        {name: Dataset.from_parquet(str(folder / f"{name}.parquet"), keep_in_memory=True) for name in SPLITS}
    )


def evaluate_repository(
    folder: Path, split: str = "test", variant: str = "tokenrec", store: EmbeddingStore | None = None
) -> dict[str, Any]:
    """Ranks all items for every user of a split; see [`Repository.evaluate`]."""
    check_repository(folder)
    splits, run = load_splits(folder), read_json(folder / "training" / "run.json")
    # With what was chosen on validation in the place of `auto`, which the recipe of the run still has.
    recipe = load_recipe(config=folder / "recipe.yaml")
    # After a refit, the model of the repository knows the validation items; the one of the selection does not.
    if split == "validation" and run["refit"]:
        if store is not None:
            raise ValueError("the store holds the vectors of the refit; evaluate it on the test items.")
        folder = folder / "training" / "selection"
    data = index_splits(splits, split)
    metrics = evaluate_baselines(data, store or EmbeddingStore.open(folder / "store"))
    metrics[variant] = evaluate_retrieval(folder, data, recipe, variant, store)
    return {"split": split, "variant": variant, "users": len(data.holdout.users), "metrics": metrics}


def build_retrieval_model(
    retrieval: Mapping[str, Any],
    tokenizer: TokenRecTokenizer,
    user_mq: MQTokenizerModel,
    item_mq: MQTokenizerModel,
    seed: int = 0,
) -> T5ForGenerativeRetrieval:
    """T5 with the tokenizer's vocabulary, from a checkpoint or from scratch, its code tokens started from the codewords.

    Args:
        retrieval: the recipe's section: `backbone` and `config`.
        tokenizer: gives the vocabulary.
        user_mq, item_mq: give the codewords.
        seed: of the fresh weights.

    Raises:
        ValueError: the backbone is neither a folder nor to be had from the Hub, or `user_shortcut` without residual codebooks.
    """
    set_seed(seed)
    own: dict[str, Any] = {
        "embedding_dim": item_mq.config.embedding_dim,
        "space_ids": tokenizer.space_ids,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    backbone = retrieval["backbone"]
    if retrieval["config"].get("user_shortcut"):
        places = tokenizer.code_token_ids("user")
        own["user_code_tokens"] = [int(places.min()), int(places.max()) + 1]
    if backbone is None:
        config = T5GenerativeRetrievalConfig(vocab_size=len(tokenizer), **{**retrieval["config"], **own})
        model = T5ForGenerativeRetrieval(config)
    else:
        try:
            model = T5ForGenerativeRetrieval.from_backbone(backbone, **{**retrieval["config"], **own})
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the backbone {backbone!r} is no folder here and could not be fetched from the Hub ({reason}); connect, give the "
                "folder of a T5 checkpoint as retrieval.backbone, or train from scratch with --recipe cpu."
            ) from None
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = min(int(tokenizer.code_token_ids(kind).min()) for kind in ("user", "item"))
    for kind, mq in (("user", user_mq), ("item", item_mq)):
        ids = torch.from_numpy(tokenizer.code_token_ids(kind))
        model.initialize_code_tokens(ids, mq.codebooks, first, seed + (kind == "item"), residual=mq.config.residual)
    if model.config.user_shortcut:
        model.start_user_shortcut(user_mq.summands())
    return model


def build_collator(
    tokenizer: TokenRecTokenizer, data: IndexedSplits, recipe: Mapping[str, Any], **changes
) -> DataCollatorForGenerativeRetrieval:
    """The collator that a recipe describes; `changes` replace single arguments."""
    config, negatives = recipe["retrieval"]["config"], recipe["retrieval"]["num_negatives"]
    prompts = recipe["prompts"]
    full_softmax = config["loss_type"] == "softmax" and not negatives
    if config["loss_type"] == "cosine_ranking":
        negatives = prompts["targets_per_prompt"]  # Eq. 20: one for each positive
    settings = {
        "num_negatives": negatives,
        "with_seen_items": full_softmax,
        "seed": recipe["seed"],
        **prompts,
        **changes,
    }
    return DataCollatorForGenerativeRetrieval(tokenizer, data.interactions, data.user_ids, data.item_ids, **settings)


class _Run:
    """One pass over the stages, in a folder that becomes a trained repository.

    Finished stages are recorded in `training/<name>.json`, written last; their models are then read from the folder.
    """

    def __init__(self, name, folder: Path, training: Path, recipe, log, epochs: Mapping[str, float] | None = None):
        self.name, self.folder, self.recipe, self.log = name, folder, recipe, log
        self.fixed_epochs = epochs
        is_auto = recipe["collaborative"]["config"].get("half_life") == "auto"
        self.half_lives = HALF_LIVES if is_auto else ()
        self.checkpoints = training / "checkpoints" / name
        self.record_path = training / f"{name}.json"
        self.record = json.loads(self.record_path.read_text()) if self.record_path.is_file() else {}

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs that gave the best validation result, of the stages that are selected."""
        return {name: entry["epochs"] for name, entry in self.record.items() if "epochs" in entry}

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe with what was chosen on validation in the place of `auto`."""
        recipe = copy.deepcopy(dict(self.recipe))
        config, prompts = recipe["collaborative"]["config"], recipe["prompts"]
        if config.get("half_life") == "auto":
            config["half_life"] = self.record["collaborative"]["half_life"]
        if prompts["shuffle_history"] == "auto":
            prompts["shuffle_history"] = config.get("half_life") is None
        if prompts["max_history"] == "auto":
            # What is older than a few half-lives says nothing, but has to be read.
            prompts["max_history"] = 100 if config.get("half_life") is None else round(4 * config["half_life"])
        return recipe

    @property
    def codes(self) -> dict[str, dict[str, float]]:
        """Statistics of the users' and the items' codes."""
        return {kind: self.record[f"mq_{kind}"]["metrics"] for kind in ("user", "item")}

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each stage."""
        return {name: entry["seconds"] for name, entry in self.record.items()}

    def complete(self, data: IndexedSplits) -> dict[str, dict[str, float]]:
        """Runs what is not finished and returns the results on the held-out items."""
        self.folder.mkdir(parents=True, exist_ok=True)
        holdout = None if self.fixed_epochs else data.holdout
        self._collaborative_stages(data, holdout)
        store = self._store(data)
        for kind in ("user", "item"):
            self._stage(f"mq_{kind}", partial(self._mq_tokenizer, data, store, kind))
        self._stage("retrieval", lambda at: self._retrieval(data, holdout, store, at))
        self._stage("evaluation", lambda at: self._evaluate(data))
        return self.record["evaluation"]["metrics"]

    def _stage(self, name: str, run: Callable[[Path], Mapping[str, Any]]) -> None:
        if name in self.record:
            self.log(f"{self.name}: {name} is finished already")
            return
        started = time.monotonic()
        checkpoints = self.checkpoints / name
        outcome = dict(run(checkpoints))
        outcome["seconds"] = round(time.monotonic() - started, 1)
        self.record[name] = outcome
        _write_json(self.record_path, self.record)
        shutil.rmtree(checkpoints, ignore_errors=True)
        self.log(f"{self.name}: {name} took {outcome['seconds']:.0f} s")

    def _collaborative_stages(self, data: IndexedSplits, holdout: Holdout | None) -> None:
        """Trains the collaborative model, or one for each half-life to choose from."""
        if not self.half_lives:
            self._stage("collaborative", partial(self._collaborative, data, holdout, {}))
            return
        for half_life in self.half_lives:
            self._stage(f"half_life_{half_life}", partial(self._collaborative, data, holdout, {"half_life": half_life}))
        # Its model is the one that was kept.
        chosen = self._chosen(len(data.holdout.users))
        assert chosen is not None
        self.record.setdefault("collaborative", {**chosen, "seconds": 0.0})

    def _chosen(self, num_users: int) -> Mapping[str, Any] | None:
        """The outcome of the half-life to take, of those tried so far: the first one that none after it clearly beats."""
        chosen = None
        for half_life in self.half_lives:
            entry = self.record.get(f"half_life_{half_life}")
            if entry is not None and (chosen is None or _clearly_better(entry, chosen, num_users)):
                chosen = entry
        return chosen

    def _collaborative(self, data, holdout, config, checkpoints):
        settings = self.recipe["collaborative"]
        settings = {**settings, "config": {**settings["config"], **config}}
        result = train_collaborative(
            data.interactions,
            settings,
            checkpoints,
            holdout=holdout,
            epochs=(self.fixed_epochs or {}).get("collaborative"),
            seed=self.recipe["seed"],
        )
        users, items = (
            [ids[row] for row in rows]
            for ids, rows in ((data.user_ids, data.interactions.users), (data.item_ids, data.interactions.items))
        )
        # What was really trained on, for the audit: matrix factorisation itself does not tell.
        outcome = {
            "epochs": result.epochs,
            "metrics": result.metrics,
            **config,
            "trained_on": fingerprint(users, items),
        }
        count = len(data.holdout.users)
        former = self._chosen(count)
        if former is None or _clearly_better(outcome, former, count):
            self._save_collaborative(result.model, data)
        return outcome

    def _save_collaborative(self, model: CollaborativeModel, data: IndexedSplits) -> None:
        # The model knows rows; whoever goes on training it must know whose they are.
        save_collaborative(model, {"user": data.user_ids, "item": data.item_ids}, self.folder / "collaborative")
        # Remote code is looked for in the root, even when a model in a subfolder is loaded.
        custom_object_save(model, self.folder)

    def _store(self, data: IndexedSplits) -> EmbeddingStore:
        """The store of the collaborative vectors and the items that users have seen, made anew from the model."""
        model, _ = load_collaborative(self.folder / "collaborative")
        users, items = model.user_embeddings(), model.item_embeddings()
        if self.recipe["collaborative"]["augment_norm"]:
            users, items = augment_norm(users, items)
        store = EmbeddingStore(items.shape[1])
        store.upsert("user", data.user_ids, users)
        store.upsert("item", data.item_ids, items)
        indptr = data.interactions.indptr
        names = np.array(data.item_ids, dtype=object)[data.interactions.items]
        store.set_seen(data.user_ids, [names[a:b] for a, b in zip(indptr, indptr[1:])])
        return store

    def _mq_tokenizer(self, data, store, kind, checkpoints):
        seed = self.recipe["seed"] + (kind == "item")
        vectors, settings = store.vectors(kind), self.recipe["mq_tokenizer"]
        parts = None
        if kind == "user":
            if settings["user_codebooks"] is not None:
                settings = {**settings, "config": {**settings["config"], "num_codebooks": settings["user_codebooks"]}}
            copies = USER_VECTORS // max(len(vectors), 1) - 1
            model, _ = load_collaborative(self.folder / "collaborative")
            if model.users_are_histories and copies > 0:
                parts = past_user_embeddings(model, data.interactions, copies, self.recipe["seed"])
        result = train_mq_tokenizer(
            vectors, settings, checkpoints, others=parts, name=f"{kind} MQ-Tokenizer", seed=seed
        )
        result.model.save_pretrained(self.folder / f"mq_{kind}")
        return {"metrics": result.model.statistics(vectors)}

    def _retrieval(self, data, holdout, store, checkpoints):
        mqs = {kind: MQTokenizerModel.from_pretrained(self.folder / f"mq_{kind}") for kind in ("user", "item")}
        store.space_ids = {kind: mq.space_id for kind, mq in mqs.items()}
        section = self.recipe["retrieval"]
        vocabulary = section["vocabulary"] or section["backbone"]
        tokenizer = TokenRecTokenizer.from_components(vocabulary, user_mq=mqs["user"], item_mq=mqs["item"], store=store)
        model = build_retrieval_model(section, tokenizer, mqs["user"], mqs["item"], seed=self.recipe["seed"])
        model.bind_items(store.vectors("item"))
        pasts: dict[str, Any] = {}
        collaborative, _ = load_collaborative(self.folder / "collaborative")
        if collaborative.users_are_histories:
            pasts = {"pool_history": collaborative.history_vectors, "user_mq": mqs["user"]}
        if model.config.alignment_weight:
            pasts["user_vectors"] = store.vectors("user")
        if self.recipe["prompts"]["history_only"]:
            # The length is chosen for both kinds of prompts; those that name no user are the harder ones.
            pasts["evaluation_templates"] = (HISTORY_TEMPLATES[0], HISTORY_ONLY_TEMPLATE)
        result = train_retrieval(
            model,
            build_collator(tokenizer, data, self.resolved, **pasts),
            section,
            checkpoints,
            holdout=holdout,
            epochs=(self.fixed_epochs or {}).get("retrieval"),
            seed=self.recipe["seed"],
        )
        GenerativeRetrievalPipeline(result.model, tokenizer, store).save_pretrained(self.folder)
        return {"epochs": result.epochs, "metrics": result.metrics}

    def _evaluate(self, data: IndexedSplits) -> dict[str, Any]:
        results = evaluate_baselines(data, EmbeddingStore.open(self.folder / "store"))
        results |= {variant: evaluate_retrieval(self.folder, data, self.resolved, variant) for variant in VARIANTS}
        return {"metrics": results}


def _clearly_better(outcome: Mapping[str, Any], former: Mapping[str, Any], num_users: int) -> bool:
    """Whether a collaborative model is better than a simpler one by more than a standard error.

    That of a mean m of n numbers from 0 to 1 is sqrt(m (1 - m) / n) at most.
    """
    new, old = (one["metrics"][SELECT_BY] for one in (outcome, former))
    return new - old > math.sqrt(old * (1 - old) / num_users)


def _claim(training: Path, splits: DatasetDict, recipe: Mapping[str, Any], refit: bool) -> None:
    """Ties the folder to these data and settings, so that stages of two different runs are never mixed."""
    data = fingerprint(*(splits[name][column][:] for name in SPLITS for column in ("user_id", "item_id")))
    mine = {"data": data, "refit": refit, "recipe": json.loads(json.dumps(dict(recipe)))}
    path = training / "run.json"
    if not path.is_file():
        _write_json(path, mine)
        return
    theirs = json.loads(path.read_text())
    if theirs != mine:
        difference = _first_difference(theirs, mine)
        raise ValueError(
            f"{training.parent} holds a run with {difference}; give another --output_dir, or delete this one to start over."
        )


def _first_difference(theirs: Any, mine: Any, place: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *mine]:
            if theirs.get(key) != mine.get(key):
                return _first_difference(theirs.get(key), mine.get(key), f"{place}.{key}" if place else key)
    return f"{place} = {theirs!r} where this one has {mine!r}"


def _save_splits(splits: DatasetDict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        path = folder / f"{name}.parquet"
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            splits[name].to_parquet(str(temporary))
            os.replace(temporary, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
