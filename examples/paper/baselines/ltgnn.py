"""LTGNN: linear-time graph neural networks (Zhang et al., WWW 2024, arXiv 2402.13973).

The representations are the fixed point Z = (1 - alpha) A Z + alpha E of personalised PageRank, with the normalised adjacency A,
and depend on the whole graph. Each training step makes one iteration from the state of the step before; the gradient, a fixed
point of the same form, is treated alike. Evaluation iterates until convergence. The paper also samples neighbours with a
variance correction, for larger graphs; here the sum over all neighbours, which the sampling estimates, is computed.
"""

from __future__ import annotations

import torch

from tokenrec_hf import LightGCNConfig, LightGCNModel

from .lightgcn import LightGCN


class _ImplicitLayer(torch.autograd.Function):
    """One iteration towards the fixed point of `embeddings`, and backwards towards that of their gradient, in the memories."""

    @staticmethod
    def forward(ctx, embeddings, adjacency, restart, memory, gradient_memory):
        ctx.adjacency, ctx.restart, ctx.gradient_memory = adjacency, restart, gradient_memory
        memory.copy_((1 - restart) * (adjacency @ memory) + restart * embeddings)
        return memory.clone()

    @staticmethod
    def backward(ctx, grad):
        # The adjacency is symmetric, so it is its own transpose.
        memory = ctx.gradient_memory
        memory.copy_((1 - ctx.restart) * (ctx.adjacency @ memory) + ctx.restart * grad)
        return memory.clone(), None, None, None, None


class LTGNNModel(LightGCNModel):
    """LightGCN's embeddings propagated by personalised PageRank with the probability `restart` (alpha)."""

    def __init__(self, config: LightGCNConfig):
        super().__init__(config)
        size = (config.num_users + config.num_items, config.embedding_dim)
        self.register_buffer("memory", torch.zeros(size), persistent=False)
        self.register_buffer("gradient_memory", torch.zeros(size), persistent=False)

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Representations after one more iteration, for the loss: users `[num_users, d]`, items `[num_items, d]`."""
        arguments = self.config.restart, self.memory, self.gradient_memory
        point = _ImplicitLayer.apply(self._tables(), self.adjacency(), *arguments)
        return point[: self.config.num_users], point[self.config.num_users :]

    @torch.no_grad()
    def fixed_point(self, steps: int = 30) -> torch.Tensor:
        """Z `[num_users + num_items, d]`, iterated from E; the error shrinks by 1 - alpha a step."""
        tables, restart = self._tables(), self.config.restart
        point = tables
        for _ in range(steps):
            point = (1 - restart) * (self.adjacency() @ point) + restart * tables
        return point

    def user_embeddings(self) -> torch.Tensor:
        """The users' part of the fixed point."""
        return self.fixed_point()[: self.config.num_users]

    def item_embeddings(self) -> torch.Tensor:
        """The items' part of the fixed point."""
        return self.fixed_point()[self.config.num_users :]

    def _tables(self):
        return torch.cat([self.user_table.weight, self.item_table.weight])


class LTGNN(LightGCN):
    """LTGNN; settings as those of [`LightGCN`], without layers, and `restart`."""

    name, title = "ltgnn", "LTGNN"
    grid = (
        {"restart": 0.45, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 5e-3},
        {"restart": 0.45, "loss_type": "softmax", "temperature": 0.15, "lr": 5e-3},
        {"restart": 0.2, "loss_type": "bpr", "l2_weight": 1e-3, "lr": 5e-3},
        {"restart": 0.2, "loss_type": "softmax", "temperature": 0.15, "lr": 5e-3},
        {"restart": 0.45, "loss_type": "bpr", "embedding_dim": 256, "l2_weight": 1e-3, "lr": 3e-3},
        {"restart": 0.3, "loss_type": "softmax", "temperature": 0.1, "lr": 5e-3},
    )

    def build(self, train, restart, **config):  # noqa: D102
        model = LTGNNModel.from_interactions(LightGCNConfig(restart=restart, **config), train)
        model.memory.copy_(model.fixed_point())
        return model
