"""HR@K of ranked lists with one relevant item each, as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "HR@K: the share of users whose relevant item is among the first k."
_CITATION = ""
_INPUTS = """
Args:
    predictions: for each user the recommended items, best first, at least `k` of them or all there are.
    references: for each user the one item that is relevant.
    k: the length of the list that counts, or several of them; 10 by default.
Returns:
    `hr@k` for each `k`, between 0 and 1.
Examples:
    >>> metric = evaluate.load("hit_rate_at_k")
    >>> metric.compute(predictions=[["a", "b"], ["c", "d"]], references=["b", "x"], k=2)
    {'hr@2': 0.5}
"""


class HitRateAtK(evaluate.Metric):
    """See the description."""

    def _info(self):
        # Items are strings or integers.
        features = [
            datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value(kind)), "references": datasets.Value(kind)}
            )
            for kind in ("string", "int64")
        ]
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions, references, k=10):
        if not len(references):
            raise ValueError("there is no user to compute hr of; add at least one.")
        # Not in the list: infinitely far down.
        ranks = np.array(
            [
                float(list(items).index(target)) if target in items else np.inf
                for items, target in zip(predictions, references)
            ]
        )
        lengths = [k] if isinstance(k, int) else list(k)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"k is {k!r} but must be at least 1.")
        return {f"hr@{one}": float((1.0 * (ranks < one)).mean()) for one in lengths}
