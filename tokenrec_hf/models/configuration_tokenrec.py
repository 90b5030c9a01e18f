"""Configurations of the collaborative models, the MQ-Tokenizers and T5: sizes, losses and regularisation of TokenRec."""

# Annotations are not postponed, because `strict` checks the types of fields by them.
import threading
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, T5Config

# Beyond these a configuration is damaged; a model of it would fill any memory.
MOST_WIDTH, MOST_LAYERS, MOST_NUMBERS = 1 << 20, 1 << 10, 1 << 36


class Loader:
    """Part of all models. One thread at a time loads a model, because transformers replaces methods of all models meanwhile."""

    loaded_revision: str | None = None
    _loading = threading.RLock()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads the model as [`~transformers.PreTrainedModel.from_pretrained`] does and records the revision.

        Raises:
            ValueError: a field of its configuration is damaged.
        """
        try:
            with cls._loading:
                loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        except StrictDataclassError as flaw:
            name, reason = next(iter(args), cls.__name__), " ".join(str(flaw).split())
            raise ValueError(
                f"the configuration of {name} is damaged ({reason}); restore it from a copy or train again."
            ) from flaw
        (loaded[0] if isinstance(loaded, tuple) else loaded).loaded_revision = kwargs.get("revision")
        return loaded


def _require(config: PreTrainedConfig, allowed: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises ValueError for a field that is not as `allowed`; fields that are None are skipped."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value!r} but must be {allowed}.")


@strict
class CollaborativeConfig(PreTrainedConfig):
    """Fields that the configurations of all collaborative models have (section II-C1 of TokenRec, arXiv 2406.10450).

    The counts are set by [`~CollaborativeModel.from_interactions`].

    Args:
        num_users: number of users.
        num_items: number of items.
        num_interactions: number of interactions that are stored with the model; 0 for a model that stores none.
        num_folded_items: number of items, the last ones, that were added after training; their rows are estimates.
        embedding_dim: d, the size of a user or item vector.
        temperature: tau of the softmax loss.
        initializer_range: standard deviation of the initial embeddings.
    """

    num_users: int = 0
    num_items: int = 0
    num_interactions: int = 0
    num_folded_items: int = 0
    embedding_dim: int = 64
    temperature: float | int = 0.1
    initializer_range: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _require(self, "at least 1", lambda value: value >= 1, "embedding_dim")
        _require(self, "above 0", lambda value: value > 0, "temperature")


@strict
class MatrixFactorizationConfig(CollaborativeConfig):
    """Configuration of [`MatrixFactorizationModel`], besides the fields of [`CollaborativeConfig`].

    Args:
        loss_type: `"bpr"` (pairwise, on dot products) or `"softmax"` (cross-entropy over cosine / `temperature`).
        l2_weight: weight of the squared norm of a batch's layer-0 embeddings, per interaction (the regulariser of BPR).
    """

    model_type = "tokenrec_matrix_factorization"

    loss_type: str = "bpr"
    l2_weight: float | int = 1e-4

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _require(self, "'bpr' or 'softmax'", lambda value: value in ("bpr", "softmax"), "loss_type")


@strict
class LightGCNConfig(MatrixFactorizationConfig):
    """Configuration of [`LightGCNModel`], besides the fields of [`MatrixFactorizationConfig`].

    Args:
        num_layers: n, the number of propagation steps; the final representation is the mean over layers 0..n.
    """

    model_type = "tokenrec_lightgcn"

    num_layers: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _require(self, "at least 0", lambda value: value >= 0, "num_layers")


@strict
class FISMConfig(CollaborativeConfig):
    """Configuration of [`FISMModel`], besides the fields of [`CollaborativeConfig`].

    Args:
        half_life: number of later items of the same user after which an item of the history counts half. None: all items count
            alike and the order of a history is ignored.
        recent_half_life: the same for a second table, which describes the items that follow immediately. There is no such table
            if this or `half_life` is None.
        dropout_rate: dropout of the elements of the history items' vectors in training.
        history_smoothing, item_smoothing: from 0 to 1: how far the rows of the history tables, and of the table of q, move after
            training towards their estimates from the neighbours in the histories (`smooth_tables`).
    """

    model_type = "tokenrec_fism"

    embedding_dim: int = 128
    half_life: float | int | None = None
    recent_half_life: float | int | None = None
    dropout_rate: float | int = 0.3
    history_smoothing: float | int = 0.0
    item_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _require(self, "above 0", lambda value: value > 0, "half_life", "recent_half_life")
        _require(self, "between 0 and 1", lambda value: 0 <= value <= 1, "history_smoothing", "item_smoothing")
        _require(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "dropout_rate")


@strict
class MQTokenizerConfig(PreTrainedConfig):
    """Configuration of [`MQTokenizerModel`].

    Args:
        embedding_dim: d, the size of the collaborative vectors.
        num_codebooks: K, the number of encoders and of tokens per user or item. The paper suggests 3.
        codebook_size: L, the number of codewords of each codebook. The paper uses 256 for small data and 512 for larger data.
        codebook_dim: d_c, the size of a codeword.
        hidden_dim: width of the hidden layers of encoders and decoder.
        mask_ratio: rho, the probability that an input element is zeroed in training (Eq. 2). The paper's best value is 0.2.
        commitment_weight: beta, the weight of the commitment loss (Eq. 13-14).
        kmeans_init: start the codebooks from a k-means of the encoder outputs, not from random numbers.
        residual: residual quantisation, which is not in the paper. There are no encoders and no decoder; each codebook quantises
            the residual of the codebooks before it, and a vector is reconstructed as the sum of its codewords. k-means alone
            trains such codebooks, and they lose less variance of high-dimensional vectors. `codebook_dim` is then
            `embedding_dim`, and `hidden_dim` is ignored.
        revive_dead: in training, replace unused codewords by encoder outputs of the batch.
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

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.residual:
            self.codebook_dim = self.embedding_dim
        sizes = ("embedding_dim", "num_codebooks", "codebook_size", "codebook_dim", "hidden_dim")
        _require(self, "at least 1", lambda value: value >= 1, *sizes)
        numbers = self.num_codebooks * self.codebook_size * self.codebook_dim
        _require(self, "smaller, or the codebooks fill any memory", lambda _: numbers <= MOST_NUMBERS, "codebook_size")
        _require(self, "at least 0", lambda value: value >= 0, "commitment_weight")
        _require(self, "between 0 and 1", lambda value: 0 <= value <= 1, "mask_ratio")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved."""
        fields = super().to_dict()
        # transformers records the code of a class with "Tokenizer" in its name as a pair, as for text tokenizers.
        for auto_class, reference in fields.get("auto_map", {}).items():
            fields["auto_map"][auto_class] = reference if isinstance(reference, str) else reference[0]
        return fields


@strict
class T5GenerativeRetrievalConfig(T5Config):
    """Configuration of [`T5ForGenerativeRetrieval`]: all fields of [`~transformers.T5Config`] and those below.

    Args:
        embedding_dim: d, the size of the item vectors that queries are compared with.
        projection_dim: width of the two hidden layers of the projection (Eq. 18). Default: `2 * d_model`.
        pooling: how a prompt becomes one vector: `"decoder"` (one decoder step, as in the paper), or `"history"` (the decoder
            reads the items of the history, one position per item, and its last output is taken; the encoder reads the words; see
            [`T5ForGenerativeRetrieval`]).
        loss_type: `"cosine_ranking"` (Eq. 20) or `"softmax"` (cross-entropy over cosine / `temperature`).
        margin: gamma of Eq. 20; negatives below this cosine add no loss. The paper uses 0 to 0.2.
        temperature: tau of the softmax loss. With `"history"` pooling, cos(p, q) / tau is the part of the collaborative vectors in
            the score.
        history_weight: with `"history"` pooling, the weight of T5's part in the score. 0 ranks by the collaborative vectors.
        entity_tokens: with `"history"` pooling, how the tokenizer writes ids: for `"user"` and `"item"`, the vocabulary id `first`
            of the first code token, `num_codebooks` K, `codebook_size` L, and the number `prefix` of tokens before the codes.
        space_ids: fingerprints of the MQ-Tokenizers that made the tokens of training, `{"user": ..., "item": ...}`.
    """

    model_type = "t5_generative_retrieval"
    keys_to_ignore_at_inference = ["past_key_values"]

    embedding_dim: int = 64
    projection_dim: int | None = None
    pooling: str = "decoder"
    loss_type: str = "cosine_ranking"
    margin: float | int = 0.1
    temperature: float | int = 0.07
    history_weight: float | int = 1.0
    entity_tokens: dict | None = None
    space_ids: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.projection_dim is None:
            self.projection_dim = 2 * self.d_model
        super().__post_init__(**kwargs)
        losses = ("cosine_ranking", "softmax")
        widths = ("embedding_dim", "projection_dim", "d_model", "d_kv", "d_ff", "num_heads")
        _require(self, f"from 1 to {MOST_WIDTH}", lambda value: 1 <= value <= MOST_WIDTH, *widths)
        _require(
            self,
            f"from 1 to {MOST_LAYERS}",
            lambda value: 1 <= value <= MOST_LAYERS,
            "num_layers",
            "num_decoder_layers",
        )
        numbers = self.vocab_size * self.d_model
        _require(self, "smaller, or the embeddings fill any memory", lambda _: numbers <= MOST_NUMBERS, "vocab_size")
        _require(self, "at least 0", lambda value: value >= 0, "history_weight")
        _require(self, "above 0", lambda value: value > 0, "temperature")
        _require(self, "'decoder' or 'history'", lambda value: value in ("decoder", "history"), "pooling")
        _require(self, "'cosine_ranking' or 'softmax'", lambda value: value in losses, "loss_type")
        if self.pooling == "history" and self.loss_type != "softmax":
            raise ValueError("pooling is 'history', which is trained with loss_type='softmax' only.")

    @property
    def query_dim(self) -> int:
        """The size of a query and of the item vectors in the store: d, or d + d_model with `"history"` pooling."""
        return self.embedding_dim + self.d_model * (self.pooling == "history")

    @property
    def custom_pipelines(self) -> dict[str, dict[str, str]]:
        """The pipeline in a shared repository, for `pipeline(..., trust_remote_code=True)`; it is not part of `config.json`.

        Empty where the task is registered, which `tokenrec_hf` does when it is imported: transformers asks for trust whenever a
        configuration names a pipeline, even one that is registered.
        """
        from transformers.pipelines import PIPELINE_REGISTRY

        if "generative-retrieval" in PIPELINE_REGISTRY.supported_tasks:
            return {}
        implementation = "pipeline_generative_retrieval.GenerativeRetrievalPipeline"
        return {"generative-retrieval": {"impl": implementation, "pt": "AutoModel"}}
