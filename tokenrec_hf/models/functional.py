"""What `torch.nn.functional` has too, in less time on a CPU: cross-entropy over all items, unit vectors, dropout.

The first two compute their gradients themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Logits that are computed at once on a CPU: they fit into its cache.
LOGITS = 1 << 19


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
        size = max(1, LOGITS // len(y) if x.device.type == "cpu" else len(x))
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


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with [`dropout`]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Drops elements of a tensor of any shape, in training."""
        return dropout(input, self.p, self.training)
