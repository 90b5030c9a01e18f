"""BERT4Rec: masked items from both sides (Sun et al., CIKM 2019, arXiv 1904.06690).

A bidirectional transformer predicts the masked items of a history by a softmax over all items. For recommendations, a mask
follows the history. The training is long enough, which Petrov and Macdonald (RecSys 2022) found missing in reports of a weak
BERT4Rec. Unlike in the paper, norms precede the sublayers, and there is no output layer: the hidden state of a mask is
multiplied with the item embeddings.
"""

from __future__ import annotations

import numpy as np
import torch

from tokenrec_hf.evaluation.fitting import device
from tokenrec_hf.evaluation.sequence import SequenceModel, padded
from tokenrec_hf.models.functional import linear_cross_entropy

from .base import Baseline


def cloze_mask(lengths: torch.Tensor, longest: int, probability: float, last_only: float) -> torch.Tensor:
    """Masked positions: each with `probability`, but in a share `last_only` of the rows only the last position.

    A row without a drawn position has its last position masked, so that every row has a target.

    Args:
        lengths: items of each row, int64 `[B]`.
        longest: number of positions T.
        probability: probability that a position is masked.
        last_only: share of rows with only the last position masked, as in recommendations.

    Returns:
        boolean `[B, T]`.
    """
    position = torch.arange(longest, device=lengths.device)
    last = position == lengths[:, None] - 1
    drawn = (torch.rand(len(lengths), longest, device=lengths.device) < probability) & (position < lengths[:, None])
    alone = (torch.rand(len(lengths), 1, device=lengths.device) < last_only) | ~drawn.any(dim=1, keepdim=True)
    return torch.where(alone, last, drawn)


class BERT4Rec(SequenceModel, Baseline):
    """BERT4Rec; settings beside the common ones: `mask_probability` and `last_only`, see [`cloze_mask`]."""

    name, title = "bert4rec", "BERT4Rec"
    causal = False
    num_special = 2
    grid = (
        {"mask_probability": 0.3, "last_only": 0.3, "dropout": 0.2, "batch_size": 64},
        {"mask_probability": 0.3, "last_only": 0.3, "dropout": 0.5},
        {"mask_probability": 0.6, "last_only": 0.1, "dropout": 0.2, "batch_size": 64},
        {"mask_probability": 0.3, "last_only": 0.5, "dropout": 0.2, "num_layers": 1, "batch_size": 64},
        {"mask_probability": 0.3, "last_only": 0.3, "dropout": 0.3, "dim": 128},
        {"mask_probability": 0.3, "last_only": 0.3, "dropout": 0.3, "learning_rate": 3e-3},
    )

    def loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """The loss of predicting the masked items of the windows."""
        items = padded(self.train.items, starts, ends, self.padding)
        masked = cloze_mask(
            torch.from_numpy(ends - starts).to(device()),
            items.shape[1],
            self.settings["mask_probability"],
            self.settings["last_only"],
        )
        hidden = self.encoder(items.masked_fill(masked, self.padding + 1))[masked]
        targets = items[masked]
        return linear_cross_entropy(hidden, self.encoder.items.weight[: self.padding], targets) / len(targets)

    @torch.no_grad()
    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Baseline.scores`]."""
        items, lengths = self.histories(users, self.settings["max_length"] - 1)
        items = torch.cat([items, items.new_full((len(items), 1), self.padding)], dim=1)
        rows = torch.arange(len(items), device=items.device)
        items[rows, lengths] = self.padding + 1
        return self.encoder(items)[rows, lengths] @ self.encoder.items.weight[: self.padding].T
