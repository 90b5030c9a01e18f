"""What the harness asks of a baseline: `fit(train, validation)` and `scores(users)`.

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
# Settings tried of each method that has anything to choose: the same budget for all.
TRIALS = 6


class Baseline:
    """A recommender of known users and items.

    Args:
        seed: of everything random.
        settings: the method's own, as in an entry of its `grid`.

    A subclass sets `name` (of the command line) and `grid` (the settings among which the harness chooses on validation, the
    first being the default; one, or `TRIALS` of them), and implements `fit` and `scores`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    # Whether the seed changes nothing, so that one run says everything.
    deterministic: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, **settings: Any):
        self.seed, self.settings = seed, settings
        # How long a refit is to train; stays None where there is nothing to choose.
        self.epochs: int | None = None

    def fit(self, train: InteractionMatrix, validation: Holdout | None, epochs: int | None = None) -> None:
        """Trains on `train`.

        Args:
            train: the interactions to learn from.
            validation: the items held out; the best epoch by NDCG@20 on them is kept, and its number left in `self.epochs`.
                None for a refit, when there is nothing to choose by.
            epochs: the length of a refit.
        """
        raise NotImplementedError

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """A score for each item, float32 `[len(users), num_items]`, higher is better; seen items may have any."""
        raise NotImplementedError


def device() -> torch.device:
    """Where what is trained by gradient is trained and evaluated: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_type() -> torch.dtype:
    """On a CPU, bfloat16 where it has instructions for such products; elsewhere float32, which is faster there."""
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32


def evaluate(
    scores: Callable[[np.ndarray], torch.Tensor],
    interactions: InteractionMatrix,
    holdout: Holdout,
    batch_size: int = 256,
    with_lists: bool = False,
) -> dict[str, float]:
    """HR@K, NDCG@K and MRR@K of the held-out items among all that a user has not seen in `interactions`.

    Args:
        scores: that of a [`Baseline`].
        interactions: whose items are left out of the ranking of their users.
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
    """The loop of every baseline that is trained by gradient: the weights of the best epoch on validation are kept.

    Args:
        baseline: its `scores` are evaluated, its `epochs` set.
        module: whose weights are kept.
        run_epoch: trains for one epoch, numbered from 0.
        train, validation, epochs: as `fit` got them.
        max_epochs: the end at the latest.
        every: epochs between evaluations.
        patience: evaluations without a better NDCG@20 that end the training.
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
