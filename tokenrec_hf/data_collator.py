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

from .interaction_matrix import InteractionMatrix, bounded, stateless_random
from .prompts import HISTORY_TEMPLATES, SEEN_TEMPLATES, PromptTemplate

# Numbers of the random streams of one example; each stream is disjoint from the others.
_TEMPLATE, _HISTORY_SIZE, _NEGATIVES = 0, 1, 16
IGNORED = -100


class PromptDataset(Dataset):
    """The users to make prompts for, as plain row numbers; [`DataCollatorForGenerativeRetrieval`] does the rest.

    Args:
        users: user rows, int `[n]`.
        targets: item row to retrieve for each user, int `[n]` (evaluation); without it (training), the collator splits each
            user's interactions into history and targets anew in every epoch.
    """

    def __init__(self, users: np.ndarray, targets: np.ndarray | None = None):
        self.users, self.targets = np.asarray(users), targets
        self.epoch = 0

    @classmethod
    def for_training(cls, interactions: InteractionMatrix) -> PromptDataset:
        """All users with at least one interaction."""
        return cls(np.flatnonzero(interactions.lengths > 0))

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
    cut at a random moment: the latest before it are the history, the next ones are to be retrieved. An example with a
    `target` keeps the whole history. A history is at most `max_history` items (the latest), and as many fewer, whole, as `max_length` takes.
    A user without history gets a template without history.

    Args:
        tokenizer: a [`TokenRecTokenizer`] that knows all the users and items.
        interactions: the training interactions, in rows.
        user_ids, item_ids: the id of each row, as the tokenizer knows it.
        templates: the templates to choose from at random while training.
        evaluation_templates: the same for examples with a target.
        max_length: tokens of the longest prompt.
        max_history: items of the longest history.
        train_history: items of the longest history while training (default: `max_history`); shorter ones train faster.
        targets_per_prompt: P, the most targets of a training prompt. 1 is the paper's.
        num_negatives: un-interacted items drawn per example: P for the `cosine_ranking` loss, any number for a sampled softmax.
        with_seen_items: add the rows of the history as `seen_items`, which the full softmax takes out of the competition.
        user_vectors: collaborative vectors `[num_users, d]`, given to the model as `user_embeds` for its alignment loss.
        pool_history: makes the collaborative vector of a user of a history that ends earlier, see [`FISMModel.pool`]; replaces
            `user_vectors` where a history was cut in time.
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
        max_length: int = 512,
        max_history: int = 100,
        train_history: int | None = None,
        targets_per_prompt: int = 1,
        num_negatives: int = 0,
        with_seen_items: bool = False,
        user_vectors: torch.Tensor | None = None,
        pool_history: Callable[..., torch.Tensor] | None = None,
        shuffle_history: bool = True,
        seed: int = 0,
    ):
        self.interactions, self.seed = interactions, seed
        self.pad_token_id = tokenizer.pad_token_id
        self.user_tokens = tokenizer.entity_token_ids("user", user_ids)  # [num_users, E_u]
        self.item_tokens = tokenizer.entity_token_ids("item", item_ids)  # [num_items, E_v]
        every = [*templates, *evaluation_templates]
        self.parts = [tokenizer.split_prompt(template) for template in every]
        self.uses_history = np.array([template.uses_history for template in every])
        self.training_pool, self.evaluation_pool = np.split(np.arange(len(every)), [len(templates)])
        # For users without history; where every template has one, its words around no item at all.
        plain = np.flatnonzero(~self.uses_history)
        self.plain_pool = plain if len(plain) else np.arange(len(every))
        self.shuffle_history, self.with_seen_items = shuffle_history, with_seen_items
        self.user_vectors, self.pool_history = user_vectors, pool_history
        self.targets_per_prompt, self.num_negatives = targets_per_prompt, num_negatives
        widths = np.array([sum(map(len, parts)) for parts in self.parts]) + self.user_tokens.shape[1]
        self.capacity = np.minimum((max_length - widths) // self.item_tokens.shape[1], max_history)
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
        if targets is None and not self.shuffle_history:
            indptr, history, labels, size = self._cut(users, epoch, template)
            if embeds is not None and self.pool_history is not None:
                embeds = self._pooled(self.pool_history, users, size, embeds)
        elif targets is None:
            indptr, history, labels = self._split(users, epoch, template)
        else:
            indptr, history = self._whole_history(users, epoch, template)
            labels = np.full((len(users), self.targets_per_prompt), IGNORED)
            labels[:, 0] = targets
        batch = self._assemble(users, template, indptr, history)
        batch["labels"] = torch.from_numpy(labels)
        if self.num_negatives:
            negatives = self.interactions.sample_negatives(
                users, self.num_negatives, seed=self.seed, epoch=epoch, examples=users, first_draw=_NEGATIVES
            )
            batch["negative_ids"] = torch.from_numpy(negatives)
        if embeds is not None:
            batch["user_embeds"] = embeds
        if self.with_seen_items:
            batch["seen_items"] = torch.from_numpy(_padded(indptr, history))
        return batch

    def _templates(self, users: np.ndarray, epoch: int, training: bool) -> np.ndarray:
        """The template of each user, `[B]`; one without history for those who have none to show."""
        random = stateless_random(self.seed, epoch, users, 1, _TEMPLATE)[:, 0]
        pool = self.training_pool if training else self.evaluation_pool
        template = pool[bounded(random, len(pool))]
        short = self.interactions.lengths[users] < (2 if training else 1)
        plain = self.plain_pool[bounded(random, len(self.plain_pool))]
        return np.where(short & self.uses_history[template], plain, template)

    def _split(self, users, epoch, template):
        """Random history and targets: `(indptr [B + 1], history, labels [B, P])`."""
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        row = np.repeat(np.arange(len(users)), lengths)
        position = np.arange(len(items)) - indptr[row]
        shuffled = self._shuffled(users, epoch, row, position)
        row, items, position = row[shuffled], items[shuffled], position[shuffled]
        rank = np.arange(len(items)) - indptr[row]
        longest = np.minimum(np.minimum(lengths - 1, self.train_history), self.capacity[template])
        size = 1 + bounded(stateless_random(self.seed, epoch, users, 1, _HISTORY_SIZE)[:, 0], np.maximum(longest, 1))
        size = np.where(self.uses_history[template] & (longest > 0), size, 0)
        labels = np.full((len(users), self.targets_per_prompt), IGNORED)
        target = (rank >= size[row]) & (rank < size[row] + self.targets_per_prompt)
        labels[row[target], (rank - size[row])[target]] = items[target]
        chosen = rank < size[row]
        return _indptr(size), items[chosen], labels

    def _cut(self, users, epoch, template):
        """A past and what followed it: `(indptr [B + 1], history, labels [B, P], length of the past [B])`."""
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        row = np.repeat(np.arange(len(users)), lengths)
        position = np.arange(len(items)) - indptr[row]
        uses_history = self.uses_history[template] & (lengths > 1)
        random = stateless_random(self.seed, epoch, users, 1, _HISTORY_SIZE)[:, 0]
        past = np.where(uses_history, 1 + bounded(random, np.maximum(lengths - 1, 1)), 0)
        size = np.minimum(np.minimum(past, self.train_history), self.capacity[template])
        # Without a history there is no moment, and the latest items count.
        first = np.where(uses_history, past, np.maximum(lengths - self.targets_per_prompt, 0))
        labels = np.full((len(users), self.targets_per_prompt), IGNORED)
        target = (position >= first[row]) & (position < first[row] + self.targets_per_prompt)
        labels[row[target], (position - first[row])[target]] = items[target]
        shown = (position < past[row]) & (position >= (past - size)[row])
        return _indptr(size), items[shown], labels, past

    def _pooled(self, pool_history, users, past, whole):
        """Collaborative vectors of the pasts `[B, d]`; of users without one, those of their `whole` histories."""
        indptr, items = self.interactions.of_users(users)
        row = np.repeat(np.arange(len(users)), np.diff(indptr))
        position = np.arange(len(items)) - indptr[row]
        known = position < past[row]
        parts = (row[known], items[known], (past[row] - 1 - position)[known])
        with torch.no_grad():
            pooled = pool_history(*map(torch.from_numpy, parts), len(users))
        return torch.where(torch.from_numpy(past > 0)[:, None], pooled, whole)

    def _whole_history(self, users, epoch, template):
        """The latest items that fit: `(indptr [B + 1], history)`."""
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        size = np.where(self.uses_history[template], np.minimum(lengths, self.capacity[template]), 0)
        row = np.repeat(np.arange(len(users)), lengths)
        position = np.arange(len(items)) - indptr[row]
        kept = position >= (lengths - size)[row]
        row, items, position = row[kept], items[kept], position[kept]
        if self.shuffle_history:
            items = items[self._shuffled(users, epoch, row, position)]
        return _indptr(size), items

    def _shuffled(self, users, epoch, row, position):
        """An order that keeps the rows together and is random within each."""
        element = users[row].astype(np.uint64) << np.uint64(32) | position.astype(np.uint64)
        return np.lexsort((stateless_random(self.seed, epoch, element, 1)[:, 0], row))

    def _assemble(self, users, template, indptr, history) -> dict[str, torch.Tensor]:
        size, width = np.diff(indptr), self.item_tokens.shape[1]
        static = np.array([sum(map(len, parts)) for parts in self.parts]) + self.user_tokens.shape[1]
        length = static[template] + size * width
        ids = np.full((len(users), length.max()), self.pad_token_id, dtype=np.int64)
        row = np.repeat(np.arange(len(users)), size)
        rank = np.arange(len(history)) - indptr[row]
        start = np.zeros(len(users), dtype=np.int64)
        for number in np.unique(template):
            before, *between, after = self.parts[number]
            rows = np.flatnonzero(template == number)[:, None]
            at = len(before)
            ids[rows, np.arange(at)] = before
            ids[rows, at + np.arange(self.user_tokens.shape[1])] = self.user_tokens[users[rows[:, 0]]]
            at += self.user_tokens.shape[1]
            for words in between:
                ids[rows, at + np.arange(len(words))] = words
                at += len(words)
            start[rows] = at
            ids[rows, length[rows] - len(after) + np.arange(len(after))] = after
        ids[row[:, None], start[row, None] + rank[:, None] * width + np.arange(width)] = self.item_tokens[history]
        mask = np.arange(ids.shape[1]) < length[:, None]
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def _indptr(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _padded(indptr: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Ragged rows as a rectangle `[B, longest]` (at least one column) filled up with -100."""
    sizes = np.diff(indptr)
    table = np.full((len(sizes), max(1, int(sizes.max(initial=0)))), IGNORED, dtype=np.int64)
    table[np.arange(table.shape[1]) < sizes[:, None]] = values
    return table
