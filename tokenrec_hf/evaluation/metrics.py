"""Metrics of full rankings: HR@K, NDCG@K and MRR@K of one held-out item for each user, coverage and popularity.

The protocol is that of TokenRec (section III-A, arXiv 2406.10450): all items are ranked for each user, without the items
that the user has seen. The input is scores or two matrices of vectors. Metrics are computed in batches, in memory that does
not grow with the number of users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..models.functional import stable_topk, unit_rows

Array = torch.Tensor | np.ndarray
SeenPairs = tuple[Array, Array]


def target_ranks(scores: Array, targets: Array, seen: SeenPairs | None = None) -> torch.Tensor:
    """The rank of each user's held-out item among the items that the user has not seen.

    The rank is pessimistic: an item that ties with the target is ranked above it, so a model that gives all items the same
    score has metrics of 0.

    Args:
        scores: float `[B, n]`, a score for each of B users and each of n items, higher is better.
        targets: int64 `[B]`, the item held out for each user.
        seen: pairs to leave out of the ranking (score `-inf`), as two int64 vectors of equal length: rows of `scores` and
            items. A target is ranked even if it is listed.

    Returns:
        int64 `[B]`, from 0 for the best.

    Raises:
        ValueError: the shapes do not fit, a score is NaN, or an item does not exist.
    """
    return _ranks(*_masked(_copied(scores), targets, seen))


def hit_rate(ranks: Array, k: int) -> float:
    """HR@K: the share of users with the target among the first `k`; `ranks` is int64 `[B]`, from 0."""
    return _metric("hr", _histogram(ranks, k), k)


def user_ndcg(ranks: Array, k: int) -> torch.Tensor:
    """NDCG@K of each user, float64 `[B]`; see [`ndcg`], which is their mean."""
    ranks = torch.as_tensor(ranks).cpu()
    return _GAINS["ndcg"](ranks.double()) * (ranks < k)


def ndcg(ranks: Array, k: int) -> float:
    """NDCG@K: the mean of 1 / log2(rank + 2) where rank < `k`, else 0; with a single target the ideal gain is 1."""
    return _metric("ndcg", _histogram(ranks, k), k)


def mrr(ranks: Array, k: int) -> float:
    """MRR@K: the mean of 1 / (rank + 1) where rank < `k`, else 0."""
    return _metric("mrr", _histogram(ranks, k), k)


class RankingMetrics:
    """All metrics of a stream of scores. The results do not depend on the batches.

    `compute` gives for each K of `top_ks`:

    - `hr@K`, `ndcg@K`, `mrr@K`: see [`hit_rate`], [`ndcg`] and [`mrr`];
    - with `popularity`, `coverage@K`: the share of the catalogue among the first K of at least one user;
    - with `popularity`, `popularity@K`: the average recommendation popularity (ARP), i.e. the mean over users of the mean
      popularity of the first K items, divided by the popularity of the most popular item. It lies in 0..1; 1 means that
      all users get only items as popular as the most popular item.

    Coverage and popularity cost half as much again.

    Args:
        num_items: n, the size of the catalogue.
        top_ks: the values of K.
        popularity: the number of training interactions of each item, `[n]`; `None` computes metrics of ranks only.

    Raises:
        ValueError: there is no K, or `popularity` has another length than `num_items`.
    """

    def __init__(self, num_items: int, top_ks: Sequence[int] = (10, 20, 30), popularity: Array | None = None):
        if not top_ks or min(top_ks) < 1:
            raise ValueError(f"top_ks is {list(top_ks)}; give at least one K, each at least 1.")
        if popularity is not None and len(popularity) != num_items:
            raise ValueError(f"popularity has {len(popularity)} entries for {num_items} items; pass one for each item.")
        self.num_items, self.top_ks = num_items, tuple(top_ks)
        self._popularity = None if popularity is None else torch.as_tensor(popularity, dtype=torch.float64)
        # A histogram of ranks is exact and does not depend on the batches.
        self._histogram = torch.zeros(max(top_ks) + 1, dtype=torch.int64)
        self._recommended = torch.zeros(len(self.top_ks), num_items, dtype=torch.bool)
        self._popularity_sums = torch.zeros(len(self.top_ks), dtype=torch.float64)

    def update(self, scores: Array, targets: Array, seen: SeenPairs | None = None) -> None:
        """Adds a batch of users; arguments and errors as in [`target_ranks`]."""
        self._add(_copied(scores), targets, seen)

    def _add(self, scores: torch.Tensor, targets: Array, seen: SeenPairs | None) -> None:
        """`update` with scores that may be overwritten."""
        scores, own = _masked(scores, targets, seen)
        if scores.shape[1] != self.num_items:
            raise ValueError(
                f"scores are given for {scores.shape[1]} items but the catalogue has {self.num_items}; score them all."
            )
        longest = max(self.top_ks)
        if self._popularity is None:
            self._histogram += _histogram(_ranks(scores, own), longest)
            return
        # One more item than the longest list decides every rank up to its end, without the other scores.
        items, values = stable_topk(scores, longest + 1)
        self._histogram += _histogram(_ranks(values.clone(), own), longest)
        items, values = items[:, :longest].cpu(), values[:, :longest].cpu()
        # A masked item fills the list if fewer than K are left, but it is not recommended.
        listed = values > -torch.inf
        for i, k in enumerate(self.top_ks):
            first, counts = items[:, :k], listed[:, :k]
            self._recommended[i, first[counts]] = True
            sums = (self._popularity[first] * counts).sum(dim=1)
            self._popularity_sums[i] += (sums / counts.sum(dim=1).clamp(min=1)).sum()

    def compute(self) -> dict[str, float]:
        """The metrics of all users so far by name, for example `"ndcg@20"`.

        Raises:
            ValueError: there is no user yet.
        """
        results = {f"{name}@{k}": _metric(name, self._histogram, k) for name in _GAINS for k in self.top_ks}
        if self._popularity is not None:
            results |= {f"coverage@{k}": float(own.double().mean()) for k, own in zip(self.top_ks, self._recommended)}
            # Without any interaction, every popularity and their mean are 0.
            scale = self._histogram.sum() * self._popularity.max().clamp(min=1e-300)
            results |= {f"popularity@{k}": float(own / scale) for k, own in zip(self.top_ks, self._popularity_sums)}
        return results


def evaluate_embeddings(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: Array,
    seen_indptr: np.ndarray,
    seen_indices: np.ndarray,
    *,
    cosine: bool,
    top_ks: Sequence[int] = (10, 20, 30),
    batch_size: int = 512,
    popularity: Array | None = None,
) -> dict[str, float]:
    """The metrics of vectors: each query ranks all items by cosine (Eq. 19) or dot product.

    Args:
        queries: float `[U, d]`, one for each user.
        items: float `[n, d]`.
        targets: int64 `[U]`, the item held out for each user.
        seen_indptr: int `[U + 1]`. The items seen by user u are `seen_indices[seen_indptr[u] : seen_indptr[u + 1]]`.
        seen_indices: int `[seen_indptr[-1]]`, item rows.
        cosine: rank by cosine; else by dot product.
        top_ks: the values of K.
        batch_size: users scored at once, in `4 * batch_size * n` bytes.
        popularity: the number of training interactions of each item, `[n]`, for `coverage@K` and `popularity@K`.

    Returns:
        See [`RankingMetrics`].

    Raises:
        ValueError: the shapes do not fit, a score is NaN, or an item does not exist.
    """
    metrics = RankingMetrics(len(items), top_ks, popularity)
    for batch in _score_batches(queries, items, targets, seen_indptr, seen_indices, cosine, batch_size):
        metrics._add(*batch)
    return metrics.compute()


def embedding_ranks(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: Array,
    seen_indptr: np.ndarray,
    seen_indices: np.ndarray,
    *,
    cosine: bool,
    batch_size: int = 512,
) -> torch.Tensor:
    """The rank of each user's target by vectors, int64 `[U]` from 0; see [`evaluate_embeddings`] and [`target_ranks`]."""
    batches = _score_batches(queries, items, targets, seen_indptr, seen_indices, cosine, batch_size)
    return torch.cat([_ranks(*_masked(*batch)) for batch in batches])


