"""GTN: graph trend filtering networks (Fan et al., SIGIR 2022, arXiv 2108.05552).

LightGCN smooths its embeddings equally over all interactions. GTN makes the differences sparse, by an l1 norm:
E = argmin 1/2 ||E - E_in||^2 + lambda ||Delta E||_1. Delta is the incidence matrix of the user-item graph with columns divided by
the root of the degrees. The layers of the network are steps of a primal-dual method (the proximal alternating
predictor-corrector, with gamma = 1 and beta = 1/2).
"""

from __future__ import annotations

import torch

from tokenrec_hf import LightGCNConfig, LightGCNModel
from tokenrec_hf.models.modeling_collaborative import _Propagation, _SparseMatrix

from .lightgcn import LightGCN


class GTNModel(LightGCNModel):
    """LightGCN's embeddings after `num_layers` steps of trend filtering with the weight `smoothness` (lambda)."""

    def __init__(self, config: LightGCNConfig):
        super().__init__(config)
        self._incidence: tuple[_SparseMatrix, _SparseMatrix] | None = None

    def incidence(self) -> tuple[_SparseMatrix, _SparseMatrix]:
        """Delta `[interactions, users + items]` and its transpose; degrees include a self-loop at each node."""
        if self._incidence is None or self._incidence[0].values.device != self.edge_users.device:
            ends = torch.cat([self.edge_users, self.edge_items + self.config.num_users]).long()
            size = self.config.num_users + self.config.num_items
            scale = (torch.bincount(ends, minlength=size) + 1).float().rsqrt()[ends]
            edges = len(self.edge_users)
            scale[edges:] *= -1
            rows = torch.arange(edges, device=ends.device).repeat(2)
            delta = _SparseMatrix.from_entries(rows, ends, scale, edges)
            self._incidence = delta, _SparseMatrix.from_entries(ends, rows, scale, size)
        return self._incidence

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final representations of users `[num_users, d]` and items `[num_items, d]`, with gradient."""
        delta, transposed = self.incidence()
        start = torch.cat([self.user_table.weight, self.item_table.weight])
        embeddings, dual, limit = start, start.new_zeros(()), self.config.smoothness
        for _ in range(self.config.num_layers):
            differences = _Propagation.apply(delta, transposed, embeddings)  # [interactions, d]
            dual = torch.add(dual, differences, alpha=0.5).clamp(-limit, limit)
            embeddings = start - _Propagation.apply(transposed, delta, dual)
        return embeddings[: self.config.num_users], embeddings[self.config.num_users :]


class GTN(LightGCN):
    """GTN; settings as those of [`LightGCN`], and `smoothness`."""

    name, title = "gtn", "GTN"
    grid = (
        {"num_layers": 3, "smoothness": 2.0, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 1e-2},
        {"num_layers": 3, "smoothness": 2.0, "loss_type": "softmax", "temperature": 0.15, "lr": 1e-2},
        {"num_layers": 3, "smoothness": 2.0, "loss_type": "softmax", "temperature": 0.1, "lr": 1e-2},
        {"num_layers": 3, "smoothness": 0.02, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 1e-2},
        {"num_layers": 3, "smoothness": 0.02, "loss_type": "softmax", "temperature": 0.15, "lr": 1e-2},
        {"num_layers": 2, "smoothness": 2.0, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 1e-2},
    )

    # A step costs a pass over the whole graph, several times the cost of LightGCN.
    batch_size = 8192

    def build(self, train, smoothness, **config):  # noqa: D102
        return GTNModel.from_interactions(LightGCNConfig(smoothness=smoothness, **config), train)
