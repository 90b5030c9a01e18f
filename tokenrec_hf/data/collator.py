"""From users to tensors: prompts, histories, targets and negatives for T5 (sections II-D1 and II-E1 of TokenRec).

The words of a template are tokenised once. User and item tokens are rows of an integer table. A batch is assembled by
index arithmetic on whole arrays, without strings and without a loop over users, items or tokens. Every random choice is a
hash of (seed, epoch, user), see [`stateless_random`], so batches do not depend on workers, processes or resumption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ..models.embedding_store import Ragged
from ..models.prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, SEEN_TEMPLATES, PromptTemplate
from ..models.tokenization_tokenrec import TokenRecTokenizer
from .history_split import HistorySplit, shuffled_order, split_histories
from .interaction_matrix import InteractionMatrix
from .stateless_random import bounded, stateless_random

# Numbers of the random draws. The order is drawn for each (user, position), everything else for each user.
_TEMPLATE, _HISTORY_ORDER, _HISTORY_SIZE, _NEGATIVES = 0, 0, 1, 16
IGNORED = -100
# Users whose prompts are measured at once.
LENGTHS_CHUNK = 16_384


class PromptDataset(Dataset):
    """The users to make prompts for, as row numbers. [`DataCollatorForGenerativeRetrieval`] makes the prompts.

    Args:
        users: user rows, int `[n]`.
        targets: the item row to retrieve for each user, int `[n]` (evaluation). Without targets (training), the collator
            splits the interactions of each user into history and targets anew in every epoch.
    """

    def __init__(self, users: np.ndarray, targets: np.ndarray | None = None):
        self.users, self.targets = np.asarray(users), targets
        self.epoch = 0

    @classmethod
    def for_training(cls, interactions: InteractionMatrix) -> PromptDataset:
        """All users with at least one interaction."""
        return cls(np.flatnonzero(interactions.lengths > 0))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch from which the next pass draws prompts, histories, targets and negatives."""
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

    In training, the interactions of a user are shuffled and split: a random number of them, from 1 to `train_history`, is
    the history in the prompt, and another is the item to retrieve. Without `shuffle_history` they are split at a random
    moment: the latest items before it are the history, the next item is the target. With `next_items`, for `"history"`
    pooling, all items are targets: the prompt shows the history without its last item, and the labels are the item that
    follows each position. An example with a `target` keeps the whole history, and the target is its only label. A history has
    at most `max_history` items (the latest) and only as many whole items as fit into `max_length`. A user without history gets
    a template without history.

    Args:
        tokenizer: a tokenizer that knows all users and items.
        interactions: the training interactions, in rows.
        user_ids: the id of each user row.
        item_ids: the id of each item row.
        templates: the templates to choose from at random in training. Default: `SEEN_TEMPLATES`; with `next_items` those of
            them with a history, and `HISTORY_ONLY_TEMPLATE`.
        evaluation_templates: the templates to choose from for examples with a target.
        max_length: tokens of the longest prompt.
        max_history: items of the longest history.
        train_history: items of the longest history in training (default: `max_history`). Shorter histories train faster.
        num_negatives: un-interacted items drawn for each example: 1 for the `cosine_ranking` loss, any number for a sampled
            softmax.
        next_items: whether the labels are the items that follow each position of the history.
        shuffle_history: random order of the history, else time order.
        seed: seed of all random choices.

    Returns (when called):
        LongTensors `input_ids` and `attention_mask` `[B, T]`; `labels` `[B, 1]`, or with `next_items` `[B, 1 + S]`, padded with
        -100; with `num_negatives`, `negative_ids` `[B, num_negatives]`.

    Raises:
        ValueError: a template leaves no room for a history item within `max_length`.
    """

    def __init__(
        self,
        tokenizer: TokenRecTokenizer,
        interactions: InteractionMatrix,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        *,
        templates: Sequence[PromptTemplate] | None = None,
        evaluation_templates: Sequence[PromptTemplate] = HISTORY_TEMPLATES,
        max_length: int = 512,
        max_history: int = 100,
        train_history: int | None = None,
        num_negatives: int = 0,
        next_items: bool = False,
        shuffle_history: bool = True,
        seed: int = 0,
    ):
        for name, value, least in (
            ("max_history", max_history, 1),
            ("num_negatives", num_negatives, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not evaluation_templates or templates is not None and not templates:
            raise ValueError("there are no templates to choose from; give at least one, or None for the usual ones.")
        self.interactions, self.seed = interactions, seed
        self.pad_token_id = tokenizer.pad_token_id
        self.user_tokens = tokenizer.entity_token_ids("user", user_ids)  # [num_users, E_u]
        self.item_tokens = tokenizer.entity_token_ids("item", item_ids)  # [num_items, E_v]
        if templates is None:
            templates = (*HISTORY_TEMPLATES, HISTORY_ONLY_TEMPLATE) if next_items else SEEN_TEMPLATES
        every = [*templates, *evaluation_templates]
        self.parts = [tokenizer.split_prompt(template) for template in every]
        self.uses_history = np.array([template.uses_history for template in every])
        self.names_user = np.array([template.names_user for template in every])
        self.training_pool, self.evaluation_pool = np.split(np.arange(len(every)), [len(templates)])
        # The templates for users without history. If all templates have a history, it is left empty.
        plain = np.flatnonzero(~self.uses_history)
        self.plain_pool = plain if len(plain) else np.arange(len(every))
        self.shuffle_history, self.next_items, self.num_negatives = shuffle_history, next_items, num_negatives
        # Tokens of a prompt without its history, [templates].
        self.static = np.array([sum(map(len, parts)) for parts in self.parts])
        self.static += self.names_user * self.user_tokens.shape[1]
        self.capacity = np.minimum((max_length - self.static) // self.item_tokens.shape[1], max_history)
        if (self.capacity[self.uses_history] < 1).any():
            raise ValueError(f"max_length={max_length} leaves no room for a single history item; raise it.")
        # Items of the longest history that a training prompt shows, [templates].
        self.training_capacity = np.minimum(train_history or max_history, self.capacity)

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Makes a batch, see the class.

        Raises:
            ValueError: the examples have lost their columns.
        """
        if "user" not in features[0]:
            raise ValueError(
                "the examples have no 'user': Trainer removes what the model's forward does not name; set "
                "remove_unused_columns=False in its TrainingArguments."
            )
        if "epoch" not in features[0]:
            raise ValueError("the examples have no 'epoch', which draws depend on; take those of a PromptDataset.")
        users = np.array([feature["user"] for feature in features])
        epoch = features[0]["epoch"]
        targets = np.array([feature["target"] for feature in features]) if "target" in features[0] else None
        template = self._templates(users, epoch, training=targets is None)
        shown, labels = self._shown(users, epoch, template, targets)
        batch = self._assemble(self.user_tokens[users], template, shown) | {"labels": torch.from_numpy(labels)}
        if self.num_negatives:
            negatives = self.interactions.sample_negatives(
                users, self.num_negatives, seed=self.seed, epoch=epoch, examples=users, first_draw=_NEGATIVES
            )
            batch["negative_ids"] = torch.from_numpy(negatives)
        return batch

    def prompt_lengths(self, users: np.ndarray, epoch: int) -> np.ndarray:
        """What T5 reads of each user's training prompt, int64 `[n]`, so that batches can be made of prompts of similar length.

        Tokens; or with `next_items`, where an item is one position, the interactions of the user.
        """
        if self.next_items:
            return self.interactions.lengths[users]
        found = []
        for part in np.split(users, range(LENGTHS_CHUNK, len(users), LENGTHS_CHUNK)):
            template = self._templates(part, epoch, training=True)
            shown, _ = self._shown(part, epoch, template, None)
            found.append(self.static[template] + shown.lengths * self.item_tokens.shape[1])
        return np.concatenate(found)

    def _shown(
        self, users: np.ndarray, epoch: int, template: np.ndarray, targets: np.ndarray | None
    ) -> tuple[Ragged, np.ndarray]:
        """The histories to show, and the labels `[B, P]`."""
        if self.next_items:
            return self._next_items(users, epoch, template, targets)
        if targets is not None:
            return self._whole_history(users, epoch, template, self.capacity), targets[:, None]
        past, _, wanted = self._split(users, epoch, template)
        sizes = np.where(self.uses_history[template], self.training_capacity[template], 0)
        return _latest(past, sizes), wanted.padded(IGNORED)

    def _templates(self, users: np.ndarray, epoch: int, training: bool) -> np.ndarray:
        """The template of each user, `[B]`; a template without history for users without history."""
        random = stateless_random(self.seed, epoch, users, 1, _TEMPLATE)[:, 0]
        pool = self.training_pool if training else self.evaluation_pool
        template = pool[bounded(random, len(pool))]
        short = self.interactions.lengths[users] < (2 if training else 1)
        plain = self.plain_pool[bounded(random, len(self.plain_pool))]
        return np.where(short & self.uses_history[template], plain, template)

    def _split(self, users: np.ndarray, epoch: int, template: np.ndarray) -> HistorySplit:
        """The interactions of each user, split into past and target."""
        histories = self.interactions.histories.take(users)
        longest = histories.lengths - 1
        if self.shuffle_history:
            longest = np.minimum(longest, self.training_capacity[template])
        known = (histories.lengths > 1) & self.uses_history[template]
        return split_histories(
            histories,
            users,
            longest_past=np.where(known, np.maximum(longest, 1), 0),
            num_targets=1,
            shuffle=self.shuffle_history,
            seed=self.seed,
            epoch=epoch,
            order_draw=_HISTORY_ORDER,
            size_draw=_HISTORY_SIZE,
        )

    def _next_items(
        self, users: np.ndarray, epoch: int, template: np.ndarray, targets: np.ndarray | None
    ) -> tuple[Ragged, np.ndarray]:
        """The histories to show and the labels `[B, 1 + S]`: the item that follows each position, or only the target."""
        if targets is not None:
            shown = self._whole_history(users, epoch, template, self.capacity)
            lengths, following = shown.lengths, targets
        else:
            # One more item than is shown, because the last one is a target only.
            whole = self._whole_history(users, epoch, template, self.training_capacity + 1)
            lengths = np.maximum(whole.lengths - 1, 0)
            is_last = whole.ranks == lengths[whole.rows]
            shown = Ragged.from_lengths(lengths, whole.values[~is_last])
            following = np.full(len(users), IGNORED)
            following[whole.rows[is_last]] = whole.values[is_last]
        labels = np.full((len(users), 1 + int(lengths.max())), IGNORED)
        if targets is None:
            labels[shown.rows, shown.ranks] = shown.values
        labels[np.arange(len(users)), lengths] = following
        return shown, labels

    def _whole_history(self, users: np.ndarray, epoch: int, template: np.ndarray, capacity: np.ndarray) -> Ragged:
        """The latest items, as many as `capacity` `[templates]` says."""
        histories = self.interactions.histories.take(users)
        kept = _latest(histories, np.where(self.uses_history[template], capacity[template], 0))
        if self.shuffle_history:
            positions = kept.ranks + (histories.lengths - kept.lengths)[kept.rows]
            order = shuffled_order(users, kept.rows, positions, self.seed, epoch, _HISTORY_ORDER)
            kept.values = kept.values[order]
        return kept

    def _assemble(self, user_tokens: np.ndarray, template: np.ndarray, history: Ragged) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of the prompts, `[B, T]`."""
        width, entity = self.item_tokens.shape[1], user_tokens.shape[1]
        length = self.static[template] + history.lengths * width
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


def _latest(histories: Ragged, sizes: np.ndarray) -> Ragged:
    """The last `sizes` `[B]` items of each history."""
    sizes = np.minimum(histories.lengths, sizes)
    kept = histories.ranks >= (histories.lengths - sizes)[histories.rows]
    return Ragged.from_lengths(sizes, histories.values[kept])
