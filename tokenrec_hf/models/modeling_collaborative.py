"""Collaborative filtering: matrix factorisation, LightGCN and FISM (section II-C1 of TokenRec, arXiv 2406.10450).

All give a vector p_i per user and q_j per item. LightGCN's are its *final* representations: the mean over layers 0..n of
the embeddings propagated over the user-item graph (He et al., 2020), not the layer-0 tables. FISM's users are made of the
items of their histories. The models know rows, not ids, and nothing about tokens or prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .codes import IdIndex, load_indexes, save_indexes
from .configuration_tokenrec import FISMConfig, LightGCNConfig, MatrixFactorizationConfig


class Interactions(Protocol):
    """Users and the items they interacted with, as rows: what a fresh model is made for.

    Args:
        num_users: number of users.
        num_items: number of items.
        users: user row of each interaction, sorted and each user's in time order, int64 `[n]`.
        items: item row of each interaction, int64 `[n]`.
    """

    num_users: int
    num_items: int
    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int: ...


@dataclass
class CollaborativeOutput(ModelOutput):
    """Output of the collaborative models.

    Args:
        loss: scalar, when `labels` are given.
        user_embeds: final representations of the users asked for, `[B, d]`.
    """

    loss: torch.Tensor | None = None
    user_embeds: torch.Tensor | None = None


class MatrixFactorizationModel(PreTrainedModel):
    """Matrix factorisation: one free vector per user and per item.

    Args:
        config: a [`MatrixFactorizationConfig`] with `num_users` and `num_items` set.
    """

    config_class = MatrixFactorizationConfig
    base_model_prefix = "collaborative"
    main_input_name = "user_ids"
    accepts_loss_kwargs = False

    def __init__(self, config: MatrixFactorizationConfig):
        super().__init__(config)
        self.user_table = nn.Embedding(config.num_users, config.embedding_dim)
        self.item_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.post_init()

    @classmethod
    def from_interactions(cls, config, interactions: Interactions):
        """A fresh model of the users and items of `interactions` (the training interactions only)."""
        config.num_users, config.num_items = interactions.num_users, interactions.num_items
        return cls(config)

    def tables(self) -> list[tuple[str, nn.Embedding]]:
        """What is learned, a row a user or an item: `("user" or "item", table)`."""
        return [("user", self.user_table), ("item", self.item_table)]

    def user_embeddings(self) -> torch.Tensor:
        """Final user representations p, detached, `[num_users, d]`."""
        with torch.no_grad():
            return self.representations()[0].clone()

    def item_embeddings(self) -> torch.Tensor:
        """Final item representations q, detached, `[num_items, d]`."""
        with torch.no_grad():
            return self.representations()[1].clone()

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final representations of users `[num_users, d]` and items `[num_items, d]`, with gradient."""
        return self.user_table.weight, self.item_table.weight

    def forward(
        self,
        user_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        negative_ids: torch.Tensor | None = None,
    ) -> CollaborativeOutput:
        """Represents a batch of users and, given `labels`, computes the loss.

        Args:
            user_ids: user rows, `[B]`.
            labels: row of an item that each user interacted with, `[B]`.
            negative_ids: rows of items that each user has not interacted with, `[B, m]`. Needed by the BPR loss; with the
                softmax loss, they are the sampled competitors, and without them all items compete.
        """
        users, items = self.representations()
        # F.embedding and not indexing, whose gradient depends on the order in which threads happen to add.
        user = F.embedding(user_ids, users)  # [B, d]
        if labels is None:
            return CollaborativeOutput(user_embeds=user)
        loss = self._loss(user, items, labels, negative_ids)
        if self.training and self.config.l2_weight:
            loss = loss + self.config.l2_weight * self._squared_norm(user_ids, labels, negative_ids)
        return CollaborativeOutput(loss=loss, user_embeds=user)

    def _loss(self, user, items, labels, negative_ids):
        if self.config.loss_type == "bpr":
            if negative_ids is None:
                raise ValueError(
                    "the BPR loss needs negative_ids [B, m]; draw them with InteractionMatrix.sample_negatives."
                )
            positive = (user * F.embedding(labels, items)).sum(-1, keepdim=True)  # [B, 1]
            negative = torch.einsum("bd,bmd->bm", user, F.embedding(negative_ids, items))  # [B, m]
            return -F.logsigmoid(positive - negative).mean()
        user, items = F.normalize(user, dim=-1), F.normalize(items, dim=-1)
        if negative_ids is None:
            return F.cross_entropy(user @ items.T / self.config.temperature, labels)  # over [B, num_items]
        candidates = torch.cat([labels[:, None], negative_ids], dim=1)  # [B, 1 + m], the positive first
        scores = torch.einsum("bd,bmd->bm", user, F.embedding(candidates, items)) / self.config.temperature
        return F.cross_entropy(scores, torch.zeros_like(labels))

    def _squared_norm(self, user_ids, labels, negative_ids):
        rows = labels if negative_ids is None else torch.cat([labels, negative_ids.flatten()])
        squares = self.user_table(user_ids).square().sum() + self.item_table(rows).square().sum()
        return squares / (2 * len(user_ids))

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)


