"""The forecast before a training: the most steps of each stage, and about how much memory it takes.

Memory is that of the process on a CPU: the libraries, the interactions, and the large arrays of a stage, in closed form from the
numbers of users, items and interactions and the sizes of the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import DatasetDict

from ..data.splits import index_splits
from ..evaluation.baselines import ROWS
from ..models.configuration_tokenrec import MQTokenizerConfig, T5GenerativeRetrievalConfig
from ..models.modeling_collaborative import COLLABORATIVE_MODELS, USER_CHUNK
from ..training.recipe import AUTO, CollaborativeSettings, Recipe
from ..training.stages import step_counts
from .build import HALF_LIVES, USER_VECTORS, check_trainable
from .update import NewVectors

# Bytes of Python with torch, transformers and datasets, and of an interaction with its ids, in all stages.
LIBRARIES, INTERACTION = 600_000_000, 100
# Weights, gradients and the two moments of Adam.
TRAINED = 4
# Users ranked at once.
RANKED = 512
# Tokens of words in the package's vocabulary.
WORDS = 900


@dataclass(frozen=True)
class StageForecast:
    """The forecast of a stage.

    Args:
        stage: its name.
        length: its most steps, in words.
        memory: bytes of the process at its peak, without a GPU; None where a checkpoint decides.
    """

    stage: str
    length: str
    memory: int | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f"about {self.memory / 1e9:.1f} GB of memory"
        return ": ".join(filter(None, (self.stage, ", ".join(filter(None, (self.length, memory))))))


@dataclass(frozen=True)
class _Sizes:
    """What the memory depends on: numbers of users, items and dimensions, and the lengths of the histories `[users]`."""

    users: int
    items: int
    dim: int
    lengths: np.ndarray

    def memory(self, floats: float) -> int:
        """Bytes of a process with so many numbers in float32 beside libraries and interactions."""
        return int(LIBRARIES + INTERACTION * self.lengths.sum() + 4 * floats)


def forecast(splits: DatasetDict, recipe: Recipe, item_vectors: NewVectors | None = None) -> list[StageForecast]:
    """The most training steps and the memory of each stage; arguments as in [`train`]."""
    data, settings = index_splits(splits, "validation"), recipe.collaborative
    check_trainable(data)
    interactions = data.interactions
    lengths = interactions.lengths
    histories = COLLABORATIVE_MODELS[settings.model].users_are_histories
    dim = settings.model_configuration().embedding_dim
    vectors, length = f"collaborative vectors ({settings.model})", ""
    if item_vectors is not None:
        vectors, dim = "collaborative vectors (given)", item_vectors.vectors.shape[1]
    else:
        most = step_counts(settings, int((lengths > 1).sum() if histories else lengths.sum()))[1]
        tries = f" for each of {len(HALF_LIVES)} half-lives" * settings.chooses_half_life
        length = f"at most {most:,} steps{tries}"
    sizes = _Sizes(interactions.num_users, interactions.num_items, dim, lengths)
    codes = f"{step_counts(recipe.mq_tokenizer, 1)[1]:,} steps each"
    return [
        StageForecast(
            vectors, length, sizes.memory(_collaborative(settings, sizes, TRAINED if item_vectors is None else 1))
        ),
        StageForecast(
            "codes of users and items (MQ-Tokenizers)",
            "k-means" if recipe.mq_tokenizer.config.get("residual") else codes,
            sizes.memory(_codes(sizes, histories)),
        ),
        StageForecast(
            "T5",
            f"at most {step_counts(recipe.retrieval, int((lengths > 0).sum()))[1]:,} steps",
            None if recipe.retrieval.backbone else sizes.memory(_retrieval(recipe, sizes)),
        ),
        StageForecast(
            "evaluation", "", None if recipe.retrieval.backbone else sizes.memory(_evaluation(recipe, sizes))
        ),
    ]


def _collaborative(settings: CollaborativeSettings, sizes: _Sizes, copies: int) -> float:
    config, ranking = settings.model_configuration(), 2 * RANKED * sizes.items + 2 * sizes.users * sizes.dim
    batch = settings.training.get("per_device_train_batch_size", 8)
    if not COLLABORATIVE_MODELS[settings.model].users_are_histories:
        rows, layers = sizes.users + sizes.items, getattr(config, "num_layers", 0)
        graph = 12 * sizes.lengths.sum() * bool(layers)
        return (copies + 2 * layers) * rows * sizes.dim + graph + ranking
    tables = 3 if settings.config.get("recent_half_life") and settings.config.get("half_life") else 2
    # The vectors of the histories of many users, and in training the scores of all items for a batch of users.
    longest = np.add.reduceat(sizes.lengths, np.arange(0, sizes.users, USER_CHUNK)).max()
    step = max(4 * longest * sizes.dim + ranking, 6 * batch * sizes.items)
    return copies * tables * sizes.items * sizes.dim + step


def _codes(sizes: _Sizes, histories: bool) -> float:
    parts = max(USER_VECTORS // sizes.users - 1, 0) if histories else 0
    # The items of a part of each history, and all vectors.
    summands = 2 * sizes.lengths.sum() * sizes.dim * bool(parts)
    return summands + 6 * max(sizes.users * (1 + parts), sizes.items) * sizes.dim


def _retrieval(recipe: Recipe, sizes: _Sizes) -> float:
    config, users, items = _t5(recipe), *_mq_tokenizers(recipe, sizes)
    width, layers = config.d_model, config.num_layers + (config.num_decoder_layers or config.num_layers)
    vocabulary = WORDS + sum(one.num_codebooks * one.codebook_size for one in (users, items))
    weights = vocabulary * width + layers * width * (6 * config.num_heads * config.d_kv + 2 * config.d_ff)
    batch = recipe.retrieval.training.get("per_device_train_batch_size", 8)
    trained = layers * _activations(recipe, sizes, batch, recipe.prompts.train_history)
    vectors = sizes.dim + width
    return (
        TRAINED * weights
        + max(trained, _reading(recipe, sizes))
        + sizes.items * (3 * vectors + TRAINED * width + 4 * items.num_codebooks)
        + 3 * sizes.users * vectors
        + 2 * RANKED * sizes.items
    )


def _evaluation(recipe: Recipe, sizes: _Sizes) -> float:
    # ItemKNN's similarities of some items with all; before, a sparse matrix of those with common users.
    rows = min(ROWS, sizes.items)
    common = min(rows * sizes.items, int((sizes.lengths.astype(np.int64) ** 2).sum()) * rows / sizes.items)
    neighbours = 8 * rows * sizes.items + 10 * common
    return 4 * (sizes.users + sizes.items) * sizes.dim + max(neighbours, _reading(recipe, sizes))


def _t5(recipe: Recipe) -> T5GenerativeRetrievalConfig:
    config = {name: value for name, value in recipe.retrieval.config.items() if name != "pooling" and value != AUTO}
    return T5GenerativeRetrievalConfig(**config)


def _mq_tokenizers(recipe: Recipe, sizes: _Sizes) -> list[MQTokenizerConfig]:
    counts = {"user": max(sizes.users, USER_VECTORS), "item": sizes.items}
    return [recipe.mq_tokenizer.model_configuration(kind, sizes.dim, count) for kind, count in counts.items()]


def _reading(recipe: Recipe, sizes: _Sizes) -> float:
    """One layer of T5 reading a batch of prompts without gradient."""
    batch = recipe.retrieval.training.get("per_device_eval_batch_size", 8)
    return _activations(recipe, sizes, batch, recipe.prompts.max_history)


def _activations(recipe: Recipe, sizes: _Sizes, batch: int, longest: int) -> float:
    """What a layer of T5 computes of a batch of prompts."""
    config, users, items = _t5(recipe), *_mq_tokenizers(recipe, sizes)
    shown = min(longest, int(sizes.lengths.max()))
    positions = 1 + shown
    if not recipe.reads_history:
        positions = min(recipe.prompts.max_length, users.num_codebooks + shown * items.num_codebooks + 20)
    return batch * positions * (16 * config.d_model + 3 * config.d_ff + 4 * config.num_heads * positions)
