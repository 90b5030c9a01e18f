"""From interactions and a recipe to a trained repository: all stages, selection and refit (II-E1, III-A of TokenRec).

The selection run trains on the training interactions and chooses all lengths on the validation items (`training/selection` of
the output folder). The refit trains for the chosen lengths on training + validation interactions (the output folder itself)
and is evaluated once on the test items. A finished stage is not repeated; an interrupted stage resumes from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import DatasetDict
from transformers.dynamic_module_utils import custom_object_save

from ..data.collator import DataCollatorForGenerativeRetrieval
from ..data.splits import SPLITS, Holdout, IndexedSplits, fingerprint, index_splits
from ..evaluation.ranking import evaluate_baselines, evaluate_retrieval
from ..evaluation.variants import VARIANTS
from ..models.codes import (
    COLLABORATIVE,
    CONTENT,
    MQ_FOLDERS,
    WITH_USERS,
    IdIndex,
    RepositoryFolder,
    atomic_write,
    read_json,
)
from ..models.embedding_store import EmbeddingStore, check_metadata
from ..models.modeling_collaborative import (
    COLLABORATIVE_MODELS,
    CollaborativeModel,
    load_collaborative,
    save_collaborative,
)
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.pipeline_generative_retrieval import GenerativeRetrievalPipeline
from ..models.tokenization_tokenrec import TokenRecTokenizer, check_names
from ..training.datasets import past_user_embeddings
from ..training.initialization import build_retrieval_model, build_tokenizer, load_t5_tokenizer, retrieval_store
from ..training.recipe import AUTO, CollaborativeSettings, Recipe, Setting
from ..training.stages import (
    StageResult,
    fixed_collaborative,
    held_out_ndcg,
    is_clear,
    train_collaborative,
    train_mq_tokenizer,
    train_retrieval,
)
from .card import write_model_card
from .repository import EVALUATION, REFIT, RETRIEVAL, SELECTION, Repository, exclusive, make_readable, space_named
from .update import NewVectors

# The choices of `half_life: auto`, made on validation: whether the order of a history matters.
HALF_LIVES = (None, 8)
# Where users are histories, vectors of partial histories complete the users' vectors to this number for the k-means.
USER_VECTORS = 12_000
# The measurements of a stage, by name.
Outcome = dict[str, Any]


def train(
    splits: DatasetDict,
    recipe: Recipe,
    output_dir: str | os.PathLike,
    *,
    dataset_name: str = "custom",
    reading: Mapping[str, Any] | None = None,
    split_at: str | None = None,
    item_vectors: NewVectors | None = None,
    refit: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> Repository:
    """Trains a recommender and writes it to `output_dir`; continues an earlier call with the same arguments.

    Args:
        splits: `train`, `validation` and `test`, as `leave_one_out` or `temporal_split` returns them.
        recipe: all settings.
        output_dir: becomes a trained repository.
        dataset_name: for the records.
        reading: options of `load_interactions`, to be recorded for further interactions.
        split_at: `at` of `temporal_split`, to be recorded for the audit; None after `leave_one_out`.
        item_vectors: vectors of all items, in place of a trained collaborative model; further items are added as cold-start items.
            The recipe's model must be FISM, so that users are histories.
        refit: train once more on training + validation interactions and evaluate on the test items. Without it the selection
            run is the result; its test metrics are those of a model that has not been trained on the validation items.
        log: receives a line about each step.

    Returns:
        The repository; its `metrics` are the measurements.

    Raises:
        ValueError: nothing can be learned from the data, see [`check_trainable`], the folder holds a run of other settings or
            data, another process is changing it, or this is one of several processes.
        OSError: the disk is full; the same call continues where it stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "the three stages run in one process, but WORLD_SIZE says that there are "
            f"{os.environ['WORLD_SIZE']}; start `tokenrec train` without torchrun, and use examples/train_with_trainer.py to "
            "train T5 in several processes."
        )
    data = index_splits(splits, "validation")
    check_trainable(data)
    vectors = None if item_vectors is None else _vectors_of(item_vectors, data.item_ids, recipe)
    if item_vectors is not None and item_vectors.metadata is not None:
        check_metadata(item_vectors.metadata, len(item_vectors.ids))
    parts = RepositoryFolder(output_dir)
    if parts.path.is_file():
        raise ValueError(f"{output_dir} is a file; give a folder to write.")
    if not parts.training.is_dir():
        others = [path for pattern in (*CONTENT, *WITH_USERS) for path in parts.path.glob(pattern)]
        if name := next((path.relative_to(parts.path) for path in sorted(others) if path.name != "README.md"), None):
            raise ValueError(
                f"{output_dir} holds {name}, which would be taken for a part of the repository; give a new folder."
            )
        # A backbone that cannot be fetched should not be found after the first stages.
        load_t5_tokenizer(recipe.retrieval.vocabulary or recipe.retrieval.backbone)
    parts.training.mkdir(parents=True, exist_ok=True)
    repository = Repository(output_dir)
    with space_named(repository.folder, "finished stages are kept"), exclusive(repository.folder):
        _claim(repository, splits, recipe, refit, vectors)
        repository.sweep()
        _save_splits(repository, splits)
        place = repository.selection if refit else repository.folder
        selection = _TrainingRun(repository, SELECTION, place, recipe, log, item_vectors=vectors)
        validation = selection.complete(data)
        metrics: dict[str, Any] = {
            "dataset": dataset_name,
            "reading": dict(reading or {}),
            "split_at": split_at,
            "recipe": recipe.recipe,
            "seed": recipe.seed,
            "refit": refit,
            "users": len(data.user_ids),
            "items": len(data.item_ids),
            "interactions": sum(len(splits[name]) for name in SPLITS),
            "evaluated_users": len(data.holdout.users),
            "users_are_histories": COLLABORATIVE_MODELS[recipe.collaborative.model].users_are_histories,
            "validation": validation,
            "epochs": selection.epochs,
            "curves": selection.curves,
            "codes": selection.codes,
            "seconds": {SELECTION: selection.seconds},
        }
        if refit:
            final = _TrainingRun(
                repository,
                REFIT,
                repository.folder,
                selection.resolved,
                log,
                epochs=selection.epochs,
                item_vectors=vectors,
            )
            metrics["test"] = final.complete(index_splits(splits, "test"))
            metrics["codes"] = final.codes
            metrics["seconds"][REFIT] = final.seconds
        selection.resolved.save(repository.parts.recipe)
        _write_json(repository.parts.metrics, metrics)
        write_model_card(repository)
    if item_vectors is not None:
        _add_given(repository, item_vectors)
    return repository


