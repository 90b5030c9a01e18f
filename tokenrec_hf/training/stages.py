"""The three training stages as functions around the stock `Trainer` (section II-E1 of TokenRec, arXiv 2406.10450).

Step 0 trains a collaborative model, step 1 an MQ-Tokenizer for users and one for items, step 2 T5 with all other parts frozen.
Each function resumes from the last checkpoint in its folder, and a resumed run ends with the weights of an uninterrupted one.
The stages work on rows and tensors: they know no ids and write no files but checkpoints.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from ..data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout
from ..evaluation.metrics import embedding_ranks, evaluate_embeddings, user_ndcg, weighted_ranks
from ..models.codes import read_json
from ..models.configuration_tokenrec import FISMConfig
from ..models.modeling_collaborative import COLLABORATIVE_MODELS, CollaborativeModel, FISMModel
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from .closed_forms import smooth_tables
from .datasets import HistoryDataset, InteractionDataset, LengthGroupedSampler, VectorDataset
from .initialization import prepare_mq_tokenizer, start_from_singular_vectors
from .recipe import (
    AUTO,
    CollaborativeSettings,
    MQTokenizerSettings,
    RetrievalSettings,
    SelectedStageSettings,
    StageSettings,
)

SELECT_BY = "ndcg@20"
# Steps between two looks at whether all weights are finite; every evaluation and checkpoint looks too.
CHECK_EVERY = 50
# Weights of T5's part beside the collaborative vectors that are tried on validation besides 0, with at most so many users.
HISTORY_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
WEIGHING_USERS = 4096
# The files without which a training does not continue as it would have.
_CHECKPOINT = {SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth", TRAINER_STATE_NAME}
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class StageResult(Generic[Model]):
    """The result of a stage.

    Args:
        model: the trained model: with validation the best, else the last one.
        epochs: epochs trained to reach that model, the length of a refit.
        metrics: the last evaluation of that model, without the `eval_` prefix.
        curve: NDCG@20 on the validation items by epoch, as pairs, of a stage whose length is chosen.
    """

    model: Model
    epochs: float
    metrics: dict[str, float]
    curve: Sequence[tuple[float, float]] = ()


class _Trainer(Trainer):
    """A `Trainer` that makes batches of prompts of similar length, and evaluates a collaborative model by its vectors alone."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset, collator = self.train_dataset if train_dataset is None else train_dataset, self.data_collator
        if not isinstance(collator, DataCollatorForGenerativeRetrieval):
            return super()._get_train_sampler(train_dataset)
        users = cast(PromptDataset, dataset).users
        lengths = partial(collator.prompt_lengths, users)
        return LengthGroupedSampler(lengths, len(users), self.args.train_batch_size, self.args.seed)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """A loss over all items would take the scores of all users and items at once, 2 GB for Amazon Beauty."""
        if not isinstance(model, CollaborativeModel):
            return super().prediction_step(model, inputs, *args, **kwargs)
        _, vectors, _ = super().prediction_step(model, {"user_ids": inputs["user_ids"]}, *args, **kwargs)
        return None, vectors, inputs["labels"]


class SetEpoch(TrainerCallback):
    """Tells the training set which epoch begins, for its stateless random draws."""

    def __init__(self, dataset: HistoryDataset | InteractionDataset | PromptDataset):
        self.dataset = dataset

    def on_train_begin(self, args: TrainingArguments, *_: object, **__: object) -> None:
        """Makes sure that the workers of a data loader hear of each epoch.

        Raises:
            ValueError: workers are kept from epoch to epoch.
        """
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers keeps copies of the data set, which would draw the same prompts in every epoch; "
                "leave it off."
            )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Passes the epoch on, also after a resumption in mid-epoch."""
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class StopAt(TrainerCallback):
    """Ends training after a number of steps (default: all), with the learning-rate schedule of the whole length."""

    def __init__(self, step: float = math.inf):
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stops at the step."""
        control.should_training_stop |= state.global_step >= self.step
        if control.should_training_stop and not args.load_best_model_at_end:
            # From a checkpoint of the last step, Trainer would continue with one step too many.
            control.should_save = False


