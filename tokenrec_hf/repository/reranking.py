"""Re-ranking of recommendations: diverse lists by maximal marginal relevance, and at most so many items of a kind.

Recommendations in greater number are the candidates. They are chosen anew from the vectors and the metadata of a store, so the
model is not asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..models.embedding_store import Store
from ..models.functional import stable_topk, unit_rows
from ..models.recommender import Recommendation, Recommender

# Candidates for each place of a list, and the numbers in the vectors of candidates that are compared at once.
POOL, CHUNK = 10, 1 << 24


def rerank(
    store: Store,
    candidates: Sequence[Sequence[Recommendation]],
    top_k: int,
    *,
    diversity: float = 0.0,
    max_per: Mapping[str, int] | None = None,
) -> list[list[Recommendation]]:
    """Chooses items one after the other by maximal marginal relevance (MMR; Carbonell & Goldstein, SIGIR 1998).

    After the items S, the next one is that of the highest (1 - diversity) * cos(z, q_i) - diversity * max_{j in S} cos(q_i, q_j),
    with z the query and q the vectors of the store. The first one is the best candidate.

    Args:
        store: holds the vectors and the metadata of the items.
        candidates: recommendations for each user, best first; several times as many as are to be chosen.
        top_k: number of items; fewer are returned where the candidates do not have more.
        diversity: from 0, the order of the scores, to 1, the least similar items. Popular items, which have no score, keep their order.
        max_per: the most items of equal metadata, for example `{"genre": 3}`. Items without the name are not limited.

    Returns:
        For each user, the entries chosen, in the order of their choice.

    Raises:
        KeyError: an item is not in the store.
        ValueError: `top_k` is below 1, `diversity` is not between 0 and 1, a limit of `max_per` is no positive integer, or no item
            has its name.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1.")
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity is {diversity}; it must be between 0 and 1.")
    for name, limit in (max_per or {}).items():
        if type(limit) is not int or limit < 1:
            raise ValueError(f"max_per of {name} is {limit!r}; it must be an integer of at least 1.")
    names = list(dict.fromkeys(row["item"] for rows in candidates for row in rows))
    number = {name: at for at, name in enumerate(names)}
    vectors = unit_rows(store.get("item", names)) if diversity else torch.empty(len(names), 0)
    described = store.metadata(names) if max_per else []
    for name in max_per or {}:
        has_name = any(name in own for own in described)
        # The candidates may all lack what other items have.
        if not has_name and not any(name in own for own in store.metadata(store.ids("item"))):
            raise ValueError(f"no item has the metadata {name!r} of max_per; `tokenrec add --item-metadata` adds some.")
    kinds = [(_numbered([values.get(name) for values in described]), limit) for name, limit in (max_per or {}).items()]
    width = max(map(len, candidates), default=0)
    step = max(1, CHUNK // max(1, width * vectors.shape[1]))
    chosen: list[list[Recommendation]] = []
    for start in range(0, len(candidates), step):
        part = candidates[start : start + step]
        items = torch.zeros(len(part), width, dtype=torch.int64)  # rows of `names`, [B, C]
        scores = torch.full((len(part), width), -torch.inf)
        for at, rows in enumerate(part):
            items[at, : len(rows)] = torch.tensor([number[row["item"]] for row in rows], dtype=torch.int64)
            given = [row["score"] for row in rows]
            order = [-float(rank) for rank in range(len(rows))]
            scores[at, : len(rows)] = torch.tensor(order if None in given else given, dtype=torch.float32)
        weights = torch.tensor([0.0 if any(row["score"] is None for row in rows) else diversity for rows in part])
        places = _chosen(scores, items, vectors, weights, kinds, min(top_k, width))
        chosen += [[rows[place] for place in own if place >= 0] for rows, own in zip(part, places.tolist())]
    return chosen


def answer_reranked(
    recommender: Recommender,
    inputs: Mapping[str, Any],
    *,
    top_k: int,
    diversity: float = 0.0,
    max_per: Mapping[str, int] | None = None,
    pool: int = POOL,
    **options: Any,
) -> list[list[Recommendation]]:
    """[`Recommender.answer`], re-ranked. Where `max_per` leaves too few of the candidates, more of them are asked for.

    Args:
        recommender: gives the candidates.
        inputs: of [`Recommender.tokenize`].
        top_k, diversity, max_per: see [`rerank`].
        pool: number of candidates for each of the `top_k` places.
        options: further arguments of [`Recommender.answer`].
    """
    if not diversity and not max_per:
        return recommender.answer(inputs, top_k=top_k, **options)
    candidates = recommender.answer(inputs, top_k=top_k * pool, **options)
    found = rerank(recommender.store, candidates, top_k, diversity=diversity, max_per=max_per)
    short = [row for row, own in enumerate(found) if len(own) < top_k and len(candidates[row]) == top_k * pool]
    if short:
        again = {
            name: part[short] if isinstance(part, torch.Tensor) else [part[row] for row in short]
            for name, part in inputs.items()
        }
        more = answer_reranked(
            recommender, again, top_k=top_k, diversity=diversity, max_per=max_per, pool=pool * POOL, **options
        )
        for row, own in zip(short, more):
            found[row] = own
    return found


def _chosen(
    scores: torch.Tensor,
    items: torch.Tensor,
    vectors: torch.Tensor,
    weights: torch.Tensor,
    kinds: Sequence[tuple[torch.Tensor, int]],
    top_k: int,
) -> torch.Tensor:
    """The places of the items chosen, int64 `[B, top_k]`, -1 where none is left.

    Args:
        scores: of the candidates, `[B, C]`, `-inf` where there is none; changed.
        items: their rows of `vectors`, int64 `[B, C]`.
        vectors: of length 1, `[n, d]`.
        weights: the diversity of each list, `[B]`.
        kinds: for each limit, a number for the value of each of the n items, -1 without one, and the limit.
        top_k: how many to choose.
    """
    users, weights = torch.arange(len(scores)), weights[:, None]
    own = vectors[items]  # [B, C, d]
    nearest = torch.zeros(scores.shape)
    counts = [torch.zeros(scores.shape, dtype=torch.int64) for _ in kinds]
    places = torch.full((len(scores), top_k), -1)
    for place in range(top_k):
        # Of weight 1, the product with -inf would be NaN.
        relevance = ((1 - weights) * scores).masked_fill(scores == -torch.inf, -torch.inf)
        best, value = (part[:, 0] for part in stable_topk(relevance - weights * nearest, 1))
        left = value > -torch.inf
        places[left, place] = best[left]
        scores[users, best] = -torch.inf
        similar = (own @ own[users, best][:, :, None])[..., 0]  # [B, C]
        nearest = similar if place == 0 else torch.maximum(nearest, similar)
        for (numbers, limit), count in zip(kinds, counts):
            values = numbers[items]
            count += (values == values[users, best][:, None]) & (values >= 0) & left[:, None]
            scores[count >= limit] = -torch.inf
    return places


def _numbered(values: Sequence[Any]) -> torch.Tensor:
    """A number for each value, equal for equal values, -1 for None, int64 `[n]`."""
    # In Python, True equals 1.
    keys = [(type(value) is bool, value) for value in values]
    numbers = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return torch.from_numpy(np.array([-1 if key[1] is None else numbers[key] for key in keys], dtype=np.int64))
