"""What codes keep of collaborative vectors, without any T5: items ranked by cosine for users that are decoded from codes.

    python examples/paper/quantisers.py --dataset beauty --half-life 5

Trains the FISM of recipe `best` on the training interactions and quantises its vectors in several ways. Users are decoded from
their own codes, or made of items of which the codes tell a_i, what they say of a user (see `FISMModel`): each codeword stands
for a vector, fitted by least squares, and those of an item add up. The metrics are those of the validation items. Ten minutes
for `beauty` on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch

from tokenrec_hf import FISMModel, MQTokenizerModel, leave_one_out, load_interactions, load_recipe
from tokenrec_hf.data.splits import IndexedSplits, index_splits
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.training.stages import train_collaborative, train_mq_tokenizer

HERE = Path(__file__).parent
# Of recipe `best` before its codebooks were residual.
SIDE_BY_SIDE = {
    "config": {"codebook_size": "auto", "codebook_dim": 64, "hidden_dim": 256, "commitment_weight": 1.0},
    "evaluate_every": 3000,
    "training": {"max_steps": 3000, "per_device_train_batch_size": 256, "learning_rate": 0.001, "weight_decay": 0.01},
}


def main() -> None:
    """Trains, quantises, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --dataset NAME [...]"
    )
    parser.add_argument("--dataset", required=True, help="whatever `tokenrec train` takes")
    parser.add_argument("--half-life", type=float, help="of FISM; without it, order does not count")
    parser.add_argument("--output", type=Path, default=HERE / "tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = index_splits(leave_one_out(load_interactions(arguments.dataset)), "validation")
    rows = compare(data, arguments.half_life)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"quantisers-{Path(arguments.dataset).name}"
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


def compare(data: IndexedSplits, half_life: float | None) -> list[dict]:
    """A row for each way to represent users: `name`, `error` (the share of variance lost, of what is quantised) and metrics."""
    # One table, so that a history is a sum of one vector an item.
    changes = {"collaborative.config.half_life": half_life, "collaborative.config.recent_half_life": None}
    settings = load_recipe("best", overrides=changes)["collaborative"]
    with tempfile.TemporaryDirectory() as folder:
        fism = train_collaborative(data.interactions, settings, Path(folder), holdout=data.holdout).model
    users, items = fism.user_embeddings(), fism.item_embeddings()
    said = fism.history_table.weight.detach()  # a, [num_items, d]

    def row(name: str, represented: torch.Tensor, error: float = 0.0) -> dict:
        seen = data.interactions.of_users(data.holdout.users)
        found = evaluate_embeddings(represented[data.holdout.users], items, data.holdout.targets, *seen, cosine=True)
        return {"name": name, "error": error, **{metric: found[metric] for metric in ("hr@20", "ndcg@20")}}

    rows = [row("vectors of FISM", users)]
    for count, residual in ((4, False), (4, True), (8, True)):
        mq = quantise(users, count, residual)
        name = f"users from {count} codes, {'residual' if residual else 'K encoders side by side'}"
        rows.append(row(name, mq.decode(mq.encode(users)), mq.statistics(users)["reconstruction_error"]))
    for name, quantised in (("q, which they are retrieved by", items), ("a", said)):
        codes = quantise(quantised, 4, residual=True).encode(quantised)
        told = fitted(codes, said)
        lost = float((said - told).square().sum() / (said - said.mean(dim=0)).square().sum())
        rows.append(
            row(f"users from histories, a of items from 4 residual codes of {name}", with_table(fism, told), lost)
        )
    return rows


def quantise(vectors: torch.Tensor, count: int, residual: bool) -> MQTokenizerModel:
    """An MQ-Tokenizer of `count` codebooks, fit to `vectors` `[n, d]`."""
    settings = copy.deepcopy(SIDE_BY_SIDE)
    settings["config"] |= {"num_codebooks": count, "residual": residual}
    with tempfile.TemporaryDirectory() as folder:
        return train_mq_tokenizer(vectors, settings, Path(folder)).model


def fitted(codes: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """What `codes` `[n, K]` tell of `vectors` `[n, d]`: codewords that add up to them by (ridge) least squares, `[n, d]`."""
    size = int(codes.max()) + 1
    columns = codes + torch.arange(codes.shape[1]) * size
    chosen = torch.zeros(len(codes), codes.shape[1] * size).scatter_(1, columns, 1.0)
    mean = vectors.mean(dim=0)
    words = torch.linalg.solve(chosen.T @ chosen + torch.eye(chosen.shape[1]), chosen.T @ (vectors - mean))
    return chosen @ words + mean


def with_table(fism: FISMModel, table: torch.Tensor) -> torch.Tensor:
    """User vectors of a FISM whose items say `table` `[num_items, d]` of their users, `[num_users, d]`."""
    other = copy.deepcopy(fism)
    other.history_table.weight.data.copy_(table)
    return other.user_embeddings()


def markdown(rows: list[dict]) -> str:
    """The table."""
    lines = ["| | variance lost | HR@20 | NDCG@20 |", "|---|---:|---:|---:|"]
    lines += [f"| {row['name']} | {row['error']:.3f} | {row['hr@20']:.4f} | {row['ndcg@20']:.4f} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
