"""The interface of a baseline, `fit(train, validation)` and `scores(users)`, and its evaluation and training loop.

Users and items are rows of an `InteractionMatrix`, whose interactions are in time order for each user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout
from tokenrec_hf.evaluation.metrics import RankingMetrics

SELECT_BY = "ndcg@20"
# Number of settings tried of each method that has a choice: the same budget for all.
TRIALS = 6


class Baseline:
    """A recommender of known users and items.

    Args:
        seed: seed of all random numbers.
        settings: the method's settings, as in an entry of its `grid`.

    A subclass sets `name` (on the command line), `title` (in tables) and `grid` (one setting or `TRIALS` of them, the default
    first, among which the harness chooses on validation), and implements `fit` and `scores`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    # Whether results do not depend on the seed, so that one run suffices.
    deterministic: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, **settings: Any):
        self.seed, self.settings = seed, settings
        # Length of the refit; None for methods without epochs.
        self.epochs: int | None = None

    def fit(self, train: InteractionMatrix, validation: Holdout | None, epochs: int | None = None) -> None:
        """Trains on `train`.

        Args:
            train: training interactions.
            validation: held-out items; the weights of the best epoch by NDCG@20 are kept, and its number is stored in
                `self.epochs`. None for a refit.
            epochs: length of a refit.
        """
        raise NotImplementedError

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """A score for each item, float32 `[len(users), num_items]`, higher is better; scores of seen items are ignored."""
        raise NotImplementedError


def device() -> torch.device:
    """The device of methods trained by gradient: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_type() -> torch.dtype:
    """The fastest type of matrix products on this CPU: bfloat16 if it has instructions for it, else float32."""
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32


def evaluate(
    scores: Callable[[np.ndarray], torch.Tensor],
    interactions: InteractionMatrix,
    holdout: Holdout,
    batch_size: int = 256,
    with_lists: bool = False,
) -> dict[str, float]:
    """HR@K, NDCG@K and MRR@K of the held-out items among all items that a user has not seen in `interactions`.

    Args:
        scores: scores of users, see [`Baseline.scores`].
        interactions: seen items, left out of the ranking of their users.
        holdout: users and targets.
        batch_size: users scored at once.
        with_lists: also coverage@K and popularity@K.
    """
    popularity = interactions.popularity() if with_lists else None
    metrics = RankingMetrics(interactions.num_items, popularity=popularity)
    for start in range(0, len(holdout.users), batch_size):
        users = holdout.users[start : start + batch_size]
        indptr, seen = interactions.of_users(users)
        rows = np.repeat(np.arange(len(users)), np.diff(indptr))
        metrics.update(scores(users), holdout.targets[start : start + batch_size], (rows, seen))
    return metrics.compute()


def train_epochs(
    baseline: Baseline,
    module: nn.Module,
    run_epoch: Callable[[int], None],
    train: InteractionMatrix,
    validation: Holdout | None,
    epochs: int | None,
    *,
    max_epochs: int,
    every: int = 1,
    patience: int = 5,
) -> None:
    """The training loop of all baselines with gradients; keeps the weights of the best epoch on validation.

    Args:
        baseline: its `scores` are evaluated, its `epochs` set.
        module: the module with the weights.
        run_epoch: trains for one epoch, numbered from 0.
        train, validation, epochs: arguments of [`Baseline.fit`].
        max_epochs: the largest number of epochs.
        every: epochs between evaluations.
        patience: evaluations without a better NDCG@20 after which training stops.
    """
    module.to(device())
    best, best_state, waited = -1.0, None, 0
    for epoch in range(max_epochs if epochs is None else epochs):
        module.train()
        run_epoch(epoch)
        if validation is None or (epoch + 1) % every:
            continue
        module.eval()
        with torch.no_grad():
            value = evaluate(baseline.scores, train, validation)[SELECT_BY]
        if value > best:
            best, best_state, waited = value, copy.deepcopy(module.state_dict()), 0
            baseline.epochs = epoch + 1
        else:
            waited += 1
            if waited >= patience:
                break
    if best_state is not None:
        module.load_state_dict(best_state)
    module.eval()
