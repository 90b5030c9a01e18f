"""SASRec, as the package has it, with the budget of settings of all baselines and a second loss.

The binary cross-entropy of the next item against a random one is the loss of SASRec's paper (Kang and McAuley, ICDM 2018, arXiv
1808.09781).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tokenrec_hf.evaluation import sequence
from tokenrec_hf.evaluation.fitting import device

from .base import Baseline


class SASRec(sequence.SASRec, Baseline):
    """SASRec; the setting `loss` is "softmax" or "bce"."""

    name, title = "sasrec", "SASRec"
    defaults = {**sequence.SASRec.defaults, "loss": "softmax"}
    grid = (
        {"loss": "softmax", "dropout": 0.5},
        {"loss": "softmax", "dropout": 0.2, "num_layers": 1, "batch_size": 64},
        {"loss": "softmax", "dropout": 0.5, "dim": 128},
        {"loss": "softmax", "dropout": 0.3, "dim": 128, "num_layers": 1, "batch_size": 64},
        {"loss": "softmax", "dropout": 0.3, "learning_rate": 3e-3},
        {"loss": "bce", "dropout": 0.2, "batch_size": 64},
    )

    def loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """See [`SequenceModel.loss`]."""
        if self.settings["loss"] == "softmax":
            return super().loss(starts, ends, epoch)
        hidden, targets = self.predictions(starts, ends)
        lengths = ends - starts - 1
        examples = np.repeat(starts + 1 - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        negatives = self.train.sample_negatives(
            self.train.users[examples], 1, seed=self.seed, epoch=epoch, examples=examples
        )
        chosen = torch.stack([targets, torch.from_numpy(negatives[:, 0]).to(device())], dim=1)
        logits = torch.einsum("pd,pcd->pc", hidden, F.embedding(chosen, self.encoder.items.weight))
        return F.binary_cross_entropy_with_logits(logits, logits.new_tensor([1.0, 0.0]).expand_as(logits))
