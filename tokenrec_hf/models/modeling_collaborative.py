"""Collaborative filtering: matrix factorisation, LightGCN and FISM (section II-C1 of TokenRec, arXiv 2406.10450).

A model gives a vector p_i per user and q_j per item. Those of LightGCN are its *final* representations: the mean over layers
0..n of the embeddings propagated over the user-item graph (He et al., 2020), not the layer-0 tables. Those of FISM's users are
functions of their histories. The models work on rows; [`load_collaborative`] returns a saved model with the ids of its rows.

To add a model, subclass [`CollaborativeModel`] and enter the class in `COLLABORATIVE_MODELS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .codes import STORE_FOLDER, IdIndex, current, load_indexes, read_json, read_whole, save_indexes
from .configuration_tokenrec import CollaborativeConfig, FISMConfig, LightGCNConfig, Loader, MatrixFactorizationConfig
from .functional import dropout, linear_cross_entropy, sampled_cross_entropy, unit

if TYPE_CHECKING:
    from typing import Self

IDS = "ids.safetensors"
COUNTS = ("num_users", "num_items", "num_interactions", "num_folded_items")
# Users of FISM whose histories are added up at once: each of their interactions has a vector in memory meanwhile.
USER_CHUNK = 1_024


class Interactions(Protocol):
    """The interactions of training, as user and item rows, int64 `[n]`: sorted by user, each user's in time order."""

    num_users: int
    num_items: int
    users: np.ndarray
    items: np.ndarray


@dataclass
class CollaborativeOutput(ModelOutput):
    """Output of the collaborative models.

    Args:
        loss: scalar, when `labels` are given.
        user_embeds: final representations of the requested users, `[B, d]`.
    """

    loss: torch.Tensor | None = None
    user_embeds: torch.Tensor | None = None


