"""The MQ-Tokenizer: a masked vector-quantised autoencoder (sections II-C2 to II-C5 of TokenRec, arXiv 2406.10450).

It turns a collaborative vector into K codes: mask (Eq. 2-3), K-way encoder (Eq. 4), nearest codeword in each of K codebooks
(Eq. 5-6), K-to-1 decoder (Eq. 9), and the losses that train it (Eq. 10-14). Users and items have a model each. It knows vectors
and codes, but no ids, text or language models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_tokenrec import Loader, MQTokenizerConfig

ENCODE_CHUNK = 8192
USAGE_DECAY = 0.95
# A codeword is dead if its running share of assignments is below this fraction of an equal share.
DEAD_BELOW = 0.03


@dataclass
class MQTokenizerOutput(ModelOutput):
    """Output of [`MQTokenizerModel`].

    Args:
        loss: Eq. 13 (items) or 14 (users), scalar: reconstruction + codebook + beta * commitment.
        codes: w, index of the nearest codeword in each codebook, LongTensor `[B, K]`.
        reconstruction: r, in the scale of the input vectors, `[B, d]`.
        reconstruction_loss, codebook_loss, commitment_loss: the three terms (Eq. 10, 11, 12), scalars.
    """

    loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


class MLP(nn.Sequential):
    """Linear layers of the given sizes with ReLU between them."""

    def __init__(self, *sizes: int):
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])


class MQTokenizerModel(Loader, PreTrainedModel):
    """Masked vector-quantised tokenizer of collaborative vectors.

    The mean and the scale of the training vectors are part of the model. `training.initialization.prepare_mq_tokenizer` sets
    them and starts the codebooks.

    Args:
        config: a [`MQTokenizerConfig`].
    """

    config_class = MQTokenizerConfig
    base_model_prefix = "mq_tokenizer"
    main_input_name = "vectors"
    accepts_loss_kwargs = False
    mean: torch.Tensor
    scale: torch.Tensor
    usage: torch.Tensor

    def __init__(self, config: MQTokenizerConfig):
        super().__init__(config)
        d, hidden, d_c = config.embedding_dim, config.hidden_dim, config.codebook_dim
        encoders = 0 if config.residual else config.num_codebooks
        self.encoders = nn.ModuleList(MLP(d, hidden, hidden, hidden, d_c) for _ in range(encoders))
        self.codebooks = nn.Parameter(torch.empty(config.num_codebooks, config.codebook_size, d_c))
        self.decoder: nn.Module = nn.Identity() if config.residual else MLP(d_c, hidden, hidden, d)
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("usage", torch.ones(config.num_codebooks, config.codebook_size))
        self.post_init()

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes of collaborative vectors (Eq. 4-6, without a mask).

        Args:
            vectors: `[n, d]`, raw (not normalised).

        Returns:
            LongTensor `[n, K]` of values in `[0, L)`.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """
        parts = self.checked(vectors).split(ENCODE_CHUNK)
        # Codes identify: they must not depend on the precision that the caller computes in.
        with torch.autocast(self.mean.device.type, enabled=False):
            return torch.cat([self.quantise(self.standardise(part))[1] for part in parts])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors reconstructed from codes (Eq. 9): LongTensor `[n, K]` to `[n, d]`.

        Raises:
            ValueError: wrong shape, no integers, or a code outside `[0, L)`.
        """
        count, size = self.config.num_codebooks, self.config.codebook_size
        if codes.dim() != 2 or codes.shape[1] != count or codes.is_floating_point():
            found = f"shape {tuple(codes.shape)} and type {codes.dtype}"
            raise ValueError(f"codes have {found} but the MQ-Tokenizer expects integers [n, {count}].")
        if len(codes) and (codes.min() < 0 or codes.max() >= size):
            raise ValueError(f"codes must be in [0, {size}) but range from {int(codes.min())} to {int(codes.max())}.")
        with torch.autocast(self.mean.device.type, enabled=False):
            return self.mean + self.scale * self.decoder(self._combined(self.codewords(codes)))

    def summands(self) -> torch.Tensor:
        """The contribution of each codeword to a decoded vector, `[K, L, d]`: `decode` returns the sum over the codes.

        Raises:
            ValueError: the codebooks are not residual, so a decoder lies between codewords and vectors.
        """
        if not self.config.residual:
            raise ValueError("only residual codebooks add up to a vector; train the MQ-Tokenizer with residual=True.")
        return self.scale * self.codebooks.detach() + self.mean / self.config.num_codebooks

    @property
    def space_id(self) -> str:
        """Fingerprint of all that determines codes: encoders, codebooks and input standardisation (16 hex digits)."""
        digest = hashlib.sha256(f"{self.config.num_codebooks},{self.config.codebook_size}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("decoder", "usage")):
                digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def statistics(self, vectors: torch.Tensor) -> dict[str, float]:
        """Measures how well the codes describe `vectors` `[n, d]`.

        Returns:
            `usage`: share of the K * L codewords that are used. `perplexity`: exp of the entropy of the codewords, mean over
            codebooks (at most L). `unique`: share of rows with a code tuple of their own. `collision_rate`: 1 minus the number of
            distinct tuples over the number of rows. `reconstruction_error`: sum ||x - r||^2 over sum ||x - mean(x)||^2, the
            share of variance that is lost.

        Raises:
            ValueError: as `encode`, or there are no vectors.
        """
        vectors = self._some(vectors)
        codes = self.encode(vectors)
        counts = self._counts(codes).float()
        share = counts / counts.sum(dim=1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=1)
        _, occurrences = codes.unique(dim=0, return_counts=True)
        variance = (vectors - vectors.mean(dim=0)).square().sum().clamp(min=1e-12)
        return {
            "usage": float((counts > 0).float().mean()),
            "perplexity": float(entropy.exp().mean()),
            "unique": float((occurrences == 1).sum() / len(codes)),
            "collision_rate": 1.0 - len(occurrences) / len(codes),
            "reconstruction_error": float(self._squared_error(vectors) / variance),
        }

    @torch.no_grad()
    def reconstruction_error(self, vectors: torch.Tensor) -> float:
        """sum ||x - r||^2 of any `vectors` `[n, d]`, over n times the variance of the training vectors.

        For the training vectors this is the `reconstruction_error` of `statistics`. A larger value for others shows that the
        codes describe them worse.

        Raises:
            ValueError: as `encode`, or there are no vectors.
        """
        vectors = self._some(vectors)
        return float(self._squared_error(vectors) / (vectors.numel() * self.scale.square()))

    def forward(self, vectors: torch.Tensor, labels: torch.Tensor | None = None) -> MQTokenizerOutput:
        """Reconstructs `vectors` `[B, d]`; in training from a masked copy (Eq. 2-3), with the unmasked input as target.

        `labels` is ignored. It exists because `Trainer` evaluates a loss only with labels.
        """
        x = self.standardise(vectors)
        outputs, codes = self.quantise(self.mask(x) if self.training else x)  # a: [B, K, d_c], w: [B, K]
        if self.training and self.config.revive_dead and torch.is_grad_enabled() and self.codebooks.requires_grad:
            self._revive_dead(outputs.detach(), codes)
        words = self.codewords(codes)  # c: [B, K, d_c]
        # Straight-through estimator: the decoder reads the codewords, its gradient goes to the encoder outputs.
        continuous = outputs[:, 0] if self.config.residual else outputs.mean(dim=1)
        reconstruction = self.decoder(continuous + (self._combined(words) - continuous).detach())  # r: [B, d]
        reconstruction_loss = (x - reconstruction).square().sum(dim=-1).mean()  # Eq. 10
        codebook_loss = (outputs.detach() - words).square().sum(dim=(1, 2)).mean()  # Eq. 11
        commitment_loss = (outputs - words.detach()).square().sum(dim=(1, 2)).mean()  # Eq. 12
        return MQTokenizerOutput(
            loss=reconstruction_loss + codebook_loss + self.config.commitment_weight * commitment_loss,
            codes=codes,
            reconstruction=self.mean + self.scale * reconstruction,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
        )

    def standardise(self, vectors: torch.Tensor) -> torch.Tensor:
        """The input x of the encoders, with the training vectors' mean removed and in their scale: `[n, d]` to `[n, d]`."""
        return (vectors - self.mean) / self.scale

    def checked(self, vectors: torch.Tensor) -> torch.Tensor:
        """Raw vectors in the type and on the device of the model.

        Raises:
            ValueError: they are not `[n, d]`, or a value is not finite.
        """
        if isinstance(vectors, np.ndarray):
            vectors = np.ascontiguousarray(vectors)  # PyTorch takes no reversed arrays
        vectors = torch.as_tensor(vectors, dtype=self.mean.dtype, device=self.mean.device)
        d = self.config.embedding_dim
        if vectors.dim() != 2 or vectors.shape[1] != d:
            raise ValueError(
                f"vectors have shape {list(vectors.shape)} but the MQ-Tokenizer expects [n, {d}]; pass a matrix with a row of "
                f"{d} for each vector."
            )
        bad = (~vectors.isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(
                f"the vector in row {int(bad[0])} has a value that is not finite; remove it or train again."
            )
        return vectors

    def _some(self, vectors: torch.Tensor) -> torch.Tensor:
        """As `checked`, of at least one vector."""
        vectors = self.checked(vectors)
        if not len(vectors):
            raise ValueError("there are no vectors to measure the codes of; pass at least one.")
        return vectors

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of `x` `[B, d]` with each element zeroed with probability rho, drawn anew at every call (Eq. 2-3)."""
        return x * (torch.rand_like(x) >= self.config.mask_ratio)

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder outputs a, `[B, K, d_c]`, and codes w, LongTensor `[B, K]`, of standardised vectors `[B, d]`.

        a^k = MLP^k(x) (Eq. 4), or, with `residual`, x minus the codewords of the books before k; w^k = argmin_l ||a^k - c^k_l||^2
        (Eq. 5-6). ||a||^2 does not change the argmin, so distances are a matrix product.
        """
        if not self.config.residual:
            outputs = torch.stack([encoder(x) for encoder in self.encoders], dim=1)
            return outputs, nearest(outputs.detach().transpose(0, 1), self.codebooks.detach()).T
        residuals: list[torch.Tensor] = []
        codes: list[torch.Tensor] = []
        books = self.codebooks.detach()
        for codebook, squares in zip(books, squared_lengths(books)):
            residuals.append(x)
            codes.append(first_least(torch.addmm(squares, x.detach(), codebook.T, alpha=-2)))
            x = x - nn.functional.embedding(codes[-1], codebook)
        return torch.stack(residuals, dim=1), torch.stack(codes, dim=1)

    def codewords(self, codes: torch.Tensor) -> torch.Tensor:
        """c^k_{w^k}: LongTensor `[B, K]` to `[B, K, d_c]`."""
        # F.embedding, because the gradient of indexing depends on the order in which threads add.
        return nn.functional.embedding(self._flat(codes), self.codebooks.flatten(0, 1))

    def _flat(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows of codes `[n, K]` in one table of K * L codewords."""
        return codes + torch.arange(self.config.num_codebooks, device=codes.device) * self.config.codebook_size

    def _counts(self, codes: torch.Tensor) -> torch.Tensor:
        """How many of the codes `[n, K]` name each codeword, `[K, L]`."""
        return torch.bincount(self._flat(codes).flatten(), minlength=self.usage.numel()).view(self.usage.shape)

    def _combined(self, words: torch.Tensor) -> torch.Tensor:
        """The decoder's input, `[B, d_c]`: the mean of the codewords `[B, K, d_c]` (Eq. 9), or with `residual` their sum."""
        return words.sum(dim=1) if self.config.residual else words.mean(dim=1)

    def _squared_error(self, vectors: torch.Tensor) -> torch.Tensor:
        """sum ||x - r||^2 over `vectors` `[n, d]`, a scalar."""
        errors = [(x - self.decode(self.encode(x))).square().sum() for x in vectors.split(ENCODE_CHUNK)]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def _revive_dead(self, outputs: torch.Tensor, codes: torch.Tensor) -> None:
        assigned, size = self._counts(codes), self.config.codebook_size
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes > 1:
            dist.all_reduce(assigned)
        # The mean share of a codeword is 1, whatever the batch and L.
        self.usage.lerp_((assigned * (size / (len(codes) * processes))).to(self.usage), 1 - USAGE_DECAY)
        # A codeword that this batch uses stays, so that `codes` still name the nearest codewords.
        book, word = ((self.usage < DEAD_BELOW) & (assigned == 0)).nonzero(as_tuple=True)
        if len(book):
            donor = torch.randint(len(outputs), (len(book),), device=outputs.device)
            donated = outputs[donor, book].to(self.codebooks)
            if processes > 1:
                # Each process has its own batch, but all must keep the same codebooks.
                dist.broadcast(donated, src=0)
            self.codebooks[book, word] = donated
            self.usage[book, word] = 1.0

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        elif isinstance(module, MQTokenizerModel):
            init.normal_(module.codebooks)


def nearest(points: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Indices of the nearest codewords: points `[K, B, d_c]`, codebooks `[K, L, d_c]`, LongTensor `[K, B]`."""
    squares = squared_lengths(codebooks)[:, None, :]
    return first_least(torch.baddbmm(squares, points, codebooks.transpose(1, 2), alpha=-2))


def squared_lengths(vectors: torch.Tensor) -> torch.Tensor:
    """||c||^2 of each vector, `[..., d]` to `[...]`, without a second tensor of the vectors' size, whose making takes longer."""
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def first_least(values: torch.Tensor) -> torch.Tensor:
    """The place of the least value in each row `[..., n]`, of equal ones the first; on a CPU, NumPy is many times as fast."""
    return torch.from_numpy(values.detach().float().numpy().argmin(-1)) if values.is_cpu else values.argmin(dim=-1)


MQTokenizerConfig.register_for_auto_class()
MQTokenizerModel.register_for_auto_class("AutoModel")
