"""Rows of a study as a table in Markdown. Knows nothing of models."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

METRICS = tuple(f"{name}@{k}" for name in ("hr", "ndcg") for k in (10, 20, 30))
PAIR = ("hr@20", "ndcg@20")
Row = Mapping[str, Any]


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> str:
    """The table of test metrics, the notes, and a table of the settings chosen for each row.

    Args:
        rows: rows of `harness.study`.
        title: title of the table.
        notes: paragraphs below the table.

    Raises:
        ValueError: rows were measured on different data.
    """
    check_same_data(rows)
    header = ["", *(metric.upper() for metric in METRICS), "runs", "fit, s", "peak, MB"]
    body = []
    for row in rows:
        cells = [f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}" for mean, sd in summary(row).values()]
        peak = statistics.fmean(row["peak_bytes"]) / 1e6
        body.append([row["title"], *cells, len(row["test"]), fit_cell(row, 1), f"{peak:.0f}"])
    chosen = []
    for row in rows:
        validation = [f"{statistics.fmean(one[metric] for one in row['validation']):.4f}" for metric in PAIR]
        epochs = ", ".join("-" if one is None else _epochs(one) for one in row["epochs"])
        chosen.append([row["title"], row["settings"], row["trials"], epochs, *validation])
    lines = [f"## {title}", "", *table_lines(header, body, numbers=True), ""]
    lines += [line for note in notes for line in (note, "")]
    lines += table_lines(["", "settings", "of", "epochs", "validation HR@20", "validation NDCG@20"], chosen)
    return "\n".join(lines) + "\n"


def check_same_data(rows: Sequence[Row]) -> None:
    """Refuses rows that cannot be compared.

    Raises:
        ValueError: rows were measured on different data.
    """
    if len({data for row in rows for data in row["data"]}) > 1:
        sources = "; ".join(f"{row['model']}: {', '.join(row['data'])}" for row in rows)
        raise ValueError(
            f"the results were not all measured on the same data ({sources}); delete the outdated records."
        )


def summary(row: Row) -> dict[str, tuple[float, float | None]]:
    """Mean and sample standard deviation over seeds of each metric on the test items; one run has no deviation."""
    found = {}
    for metric in METRICS:
        values = [one[metric] for one in row["test"]]
        found[metric] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def fit_cell(row: Row, digits: int = 0) -> str:
    """Mean seconds of a fit, with a remark if all fits had a GPU."""
    remark = "" if "none" in row["accelerators"] else " (GPU)"
    return f"{statistics.fmean(row['fit_seconds']):.{digits}f}{remark}"


def short_number(value: float) -> str:
    """A number between 0 and 1 as `.1234`."""
    return f"{value:.4f}".removeprefix("0")


def table_lines(header: Sequence[object], body: Sequence[Sequence[object]], numbers: bool = False) -> list[str]:
    """A table in Markdown; with `numbers`, all columns but the first are aligned to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, rule, *body)]


def _epochs(epochs: float | Mapping[str, float]) -> str:
    """The length of a fit; TokenRec has one for each stage."""
    if isinstance(epochs, Mapping):
        return " + ".join(f"{length:g}" for length in epochs.values())
    return str(epochs)