class CollaborativeModel(Loader, PreTrainedModel):
    """Base class of the collaborative models.

    A subclass sets `config_class` and defines `tables`, `representations` and a `forward` that returns
    [`CollaborativeOutput`]; if users are functions of their histories, also `history_vectors`. Rotating the tables must rotate
    the representations: after retraining, the vectors are brought back to the old space by rotating the tables.
    """

    # Whether the interactions of training are buffers of the model.
    keeps_interactions: ClassVar[bool] = True
    # Whether users have no rows of their own in the tables, and `history_vectors` computes their vectors.
    users_are_histories: ClassVar[bool] = False
    # Whether the order of a history changes the vector of its user.
    ordered_histories = False

    config_class: type[CollaborativeConfig] = CollaborativeConfig
    config: CollaborativeConfig
    main_input_name = "user_ids"
    # The loss is a mean already, so Trainer need not count the examples of a step.
    accepts_loss_kwargs = False
    edge_users: torch.Tensor
    edge_items: torch.Tensor

    def __init__(self, config: CollaborativeConfig):
        super().__init__(config)
        if self.keeps_interactions:
            # Sorted by user, each user's in time order.
            self.register_buffer("edge_users", torch.zeros(config.num_interactions, dtype=torch.int32))
            self.register_buffer("edge_items", torch.zeros(config.num_interactions, dtype=torch.int32))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Loads a saved model; of a repository that is being changed, its former or its new state."""
        folder = pretrained_model_name_or_path
        if is_local := os.path.isdir(folder):
            folder = Path(folder, kwargs.pop("subfolder", ""))

        def load() -> Any:
            place = current(folder) if is_local else folder
            if isinstance(config, CollaborativeConfig) and (path := Path(place, "config.json")).is_file():
                # An auto class has read the configuration earlier.
                config.update({name: value for name, value in read_json(path).items() if name in COUNTS})
            return super(CollaborativeModel, cls).from_pretrained(place, *args, config=config, **kwargs)

        return read_whole(Path(folder).parent / STORE_FOLDER, load)

    @classmethod
    def from_interactions(cls, config: CollaborativeConfig, interactions: Interactions) -> Self:
        """A fresh model for the users and items of `interactions` (the training interactions only).

        Args:
            config: its counts of users, items and interactions are set.
            interactions: stored with the model where `keeps_interactions` is true.
        """
        config.num_users, config.num_items = interactions.num_users, interactions.num_items
        config.num_interactions = len(interactions.users) if cls.keeps_interactions else 0
        model = cls(config)
        if cls.keeps_interactions:
            model.edge_users.copy_(torch.from_numpy(interactions.users))
            model.edge_items.copy_(torch.from_numpy(interactions.items))
        return model

    def resized(self, interactions: Interactions) -> Self:
        """A fresh model with the settings of this one for other users, items and interactions."""
        return self.from_interactions(type(self.config).from_dict(self.config.to_dict()), interactions)

    def interactions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """User and item rows of the training interactions, int64 `[n]` each; None if the model does not keep them."""
        if not self.keeps_interactions:
            return None
        return self.edge_users.cpu().numpy().astype(np.int64), self.edge_items.cpu().numpy().astype(np.int64)

    def tables(self) -> list[tuple[str, nn.Embedding]]:
        """The learned tables and the kind of their rows, `"user"` or `"item"`."""
        raise NotImplementedError

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final representations p of users `[num_users, d]` and q of items `[num_items, d]`, with gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def user_embeddings(self) -> torch.Tensor:
        """A copy of the user representations p, detached, `[num_users, d]`."""
        return self.representations()[0].clone()

    @torch.no_grad()
    def item_embeddings(self) -> torch.Tensor:
        """A copy of the item representations q, detached, `[num_items, d]`."""
        return self.representations()[1].clone()

    def history_vectors(
        self, rows: torch.Tensor, items: torch.Tensor, ages: torch.Tensor, count: int, dropout_rate: float = 0.0
    ) -> torch.Tensor:
        """User vectors p of histories, of length 1, `[count, d]`, and zero for a history without interactions.

        Args:
            rows: the history of each interaction, LongTensor `[n]` of values in `[0, count)`.
            items: its item row, LongTensor `[n]`.
            ages: the number of later items in the history, LongTensor `[n]`.
            count: number of histories.
            dropout_rate: dropout of the item vectors.
        """
        raise NotImplementedError(f"{type(self).__name__} has a vector per user and cannot make one from a history.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)


class MatrixFactorizationModel(CollaborativeModel):
    """Matrix factorisation: one free vector per user and per item.

    Args:
        config: a [`MatrixFactorizationConfig`] with `num_users` and `num_items` set.
    """

    keeps_interactions = False
    config_class = MatrixFactorizationConfig
    config: MatrixFactorizationConfig

    def __init__(self, config: MatrixFactorizationConfig):
        super().__init__(config)
        self.user_table = nn.Embedding(config.num_users, config.embedding_dim)
        self.item_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.post_init()

    def tables(self) -> list[tuple[str, nn.Embedding]]:
        """The layer-0 embeddings of users and of items."""
        return [("user", self.user_table), ("item", self.item_table)]

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables themselves."""
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
            negative_ids: rows of items that each user has not interacted with, `[B, m]`. The BPR loss needs them; with the
                softmax loss they are the sampled competitors, and without them all items compete.
        """
        users, items = self.representations()
        # F.embedding, because the gradient of indexing depends on the order in which threads add.
        user = F.embedding(user_ids, users)  # [B, d]
        if labels is None:
            return CollaborativeOutput(user_embeds=user)
        loss = self._loss(user, items, labels, negative_ids)
        if self.training and self.config.l2_weight:
            rows = labels if negative_ids is None else torch.cat([labels, negative_ids.flatten()])
            squares = self.user_table(user_ids).square().sum() + self.item_table(rows).square().sum()
            loss = loss + self.config.l2_weight * (squares / (2 * len(user_ids)))
        return CollaborativeOutput(loss=loss, user_embeds=user)

    def _loss(
        self, user: torch.Tensor, items: torch.Tensor, labels: torch.Tensor, negative_ids: torch.Tensor | None
    ) -> torch.Tensor:
        if self.config.loss_type == "bpr":
            if negative_ids is None:
                raise ValueError(
                    "the BPR loss needs negative_ids [B, m]; draw them with InteractionMatrix.sample_negatives."
                )
            positive = (user * F.embedding(labels, items)).sum(-1, keepdim=True)  # [B, 1]
            negative = torch.einsum("bd,bmd->bm", user, F.embedding(negative_ids, items))  # [B, m]
            return -F.logsigmoid(positive - negative).mean()
        user, items = unit(user), unit(items)
        if negative_ids is None:
            return linear_cross_entropy(user / self.config.temperature, items, labels) / len(user)
        candidates = torch.cat([labels[:, None], negative_ids], dim=1)  # [B, 1 + m], the positive first
        scores = torch.einsum("bd,bmd->bm", user, F.embedding(candidates, items)) / self.config.temperature
        return F.cross_entropy(scores, torch.zeros_like(labels))


@dataclass(frozen=True)
class _SparseMatrix:
    """A sparse matrix in CSR form: the `columns` and `values` `[n]` of its entries, and the `offsets` of its rows in them."""

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
        # A CPU needs about a third of the time of a sparse CSR tensor.
        bag = partial(F.embedding_bag, mode="sum", include_last_offset=True)
        return bag(self.columns, dense.float(), self.offsets, per_sample_weights=self.values)


class _Propagation(torch.autograd.Function):
    """A sparse matrix times a dense one, with the transposed product as its backward pass."""

    @staticmethod
    def forward(ctx: Any, matrix: _SparseMatrix, transposed: _SparseMatrix, dense: torch.Tensor) -> torch.Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.transposed @ grad


class LightGCNModel(MatrixFactorizationModel):
    """LightGCN: matrix factorisation smoothed over the user-item graph.

    With R the interactions and D the degrees, E^(l+1) = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 E^(l), and the representation is
    the mean of E^(0)..E^(n). The edges are buffers of the model, so a loaded model propagates without the data.

    Args:
        config: a [`LightGCNConfig`]; [`~CollaborativeModel.from_interactions`] fills its counts.
    """

    keeps_interactions = True
    config_class = LightGCNConfig
    config: LightGCNConfig

    def __init__(self, config: LightGCNConfig):
        super().__init__(config)
        self._adjacency: _SparseMatrix | None = None

    def adjacency(self) -> _SparseMatrix:
        """The symmetrically normalised adjacency matrix, `[num_users + num_items] * 2`, built once for the edges it has."""
        if self._adjacency is None or self._adjacency.values.device != self.edge_users.device:
            size = self.config.num_users + self.config.num_items
            users, items = self.edge_users.long(), self.edge_items.long() + self.config.num_users
            rows, columns = torch.cat([users, items]), torch.cat([items, users])
            degree = torch.bincount(rows, minlength=size).clamp(min=1).float()
            self._adjacency = _SparseMatrix.from_entries(rows, columns, (degree[rows] * degree[columns]).rsqrt(), size)
        return self._adjacency

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._adjacency = None

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The means over the layers, with gradient."""
        layer = torch.cat([self.user_table.weight, self.item_table.weight])  # [num_users + num_items, d]
        total, adjacency = layer, self.adjacency()
        for _ in range(self.config.num_layers):
            # The adjacency is symmetric, so it is its own transpose.
            layer = _Propagation.apply(adjacency, adjacency, layer)
            total = total + layer
        mean = total / (self.config.num_layers + 1)
        return mean[: self.config.num_users], mean[self.config.num_users :]


