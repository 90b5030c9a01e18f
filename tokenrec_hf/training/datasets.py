"""The data sets of the training stages: interactions, histories and vectors, with batches that are fetched whole.

All data sets work on rows. Every random choice depends on seed and epoch only, so batches do not depend on interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..data.collator import IGNORED
from ..data.history_split import split_histories
from ..data.interaction_matrix import InteractionMatrix
from ..data.splits import Holdout
from ..models.modeling_collaborative import CollaborativeModel

# Targets of an ordered history: few enough that they are the next items.
NEXT_ITEMS = 5

_HISTORY_SIZE, _HISTORY_ORDER, _NEGATIVES = 0, 1, 16


class _Drawn:
    """A data set or order that is drawn anew in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass."""
        self.epoch = epoch


class InteractionDataset(_Drawn, Dataset):
    """Batches of interactions with negatives.

    Args:
        interactions: the positives. A negative is never one of them.
        num_negatives: m, un-interacted items for each interaction; 0 for none.
        seed: seed of the negatives.
        holdout: pairs to iterate over instead of the interactions (evaluation).
    """

    def __init__(self, interactions: InteractionMatrix, num_negatives: int, seed: int, holdout: Holdout | None = None):
        self.interactions, self.num_negatives, self.seed = interactions, num_negatives, seed
        self.users, self.items = (
            (interactions.users, interactions.items) if holdout is None else (holdout.users, holdout.targets)
        )

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch of the interactions numbered `rows`: `user_ids`, `labels` `[B]` and `negative_ids` `[B, m]`."""
        chosen = np.asarray(rows)
        users = self.users[chosen]
        batch = {"user_ids": torch.from_numpy(users), "labels": torch.from_numpy(self.items[chosen])}
        if self.num_negatives:
            negatives = self.interactions.sample_negatives(
                users, self.num_negatives, seed=self.seed, epoch=self.epoch, examples=chosen
            )
            batch["negative_ids"] = torch.from_numpy(negatives)
        return batch


class HistoryDataset(_Drawn, Dataset):
    """Batches of users with their histories split into a past and targets.

    Args:
        interactions: in time order for each user. Users with fewer than two interactions are left out.
        ordered: split into a past of random length and the `NEXT_ITEMS` items that follow it; else at random, and all
            other items are targets.
        num_negatives: m, un-interacted items for each user; 0 for none.
        seed: seed of the splits and the negatives.
    """

    def __init__(self, interactions: InteractionMatrix, ordered: bool, num_negatives: int, seed: int):
        self.interactions, self.ordered, self.num_negatives, self.seed = interactions, ordered, num_negatives, seed
        self.users = np.flatnonzero(interactions.lengths > 1)

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch of the users numbered `rows`: the inputs of [`FISMModel`], with `labels` `[B, P]` and `negative_ids` `[B, m]`."""
        users = self.users[np.asarray(rows)]
        histories = self.interactions.histories.take(users)
        past, positions, targets = split_histories(
            histories,
            users,
            longest_past=histories.lengths - 1,
            num_targets=NEXT_ITEMS if self.ordered else histories.lengths,
            shuffle=not self.ordered,
            seed=self.seed,
            epoch=self.epoch,
            order_draw=_HISTORY_ORDER,
            size_draw=_HISTORY_SIZE,
        )
        # An item is as old as the number of items after it: in the past, or, without order, in the whole history.
        newest = (past if self.ordered else histories).lengths - 1
        batch = {
            "user_ids": users,
            "labels": targets.padded(IGNORED),
            "history_rows": past.rows,
            "history_items": past.values,
            "history_ages": newest[past.rows] - positions,
        }
        if self.num_negatives:
            batch["negative_ids"] = self.interactions.sample_negatives(
                users, self.num_negatives, seed=self.seed, epoch=self.epoch, examples=users, first_draw=_NEGATIVES
            )
        return {name: torch.from_numpy(value) for name, value in batch.items()}


class VectorDataset(Dataset):
    """Batches of vectors. The labels are the vectors themselves, so that `Trainer` evaluates.

    Args:
        vectors: `[n, d]`.
    """

    def __init__(self, vectors: torch.Tensor):
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The rows numbered `rows`, `[B, d]`."""
        return {"vectors": self.vectors[rows], "labels": self.vectors[rows]}


class LengthGroupedSampler(_Drawn, Sampler[int]):
    """A random order that puts examples of similar length into the same batch, so that batches have little padding.

    The examples of `GROUP` batches, drawn at random, are sorted by length. Then the batches are shuffled. The order
    depends on seed and epoch only, so a resumed epoch continues where it stopped.

    Args:
        lengths: gives the lengths of the examples in an epoch, int `[n]`.
        num_examples: n.
        batch_size: examples of a batch.
        seed: seed of the order.
    """

    GROUP = 50

    def __init__(self, lengths: Callable[[int], np.ndarray], num_examples: int, batch_size: int, seed: int):
        self.lengths, self.num_examples, self.batch_size, self.seed = lengths, num_examples, batch_size, seed

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.num_examples)
        group = np.arange(len(order)) // (self.batch_size * self.GROUP)
        order = order[np.lexsort((self.lengths(self.epoch)[order], group))]
        whole = len(order) - len(order) % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        # The batch that is not full has to be the last one.
        return iter(np.concatenate([batches[random.permutation(len(batches))].ravel(), order[whole:]]).tolist())


@torch.no_grad()
def past_user_embeddings(
    model: CollaborativeModel, interactions: InteractionMatrix, copies: int, seed: int = 0
) -> torch.Tensor:
    """User vectors p of parts of the histories, split as in training.

    Args:
        model: computes the vectors.
        interactions: the histories. Users with fewer than two items are left out.
        copies: number of random parts of each history.
        seed: seed of the splits.

    Returns:
        `[copies * users, d]`, of length 1.
    """
    dataset = HistoryDataset(interactions, model.ordered_histories, 0, seed)
    found = [torch.empty(0, model.config.embedding_dim)]
    for epoch in range(copies if len(dataset) else 0):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(list(range(len(dataset))))
        rows, items, ages = (batch[f"history_{name}"] for name in ("rows", "items", "ages"))
        found.append(model.history_vectors(rows, items, ages, len(dataset)))
    return torch.cat(found)
