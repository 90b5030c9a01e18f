"""Training of baselines by gradient: the loop, with early stopping on validation, and the device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout
from .baselines import Scorer, baseline_ranks
from .metrics import ndcg


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_epochs(
    baseline: Scorer,
    module: nn.Module,
    run_epoch: Callable[[int], None],
    train: InteractionMatrix,
    validation: Holdout | None,
    epochs: int | None,
    *,
    max_epochs: int,
    every: int = 1,
    patience: int = 5,
) -> int | None:
    """Trains a module, and keeps the weights of the epoch with the best NDCG@20 on validation.

    Args:
        baseline: its `scores` are evaluated.
        module: the module with the weights.
        run_epoch: trains for one epoch, numbered from 0.
        train: training interactions, whose items are not ranked for their users.
        validation: held-out items. None trains without evaluations, as in a refit.
        epochs: length of a refit; None for at most `max_epochs`.
        max_epochs: the largest number of epochs.
        every: epochs between evaluations.
        patience: evaluations without a better NDCG@20 after which training stops.

    Returns:
        The number of the best epoch, from 1; None without an evaluation.
    """
    module.to(device())
    best, best_epoch, best_state, waited = -1.0, None, None, 0
    for epoch in range(max_epochs if epochs is None else epochs):
        module.train()
        run_epoch(epoch)
        if validation is None or (epoch + 1) % every:
            continue
        module.eval()
        with torch.no_grad():
            value = ndcg(baseline_ranks(baseline, train, validation), 20)
        if value > best:
            best, best_epoch, best_state, waited = value, epoch + 1, copy.deepcopy(module.state_dict()), 0
        else:
            waited += 1
            if waited >= patience:
                break
    if best_state is not None:
        module.load_state_dict(best_state)
    module.eval()
    return best_epoch
