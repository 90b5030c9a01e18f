"""Configuration of T5 for generative retrieval (sections II-D2, II-D3 and II-E1 of TokenRec)."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import T5Config


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