class FISMModel(CollaborativeModel):
    """Factored item similarity (Kabbur et al., 2013): a user is the sum of the history vectors of the items in the history.

    Item i has a history vector a_i and a target vector q_i. p_u = sum_{i in H_u} 2^(-age_i / half_life) a_i, and the score
    is cos(p_u, q_j), trained by a softmax over all items. `age_i` is the number of items that the user has had since i.
    Training splits each history anew in every epoch into input and targets, so that no target appears in its own input: at
    random, or, with a `half_life`, into the past and the items that follow it. With a `recent_half_life`, a second history
    vector b_i adds sum_i 2^(-age_i / recent_half_life) b_i, which describes the items that follow immediately, as in Fossil
    (He and McAuley, 2016). The interactions are buffers of the model.

    Args:
        config: a [`FISMConfig`]; [`~CollaborativeModel.from_interactions`] fills its counts.
    """

    users_are_histories = True
    config_class = FISMConfig
    config: FISMConfig

    def __init__(self, config: FISMConfig):
        super().__init__(config)
        self.history_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.item_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.recent_table = None
        self.ordered_histories = config.half_life is not None
        if config.half_life is not None and config.recent_half_life is not None:
            self.recent_table = nn.Embedding(config.num_items, config.embedding_dim)
        self.post_init()

    def tables(self) -> list[tuple[str, nn.Embedding]]:
        """The tables of a, of q and, with a `recent_half_life`, of b; all have a row per item."""
        tables = [self.history_table, self.item_table, self.recent_table]
        return [("item", table) for table in tables if table is not None]

    def representations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """User representations p of the whole histories and item representations q, all of length 1."""
        users, items, count = self.edge_users.long(), self.edge_items.long(), self.config.num_users
        # Where the history of each user begins, and the last one ends.
        bounds = F.pad(torch.bincount(users, minlength=count).cumsum(0), (1, 0))
        ages = bounds[users + 1] - 1 - torch.arange(len(users), device=users.device)
        vectors = []
        for first in range(0, max(count, 1), USER_CHUNK):
            last = min(first + USER_CHUNK, count)
            own = slice(int(bounds[first]), int(bounds[last]))
            vectors.append(self.history_vectors(users[own] - first, items[own], ages[own], last - first))
        return torch.cat(vectors), F.normalize(self.item_table.weight, dim=-1)

    def history_vectors(
        self, rows: torch.Tensor, items: torch.Tensor, ages: torch.Tensor, count: int, dropout_rate: float = 0.0
    ) -> torch.Tensor:
        """User vectors p of histories; see [`CollaborativeModel.history_vectors`]."""
        summands = dropout(self.history_table(items), dropout_rate)  # [n, d]
        if self.config.half_life is not None:
            summands = summands * torch.exp2(-ages[:, None] / self.config.half_life)
        if self.recent_table is not None and self.config.recent_half_life is not None:
            recent = dropout(self.recent_table(items), dropout_rate)
            summands = summands + recent * torch.exp2(-ages[:, None] / self.config.recent_half_life)
        return F.normalize(summands.new_zeros(count, summands.shape[1]).index_add(0, rows, summands), dim=-1)

    def forward(
        self,
        user_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        history_rows: torch.Tensor | None = None,
        history_items: torch.Tensor | None = None,
        history_ages: torch.Tensor | None = None,
        negative_ids: torch.Tensor | None = None,
    ) -> CollaborativeOutput:
        """Represents a batch of users and, given `labels`, computes the loss.

        Args:
            user_ids: user rows, `[B]`.
            labels: rows of the target items, `[B]` or `[B, P]`; -100 is padding. A user with n targets has the weight sqrt(n).
            history_rows, history_items, history_ages: partial histories, see [`~FISMModel.history_vectors`], which replace
                the whole ones; their items do not compete.
            negative_ids: rows of the sampled competitors of all users of the batch, `[B, m]`, without which all items compete.
        """
        if history_rows is None or history_items is None or history_ages is None:
            users = self.user_embeddings()[user_ids]
        else:
            dropout_rate = self.config.dropout_rate if self.training else 0.0
            users = self.history_vectors(history_rows, history_items, history_ages, len(user_ids), dropout_rate)
        if labels is None:
            return CollaborativeOutput(user_embeds=users)
        labels = labels.view(len(labels), -1)  # [B, P]
        weights = (labels >= 0).sum(dim=1).clamp(min=1).sqrt()
        excluded = None if history_rows is None or history_items is None else (history_rows, history_items)
        users_scaled, shares = users / self.config.temperature, weights / weights.sum()
        if negative_ids is None:
            items = unit(self.item_table.weight)
            loss = linear_cross_entropy(users_scaled, items, labels, weights=shares, excluded=excluded)
        else:
            loss = sampled_cross_entropy(
                users_scaled,
                lambda rows: unit(self.item_table(rows)),
                negative_ids.flatten(),
                labels,
                self.config.num_items,
                weights=shares,
                excluded=excluded,
            )
        return CollaborativeOutput(loss=loss, user_embeds=users)