def check_trainable(data: IndexedSplits) -> None:
    """Refuses data that no stage could learn from, before the first one begins.

    Raises:
        ValueError: an id begins like a code token, or no user has two interactions for training.
    """
    check_names("user", data.user_ids)
    check_names("item", data.item_ids)
    if data.interactions.lengths.max(initial=0) < 2:
        raise ValueError(
            "no user has two interactions to train on, besides those that are held out; there must be users with four or more."
        )


def build_collator(
    tokenizer: TokenRecTokenizer, data: IndexedSplits, recipe: Recipe, **changes: Any
) -> DataCollatorForGenerativeRetrieval:
    """The training collator of a recipe without `auto`; `changes` replace single arguments."""
    negatives = recipe.retrieval.negatives(data.interactions.num_items)
    if recipe.retrieval.loss_type == "cosine_ranking":
        negatives = 1  # of Eq. 20
    settings = {
        "num_negatives": negatives,
        "next_items": recipe.reads_history,
        **recipe.collator_arguments,
        **changes,
    }
    return DataCollatorForGenerativeRetrieval(tokenizer, data.interactions, data.user_ids, data.item_ids, **settings)


class _TrainingRun:
    """One pass over the stages, in a folder that becomes a trained repository.

    Finished stages are recorded in `training/<name>.json`, written last; their models are then read from the folder.

    Args:
        repository: the repository of both runs.
        name: `SELECTION` or `REFIT`.
        folder: for the models, the tokenizer and the store of the run.
        recipe: all settings.
        log: receives a line about each stage.
        epochs: the lengths of the stages; without them they are chosen on the held-out items.
        item_vectors: see [`train`]; in the order of the item rows, `[num_items, d]`.
    """

    def __init__(
        self,
        repository: Repository,
        name: str,
        folder: Path,
        recipe: Recipe,
        log: Callable[[str], None],
        epochs: Mapping[str, float] | None = None,
        item_vectors: torch.Tensor | None = None,
    ):
        self.item_vectors = item_vectors
        self.name, self.parts, self.recipe, self.log = name, RepositoryFolder(folder), recipe, log
        self.fixed_epochs = epochs
        self.checkpoints = repository.parts.training / "checkpoints" / name
        self.record_path = repository.record(name)
        self.record: dict[str, Outcome] = read_json(self.record_path) if self.record_path.is_file() else {}

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of the best validation result, of the selected stages."""
        return {name: outcome["epochs"] for name, outcome in self.record.items() if "epochs" in outcome}

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """NDCG@20 on the validation items by epoch, of the selected stages."""
        return {name: outcome["curve"] for name, outcome in self.record.items() if outcome.get("curve")}

    @property
    def resolved(self) -> Recipe:
        """The recipe with the values chosen on validation in place of `auto`."""
        half_life, prompts, changes = self.recipe.collaborative.config.get("half_life"), self.recipe.prompts, {}
        if half_life == AUTO:
            half_life = self.record[COLLABORATIVE]["half_life"] if self.recipe.collaborative.chooses_half_life else None
            changes["collaborative.config.half_life"] = half_life
        if prompts.shuffle_history == AUTO:
            changes["prompts.shuffle_history"] = half_life is None
        if self.recipe.retrieval.config.get("history_weight") == AUTO and RETRIEVAL in self.record:
            changes["retrieval.config.history_weight"] = self.record[RETRIEVAL]["metrics"]["history_weight"]
        return self.recipe.changed(**changes)

    @property
    def codes(self) -> dict[str, dict[str, float]]:
        """Statistics of the users' and the items' codes."""
        return {kind: self.record[stage]["metrics"] for kind, stage in MQ_FOLDERS.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each stage."""
        return {name: outcome["seconds"] for name, outcome in self.record.items()}

    def complete(self, data: IndexedSplits) -> dict[str, dict[str, float]]:
        """Runs the unfinished stages and returns the metrics on the held-out items."""
        if EVALUATION in self.record:
            # The files of a finished run may hold further users and items by now.
            self.log(f"{self.name} is finished already")
            return self.record[EVALUATION]["metrics"]
        self.parts.path.mkdir(parents=True, exist_ok=True)
        holdout = None if self.fixed_epochs else data.holdout
        self._stage(COLLABORATIVE, partial(self._collaborative, data, holdout))
        store = self._store(data)
        for kind, stage in MQ_FOLDERS.items():
            self._stage(stage, partial(self._mq_tokenizer, data, store, kind))
        self._stage(RETRIEVAL, partial(self._retrieval, data, holdout, store))
        self._stage(EVALUATION, lambda checkpoints: self._evaluate(data))
        return self.record[EVALUATION]["metrics"]

    def _stage(self, name: str, run: Callable[[Path], Outcome]) -> None:
        checkpoints = self.checkpoints / name
        if name in self.record:
            self.log(f"{self.name}: {name} is finished already")
        else:
            started = time.monotonic()
            outcome = run(checkpoints)
            make_readable(self.parts.path)
            outcome["seconds"] = round(time.monotonic() - started, 1)
            self.record[name] = outcome
            _write_json(self.record_path, self.record)
            self.log(f"{self.name}: {name} took {outcome['seconds']:.0f} s")
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _vectors(
        self, data: IndexedSplits, settings: CollaborativeSettings, holdout: Holdout | None, checkpoints: Path
    ) -> StageResult[CollaborativeModel]:
        """The trained collaborative model, or that of given vectors."""
        if self.item_vectors is not None:
            return fixed_collaborative(data.interactions, settings, self.item_vectors, holdout)
        return train_collaborative(
            data.interactions,
            settings,
            checkpoints,
            holdout=holdout,
            epochs=(self.fixed_epochs or {}).get(COLLABORATIVE),
            seed=self.recipe.seed,
        )

    def _best_half_life(
        self, data: IndexedSplits, checkpoints: Path
    ) -> tuple[StageResult[CollaborativeModel], float | None]:
        """The vectors with each half-life: the first that no later one is clearly better than on validation."""
        settings, chosen, best = self.recipe.collaborative, HALF_LIVES[0], None
        for half_life in HALF_LIVES:
            own = settings.model_copy(update={"config": {**settings.config, "half_life": half_life}})
            result = self._vectors(data, own, data.holdout, checkpoints / str(half_life))
            ndcg = held_out_ndcg(result.model, data.interactions, data.holdout)  # [users]
            if best is None or is_clear(ndcg - best):
                chosen, best, kept = half_life, ndcg, result
        return kept, chosen

    def _collaborative(self, data: IndexedSplits, holdout: Holdout | None, checkpoints: Path) -> Outcome:
        settings, choice = self.recipe.collaborative, {}
        if settings.chooses_half_life:
            result, choice["half_life"] = self._best_half_life(data, checkpoints)
        else:
            result = self._vectors(data, settings, holdout, checkpoints)
        users, items = (
            [ids[row] for row in rows]
            for ids, rows in ((data.user_ids, data.interactions.users), (data.item_ids, data.interactions.items))
        )
        outcome = {
            "epochs": result.epochs,
            "metrics": result.metrics,
            "curve": result.curve,
            **choice,
            # For the audit: matrix factorisation keeps no interactions.
            "trained_on": fingerprint(users, items),
        }
        ids = {"user": data.user_ids, "item": data.item_ids}
        save_collaborative(result.model, ids, self.parts.collaborative)
        # transformers looks for remote code in the root, even when it loads a model from a subfolder.
        custom_object_save(result.model, self.parts.path)
        return outcome

    def _store(self, data: IndexedSplits) -> EmbeddingStore:
        """The store of the collaborative vectors, computed from the collaborative model."""
        model = load_collaborative(self.parts.collaborative)[0]
        users, items = model.user_embeddings(), model.item_embeddings()
        store = EmbeddingStore(items.shape[1])
        store.upsert("user", data.user_ids, users)
        store.upsert("item", data.item_ids, items)
        return store

    def _mq_tokenizer(self, data: IndexedSplits, store: EmbeddingStore, kind: str, checkpoints: Path) -> Outcome:
        vectors, others = store.vectors(kind), None
        copies = USER_VECTORS // max(len(vectors), 1) - 1
        if kind == "user" and copies > 0:
            model = load_collaborative(self.parts.collaborative)[0]
            if model.users_are_histories:
                others = past_user_embeddings(model, data.interactions, copies, self.recipe.seed)
        result = train_mq_tokenizer(
            vectors,
            self.recipe.mq_tokenizer,
            checkpoints,
            kind=kind,
            others=others,
            seed=self.recipe.seed + (kind == "item"),
        )
        result.model.save_pretrained(self.parts.mq(kind))
        return {"metrics": result.model.statistics(vectors)}

    def _retrieval(
        self, data: IndexedSplits, holdout: Holdout | None, store: EmbeddingStore, checkpoints: Path
    ) -> Outcome:
        user_mq, item_mq = (MQTokenizerModel.from_pretrained(self.parts.mq(kind)) for kind in MQ_FOLDERS)
        store.space_ids = {"user": user_mq.space_id, "item": item_mq.space_id}
        settings = self.recipe.retrieval
        tokenizer = build_tokenizer(
            settings.vocabulary or settings.backbone,
            user_mq=user_mq,
            item_mq=item_mq,
            store=store,
            model_max_length=self.recipe.prompts.max_length,
        )
        model = build_retrieval_model(settings, tokenizer, user_mq, item_mq, seed=self.recipe.seed)
        model.bind_items(store.vectors("item"), tokenizer.item_tokens(data.item_ids))
        result = train_retrieval(
            model,
            build_collator(tokenizer, data, self.resolved),
            settings,
            checkpoints,
            holdout=holdout,
            epochs=(self.fixed_epochs or {}).get(RETRIEVAL),
            seed=self.recipe.seed,
        )
        model.config.history_weight = result.metrics.get("history_weight", model.config.history_weight)
        final = retrieval_store(store, model, tokenizer)
        indptr = data.interactions.indptr
        names = np.array(data.item_ids, dtype=object)[data.interactions.items]
        final.set_seen(data.user_ids, [names[start:end] for start, end in zip(indptr, indptr[1:])])
        GenerativeRetrievalPipeline(result.model, tokenizer, final).save_pretrained(self.parts.path)
        return {"epochs": result.epochs, "metrics": result.metrics, "curve": result.curve}

    def _evaluate(self, data: IndexedSplits) -> Outcome:
        store = EmbeddingStore.open(self.parts.store)
        batch_size = self.recipe.retrieval.training["per_device_eval_batch_size"]
        prompts = self.resolved.collator_arguments
        results = evaluate_retrieval(self.parts.path, data, prompts, list(VARIANTS), store, batch_size)
        return {"metrics": evaluate_baselines(data, store) | results}


