"""Rows of a study as a table in Markdown and JSON and as a bar chart. Knows nothing of models."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

METRICS = tuple(f"{name}@{k}" for name in ("hr", "ndcg") for k in (10, 20, 30))
_PLOTTED = ("hr@20", "ndcg@20")


def write_report(rows: Sequence[dict], title: str, notes: Sequence[str], folder: Path, name: str) -> list[Path]:
    """Writes `name.json`, `name.md` and `name.png` to `folder` and says where.

    Args:
        rows: as `harness.study` makes them.
        title: what the table is.
        notes: paragraphs below it.
        folder: is made.
        name: of the files, without ending.

    Raises:
        ValueError: rows were measured on different data.
    """
    if len({data for row in rows for data in row["data"]}) > 1:
        sources = "; ".join(f"{row['model']}: {', '.join(row['data'])}" for row in rows)
        raise ValueError(
            f"the results were not all measured on the same data ({sources}); delete those that are out of date."
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "notes": list(notes), "rows": [{**row, "summary": summary(row)} for row in rows]}
    _write(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    _write(folder / f"{name}.md", markdown(rows, title, notes))
    plot(rows, title, folder / f"{name}.png")
    return [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]


def summary(row: dict) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over seeds of each metric on the test items; of one run there is no deviation."""
    found = {}
    for metric in METRICS:
        values = [one[metric] for one in row["test"]]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[metric] = {"mean": statistics.fmean(values), "sd": spread}
    return found


def markdown(rows: Sequence[dict], title: str, notes: Sequence[str] = ()) -> str:
    """The table, the notes, and what was chosen for each row."""
    header = ["", *(metric.upper() for metric in METRICS), "runs", "fit, s", "peak, MB"]
    lines = [f"## {title}", "", table_line(header), table_line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        cells = [_cell(**value) for value in summary(row).values()]
        peak = statistics.fmean(row["peak_bytes"]) / 1e6
        lines.append(table_line([row["title"], *cells, len(row["test"]), fit_cell(row, 1), f"{peak:.0f}"]))
    lines += ["", *(line for note in notes for line in (note, ""))]
    lines += [
        table_line(["", "settings", "of", "epochs", "validation HR@20", "validation NDCG@20"]),
        table_line(["---"] * 6),
    ]
    for row in rows:
        validation = [f"{statistics.fmean(one[metric] for one in row['validation']):.4f}" for metric in _PLOTTED]
        epochs = ", ".join("-" if one is None else _epochs(one) for one in row["epochs"])
        lines.append(table_line([row["title"], row["settings"], row["trials"], epochs, *validation]))
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict], title: str, path: Path) -> None:
    """HR@20 and NDCG@20 as bars with the standard deviation, TokenRec's in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.3 * len(rows)), sharey=True)
    for ax, metric in zip(axes, _PLOTTED):
        found = [summary(row)[metric] for row in rows]
        means = [one["mean"] for one in found]
        colours = ["tab:orange" if row["title"].startswith("TokenRec") else "tab:blue" for row in rows]
        bars = ax.barh([row["title"] for row in rows], means, xerr=[one["sd"] or 0 for one in found], color=colours)
        ax.bar_label(bars, fmt="%.4f", padding=4, fontsize=8)
        ax.set_xlabel(metric.upper())
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    # Without the version of matplotlib in it, so that the same numbers give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _cell(mean: float, sd: float | None) -> str:
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def _epochs(epochs: int | dict) -> str:
    """The length of a fit; TokenRec's is that of its stages."""
    if isinstance(epochs, dict):
        return " + ".join(f"{length:g}" for length in epochs.values())
    return str(epochs)


def fit_cell(row: dict, digits: int = 0) -> str:
    """Mean seconds of a fit; with a remark where all of them had a GPU."""
    remark = "" if "none" in row["accelerators"] else " (GPU)"
    return f"{statistics.fmean(row['fit_seconds']):.{digits}f}{remark}"


def table_line(cells: Sequence) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
