"""From users to tensors: prompts, histories, targets and negatives for T5 (sections II-D1 and II-E1 of TokenRec).

The words of a template are tokenised once; user and item tokens are rows of an integer table. A batch is assembled by index
arithmetic on whole arrays, without strings and without a loop over users, items or tokens. Every random choice is a hash of
(seed, epoch, user), see `interaction_matrix.stateless_random`, so batches do not depend on workers, processes or resumption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, SEEN_TEMPLATES, PromptTemplate
from .interaction_matrix import InteractionMatrix, bounded, stateless_random

# Numbers of the random streams of one example; each stream is disjoint from the others.
_TEMPLATE, _HISTORY_SIZE, _ANONYMOUS, _NEGATIVES = 0, 1, 2, 16
IGNORED = -100


class PromptDataset(Dataset):
    """The users to make prompts for, as plain row numbers; [`DataCollatorForGenerativeRetrieval`] does the rest.

    Args:
        users: user rows, int `[n]`.
        targets: item row to retrieve for each user, int `[n]` (evaluation); without it (training), the collator splits each
            user's interactions into history and targets anew in every epoch.
        lengths: of the users' histories, int `[n]`, to group examples by while training.
    """

    def __init__(self, users: np.ndarray, targets: np.ndarray | None = None, lengths: np.ndarray | None = None):
        self.users, self.targets = np.asarray(users), targets
        self.lengths = lengths
        self.epoch = 0

    @classmethod
    def for_training(cls, interactions: InteractionMatrix) -> PromptDataset:
        """All users with at least one interaction."""
        users = np.flatnonzero(interactions.lengths > 0)
        return cls(users, lengths=interactions.lengths[users])

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass draw prompts, histories, targets and negatives of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, row: int) -> dict[str, int]:
        example = {"user": int(self.users[row]), "epoch": self.epoch}
        if self.targets is not None:
            example["target"] = int(self.targets[row])
        return example


class DataCollatorForGenerativeRetrieval:
    """Makes the inputs of [`T5ForGenerativeRetrieval`] from examples of a [`PromptDataset`].

    While training, a user's interactions are shuffled and split: a random number of them, from 1 to `train_history`, is the
    history of the prompt, and up to `targets_per_prompt` others are the items to retrieve. Without `shuffle_history` they are
    cut at a random moment: the latest before it are the history, the next ones are to be retrieved. With `pool_history` and
    `user_mq` the user's own tokens are those of that past too: the user's vector of all interactions would tell what is to be
    found. An example with a `target` keeps the whole history and the user's tokens. A history is at most `max_history` items
    (the latest), and as many fewer, whole, as `max_length` takes. A user without history gets a template without history.

    Args:
        tokenizer: a [`TokenRecTokenizer`] that knows all the users and items.
        interactions: the training interactions, in rows.
        user_ids, item_ids: the id of each row, as the tokenizer knows it.
        templates: the templates to choose from at random while training.
        evaluation_templates: the same for examples with a target.
        history_only: share of training prompts, of users with a history to show, that name the history and not the user, so
            that the model can be asked about people it does not know.
        max_length: tokens of the longest prompt.
        max_history: items of the longest history.
        train_history: items of the longest history while training (default: `max_history`); shorter ones train faster.
        targets_per_prompt: P, the most targets of a training prompt. 1 is the paper's.
        num_negatives: un-interacted items drawn per example: P for the `cosine_ranking` loss, any number for a sampled softmax.
        with_seen_items: add the rows of the history as `seen_items`, which the full softmax takes out of the competition.
        user_vectors: collaborative vectors `[num_users, d]`, given to the model as `user_embeds` for its alignment loss.
        pool_history: makes the collaborative vectors of users whose histories end earlier, see [`FISMModel.pool`]; they
            take the place of `user_vectors` while training. Together with `user_mq`.
        user_mq: the users' [`MQTokenizerModel`], which makes tokens of these vectors.
        shuffle_history: random order of the history, else time order.
        seed: of all random choices.

    Returns (when called): `input_ids`, `attention_mask` `[B, T]`; `labels` `[B, P]`, filled up with -100; with
    `num_negatives`, `negative_ids` `[B, num_negatives]`; with `with_seen_items`, `seen_items` `[B, S]`; LongTensors. With
    `user_vectors`, `user_embeds` `[B, d]`.

    Raises:
        ValueError: a template leaves no room for a history item within `max_length`.
    """

    def __init__(
        self,
        tokenizer,
        interactions: InteractionMatrix,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        *,
        templates: Sequence[PromptTemplate] = SEEN_TEMPLATES,
        evaluation_templates: Sequence[PromptTemplate] = HISTORY_TEMPLATES,
        history_only: float = 0.0,
        max_length: int = 512,
        max_history: int = 100,
        train_history: int | None = None,
        targets_per_prompt: int = 1,
        num_negatives: int = 0,
        with_seen_items: bool = False,
        user_vectors: torch.Tensor | None = None,
        pool_history: Callable[..., torch.Tensor] | None = None,
        user_mq: MQTokenizerModel | None = None,
        shuffle_history: bool = True,
        seed: int = 0,
    ):
        self.interactions, self.seed = interactions, seed
        self.pad_token_id = tokenizer.pad_token_id
        self.user_tokens = tokenizer.entity_token_ids("user", user_ids)  # [num_users, E_u]
        self.item_tokens = tokenizer.entity_token_ids("item", item_ids)  # [num_items, E_v]
        every = [*templates, *evaluation_templates, HISTORY_ONLY_TEMPLATE]
        self.parts = [tokenizer.split_prompt(template) for template in every]
        self.uses_history = np.array([template.uses_history for template in every])
        self.names_user = np.array([template.names_user for template in every])
        self.history_only = history_only
        self.training_pool, self.evaluation_pool = np.split(np.arange(len(every) - 1), [len(templates)])
        # For users without history; where every template has one, its words around no item at all.
        plain = np.flatnonzero(~self.uses_history)
        self.plain_pool = plain if len(plain) else np.arange(len(every) - 1)
        self.shuffle_history, self.with_seen_items = shuffle_history, with_seen_items
        self.user_vectors, self.pool_history, self.user_mq = user_vectors, pool_history, user_mq
        self.user_code_tokens = tokenizer.code_token_ids("user")  # [K, L]
        self.targets_per_prompt, self.num_negatives = targets_per_prompt, num_negatives
        self.static = np.array(
            [sum(map(len, parts)) for parts in self.parts]
        )  # tokens of all but the history, [templates]
        self.static += self.names_user * self.user_tokens.shape[1]
        self.capacity = np.minimum((max_length - self.static) // self.item_tokens.shape[1], max_history)
        if (self.capacity[self.uses_history] < 1).any():
            raise ValueError(f"max_length={max_length} leaves no room for a single history item; raise it.")
        self.train_history = min(train_history or max_history, max_history)

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Makes a batch, see the class."""
        users = np.array([feature["user"] for feature in features])
        epoch = features[0]["epoch"]
        targets = np.array([feature["target"] for feature in features]) if "target" in features[0] else None
        template = self._templates(users, epoch, training=targets is None)
        embeds = None if self.user_vectors is None else self.user_vectors[torch.from_numpy(users)]
        user_tokens = self.user_tokens[users]  # [B, E_u]
        if targets is None:
            past, shown, labels = self._divide(users, epoch, template)
            if self.pool_history is not None and self.user_mq is not None:
                vectors = self._pooled(self.pool_history, len(users), past)
                user_tokens = self._with_codes(user_tokens, self.user_mq, vectors, past.sizes)
                if embeds is not None:
                    embeds = torch.where(torch.from_numpy(past.sizes > 0)[:, None], vectors, embeds)
        else:
            past = shown = self._whole_history(users, epoch, template)
            labels = np.full((len(users), self.targets_per_prompt), IGNORED)
            labels[:, 0] = targets
        batch = self._assemble(user_tokens, template, shown)
        batch["labels"] = torch.from_numpy(labels)
        if self.num_negatives:
            negatives = self.interactions.sample_negatives(
                users, self.num_negatives, seed=self.seed, epoch=epoch, examples=users, first_draw=_NEGATIVES
            )
            batch["negative_ids"] = torch.from_numpy(negatives)
        if embeds is not None:
            batch["user_embeds"] = embeds
        if self.with_seen_items:
            batch["seen_items"] = torch.from_numpy(past.padded())
        return batch

    def _templates(self, users: np.ndarray, epoch: int, training: bool) -> np.ndarray:
        """The template of each user, `[B]`; one without history for those who have none to show."""
        random = stateless_random(self.seed, epoch, users, 1, _TEMPLATE)[:, 0]
        pool = self.training_pool if training else self.evaluation_pool
        template = pool[bounded(random, len(pool))]
        if training and self.history_only:
            chance = stateless_random(self.seed, epoch, users, 1, _ANONYMOUS)[:, 0] / 2.0**64
            template = np.where(chance < self.history_only, len(self.parts) - 1, template)
        short = self.interactions.lengths[users] < (2 if training else 1)
        plain = self.plain_pool[bounded(random, len(self.plain_pool))]
        return np.where(short & self.uses_history[template], plain, template)

    def _divide(self, users, epoch, template):
        """What is known of each user, what of it is shown, and what is to be retrieved: two [`_Ragged`] and labels `[B, P]`."""
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        row = np.repeat(np.arange(len(users)), lengths)
        rank = np.arange(len(items)) - indptr[row]
        longest, fitting = lengths - 1, np.minimum(self.train_history, self.capacity[template])
        if self.shuffle_history:
            items = items[self._shuffled(users, epoch, row, rank)]
            longest = np.minimum(longest, fitting)
        random = stateless_random(self.seed, epoch, users, 1, _HISTORY_SIZE)[:, 0]
        # Without pooling, a template without history knows nothing but the user.
        knows = (lengths > 1) & (self.uses_history[template] | (self.user_mq is not None))
        past = np.where(knows, 1 + bounded(random, np.maximum(longest, 1)), 0)
        size = np.where(self.uses_history[template], np.minimum(past, fitting), 0)
        # Where nothing is known there is no moment, and the latest items count.
        first = (
            past if self.shuffle_history else np.where(knows, past, np.maximum(lengths - self.targets_per_prompt, 0))
        )
        labels = np.full((len(users), self.targets_per_prompt), IGNORED)
        target = (rank >= first[row]) & (rank < first[row] + self.targets_per_prompt)
        labels[row[target], (rank - first[row])[target]] = items[target]
        known = rank < past[row]
        return _Ragged(past, items[known]), _Ragged(size, items[known & (rank >= (past - size)[row])]), labels

    @staticmethod
    @torch.no_grad()
    def _pooled(pool_history, count, past):
        """Collaborative vectors of the pasts, `[B, d]`."""
        ages = past.sizes[past.rows] - 1 - past.ranks
        return pool_history(*map(torch.from_numpy, (past.rows, past.values, ages)), count)

    def _with_codes(self, user_tokens, user_mq, vectors, sizes):
        """`user_tokens` `[B, E_u]` with the codes of `vectors` `[B, d]` where the past has any `sizes`."""
        codes = user_mq.encode(vectors).numpy()  # [B, K]
        count = codes.shape[1]
        tokens = user_tokens.copy()
        tokens[:, -count:] = np.where(
            sizes[:, None] > 0, self.user_code_tokens[np.arange(count), codes], tokens[:, -count:]
        )
        return tokens

    def _whole_history(self, users, epoch, template):
        """The latest items that fit, a [`_Ragged`]."""
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        size = np.where(self.uses_history[template], np.minimum(lengths, self.capacity[template]), 0)
        row = np.repeat(np.arange(len(users)), lengths)
        position = np.arange(len(items)) - indptr[row]
        kept = position >= (lengths - size)[row]
        row, items, position = row[kept], items[kept], position[kept]
        if self.shuffle_history:
            items = items[self._shuffled(users, epoch, row, position)]
        return _Ragged(size, items)

    def _shuffled(self, users, epoch, row, position):
        """An order that keeps the rows together and is random within each."""
        element = users[row].astype(np.uint64) << np.uint64(32) | position.astype(np.uint64)
        return np.lexsort((stateless_random(self.seed, epoch, element, 1)[:, 0], row))

    def _assemble(self, user_tokens, template, history) -> dict[str, torch.Tensor]:
        width, entity = self.item_tokens.shape[1], user_tokens.shape[1]
        length = self.static[template] + history.sizes * width
        ids = np.full((len(template), length.max()), self.pad_token_id, dtype=np.int64)
        start = np.zeros(len(template), dtype=np.int64)
        for number in np.unique(template):
            before, *between, after = self.parts[number]
            rows = np.flatnonzero(template == number)[:, None]
            at = len(before)
            ids[rows, np.arange(at)] = before
            if self.names_user[number]:
                ids[rows, at + np.arange(entity)] = user_tokens[rows[:, 0]]
                at += entity
            for words in between:
                ids[rows, at + np.arange(len(words))] = words
                at += len(words)
            start[rows] = at
            ids[rows, length[rows] - len(after) + np.arange(len(after))] = after
        row, rank = history.rows[:, None], history.ranks[:, None]
        ids[row, start[row] + rank * width + np.arange(width)] = self.item_tokens[history.values]
        mask = np.arange(ids.shape[1]) < length[:, None]
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


class _Ragged:
    """Rows of different lengths, one after the other: `sizes` `[B]`, and of each of the `values` its row and its rank there."""

    def __init__(self, sizes: np.ndarray, values: np.ndarray):
        self.sizes, self.values = sizes, values
        self.rows = np.repeat(np.arange(len(sizes)), sizes)
        self.ranks = np.arange(len(values)) - (np.cumsum(sizes) - sizes)[self.rows]

    def padded(self) -> np.ndarray:
        """A rectangle `[B, longest]` (at least one column) filled up with -100."""
        table = np.full((len(self.sizes), max(1, int(self.sizes.max(initial=0)))), IGNORED, dtype=np.int64)
        table[self.rows, self.ranks] = self.values
        return table