COLLABORATIVE_MODELS: dict[str, type[CollaborativeModel]] = {
    "lightgcn": LightGCNModel,
    "matrix_factorization": MatrixFactorizationModel,
    "fism": FISMModel,
}


class HistoryEncoder:
    """Makes user vectors from histories of item ids.

    Args:
        model: a collaborative model with `users_are_histories`.
        items: the ids of its items, in row order.

    Raises:
        ValueError: the number of ids is not the number of items.
    """

    def __init__(self, model: CollaborativeModel, items: IdIndex):
        if len(items) != model.config.num_items:
            raise ValueError(
                f"there are {len(items)} ids for {model.config.num_items} items of the collaborative model."
            )
        self.model, self.items = model, items

    def encode(self, histories: Sequence[Sequence[str]]) -> tuple[torch.Tensor, np.ndarray]:
        """Vectors p of histories, oldest item first.

        Items that the model does not know, because they have vectors but no interactions, add nothing but do age the items
        before them.

        Args:
            histories: the item ids of each history.

        Returns:
            `[n, d]`, of length 1, and bool `[n]`: whether any item of the history is known. If none is, the vector is zero.
        """
        sizes = np.array([len(history) for history in histories], dtype=np.int64)
        rows = np.repeat(np.arange(len(sizes)), sizes)
        ages = np.repeat(np.cumsum(sizes), sizes) - 1 - np.arange(len(rows))
        items = self.items.rows([item for history in histories for item in history])
        inside = items >= 0
        row, item, age = (torch.from_numpy(array[inside]) for array in (rows, items, ages))
        # The vectors are stored and encoded: they must not depend on the precision that the caller computes in.
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            vectors = self.model.history_vectors(row, item, age, len(sizes))
        return vectors, np.bincount(rows[inside], minlength=len(sizes)) > 0


