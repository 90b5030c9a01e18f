"""How much of the collaborative vectors the codes keep: metrics of quantised vectors, without any T5, on validation.

    python examples/paper/quantisers.py --dataset beauty --half-life 5

Trains the FISM of recipe `best` on the training interactions and quantises its vectors in several ways. Users are decoded from
their own codes, or summed from histories whose item vectors a_i (see `FISMModel`) are reconstructed from item codes: each
codeword stands for a vector, fitted by least squares, and the vectors of an item's codewords add up. The metrics are those of
the validation items. Ten minutes for `beauty` on one core.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from records import Job, Records
from report import PAIR, table_lines

from tokenrec_hf import FISMModel, MQTokenizerModel, Recipe, leave_one_out, load_interactions
from tokenrec_hf.data.splits import IndexedSplits, index_splits
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.training.stages import train_collaborative, train_mq_tokenizer

# Changes of recipe `best`: a single history table, so that a user vector is a sum of one vector for each item of the history,
# and the settings of K encoders side by side, the paper's quantiser.
CHANGES: dict[str, Any] = {
    "collaborative.config.recent_half_life": None,
    "mq_tokenizer.config.codebook_dim": 64,
    "mq_tokenizer.config.hidden_dim": 256,
    "mq_tokenizer.config.commitment_weight": 1.0,
    "mq_tokenizer.evaluate_every": 3000,
    "mq_tokenizer.training.learning_rate": 0.001,
    "mq_tokenizer.training.weight_decay": 0.01,
    # No T5 is trained; with history pooling, the recipe refuses codes that are not residual.
    "retrieval.config.pooling": "decoder",
}


def main() -> None:
    """Trains, quantises, adds the record and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --dataset NAME [...]"
    )
    parser.add_argument("--dataset", required=True, help="a data set as in `tokenrec train`")
    parser.add_argument("--half-life", type=float, help="of FISM; without it, order does not count")
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the records")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = index_splits(leave_one_out(load_interactions(arguments.dataset)), "validation")
    rows = compare(data, arguments.half_life)
    record = {"job": asdict(job(arguments.dataset, arguments.half_life)), "rows": rows}
    Records(arguments.results).put(arguments.dataset, [record])
    print("\n".join(table(rows)))


def job(dataset: str, half_life: float | None) -> Job:
    """The job by which the record is found."""
    return Job(dataset, "quantisers", "validation", settings={"half_life": half_life})


def compare(data: IndexedSplits, half_life: float | None) -> list[dict[str, Any]]:
    """A row for each representation of users: `name`, `error` (share of the variance lost by quantising) and metrics."""
    settings = Recipe.load("best", overrides={**CHANGES, "collaborative.config.half_life": half_life}).collaborative
    with tempfile.TemporaryDirectory() as folder:
        fism = train_collaborative(data.interactions, settings, Path(folder), holdout=data.holdout).model
    assert isinstance(fism, FISMModel)
    users, items = fism.user_embeddings(), fism.item_embeddings()
    history = fism.history_table.weight.detach()  # a, [num_items, d]

    def row(name: str, represented: torch.Tensor, error: float = 0.0) -> dict[str, Any]:
        seen = data.interactions.of_users(data.holdout.users)
        found = evaluate_embeddings(represented[data.holdout.users], items, data.holdout.targets, *seen, cosine=True)
        return {"name": name, "error": error, **{metric: found[metric] for metric in PAIR}}

    rows = [row("vectors of FISM", users)]
    for count, residual in ((4, False), (4, True), (8, True)):
        mq = quantise(users, count, residual)
        name = f"users from {count} codes, {'residual' if residual else 'K encoders side by side'}"
        error = float(mq.statistics(users)["reconstruction_error"])
        rows.append(row(name, mq.decode(mq.encode(users)), error))
    for name, quantised in (("q, their retrieval vectors", items), ("a", history)):
        codes = quantise(quantised, 4, residual=True).encode(quantised)
        rebuilt = fitted(codes, history)
        lost = float((history - rebuilt).square().sum() / (history - history.mean(dim=0)).square().sum())
        rows.append(
            row(
                f"users from histories, with a of items from 4 residual codes of {name}",
                with_table(fism, rebuilt),
                lost,
            )
        )
    return rows


def quantise(vectors: torch.Tensor, count: int, residual: bool) -> MQTokenizerModel:
    """An MQ-Tokenizer of `count` codebooks, fit to `vectors` `[n, d]`."""
    chosen = {"mq_tokenizer.config.num_codebooks": count, "mq_tokenizer.config.residual": residual}
    settings = Recipe.load("best", overrides={**CHANGES, **chosen}).mq_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        # Of items, so that `user_codebooks` of the recipe does not apply.
        return train_mq_tokenizer(vectors, settings, Path(folder), kind="item").model


def fitted(codes: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Reconstruction of `vectors` `[n, d]` from `codes` `[n, K]` by codewords that add up, by ridge regression, `[n, d]`."""
    size = int(codes.max()) + 1
    columns = codes + torch.arange(codes.shape[1]) * size
    chosen = torch.zeros(len(codes), codes.shape[1] * size).scatter_(1, columns, 1.0)
    mean = vectors.mean(dim=0)
    words = torch.linalg.solve(chosen.T @ chosen + torch.eye(chosen.shape[1]), chosen.T @ (vectors - mean))
    return chosen @ words + mean


def with_table(fism: FISMModel, table: torch.Tensor) -> torch.Tensor:
    """User vectors of a FISM with history vectors a = `table` `[num_items, d]`, `[num_users, d]`."""
    other = copy.deepcopy(fism)
    other.history_table.weight.data.copy_(table)
    return other.user_embeddings()


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table."""
    body = [[row["name"], f"{row['error']:.3f}", f"{row['hr@20']:.4f}", f"{row['ndcg@20']:.4f}"] for row in rows]
    return table_lines(["", "variance lost", "HR@20", "NDCG@20"], body, numbers=True)


if __name__ == "__main__":
    main()