def weighted_ranks(
    queries: torch.Tensor,
    items: torch.Tensor,
    dim: int,
    weights: Sequence[float],
    targets: Array,
    seen_indptr: np.ndarray,
    seen_indices: np.ndarray,
) -> torch.Tensor:
    """The rank of each user's target by cosine for each weight of the queries' dimensions from `dim` on, int64 `[weights, U]`.

    Scores are linear in the weight, so that all weights share one product; other arguments as of [`evaluate_embeddings`].
    """
    items, known = unit_rows(items), (targets, seen_indptr, seen_indices)
    first, second = (
        _score_batches(queries[:, part], items[:, part], *known, cosine=False, batch_size=512)
        for part in (slice(None, dim), slice(dim, None))
    )
    found = [
        torch.stack([_ranks(*_masked(torch.add(scores, more, alpha=weight), own, seen)) for weight in weights])
        for (scores, own, seen), (more, _, _) in zip(first, second)
    ]
    return torch.cat(found, dim=1)


def embedding_hits(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: Array,
    seen_indptr: np.ndarray,
    seen_indices: np.ndarray,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines of the first `k` items of each user, and whether each is the target, `[U, k]`; see [`evaluate_embeddings`]."""
    cosines, hits = [], []
    for batch in _score_batches(queries, items, targets, seen_indptr, seen_indices, cosine=True, batch_size=512):
        best, values = stable_topk(_masked(*batch)[0], k)
        cosines.append(values)
        hits.append(best == batch[1][:, None])
    return torch.cat(cosines), torch.cat(hits)


def _score_batches(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: Array,
    seen_indptr: np.ndarray,
    seen_indices: np.ndarray,
    cosine: bool,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, SeenPairs]]:
    """Scores `[B, n]`, targets and seen pairs of some users at a time; see [`evaluate_embeddings`]."""
    targets, indptr = torch.as_tensor(targets), np.asarray(seen_indptr)
    queries, items = (torch.as_tensor(one) for one in (queries, items))
    kind = torch.promote_types(torch.promote_types(queries.dtype, items.dtype), torch.float32)
    queries, items = queries.to(kind), items.to(kind)
    is_csr = len(indptr) == len(queries) + 1 and not indptr[0] and (np.diff(indptr) >= 0).all()
    if len(targets) != len(queries) or not is_csr or indptr[-1] != len(seen_indices):
        raise ValueError(
            f"there are {len(queries)} queries, {len(targets)} targets, {len(indptr)} entries of seen_indptr and "
            f"{len(seen_indices)} of seen_indices; pass a target for each query, and the seen items of each query as CSR."
        )
    if queries.shape[1] != items.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions but items have {items.shape[1]}; pass vectors of the same space."
        )
    if cosine:
        queries, items = unit_rows(queries), unit_rows(items)
    for start in range(0, len(queries), batch_size):
        end = min(start + batch_size, len(queries))
        rows = np.repeat(np.arange(end - start), np.diff(indptr[start : end + 1]))
        seen = rows, np.asarray(seen_indices[indptr[start] : indptr[end]])
        yield queries[start:end] @ items.T, targets[start:end], seen


def _copied(scores: Array) -> torch.Tensor:
    """A floating-point copy of the scores."""
    scores = torch.as_tensor(scores)
    return scores.detach().clone() if scores.is_floating_point() else scores.to(torch.float64)


def _masked(scores: torch.Tensor, targets: Array, seen: SeenPairs | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes `-inf` to the scores of seen items other than the target; returns them and the targets' scores `[B, 1]`."""
    targets = torch.as_tensor(targets, dtype=torch.int64, device=scores.device)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores have shape {list(scores.shape)} and targets {list(targets.shape)}; pass [B, n] and [B]."
        )
    rows, items = (torch.as_tensor(one, dtype=torch.int64, device=scores.device) for one in (seen or ((), ())))
    if rows.shape != items.shape:
        raise ValueError(f"seen has {len(rows)} rows but {len(items)} items; pass two vectors of equal length.")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(scores):
        raise ValueError(f"seen names a row outside 0..{len(scores) - 1}; pass rows of the scores.")
    for numbers, name in ((targets, "targets"), (items, "seen")):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < scores.shape[1]:
            raise ValueError(f"{name} names an item outside 0..{scores.shape[1] - 1}; score all items that occur.")
    targets = targets[:, None]
    own = scores.gather(1, targets)
    scores[rows, items] = -torch.inf
    return scores.scatter_(1, targets, own), own


