"""Configurations of the collaborative-filtering models (section II-C1 of TokenRec): sizes, loss and regularisation."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class MatrixFactorizationConfig(PreTrainedConfig):
    """Configuration of [`MatrixFactorizationModel`].

    Args:
        num_users: number of users.
        num_items: number of items.
        embedding_dim: d, the size of a user or item vector.
        loss_type: `"bpr"` (pairwise, on dot products) or `"softmax"` (cross-entropy over cosine / `temperature`).
        temperature: tau of the softmax loss.
        l2_weight: weight of the squared norm of a batch's layer-0 embeddings, per interaction (BPR's regulariser).
        initializer_range: standard deviation of the initial embeddings.
    """

    model_type = "tokenrec_matrix_factorization"

    num_users: int = 0
    num_items: int = 0
    embedding_dim: int = 64
    loss_type: str = "bpr"
    temperature: float | int = 0.1
    l2_weight: float | int = 1e-4
    initializer_range: float | int = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim} but must be at least 1.")
        if self.loss_type not in ("bpr", "softmax"):
            raise ValueError(f"loss_type is {self.loss_type!r} but must be 'bpr' or 'softmax'.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature} but must be above 0.")


@strict
class LightGCNConfig(MatrixFactorizationConfig):
    """Configuration of [`LightGCNModel`]: that of matrix factorisation and the graph.

    Args:
        num_layers: n, the number of propagation steps; the final representation is the mean over layers 0..n.
        num_interactions: number of edges of the user-item graph, which is stored with the model.
    """

    model_type = "tokenrec_lightgcn"

    num_layers: int = 3
    num_interactions: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_layers < 0:
            raise ValueError(f"num_layers is {self.num_layers} but must be at least 0.")


@strict
class FISMConfig(PreTrainedConfig):
    """Configuration of [`FISMModel`].

    Args:
        num_users: number of users.
        num_items: number of items.
        num_interactions: number of interactions, which are stored with the model, since users are made of them.
        num_folded_items: how many of the items, the last ones, came after the training: their rows are estimates
            (`fold_in_items`).
        embedding_dim: d, the size of a user or item vector.
        temperature: tau of the softmax loss.
        half_life: after how many further items of its user an item of the history counts half. None: all count alike, and the
            order of a history does not matter.
        recent_half_life: the same of a second table, of what an item says about the very next ones. None, or without
            `half_life`: there is no such table.
        dropout_rate: of the elements of the items of a history, while training.
        history_smoothing, item_smoothing: how far the rows that histories are made of, and those of q, are moved after the
            training to what is expected of items with such neighbours (`smooth_tables`), from 0 to 1.
        initializer_range: standard deviation of the initial embeddings.
    """

    model_type = "tokenrec_fism"

    num_users: int = 0
    num_items: int = 0
    num_interactions: int = 0
    num_folded_items: int = 0
    embedding_dim: int = 128
    temperature: float | int = 0.1
    half_life: float | int | None = None
    recent_half_life: float | int | None = None
    dropout_rate: float | int = 0.3
    history_smoothing: float | int = 0.0
    item_smoothing: float | int = 0.0
    initializer_range: float | int = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim} but must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature} but must be above 0.")
        for name in ("history_smoothing", "item_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be from 0 to 1.")
        for name in ("half_life", "recent_half_life"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value} but must be above 0, or null.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate is {self.dropout_rate} but must be at least 0 and below 1.")
