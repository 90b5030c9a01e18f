"""Makes the tables of docs/results*.md and the table of README.md from the records.

    python examples/paper/page.py

A table stands between `<!-- rows NAME -->` and `<!-- end of rows -->`; `TABLES` holds the names.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ablations
import protocol_errors
import quantisers
import table5
from harness import MOST_SEEDS, Recorded, recorded_rows
from report import METRICS, PAIR, check_same_data, fit_cell, short_number, summary, table_lines

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGES = (DOCS / "results.md", DOCS / "results_tables.md", HERE.parents[1] / "README.md")
DATASETS = {
    "lastfm": "LastFM",
    "beauty": "Amazon Beauty",
    "toys": "Amazon Toys",
    "clothing": "Amazon Clothing",
    "ml-100k": "MovieLens-100K",
}
SUMMARY_MODELS = ("popularity", "itemknn", "ease", "ials", "mf", "lightgcn", "sasrec", "s3rec", "tokenrec-best")
# HR@20 / NDCG@20 of TokenRec in tables II and III of the paper.
PAPER = {"lastfm": ".0936 / .0348", "beauty": ".0615 / .0276", "clothing": ".0240 / .0112"}
PAPER_COLUMNS = {
    "TokenRec `best`": "here, `best`",
    "TokenRec `paper`, small T5": "here, `paper`, small T5",
    "LightGCN": "here, LightGCN",
    "EASE": "here, EASE",
}
# Data sets that recipe `best` was taken apart on.
PARTS_ON = ("lastfm", "beauty", "ml-100k")
_BLOCK = re.compile(r"(<!-- rows (\S+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def main() -> None:
    """Rewrites the tables that are out of date."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"{page.name}: rows renewed")


def fill(text: str, results: Path = HERE / "results") -> str:
    """The page with its tables made anew from the records; all other text stays.

    Raises:
        ValueError: a block has a name that is not in `TABLES`.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; choose among {', '.join(TABLES)}.")
        return match[1] + "\n".join(["", *TABLES[match[2]](results), ""]) + "\n" + match[3]

    return _BLOCK.sub(block, text)


def performance(dataset: str, results: Path) -> list[str]:
    """All models on the test items of a data set, the best mean of each column in bold."""
    found = recorded_rows(dataset, results)
    check_same_data(found)
    summaries = [summary(row) for row in found]
    best = {metric: max(one[metric][0] for one in summaries) for metric in METRICS}
    body = []
    for row, measured in zip(found, summaries):
        cells = [_metric(*measured[metric], best[metric]) for metric in METRICS]
        body.append([row["title"], *cells, len(row["test"]), _pair(row["validation"]), row["trials"], fit_cell(row)])
    header = ["", *(metric.upper() for metric in METRICS), "seeds", "validation HR@20 / NDCG@20", "settings tried"]
    return table_lines([*header, "fit, s"], body)


def summarised(results: Path) -> list[str]:
    """HR@20 / NDCG@20 of `SUMMARY_MODELS` on the test items of all data sets, a dash where a model was not measured."""
    cells: dict[str, dict[str, str]] = {}
    for dataset in DATASETS:
        for row in recorded_rows(dataset, results, SUMMARY_MODELS):
            cells.setdefault(row["title"], {})[dataset] = _pair(row["test"])
    body = [[title, *(own.get(dataset, "-") for dataset in DATASETS)] for title, own in cells.items()]
    return table_lines(["HR@20 / NDCG@20, test", *DATASETS.values()], body)


def against_the_paper(results: Path) -> list[str]:
    """TokenRec's rows of the paper beside rows measured here."""
    body = []
    for dataset, reported in PAPER.items():
        measured = {row["title"]: _pair(row["test"]) for row in recorded_rows(dataset, results)}
        title = DATASETS[dataset].removeprefix("Amazon ")
        body.append([f"{title}, TokenRec", reported, *(measured.get(one, "-") for one in PAPER_COLUMNS)])
    return table_lines(["HR@20 / NDCG@20", "the paper", *PAPER_COLUMNS.values()], body)


def t5_and_vectors(results: Path) -> list[str]:
    """TokenRec `best` and its vectors without T5, and the mean difference of the same runs, on all data sets."""
    body = []
    for dataset, title in DATASETS.items():
        rows = {row["title"]: row["test"] for row in recorded_rows(dataset, results, ("tokenrec-best",))}
        if not rows:
            continue
        both, vectors = rows["TokenRec `best`"], rows["TokenRec `best`, its vectors without T5"]
        gains = [[a[metric] - b[metric] for a, b in zip(both, vectors)] for metric in PAIR]
        cells = " / ".join(f"{statistics.fmean(gain):+.4f}" for gain in gains)
        body.append([title, _pair(vectors), _pair(both), cells, len(both)])
    return table_lines(["", "vectors without T5", "TokenRec `best`", "T5 adds", "seeds"], body)


def protocol(dataset: str, results: Path) -> list[str]:
    """The errors of the protocol, with as many seeds as have records."""
    found = Recorded(results)
    jobs = [protocol_errors.job(dataset, seed) for seed in range(MOST_SEEDS)]
    return protocol_errors.table([found(job) for job in jobs[: found.count(jobs)]])


def parts(results: Path) -> list[str]:
    """NDCG@20 of recipe `best` on validation, and its mean change without each part, over seeds, with the standard deviation."""
    found = Recorded(results)
    columns: dict[str, dict[str, str]] = {}
    for dataset in PARTS_ON:
        every = ablations.jobs_of(dataset, "best", MOST_SEEDS).values()
        seeds = min(found.count(jobs) for jobs in every)
        rows = {name: row["ndcg@20"] for name, row in ablations.study(dataset, "best", seeds, found).items()}
        whole = rows.pop("whole")
        own = columns.setdefault(f"{DATASETS[dataset]}, {seeds} seed{'s' * (seeds > 1)}", {})
        own["whole"] = short_number(statistics.fmean(whole))
        for name, values in rows.items():
            changes = [value - base for value, base in zip(values, whole)]
            spread = f" ± {short_number(statistics.stdev(changes))}" if seeds > 1 else ""
            own[name] = f"{statistics.fmean(changes):+.4f}{spread}"
    body = [[name, *(own[name] for own in columns.values())] for name in next(iter(columns.values()))]
    return table_lines(["NDCG@20, validation", *columns], body)


def quantised(results: Path) -> list[str]:
    """Metrics of quantised vectors."""
    return quantisers.table(Recorded(results)(quantisers.job("beauty", 5.0))["rows"])


def speed(results: Path) -> list[str]:
    """Milliseconds a user."""
    return table5.table(table5.recorded("lastfm", results))


TABLES: dict[str, Callable[[Path], list[str]]] = {
    **{dataset: partial(performance, dataset) for dataset in DATASETS},
    "summary": summarised,
    "paper": against_the_paper,
    "parts": parts,
    "quantisers": quantised,
    "t5": t5_and_vectors,
    "speed": speed,
    **{f"protocol-errors-{dataset}": partial(protocol, dataset) for dataset in ("lastfm", "beauty")},
}


def _pair(runs: Sequence[Mapping[str, Any]]) -> str:
    return " / ".join(short_number(statistics.fmean(run[metric] for run in runs)) for metric in PAIR)


def _metric(mean: float, spread: float | None, best: float) -> str:
    number = f"**{short_number(mean)}**" if mean == best else short_number(mean)
    return number if spread is None else f"{number} ± {short_number(spread)}"


if __name__ == "__main__":
    main()
