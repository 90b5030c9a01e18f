"""Table VI and figures 4 and 5 of TokenRec (arXiv 2406.10450): what its parts are worth, on validation.

    python examples/paper/ablations.py --study table6 --dataset lastfm --seeds 3
    python examples/paper/ablations.py --study figure4 --dataset lastfm
    python examples/paper/ablations.py --study figure5 --dataset lastfm
    python examples/paper/ablations.py --study best --dataset ml-100k

Table VI leaves out the graph (matrix factorisation instead of LightGCN), the K ways (one codebook of as many codewords) and
the mask; figure 4 varies the mask's share rho, figure 5 the number K of codebooks and their size L. All are the paper's
quantiser on recipe `cpu` with shorter stages (`SHORT`), so that a run takes a minute or two on one core of a CPU; compare them
with each other and not with other tables. `best` is no table of the paper: it takes back one by one what makes the whole of
that recipe different. The test items are not looked at. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Fits, Job
from report import table_line

from tokenrec_hf import load_recipe

HERE = Path(__file__).parent
METRICS = ("hr@20", "ndcg@20")
# Shown of the study `best`: what T5 makes of a history alone, and the vectors without T5.
OTHERS = {"tokenrec_history_only": "history only", "collaborative_cosine": "vectors"}
SHORT = {
    "collaborative.training.num_train_epochs": 60,
    "mq_tokenizer.training.max_steps": 1500,
    "retrieval.config.num_layers": 1,
    "retrieval.config.projection_dim": 1024,
    "retrieval.training.num_train_epochs": 12,
}
_K, _L, _RHO = (f"mq_tokenizer.config.{name}" for name in ("num_codebooks", "codebook_size", "mask_ratio"))
# What each variant changes; K = 3, L = 256 and rho = 0.2 are those of the whole.
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "table6": {
        "whole": {},
        "without HOCK": {
            "collaborative.model": "matrix_factorization",
            # Of the grid of the baseline MF.
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
        "without the shortcut": {"retrieval.config.user_shortcut": False},
        "nor residual codes": {"mq_tokenizer.config.residual": False, "retrieval.config.user_shortcut": False},
        "4 codes a user": {"mq_tokenizer.user_codebooks": 4},
        "without smoothing": {
            "collaborative.config.history_smoothing": 0.0,
            "collaborative.config.item_smoothing": 0.0,
        },
        "without what is said of the very next": {"collaborative.config.recent_half_life": None},
        "without prompts of a history only": {"prompts.history_only": 0.0},
    },
}
# Recipe and changes that a study starts from, where these are not `cpu` and `SHORT`.
BASES: dict[str, tuple[str, dict[str, Any]]] = {"best": ("best", {})}


def main() -> None:
    """Runs what is not finished and writes the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --study NAME [...]"
    )
    parser.add_argument("--study", required=True, choices=STUDIES)
    parser.add_argument("--dataset", default="lastfm", help="whatever `tokenrec train` takes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="one JSON file for each run")
    parser.add_argument("--work", type=Path, default=Path("out-paper"), help="checkpoints and repositories")
    parser.add_argument("--output", type=Path, default=HERE / "tables")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1.")

    fits = Fits(arguments.results, arguments.work, log=lambda line: print(line, flush=True))
    rows = study(arguments.dataset, arguments.study, arguments.seeds, fits)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.study}-{Path(arguments.dataset).name}"
    title = f"{arguments.study}, {Path(arguments.dataset).name}, validation"
    _, short = base_of(arguments.study)
    content = {"title": title, "short": short, "variants": STUDIES[arguments.study], "rows": rows}
    (arguments.output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.output / f"{name}.md").write_text(markdown(rows, title), encoding="utf-8")
    plot(rows, title, arguments.output / f"{name}.png")
    print(markdown(rows, title))


def base_of(name: str) -> tuple[str, dict[str, Any]]:
    """The recipe of a study, and what all its variants change."""
    return BASES.get(name, ("cpu", SHORT))


def study(dataset: str, name: str, seeds: int, fits) -> dict[str, dict[str, list[float]]]:
    """Of each variant of a study, validation metrics of TokenRec and what its codes lose, a value a seed."""
    rows = {}
    base, short = base_of(name)
    for variant, changes in STUDIES[name].items():
        recipe = load_recipe(base, overrides={**short, **changes})
        del recipe["seed"]
        records = [fits(Job(dataset, f"tokenrec-{base}", "validation", seed, recipe)) for seed in range(seeds)]
        others = OTHERS if name in BASES else {}
        rows[variant] = {
            **{metric: [one["metrics"]["validation"]["tokenrec"][metric] for one in records] for metric in METRICS},
            **{
                f"{kind} error": [one["codes"][kind]["reconstruction_error"] for one in records]
                for kind in ("user", "item")
            },
            **{f"{kind} unique": [one["codes"][kind]["unique"] for one in records] for kind in ("user", "item")},
            **{
                f"{title} ndcg@20": [one["metrics"]["validation"][prompts]["ndcg@20"] for one in records]
                for prompts, title in others.items()
            },
        }
    return rows


def markdown(rows: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> str:
    """The table: mean and standard deviation over seeds."""
    columns = list(next(iter(rows.values())))
    lines = [f"## {title}", "", table_line(["", *columns]), table_line(["---", *["---:"] * len(columns)])]
    lines += [table_line([name, *(_cell(row[column]) for column in columns)]) for name, row in rows.items()]
    runs = len(next(iter(rows.values()))[columns[0]])
    lines += [
        "",
        f"Mean ± standard deviation over {runs} runs. `error`: the share of variance that codes lose; `unique`: the",
    ]
    lines += ["share of users or items whose codes nobody else has."]
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path) -> None:
    """HR@20 and NDCG@20 with error bars, a panel for each parameter that is varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[str]] = {}
    for name in rows:
        panels.setdefault(name.split(" = ")[0] if " = " in name else "", []).append(name)
    figure, axes = pyplot.subplots(
        len(METRICS), len(panels), figsize=(4.5 * len(panels), 6), squeeze=False, sharey="row"
    )
    for column, (parameter, names) in enumerate(panels.items()):
        labels = [name.split(" = ")[-1] for name in names]
        for ax, metric in zip(axes[:, column], METRICS):
            means = [statistics.fmean(rows[name][metric]) for name in names]
            ax.errorbar(labels, means, yerr=[_spread(rows[name][metric]) for name in names], marker="o", capsize=4)
            ax.set_ylabel(metric.upper())
            ax.set_xlabel(parameter)
            ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    # Without the version of matplotlib in it, so that the same numbers give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {_spread(values):.4f}"


if __name__ == "__main__":
    main()
