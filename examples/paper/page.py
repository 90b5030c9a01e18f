"""Puts the rows of `tables/table2-*.json` into docs/results.md and README.md, between `<!-- rows NAME -->` and `<!-- end of rows -->`.

    python examples/paper/page.py

NAME is a data set, for all its rows with their spread; or `summary`, for HR@20 and NDCG@20 of the best known models on all three data sets.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from report import METRICS, fit_cell, table_line

HERE = Path(__file__).parent
PAGES = (HERE.parents[1] / "docs" / "results.md", HERE.parents[1] / "README.md")
SUMMARY = {"lastfm": "LastFM", "beauty": "Amazon Beauty", "ml-100k": "MovieLens-100K"}
SUMMARY_MODELS = (
    "popularity",
    "itemknn",
    "ease",
    "ials",
    "mf",
    "lightgcn",
    "sasrec",
    "s3rec",
    "tokenrec-best",
)
_BLOCK = re.compile(r"(<!-- rows (\S+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)


def fill(text: str, tables: Path = HERE / "tables") -> str:
    """The page with its rows as they are in the tables; everything else stays.

    Raises:
        FileNotFoundError: a block names a data set without a table.
    """

    def block(match: re.Match) -> str:
        lines = summary_rows(tables) if match[2] == "summary" else rows(match[2], tables)
        return match[1] + "\n".join(["", *lines, ""]) + "\n" + match[3]

    return _BLOCK.sub(block, text)


def rows(dataset: str, tables: Path) -> list[str]:
    """A line of Markdown for each row of a data set, the best mean of each column in bold."""
    found = _read(dataset, tables)
    best = {metric: max(row["summary"][metric]["mean"] for row in found) for metric in METRICS}
    header = ["", *(metric.upper() for metric in METRICS), "seeds", "validation HR@20 / NDCG@20", "settings tried"]
    lines = [table_line([*header, "fit, s"]), table_line(["---"] * (len(header) + 1))]
    for row in found:
        cells = [_metric(row["summary"][metric], best[metric]) for metric in METRICS]
        others = [len(row["test"]), _pair(row["validation"]), row["trials"], fit_cell(row)]
        lines.append(table_line([_title(row), *cells, *others]))
    return lines


def summary_rows(tables: Path) -> list[str]:
    """HR@20 / NDCG@20 of `SUMMARY_MODELS` on the test items of all data sets; a model that one of them lacks has a dash there."""
    titles: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    for dataset in SUMMARY:
        for row in _read(dataset, tables):
            if row["model"] in SUMMARY_MODELS:
                titles[row["title"]] = _title(row)
                cells.setdefault(row["title"], {})[dataset] = _pair(row["test"])
    lines = [table_line(["HR@20 / NDCG@20, test", *SUMMARY.values()]), table_line(["---"] * (1 + len(SUMMARY)))]
    return lines + [table_line([titles[one], *(cells[one].get(dataset, "-") for dataset in SUMMARY)]) for one in titles]


def _read(dataset: str, tables: Path) -> list[dict]:
    return json.loads((tables / f"table2-{dataset}.json").read_text(encoding="utf-8"))["rows"]


def _title(row: dict) -> str:
    """`TokenRec (best, user id only)` becomes ``TokenRec `best`, user id only``."""
    return re.sub(r"TokenRec \(([^,)]+)(.*)\)", r"TokenRec `\1`\2", row["title"])


def _pair(runs: Sequence[dict]) -> str:
    return " / ".join(_number(statistics.fmean(run[metric] for run in runs)) for metric in ("hr@20", "ndcg@20"))


def _metric(value: dict, best: float) -> str:
    mean = f"**{_number(value['mean'])}**" if value["mean"] == best else _number(value["mean"])
    return mean if value["sd"] is None else f"{mean} ± {_number(value['sd'])}"


def _number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def main() -> None:
    """Rewrites the pages whose rows are out of date."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"{page.name}: rows renewed")


if __name__ == "__main__":
    main()
