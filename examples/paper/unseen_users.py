"""Users and items that training has never seen, as in Table IV of TokenRec (arXiv 2406.10450).

    tokenrec train --dataset lastfm --output_dir lastfm
    python examples/paper/unseen_users.py --dataset lastfm --output_dir lastfm-unseen-users --reference lastfm
    python examples/paper/unseen_users.py --dataset lastfm --kind items --output_dir lastfm-unseen-items --reference lastfm

The 5 % of users with the shortest histories (or a random 5 % of items) are held out from all training: the collaborative model,
the MQ-Tokenizers and T5. Their interactions, without the test items, are then added by fold-in, as `tokenrec add` does (of
items with the whole histories of their users, as in a log), and the test items are ranked. This is stricter than the paper,
whose collaborative model has seen the users. The reference is a repository trained on all users and evaluated on the same ones.
The first run takes as long as `tokenrec train`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from tokenrec_hf import Recipe, Recommender, Repository, leave_one_out, load_interactions, train

TOP_K, BATCH = 20, 128


def main() -> None:
    """Trains without some users or items, adds them, and prints their metrics."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="a data set as in `tokenrec train`")
    parser.add_argument("--kind", choices=("users", "items"), default="users")
    parser.add_argument("--share", type=float, default=0.05, help="share of held-out users or items (default: 0.05)")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--reference", help="a repository trained on all of the same data")
    parser.add_argument("--recipe", default="best")
    parser.add_argument(
        "--no-refit", action="store_true", help="evaluate the model of the selection run, in half the time"
    )
    parser.add_argument(
        "--retrain", action="store_true", help="continue training the collaborative model with the new users or items"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of items")
    arguments = parser.parse_args()

    splits = leave_one_out(load_interactions(arguments.dataset))
    held_out = choose(splits, arguments.kind, arguments.share, arguments.seed)
    column = "user_id" if arguments.kind == "users" else "item_id"
    known = DatasetDict({name: split.filter(lambda row: row[column] not in held_out) for name, split in splits.items()})
    trained = arguments.output_dir / "trained"
    train(known, Recipe.load(arguments.recipe), trained, refit=not arguments.no_refit, log=print)

    seen = ("train",) if arguments.no_refit else ("train", "validation")
    rows = [pair for name in seen for pair in pairs(splits[name])]
    # Whole histories, so that the order of the new interactions in them is known.
    which = {user for user, item in rows if (user if arguments.kind == "users" else item) in held_out}
    new_rows = [(user, item) for user, item in rows if user in which]
    added = arguments.output_dir / "added"
    shutil.rmtree(added, ignore_errors=True)
    shutil.copytree(trained, added, ignore=shutil.ignore_patterns("selection"))
    weights = digest(added)
    started = time.perf_counter()
    report = Repository(added).add(interactions=as_dataset(new_rows), retrain=arguments.retrain)
    seconds = time.perf_counter() - started
    assert digest(added) == weights, "T5 has changed"

    histories: dict[str, list[str]] = {}
    for user, item in rows:
        histories.setdefault(user, []).append(item)
    targets = dict(pairs(splits["test"]))
    groups: dict[str, list[str]] = {"unseen": [], "seen": []}
    for user, item in targets.items():
        groups["unseen" if (user if arguments.kind == "users" else item) in held_out else "seen"].append(user)
    results = {"added": report, "seconds": seconds, "metrics": {}}
    for name, folder in (("added", added), ("reference", arguments.reference)):
        if folder:
            recommender = Recommender.from_pretrained(folder)
            results["metrics"][name] = {
                group: evaluate(recommender, users, histories, targets) for group, users in groups.items()
            }
    (arguments.output_dir / "unseen.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def choose(splits: DatasetDict, kind: str, share: float, seed: int) -> set[str]:
    """A share of the users, those with the fewest interactions (the first ones among equals), or of the items, at random."""
    column = "user_id" if kind == "users" else "item_id"
    ids = np.concatenate([split[column][:] for split in splits.values()])
    names, first, counts = np.unique(ids, return_index=True, return_counts=True)
    number = round(share * len(names))
    if kind == "users":
        return set(names[np.lexsort((first, counts))[:number]].tolist())
    return set(np.random.default_rng(seed).choice(names, number, replace=False).tolist())


def pairs(split: Dataset) -> list[tuple[str, str]]:
    """(user, item) of each interaction."""
    return list(zip(split["user_id"][:], split["item_id"][:]))


def as_dataset(rows: Sequence[tuple[str, str]]) -> Dataset:
    """Interactions as a data set, the inverse of `pairs`."""
    return Dataset.from_dict({"user_id": [user for user, _ in rows], "item_id": [item for _, item in rows]})


def digest(folder: Path) -> str:
    """The SHA-256 of T5's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def evaluate(
    recommender: Recommender, users: list[str], histories: dict[str, list[str]], targets: dict[str, str]
) -> dict[str, float]:
    """HR@20 and NDCG@20 of users, asked with their whole history, among all items that they have not seen."""
    ranks = []
    for start in range(0, len(users), BATCH):
        batch = users[start : start + BATCH]
        found = recommender.recommend(batch, [histories.get(user, []) for user in batch], top_k=TOP_K)
        for user, rows in zip(batch, found):
            items = [row["item"] for row in rows]
            ranks.append(items.index(targets[user]) if targets[user] in items else np.inf)
    gains = 1 / np.log2(np.array(ranks) + 2)
    return {"users": len(users), "hr@20": float(np.mean(np.isfinite(ranks))), "ndcg@20": float(np.mean(gains))}


def show(results: dict) -> None:
    """Prints the table."""
    print(f"\nadded in {results['seconds']:.2f} s: {results['added']}\n")
    print(f"{'':10} {'':7} {'users':>6} {'HR@20':>7} {'NDCG@20':>8}")
    for name, groups in results["metrics"].items():
        for group, values in groups.items():
            print(f"{name:10} {group:7} {values['users']:6} {values['hr@20']:7.4f} {values['ndcg@20']:8.4f}")


if __name__ == "__main__":
    main()
