"""How much four errors of the evaluation protocol change the numbers of one kind of model.

    python examples/paper/protocol_errors.py --dataset lastfm

LightGCN with the settings of recipe `paper` is trained by our protocol: length chosen on validation, refit on training +
validation, test items ranked among all items that the user has not interacted with. Each error is then made on its own, and
all four together, and the test metrics are compared. Nothing else differs: errors of the evaluation are measured on the same
weights. Three fits a seed; seeds that have a record are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from records import Job, Record, Recorded, Records
from report import PAIR, mean_and_spread, short_number, table_lines

from tokenrec_hf import LightGCNModel, RankingMetrics, Recipe, leave_one_out, load_interactions
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import IndexedSplits, index_splits
from tokenrec_hf.training.stages import train_collaborative

# The authors' code keeps the first items of a longer sequence and takes the last of these as the test target.
KEPT, BATCH = 51, 512


@dataclass
class Ranking:
    """Users, their targets, and the items left out of their rankings.

    Args:
        users: user rows, int64 `[n]`.
        targets: item rows, int64 `[n]`.
        indptr, seen: masked items of the n users, as CSR rows.
    """

    users: np.ndarray
    targets: np.ndarray
    indptr: np.ndarray
    seen: np.ndarray

    def of(self, chosen: np.ndarray) -> Ranking:
        """The users where boolean `chosen` `[n]` is true."""
        lengths = np.diff(self.indptr)
        return Ranking(
            self.users[chosen],
            self.targets[chosen],
            np.concatenate([[0], np.cumsum(lengths[chosen])]),
            self.seen[np.repeat(chosen, lengths)],
        )


def main() -> None:
    """Measures the seeds that have no record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="lastfm", help="a data set as in `tokenrec train`")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: %(default)s)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("out-paper"), help="checkpoints")
    arguments = parser.parse_args()
    records = Records(arguments.results)
    missing = [seed for seed in range(arguments.seeds) if not records.find(job(arguments.dataset, seed))]
    if missing:
        splits = leave_one_out(load_interactions(arguments.dataset))
        selection, refit = index_splits(splits, "validation"), index_splits(splits, "test")
        for seed in missing:
            folder = arguments.work / arguments.dataset / f"protocol-errors-seed{seed}"
            records.put(arguments.dataset, [run(arguments.dataset, selection, refit, folder, seed)])
            print(f"seed {seed} done", flush=True)
    found = Recorded(arguments.results)
    print("\n".join(table([found(job(arguments.dataset, seed)) for seed in range(arguments.seeds)])))


def job(dataset: str, seed: int) -> Job:
    """The job by which a seed's record is found."""
    return Job(dataset, "protocol-errors", "test", seed)


def run(dataset: str, selection: IndexedSplits, refit: IndexedSplits, folder: Path, seed: int) -> Record:
    """The record of a seed.

    Args:
        dataset: its name.
        selection, refit: training interactions and validation items; training + validation interactions and test items.
        folder: checkpoints of the three fits.
        seed: seed of the fits.
    """
    indptr, seen = refit.interactions.of_users(refit.holdout.users)
    true = Ranking(refit.holdout.users, refit.holdout.targets, indptr, seen)
    cut = cut_first(true, refit.interactions)
    long = cut.targets != true.targets
    models, epochs = fit(selection, refit, folder, seed)
    return {
        "job": asdict(job(dataset, seed)),
        "metrics": measure(models, true, cut, long),
        "epochs": epochs,
        "users": len(true.users),
        "items": refit.interactions.num_items,
        "cut_users": int(long.sum()),
    }


def cut_first(true: Ranking, trained_on: InteractionMatrix) -> Ranking:
    """The authors' targets: of a sequence of more than `KEPT` items, the last of the first `KEPT`; the items before are masked."""
    lengths = np.diff(true.indptr)
    long = lengths + 1 > KEPT
    targets = true.targets.copy()
    targets[long] = trained_on.items[trained_on.indptr[true.users[long]] + KEPT - 1]
    row = np.repeat(np.arange(len(lengths)), lengths)
    masked = ~long[row] | (np.arange(len(true.seen)) - true.indptr[row] < KEPT - 1)
    indptr = np.concatenate([[0], np.cumsum(np.where(long, KEPT - 1, lengths))])
    return Ranking(true.users, targets, indptr, true.seen[masked])


