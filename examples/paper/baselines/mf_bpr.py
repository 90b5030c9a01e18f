"""MF-BPR: matrix factorisation with a pairwise ranking loss (Rendle et al., 2009)."""

from __future__ import annotations

import numpy as np
import torch

from tokenrec_hf import MatrixFactorizationConfig, MatrixFactorizationModel
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.evaluation.fitting import device, train_epochs

from .base import Baseline


class MFBPR(Baseline):
    """Vectors of users and items, trained in batches of interactions, scored by dot product.

    Settings: fields of the model's configuration, and `lr`.
    """

    name, title = "mf", "MF"
    grid = (
        {"embedding_dim": 128, "l2_weight": 1e-2, "lr": 2e-3},
        {"embedding_dim": 128, "l2_weight": 3e-2, "lr": 2e-3},
        {"embedding_dim": 64, "l2_weight": 1e-2, "lr": 5e-3},
        {"embedding_dim": 64, "l2_weight": 3e-2, "lr": 5e-3},
        {"embedding_dim": 256, "l2_weight": 1e-2, "lr": 2e-3},
        {"embedding_dim": 256, "l2_weight": 3e-2, "lr": 2e-3},
    )
    batch_size = 2048
    max_epochs, every, patience = 200, 5, 4

    def build(self, train: InteractionMatrix, **config) -> MatrixFactorizationModel:
        """A fresh model."""
        sizes = {"num_users": train.num_users, "num_items": train.num_items}
        return MatrixFactorizationModel(MatrixFactorizationConfig(**sizes, **config))

    def fit(self, train, validation, epochs=None):  # noqa: D102
        torch.manual_seed(self.seed)
        config = {name: value for name, value in self.settings.items() if name != "lr"}
        self.model = model = self.build(train, **config)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.settings["lr"])

        def run_epoch(epoch):
            for rows in torch.randperm(len(train)).split(self.batch_size):
                loss = self.loss(train, rows.numpy(), epoch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self._keep_vectors()

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
        self._keep_vectors()

    def loss(self, train: InteractionMatrix, rows: np.ndarray, epoch: int) -> torch.Tensor:
        """The loss of the interactions numbered `rows`."""
        users, items = train.users[rows], train.items[rows]
        negatives = train.sample_negatives(users, 1, seed=self.seed, epoch=epoch, examples=rows)
        return self.model(*(torch.from_numpy(rows).to(device()) for rows in (users, items, negatives))).loss

    def _keep_vectors(self):
        # LightGCN propagates once, not for each scored batch.
        self.user_vectors, self.item_vectors = self.model.user_embeddings(), self.model.item_embeddings()

    def scores(self, users):  # noqa: D102
        return self.user_vectors[users] @ self.item_vectors.T
