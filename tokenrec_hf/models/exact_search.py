"""Exact nearest neighbours by cosine, as tensor functions: the y = cos(z, q) of Eq. 19 of TokenRec, arXiv 2406.10450.

Ties are broken by row order, so that a search has one right answer. Knows nothing about ids, files or models. Used by
the embedding store and by the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows scored at once. 16,384 items was the fastest of the sizes measured; both bound the memory of a search.
ITEM_CHUNK, QUERY_CHUNK = 16_384, 1_024
# Candidates of a query that are collected from chunks before the best of them are chosen.
CANDIDATES = 1_024
# Scores whose highest stands for all of them when the best are looked for.
GROUP = 32


def exact_search(
    queries: torch.Tensor,
    items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items of highest cosine with each query, best first, equal scores in row order.

    Args:
        queries: float32 `[B, d]`, unit rows.
        items: chunks of item vectors in row order, each float32 `[c, d]` with its `inverse_lengths` `[c]`.
        top_k: how many items to return for each query.
        exclude_queries: int64 `[m]`, with `exclude_items` the pairs that must not be returned: a row of `queries`,
        exclude_items: int64 `[m]`, and a row of all items; pairs with an item that there is not are ignored.
        allowed: boolean `[n]`, the items that may be returned at all; by default all.

    Returns:
        Rows of the items, int64 `[B, top_k]`, and their cosines, float32 `[B, top_k]`; -1 and `-inf` where none is left.
    """
    rows = torch.full((len(queries), top_k), -1)
    scores = torch.full((len(queries), top_k), -torch.inf)
    for start in range(0, len(queries), QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, len(queries))
        mine = (exclude_queries >= start) & (exclude_queries < end)
        best = _search(queries[start:end], items, top_k, exclude_queries[mine] - start, exclude_items[mine], allowed)
        rows[start:end, : best[0].shape[1]], scores[start:end, : best[1].shape[1]] = best
    return rows.masked_fill_(scores == -torch.inf, -1), scores


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the k highest scores of each row, best first, equal scores in column order.

    `torch.topk` alone does not say which of several equal scores it takes.

    Args:
        scores: float `[B, n]` without NaN.
        k: how many.

    Returns:
        Columns, int64 `[B, min(k, n)]`, and their scores. Columns of score `-inf` may be any.
    """
    return _ordered(*_topk(scores, min(k, scores.shape[1])))


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """The rows of `vectors` `[n, d]` scaled to length 1, as new memory; a zero row stays zero."""
    # Scaled by the largest element first, so that the squares of tiny and huge values neither vanish nor overflow.
    scale = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / torch.where(scale > 0, scale, 1.0)
    length = scaled.norm(dim=1, keepdim=True)
    return scaled.div_(torch.where(length > 0, length, 1.0))


def inverse_lengths(vectors: torch.Tensor) -> torch.Tensor:
    """1 / length of each row of `vectors` `[n, d]`, float32 `[n]`.

    NaN where the row is zero, or so short or long that the product of the two would not be exact: `unit_rows` must be
    taken instead.
    """
    lengths = torch.cat([part.norm(dim=1) for part in vectors.split(ITEM_CHUNK)]) if len(vectors) else vectors[:, 0]
    return torch.where((lengths > 1e-15) & (lengths < 1e15), 1 / lengths, torch.nan)


def _cosines(queries: torch.Tensor, vectors: torch.Tensor, inverse: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Cosines of unit `queries` `[B, d]` with the rows of a chunk `[c, d]`, in `memory` of at least B * c numbers: `[B, c]`."""
    scores = memory[: len(queries) * len(vectors)].view(len(queries), len(vectors))
    if inverse.isnan().any():
        return torch.mm(queries, unit_rows(vectors).T, out=scores)
    # Whatever is smaller is scaled: the scores [B, c] or the vectors [c, d].
    if len(queries) < vectors.shape[1]:
        return torch.mm(queries, vectors.T, out=scores).mul_(inverse)
    return torch.mm(queries, (vectors * inverse[:, None]).T, out=scores)


def _search(
    queries: torch.Tensor,
    items: Sequence[tuple[torch.Tensor, torch.Tensor]],
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_search` of a single chunk of queries, without padding: `[B, min(top_k, n)]`."""
    exclude_items, order = exclude_items.sort()
    exclude_queries = exclude_queries[order]
    rows = [torch.empty(len(queries), 0, dtype=torch.int64)]
    scores = [torch.empty(len(queries), 0)]
    start = collected = 0
    # Asked for once: fresh memory for every chunk would cost as much as the product in it.
    memory = torch.empty(len(queries) * max((len(vectors) for vectors, _ in items), default=0))
    for vectors, inverse in items:
        end = start + len(vectors)
        chunk = _cosines(queries, vectors, inverse, memory)
        low, high = torch.searchsorted(exclude_items, torch.tensor([start, end])).tolist()
        chunk[exclude_queries[low:high], exclude_items[low:high] - start] = -torch.inf
        if allowed is not None:
            chunk.masked_fill_(~allowed[start:end], -torch.inf)
        columns, best = _topk(chunk, min(top_k, len(vectors)))
        rows.append(columns + start)
        scores.append(best)
        start, collected = end, collected + best.shape[1]
        if collected > max(CANDIDATES, 2 * top_k):
            columns, best = _ordered(torch.cat(rows, dim=1), torch.cat(scores, dim=1))
            rows, scores, collected = [columns[:, :top_k]], [best[:, :top_k]], top_k
    columns, best = _ordered(torch.cat(rows, dim=1), torch.cat(scores, dim=1))
    return columns[:, :top_k], best[:, :top_k]


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `[B, k]` and values of the k highest scores, of equal ones those of the lowest columns, in any order."""
    width = scores.shape[1] // GROUP * GROUP
    if 4 * k * GROUP > width:
        return _plain_topk(scores, k)
    # The best k lie in the k groups with the highest maxima (equal ones: the first): else each of these had a better one.
    groups = scores[:, :width].unflatten(1, (-1, GROUP))  # [B, width / GROUP, GROUP]
    chosen = _plain_topk(groups.amax(dim=2), k)[0].sort(dim=1).values  # [B, k]
    columns = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=chosen.device)).flatten(1)  # [B, k * GROUP]
    rest = torch.arange(width, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    best, values = _plain_topk(scores.gather(1, columns), k)
    return columns.gather(1, best), values


def _plain_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`_topk` for few columns."""
    # One more than asked for shows whether the last place is tied.
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if scores.shape[1] > k:
        tied = (values[:, k] == values[:, k - 1]) & (values[:, k] > -torch.inf)
        if tied.any():
            cut = values[tied, k - 1 : k]
            above, equal = scores[tied] > cut, scores[tied] == cut
            places = k - above.sum(dim=1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=1) <= places))
            columns[tied, :k] = chosen.nonzero()[:, 1].view(-1, k)
            values[tied, :k] = scores[tied].gather(1, columns[tied, :k])
    return columns[:, :k], values[:, :k]


def _ordered(columns: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both `[B, k]` with the highest values first, equal ones in column order."""
    columns, order = columns.sort(dim=1)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, best), values
