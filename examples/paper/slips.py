"""What slips of the evaluation protocol do to the numbers of one and the same kind of model.

    python examples/paper/slips.py --dataset lastfm

LightGCN with the settings of the recipe `cpu` is trained by our protocol: length chosen on validation, refit on training +
validation, test items ranked among all items that the user has not interacted with. Then each slip is made on its own, and
all together, and the test numbers are compared. Nothing else differs: where a slip is in the evaluation, the weights are the
same ones. Three fits a seed, kept in the work folder, so that a second call only evaluates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenrec_hf import LightGCNModel, RankingMetrics, leave_one_out, load_interactions, load_recipe
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.training.stages import train_collaborative

TABLES = Path(__file__).parent / "tables"
SHOWN = ("hr@10", "hr@20", "ndcg@20")
# Of a longer sequence the authors' code keeps the first items, and takes the last of these for the test target.
KEPT, BATCH = 51, 512


@dataclass
class Ranking:
    """Who is asked for what, and what is taken out of the competition.

    Args:
        users: user rows, int64 `[n]`.
        targets: item rows, int64 `[n]`.
        indptr, seen: items of the n users that the mask covers, as CSR rows.
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
    """Trains, evaluates with and without each slip, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="lastfm", help="whatever `tokenrec train` takes")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default: %(default)s)")
    parser.add_argument("--work_dir", type=Path, help="for the fitted models (default: out-slips-<dataset>)")
    arguments = parser.parse_args()
    work_dir = arguments.work_dir or Path(f"out-slips-{arguments.dataset}")
    splits = leave_one_out(load_interactions(arguments.dataset))
    selection, refit = index_splits(splits, "validation"), index_splits(splits, "test")
    indptr, seen = refit.interactions.of_users(refit.holdout.users)
    true = Ranking(refit.holdout.users, refit.holdout.targets, indptr, seen)
    cut = cut_first(true, refit.interactions)
    long = cut.targets != true.targets

    runs = []
    for seed in range(arguments.seeds):
        models, epochs = fit(selection, refit, work_dir / f"seed-{seed}", seed)
        rows = measure(models, true, cut, long)
        runs.append({"seed": seed, "epochs": epochs, "results": rows})
        print(f"seed {seed}: {epochs}", flush=True)
    document = {
        "dataset": arguments.dataset,
        "users": len(true.users),
        "items": refit.interactions.num_items,
        "cut_users": int(long.sum()),
        "runs": runs,
    }
    TABLES.mkdir(exist_ok=True)
    path = TABLES / f"slips-{arguments.dataset}"
    path.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(document))
    print(table(document))


def cut_first(true: Ranking, trained_on: InteractionMatrix) -> Ranking:
    """The authors' targets: of a sequence of more than `KEPT` items the last of the first `KEPT`, the ones before as mask."""
    lengths = np.diff(true.indptr)
    long = lengths + 1 > KEPT
    targets = true.targets.copy()
    targets[long] = trained_on.items[trained_on.indptr[true.users[long]] + KEPT - 1]
    row = np.repeat(np.arange(len(lengths)), lengths)
    masked = ~long[row] | (np.arange(len(true.seen)) - true.indptr[row] < KEPT - 1)
    indptr = np.concatenate([[0], np.cumsum(np.where(long, KEPT - 1, lengths))])
    return Ranking(true.users, targets, indptr, true.seen[masked])


def fit(selection, refit, folder: Path, seed: int) -> tuple[dict[str, LightGCNModel], dict[str, float]]:
    """The model of our protocol and the one whose length is chosen on the test items, with their epochs."""
    settings = load_recipe("cpu")["collaborative"]
    record = folder / "epochs.json"
    if not record.is_file():
        validated = train_collaborative(
            selection.interactions, settings, folder / "checkpoints" / "selection", holdout=selection.holdout, seed=seed
        )
        ours = train_collaborative(
            refit.interactions, settings, folder / "checkpoints" / "refit", epochs=validated.epochs, seed=seed
        )
        leaked = train_collaborative(
            refit.interactions, settings, folder / "checkpoints" / "leaked", holdout=refit.holdout, seed=seed
        )
        ours.model.save_pretrained(folder / "validation")
        leaked.model.save_pretrained(folder / "test")
        record.write_text(json.dumps({"validation": validated.epochs, "test": leaked.epochs}) + "\n")
    epochs = json.loads(record.read_text())
    return {name: LightGCNModel.from_pretrained(folder / name) for name in epochs}, epochs


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
        "(a) layer-0 tables, dot product": rank(first, true),
        "(a) layer-0 tables, cosine": rank(first, true, cosine=True),
        "(b) histories cut first, dot product": rank(final, cut),
        "(b) histories cut first, cosine": rank(final, cut, cosine=True),
        "(c) checkpoint chosen on test, dot product": rank(leaked_final, true),
        "(c) checkpoint chosen on test, cosine": rank(leaked_final, true, cosine=True),
        "(d) seen items scored 0, cosine": rank(final, true, cosine=True, seen_score=0.0),
        "(a) to (d) together, cosine": rank(leaked_first, cut, cosine=True, seen_score=0.0),
        "cut users only, true target, dot product": rank(final, true.of(long)),
        "cut users only, cut target, dot product": rank(final, cut.of(long)),
    }


def rank(
    vectors: tuple[torch.Tensor, torch.Tensor], asked: Ranking, cosine: bool = False, seen_score: float = -torch.inf
) -> dict[str, float]:
    """HR@K and NDCG@K of vectors of all users and items, `seen_score` in the place of the score of what is masked."""
    users, items = (torch.nn.functional.normalize(one) if cosine else one for one in vectors)
    metrics = RankingMetrics(len(items), (10, 20))
    for start in range(0, len(asked.users), BATCH):
        end = min(start + BATCH, len(asked.users))
        scores = users[torch.from_numpy(asked.users[start:end])] @ items.T
        rows = np.repeat(np.arange(end - start), np.diff(asked.indptr[start : end + 1]))
        scores[rows, asked.seen[asked.indptr[start] : asked.indptr[end]]] = seen_score
        metrics.update(scores, asked.targets[start:end])
    return metrics.compute()


def table(document: Mapping) -> str:
    """Markdown: mean and standard deviation over seeds, and the change of HR@20 by the slip."""
    runs = document["runs"]
    lines = [
        f"`{document['dataset']}`: {document['users']} users, {document['items']} items, LightGCN of the recipe `cpu`, "
        f"{len(runs)} seeds, test items, full ranking; mean ± standard deviation. "
        f"{document['cut_users']} users have more than {KEPT} interactions, so that (b) gives them another target.",
        "",
        f"| | {' | '.join(name.upper() for name in SHOWN)} | HR@20 against our protocol |",
        "|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for name in runs[0]["results"]:
        values = {key: np.array([run["results"][name][key] for run in runs]) for key in SHOWN}
        cells = [f"{value.mean():.4f} ± {value.std(ddof=1) if len(runs) > 1 else 0:.4f}" for value in values.values()]
        measure = name.rpartition(", ")[2]
        ours = np.mean([run["results"][f"our protocol, {measure}"]["hr@20"] for run in runs])
        change = "" if name.startswith(("our", "cut")) else f"{values['hr@20'].mean() / ours - 1:+.0%}"
        lines.append(f"| {name} | {' | '.join(cells)} | {change} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