def _with_edges(model_class, config, interactions: Interactions):
    """A fresh model that holds the interactions as buffers, sorted by user and each user's in time order."""
    config.num_users, config.num_items = interactions.num_users, interactions.num_items
    config.num_interactions = len(interactions)
    model = model_class(config)
    model.edge_users.copy_(torch.from_numpy(interactions.users))
    model.edge_items.copy_(torch.from_numpy(interactions.items))
    return model


@dataclass(frozen=True)
class _SparseMatrix:
    """A sparse matrix to be multiplied by dense ones, its entries in the order of their rows.

    The product is a weighted `embedding_bag`, which a CPU does in about a third of the time that a sparse CSR tensor takes.

    Args:
        columns: of the entries, int32, `[n]`.
        offsets: where each row begins, and the end of the last one, int32, `[num_rows + 1]`.
        values: of the entries, `[n]`.
    """

    columns: torch.Tensor
    offsets: torch.Tensor
    values: torch.Tensor

    @classmethod
    def from_entries(
        cls, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, num_rows: int
    ) -> _SparseMatrix:
        """The matrix with `values[n]` at (`rows[n]`, `columns[n]`); entries at the same place add up."""
        order = rows.argsort(stable=True)
        offsets = F.pad(torch.bincount(rows, minlength=num_rows).cumsum(0), (1, 0))
        return cls(columns[order].int(), offsets.int(), values[order])

    def __matmul__(self, dense: torch.Tensor) -> torch.Tensor:
        """The product with `dense` `[num_columns, d]`, `[num_rows, d]`; always float32, also under mixed precision."""
        return F.embedding_bag(
            self.columns,
            dense.float(),
            self.offsets,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )


class _Propagation(torch.autograd.Function):
    """A sparse matrix times a dense one, with the transposed product as its backward pass."""

    @staticmethod
    def forward(ctx, matrix, transposed, dense):
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx, grad):
        return None, None, ctx.transposed @ grad


