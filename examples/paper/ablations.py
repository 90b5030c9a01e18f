"""Table VI and figures 4 and 5 of TokenRec (arXiv 2406.10450): ablations, on validation.

    python examples/paper/ablations.py --study table6 --dataset lastfm --seeds 3
    python examples/paper/ablations.py --study figure4 --dataset lastfm --plot figure4.png
    python examples/paper/ablations.py --study figure5 --dataset lastfm
    python examples/paper/ablations.py --study best --dataset ml-100k

Table VI removes the graph (matrix factorisation instead of LightGCN), the K ways (one codebook of as many codewords) and the
mask. Figure 4 varies the mask's share rho, figure 5 the number K of codebooks and their size L. All use the paper's quantiser
on recipe `paper` with shorter stages, short histories and a small T5 from scratch with a softmax (`SHORT`), so that a run takes
a minute or two on one CPU core; compare these numbers with each other only. `best` is not a study of the paper: it removes the
parts of recipe `best` one at a time. No study evaluates on the test items. Runs that have records are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Answer, Fits, settings_of
from records import Job
from report import PAIR, mean_and_spread, table_lines

from tokenrec_hf import Recipe

# Other evaluations shown of the study `best`: prompts of a history only, and vectors without T5.
OTHERS = {"tokenrec_history_only": "history only", "collaborative_cosine": "vectors"}
SHORT = {
    "collaborative.training.num_train_epochs": 40,
    "mq_tokenizer.training.max_steps": 1000,
    "retrieval.backbone": None,
    "retrieval.num_negatives": 0,
    "retrieval.config": {
        "d_model": 128,
        "d_kv": 32,
        "num_heads": 4,
        "d_ff": 256,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "projection_dim": 512,
        "loss_type": "softmax",
    },
    "retrieval.training": {"num_train_epochs": 30, "learning_rate": 0.003, "warmup_steps": 50},
    "prompts.max_history": 20,
    "prompts.train_history": 20,
}
_K, _L, _RHO = (f"mq_tokenizer.config.{name}" for name in ("num_codebooks", "codebook_size", "mask_ratio"))
# Changes of each variant; the whole has K = 3, L = 256 and rho = 0.2.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "table6": {
        "whole": {},
        "without HOCK": {
            "collaborative.model": "matrix_factorization",
            # From the grid of the baseline MF.
            "collaborative.config.l2_weight": 0.01,
        },
        "without K ways": {_K: 1, _L: 768},
        "without mask": {_RHO: 0.0},
    },
    "figure4": {f"rho = {rho:g}": {_RHO: rho} if rho != 0.2 else {} for rho in (0.0, 0.2, 0.5, 0.8)},
    "figure5": {
        **{f"K = {count}": {_K: count} if count != 3 else {} for count in (1, 2, 3, 4)},
        **{f"L = {size}": {_L: size} if size != 256 else {} for size in (128, 256, 512)},
    },
    "best": {
        "whole": {},
        "16 codes a user instead of 32": {"mq_tokenizer.user_codebooks": 16},
        "8 codes an item of small codebooks": {
            "mq_tokenizer.config.num_codebooks": 8,
            "mq_tokenizer.config.codebook_size": 512,
            "prompts.max_length": 1280,
        },
        "without smoothing": {
            "collaborative.config.history_smoothing": 0.0,
            "collaborative.config.item_smoothing": 0.0,
        },
        "without next-item vectors": {"collaborative.config.recent_half_life": None},
    },
}
# Recipe and changes that a study starts from, if these are not `paper` and `SHORT`.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    # All items compete, on data sets of any size.
    "best": ("best", {"collaborative.num_negatives": 0, "retrieval.num_negatives": 0})
}


# Of each variant, a column's values, one a seed.
Rows = dict[str, dict[str, list[float]]]


def main() -> None:
    """Runs the missing fits and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --study NAME [...]"
    )
    parser.add_argument("--study", required=True, choices=STUDIES)
    parser.add_argument("--dataset", default="lastfm", help="a data set as in `tokenrec train`")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("out-paper"), help="checkpoints and repositories")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows too")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1.")
    fits = Fits(arguments.results, arguments.work, log=lambda line: print(line, flush=True))
    rows = study(arguments.dataset, arguments.study, arguments.seeds, fits)
    print(markdown(rows))
    if arguments.plot:
        plot(rows, f"{arguments.study}, {Path(arguments.dataset).name}, validation", arguments.plot)


def base_of(name: str) -> tuple[str, dict[str, Any]]:
    """The recipe of a study, and the changes that all its variants share."""
    return BASES.get(name, ("paper", SHORT))


def study(dataset: str, name: str, seeds: int, fits: Answer) -> Rows:
    """Validation metrics of each variant of a study, and the errors of its codes."""
    rows = {}
    for variant, jobs in jobs_of(dataset, name, seeds).items():
        records = [fits(job) for job in jobs]
        row = {metric: [one["metrics"]["validation"]["tokenrec"][metric] for one in records] for metric in PAIR}
        for title, measure in (("error", "reconstruction_error"), ("unique", "unique")):
            row |= {f"{kind} {title}": [one["codes"][kind][measure] for one in records] for kind in ("user", "item")}
        for prompts, title in (OTHERS if name in BASES else {}).items():
            row[f"{title} ndcg@20"] = [one["metrics"]["validation"][prompts]["ndcg@20"] for one in records]
        rows[variant] = row
    return rows


def jobs_of(dataset: str, name: str, seeds: int) -> dict[str, list[Job]]:
    """The jobs of each variant of a study, one a seed."""
    base, short = base_of(name)
    jobs = {}
    for variant, changes in STUDIES[name].items():
        settings = settings_of(Recipe.load(base, overrides={**short, **changes}))
        jobs[variant] = [Job(dataset, f"tokenrec-{base}", "validation", seed, settings) for seed in range(seeds)]
    return jobs


def markdown(rows: Rows) -> str:
    """The table: mean and standard deviation over seeds."""
    columns = list(next(iter(rows.values())))
    body = []
    for name, row in rows.items():
        found = [mean_and_spread(row[column]) for column in columns]
        body.append([name, *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in found)])
    runs = len(next(iter(rows.values()))[columns[0]])
    lines = table_lines(["", *columns], body, numbers=True)
    lines += [
        "",
        f"Mean ± standard deviation over {runs} {'run' if runs == 1 else 'runs'}. `error`: share of the variance that codes lose.",
        "`unique`: share of users or items with codes of their own.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path) -> None:
    """HR@20 and NDCG@20 with error bars, a panel for each parameter that is varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[str]] = {}
    for name in rows:
        panels.setdefault(name.split(" = ")[0], []).append(name)
    figure, axes = pyplot.subplots(len(PAIR), len(panels), figsize=(4.5 * len(panels), 6), squeeze=False, sharey="row")
    for column, (parameter, names) in enumerate(panels.items()):
        labels = [name.split(" = ")[-1] for name in names]
        for ax, metric in zip(axes[:, column], PAIR):
            means, spreads = zip(*(mean_and_spread(rows[name][metric]) for name in names))
            ax.errorbar(labels, means, yerr=spreads, marker="o", capsize=4)
            ax.set_ylabel(metric.upper())
            ax.set_xlabel(parameter)
            ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    # Without the version of matplotlib in it, so that the same numbers give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