def _ranks(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The number of `scores` `[B, n]` that are at least the target's `own` `[B, 1]`, without the target, int64 `[B]`.

    Overwrites `scores`: a comparison in place and a sum of floating-point ones take a third of the time of a boolean mask.
    The result is exact up to 2^24 items.
    """
    # The maximum of a row that contains NaN is NaN, and costs a tenth of a look at each score.
    nan = scores.amax(dim=1).isnan().nonzero()
    if len(nan):
        raise ValueError(
            f"the scores of row {int(nan[0])} hold NaN, which has no rank; look for a division by zero or an overflow in "
            "the model."
        )
    return scores.ge_(own).sum(dim=1, dtype=torch.promote_types(scores.dtype, torch.float32)).long() - 1


# The gain of the rank `r` of the target (float64 `[K]`, from 0).
_GAINS = {"hr": torch.ones_like, "ndcg": lambda r: 1 / torch.log2(r + 2), "mrr": lambda r: 1 / (r + 1)}


def _histogram(ranks: Array, k: int) -> torch.Tensor:
    """The number of targets with rank 0, 1, ..., k - 1, and k or worse, int64 `[k + 1]`."""
    ranks = torch.as_tensor(ranks, dtype=torch.int64).cpu()
    if len(ranks) and int(ranks.min()) < 0:
        raise ValueError(f"a rank is {int(ranks.min())}; ranks begin with 0.")
    return torch.bincount(ranks.clamp(max=k), minlength=k + 1)


def _metric(name: str, histogram: torch.Tensor, k: int) -> float:
    """The mean gain of the targets counted in `histogram`."""
    users = int(histogram.sum())
    if not users:
        raise ValueError(f"there is no user to compute {name}@{k} of; evaluate at least one user.")
    gains = _GAINS[name](torch.arange(k, dtype=torch.float64))
    return float((histogram[:k] * gains).sum()) / users
