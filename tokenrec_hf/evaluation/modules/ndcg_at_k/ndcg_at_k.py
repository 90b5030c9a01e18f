"""NDCG@K of ranked lists with one relevant item each, as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "NDCG@K: the mean over users of 1 / log2(rank + 2) where the relevant item is among the first k (rank from 0), else 0."
_CITATION = ""
_INPUTS = """
Args:
    predictions: for each user the recommended items, best first, at least `k` of them or all there are.
    references: for each user the one item that is relevant.
    k: the length of the list that counts, or several of them; 10 by default.
Returns:
    `ndcg@k` for each `k`, between 0 and 1.
Examples:
    >>> metric = evaluate.load("ndcg_at_k")
    >>> metric.compute(predictions=[["a", "b"], ["c", "d"]], references=["b", "x"], k=2)
    {'ndcg@2': 0.31546487678572877}
"""


class NDCGAtK(evaluate.Metric):
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
            raise ValueError("there is no user to compute ndcg of; add at least one.")
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
        return {f"ndcg@{one}": float(((1 / np.log2(ranks + 2)) * (ranks < one)).mean()) for one in lengths}
