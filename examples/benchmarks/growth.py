"""How costs grow with items, users and history.

An exponent is the slope of the line through the logarithms: 1 where a cost grows in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import Row, compare
from ranking import encoder
from search import indexes, searches
from tokens import HISTORY, NUM_ITEMS, NUM_USERS

from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES


def rows() -> list[Row]:
    """A query, the metrics of all users, and a prompt."""
    return [
        *grown("a query among {:,} items", (10_000, 100_000, 1_000_000), lambda items: searches(*indexes(items), 1)[0]),
        *grown(f"metrics of {{:,}} users, {NUM_ITEMS:,} items", (1_000, 4_000, 16_000), ranking),
        *grown("query of a user with {} items", (10, 30, HISTORY), partial(encoder, HISTORY_TEMPLATES), NUM_USERS),
    ]


def grown(what: str, sizes: Sequence[int], make: Callable[[int], Callable[[], Any]], amount: int = 1) -> list[Row]:
    """The cost at each size, and the exponent."""
    found = [compare(what.format(size), make(size), amount=amount, turns=3) for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log([row.ours for row in found]), 1)[0]
    return [*found, Row("exponent", float(slope), "")]


def ranking(users: int) -> Callable[[], dict[str, float]]:
    """Full ranking by vectors, with 50 seen items a user."""
    random = np.random.default_rng(0)
    queries, items = torch.randn(users, 64), torch.randn(NUM_ITEMS, 64)
    targets, seen = random.integers(NUM_ITEMS, size=users), random.integers(NUM_ITEMS, size=users * 50)
    return lambda: evaluate_embeddings(queries, items, targets, np.arange(users + 1) * 50, seen, cosine=True)
