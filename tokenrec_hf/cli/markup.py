"""Parts of pages as HTML: tables with bars and drawings, which follow light and dark colours and fit a phone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.variants import LABELS, SHOWN
from ..models.codes import COLLABORATIVE, MQ_FOLDERS
from ..repository.repository import RETRIEVAL

if TYPE_CHECKING:
    from .showcase import Showcase

# The drawing of a curve.
WIDTH, HEIGHT, MARGIN = 640, 220, 24
STAGES = {
    COLLABORATIVE: "collaborative model",
    **{folder: f"MQ-Tokenizer of {kind}s" for kind, folder in MQ_FOLDERS.items()},
    RETRIEVAL: "T5",
}
# Colours that the colour-blind tell apart; the marks of the map differ in shape too.
STYLE = """
.tokenrec { --mark: #d55e00; --seen: #0072b2; --soft: #52525b; color: var(--body-text-color); line-height: 1.4; }
.dark .tokenrec { --mark: #e8833a; --seen: #56b4e9; --soft: #a1a1aa; }
.tokenrec h1 { font-size: 1.6rem; font-weight: 700; margin: 0; }
.tokenrec h2 { font-size: inherit; font-weight: 600; margin: 0 0 .5rem; }
.tokenrec small, .tokenrec .soft { color: var(--soft); font-weight: 400; }
.tokenrec table { width: 100%; border-collapse: collapse; }
.tokenrec caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
.tokenrec th, .tokenrec td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; font-weight: 400; }
.tokenrec thead th { color: var(--soft); font-size: .85em; }
.tokenrec tr { border-bottom: 1px solid var(--border-color-primary); }
.tokenrec td small { display: block; }
.tokenrec .value { display: flex; gap: .5rem; align-items: center; font-variant-numeric: tabular-nums; min-width: 5.5rem; }
.tokenrec .value b { font-weight: 400; min-width: 2.7rem; }
.tokenrec .items td:nth-child(2) { width: 80%; }
.tokenrec .bar { flex: 1; height: .4rem; border-radius: .2rem;
  background: linear-gradient(to right, var(--mark) var(--share), var(--border-color-primary) var(--share)); }
.tokenrec code { font-family: var(--font-mono); font-size: .8em; overflow-wrap: anywhere; }
.tokenrec .u { color: var(--mark); } .tokenrec .v { color: var(--seen); }
.tokenrec .scroll { max-height: 27rem; overflow: auto; }
.tokenrec .columns { columns: 26rem; column-gap: 2.5rem; }
.tokenrec .columns div { break-inside: avoid; padding-bottom: 1.75rem; }
.tokenrec svg { width: 100%; height: auto; border: 1px solid var(--border-color-primary); border-radius: .5rem; }
.tokenrec .legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: .4rem; color: var(--soft); }
.tokenrec .other { fill: var(--soft); opacity: .45; } .tokenrec .history { fill: var(--seen); }
.tokenrec .line { fill: none; stroke: var(--seen); stroke-width: 2; }
.tokenrec .found { fill: var(--mark); } .tokenrec .query { fill: var(--body-text-color); }
.tokenrec text { font-size: 11px; font-weight: 600; fill: var(--background-fill-primary); text-anchor: middle; }
.tokenrec .legend .found { color: var(--mark); } .tokenrec .legend .history { color: var(--seen); }
.tokenrec .alert { border-left: 4px solid var(--mark); padding: .5rem .75rem; background: var(--background-fill-secondary); }
"""


def training(showcase: Showcase, metrics: Mapping[str, Any]) -> list[str]:
    """Accuracy by method, curves and time by stage, and use of the codebooks, of which users have the most."""
    tables = []
    for split in (name for name in ("test", "validation") if metrics.get(name)):
        results = metrics[split]
        best = {key: max(own[key] for own in results.values()) for key in SHOWN}
        rows = [[escape(LABELS[name]), *(bar(own[key], best[key]) for key in SHOWN)] for name, own in results.items()]
        tables.append(table("Accuracy", f"on {split} items", ["", *map(str.upper, SHOWN)], rows))
    tables += [curve(STAGES.get(stage, stage), points) for stage, points in metrics.get("curves", {}).items()]
    seconds = metrics.get("seconds", {})
    longest = max((took for stages in seconds.values() for took in stages.values()), default=1)
    stages = list(dict.fromkeys(stage for run in seconds.values() for stage in run))
    rows = [
        [
            STAGES.get(stage, stage),
            *(bar(run[stage], longest, ".1f") if stage in run else "" for run in seconds.values()),
        ]
        for stage in stages
    ]
    tables.append(table("Seconds", "of each stage", ["", *seconds], rows))
    for kind, (_, size) in reversed(showcase.recommender.tokenizer.codebooks.items()):
        rows = [
            [str(one.book), bar(one.used, 1, ".0%"), bar(one.perplexity, size, ".1f")] for one in showcase.usage(kind)
        ]
        tables.append(table(f"Codebooks of {kind}s", f"{size} codewords each", ["book", "used", "perplexity"], rows))
    return tables


def curve(stage: str, points: Sequence[Sequence[float]]) -> str:
    """A drawing of NDCG@20 on the validation items by epoch, with a mark on the best."""
    places = np.array(points)
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (np.array([WIDTH, HEIGHT]) - 2 * MARGIN) / np.maximum(high - low, 1e-9)
    drawn = np.array([0, HEIGHT]) + ((places - low) * scale + MARGIN) * [1, -1]
    x, y = drawn[places[:, 1].argmax()]
    best = "best {1:.4f} after {0:g} epochs".format(*places[places[:, 1].argmax()])
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in drawn)
    return (
        f"<h2>{escape(stage)} <small>NDCG@20 on validation by epoch, {low[0]:g} to {high[0]:g}: from {low[1]:.4f}, {best}</small></h2>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="NDCG@20 by epoch: {best}">'
        f'<polyline class=line points="{line}" /><circle class=found cx={x:.0f} cy={y:.0f} r=6 /></svg>'
    )


def columns(parts: Iterable[str]) -> str:
    """Parts beside each other, as many as fit the page."""
    return f"<div class=columns>{''.join(f'<div>{one}</div>' for one in parts)}</div>"


def part(content: str) -> str:
    """A part of a page, with the style of this module."""
    return f"<div class=tokenrec>{content}</div>"


def table(name: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]], nothing: str = "None.") -> str:
    """A table of HTML cells."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    body = body or f'<tr><td colspan="{len(header)}" class=soft>{nothing}</td></tr>'
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in header)
    caption = f"<caption>{escape(name)} <small>{escape(about)}</small></caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def bar(value: float, best: float, form: str = ".3f") -> str:
    """A number with a bar of its share of the best."""
    share = min(max(value / best, 0.0), 1.0) if best > 0 else 0.0
    return f'<span class=value><b>{value:{form}}</b><span class=bar style="--share:{share:.0%}"></span></span>'
