"""Baselines that take seconds, to compare a recommender with: popularity, ItemKNN, EASE and iALS.

Each is fitted when it is made, and scores all items for rows of users of its training interactions. Repeated interactions count
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout, IndexedSplits
from ..models.functional import stable_topk
from .metrics import RankingMetrics, SeenPairs, ndcg, target_ranks

# Item rows that are made dense at once, and users that are scored at once.
ROWS, USERS = 1024, 256


class Scorer(Protocol):
    """A recommender of known users and items."""

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """A score for each item, float32 `[len(users), num_items]`, higher is better; those of seen items mean nothing."""
        ...


class Baseline(Scorer, Protocol):
    """A recommender that is fitted when it is made; `grid` are the settings to choose from on validation, the default first."""

    grid: ClassVar[Sequence[Mapping[str, Any]]]

    def __init__(self, train: InteractionMatrix, **settings: Any): ...


class Popularity:
    """The score of an item is its number of interactions."""

    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({},)

    def __init__(self, train: InteractionMatrix):
        self.counts = torch.from_numpy(train.popularity()).float()

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        return self.counts.expand(len(users), -1)


class ItemKNN:
    """The score of an item is the sum of its similarities to those items of the user that are among its nearest neighbours.

    The similarity of items with n_i and n_j users and n_ij common users is n_ij / (sqrt(n_i n_j) + shrinkage) (Sarwar et al.,
    2001).

    Args:
        train: the interactions.
        neighbours: of each item.
        shrinkage: lowers similarities that few users vouch for.
    """

    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"neighbours": 100, "shrinkage": 10},
        {"neighbours": 100, "shrinkage": 0},
        {"neighbours": 500, "shrinkage": 10},
    )

    def __init__(self, train: InteractionMatrix, neighbours: int = 100, shrinkage: float = 10):
        self.train = _distinct(train)
        lengths = torch.from_numpy(self.train.popularity()).float().sqrt()  # sqrt(n_i)
        nearest = []
        for start, common in _common_users(self.train):
            rows = torch.arange(len(common))
            common[rows, rows + start] = 0
            # Items without users have similarity 0; the minimum avoids 0 / 0.
            norms = torch.outer(lengths[start : start + len(common)], lengths) + shrinkage
            nearest.append(stable_topk(common / norms.clamp(min=1e-9), neighbours))
        items, values = (torch.cat(part) for part in zip(*nearest))  # [num_items, neighbours]
        columns = torch.arange(len(items))[:, None].expand_as(items)
        used = values > 0
        self.similarity = _sparse(items[used], columns[used], (len(items), len(items)), values[used])

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        return torch.sparse.mm(_histories(self.train, users), self.similarity).to_dense()


class EASE:
    """A linear autoencoder of items: minimises ||X - X B||^2 + l2 ||B||^2 under diag(B) = 0; a user's scores are x B (Steck, 2019).

    Its memory is three matrices `[num_items, num_items]` and its time that of an inverse; for up to about 20,000 items.
    """

    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({"l2": 100}, {"l2": 20}, {"l2": 500})

    def __init__(self, train: InteractionMatrix, l2: float = 100):
        self.train = _distinct(train)
        gram = torch.cat([common for _, common in _common_users(self.train)])
        gram.diagonal().add_(l2)
        # P = (X^T X + l2 I)^-1 and B = I - P diag(1 / diag(P)), off the diagonal.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        weights = inverse.div_(-inverse.diagonal().clone())
        # Row-major, as the sparse product reads it.
        self.weights = weights.fill_diagonal_(0).contiguous()

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        return torch.sparse.mm(_histories(self.train, users), self.weights)


class IALS:
    """Matrix factorisation of implicit feedback by alternating least squares (Hu et al., 2008), from the library `implicit`.

    Args:
        train: the interactions.
        factors: dimensions of the vectors.
        weight: of a pair with an interaction; all others have 1.
        l2: weight of the squared lengths of the vectors.
        seed: of their initial values.

    Raises:
        ImportError: `implicit` is not installed.
    """

    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"factors": 128, "weight": 10, "l2": 30},
        {"factors": 128, "weight": 10, "l2": 10},
        {"factors": 64, "weight": 10, "l2": 3},
    )
    iterations: ClassVar[int] = 15

    def __init__(self, train: InteractionMatrix, factors: int = 128, weight: float = 10, l2: float = 30, seed: int = 0):
        try:
            from implicit.als import AlternatingLeastSquares
        except ImportError:
            raise ImportError('iALS needs implicit: pip install "tokenrec-hf[compare]".') from None
        from scipy.sparse import csr_matrix
        from threadpoolctl import threadpool_limits

        train = _distinct(train)
        ones, shape = np.ones(len(train), dtype=np.float32), (train.num_users, train.num_items)
        settings = {"factors": factors, "alpha": weight, "regularization": l2, "random_state": seed}
        settings["iterations"] = self.iterations
        # More threads add in another order.
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(**settings, use_cg=False, use_gpu=False, num_threads=1)
            model.fit(csr_matrix((ones, (train.users, train.items)), shape=shape), show_progress=False)
        self.user_vectors, self.item_vectors = map(torch.from_numpy, (model.user_factors, model.item_factors))

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        return self.user_vectors[users] @ self.item_vectors.T


BASELINES: dict[str, type[Baseline]] = {"popularity": Popularity, "itemknn": ItemKNN, "ease": EASE, "ials": IALS}


def baseline_ranks(baseline: Scorer, train: InteractionMatrix, holdout: Holdout) -> torch.Tensor:
    """The rank of each held-out item among the items that its user has not seen in `train`, int64 `[U]` from 0."""
    return torch.cat([target_ranks(*batch).cpu() for batch in _score_batches(baseline, train, holdout)])


def evaluate_baseline(baseline: Scorer, train: InteractionMatrix, holdout: Holdout) -> dict[str, float]:
    """All metrics on the held-out items, see [`RankingMetrics`]; the items of a user in `train` are not ranked."""
    metrics = RankingMetrics(train.num_items, popularity=train.popularity())
    for batch in _score_batches(baseline, train, holdout):
        metrics.update(*batch)
    return metrics.compute()


def best_settings(kind: type[Baseline], data: IndexedSplits) -> dict[str, Any]:
    """The settings of the grid with the best NDCG@20 on the held-out items of `data`, the validation items."""
    if len(kind.grid) == 1:
        return dict(kind.grid[0])
    train = data.interactions
    return dict(max(kind.grid, key=lambda one: ndcg(baseline_ranks(kind(train, **one), train, data.holdout), 20)))


# ----------------------------------------------------------------------------------------------------------------------


def _score_batches(
    baseline: Scorer, train: InteractionMatrix, holdout: Holdout
) -> Iterator[tuple[torch.Tensor, np.ndarray, SeenPairs]]:
    """Scores, targets and seen pairs of some held-out users at a time, as [`target_ranks`] takes them."""
    for start in range(0, len(holdout.users), USERS):
        users = holdout.users[start : start + USERS]
        indptr, seen = train.of_users(users)
        rows = np.repeat(np.arange(len(users)), np.diff(indptr))
        yield baseline.scores(users), holdout.targets[start : start + USERS], (rows, seen)


def _distinct(train: InteractionMatrix) -> InteractionMatrix:
    """Each pair once."""
    users, items = np.divmod(np.unique(train.users * train.num_items + train.items), train.num_items)
    return InteractionMatrix(users, items, train.num_users, train.num_items)


def _common_users(train: InteractionMatrix) -> Iterator[tuple[int, torch.Tensor]]:
    """X^T X, the number of common users of items, as some rows at a time: the first of them, and float32 `[<= ROWS, num_items]`."""
    matrix = _sparse(train.users, train.items, (train.num_users, train.num_items))
    order = np.argsort(train.items, kind="stable")
    users, items = train.users[order], train.items[order]
    for start in range(0, train.num_items, ROWS):
        end = min(start + ROWS, train.num_items)
        own = slice(*np.searchsorted(items, [start, end]))
        block = _sparse(items[own] - start, users[own], (end - start, train.num_users))
        yield start, torch.sparse.mm(block, matrix).to_dense()


def _histories(train: InteractionMatrix, users: np.ndarray) -> torch.Tensor:
    """The items of users as a sparse matrix, 1 for each pair, float32 `[len(users), num_items]`."""
    indptr, items = train.of_users(users)
    return _sparse(np.repeat(np.arange(len(users)), np.diff(indptr)), items, (len(users), train.num_items))


def _sparse(
    rows: np.ndarray | torch.Tensor,
    columns: np.ndarray | torch.Tensor,
    shape: tuple[int, int],
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    pairs = torch.stack([torch.as_tensor(rows), torch.as_tensor(columns)])
    values = torch.ones(pairs.shape[1]) if values is None else values
    return torch.sparse_coo_tensor(pairs, values, shape, check_invariants=False).coalesce()
