"""What the stages train on: interactions, histories and vectors as data sets whose batches are fetched whole.

Works on rows. Every random choice depends on seed and epoch only, so batches do not depend on interruptions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..data.interaction_matrix import InteractionMatrix, bounded, stateless_random
from ..data.splits import Holdout
from ..models.modeling_collaborative import CollaborativeModel

# Targets of an ordered history: few enough that they still are what comes next.
NEXT_ITEMS = 5


class _Drawn:
    """Something that is drawn anew in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of this epoch."""
        self.epoch = epoch


class InteractionDataset(_Drawn, Dataset):
    """Batches of interactions with negatives, fetched whole.

    Args:
        interactions: where positives come from, and what a negative must not be in.
        num_negatives: un-interacted items per interaction; 0 for none.
        seed: of the negatives.
        holdout: pairs to go through in place of the interactions themselves (evaluation).
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
    """Batches of users with their histories split into what is known and what is to be found, fetched whole.

    Args:
        interactions: in time order for each user; users with fewer than two are left out.
        ordered: split into a past of random length and the `NEXT_ITEMS` items that follow it; else at random.
        seed: of the splits.
    """

    def __init__(self, interactions: InteractionMatrix, ordered: bool, seed: int):
        self.interactions, self.ordered, self.seed = interactions, ordered, seed
        self.users = np.flatnonzero(interactions.lengths > 1)

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch of the users numbered `rows`: the inputs of [`FISMModel`], `labels` `[B, P]`."""
        users = self.users[np.asarray(rows)]
        indptr, items = self.interactions.of_users(users)
        lengths = np.diff(indptr)
        row = np.repeat(np.arange(len(users)), lengths)
        rank = np.arange(len(items)) - indptr[row]
        ages = lengths[row] - 1 - rank
        size = 1 + bounded(stateless_random(self.seed, self.epoch, users, 1)[:, 0], lengths - 1)
        if self.ordered:
            ages, last = size[row] - 1 - rank, np.minimum(size + NEXT_ITEMS, lengths)
        else:
            element = users[row].astype(np.uint64) << np.uint64(32) | rank.astype(np.uint64)
            shuffled = np.lexsort((stateless_random(self.seed, self.epoch, element, 1, 1)[:, 0], row))
            items, ages, last = items[shuffled], ages[shuffled], lengths
        known, wanted = rank < size[row], (rank >= size[row]) & (rank < last[row])
        labels = np.full((len(users), (last - size).max()), -100)
        labels[row[wanted], (rank - size[row])[wanted]] = items[wanted]
        batch = {
            "user_ids": users,
            "labels": labels,
            "history_rows": row[known],
            "history_items": items[known],
            "history_ages": ages[known],
        }
        return {name: torch.from_numpy(value) for name, value in batch.items()}


class VectorDataset(Dataset):
    """Batches of vectors, fetched whole; the labels are the vectors themselves, so that `Trainer` evaluates."""

    def __init__(self, vectors: torch.Tensor):
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The rows numbered `rows`, `[B, d]`."""
        return {"vectors": self.vectors[rows], "labels": self.vectors[rows]}


class LengthGroupedSampler(_Drawn, Sampler[int]):
    """A random order in which examples of like length are together, so that batches carry little padding.

    Of `GROUP` batches drawn at random the examples are sorted, and the batches are shuffled. The order depends on seed and epoch
    alone, so that a resumed epoch goes on where it was.

    Args:
        lengths: of the examples, `[n]`.
        batch_size: examples of a batch.
        seed: of the order.
    """

    GROUP = 50

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        group = np.arange(len(order)) // (self.batch_size * self.GROUP)
        order = order[np.lexsort((self.lengths[order], group))]
        whole = len(order) - len(order) % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        # The batch that is not full has to be the last one.
        return iter(np.concatenate([batches[random.permutation(len(batches))].ravel(), order[whole:]]).tolist())


@torch.no_grad()
def past_user_embeddings(
    model: CollaborativeModel, interactions: InteractionMatrix, copies: int, seed: int = 0
) -> torch.Tensor:
    """User vectors p of parts of the histories, divided as in training.

    Args:
        model: gives the vectors.
        interactions: the histories; users with fewer than two items are left out.
        copies: random parts of each history.
        seed: of the divisions.

    Returns:
        `[copies * users, d]`, of length 1.
    """
    dataset = HistoryDataset(interactions, model.ordered_histories, seed)
    found = [torch.empty(0, model.config.embedding_dim)]
    for epoch in range(copies if len(dataset) else 0):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(list(range(len(dataset))))
        rows, items, ages = (batch[f"history_{name}"] for name in ("rows", "items", "ages"))
        found.append(model.history_vectors(rows, items, ages, len(dataset)))
    return torch.cat(found)