class LightGCNModel(MatrixFactorizationModel):
    """LightGCN: matrix factorisation smoothed over the user-item graph.

    With R the interactions and D the degrees, E^(l+1) = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 E^(l), and the representation is
    the mean of E^(0)..E^(n). The edges are buffers of the model, so a loaded model propagates without the data.

    Args:
        config: a [`LightGCNConfig`]; use [`LightGCNModel.from_interactions`] to fill its sizes.
    """

    config_class = LightGCNConfig
    edge_users: torch.Tensor
    edge_items: torch.Tensor

    def __init__(self, config: LightGCNConfig):
        super().__init__(config)
        self.register_buffer("edge_users", torch.zeros(config.num_interactions, dtype=torch.int32))
        self.register_buffer("edge_items", torch.zeros(config.num_interactions, dtype=torch.int32))
        self._adjacency: _SparseMatrix | None = None

    @classmethod
    def from_interactions(cls, config: LightGCNConfig, interactions: Interactions) -> LightGCNModel:
        """A fresh model over the graph of `interactions` (the training interactions only)."""
        return _with_edges(cls, config, interactions)

    def adjacency(self) -> _SparseMatrix:
        """The symmetrically normalised adjacency matrix, `[num_users + num_items] * 2`, built once."""
        if self._adjacency is None or self._adjacency.values.device != self.edge_users.device:
            size = self.config.num_users + self.config.num_items
            users, items = self.edge_users.long(), self.edge_items.long() + self.config.num_users
            rows, columns = torch.cat([users, items]), torch.cat([items, users])
            degree = torch.bincount(rows, minlength=size).clamp(min=1).float()
            self._adjacency = _SparseMatrix.from_entries(rows, columns, (degree[rows] * degree[columns]).rsqrt(), size)
        return self._adjacency

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final representations of users `[num_users, d]` and items `[num_items, d]`, with gradient."""
        layer = torch.cat([self.user_table.weight, self.item_table.weight])  # [num_users + num_items, d]
        total, adjacency = layer, self.adjacency()
        for _ in range(self.config.num_layers):
            # The adjacency is symmetric, so it is its own transpose.
            layer = _Propagation.apply(adjacency, adjacency, layer)
            total = total + layer
        mean = total / (self.config.num_layers + 1)
        return mean[: self.config.num_users], mean[self.config.num_users :]


class FISMModel(PreTrainedModel):
    """Factored item similarity (Kabbur et al., 2013): a user is the sum of what the items of the history stand for.

    With a_i what item i says of its user and q_j what it is as a recommendation,
    p_u = sum_{i in H_u} 2^(-age_i / half_life) a_i and the score is cos(p_u, q_j), trained by a softmax over all items. While
    training, a history is split anew in every epoch into what p_u is made of and what is to be found, so nothing is asked
    for that it is told: at random, or, with a `half_life`, into the past and the items that follow it. `age_i` is the number
    of items that the user has had since. With a `recent_half_life`, sum_i 2^(-age_i / recent_half_life) b_i is added, b_i
    being what item i says about the very next ones, as in Fossil (He and McAuley, 2016). The interactions are buffers of the model.

    Args:
        config: a [`FISMConfig`]; use [`FISMModel.from_interactions`] to fill its sizes.
    """

    config_class = FISMConfig
    base_model_prefix = "collaborative"
    main_input_name = "user_ids"
    accepts_loss_kwargs = False
    edge_users: torch.Tensor
    edge_items: torch.Tensor

    def __init__(self, config: FISMConfig):
        super().__init__(config)
        self.history_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.item_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.recent_table = None
        if config.half_life is not None and config.recent_half_life is not None:
            self.recent_table = nn.Embedding(config.num_items, config.embedding_dim)
        # Sorted by user, each user's in time order.
        self.register_buffer("edge_users", torch.zeros(config.num_interactions, dtype=torch.int32))
        self.register_buffer("edge_items", torch.zeros(config.num_interactions, dtype=torch.int32))
        self.post_init()

    @classmethod
    def from_interactions(cls, config: FISMConfig, interactions: Interactions) -> FISMModel:
        """A fresh model of the histories in `interactions` (the training interactions only)."""
        return _with_edges(cls, config, interactions)

    def tables(self) -> list[tuple[str, nn.Embedding]]:
        """What is learned, a row an item: `("item", table)`."""
        tables = [self.history_table, self.item_table, self.recent_table]
        return [("item", table) for table in tables if table is not None]

    def user_embeddings(self) -> torch.Tensor:
        """User representations p of the whole histories, of length 1, detached, `[num_users, d]`."""
        users = self.edge_users.long()
        lengths = torch.bincount(users, minlength=self.config.num_users)
        ages = lengths.cumsum(0)[users] - 1 - torch.arange(len(users), device=users.device)
        with torch.no_grad():
            return self.pool(users, self.edge_items.long(), ages, self.config.num_users)

    def item_embeddings(self) -> torch.Tensor:
        """Item representations q, of length 1, detached, `[num_items, d]`."""
        with torch.no_grad():
            return F.normalize(self.item_table.weight, dim=-1)

    def pool(
        self, rows: torch.Tensor, items: torch.Tensor, ages: torch.Tensor, count: int, dropout_rate: float = 0.0
    ) -> torch.Tensor:
        """p of length 1 of `count` histories, `[count, d]`: item `items[n]` of age `ages[n]` belongs to history `rows[n]`."""
        said = self.summands(items, ages, dropout_rate)
        return F.normalize(said.new_zeros(count, said.shape[1]).index_add(0, rows, said), dim=-1)

    def summands(self, items: torch.Tensor, ages: torch.Tensor, dropout_rate: float = 0.0) -> torch.Tensor:
        """What items `[n]` of these ages `[n]` add to the vector of whoever has had them, `[n, d]`."""
        said = F.dropout(self.history_table(items), dropout_rate)  # [n, d]
        if self.config.half_life is not None:
            said = said * torch.exp2(-ages[:, None] / self.config.half_life)
        if self.recent_table is not None:
            recent = F.dropout(self.recent_table(items), dropout_rate)
            said = said + recent * torch.exp2(-ages[:, None] / self.config.recent_half_life)
        return said

    def forward(
        self,
        user_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        history_rows: torch.Tensor | None = None,
        history_items: torch.Tensor | None = None,
        history_ages: torch.Tensor | None = None,
    ) -> CollaborativeOutput:
        """Represents a batch of users and, given `labels`, computes the loss.

        Args:
            user_ids: user rows, `[B]`.
            labels: rows of the items to find, `[B]` or `[B, P]`; -100 is padding. A user with n of them counts as sqrt(n).
            history_rows, history_items, history_ages: the history of each user, see [`~FISMModel.pool`], in place of the
                whole one; its items do not compete.
        """
        if history_rows is None or history_items is None or history_ages is None:
            users = self.user_embeddings()[user_ids]
        else:
            dropout_rate = self.config.dropout_rate if self.training else 0.0
            users = self.pool(history_rows, history_items, history_ages, len(user_ids), dropout_rate)  # [B, d]
        if labels is None:
            return CollaborativeOutput(user_embeds=users)
        scores = users @ F.normalize(self.item_table.weight, dim=-1).T / self.config.temperature  # [B, num_items]
        if history_rows is not None:
            scores = scores.index_put((history_rows, history_items), scores.new_tensor(-torch.inf))
        labels = labels.view(len(labels), -1)  # [B, P]
        valid = labels >= 0
        terms = scores.logsumexp(dim=-1, keepdim=True) - scores.gather(1, labels.clamp(min=0))
        terms = terms.masked_fill(~valid, 0)  # [B, P]
        counts = valid.sum(dim=1).clamp(min=1)
        loss = (terms.sum(dim=1) / counts.sqrt()).sum() / counts.sqrt().sum()
        return CollaborativeOutput(loss=loss, user_embeds=users)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)


CollaborativeConfig = MatrixFactorizationConfig | FISMConfig
COLLABORATIVE_MODELS: dict[str, type[MatrixFactorizationModel] | type[FISMModel]] = {
    "lightgcn": LightGCNModel,
    "matrix_factorization": MatrixFactorizationModel,
    "fism": FISMModel,
}


def augment_norm(
    users: torch.Tensor, items: torch.Tensor, norm: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of one more dimension whose *cosine* ranks items as the dot product of the given ones does.

    Retrieval is by cosine (Eq. 19), but BPR trains dot products, where an item's norm carries its popularity. With M the
    largest norm of an item, (q, sqrt(M^2 - ||q||^2)) has norm M for every item and (p, 0) leaves the product unchanged
    (Bachrach et al., 2014).

    Args:
        users: p, `[num_users, d]`.
        items: q, `[num_items, d]`.
        norm: M; by default that of `items`. For newcomers it is that of the items that they join, and one that is longer
            keeps its own length.

    Returns:
        `[num_users, d + 1]` and `[num_items, d + 1]`.
    """
    squares = items.square().sum(dim=1, keepdim=True)
    largest = squares.max() if norm is None else norm**2
    rest = (largest - squares).clamp(min=0).sqrt()
    return torch.cat([users, torch.zeros_like(users[:, :1])], dim=1), torch.cat([items, rest], dim=1)


