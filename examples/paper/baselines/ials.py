"""iALS, as the package has it, with the budget of settings of all baselines."""

from __future__ import annotations

from tokenrec_hf.evaluation import baselines

from .base import Baseline


class IALS(Baseline):
    """Matrix factorisation of implicit feedback by alternating least squares (Hu et al., 2008)."""

    name, title = "ials", "iALS"
    grid = (
        {"factors": 128, "weight": 10, "l2": 10.0},
        {"factors": 128, "weight": 10, "l2": 30.0},
        {"factors": 128, "weight": 30, "l2": 30.0},
        {"factors": 128, "weight": 4, "l2": 10.0},
        {"factors": 256, "weight": 10, "l2": 30.0},
        {"factors": 64, "weight": 10, "l2": 3.0},
    )

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.fitted = baselines.IALS(train, **self.settings, seed=self.seed)

    def scores(self, users):  # noqa: D102
        return self.fitted.scores(users)
