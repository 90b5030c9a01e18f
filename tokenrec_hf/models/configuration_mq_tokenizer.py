"""Configuration of the masked vector-quantised tokenizer (section II-C of TokenRec)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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
