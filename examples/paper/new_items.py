"""The cost of folding in new items, measured on vectors alone, so that many items can be new at once.

    tokenrec train --dataset beauty --recipe best --output_dir beauty
    python examples/paper/new_items.py --repository beauty --share 0.3

FISM's rows of a random share of the items are deleted and estimated again from the histories of these items, as `tokenrec add`
does. The validation items are ranked among all items by cosine, for users with a new target and for all others. Three other
ways are compared: the rows as trained, the propagation that new items of other collaborative models get (`fold_in`; their
history vectors stay 0), and no rows for new items. The other rows were trained with the interactions of the new items, which
favours all ways equally.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tokenrec_hf import FISMModel, Repository, evaluate_embeddings
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import IndexedSplits, index_splits
from tokenrec_hf.models.modeling_collaborative import HistoryEncoder
from tokenrec_hf.models.recommender import load_history_encoder
from tokenrec_hf.training.closed_forms import fold_in, fold_in_items

# Name; vectors of users and items; mask of users with a new target.
Way = tuple[str, tuple[torch.Tensor, torch.Tensor], np.ndarray]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repository", required=True, type=Path, help="trained with recipe `best`")
    parser.add_argument("--share", type=float, default=0.3, help="share of new items (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of new items")
    arguments = parser.parse_args()
    repository = Repository(arguments.repository)
    has_refit = repository.selection.is_dir()
    encoder = load_history_encoder(repository.selection if has_refit else arguments.repository)
    if encoder is None:
        parser.error(f"{arguments.repository} has no FISM; train it with --recipe best.")
    data = index_splits(repository.splits(), "validation")
    print(f"{'':22} {'HR@20':>7} {'NDCG@20':>8}   new targets, HR@20 / NDCG@20   others")
    for name, (users, items), is_new in ways(encoder, data, arguments.share, arguments.seed):
        groups: list[np.ndarray] = [np.ones_like(is_new), is_new, ~is_new]
        found = [measure(users, items, data, group) for group in groups]
        print(
            f"{name:22} {found[0][0]:7.4f} {found[0][1]:8.4f}   "
            + "   ".join(f"{a:.4f} / {b:.4f}" for a, b in found[1:])
        )


def ways(encoder: HistoryEncoder, data: IndexedSplits, share: float, seed: int) -> Iterator[Way]:
    """Name, vectors of users and items, and a mask of users with a new validation item, for each way to estimate new items."""
    model, interactions = encoder.model, data.interactions
    assert isinstance(model, FISMModel)
    count = len(data.item_ids)
    new = np.zeros(count, dtype=bool)
    new[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    # Items with the new ones last.
    order = np.argsort(new, kind="stable")
    place = np.argsort(order)
    known = count - int(new.sum())
    rows = torch.from_numpy(encoder.items.rows([data.item_ids[item] for item in order]))
    trained = [module.weight.detach()[rows] for _, module in model.tables()]
    trained[1] = F.normalize(trained[1], dim=-1)
    with torch.no_grad():
        for (_, module), table in zip(model.tables(), trained):
            module.weight.copy_(table)
    users, items = interactions.users, place[interactions.items]
    folded = fold_in_items(model, users, items, known)
    silent = [torch.cat([table[:known], torch.zeros_like(table[known:])]) for table in trained]
    found = [
        torch.cat([table[:known], rows, torch.zeros(count - known - len(rows), table.shape[1])])
        for table, rows in zip(trained, folded)
    ]
    quiet_users = _users(model, silent, interactions, items)
    _, propagated = fold_in(quiet_users, silent[1][:known], users, items)
    is_new = new[data.holdout.targets]
    # No user is near an item with the opposite of the mean user vector.
    absent = torch.cat([silent[1][:known], -quiet_users.mean(dim=0).repeat(count - known, 1)])
    spread = torch.cat([silent[1][:known], propagated, torch.zeros(count - known - len(propagated), absent.shape[1])])
    yield "as trained", (_users(model, trained, interactions, items), trained[1][place]), is_new
    yield "not there", (quiet_users, absent[place]), is_new
    yield "propagated", (quiet_users, spread[place]), is_new
    yield "folded in", (_users(model, found, interactions, items), found[1][place]), is_new


def _users(
    model: FISMModel, tables: Sequence[torch.Tensor], interactions: InteractionMatrix, items: np.ndarray
) -> torch.Tensor:
    """User vectors p of these tables, `[num_users, d]`."""
    with torch.no_grad():
        for (_, module), table in zip(model.tables(), tables):
            module.weight.copy_(table)
    ages = np.repeat(interactions.indptr[1:], interactions.lengths) - 1 - np.arange(len(items))
    history = (torch.from_numpy(np.asarray(one)).long() for one in (interactions.users, items, ages))
    with torch.no_grad():
        return model.history_vectors(*history, interactions.num_users)


def measure(
    users: torch.Tensor, items: torch.Tensor, data: IndexedSplits, group: slice | np.ndarray
) -> tuple[float, float]:
    """HR@20 and NDCG@20 of a group of the holdout's users."""
    rows, targets = data.holdout.users[group], data.holdout.targets[group]
    seen = data.interactions.of_users(rows)
    found = evaluate_embeddings(users[torch.from_numpy(rows)], items, targets, *seen, cosine=True)
    return found["hr@20"], found["ndcg@20"]


if __name__ == "__main__":
    main()
