"""P5 with random, sequential and collaborative item ids (Geng et al., RecSys 2022, arXiv 2203.13366; Hua et al., 2023).

A T5 reads a prompt of words, the user's id and the ids of the history, and writes the id of the next item, symbol by symbol.
As in P5, the tokens of an id share a whole-word embedding. The T5 is a small one from scratch (`T5_SIZES`); the wordings are
those of TokenRec. Decoding is a beam search over valid ids of unseen items. The score of an item is the log-probability of its
id; items outside the beams have no score.

Training prompts end at a random position of a user's training sequence. The items after it are the targets: one in the original,
`targets` here, because further targets cost little once the prompt is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout
from tokenrec_hf.data.stateless_random import bounded, stateless_random
from tokenrec_hf.evaluation.fitting import device, train_epochs
from tokenrec_hf.evaluation.sequence import Dropout
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES
from tokenrec_hf.training.initialization import load_t5_tokenizer

from .base import Baseline, product_type
from .beam_search import IdTrie, beam_search
from .item_ids import BASE, collaborative_ids, numbers_as_symbols, random_ids, sequential_ids

IGNORED = -100
T5_SIZES = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 1}


class IdGenerator(nn.Module):
    """A T5 that reads prompts and writes ids.

    Args:
        config: configuration of the T5. Its vocabulary ends with the symbols of item ids.
        num_symbols: number of symbols of item ids.
        max_words: number of whole-word embeddings; word 0 stands for text.
    """

    def __init__(self, config: T5Config, num_symbols: int, max_words: int):
        super().__init__()
        self.t5 = T5ForConditionalGeneration(config)
        # nn.Dropout draws its masks slowly on a CPU.
        for module in list(self.t5.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, Dropout(child.p))
        self.words = nn.Embedding(max_words, config.d_model)
        nn.init.normal_(self.words.weight, std=0.1)
        self.first_symbol = config.vocab_size - num_symbols

    def embed(self, ids: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[B, T, d_model]` of tokens `[B, T]` and of their words `[B, T]`."""
        return self.t5.shared(ids) + self.words(words) * (words > 0)[..., None]

    def encode(self, ids: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states `[B, T, d_model]` of prompts, and their attention mask `[B, T]`."""
        mask = (ids != self.t5.config.pad_token_id).long()
        return self.t5.encoder(inputs_embeds=self.embed(ids, words), attention_mask=mask).last_hidden_state, mask

    def decode(self, states: torch.Tensor, mask: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        """Logits of the next symbols after W prefixes of ids for the same prompt.

        A prefix attends to itself and the prompt, whose keys and values are computed once for all prefixes.

        Args:
            states, mask: results of `encode`.
            prefixes: symbols `[B, W, t]`.

        Returns:
            Logits of the whole vocabulary after none to all of the symbols, `[B, W, t + 1, vocab_size]`.
        """
        decoder, config = self.t5.decoder, self.t5.decoder.config
        rows, beams, length = prefixes.shape
        tokens = F.pad(prefixes + self.first_symbol, (1, 0), value=config.decoder_start_token_id).flatten(0, 1)
        hidden = decoder.dropout(decoder.embed_tokens(tokens))  # [B * W, t + 1, d_model]
        causal = create_causal_mask(config, hidden, None, None)
        merged = hidden.view(rows, beams * (length + 1), -1)
        visible = create_bidirectional_mask(config, merged, mask, encoder_hidden_states=states)
        bias = None
        for block in decoder.block:
            own, cross, feed_forward = block.layer
            hidden, bias, _ = own(hidden, attention_mask=causal, position_bias=bias)
            merged, _, _ = cross(hidden.reshape(merged.shape), states, attention_mask=visible)
            hidden = feed_forward(merged).view(hidden.shape)
        hidden = decoder.dropout(decoder.final_layer_norm(hidden)) * config.d_model**-0.5
        return self.t5.lm_head(hidden).view(rows, beams, length + 1, -1)

    def loss(self, ids: torch.Tensor, words: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean negative log-probability of the ids `targets` `[B, P, L]`, padded with -1."""
        logits = self.decode(*self.encode(ids, words), targets[..., :-1].clamp(min=0))
        labels = torch.where(targets >= 0, targets + self.first_symbol, IGNORED)
        return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORED)

    def recommend(
        self, ids: torch.Tensor, words: torch.Tensor, trie: IdTrie, open_nodes: torch.Tensor, beams: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items and scores of a batch of prompts, see [`beam_search`]."""
        states, mask = self.encode(ids, words)

        def next_log_probs(prefixes):
            logits = self.decode(states, mask, prefixes)[:, :, -1]
            return logits.log_softmax(dim=-1)[..., self.first_symbol :]

        return beam_search(next_log_probs, trie, open_nodes, beams)


class P5(Baseline):
    """The common part of the family; a subclass numbers the items (`item_ids`).

    Settings: `targets` (items after the cut to learn from), `dropout`, `lr`; `max_history` (items of a prompt),
    `beams` (enough for HR@30), `batch_size`, `max_steps`, `evaluate_every` (steps, at least an epoch) and `t5` (changes to the
    recipe's T5).
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "max_history": 30,
        "beams": 30,
        "batch_size": 64,
        "max_steps": 6000,
        "evaluate_every": 150,
        "t5": {},
    }
    grid = (
        {"targets": 8, "dropout": 0.1, "lr": 1e-3},
        {"targets": 8, "dropout": 0.3, "lr": 1e-3},
        {"targets": 8, "dropout": 0.1, "lr": 2e-3},
        {"targets": 1, "dropout": 0.1, "lr": 1e-3},
        {"targets": 1, "dropout": 0.3, "lr": 1e-3},
        {"targets": 16, "dropout": 0.2, "lr": 1e-3},
    )

    def __init__(self, *, seed: int = 0, **settings: Any):
        super().__init__(seed=seed, **{**self.defaults, **self.grid[0], **settings})

    def item_ids(self, train: InteractionMatrix) -> np.ndarray:
        """Ids of the items, see `item_ids.py`."""
        raise NotImplementedError

    def fit(self, train: InteractionMatrix, validation: Holdout | None, epochs: int | None = None) -> None:
        """See [`Baseline.fit`]."""
        torch.manual_seed(self.seed)
        self.train = train
        self.build(train)
        if validation is not None:
            validation = sample(validation, self.seed)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.settings["lr"], weight_decay=0.01)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)

        def run_epoch(epoch: int) -> None:
            for batch in self.batches(epoch):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=product_type() == torch.bfloat16):
                    loss = self.network.loss(*batch)
                loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                optimizer.step()
                warmup.step()

        steps = -(-int((train.lengths > 1).sum()) // self.settings["batch_size"])
        limits = {
            "max_epochs": -(-self.settings["max_steps"] // steps),
            "every": -(-self.settings["evaluate_every"] // steps),
        }
        self.epochs = train_epochs(self, self.network, run_epoch, train, validation, epochs, **limits)

    def build(self, train: InteractionMatrix) -> None:
        """The ids, their trie, the tokens of the prompts and a fresh network."""
        tokenizer = load_t5_tokenizer()
        self.wordings = [
            [
                np.array(tokenizer.encode(part, add_special_tokens=False), dtype=np.int64)
                for part in template.static_parts
            ]
            for template in HISTORY_TEMPLATES
        ]
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.codes = self.item_ids(train)  # [num_items, L]
        self.trie = IdTrie(self.codes).to(device())
        self.user_tokens = len(tokenizer) + numbers_as_symbols(np.arange(train.num_users))
        first = len(tokenizer) + BASE
        self.item_tokens = np.where(self.codes >= 0, first + self.codes, self.pad_token_id)
        config = T5Config(
            vocab_size=first + self.trie.num_symbols,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            decoder_start_token_id=self.pad_token_id,
            dropout_rate=self.settings["dropout"],
            **(T5_SIZES | self.settings["t5"]),
        )
        self.network = self.make_network(config, self.trie.num_symbols, self.settings["max_history"] + 2)

    def make_network(self, config: T5Config, num_symbols: int, max_words: int) -> IdGenerator:
        """The network; its arguments are those of [`IdGenerator`]."""
        return IdGenerator(config, num_symbols, max_words)

    def batches(self, epoch: int):
        """One prompt of each user with at least two items, cut at random: tokens, words and targets."""
        lengths, indptr = self.train.lengths, self.train.indptr
        users = np.flatnonzero(lengths > 1)
        cut = indptr[users] + 1 + bounded(stateless_random(self.seed, epoch, users, 1)[:, 0], lengths[users] - 1)
        start = np.maximum(indptr[users], cut - self.settings["max_history"])
        after = np.arange(self.settings["targets"])
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(users))
        order = order[np.argsort((cut - start)[order], kind="stable")]  # like lengths together: little padding
        size = self.settings["batch_size"]
        for number in random.permutation(-(-len(order) // size)):
            rows = order[number * size : (number + 1) * size]
            positions = cut[rows, None] + after
            inside = positions < indptr[users[rows] + 1][:, None]
            targets = np.where(inside[..., None], self.codes[self.train.items[np.where(inside, positions, 0)]], -1)
            wording = int(random.integers(len(self.wordings)))
            yield *self.prompts(users[rows], start[rows], cut[rows], wording), torch.from_numpy(targets).to(device())

    def prompts(self, users: np.ndarray, starts: np.ndarray, ends: np.ndarray, wording: int = 0):
        """Prompts of the histories `train.items[start:end]`.

        Returns:
            Tokens and the word of each (0 for text, 1 for the user, then the items), LongTensors `[B, T]` on the device.
        """
        rows = len(users)
        before, between, behind = (np.broadcast_to(part, (rows, len(part))) for part in self.wordings[wording])
        columns = np.arange((ends - starts).max())
        positions = starts[:, None] + columns
        inside = positions < ends[:, None]
        items = self.item_tokens[self.train.items[np.where(inside, positions, 0)]]  # [B, H, L]
        history = np.where(inside[..., None], items, self.pad_token_id).reshape(rows, -1)
        user = self.user_tokens[users]
        end = np.full((rows, 1), self.eos_token_id)
        tokens = np.concatenate([before, user, between, history, behind, end], axis=1)
        words = [np.full(before.shape[1], 0), np.full(user.shape[1], 1), np.full(between.shape[1], 0)]
        words += [np.repeat(2 + columns, items.shape[2]), np.full(behind.shape[1] + 1, 0)]
        # The padding of short histories moves to the end.
        order = np.argsort(tokens == self.pad_token_id, axis=1, kind="stable")
        order = order[:, : (tokens != self.pad_token_id).sum(axis=1).max()]
        tokens = np.take_along_axis(tokens, order, axis=1)
        return torch.from_numpy(tokens).to(device()), torch.from_numpy(np.concatenate(words)[order]).to(device())

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """See [`Baseline.scores`]; `-inf` outside the beams."""
        result = torch.full((len(users), self.train.num_items), -torch.inf, device=device())
        order = np.argsort(self.train.lengths[users], kind="stable")
        for start in range(0, len(users), 64):
            rows = order[start : start + 64]
            items, scores = self.recommend(users[rows])
            # An item of -1 (fewer items left than beams) is written to an extra column.
            table = result.new_full((len(rows), self.train.num_items + 1), -torch.inf)
            result[rows] = table.scatter_(1, items % table.shape[1], scores)[:, :-1]
        return result

    def recommend(self, users: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Unseen items and scores of users, `[B, beams]`, see [`beam_search`]."""
        tokens, words, open_nodes = self.inputs(users)
        with torch.no_grad():
            return self.network.recommend(tokens, words, self.trie, open_nodes, self.settings["beams"])

    def inputs(self, users: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts with the latest items of users, see `prompts`, and the allowed nodes of the trie."""
        indptr, seen = self.train.of_users(users)
        ends = self.train.indptr[users + 1]
        starts = np.maximum(self.train.indptr[users], ends - self.settings["max_history"])
        open_nodes = self.trie.open_nodes(len(users), np.repeat(np.arange(len(users)), np.diff(indptr)), seen)
        return *self.prompts(users, starts, ends), open_nodes


def sample(holdout: Holdout, seed: int, size: int = 2000) -> Holdout:
    """At most `size` of the held-out pairs, for the choice of the best epoch: beam search for all pairs would take hours."""
    rows = np.random.default_rng(seed).permutation(len(holdout.users))[:size]
    return Holdout(holdout.users[rows], holdout.targets[rows])


class P5RID(P5):
    """P5 with random ids."""

    name, title = "p5-rid", "P5-RID"

    def item_ids(self, train):  # noqa: D102
        return random_ids(train, self.seed)


class P5SID(P5):
    """P5 with sequential ids."""

    name, title = "p5-sid", "P5-SID"

    def item_ids(self, train):  # noqa: D102
        return sequential_ids(train, self.seed)


class P5CID(P5):
    """P5 with collaborative ids."""

    name, title = "p5-cid", "P5-CID"

    def item_ids(self, train):  # noqa: D102
        return collaborative_ids(train, self.seed)
