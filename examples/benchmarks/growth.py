"""How costs grow with items, users, history and codebooks.

An exponent is the slope of the line through the logarithms: 1 where a cost grows in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row, compare
from ranking import encoder
from tokens import HISTORY, NUM_ITEMS, NUM_USERS

from tokenrec_hf import EmbeddingStore, MQTokenizerConfig, MQTokenizerModel
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES
from tokenrec_hf.training.initialization import prepare_mq_tokenizer


def query(items: int) -> Callable[[], Any]:
    """The search of one query."""
    store, vectors = EmbeddingStore(64), torch.randn(items, 64, generator=torch.Generator().manual_seed(0))
    store.upsert("item", [f"i{row}" for row in range(items)], vectors)
    return lambda: store.search(vectors[:1], 20)


def ranking(users: int) -> Callable[[], dict[str, float]]:
    """Full ranking by vectors, with 50 seen items a user."""
    random = np.random.default_rng(0)
    queries, items = torch.randn(users, 64), torch.randn(NUM_ITEMS, 64)
    targets, seen = random.integers(NUM_ITEMS, size=users), random.integers(NUM_ITEMS, size=users * 50)
    return lambda: evaluate_embeddings(queries, items, targets, np.arange(users + 1) * 50, seen, cosine=True)


def preparation(books: int) -> Callable[[], None]:
    """The k-means that an MQ-Tokenizer of recipe `paper` starts from."""
    config = MQTokenizerConfig(embedding_dim=64, num_codebooks=books, codebook_size=256)
    vectors = torch.randn(NUM_ITEMS, 64, generator=torch.Generator().manual_seed(0))
    return lambda: prepare_mq_tokenizer(MQTokenizerModel(config), vectors)


# Made of a cost: its name, the sizes that it is measured at, the function to time for a size, and how much a call of it does.
COSTS: list[tuple[str, tuple[int, ...], Callable[[int], Callable[[], Any]], int]] = [
    ("a query among {:,} items", (10_000, 100_000, 1_000_000, 10_000_000), query, 1),
    (f"metrics of {{:,}} users, {NUM_ITEMS:,} items", (1_000, 10_000, 100_000, 1_000_000), ranking, 1),
    ("query of a user with {} items", (10, 30, HISTORY), partial(encoder, HISTORY_TEMPLATES), NUM_USERS),
    ("start of {} codebooks, not residual", (2, 4, 8), preparation, 1),
]


def rows() -> list[Row]:
    """Each cost at each size, and the exponent."""
    found = []
    for what, sizes, make, amount in COSTS:
        measured = [compare(what.format(size), make(size), amount=amount, turns=3) for size in sizes]
        exponent = np.polyfit(np.log(sizes), np.log([row.ours for row in measured]), 1)[0]
        found += [*measured, Row("exponent", float(exponent), "")]
    return found


def plot(found: Sequence[Row], path: Path) -> None:
    """Draws the rows, each cost by size with the fitted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COSTS), figsize=(4 * len(COSTS), 3.5))
    for axis, (what, sizes, *_) in zip(axes, COSTS):
        (*measured, last), found = found[: len(sizes) + 1], found[len(sizes) + 1 :]
        costs, exponent = [row.ours for row in measured], last.ours
        start = np.exp(np.mean(np.log(costs)) - exponent * np.mean(np.log(sizes)))
        axis.loglog(sizes, costs, "o")
        axis.loglog(sizes, start * np.array(sizes, dtype=float) ** exponent, "--")
        axis.set_title(f"{what.replace('{:,}', 'n').replace('{}', 'n')}: n^{exponent:.2f}", fontsize=9)
        axis.set_xlabel("n")
        axis.set_ylabel("ms of CPU time")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
