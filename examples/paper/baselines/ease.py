"""EASE: a linear autoencoder of items without self-similarity, in closed form (Steck, 2019)."""

from __future__ import annotations

import torch

from .base import Baseline
from .sparse import binary_matrix


class EASE(Baseline):
    """Minimises ||X - X B||^2 + lambda ||B||^2 under diag(B) = 0; a user's scores are x B."""

    name, title = "ease", "EASE"
    grid = tuple({"l2": l2} for l2 in (100, 20, 50, 200, 500, 1000))
    deterministic = True

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.matrix = binary_matrix(train)
        gram = torch.from_numpy((self.matrix.T @ self.matrix).toarray())  # [num_items, num_items]
        gram.diagonal().add_(self.settings["l2"])
        # P = (X^T X + lambda I)^-1 and B = I - P diag(1 / diag(P)), off the diagonal.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        weights = inverse.div_(-inverse.diagonal().clone())
        weights.fill_diagonal_(0)
        # Row-major, as the sparse product reads it.
        self.weights = weights.contiguous().numpy()

    def scores(self, users):  # noqa: D102
        return torch.from_numpy(self.matrix[users] @ self.weights)
