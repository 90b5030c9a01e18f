"""iALS: matrix factorisation of implicit feedback by alternating least squares (Hu et al., 2008), from `implicit`."""

from __future__ import annotations

import torch
from implicit.als import AlternatingLeastSquares

from .base import Baseline
from .sparse import binary_matrix


class IALS(Baseline):
    """Observed pairs weigh `weight`, all others 1; `factors` dimensions, scored by dot product."""

    name, title = "ials", "iALS"
    grid = (
        {"factors": 128, "weight": 10, "l2": 10.0},
        {"factors": 128, "weight": 10, "l2": 30.0},
        {"factors": 128, "weight": 30, "l2": 30.0},
        {"factors": 128, "weight": 4, "l2": 10.0},
        {"factors": 256, "weight": 10, "l2": 30.0},
        {"factors": 64, "weight": 10, "l2": 3.0},
    )
    iterations = 15

    def fit(self, train, validation, epochs=None):  # noqa: D102
        model = AlternatingLeastSquares(
            factors=self.settings["factors"],
            regularization=self.settings["l2"],
            alpha=self.settings["weight"],
            iterations=self.iterations,
            use_cg=False,
            use_gpu=False,
            # More threads add in another order.
            num_threads=1,
            random_state=self.seed,
        )
        model.fit(binary_matrix(train), show_progress=False)
        self.user_vectors, self.item_vectors = map(torch.from_numpy, (model.user_factors, model.item_factors))

    def scores(self, users):  # noqa: D102
        return self.user_vectors[users] @ self.item_vectors.T
