"""S3-Rec: self-supervised pre-training of a sequence model (Zhou et al., CIKM 2020, arXiv 2008.07873).

The paper pre-trains by four objectives that maximise mutual information, then trains as SASRec. Two of the four need item
attributes, which these data sets lack. The other two are implemented: masked items are predicted from both sides, and a segment
cut out of a history is recognised among the segments of other users by its context. Negatives are all items, and all segments of
the batch, instead of one of each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.evaluation.fitting import device
from tokenrec_hf.evaluation.sequence import padded
from tokenrec_hf.models.functional import linear_cross_entropy

from .bert4rec import cloze_mask
from .sasrec import SASRec

# Probability that an item is masked in pre-training, as in the paper.
MASK_PROBABILITY = 0.2


class S3Rec(SASRec):
    """S3-Rec; settings beside those of [`SASRec`]: `pretrain_epochs` and `segment_weight`."""

    name, title = "s3rec", "S3-Rec"
    num_special = 2
    defaults = {**SASRec.defaults, "pretrain_epochs": 10, "segment_weight": 0.5}
    grid = (
        {"dropout": 0.5},
        {"dropout": 0.2, "num_layers": 1, "batch_size": 64},
        {"dropout": 0.5, "pretrain_epochs": 30},
        {"dropout": 0.5, "segment_weight": 0.1, "dim": 128},
        {"dropout": 0.3, "learning_rate": 3e-3},
        {"dropout": 0.2, "loss": "bce", "batch_size": 64},
    )

    def prepare(self, train: InteractionMatrix) -> None:
        """See [`SequenceModel.prepare`]."""
        super().prepare(train)
        self.pretrain()

    def pretrain(self) -> None:
        """Trains the encoder, with bidirectional attention, by the two objectives."""
        dim = self.settings["dim"]
        self.segment_weights = nn.Linear(dim, dim, bias=False).to(device())
        parameters = [*self.encoder.parameters(), *self.segment_weights.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.settings["learning_rate"])
        self.encoder.causal = False
        self.encoder.train()
        for epoch in range(self.settings["pretrain_epochs"]):
            self.run_epoch(optimizer, self.pretraining_loss, epoch)
        self.encoder.causal = True

    def pretraining_loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """Masked-item prediction and segment prediction on the windows."""
        # SASRec's windows have one item more than there are positions.
        starts = np.maximum(starts, ends - self.settings["max_length"])
        items = padded(self.train.items, starts, ends, self.padding)
        lengths = torch.from_numpy(ends - starts).to(device())
        masked = cloze_mask(lengths, items.shape[1], MASK_PROBABILITY, last_only=0.0)
        hidden = self.encoder(items.masked_fill(masked, self.padding + 1))[masked]
        targets = items[masked]
        loss = linear_cross_entropy(hidden, self.encoder.items.weight[: self.padding], targets) / len(targets)

        first, length = segments(lengths)
        position = torch.arange(items.shape[1], device=items.device)
        cut = (position >= first[:, None]) & (position < (first + length)[:, None])
        rows = torch.arange(len(items), device=items.device)
        around = self.encoder(items.masked_fill(cut, self.padding + 1))[rows, lengths - 1]  # [B, d]
        segment_starts = starts + first.cpu().numpy()
        inside = padded(self.train.items, segment_starts, segment_starts + length.cpu().numpy(), self.padding)
        segment = self.encoder(inside)[rows, length - 1]  # [B, d]
        logits = self.segment_weights(around) @ segment.T / around.shape[1] ** 0.5
        return loss + self.settings["segment_weight"] * F.cross_entropy(logits, rows)


def segments(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A random segment of each row, of one item to half of them: its first position and its length, int64 `[B]` each."""
    length = 1 + (torch.rand(len(lengths), device=lengths.device) * (lengths // 2).clamp(min=1)).long()
    return (torch.rand(len(lengths), device=lengths.device) * (lengths - length + 1)).long(), length
