"""The interface of a baseline: `fit(train, validation)` and `scores(users)`.

Users and items are rows of an `InteractionMatrix`, whose interactions are in time order for each user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout

SELECT_BY = "ndcg@20"
# Number of settings tried of each method that has a choice: the same budget for all.
TRIALS = 6


def product_type() -> torch.dtype:
    """The fastest type of matrix products on this CPU: bfloat16 if it has instructions for it, else float32."""
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32


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
        """Trains on `train`; arguments as in [`~sequence.SequenceModel.fit`]."""
        raise NotImplementedError

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """A score for each item, float32 `[len(users), num_items]`, higher is better; scores of seen items are ignored."""
        raise NotImplementedError
