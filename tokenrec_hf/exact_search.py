"""Exact nearest neighbours by cosine, as tensor functions: the y = cos(z, q) of Eq. 19 of TokenRec, arXiv 2406.10450.

Ties are broken by row order, so that a search has one right answer. Knows nothing about ids, files or models. Used by
the embedding store and by the metrics.
"""

from __future__ import annotations

import torch

# Rows scored at once. 16,384 items was the fastest of the sizes measured; both bound the memory of a search.
ITEM_CHUNK, QUERY_CHUNK = 16_384, 1_024


def exact_search(
    queries: torch.Tensor, items: torch.Tensor, top_k: int, exclude_queries: torch.Tensor, exclude_items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items of highest inner product with each query, best first, equal scores in row order.

    Args:
        queries: float32 `[B, d]`; unit rows, where the scores are to be cosines.
        items: float32 `[n, d]`; the same.
        top_k: how many items to return for each query.
        exclude_queries: int64 `[m]`, with `exclude_items` the pairs that must not be returned: a row of `queries`,
        exclude_items: int64 `[m]`, and a row of `items`; pairs with an item outside `0..n - 1` are ignored.

    Returns:
        Rows of `items`, int64 `[B, top_k]`, and their scores, float32 `[B, top_k]`; -1 and `-inf` where none is left.
    """
    rows = torch.full((len(queries), top_k), -1)
    scores = torch.full((len(queries), top_k), -torch.inf)
    for start in range(0, len(queries), QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, len(queries))
        mine = (exclude_queries >= start) & (exclude_queries < end)
        best = _search(queries[start:end], items, top_k, exclude_queries[mine] - start, exclude_items[mine])
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
    k = min(k, scores.shape[1])
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
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """The rows of `vectors` `[n, d]` scaled to length 1, as new memory; a zero row stays zero."""
    # Scaled by the largest element first, so that the squares of tiny and huge values neither vanish nor overflow.
    scale = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / torch.where(scale > 0, scale, 1.0)
    length = scaled.norm(dim=1, keepdim=True)
    return scaled.div_(torch.where(length > 0, length, 1.0))


def _search(
    queries: torch.Tensor, items: torch.Tensor, top_k: int, exclude_queries: torch.Tensor, exclude_items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_search` of a single chunk of queries, without padding: `[B, min(top_k, n)]`."""
    exclude_items, order = exclude_items.sort()
    exclude_queries = exclude_queries[order]
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    scores = torch.empty(len(queries), 0)
    for start in range(0, len(items), ITEM_CHUNK):
        end = min(start + ITEM_CHUNK, len(items))
        chunk = queries @ items[start:end].T
        low, high = torch.searchsorted(exclude_items, torch.tensor([start, end])).tolist()
        chunk[exclude_queries[low:high], exclude_items[low:high] - start] = -torch.inf
        columns, best = stable_topk(chunk, top_k)
        # Earlier rows stand first, so a stable sort leaves ties in row order.
        scores, order = torch.cat([scores, best], dim=1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, columns + start], dim=1).gather(1, order)
        rows, scores = rows[:, :top_k], scores[:, :top_k]
    return rows, scores
