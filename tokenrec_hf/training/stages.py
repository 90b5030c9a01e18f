"""The three training stages as functions around the stock `Trainer` (section II-E1 of TokenRec, arXiv 2406.10450).

Step 0 trains a collaborative model, step 1 an MQ-Tokenizer for users and one for items, step 2 T5 with everything else frozen.
Each function resumes from the last checkpoint in its folder, and a resumed run ends with the same weights as an uninterrupted
one. Works on rows and tensors; `training.py` turns a data set and a recipe into these calls.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout
from ..evaluation.metrics import evaluate_embeddings
from ..models.configuration_tokenrec import MQTokenizerConfig
from ..models.modeling_collaborative import COLLABORATIVE_MODELS, CollaborativeModel
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from .closed_forms import smooth_tables
from .training_data import HistoryDataset, InteractionDataset, LengthGroupedSampler, VectorDataset

SELECT_BY = "ndcg@20"
_TRAINING_ARGUMENTS = {field.name for field in fields(TrainingArguments)}


@dataclass
class StageResult:
    """What a stage leaves behind.

    Args:
        model: the trained model: with validation the best, else the last one.
        epochs: epochs trained to reach that model, the length of a refit.
        metrics: the last evaluation of that model, without the `eval_` prefix.
    """

    model: Any
    epochs: float
    metrics: dict[str, float]


class _Trainer(Trainer):
    """A `Trainer` that groups examples whose `lengths` the data set knows."""

    def _get_train_sampler(self, train_dataset=None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if getattr(dataset, "lengths", None) is None:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(dataset.lengths, self.args.train_batch_size, self.args.seed)


class SetEpoch(TrainerCallback):
    """Tells the training set which epoch begins, for its stateless random draws."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Passes the epoch on, also after a resumption in mid-epoch."""
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class StopAt(TrainerCallback):
    """Ends training after a number of steps (default: all), with the learning-rate schedule of the whole length."""

    def __init__(self, step: float = math.inf):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Stops at the step."""
        control.should_training_stop |= state.global_step >= self.step
        if control.should_training_stop and not args.load_best_model_at_end:
            # Trainer goes on from a checkpoint of the last step by training one step too many.
            control.should_save = False


class Progress(TrainerCallback):
    """A progress bar with the stage's name and its latest evaluation."""

    def __init__(self, name: str, shown: tuple[str, ...]):
        self.name, self.shown = name, shown

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar where training begins or goes on."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", mininterval=1.0)

    def on_step_end(self, args, state, control, **kwargs):
        """Moves on."""
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Shows the latest metrics."""
        found = {name: metrics[f"eval_{name}"] for name in self.shown if f"eval_{name}" in (metrics or {})}
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in found.items()})

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.bar.close()


def train_collaborative(
    interactions: InteractionMatrix,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    holdout: Holdout | None = None,
    epochs: float | None = None,
    seed: int = 0,
    start: CollaborativeModel | None = None,
) -> StageResult:
    """Step 0: LightGCN, matrix factorisation or FISM on the training interactions.

    Args:
        interactions: the training interactions.
        settings: the recipe's section: `model`, `config`, `num_negatives`, `evaluate_every`, `patience`, `training`.
        folder: where checkpoints go.
        holdout: the validation items; the best epoch by NDCG@20 (dot product) is kept. Without it, all `epochs` count.
        epochs: stop after so many, with the learning-rate schedule unchanged (the refit).
        seed: of everything random.
        start: a model of these users and items to go on training, instead of a fresh one.
    """
    set_seed(seed)
    if start is None and settings["model"] not in COLLABORATIVE_MODELS:
        raise ValueError(
            f"collaborative.model is {settings['model']!r} but must be one of {', '.join(COLLABORATIVE_MODELS)}."
        )
    model: Any = start
    if model is None:
        kind: Any = COLLABORATIVE_MODELS[settings["model"]]
        fields = kind.config_class().to_dict()
        # Recipes describe LightGCN; other models take what they have of it.
        config = {name: value for name, value in settings["config"].items() if name in fields}
        model = kind.from_interactions(kind.config_class(**config), interactions)
    negatives = settings["num_negatives"]
    evaluation_negatives = 0 if model.users_are_histories else negatives

    def metrics(prediction):
        assert holdout is not None
        users, items = torch.from_numpy(prediction.predictions), model.item_embeddings().cpu()
        return evaluate_embeddings(users, items, holdout.targets, *interactions.of_users(holdout.users), cosine=False)

    result = _fit(
        model,
        settings,
        folder,
        HistoryDataset(interactions, model.ordered_histories, seed)
        if model.users_are_histories
        else InteractionDataset(interactions, negatives, seed),
        _as_is,
        name="collaborative model",
        evaluation=InteractionDataset(interactions, evaluation_negatives, seed, holdout)
        if holdout is not None
        else None,
        compute_metrics=metrics,
        # All users in one batch, so that the graph is propagated once.
        eval_batch_size=len(holdout.users) if holdout is not None else 1,
        epochs=epochs,
        seed=seed,
    )
    if model.users_are_histories and (model.config.history_smoothing or model.config.item_smoothing):
        smooth_tables(model, interactions.users, interactions.items)
        if holdout is not None:
            result.metrics |= evaluate_embeddings(
                model.user_embeddings().cpu()[holdout.users],
                model.item_embeddings().cpu(),
                holdout.targets,
                *interactions.of_users(holdout.users),
                cosine=False,
            )
    return result


def train_mq_tokenizer(
    vectors: torch.Tensor,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    others: torch.Tensor | None = None,
    name: str = "MQ-Tokenizer",
    seed: int = 0,
) -> StageResult:
    """Step 1: an MQ-Tokenizer on collaborative vectors `[n, d]`; logs the statistics of its codes while training.

    Args:
        vectors: all vectors, raw.
        settings: the recipe's section: `config`, `evaluate_every`, `training`. A `codebook_size` of `auto` is 256 for up to
            10,000 vectors and 512 for more, the paper's choices for small and large data.
        folder: where checkpoints go.
        others: further vectors to learn from, `[m, d]`, see [`MQTokenizerModel.prepare`].
        name: shown while training.
        seed: of everything random.
    """
    set_seed(seed)
    config = dict(settings["config"], embedding_dim=vectors.shape[1])
    trained_on = vectors if others is None else torch.cat([vectors, others])
    if config["codebook_size"] == "auto":
        config["codebook_size"] = 256 if len(trained_on) <= 10_000 else 512
    model = MQTokenizerModel(MQTokenizerConfig(**config))
    model.prepare(vectors, seed, others)
    if model.config.residual:  # the k-means was the training
        return StageResult(model.eval(), 0, model.statistics(vectors))
    vectors = trained_on
    dataset = VectorDataset(vectors)
    return _fit(
        model,
        settings,
        folder,
        dataset,
        _as_is,
        name=name,
        shown=("usage", "unique", "reconstruction_error"),
        evaluation=dataset,
        compute_metrics=lambda _: model.statistics(vectors),
        # The statistics are computed from all vectors at once: of the forward pass, nothing is kept.
        preprocess_logits=lambda logits, labels: logits[0],
        select=False,
        seed=seed,
    )


def train_retrieval(
    model: T5ForGenerativeRetrieval,
    collator: DataCollatorForGenerativeRetrieval,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    holdout: Holdout | None = None,
    epochs: float | None = None,
    seed: int = 0,
) -> StageResult:
    """Step 2: T5, its token embeddings and the projection; vectors and MQ-Tokenizers stay as they are.

    Args:
        model: with items bound.
        collator: makes the prompts; its interactions are the training interactions.
        settings: the recipe's section: `evaluate_every`, `patience`, `training`.
        folder: where checkpoints go.
        holdout: the validation items; the best epoch by NDCG@20 is kept. Without it, all `epochs` count.
        epochs: stop after so many, with the learning-rate schedule unchanged (the refit).
        seed: of everything random that the collator does not draw.
    """
    interactions = collator.interactions
    evaluation = None
    if holdout is not None:
        holdout = by_history_length(holdout, interactions)
        evaluation = PromptDataset(holdout.users, holdout.targets)

    def metrics(prediction):
        assert holdout is not None
        queries = torch.from_numpy(prediction.predictions).float()
        seen = interactions.of_users(holdout.users)
        return evaluate_embeddings(queries, model.item_embeddings.cpu(), holdout.targets, *seen, cosine=True)

    return _fit(
        model,
        settings,
        folder,
        PromptDataset.for_training(interactions),
        collator,
        name="T5 retrieval",
        evaluation=evaluation,
        compute_metrics=metrics,
        epochs=epochs,
        seed=seed,
    )


def by_history_length(holdout: Holdout, interactions: InteractionMatrix) -> Holdout:
    """The same pairs, users with like histories together, so that batches carry little padding."""
    order = np.argsort(interactions.lengths[holdout.users], kind="stable")
    return Holdout(holdout.users[order], holdout.targets[order])


def _as_is(batch):
    return batch


def _fit(
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    folder: Path,
    dataset: Any,
    collator: Callable,
    *,
    name: str,
    shown: tuple[str, ...] = ("hr@20", SELECT_BY),
    evaluation: Dataset | None = None,
    compute_metrics: Callable | None = None,
    preprocess_logits: Callable | None = None,
    eval_batch_size: int | None = None,
    select: bool = True,
    epochs: float | None = None,
    seed: int = 0,
) -> StageResult:
    arguments = dict(settings["training"])
    _check_training_arguments(arguments)
    if eval_batch_size is not None:
        arguments["per_device_eval_batch_size"] = eval_batch_size
    steps_per_epoch = math.ceil(len(dataset) / _examples_per_step(arguments))
    if settings.get("most_steps") and "num_train_epochs" in arguments:
        most = max(1, round(settings["most_steps"] / steps_per_epoch))
        arguments["num_train_epochs"] = min(arguments["num_train_epochs"], most)
    every = max(1, round(settings["evaluate_every"] * steps_per_epoch)) if "max_steps" not in arguments else None
    every = every or settings["evaluate_every"]
    select = select and evaluation is not None
    full = {
        "output_dir": str(folder),
        "seed": seed,
        "eval_strategy": "steps" if evaluation is not None else "no",
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": every,
        "save_total_limit": 1,
        "load_best_model_at_end": select,
        "metric_for_best_model": SELECT_BY if select else None,
        "greater_is_better": True if select else None,
        # Early stopping goes on counting where it was interrupted.
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Item vectors and graph are the same in every process; broadcasting them at each step would only cost time.
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
        **arguments,
    }
    callbacks: list[TrainerCallback] = [Progress(name, shown)]
    if hasattr(dataset, "set_epoch"):
        callbacks.append(SetEpoch(dataset))
    if select:
        callbacks.append(EarlyStoppingCallback(settings["patience"]))
    callbacks.append(StopAt(max(1, round(epochs * steps_per_epoch)) if epochs is not None else math.inf))
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(**full),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=evaluation,
        compute_metrics=compute_metrics if evaluation is not None else None,
        preprocess_logits_for_metrics=preprocess_logits,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    metrics = _evaluations(trainer, select)
    model.eval()
    best = trainer.state.best_global_step if select else None
    return StageResult(model, (best or trainer.state.global_step) / steps_per_epoch, metrics)


def _examples_per_step(arguments: Mapping[str, Any]) -> int:
    """Training examples between two updates of the weights, over all devices and processes."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "use_cpu")
    sizes = TrainingArguments(**{name: arguments[name] for name in names if name in arguments})
    return sizes.train_batch_size * sizes.gradient_accumulation_steps * sizes.world_size


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; one that a crash cut off is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        # Trainer writes its state last.
        if (Path(last) / TRAINER_STATE_NAME).is_file():
            return last
        shutil.rmtree(last)
    return None


def _evaluations(trainer: Trainer, select: bool) -> dict[str, float]:
    """The metrics logged at the step of the best model (or of the last evaluation)."""
    found = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    if select:
        found = [entry for entry in found if entry["step"] == trainer.state.best_global_step]
    if not found:
        return {}
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {key[5:]: value for key, value in found[-1].items() if key.startswith("eval_") and key not in timings}


def _check_training_arguments(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        if name not in _TRAINING_ARGUMENTS:
            raise ValueError(
                f"{name!r} is not one of transformers' TrainingArguments; see their documentation for the names."
            )
