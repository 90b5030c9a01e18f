"""HR@K of ranked lists with one relevant item each, as a module of `evaluate`.

The folder of this file has to load on its own, from a Space or a copy. `evaluate` copies imports of the same folder only, so
the modules cannot share code.
"""

from collections.abc import Sequence
from typing import Any, cast

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "HR@K: the share of users with the relevant item among the first k."
_INPUTS = """
Args:
    predictions: for each user the recommended items, best first, at least `k` of them or all that there are.
    references: for each user the one relevant item.
    k: the length of the list, or several lengths; 10 by default.
Returns:
    `hr@k` for each `k`, between 0 and 1.
Examples:
    >>> metric = evaluate.load("hit_rate_at_k")
    >>> metric.compute(predictions=[["a", "b"], ["c", "d"]], references=["b", "x"], k=2)
    {'hr@2': 0.5}
"""


class HitRateAtK(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": datasets.Sequence(item), "references": item})
            for item in (datasets.Value("string"), datasets.Value("int64"))
        ]
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def compute(self, *, references: Sequence[str | int] | None = None, **arguments: Any) -> dict[str, float]:
        """As [`evaluate.Metric.compute`], which cannot infer the type of ids from no users."""
        if references is not None and not len(references):
            raise ValueError("there is no user to compute hr of; add at least one user.")
        return cast(dict[str, float], super().compute(references=references, **arguments))

    def _compute(
        self, predictions: Sequence[Sequence[str | int]], references: Sequence[str | int], k: int | Sequence[int] = 10
    ) -> dict[str, float]:
        lengths = np.atleast_1d(k).tolist()
        if not lengths or min(lengths) < 1 or any(length % 1 for length in lengths):
            raise ValueError(f"k is {k!r} but must be a whole number of at least 1, or a list of them.")
        pairs = zip(predictions, references)
        ranks = np.array([list(items).index(target) if target in items else np.inf for items, target in pairs])
        return {f"hr@{length}": float((ranks < length).mean()) for length in lengths}