def _vectors_of(given: NewVectors, item_ids: list[str], recipe: Recipe) -> torch.Tensor:
    """The given vectors of items, in their order, `[num_items, d]`."""
    if not COLLABORATIVE_MODELS[recipe.collaborative.model].users_are_histories:
        raise ValueError(
            f"item vectors replace FISM, but the recipe's model is {recipe.collaborative.model}; take the recipe best."
        )
    rows = IdIndex(given.ids, "item").rows(item_ids)
    if (rows < 0).any():
        raise ValueError(
            f"{(rows < 0).sum()} of {len(rows)} items have no vector, such as {item_ids[int(np.argmin(rows))]!r}; give vectors of "
            "all items."
        )
    return torch.as_tensor(given.vectors)[torch.from_numpy(rows)].float()


def _add_given(repository: Repository, given: NewVectors) -> None:
    """Adds the items with vectors and without interactions, and the metadata of all, unless an earlier call has."""
    store = EmbeddingStore.open(repository.parts.store)
    known = store.contains("item", list(given.ids))
    described = given.metadata is not None and not any(store.metadata(list(compress(given.ids, known))))
    if not known.all() or described:
        vectors = F.normalize(torch.as_tensor(given.vectors)[torch.from_numpy(~known)].float(), dim=1)
        new = None if known.all() else NewVectors(list(compress(given.ids, ~known)), vectors)
        repository.add(items=new, metadata=dict(zip(given.ids, given.metadata or ())))


