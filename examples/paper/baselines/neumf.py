"""NeuMF, the fusion of generalised matrix factorisation and an MLP (Neural Collaborative Filtering, He et al., 2017)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenrec_hf.evaluation.fitting import device, train_epochs

from .base import Baseline


class NeuMFModel(nn.Module):
    """A linear layer over the product of the GMF vectors and the MLP of the MLP vectors of a user and an item.

    Args:
        num_users, num_items: sizes.
        dim: size d of the GMF vectors and of the MLP's output; the MLP's layers have 4 d (input), 2 d and d units.
        dropout: dropout rate of the MLP's hidden layer.
    """

    def __init__(self, num_users: int, num_items: int, dim: int, dropout: float):
        super().__init__()
        self.gmf_users, self.gmf_items = nn.Embedding(num_users, dim), nn.Embedding(num_items, dim)
        self.mlp_users, self.mlp_items = nn.Embedding(num_users, 2 * dim), nn.Embedding(num_items, 2 * dim)
        self.hidden, self.output = nn.Linear(4 * dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.predict = nn.Linear(2 * dim, 1)
        self.dropout = nn.Dropout(dropout)
        for table in (self.gmf_users, self.gmf_items, self.mlp_users, self.mlp_items):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Logits of pairs, users and items `[...]`."""
        product = self.gmf_users(users) * self.gmf_items(items)
        hidden = self.hidden(torch.cat([self.mlp_users(users), self.mlp_items(items)], dim=-1))
        deep = F.relu(self.output(self.dropout(F.relu(hidden))))
        return self.predict(torch.cat([product, deep], dim=-1)).squeeze(-1)

    @torch.no_grad()
    def all_logits(self, users: torch.Tensor) -> torch.Tensor:
        """`forward` of users `[B]` with each item, `[B, num_items]`.

        The first layer is linear in user and item, so it is applied once to each and not to each pair.
        """
        dim = self.output.out_features
        of_user, of_item = self.hidden.weight.split(2 * dim, dim=1)
        users_hidden = F.linear(self.mlp_users(users), of_user, self.hidden.bias)  # [B, 2 d]
        items_hidden = F.linear(self.mlp_items.weight, of_item)  # [num_items, 2 d]
        of_product, of_deep = self.predict.weight[0].split(dim)
        logits = (self.gmf_users(users) * of_product) @ self.gmf_items.weight.T + self.predict.bias
        # Two users at a time: more exceed the cache and take three times as long.
        for rows, hidden in zip(logits.split(2), users_hidden.split(2)):
            pairs = F.relu_(hidden[:, None] + items_hidden)  # [2, num_items, 2 d]
            rows += F.relu_(self.output(pairs)) @ of_deep
        return logits


class NeuMF(Baseline):
    """Binary cross-entropy on interactions and `negatives` sampled items for each, with Adam."""

    name, title = "neumf", "NCF (NeuMF)"
    grid = (
        {"dim": 16, "dropout": 0.5, "negatives": 4, "lr": 2e-3, "l2": 1e-6},
        {"dim": 32, "dropout": 0.5, "negatives": 4, "lr": 2e-3, "l2": 1e-6},
        {"dim": 32, "dropout": 0.5, "negatives": 4, "lr": 2e-3, "l2": 1e-5},
        {"dim": 16, "dropout": 0.5, "negatives": 8, "lr": 2e-3, "l2": 1e-6},
        {"dim": 32, "dropout": 0.2, "negatives": 4, "lr": 1e-3, "l2": 1e-6},
        {"dim": 16, "dropout": 0.0, "negatives": 4, "lr": 1e-3, "l2": 1e-5},
    )
    batch_size = 1024  # interactions
    max_epochs, every, patience = 60, 3, 3

    def fit(self, train, validation, epochs=None):  # noqa: D102
        torch.manual_seed(self.seed)
        settings = self.settings
        self.model = model = NeuMFModel(train.num_users, train.num_items, settings["dim"], settings["dropout"])
        optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], weight_decay=settings["l2"])

        def run_epoch(epoch):
            for rows in torch.randperm(len(train)).split(self.batch_size):
                rows = rows.numpy()
                users = train.users[rows]
                negatives = train.sample_negatives(
                    users, settings["negatives"], seed=self.seed, epoch=epoch, examples=rows
                )
                pairs = np.concatenate([train.items[rows, None], negatives], axis=1)
                items = torch.from_numpy(pairs).to(device())  # [B, 1 + m]
                logits = model(torch.from_numpy(users).to(device())[:, None].expand_as(items), items)
                labels = torch.zeros_like(logits)
                labels[:, 0] = 1
                loss = F.binary_cross_entropy_with_logits(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        self.epochs = train_epochs(
            self,
            model,
            run_epoch,
            train,
            validation,
            epochs,
            max_epochs=self.max_epochs,
            every=self.every,
            patience=self.patience,
        )

    def scores(self, users):  # noqa: D102
        return self.model.all_logits(torch.from_numpy(users).to(device()))
