"""The page of `tokenrec report`: one file with all measurements of a repository, which asks no host for anything."""

from __future__ import annotations

from html import escape
from typing import Any

from ..evaluation.variants import COMPARED, LABELS
from ..models.codes import read_json
from ..repository.repository import COMPARISON, Repository
from .markup import STYLE, bar, columns, table, training
from .showcase import Showcase

# What the page of the demo has from Gradio, and the colours of the marks, by the reader's preference.
COLOURS = """
:root { color-scheme: light dark; --body-text-color: light-dark(#18181b, #f4f4f5); --font-mono: ui-monospace, monospace;
  --border-color-primary: light-dark(#e4e4e7, #3f3f46); --background-fill-primary: light-dark(#fff, #18181b); }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; background: var(--background-fill-primary);
  font-family: ui-sans-serif, system-ui, sans-serif; }
main.tokenrec { --mark: light-dark(#d55e00, #e8833a); --seen: light-dark(#0072b2, #56b4e9); --soft: light-dark(#52525b, #a1a1aa); }
main .columns { margin-top: 1.5rem; } main td svg { border: 0; }
@media (max-width: 32rem) { main .value { flex-wrap: wrap; min-width: 0; } main .bar { flex-basis: 100%; } }
"""


def report(repository: Repository, name: str) -> str:
    """The page, in HTML.

    Args:
        repository: a finished repository. Without its training data, as from the Hub, the page has what `metrics.json` has.
        name: the heading.
    """
    showcase, metrics = Showcase(repository.recommender()), repository.metrics
    parts = training(showcase, metrics)
    if repository.interactions.is_dir():
        parts += _evaluation(repository.evaluate("test" if metrics["refit"] else "validation"))
    if (path := repository.record(COMPARISON)).is_file():
        parts.append(_comparison(read_json(path)))
    facts = [f"{metrics[key]:,} {key}" for key in ("users", "items", "interactions")]
    facts += [f"data {metrics['dataset']}", f"recipe {metrics['recipe']}", f"seed {metrics['seed']}"]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(name)}</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}{COLOURS}</style></head><body>'
        f"<main class=tokenrec><h1>{escape(name)}</h1><p class=soft>{escape(' · '.join(facts))}</p>{columns(parts)}</main>"
        "</body></html>\n"
    )


def _evaluation(document: dict[str, Any]) -> list[str]:
    """HR@20 by history, by item and by score."""
    parts, names = [], ["collaborative_cosine", document["variant"]]
    for key, about in {"history": "items of the history", "popularity": "users of the held-out item"}.items():
        groups = document[f"hr@20_by_{key}"]
        best = max(own[name] for own in groups.values() for name in names)
        rows = [[size, f"{own['users']:,}", *(bar(own[name], best) for name in names)] for size, own in groups.items()]
        header = [about, "users", *(LABELS[name] for name in names)]
        parts.append(table(f"HR@20 by {key}", f"on {document['split']} items", header, rows))
    tenths = document["calibration"]
    best = max(one["hit_rate"] for one in tenths)
    rows = [["{low:.3f} to {high:.3f}".format(**one), bar(one["hit_rate"], best, ".2%")] for one in tenths]
    about = "how often one of the first 20 items is the held-out one"
    return [*parts, table("Calibration", about, ["cosine, in tenths of all lists", "is the item"], rows)]


def _comparison(document: dict[str, Any]) -> str:
    """The methods of the last `tokenrec compare`, and intervals of the differences."""
    methods, key = document["methods"], "ndcg@20"
    most = max((abs(end) for one in methods if one["difference"] for end in one["difference"][key]), default=1) or 1
    best = max(one[key] for one in methods)
    rows = [
        [
            COMPARED[one["name"]],
            bar(one[key], best, ".4f"),
            _interval(one["difference"] and one["difference"][key], most),
        ]
        for one in methods
    ]
    about = f"NDCG@20 of {document['users']:,} test users, and the difference to {COMPARED[document['reference']]} with its 95 % interval"
    return table("Baselines", about, ["", "NDCG@20", "difference"], rows)


def _interval(difference: list[float] | None, most: float) -> str:
    """A mean and its interval, in numbers and drawn beside zero."""
    if difference is None:
        return "reference"
    mean, low, high = (100 * value / most for value in difference)
    text = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference)
    return (
        f'{text}<svg viewBox="-110 -8 220 16" aria-hidden=true><path class=line d="M0-8V8M{low:.1f} 0H{high:.1f}" />'
        f"<circle class=found cx={mean:.1f} r=4 /></svg>"
    )