class StopEarly(EarlyStoppingCallback):
    """Early stopping that saves no checkpoint where it ends training: from there, too, Trainer would continue."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Counts the evaluation, and ends training."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = False


class KnowBest(TrainerCallback):
    """Finds the best checkpoint of an interrupted training in its folder, which may have been moved since."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Replaces the path that the last checkpoint recorded."""
        if state.best_global_step:
            best = Path(cast(str, args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best)


class Progress(TrainerCallback):
    """A progress bar with the stage's name and its latest evaluation, and an end to a training that went wrong."""

    def __init__(self, name: str, shown: Sequence[str]):
        self.name, self.shown = name, shown

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Opens the bar at the first step of this process."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", mininterval=1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advances the bar.

        Raises:
            ValueError: a weight is not finite.
        """
        self.bar.update(state.global_step - self.bar.n)
        is_looked_at = control.should_evaluate or control.should_save or control.should_training_stop
        if not is_looked_at and state.global_step % CHECK_EVERY:
            return
        if not all(bool(torch.isfinite(weights).all()) for weights in kwargs["model"].parameters()):
            self.bar.close()
            raise ValueError(
                f"the weights of the {self.name} are not finite after step {state.global_step}, with the learning rate "
                f"{args.learning_rate:g}; lower it, or look for vectors of very different sizes."
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Shows the latest metrics."""
        self.bar.set_postfix({name: f"{state.log_history[-1][f'eval_{name}']:.4f}" for name in self.shown})

    def on_train_end(self, *_: object, **__: object) -> None:
        """Closes the bar."""
        self.bar.close()


def train_collaborative(
    interactions: InteractionMatrix,
    settings: CollaborativeSettings,
    folder: Path,
    *,
    holdout: Holdout | None = None,
    epochs: float | None = None,
    seed: int = 0,
    start: CollaborativeModel | None = None,
) -> StageResult[CollaborativeModel]:
    """Step 0: LightGCN, matrix factorisation or FISM on the training interactions.

    Args:
        interactions: the training interactions.
        settings: the recipe's section.
        folder: for checkpoints.
        holdout: the validation items; the best epoch by NDCG@20 (dot product) is kept. Without it, all `epochs` count.
        epochs: stop after so many, with the learning-rate schedule unchanged (the refit).
        seed: of everything random.
        start: a model of these users and items to continue with, instead of a fresh one.
    """
    set_seed(seed)
    model = start or COLLABORATIVE_MODELS[settings.model].from_interactions(
        settings.model_configuration(), interactions
    )
    if start is None and isinstance(model, FISMModel):
        start_from_singular_vectors(model, interactions)
    negatives = settings.negatives(interactions.num_items)
    dataset: HistoryDataset | InteractionDataset = InteractionDataset(interactions, negatives, seed)
    if model.users_are_histories:
        dataset = HistoryDataset(interactions, model.ordered_histories, negatives, seed)

    def metrics(users: torch.Tensor) -> dict[str, float]:
        assert holdout is not None
        items, seen = model.item_embeddings().cpu(), interactions.of_users(holdout.users)
        return evaluate_embeddings(users, items, holdout.targets, *seen, cosine=False)

    result = _fit(
        model,
        settings,
        folder,
        dataset,
        name="collaborative model",
        evaluation=InteractionDataset(interactions, 0, seed, holdout) if holdout else None,
        compute_metrics=lambda prediction: metrics(torch.from_numpy(prediction.predictions)),
        # All users in one batch, so that the graph is propagated once.
        eval_batch_size=len(holdout.users) if holdout else None,
        epochs=epochs,
        seed=seed,
    )
    smoothed = model.users_are_histories and smooth_tables(
        cast(FISMModel, model), interactions.users, interactions.items
    )
    if smoothed and holdout is not None:
        result.metrics |= metrics(model.user_embeddings().cpu()[holdout.users])
    return result


def held_out_ndcg(model: CollaborativeModel, interactions: InteractionMatrix, holdout: Holdout) -> torch.Tensor:
    """NDCG@20 of each held-out user by dot product, float64 `[users]`."""
    users, items = model.user_embeddings().cpu()[holdout.users], model.item_embeddings().cpu()
    seen = interactions.of_users(holdout.users)
    return user_ndcg(embedding_ranks(users, items, holdout.targets, *seen, cosine=False), 20)


def fixed_collaborative(
    interactions: InteractionMatrix,
    settings: CollaborativeSettings,
    item_vectors: torch.Tensor,
    holdout: Holdout | None = None,
) -> StageResult[CollaborativeModel]:
    """Step 0 with given vectors of items: a FISM that holds them in all tables and is not trained, so users are sums of items.

    Args:
        interactions: the training interactions.
        settings: the recipe's section, with FISM.
        item_vectors: of all items, `[num_items, d]`; their lengths are not used.
        holdout: the validation items, to measure NDCG@20.
    """
    config = cast(FISMConfig, settings.model_configuration())
    config.embedding_dim, config.recent_half_life = item_vectors.shape[1], None
    model = FISMModel.from_interactions(config, interactions).eval()
    with torch.no_grad():
        for _, table in model.tables():
            table.weight.copy_(F.normalize(item_vectors.float(), dim=1))
    metrics = {}
    if holdout is not None:
        users, items = model.user_embeddings()[holdout.users], model.item_embeddings()
        metrics = evaluate_embeddings(
            users, items, holdout.targets, *interactions.of_users(holdout.users), cosine=False
        )
    return StageResult(model, 0, metrics)


def train_mq_tokenizer(
    vectors: torch.Tensor,
    settings: MQTokenizerSettings,
    folder: Path,
    *,
    kind: str,
    others: torch.Tensor | None = None,
    seed: int = 0,
) -> StageResult[MQTokenizerModel]:
    """Step 1: an MQ-Tokenizer on collaborative vectors `[n, d]`; logs the statistics of its codes while training.

    Residual codebooks are fit by k-means alone.

    Args:
        vectors: all vectors, raw.
        settings: the recipe's section.
        folder: for checkpoints.
        kind: of the vectors, `"user"` or `"item"`.
        others: further vectors to learn from, `[m, d]`, see [`prepare_mq_tokenizer`].
        seed: of everything random.
    """
    set_seed(seed)
    trained_on = vectors if others is None else torch.cat([vectors, others])
    model = MQTokenizerModel(settings.model_configuration(kind, vectors.shape[1], len(trained_on)))
    prepare_mq_tokenizer(model, vectors, seed, others)
    if model.config.residual:
        return StageResult(model.eval(), 0, model.statistics(vectors))
    dataset = VectorDataset(trained_on)
    return _fit(
        model,
        settings,
        folder,
        dataset,
        name=f"{kind} MQ-Tokenizer",
        shown=("usage", "unique", "reconstruction_error"),
        evaluation=dataset,
        # The statistics are computed from all vectors at once: nothing of the forward pass is kept.
        compute_metrics=lambda _: model.statistics(trained_on),
        preprocess_logits=lambda logits, labels: logits[0],
        seed=seed,
    )


def train_retrieval(
    model: T5ForGenerativeRetrieval,
    collator: DataCollatorForGenerativeRetrieval,
    settings: RetrievalSettings,
    folder: Path,
    *,
    holdout: Holdout | None = None,
    epochs: float | None = None,
    seed: int = 0,
) -> StageResult[T5ForGenerativeRetrieval]:
    """Step 2: T5, its token embeddings and the projection; vectors and MQ-Tokenizers stay as they are.

    Args:
        model: with items bound.
        collator: makes the prompts; its interactions are the training interactions.
        settings: the recipe's section.
        folder: for checkpoints.
        holdout: the validation items; the best epoch by NDCG@20 is kept. Without it, all `epochs` count. With `"history"`
            pooling, `history_weight` is among the metrics: that of the recipe, or the best one, or 0 if T5's part gains no more
            than the standard error of its gain.
        epochs: stop after so many, with the learning-rate schedule unchanged (the refit).
        seed: of everything random except the collator's draws.
    """
    interactions = collator.interactions
    evaluation = None
    if holdout is not None:
        holdout = by_history_length(holdout, interactions)
        evaluation = PromptDataset(holdout.users, holdout.targets)

    d = model.config.embedding_dim
    if holdout is not None:
        # Queries have T5's part as it is; `metrics` weighs it.
        model.config.history_weight = 1.0

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert holdout is not None
        queries, items = torch.from_numpy(prediction.predictions).float(), model.bound_vectors().cpu()
        seen, chosen = interactions.of_users(holdout.users), {}
        if model.config.pooling == "history":
            given = settings.config.get("history_weight", AUTO)
            chosen["history_weight"] = (
                choose_history_weight(queries, items, d, holdout, interactions) if given == AUTO else given
            )
            queries = weighed(queries, d, chosen["history_weight"])
        return evaluate_embeddings(queries, items, holdout.targets, *seen, cosine=True) | chosen

    return _fit(
        model,
        settings,
        folder,
        PromptDataset.for_training(interactions),
        collator=collator,
        name="T5 retrieval",
        evaluation=evaluation,
        compute_metrics=metrics,
        epochs=epochs,
        seed=seed,
    )


def weighed(queries: torch.Tensor, dim: int, weight: float) -> torch.Tensor:
    """Queries `[n, query_dim]` with T5's part, the dimensions from `dim` on, multiplied by a weight."""
    return torch.cat([queries[:, :dim], weight * queries[:, dim:]], dim=1)


def choose_history_weight(
    queries: torch.Tensor, items: torch.Tensor, dim: int, holdout: Holdout, interactions: InteractionMatrix
) -> float:
    """The weight of T5's part with the best NDCG@20, or 0 if its mean gain over users is within the standard error of this mean.

    Args:
        queries: of the held-out users, T5's part with weight 1, `[n, query_dim]`.
        items: the vectors that queries are compared with, `[num_items, query_dim]`.
        dim: d, the dimensions of the collaborative vectors.
        holdout: the validation items.
        interactions: the training interactions, which are not ranked.
    """
    some = slice(None, None, math.ceil(len(queries) / WEIGHING_USERS))
    known = holdout.targets[some], *interactions.of_users(holdout.users[some])
    found = user_ndcg(weighted_ranks(queries[some], items, dim, (0.0, *HISTORY_WEIGHTS), *known), 20)
    gains = found[1:] - found[0]  # [weights, users]
    best = int(gains.mean(dim=1).argmax())
    return HISTORY_WEIGHTS[best] if is_clear(gains[best]) else 0.0


def is_clear(gains: torch.Tensor) -> bool:
    """Whether the mean of gains over users, `[users]`, is more than its standard error."""
    return len(gains) > 1 and bool(gains.mean() > gains.std() / math.sqrt(len(gains)))


def by_history_length(holdout: Holdout, interactions: InteractionMatrix) -> Holdout:
    """The same pairs in the order of the histories' lengths, so that batches carry little padding."""
    order = np.argsort(interactions.lengths[holdout.users], kind="stable")
    return Holdout(holdout.users[order], holdout.targets[order])


def _as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def _fit(
    model: Model,
    settings: StageSettings,
    folder: Path,
    dataset: HistoryDataset | InteractionDataset | VectorDataset | PromptDataset,
    *,
    name: str,
    collator: Callable[..., dict[str, torch.Tensor]] = _as_is,
    shown: Sequence[str] = ("hr@20", SELECT_BY),
    evaluation: Dataset | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    preprocess_logits: Callable[..., torch.Tensor] | None = None,
    eval_batch_size: int | None = None,
    epochs: float | None = None,
    seed: int,
) -> StageResult[Model]:
    """Trains a model with `Trainer`; see the stages for the arguments."""
    steps_per_epoch, most = step_counts(settings, len(dataset))
    chosen, evaluates, selects = {"seed": seed, **settings.training}, evaluation is not None, False
    callbacks: list[TrainerCallback] = [Progress(name, shown), KnowBest()]
    if not isinstance(dataset, VectorDataset):
        callbacks.append(SetEpoch(dataset))
    if isinstance(settings, SelectedStageSettings):
        selects = evaluates
        callbacks += [StopEarly(settings.patience)] * selects
        if "num_train_epochs" in chosen:
            chosen["num_train_epochs"] = most / steps_per_epoch
    callbacks.append(StopAt(math.inf if epochs is None else max(1, round(epochs * steps_per_epoch))))
    if eval_batch_size is not None:
        chosen["per_device_eval_batch_size"] = eval_batch_size
    unit = steps_per_epoch if isinstance(settings, SelectedStageSettings) else 1
    every = max(1, round(settings.evaluate_every * unit))
    arguments = {
        "output_dir": str(folder),
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": every,
        "save_total_limit": 1,
        "load_best_model_at_end": selects,
        "metric_for_best_model": SELECT_BY if selects else None,
        "greater_is_better": True if selects else None,
        # Early stopping keeps its count across an interruption.
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **chosen,
    }
    args = TrainingArguments(**arguments)
    # Trainer would split batches over several GPUs, which a loss over a whole batch and shared histories do not survive.
    args._n_gpu = min(args.n_gpu, 1)
    trainer = _Trainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=evaluation,
        compute_metrics=compute_metrics if evaluates else None,
        preprocess_logits_for_metrics=preprocess_logits,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    # Trainer leaves the model on the accelerator; what follows combines it with vectors of the store.
    model.cpu().eval()
    state = trainer.state
    best = state.best_global_step if selects else None
    evaluations = [entry for entry in state.log_history if "eval_runtime" in entry and best in (None, entry["step"])]
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    metrics = {
        key.removeprefix("eval_"): value
        for key, value in (evaluations[-1] if evaluations else {}).items()
        if key.startswith("eval_") and key not in timings
    }
    measured = [entry for entry in state.log_history if f"eval_{SELECT_BY}" in entry]
    curve = [(entry["step"] / steps_per_epoch, entry[f"eval_{SELECT_BY}"]) for entry in measured]
    return StageResult(model, (best or state.global_step) / steps_per_epoch, metrics, curve)


def step_counts(settings: StageSettings, num_examples: int) -> tuple[int, int]:
    """The steps of an epoch, and the most of a training, which early stopping ends sooner."""
    per_epoch, chosen = max(1, math.ceil(num_examples / _examples_per_step(settings))), settings.training
    epochs = chosen.get("num_train_epochs", TrainingArguments.num_train_epochs)
    if isinstance(settings, SelectedStageSettings) and settings.most_steps:
        epochs = min(epochs, max(1, round(settings.most_steps / per_epoch)))
    most = chosen.get("max_steps", 0)
    return per_epoch, most if most > 0 else math.ceil(epochs * per_epoch)


def _examples_per_step(settings: StageSettings) -> int:
    """Training examples between two updates of the weights, over all processes."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "use_cpu")
    sizes = TrainingArguments(**{name: value for name, value in settings.training.items() if name in names})
    return sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps * sizes.world_size


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole; those that a crash cut off, while written or removed, are removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        if _is_whole(Path(last)):
            return last
        shutil.rmtree(last)
    return None


def _is_whole(checkpoint: Path) -> bool:
    if not {path.name for path in checkpoint.iterdir()} >= _CHECKPOINT:
        return False
    try:
        # Trainer writes its state last.
        read_json(checkpoint / TRAINER_STATE_NAME)
    except ValueError:
        return False
    return True
