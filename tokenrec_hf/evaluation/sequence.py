"""SASRec, and what it shares with other sequence models: windows of histories, batches with little padding, a small transformer.

Item ids are `0..num_items - 1`; the row after them is padding, and further rows are special tokens of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout
from ..models.functional import dropout, linear_cross_entropy
from .fitting import device, train_epochs


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with [`dropout`]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Drops elements of a tensor of any shape, in training."""
        return dropout(input, self.p, self.training)


class SequenceModel:
    """A baseline: a transformer over histories. A subclass sets what follows and implements `loss` and `scores`.

    `causal` is that of the encoder, `overlap` that of the training windows, `num_special` counts the rows of the embedding
    table after the items (padding first), and `defaults` are the settings that are not given.

    Args:
        seed: seed of all random numbers.
        settings: see `defaults`.
    """

    causal: ClassVar[bool]
    overlap: ClassVar[int] = 0
    num_special: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Any]] = {
        "dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "dropout": 0.5,
        "max_length": 50,
        "batch_size": 128,
        "learning_rate": 1e-3,
    }
    max_epochs: ClassVar[int] = 200

    def __init__(self, *, seed: int = 0, **settings: Any):
        self.seed, self.settings = seed, {**self.defaults, **settings}
        self.epochs: int | None = None

    def fit(self, train: InteractionMatrix, validation: Holdout | None, epochs: int | None = None) -> None:
        """Trains on `train`.

        Args:
            train: training interactions.
            validation: held-out items; the weights of the best epoch by NDCG@20 are kept, and its number is stored in
                `self.epochs`. None for a refit.
            epochs: length of a refit.
        """
        self.prepare(train)
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr=self.settings["learning_rate"])
        # Long patience: on small data, a model predicts popularity for about twenty epochs before it learns more.
        self.epochs = train_epochs(
            self,
            self.encoder,
            lambda epoch: self.run_epoch(optimizer, self.loss, epoch),
            train,
            validation,
            epochs,
            max_epochs=self.max_epochs,
            every=2,
            patience=6,
        )

    def prepare(self, train: InteractionMatrix) -> None:
        """Keeps the interactions, and makes an untrained encoder."""
        torch.manual_seed(self.seed)
        self.train, self.padding = train, train.num_items
        self.encoder = SequenceEncoder(
            train.num_items + self.num_special,
            self.settings["max_length"],
            causal=self.causal,
            padding=self.padding,
            **{name: self.settings[name] for name in ("dim", "num_layers", "num_heads", "dropout")},
        ).to(device())

    def run_epoch(self, optimizer: torch.optim.Optimizer, loss: Callable[..., torch.Tensor], epoch: int) -> None:
        """Goes through all training windows once, with `loss(starts, ends, epoch)` of each batch."""
        for starts, ends in self.batches(epoch):
            optimizer.zero_grad()
            loss(starts, ends, epoch).backward()
            optimizer.step()

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Bounds of all training windows in random batches of about equal length, for little padding."""
        starts, ends = windows(self.train, self.settings["max_length"], self.overlap)
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(starts))
        order = order[np.argsort((ends - starts)[order], kind="stable")]
        size = self.settings["batch_size"]
        for number in random.permutation(-(-len(order) // size)):
            rows = order[number * size : (number + 1) * size]
            yield starts[rows], ends[rows]

    def loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """The loss of the windows `train.items[start:end]`, a scalar."""
        raise NotImplementedError

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        raise NotImplementedError

    def histories(self, users: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `length` items of each user, padded `[B, T]`, and their numbers `[B]`."""
        ends = self.train.indptr[users + 1]
        starts = np.maximum(ends - length, self.train.indptr[users])
        return padded(self.train.items, starts, ends, self.padding), torch.from_numpy(ends - starts).to(device())


