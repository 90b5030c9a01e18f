"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

A causal transformer predicts the next item at each position of a history. The grid has two losses: the paper's binary
cross-entropy of the next item against a random one, and the softmax over all items, which is known to be far better (Klenitskiy
and Vasilev, RecSys 2023; Petrov and Macdonald, RecSys 2023). Histories longer than the maximum are cut into windows, so that
training uses every interaction. Unlike in the paper, norms precede the sublayers, and the feed-forward sublayer is four times as
wide as the model and has GELU.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .base import device
from .sequence import SequenceBaseline, linear_cross_entropy, padded


class SASRec(SequenceBaseline):
    """SASRec; the setting `loss` is "softmax" or "bce"."""

    name = "sasrec"
    title = "SASRec"
    causal = True
    overlap = 1
    grid = (
        {"loss": "softmax", "dropout": 0.5},
        {"loss": "softmax", "dropout": 0.2, "num_layers": 1, "batch_size": 64},
        {"loss": "softmax", "dropout": 0.5, "dim": 128},
        {"loss": "softmax", "dropout": 0.3, "dim": 128, "num_layers": 1, "batch_size": 64},
        {"loss": "softmax", "dropout": 0.3, "learning_rate": 3e-3},
        {"loss": "bce", "dropout": 0.2, "batch_size": 64},
    )

    def loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """The loss of predicting each item of the windows, except the first, from the items before it."""
        items = padded(self.train.items, starts, ends, self.padding)
        known = items[:, 1:] != self.padding
        hidden, targets = self.encoder(items[:, :-1])[known], items[:, 1:][known]  # [P, d], [P]
        table = self.encoder.items.weight[: self.padding]
        if self.settings["loss"] == "softmax":
            return linear_cross_entropy(hidden, table, targets)
        lengths = ends - starts - 1
        examples = np.repeat(starts + 1 - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        negatives = self.train.sample_negatives(
            self.train.users[examples], 1, seed=self.seed, epoch=epoch, examples=examples
        )
        chosen = torch.stack([targets, torch.from_numpy(negatives[:, 0]).to(device())], dim=1)
        logits = torch.einsum("pd,pcd->pc", hidden, F.embedding(chosen, table))
        return F.binary_cross_entropy_with_logits(logits, logits.new_tensor([1.0, 0.0]).expand_as(logits))

    @torch.no_grad()
    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Baseline.scores`]."""
        items, lengths = self.histories(users, self.settings["max_length"])
        last = self.encoder(items)[torch.arange(len(items), device=items.device), lengths - 1]
        return last @ self.encoder.items.weight[: self.padding].T
