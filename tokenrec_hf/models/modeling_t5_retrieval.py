"""T5 for generative retrieval (sections II-D2, II-D3 and II-E1 of TokenRec, arXiv 2406.10450).

A prompt of words, user tokens and item tokens goes through T5 once (Eq. 17), and a three-layer projection turns the result into
a query vector (Eq. 18). The recommendation is the items nearest by cosine (Eq. 19), without beam search. The item vectors
belong to the embedding store and are bound to the model for training; they are not in its checkpoint. The model knows no ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5EncoderModel, T5Model
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_tokenrec import T5GenerativeRetrievalConfig

# Prompts of up to this number of tokens are encoded together.
SHORT_PROMPT = 32


@dataclass
class GenerativeRetrievalOutput(ModelOutput):
    """Output of [`T5ForGenerativeRetrieval`].

    Args:
        loss: scalar, when `labels` are given.
        query_embeds: z, not normalised, `[B, d]`.
    """

    loss: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None


class ProjectionLinear(nn.Linear):
    """A linear layer of the projection; a class of its own, because T5's `_init_weights` would give `nn.Linear` the std 1."""


class T5ForGenerativeRetrieval(T5PreTrainedModel):
    """A T5 backbone, a projection and a ranking loss on item vectors.

    Call [`~T5ForGenerativeRetrieval.bind_items`] before training or computing a loss.

    Args:
        config: a [`T5GenerativeRetrievalConfig`].

    Raises:
        ValueError: `user_shortcut` without `user_code_tokens`.
    """

    config_class = T5GenerativeRetrievalConfig
    config: T5GenerativeRetrievalConfig
    base_model_prefix = "transformer"
    item_embeddings: torch.Tensor
    user_codewords: torch.Tensor
    # The revision given to `from_pretrained`, from which the pipeline loads the store too.
    loaded_revision: str | None = None
    # Trainer passes `forward` the number of positives in all batches of a step.
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = [
        r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ]

    def __init__(self, config: T5GenerativeRetrievalConfig):
        super().__init__(config)
        if config.pooling == "decoder":
            self.transformer: nn.Module = T5Model(config)
        else:
            self.transformer = T5EncoderModel(config)
            self._keys_to_ignore_on_load_unexpected = [r"lm_head\.weight", r"decoder\."]
        width = cast(int, config.projection_dim)
        layers: list[nn.Module] = []
        for size in (config.d_model, width):
            layers += [ProjectionLinear(size, width), nn.ReLU(), nn.Dropout(config.dropout_rate)]
        self.projection = nn.Sequential(*layers, ProjectionLinear(width, config.embedding_dim))
        self.register_buffer("item_embeddings", torch.zeros(0, config.embedding_dim), persistent=False)
        if config.user_shortcut:
            if config.user_code_tokens is None:
                raise ValueError("user_shortcut needs user_code_tokens, the range [first, end) of the code tokens.")
            first, end = config.user_code_tokens
            self.register_buffer("user_codewords", torch.zeros(end - first, config.embedding_dim))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads the model as [`~transformers.PreTrainedModel.from_pretrained`] does and records the revision."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.loaded_revision = kwargs.get("revision")
        return loaded

    def bind_items(self, vectors: torch.Tensor) -> None:
        """Sets the item vectors q `[num_items, d]` that the loss compares queries with; they are normalised and never saved.

        Raises:
            ValueError: the vectors do not have `embedding_dim` dimensions, or one is not finite.
        """
        d = self.config.embedding_dim
        if vectors.dim() != 2 or vectors.shape[1] != d:
            raise ValueError(
                f"item vectors have shape {list(vectors.shape)} but the model expects [n, {d}]; "
                f"use the store it was trained with, or train it with embedding_dim={vectors.shape[-1]}."
            )
        if not vectors.isfinite().all():
            raise ValueError("an item vector has a value that is not finite; check the embedding store.")
        self.item_embeddings = F.normalize(vectors.detach().to(self.device, torch.float32), dim=-1)

    def encode_queries(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """z = Proj(LLM4Rec(prompt)) (Eq. 17-18), `[B, d]`; with `user_shortcut`, plus the user's codewords.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at padding. Default: derived from the padding id.
            inputs_embeds: `[B, T, d_model]` in place of `input_ids`.

        Raises:
            ValueError: `inputs_embeds` with `user_shortcut`, which reads token ids.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids.ne(cast(int, self.config.pad_token_id)).long()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.config.pooling == "mean":
            states = self.transformer(**inputs).last_hidden_state  # [B, T, d_model]
            mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask.to(states)
            hidden = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            batch = len(cast(torch.Tensor, inputs_embeds if input_ids is None else input_ids))
            # A configuration made from scratch may lack the field; T5 starts with the padding token.
            first = getattr(self.config, "decoder_start_token_id", self.config.pad_token_id) or 0
            start = torch.full((batch, 1), first, dtype=torch.long, device=self.device)
            hidden = self.transformer(**inputs, decoder_input_ids=start, use_cache=False).last_hidden_state[:, 0]
        queries = self.projection(hidden)
        if not self.config.user_shortcut:
            return queries
        if input_ids is None:
            raise ValueError("a model with user_shortcut reads token ids; give input_ids, not inputs_embeds.")
        first, end = cast(list, self.config.user_code_tokens)
        prompts, places = ((input_ids >= first) & (input_ids < end)).nonzero(as_tuple=True)  # [n] each
        words = self.user_codewords[input_ids[prompts, places] - first]  # [n, d]
        return queries + words.new_zeros(len(input_ids), words.shape[1]).index_add(0, prompts, words).to(hidden)

    @torch.inference_mode()
    def encode_by_length(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`encode_queries` without gradient or dropout, for prompts on any device; those of similar length go together."""
        if attention_mask is None:
            attention_mask = input_ids.ne(cast(int, self.config.pad_token_id)).long()
        lengths = attention_mask.shape[1] - attention_mask.flip(1).argmax(dim=1)  # without the padding at the end, [B]
        # The longest prompt of a group is at most twice as long as its shortest.
        groups = lengths.clamp(min=SHORT_PROMPT).float().log2().ceil()
        queries = torch.empty(len(input_ids), self.config.embedding_dim, dtype=self.dtype, device=self.device)
        was_training = self.training
        self.eval()
        for group in groups.unique():
            rows = (groups == group).nonzero().flatten()
            width = int(lengths[rows].max())
            ids, mask = (part[rows, :width].to(self.device) for part in (input_ids, attention_mask))
            queries[rows.to(self.device)] = self.encode_queries(ids, mask).to(queries)
        self.train(was_training)
        return queries

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        negative_ids: torch.Tensor | None = None,
        seen_items: torch.Tensor | None = None,
        user_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> GenerativeRetrievalOutput:
        """Computes queries and, given `labels`, the loss: the mean over positives.

        Args:
            input_ids, attention_mask, inputs_embeds: see [`~T5ForGenerativeRetrieval.encode_queries`].
            labels: rows of the items to retrieve, `[B]` or `[B, P]`; -100 is padding.
            negative_ids: rows of items without an interaction. For `cosine_ranking` one per positive, `[B, P]` or `[B]` (surplus
                columns are ignored); for `softmax` the sampled competitors, `[B, m]`, without which all bound items compete.
            seen_items: rows of the items in each prompt, `[B, S]`; -100 is padding. They do not compete in the full softmax,
                because they are never recommended.
            user_embeds: collaborative vector p of each prompt's user, `[B, d]`, for `alignment_weight`.
            num_items_in_batch: the number of positives to divide by; by default that of this batch. `Trainer` passes that of all
                batches of a step, so that gradient accumulation and several processes do not change the loss.

        Raises:
            ValueError: labels without bound items, or `cosine_ranking` without negatives.
        """
        queries = self.encode_queries(input_ids, attention_mask, inputs_embeds)
        if labels is None:
            return GenerativeRetrievalOutput(query_embeds=queries)
        if not len(self.item_embeddings):
            raise ValueError("the loss needs item vectors: call model.bind_items(store.vectors('item')) first.")
        labels = labels.view(len(labels), -1)  # [B, P]
        unit = F.normalize(queries.float(), dim=-1)
        if self.config.loss_type == "cosine_ranking":
            terms = self._cosine_ranking_terms(unit, labels, negative_ids)  # [B, P]
        else:
            terms = self._softmax_terms(unit, labels, negative_ids, seen_items)  # [B, P]
        if self.config.alignment_weight:
            if user_embeds is None:
                raise ValueError(
                    "alignment_weight needs user_embeds; give the data collator user_vectors, or set it to 0."
                )
            aligned = (unit * F.normalize(user_embeds.to(unit), dim=-1)).sum(dim=-1, keepdim=True)  # [B, 1]
            terms = terms + self.config.alignment_weight * (1 - aligned)
        valid = labels >= 0
        count = valid.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return GenerativeRetrievalOutput(loss=(terms * valid).sum() / count, query_embeds=queries)

    def _cosine_ranking_terms(
        self, unit: torch.Tensor, labels: torch.Tensor, negative_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Eq. 20 for each positive: 1 - cos(z, q_j) plus max(0, cos(z, q_j') - gamma) of its negative, `[B, P]`."""
        if negative_ids is None:
            raise ValueError("the cosine_ranking loss needs negative_ids, one per label; the data collator draws them.")
        # In evaluation a prompt has one label but the number of negatives of a training prompt.
        negative_ids = negative_ids.view(len(labels), -1)[:, : labels.shape[1]].reshape(labels.shape)
        negative = self._cosines(unit, negative_ids)  # [B, P]
        return 1 - self._cosines(unit, labels.clamp(min=0)) + F.relu(negative - self.config.margin)

    def _softmax_terms(
        self,
        unit: torch.Tensor,
        labels: torch.Tensor,
        negative_ids: torch.Tensor | None,
        seen_items: torch.Tensor | None,
    ) -> torch.Tensor:
        """-log softmax of cos(z, q_j) / tau for each positive, `[B, P]`."""
        positive = self._cosines(unit, labels.clamp(min=0)) / self.config.temperature  # [B, P]
        if negative_ids is not None:
            competitors = self._cosines(unit, negative_ids) / self.config.temperature  # [B, m]
            # A positive competes with the sampled negatives and itself.
            return torch.logaddexp(positive, competitors.logsumexp(dim=-1, keepdim=True)) - positive
        scores = unit @ self.item_embeddings.to(unit).T / self.config.temperature  # [B, n]
        if seen_items is not None:
            # Padding goes to an extra column, which is cut off.
            width = scores.shape[1]
            banned = torch.zeros(len(scores), width + 1, dtype=torch.bool, device=scores.device)
            banned.scatter_(1, torch.where(seen_items >= 0, seen_items, width), True)
            scores = scores.masked_fill(banned[:, :width], float("-inf"))
        return scores.logsumexp(dim=-1, keepdim=True) - positive

    def _cosines(self, unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """cos(z, q_j) (Eq. 19) of unit queries `[B, d]` and item rows `[B, m]`: `[B, m]`."""
        # Casting the model, for example to bfloat16, casts the bound items too.
        return torch.einsum("bd,bmd->bm", unit, self.item_embeddings[rows].to(unit))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectionLinear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


T5GenerativeRetrievalConfig.register_for_auto_class()
T5ForGenerativeRetrieval.register_for_auto_class("AutoModel")
