"""LightGCN: matrix factorisation smoothed over the user-item graph (He et al., 2020), scored by its final representations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenrec_hf import LightGCNConfig, LightGCNModel
from tokenrec_hf.evaluation.fitting import device

from .mf_bpr import MFBPR


class LightGCN(MFBPR):
    """As [`MFBPR`], with `num_layers` and a choice of loss: BPR, or a softmax over cosine / `temperature`.

    The softmax is over the distinct items of a batch, which is much faster than over all items.
    """

    name, title = "lightgcn", "LightGCN"
    grid = (
        {"num_layers": 3, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 5e-3},
        {"num_layers": 2, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 5e-3},
        {"num_layers": 2, "loss_type": "bpr", "embedding_dim": 256, "l2_weight": 1e-3, "lr": 3e-3},
        {"num_layers": 2, "loss_type": "softmax", "temperature": 0.1, "lr": 5e-3},
        {"num_layers": 3, "loss_type": "softmax", "temperature": 0.15, "lr": 5e-3},
        {"num_layers": 3, "loss_type": "softmax", "temperature": 0.2, "lr": 5e-3},
    )

    def build(self, train, **config):  # noqa: D102
        return LightGCNModel.from_interactions(LightGCNConfig(**config), train)

    def loss(self, train, rows, epoch):  # noqa: D102
        config = self.model.config
        if config.loss_type == "bpr":
            return super().loss(train, rows, epoch)
        users, items = (F.normalize(vectors, dim=-1) for vectors in self.model.representations())
        competitors, labels = torch.from_numpy(train.items[rows]).to(device()).unique(return_inverse=True)
        user = F.embedding(torch.from_numpy(train.users[rows]).to(device()), users)  # [B, d]
        return F.cross_entropy(user @ F.embedding(competitors, items).T / config.temperature, labels)
