"""T5 for generative retrieval (sections II-D2, II-D3 and II-E1 of TokenRec, arXiv 2406.10450).

A prompt of words, user tokens and item tokens goes through T5 once (Eq. 17), and a three-layer projection turns the result into
a query vector (Eq. 18). The recommendation is the items nearest by cosine (Eq. 19), without beam search. With `"history"` pooling,
T5 is a sequence model beside the collaborative vectors, see [`T5ForGenerativeRetrieval`]. The item vectors belong to the embedding
store and are bound to the model for training; they are not in its checkpoint. The model knows no ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Model
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_tokenrec import Loader, T5GenerativeRetrievalConfig
from .functional import linear_cross_entropy, sampled_cross_entropy, unit

# Prompts of up to this number of tokens are encoded together.
SHORT_PROMPT = 32
# Items whose learned part is computed at once.
ITEM_CHUNK = 65_536
# Positions of items in a batch, padding included, up to which another runtime answers; it gains little with more.
RUNTIME_POSITIONS = 512
# Wordings whose states are kept at most, and values of each weight that tell whether they still hold.
KNOWN_WORDINGS, SAMPLED = 64, 64


@dataclass
class GenerativeRetrievalOutput(ModelOutput):
    """Output of [`T5ForGenerativeRetrieval`].

    Args:
        loss: scalar, when `labels` are given.
        query_embeds: z, not normalised, `[B, d]`.
    """

    loss: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None


class Entities(NamedTuple):
    """The users or the items that prompts name, in their order.

    Args:
        tokens: code tokens, `[B, S, K]`; anything where there is no entity.
        present: whether there is one, boolean `[B, S]`.
        covered: whether a position of the prompt belongs to one, boolean `[B, T]`.
    """

    tokens: torch.Tensor
    present: torch.Tensor
    covered: torch.Tensor


class HistoryPrompts(NamedTuple):
    """What a query needs of prompts with `"history"` pooling.

    Args:
        wordings: tokens of the words of each different wording, int64 `[n, W]`; -1 is padding.
        which: the wording of each prompt, int64 `[B]`.
        tokens: code tokens of the items, int64 `[B, S, K]`; anything where there is no item.
        present: whether there is one, boolean `[B, S]`.
        users: unit vectors p of the users, `[B, d]`; 0 in a prompt that names none.
    """

    wordings: torch.Tensor
    which: torch.Tensor
    tokens: torch.Tensor
    present: torch.Tensor
    users: torch.Tensor


def find_entities(input_ids: torch.Tensor, mask: torch.Tensor, kind: dict[str, int]) -> Entities:
    """Finds the users or the items in prompts.

    Args:
        input_ids: `[B, T]`.
        mask: whether a position is no padding, boolean `[B, T]`.
        kind: an entry of the configuration's `entity_tokens`.
    """
    first, count, last = kind["first"], kind["num_codebooks"], input_ids.shape[1] - 1
    # Tokens of the first codebook, [B, T].
    starts = (input_ids >= first) & (input_ids < first + kind["codebook_size"]) & mask
    numbers = starts.sum(dim=1, keepdim=True)  # [B, 1]
    slots = torch.arange(max(int(numbers.max()), 1), device=input_ids.device)
    places = (~starts).long().argsort(dim=1, stable=True)[:, : len(slots)]  # [B, S]
    present = slots < numbers
    span = places[..., None] + torch.arange(-kind["prefix"], count, device=input_ids.device)  # [B, S, prefix + K]
    span = span.clamp(0, last)
    tokens = input_ids.gather(1, span[..., -count:].flatten(1)).view(*places.shape, count)
    covered = torch.zeros(len(input_ids), last + 2, dtype=torch.bool, device=input_ids.device)
    covered.scatter_(1, torch.where(present[..., None], span, last + 1).flatten(1), True)
    return Entities(tokens, present, covered[:, : last + 1])


class _CodeSums(torch.autograd.Function):
    """Sums of the embeddings `[vocab_size, d]` of each item's code tokens `[n, K]`: `[n, d]`.

    The gradient of a token is the sum over its items, which `items` lists from `offsets[token]` on. PyTorch would sort the tokens
    at every step.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, tokens: torch.Tensor, items: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(items, offsets)
        return F.embedding_bag(tokens, weight, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        items, offsets = ctx.saved_tensors
        return F.embedding_bag(items, grad.contiguous(), offsets, mode="sum"), None, None, None


class ProjectionLinear(nn.Linear):
    """A linear layer of the projection; a class of its own, because T5's `_init_weights` would give `nn.Linear` the std 1."""


class T5ForGenerativeRetrieval(Loader, T5PreTrainedModel):
    """A T5 backbone, a projection and a ranking loss on item vectors.

    With `"history"` pooling there is no projection. The encoder reads the words of a prompt. The decoder reads its items, one
    position per item, whose embedding is the sum of the embeddings of its code tokens; it is trained to predict the next item at
    every position, with h . e_j as the score of item j and e_j the same sum, of length 1. A user's tokens do not go through T5:
    they add up to the collaborative vector p. The score of an item is cos(p, q_j) / temperature + history_weight * h . e_j, one
    product of the query [p / temperature ; history_weight * h] with the item vector [q_j ; e_j]. T5 is trained apart from p, because
    p has been fit to the same interactions. The second part of a query is 0 if a prompt names a user and no item.

    Call [`~T5ForGenerativeRetrieval.bind_items`] before training or computing a loss.

    Args:
        config: a [`T5GenerativeRetrievalConfig`].

    Raises:
        ValueError: `"history"` pooling without `entity_tokens`.
    """

    config_class = T5GenerativeRetrievalConfig
    config: T5GenerativeRetrievalConfig
    base_model_prefix = "transformer"
    item_embeddings: torch.Tensor
    item_tokens: torch.Tensor | None
    # The bound items of each token, and where they begin, see `_CodeSums`.
    items_of_tokens: torch.Tensor | None
    token_offsets: torch.Tensor | None
    user_codewords: torch.Tensor
    # Computes `history_query` of small batches elsewhere, see [`~tokenrec_hf.use_onnx`].
    runtime: Callable[[HistoryPrompts], torch.Tensor] | None = None
    # Trainer passes `forward` the number of positives in all batches of a step.
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = [
        r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ]

    def __init__(self, config: T5GenerativeRetrievalConfig):
        super().__init__(config)
        self.transformer = T5Model(config)
        if config.pooling == "history":
            if config.entity_tokens is None:
                raise ValueError(
                    "history pooling needs entity_tokens; build_retrieval_model sets them from the tokenizer."
                )
            user = config.entity_tokens["user"]
            count = user["num_codebooks"] * user["codebook_size"]
            self.register_buffer("user_codewords", torch.zeros(count, config.embedding_dim))
        else:
            width = cast(int, config.projection_dim)
            layers: list[nn.Module] = []
            for size in (config.d_model, width):
                layers += [ProjectionLinear(size, width), nn.ReLU(), nn.Dropout(config.dropout_rate)]
            self.projection = nn.Sequential(*layers, ProjectionLinear(width, config.embedding_dim))
        self.register_buffer("item_embeddings", torch.zeros(0, config.embedding_dim), persistent=False)
        for name in ("item_tokens", "items_of_tokens", "token_offsets"):
            self.register_buffer(name, None, persistent=False)
        self._kept: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.post_init()

    def bind_items(
        self, vectors: torch.Tensor | np.ndarray, token_ids: torch.Tensor | np.ndarray | None = None
    ) -> None:
        """Sets the items that the loss compares queries with; they are never saved.

        Args:
            vectors: q, `[num_items, d]`, which are normalised; or the vectors of the store, which begin with q.
            token_ids: the items' code tokens, int64 `[num_items, K]`, see [`~TokenRecTokenizer.item_tokens`]; for `"history"`
                pooling.

        Raises:
            ValueError: the vectors do not have `embedding_dim` dimensions, or one is not finite, or there are other tokens or none.
        """
        vectors, d = torch.as_tensor(vectors), self.config.embedding_dim
        if vectors.dim() != 2 or vectors.shape[1] not in (d, self.config.query_dim):
            raise ValueError(
                f"item vectors have shape {list(vectors.shape)} but the model expects [n, {d}]; "
                f"use the store it was trained with, or train it with embedding_dim={vectors.shape[-1]}."
            )
        if not vectors.isfinite().all():
            raise ValueError("an item vector has a value that is not finite; check the embedding store.")
        if self.config.pooling == "history":
            codes = cast(dict, self.config.entity_tokens)["item"]
            if token_ids is None or tuple(token_ids.shape) != (len(vectors), codes["num_codebooks"]):
                raise ValueError(
                    f"history pooling needs the {codes['num_codebooks']} code tokens of each item; give bind_items the token_ids too."
                )
        self.item_embeddings = F.normalize(vectors[:, :d].detach().to(self.device, torch.float32), dim=-1)
        self.item_tokens = self.items_of_tokens = self.token_offsets = None
        if token_ids is not None:
            self.item_tokens = torch.as_tensor(token_ids).to(self.device)
            self._sort_tokens()

    def _sort_tokens(self) -> None:
        """Sorts the tokens of the bound items, for `_CodeSums`."""
        codes, vocabulary = cast(torch.Tensor, self.item_tokens), self._embeddings.num_embeddings
        tokens, order = codes.flatten().sort(stable=True)
        self.items_of_tokens = order // codes.shape[1]
        self.token_offsets = torch.searchsorted(tokens, torch.arange(vocabulary, device=codes.device))

    @torch.no_grad()
    def item_vectors(self, vectors: torch.Tensor | np.ndarray, token_ids: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The vectors that queries are compared with by cosine, for the store.

        Args:
            vectors: the collaborative vectors q, float32 `[n, d]`, or vectors of the store, which begin with them.
            token_ids: the items' code tokens, int64 `[n, K]`.

        Returns:
            `[n, query_dim]`: q, and with `"history"` pooling [q ; |q| e]. The first d dimensions are q to the bit.
        """
        vectors = torch.as_tensor(vectors)
        if self.config.pooling != "history":
            return vectors
        vectors, token_ids = vectors[:, : self.config.embedding_dim], torch.as_tensor(token_ids)
        parts = [self._learned(tokens.to(self.device)).cpu() for tokens in token_ids.split(ITEM_CHUNK)]
        return torch.cat([vectors, vectors.norm(dim=1, keepdim=True) * torch.cat(parts)], dim=1)

    def user_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Collaborative vectors of users `[n, d]` in the space of the store, `[n, query_dim]`: followed by zeros."""
        return F.pad(vectors, (0, self.config.query_dim - vectors.shape[1]))

    def bound_vectors(self) -> torch.Tensor:
        """The `item_vectors` of the bound items."""
        if self.item_tokens is None:
            return self.item_embeddings
        return self.item_vectors(self.item_embeddings.float().cpu(), self.item_tokens)

    @property
    def _embeddings(self) -> nn.Embedding:
        """The token embeddings under the name that an adapter wraps."""
        return cast(nn.Embedding, self.get_encoder().embed_tokens)

    def _learned(self, tokens: torch.Tensor) -> torch.Tensor:
        """e of items from their code tokens `[n, K]`, float32 `[n, d_model]` of length 1."""
        embed = self._embeddings
        if type(embed) is not nn.Embedding:  # An adapter.
            summed = embed(tokens).sum(dim=1)
        elif tokens is self.item_tokens:
            if len(cast(torch.Tensor, self.token_offsets)) != len(embed.weight):
                self._sort_tokens()  # The vocabulary has been resized.
            summed = _CodeSums.apply(embed.weight, tokens, self.items_of_tokens, self.token_offsets)
        else:
            # A bag needs a ninth of the time of a sum, and no memory for its summands.
            summed = F.embedding_bag(tokens, embed.weight, mode="sum")
        return unit(summed.float())

    def encode_queries(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """z = Proj(LLM4Rec(prompt)) (Eq. 17-18), `[B, d]`; with `"history"` pooling, `[B, d + d_model]`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at padding. Default: derived from the padding id.
            inputs_embeds: `[B, T, d_model]` in place of `input_ids`.

        Raises:
            ValueError: `inputs_embeds` with `"history"` pooling, which reads token ids.
        """
        if self.config.pooling == "history":
            prompts = self.read_prompts(input_ids, attention_mask)
            if not self.config.history_weight or not self._needs_t5(prompts).any():
                return F.pad(prompts.users / self.config.temperature, (0, self.config.d_model))
            positions = prompts.present.numel()
            if self.training or torch.is_grad_enabled():
                return self.history_query(prompts)
            if self.runtime is None or positions > RUNTIME_POSITIONS:
                return self._history_query(self._read_history(prompts, self._known_states(prompts.wordings)), prompts)
            return self.runtime(prompts)
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids.ne(cast(int, self.config.pad_token_id)).long()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        start = self._start(len(cast(torch.Tensor, inputs_embeds if input_ids is None else input_ids)))
        states = self.transformer(**inputs, decoder_input_ids=start, use_cache=False).last_hidden_state
        return self.projection(states[:, 0])

    def _start(self, batch: int) -> torch.Tensor:
        """The token that decoders start with, `[B, 1]`."""
        # A configuration made from scratch may lack the field; T5 starts with the padding token.
        first = getattr(self.config, "decoder_start_token_id", self.config.pad_token_id) or 0
        return torch.full((batch, 1), first, dtype=torch.long, device=self.device)

    def read_prompts(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> HistoryPrompts:
        """Takes prompts apart; arguments and errors of [`~T5ForGenerativeRetrieval.encode_queries`]."""
        if input_ids is None:
            raise ValueError("history pooling reads token ids; give input_ids, not inputs_embeds.")
        kinds = cast(dict, self.config.entity_tokens)
        mask = (input_ids.ne(cast(int, self.config.pad_token_id)) if attention_mask is None else attention_mask).bool()
        users, items = (find_entities(input_ids, mask, kinds[kind]) for kind in ("user", "item"))
        rows = (users.tokens - kinds["user"]["first"]).clamp(0, len(self.user_codewords) - 1)
        named = self.user_codewords[rows].sum(dim=2) * users.present[..., None]  # [B, S_u, d]
        words = mask & ~users.covered & ~items.covered
        width = max(int(words.sum(dim=1).max()), 1)
        order = (~words).long().argsort(dim=1, stable=True)[:, :width]  # places of the words, [B, W]
        texts = torch.where(words, input_ids, -1).gather(1, order)  # [B, W]
        # Prompts of the same wording share one row of the encoder's states, [n, W, d_model].
        wordings, which = texts.unique(dim=0, return_inverse=True)
        return HistoryPrompts(wordings, which, items.tokens, items.present, F.normalize(named.sum(dim=1), dim=-1))

    def history_query(self, prompts: HistoryPrompts) -> torch.Tensor:
        """The query of prompts with `"history"` pooling, `[B, query_dim]`, which [`~tokenrec_hf.export_onnx`] writes as a graph."""
        return self._history_query(self._read_history(prompts), prompts)

    def _known_states(self, wordings: torch.Tensor) -> torch.Tensor | None:
        """The encoder's states of a single wording, `[1, W, d_model]`, which are the same until a weight changes.

        Without them every request would pay for a pass of the encoder. Most changes give a tensor a new version; those of fused
        optimisers and through `.data` do not, and a sample of every weight tells them.
        """
        encoder = self.get_encoder()
        weights = list(encoder.parameters())
        mixed = torch.is_autocast_enabled(self.device.type)
        # Adapters can be switched without a change of a weight.
        adapted = any(hasattr(type(module), "active_adapter") for module in encoder.modules())
        if len(wordings) > 1 or mixed or adapted or {weight.device for weight in weights} != {wordings.device}:
            return None
        words = self._embeddings(wordings.clamp(min=0))
        versions = [0 if weight.is_inference() else weight._version for weight in weights]
        samples = (weight.detach().flatten()[:: weight.numel() // SAMPLED + 1] for weight in weights)
        mark = torch.cat([torch.tensor(versions, dtype=torch.float64, device=words.device), words.flatten(), *samples])
        key = tuple(wordings[0].tolist())
        former, states = self._kept.get(key, (None, None))
        if former is None or not torch.equal(former, mark):
            if len(self._kept) >= KNOWN_WORDINGS:
                self._kept = {}
            states = self._read_wordings(wordings, words)
            self._kept[key] = (mark, states)
        return states

    def _read_wordings(self, wordings: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The encoder's states of wordings `[n, W]` from the embeddings of their tokens, `[n, W, d_model]` both."""
        return self.get_encoder()(inputs_embeds=words, attention_mask=wordings.ge(0).long()).last_hidden_state

    def _read_history(self, prompts: HistoryPrompts, states: torch.Tensor | None = None) -> torch.Tensor:
        """The decoder's outputs h, `[B, 1 + S, d_model]`. Output s follows s items. `states` are the encoder's, if known."""
        # One look-up, because each one has a gradient of the size of the vocabulary.
        ids = torch.cat([self._start(1), prompts.wordings.clamp(min=0).view(1, -1), prompts.tokens.view(1, -1)], dim=1)
        start, words, codes = self._embeddings(ids[0]).split([1, prompts.wordings.numel(), prompts.tokens.numel()])
        history = codes.view(*prompts.tokens.shape, -1).sum(dim=2)  # one position per item, [B, S, d_model]
        is_word = prompts.wordings.ge(0).long()
        if states is None:
            states = self._read_wordings(prompts.wordings, words.view(*prompts.wordings.shape, -1))  # [n, W, d_model]
        return self.transformer(
            encoder_outputs=(states[prompts.which],),
            attention_mask=is_word[prompts.which],
            decoder_inputs_embeds=torch.cat([start.expand(len(history), 1, -1), history], dim=1),
            decoder_attention_mask=F.pad(prompts.present.long(), (1, 0), value=1),
            use_cache=False,
        ).last_hidden_state

    @staticmethod
    def _needs_t5(prompts: HistoryPrompts) -> torch.Tensor:
        """Whether a prompt has a history, or no user either, boolean `[B]`."""
        return prompts.present.any(dim=1) | (prompts.users == 0).all(dim=1)

    @staticmethod
    def _last(hidden: torch.Tensor, prompts: HistoryPrompts) -> torch.Tensor:
        """The outputs after the last items, `[B, d_model]`."""
        return hidden[torch.arange(len(hidden), device=hidden.device), prompts.present.sum(dim=1)]

    def _history_query(self, hidden: torch.Tensor, prompts: HistoryPrompts) -> torch.Tensor:
        """The query [p / temperature ; history_weight * h] `[B, query_dim]`, h being the output after the last item."""
        last = self._last(hidden, prompts)
        weight = self.config.history_weight * self._needs_t5(prompts).to(last)[:, None]
        return torch.cat([prompts.users.to(last) / self.config.temperature, last * weight], dim=1)

    @torch.inference_mode()
    def encode_by_length(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`encode_queries` without gradient or dropout, for prompts on any device; those of similar length go together."""
        if attention_mask is None:
            attention_mask = input_ids.ne(cast(int, self.config.pad_token_id)).long()
        if len(input_ids) == 1 and not self.training:
            return self.encode_queries(input_ids.to(self.device), attention_mask.to(self.device))
        lengths = attention_mask.shape[1] - attention_mask.flip(1).argmax(dim=1)  # without the padding at the end, [B]
        # The longest prompt of a group is at most twice as long as its shortest.
        groups = lengths.clamp(min=SHORT_PROMPT).float().log2().ceil()
        queries = torch.empty(len(input_ids), self.config.query_dim, dtype=self.dtype, device=self.device)
        if was_training := self.training:
            self.eval()
        for group in groups.unique():
            rows = (groups == group).nonzero().flatten()
            width = int(lengths[rows].max())
            ids, mask = (part[rows, :width].to(self.device) for part in (input_ids, attention_mask))
            queries[rows.to(self.device)] = self.encode_queries(ids, mask).to(queries)
        if was_training:
            self.train()
        return queries

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        negative_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> GenerativeRetrievalOutput:
        """Computes queries and, given `labels`, the loss: the mean over positives.

        Args:
            input_ids, attention_mask, inputs_embeds: see [`~T5ForGenerativeRetrieval.encode_queries`].
            labels: rows of the items to retrieve, `[B]` or `[B, P]`; -100 is padding. With `"history"` pooling, of the item that
                follows the history, `[B]`, or each position of it, `[B, 1 + S]`, the first item of the history included.
            negative_ids: rows of items without an interaction. For `cosine_ranking` one per label; for `softmax` the sampled
                competitors of all labels of the batch, `[B, m]`, without which all bound items compete.
            num_items_in_batch: the number of positives to divide by; by default that of this batch. `Trainer` passes that of all
                batches of a step, so that gradient accumulation and several processes do not change the loss.

        Raises:
            ValueError: labels without bound items or of another shape, or `cosine_ranking` without negatives.
        """
        if self.config.pooling == "history":
            prompts = self.read_prompts(input_ids, attention_mask)
            hidden = self._read_history(prompts)
            queries = self._history_query(hidden, prompts)
        else:
            queries = self.encode_queries(input_ids, attention_mask, inputs_embeds)
        if labels is None:
            return GenerativeRetrievalOutput(query_embeds=queries)
        if not len(self.item_embeddings):
            raise ValueError("the loss needs item vectors: call model.bind_items(store.vectors('item')) first.")
        labels = labels.view(len(labels), -1)  # [B, P]
        if self.config.pooling != "history":
            hidden = F.normalize(queries.float(), dim=-1)[:, None].expand(-1, labels.shape[1], -1)  # [B, P, d]
        elif labels.shape[1] == 1:
            hidden = self._last(hidden, prompts)[:, None]
        elif labels.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"labels have {labels.shape[1]} columns but history pooling needs 1 for each prompt or {hidden.shape[1]}, one for "
                "each position: give the collator next_items=True."
            )
        known = labels >= 0
        predictions, targets = hidden[known], labels[known]  # [n, w], [n]
        if self.config.loss_type == "softmax":
            loss = self._softmax_loss(predictions.float(), targets, negative_ids)
        elif negative_ids is None:
            raise ValueError("the cosine_ranking loss needs negative_ids, one per label; the data collator draws them.")
        else:
            loss = self._cosine_ranking_loss(predictions, targets, negative_ids.view(labels.shape)[known])
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        return GenerativeRetrievalOutput(loss=loss / count, query_embeds=queries)

    def _cosine_ranking_loss(self, unit: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Eq. 20 of unit queries `[n, d]`: the sum of 1 - cos(z, q_j) plus max(0, cos(z, q_j') - gamma) of a negative."""
        # Casting the model, for example to bfloat16, casts the bound items too.
        positive, negative = ((unit * self.item_embeddings[rows].to(unit)).sum(dim=-1) for rows in (targets, negatives))
        return (1 - positive + F.relu(negative - self.config.margin)).sum()

    def _softmax_loss(
        self, predictions: torch.Tensor, targets: torch.Tensor, negative_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum of -log softmax of x . y_j, of predictions x `[n, w]` and their items `[n]`. Without negatives all items compete."""
        if negative_ids is None:
            return linear_cross_entropy(predictions, self._competitors(), targets)
        return sampled_cross_entropy(
            predictions, self._competitors, negative_ids.flatten(), targets, len(self.item_embeddings)
        )

    def _competitors(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """y of bound items (default: all), float32 `[m, w]`: q / temperature, or e with `"history"` pooling."""
        if self.config.pooling == "history":
            tokens = cast(torch.Tensor, self.item_tokens)
            return self._learned(tokens if rows is None else tokens[rows])
        vectors = self.item_embeddings if rows is None else self.item_embeddings[rows]
        return vectors.float() / self.config.temperature

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectionLinear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


T5GenerativeRetrievalConfig.register_for_auto_class()
T5ForGenerativeRetrieval.register_for_auto_class("AutoModel")