class SASRec(SequenceModel):
    """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

    A causal transformer predicts the next item at each position of a history. The loss is the softmax over all items, which is
    known to be far better than the paper's binary cross-entropy of the next item against a random one (Klenitskiy and Vasilev,
    RecSys 2023; Petrov and Macdonald, RecSys 2023). Histories longer than the maximum are cut into windows, so that training
    uses every interaction. Unlike in the paper, norms precede the sublayers, and the feed-forward sublayer is four times as wide
    as the model and has GELU.
    """

    causal = True
    overlap = 1
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"num_layers": 2, "dropout": 0.5, "batch_size": 128},
        {"num_layers": 1, "dropout": 0.2, "batch_size": 64},
    )

    def loss(self, starts: np.ndarray, ends: np.ndarray, epoch: int) -> torch.Tensor:
        """See [`SequenceModel.loss`]."""
        hidden, targets = self.predictions(starts, ends)
        return linear_cross_entropy(hidden, self.encoder.items.weight[: self.padding], targets) / len(targets)

    def predictions(self, starts: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Each item of the windows, except the first: the hidden state before it `[P, dim]`, and the item, int64 `[P]`."""
        items = padded(self.train.items, starts, ends, self.padding)
        known = items[:, 1:] != self.padding
        return self.encoder(items[:, :-1])[known], items[:, 1:][known]

    @torch.no_grad()
    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Scorer.scores`]."""
        items, lengths = self.histories(users, self.settings["max_length"])
        last = self.encoder(items)[torch.arange(len(items), device=items.device), lengths - 1]
        return last @ self.encoder.items.weight[: self.padding].T


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward part of 4 * dim units, each after a norm and before a residual sum."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.projections = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """States `[B, T, d]` to states `[B, T, d]`; `visible` masks keys `[B, 1, 1, T]`, None means causal attention."""
        size, length, _ = hidden.shape
        projected = self.projections(self.attention_norm(hidden)).view(size, length, 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [B, heads, T, d / heads] each
        attended = F.scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None)
        hidden = hidden + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class SequenceEncoder(nn.Module):
    """Embeddings of items and positions, transformer layers, and a final norm.

    Args:
        num_rows: items, padding and special tokens.
        max_length: number of positions.
        dim, num_layers, num_heads, dropout: settings of the layers.
        causal: whether a position attends only to itself and earlier positions.
        padding: row of the padding. Causal attention needs no mask for it, because it is at the end.
    """

    def __init__(
        self,
        num_rows: int,
        max_length: int,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        causal: bool,
        padding: int,
    ):
        super().__init__()
        self.causal, self.padding = causal, padding
        self.items = nn.Embedding(num_rows, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, T, d]` of padded rows `[B, T]`."""
        hidden = self.dropout(self.items(items) + self.positions.weight[: items.shape[1]])
        visible = None if self.causal else (items != self.padding)[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, visible)
        return self.norm(hidden)


def padded(flat: np.ndarray, starts: np.ndarray, ends: np.ndarray, padding: int) -> torch.Tensor:
    """The slices `flat[start:end]` as the rows of one matrix on the device, padded at the end, int64 `[B, longest]`."""
    columns = np.arange(max(1, (ends - starts).max()))
    positions = starts[:, None] + columns
    inside = positions < ends[:, None]
    return torch.from_numpy(np.where(inside, flat[np.where(inside, positions, 0)], padding)).to(device())


def windows(train: InteractionMatrix, stride: int, overlap: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All histories cut into windows of at most `stride + overlap` items, counted from the end.

    Args:
        train: whose histories are cut.
        stride: from one window's end to the next.
        overlap: items that a window shares with the one before it; a history of no more has no window.

    Returns:
        `starts` and `ends`, int64 `[W]`: bounds in `train.items`.
    """
    counts = -(-np.maximum(train.lengths - overlap, 0) // stride)
    users = np.repeat(np.arange(train.num_users), counts)
    number = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = train.indptr[users + 1] - number * stride
    return np.maximum(ends - stride - overlap, train.indptr[users]), ends