def save_collaborative(model: CollaborativeModel, ids: Mapping[str, Sequence[str]], folder: str | os.PathLike) -> None:
    """Writes a model and the `"user"` and `"item"` ids of its rows."""
    model.save_pretrained(folder)
    save_indexes({kind: IdIndex(names, kind) for kind, names in ids.items()}, Path(folder) / IDS)


def collaborative_class(folder: str | os.PathLike) -> type[CollaborativeModel]:
    """The class of the model that `save_collaborative` wrote, found without loading it.

    Raises:
        ValueError: there is no such kind of collaborative model.
    """
    path = current(folder) / "config.json"
    model_type = read_json(path).get("model_type")
    found = [model for model in COLLABORATIVE_MODELS.values() if model.config_class.model_type == model_type]
    if not found:
        raise ValueError(f"{path} has the model_type {model_type!r}, which is none of the COLLABORATIVE_MODELS.")
    return found[0]


def load_collaborative(folder: str | os.PathLike) -> tuple[CollaborativeModel, dict[str, IdIndex]]:
    """Reads a model that `save_collaborative` wrote, in evaluation mode, and the `"user"` and `"item"` ids of its rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    return read_whole(
        Path(folder).parent / STORE_FOLDER,
        lambda: (collaborative_class(folder).from_pretrained(folder).eval(), load_indexes(Path(folder) / IDS)),
    )


for _model_class in COLLABORATIVE_MODELS.values():
    _model_class.config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModel")