MatrixFactorizationConfig.register_for_auto_class()
LightGCNConfig.register_for_auto_class()
FISMConfig.register_for_auto_class()
MatrixFactorizationModel.register_for_auto_class("AutoModel")
LightGCNModel.register_for_auto_class("AutoModel")
FISMModel.register_for_auto_class("AutoModel")


FOLDER, IDS = "collaborative", "ids.safetensors"


class HistoryEncoder:
    """A [`FISMModel`] that knows its items by their ids.

    Args:
        model: gives the vectors.
        items: the ids of its items, in row order.

    Raises:
        ValueError: there are more ids than items, or fewer.
    """

    def __init__(self, model: FISMModel, items: IdIndex):
        if len(items) != model.config.num_items:
            raise ValueError(
                f"there are {len(items)} ids for {model.config.num_items} items of the collaborative model."
            )
        self.model, self.items = model, items

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> HistoryEncoder | None:
        """That of a trained repository, or None where its collaborative model is another one, or was left out.

        Args:
            name: its folder, or its name on the Hub.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
        """
        if not Path(name).is_dir():
            name = huggingface_hub.snapshot_download(
                str(name), revision=revision, token=token, allow_patterns=f"{FOLDER}/*"
            )
        source = Path(name) / FOLDER
        config, ids = source / "config.json", source / IDS
        if not (config.is_file() and ids.is_file()):
            return None
        if json.loads(config.read_text(encoding="utf-8"))["model_type"] != FISMModel.config_class.model_type:
            return None
        return cls(FISMModel.from_pretrained(source).eval(), load_indexes(ids)["item"])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes it as the `collaborative/` of a repository that has no users: items only, no history of anybody."""
        config = FISMConfig.from_dict({**self.model.config.to_dict(), "num_users": 0, "num_interactions": 0})
        model = FISMModel(config)
        with torch.no_grad():
            for (_, table), (_, mine) in zip(model.tables(), self.model.tables()):
                table.weight.copy_(mine.weight)
        model.save_pretrained(folder)
        save_indexes({"user": IdIndex([], "user"), "item": self.items}, Path(folder) / IDS)

    def encode(self, histories: Sequence[Sequence[str]]) -> tuple[torch.Tensor, np.ndarray]:
        """Vectors p of histories, oldest item first.

        Items that the model does not know (vectors without interactions) say nothing, but those before them are the older
        for it.

        Args:
            histories: item ids of each.

        Returns:
            `[n, d]`, of length 1, and bool `[n]`: whether any item of the history is known; if not, the vector is zero.
        """
        sizes = np.array([len(one) for one in histories], dtype=np.int64)
        rows = np.repeat(np.arange(len(sizes)), sizes)
        ages = np.repeat(np.cumsum(sizes), sizes) - 1 - np.arange(len(rows))
        items = self.items.rows([item for one in histories for item in one])
        inside = items >= 0
        row, item, age = (torch.from_numpy(one[inside]) for one in (rows, items, ages))
        with torch.no_grad():
            vectors = self.model.pool(row, item, age, len(sizes))
        return vectors, np.bincount(rows[inside], minlength=len(sizes)) > 0
