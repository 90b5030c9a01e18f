"""Functions of tensors: cross-entropy over all items, unit vectors and dropout, and the exact search of items by cosine.

`torch.nn.functional` has the first three too; here they take less time on a CPU, and two compute their gradients themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# Logits that are computed at once: on a CPU they fit into its cache, on an accelerator they take 1 GB.
LOGITS, ACCELERATOR_LOGITS = 1 << 19, 1 << 28
# Rows scored at once. 16,384 items was the fastest of the sizes measured for many queries; a few queries are scored with so many
# items that there are as many scores. All three bound the memory of a search.
ITEM_CHUNK, QUERY_CHUNK, SCORES = 16_384, 1_024, 1 << 20
# Scores that are represented by their maximum while the best are looked for.
GROUP = 32


class _LinearCrossEntropy(torch.autograd.Function):
    """See [`linear_cross_entropy`]. The gradients are computed along with the loss, so that the logits never leave the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        excluded: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        loss, x_grad, y_grad = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(y)
        known = targets >= 0
        targets = targets.clamp(min=0)
        shares = known * (weights / known.sum(dim=1).clamp(min=1))[:, None]  # [n, P]
        weights = weights * known.any(dim=1)
        size = max(1, (LOGITS if x.device.type == "cpu" else ACCELERATOR_LOGITS) // len(y))
        memory = x.new_empty(min(size, len(x)) * len(y))
        for start in range(0, len(x), size):
            block = slice(start, start + size)
            rows, target, share, weight = x[block], targets[block], shares[block], weights[block, None]
            logits = torch.mm(rows, y.T, out=memory[: len(rows) * len(y)].view(len(rows), -1))
            loss -= (logits.gather(1, target) * share).sum()
            if excluded is not None:
                inside = (excluded[0] >= start) & (excluded[0] < start + size)
                logits[excluded[0][inside] - start, excluded[1][inside]] = -torch.inf
            largest = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            loss += ((total.log() + largest) * weight).sum()
            if not any(ctx.needs_input_grad):
                continue
            logits.mul_(weight / total).scatter_add_(1, target, -share)
            torch.mm(logits, y, out=x_grad[block])
            if ctx.needs_input_grad[1]:
                y_grad.addmm_(logits.T, rows)
        ctx.save_for_backward(x_grad, y_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        x_grad, y_grad = ctx.saved_tensors
        return grad * x_grad, grad * y_grad, None, None, None


def linear_cross_entropy(
    x: torch.Tensor,
    y: torch.Tensor,
    targets: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    excluded: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The sum over rows of `weights` times -log softmax(x . y_j), the mean over the targets j of a row.

    Equal to `cross_entropy(x @ y.T, targets, reduction="sum")` for one target a row, in float32 also under mixed precision.

    Args:
        x: `[n, w]`.
        y: one row per item, `[m, w]`.
        targets: rows of `y`, int64 `[n]` or `[n, P]`; negative values are padding, and a row of padding counts as 0.
        weights: `[n]`; by default 1.
        excluded: rows of `x` and rows of `y`, int64 `[e]` each: pairs that do not compete, which are no targets.
    """
    x, y, targets = x.float(), y.float(), targets[:, None] if targets.dim() == 1 else targets
    if not torch.is_grad_enabled():
        x, y = x.detach(), y.detach()
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, y, targets, x.new_ones(len(x)) if weights is None else weights, excluded)


def sampled_cross_entropy(
    x: torch.Tensor,
    vectors: Callable[[torch.Tensor], torch.Tensor],
    sample: torch.Tensor,
    targets: torch.Tensor,
    num_items: int,
    *,
    weights: torch.Tensor | None = None,
    excluded: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[`linear_cross_entropy`] with the sum over all items that are no targets estimated from a sample of them.

    Each of m sampled items stands for num_items / m, which makes the estimate unbiased (Bengio and Senécal, 2008).

    Args:
        x: `[n, w]`.
        vectors: gives the vectors of rows of items, `[k]` to `[k, w]`.
        sample: rows of items, drawn uniformly with replacement, int64 `[m]`.
        targets: rows of items, int64 `[n]` or `[n, P]`; negative values are padding, and a row of padding counts as 0.
        num_items: number of all items.
        weights, excluded: see [`linear_cross_entropy`].
    """
    x, targets = x.float(), targets[:, None] if targets.dim() == 1 else targets
    known = targets >= 0
    row, wanted = known.nonzero()[:, 0], targets[known]  # [t], [t]
    drawn, counts = sample.unique(return_counts=True)
    with torch.autocast(x.device.type, enabled=False):
        others, own = vectors(torch.cat([drawn, wanted])).float().split([len(drawn), len(wanted)])
        logits = x @ others.T + (counts * (num_items / len(sample))).log()  # [n, |drawn|]
    for rows, items in ((row, wanted), *([excluded] if excluded else ())):
        place = torch.searchsorted(drawn, items).clamp(max=len(drawn) - 1)
        inside = drawn[place] == items
        logits[rows[inside], place[inside]] = -torch.inf
    scores = (x[row] * own).sum(dim=1)
    positive = torch.full(targets.shape, -torch.inf, device=x.device).masked_scatter(known, scores)  # [n, P]
    total = torch.cat([logits, positive], dim=1).logsumexp(dim=1)
    count = known.sum(dim=1)
    mean = positive.masked_fill(~known, 0).sum(dim=1) / count.clamp(min=1)
    losses = torch.where(count > 0, total - mean, 0)
    return losses.sum() if weights is None else (losses * weights).sum()


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        unit, scale = ctx.saved_tensors
        along = torch.einsum("...d,...d->...", grad, unit)[..., None]
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale)


def unit(x: torch.Tensor) -> torch.Tensor:
    """The vectors `[..., d]` divided by their lengths, like `torch.nn.functional.normalize(x, dim=-1)`."""
    return _Unit.apply(x)


def dropout(x: torch.Tensor, probability: float, training: bool = True) -> torch.Tensor:
    """`torch.nn.functional.dropout` that draws a byte for each element, so that the probability is a multiple of 1/256.

    A CPU needs a tenth of the time. On other devices it is PyTorch's.
    """
    threshold = round(256 * probability)
    if not training or not 0 < threshold < 256 or x.device.type != "cpu":
        return F.dropout(x, probability, training)
    numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
    return x * (kept * (256 / (256 - threshold))).to(x.dtype)


def search_one(
    query: np.ndarray,
    items: np.ndarray,
    factors: np.ndarray,
    top_k: int,
    excluded: np.ndarray,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_search` for one query, several times as fast: most of its time would go into calls of small tensors.

    Args:
        query: float32 `[d]`, of length 1.
        items, factors: float32 `[n, d]` and `[n]`, of `scorable`.
        top_k: how many items to return; fewer come back only where fewer remain.
        excluded: rows of items that must not be returned; those below 0 are ignored.
        allowed: boolean `[n]`, the items that may be returned at all; by default all.

    Returns:
        Rows of `items`, int64 `[k]`, and their cosines, float32 `[k]`, best first, equal scores in row order.
    """
    scores = items @ query
    scores *= factors
    scores[excluded[excluded >= 0]] = -np.inf
    if allowed is not None:
        scores[~allowed] = -np.inf
    # The k-th highest maximum of groups of items is no higher than the k-th highest score.
    width = len(scores) // GROUP * GROUP
    maxima = scores[:width].reshape(GROUP, -1).max(axis=0) if width > 2 * top_k * GROUP else scores
    bound = np.partition(maxima, -top_k)[-top_k] if top_k < len(maxima) else -np.inf
    candidates = np.flatnonzero((scores >= bound) & (scores > -np.inf))
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
    return best, scores[best]


def exact_search(
    queries: torch.Tensor,
    items: torch.Tensor,
    factors: torch.Tensor,
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items of highest cosine with each query, best first, equal scores in row order.

    Args:
        queries: float32 `[B, d]`, unit rows.
        items, factors: float32 `[n, d]` and `[n]`, of `scorable`.
        top_k: how many items to return for each query.
        exclude_queries: int64 `[m]`, with `exclude_items` the pairs that must not be returned: rows of `queries`,
        exclude_items: int64 `[m]`, and rows of `items`; pairs with a row outside `items` are ignored.
        allowed: boolean `[n]`, the items that may be returned at all; by default all.

    Returns:
        Rows of `items`, int64 `[B, top_k]`, and their cosines, float32 `[B, top_k]`; -1 and `-inf` where none is left.
    """
    found = [
        _search_part(part, number * QUERY_CHUNK, items, factors, top_k, exclude_queries, exclude_items, allowed)
        for number, part in enumerate(queries.split(QUERY_CHUNK))
    ]
    rows, scores = found[0] if len(found) == 1 else map(torch.cat, zip(*found))
    rows = rows.masked_fill(scores == -torch.inf, -1)
    missing = (0, top_k - rows.shape[1])
    return F.pad(rows, missing, value=-1), F.pad(scores, missing, value=-torch.inf)


def _search_part(
    queries: torch.Tensor,
    first: int,
    items: torch.Tensor,
    factors: torch.Tensor,
    top_k: int,
    exclude_queries: torch.Tensor,
    exclude_items: torch.Tensor,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_search` of the queries from row `first` on: rows and cosines `[B, k]`, with k at most `top_k` and the items."""
    size = max(1, min(len(items), max(ITEM_CHUNK, SCORES // max(1, len(queries)))))
    # Allocated once: fresh memory for every chunk would cost as much as the product in it.
    memory = torch.empty(len(queries) * size)
    mine = (exclude_queries >= first) & (exclude_queries < first + len(queries))
    excluded, unwanted = exclude_queries[mine] - first, exclude_items[mine]
    rows, scores = torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0)
    for start in range(0, len(items), size):
        end = min(start + size, len(items))
        chunk = _cosines(queries, items[start:end], factors[start:end], memory)
        if len(unwanted):
            here = (unwanted >= start) & (unwanted < end)
            chunk[excluded[here], unwanted[here] - start] = -torch.inf
        if allowed is not None:
            chunk.masked_fill_(~allowed[start:end], -torch.inf)
        columns, values = stable_topk(chunk, top_k)
        if start:
            columns = torch.cat([rows, columns + start], dim=1)
            best, values = stable_topk(torch.cat([scores, values], dim=1), top_k)
            columns = columns.gather(1, best)
        rows, scores = columns, values
    return rows, scores


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the k highest scores of each row, best first, equal scores in column order.

    `torch.topk` alone does not say which of several equal scores it takes.

    Args:
        scores: float `[B, n]` without NaN.
        k: how many.

    Returns:
        Columns, int64 `[B, min(k, n)]`, and their scores. Columns of score `-inf` may be any.
    """
    columns = _topk(scores, k)
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """The rows of `vectors` `[n, d]` scaled to length 1, as new memory; a zero row stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    # Scaled by the largest element first, so that the squares of tiny and huge values neither vanish nor overflow.
    scaled = vectors / vectors.abs().amax(dim=1, keepdim=True).clamp_(min=tiny)
    return scaled.div_(torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_(min=tiny))


def scorable(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[n, d]` and a factor for each, `[n]`, as `exact_search` takes them: their products have length 1.

    The vectors are the given ones, unless one is so short or long that its product with the factor would not be exact. The factor
    of a zero vector is zero.
    """
    lengths = torch.cat([part.norm(dim=1) for part in vectors.split(ITEM_CHUNK)]) if len(vectors) else vectors[:, 0]
    is_zero = lengths == 0
    if ((lengths > 1e-15) & (lengths < 1e15) | is_zero & (vectors == 0).all(dim=1)).all():
        return vectors, torch.where(is_zero, 0.0, 1 / lengths)
    return unit_rows(vectors), torch.ones(len(vectors))


def _cosines(queries: torch.Tensor, vectors: torch.Tensor, factors: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Cosines of unit `queries` `[B, d]` with the rows of a chunk `[c, d]`, in `memory` of at least B * c numbers: `[B, c]`."""
    scores = memory[: len(queries) * len(vectors)].view(len(queries), len(vectors))
    # Whatever is smaller is scaled: the scores [B, c] or the vectors [c, d].
    if len(queries) < vectors.shape[1]:
        return torch.mm(queries, vectors.T, out=scores).mul_(factors)
    return torch.mm(queries, (vectors * factors[:, None]).T, out=scores)


def _topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the k highest scores, or all if fewer, of equal ones the lowest; in ascending order, int64 `[B, k]`."""
    width = scores.shape[1] // GROUP * GROUP
    if 4 * k * GROUP > width or scores.numel() <= ITEM_CHUNK:
        return _plain_topk(scores, k)
    groups = scores[:, :width].unflatten(1, (-1, GROUP))  # [B, width / GROUP, GROUP]
    # The best k lie in the k groups with the highest maxima (equal ones: the first), else each of these had a better one; or in
    # the rest, which is the last group.
    chosen = _plain_topk(groups.amax(dim=2), k)  # [B, k]
    candidates = groups[torch.arange(len(groups), device=groups.device)[:, None], chosen].flatten(1)
    best = _plain_topk(torch.cat([candidates, scores[:, width:]], dim=1), k)
    chosen = F.pad(chosen, (0, 1), value=width // GROUP)
    return chosen.gather(1, best // GROUP) * GROUP + best % GROUP


def _plain_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`_topk` for few columns."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    if scores.device.type == "cpu":
        # A fifth of the time of `torch.topk`.
        lowest = torch.from_numpy(np.partition(scores.numpy(), -k, axis=1)[:, -k, None])
    else:
        lowest = scores.topk(k, dim=1).values[:, -1:]  # [B, 1]
    chosen = scores >= lowest
    if chosen.count_nonzero() > k * len(chosen):
        above, equal = scores > lowest, scores == lowest
        places = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1) <= places))
    return chosen.nonzero()[:, 1].view(-1, k)
