"""Configurations of the collaborative-filtering models (section II-C1 of TokenRec): sizes, loss and regularisation."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, T5Config


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


@strict
class MQTokenizerConfig(PreTrainedConfig):
    """Configuration of [`MQTokenizerModel`].

    Args:
        embedding_dim: d, the size of the collaborative vectors.
        num_codebooks: K, the number of encoders and of tokens per user or item. The paper suggests 3.
        codebook_size: L, the number of codewords of each codebook. The paper: 256 for small data, 512 for larger.
        codebook_dim: d_c, the size of a codeword.
        hidden_dim: width of the hidden layers of encoders and decoder.
        mask_ratio: rho, the probability that an input element is zeroed while training (Eq. 2). The paper's best: 0.2.
        commitment_weight: beta, the weight of the commitment loss (Eq. 13-14).
        kmeans_init: start the codebooks from a k-means of the encoder outputs (else from random numbers).
        residual: not the paper's: no encoders and no decoder; each codebook quantises what the ones before it have left of the
            vector, and their sum is its reconstruction (residual quantisation). k-means finds such codebooks, without any
            training, and they lose less of vectors of many dimensions. `codebook_dim` is then `embedding_dim`, and `hidden_dim`
            means nothing.
        revive_dead: while training, replace codewords that are no longer used by encoder outputs of the batch.
    """

    model_type = "tokenrec_mq_tokenizer"

    embedding_dim: int = 64
    num_codebooks: int = 3
    codebook_size: int = 256
    codebook_dim: int = 64
    hidden_dim: int = 256
    mask_ratio: float | int = 0.2
    commitment_weight: float | int = 0.25
    kmeans_init: bool = True
    residual: bool = False
    revive_dead: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.residual:
            self.codebook_dim = self.embedding_dim
        for name in ("embedding_dim", "num_codebooks", "codebook_size", "codebook_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1.")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio} but must be between 0 and 1.")
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight is {self.commitment_weight} but must be at least 0.")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved."""
        fields = super().to_dict()
        # A class with "Tokenizer" in its name is taken for a text tokenizer, whose code is recorded as a pair of classes.
        for auto_class, reference in fields.get("auto_map", {}).items():
            fields["auto_map"][auto_class] = reference if isinstance(reference, str) else reference[0]
        return fields


@strict
class T5GenerativeRetrievalConfig(T5Config):
    """Configuration of [`T5ForGenerativeRetrieval`]: all fields of [`~transformers.T5Config`] and those below.

    Args:
        embedding_dim: d, the size of the item vectors that queries are compared with.
        projection_dim: width of the two hidden layers of the projection (Eq. 18). Default: `2 * d_model`.
        pooling: `"decoder"` (one decoder step, the paper's) or `"mean"` (mean of the encoder's outputs, no decoder at all).
        loss_type: `"cosine_ranking"` (Eq. 20) or `"softmax"` (cross-entropy over cosine / `temperature`).
        margin: gamma of Eq. 20; negatives below this cosine cost nothing. The paper: 0 to 0.2.
        temperature: tau of the softmax loss.
        alignment_weight: weight of 1 - cos(z, p_i), which draws the query to the collaborative vector of the prompt's user;
            0 (the paper's) leaves it out.
        user_shortcut: add to the projection what the codewords of the prompt's user stand for, so that T5 says what to change
            about the user's vector instead of all of it. Needs residual codebooks. Default: no, as in the paper.
        user_code_tokens: the vocabulary ids `[first, end)` of the users' code tokens, for `user_shortcut`.
        space_ids: fingerprints of the MQ-Tokenizers whose tokens the model was trained on, `{"user": ..., "item": ...}`.
    """

    model_type = "t5_generative_retrieval"
    keys_to_ignore_at_inference = ["past_key_values"]

    embedding_dim: int = 64
    projection_dim: int | None = None
    pooling: str = "decoder"
    loss_type: str = "cosine_ranking"
    margin: float | int = 0.1
    temperature: float | int = 0.07
    alignment_weight: float | int = 0.0
    user_shortcut: bool = False
    user_code_tokens: list | tuple | None = None
    space_ids: dict | None = None

    def __post_init__(self, **kwargs):
        if self.projection_dim is None:
            self.projection_dim = 2 * self.d_model
        super().__post_init__(**kwargs)
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim} but must be at least 1.")
        if self.pooling not in ("decoder", "mean"):
            raise ValueError(f"pooling is {self.pooling!r} but must be 'decoder' or 'mean'.")
        if self.loss_type not in ("cosine_ranking", "softmax"):
            raise ValueError(f"loss_type is {self.loss_type!r} but must be 'cosine_ranking' or 'softmax'.")
        if self.alignment_weight < 0:
            raise ValueError(f"alignment_weight is {self.alignment_weight} but must be at least 0.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature} but must be above 0.")

    @property
    def custom_pipelines(self) -> dict[str, dict[str, str]]:
        """The pipeline whose code lies beside this class in a shared repository, for `pipeline(..., trust_remote_code=True)`.

        Empty where the task is registered, as it is once `tokenrec_hf` is imported: transformers wants trust whenever a
        configuration names a pipeline, even for one that it has already. So it is no part of `config.json`.
        """
        from transformers.pipelines import PIPELINE_REGISTRY

        if "generative-retrieval" in PIPELINE_REGISTRY.supported_tasks:
            return {}
        implementation = "pipeline_generative_retrieval.GenerativeRetrievalPipeline"
        return {"generative-retrieval": {"impl": implementation, "pt": "AutoModel"}}