def fit(
    selection: IndexedSplits, refit: IndexedSplits, folder: Path, seed: int
) -> tuple[dict[str, LightGCNModel], dict[str, float]]:
    """The models whose lengths are chosen on `validation` and on `test`, and their epochs."""
    settings = Recipe.load("paper").collaborative
    validated = train_collaborative(
        selection.interactions, settings, folder / "selection", holdout=selection.holdout, seed=seed
    )
    ours = train_collaborative(refit.interactions, settings, folder / "refit", epochs=validated.epochs, seed=seed)
    leaked = train_collaborative(refit.interactions, settings, folder / "leaked", holdout=refit.holdout, seed=seed)
    models = {"validation": ours.model, "test": leaked.model}
    return models, {"validation": validated.epochs, "test": leaked.epochs}


def measure(models: Mapping[str, LightGCNModel], true: Ranking, cut: Ranking, long: np.ndarray) -> dict[str, dict]:
    """The test metrics of each row of the table."""
    ours, leaked = models["validation"], models["test"]
    final = ours.user_embeddings(), ours.item_embeddings()
    first, leaked_first = (
        (model.user_table.weight.detach(), model.item_table.weight.detach()) for model in (ours, leaked)
    )
    leaked_final = leaked.user_embeddings(), leaked.item_embeddings()
    return {
        "our protocol, dot product": rank(final, true),
        "our protocol, cosine": rank(final, true, cosine=True),
        "layer-0 tables, dot product": rank(first, true),
        "layer-0 tables, cosine": rank(first, true, cosine=True),
        "histories cut first, dot product": rank(final, cut),
        "histories cut first, cosine": rank(final, cut, cosine=True),
        "checkpoint chosen on test, dot product": rank(leaked_final, true),
        "checkpoint chosen on test, cosine": rank(leaked_final, true, cosine=True),
        "seen items scored 0, cosine": rank(final, true, cosine=True, seen_score=0.0),
        "all four together, cosine": rank(leaked_first, cut, cosine=True, seen_score=0.0),
        "users with a cut history, true target, dot product": rank(final, true.of(long)),
        "users with a cut history, cut target, dot product": rank(final, cut.of(long)),
    }


def rank(
    vectors: tuple[torch.Tensor, torch.Tensor], asked: Ranking, cosine: bool = False, seen_score: float = -torch.inf
) -> dict[str, float]:
    """HR@K and NDCG@K of vectors of all users and items; masked items get the score `seen_score`."""
    users, items = (torch.nn.functional.normalize(one) if cosine else one for one in vectors)
    metrics = RankingMetrics(len(items), (10, 20))
    for start in range(0, len(asked.users), BATCH):
        end = min(start + BATCH, len(asked.users))
        scores = users[torch.from_numpy(asked.users[start:end])] @ items.T
        rows = np.repeat(np.arange(end - start), np.diff(asked.indptr[start : end + 1]))
        scores[rows, asked.seen[asked.indptr[start] : asked.indptr[end]]] = seen_score
        metrics.update(scores, asked.targets[start:end])
    return metrics.compute()


def table(records: Sequence[Record]) -> list[str]:
    """The lines of the table: mean and standard deviation over seeds, dot product and cosine side by side."""
    ways: dict[str, list[str]] = {}
    for name in records[0]["metrics"]:
        error, _, way = name.rpartition(", ")
        ways.setdefault(error, []).append(way)
    body = []
    for error, names in ways.items():
        cells = []
        for metric in PAIR:
            found = [mean_and_spread([one["metrics"][f"{error}, {way}"][metric] for one in records]) for way in names]
            cells.append(" / ".join(f"{short_number(mean)} ± {short_number(spread)}" for mean, spread in found))
        body.append([f"{error}, {' / '.join(names)}", *cells])
    return table_lines(["", *(metric.upper() for metric in PAIR)], body)


if __name__ == "__main__":
    main()