def _claim(
    repository: Repository, splits: DatasetDict, recipe: Recipe, refit: bool, item_vectors: torch.Tensor | None
) -> None:
    """Ties the folder to these data and settings, so that it never mixes stages of different trainings."""
    data = fingerprint(*(splits[name][column] for name in SPLITS for column in ("user_id", "item_id")))
    mine = json.loads(json.dumps({"data": data, "refit": refit, "recipe": recipe.to_dict()}))
    if item_vectors is not None:
        mine["item_vectors"] = hashlib.sha256(item_vectors.numpy().tobytes()).hexdigest()[:16]
    path = repository.record("run")
    if not path.is_file():
        _write_json(path, mine)
    elif (theirs := read_json(path)) != mine:
        raise ValueError(
            f"{repository.folder} holds a run with {_first_difference(theirs, mine)}; give another --output-dir, or delete this "
            "one to start over."
        )


def _first_difference(theirs: Setting, mine: Setting, place: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *mine]:
            if theirs.get(key) != mine.get(key):
                return _first_difference(theirs.get(key), mine.get(key), f"{place}.{key}" if place else key)
    return f"{place} = {theirs!r} where this one has {mine!r}"


def _save_splits(repository: Repository, splits: DatasetDict) -> None:
    repository.interactions.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        path = repository.interactions / f"{name}.parquet"
        if not path.is_file():
            with atomic_write(path) as temporary:
                splits[name].to_parquet(str(temporary))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
