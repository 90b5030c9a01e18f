"""The page of `tokenrec demo`, made with Gradio of the answers of a [`Showcase`].

Results are tables and a drawing in HTML, which screen readers can read, which fit a phone, and which follow the light or dark
colours of the page. The page asks no other host for anything.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..evaluation.variants import LABELS, SHOWN
from .showcase import Answer, Showcase, Suggestion

# Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError:
    raise ImportError('the page needs Gradio: pip install "tokenrec-hf[demo]".') from None

# Users and items that can be chosen from a list; the ids of others are typed.
LISTED = 5_000
STAGES = {"mq_user": "MQ-Tokenizer of users", "mq_item": "MQ-Tokenizer of items", "retrieval": "T5"}
WIDTH, HEIGHT, MARGIN = 640, 420, 16
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
.tokenrec .found { fill: var(--mark); } .tokenrec .query { fill: var(--body-text-color); }
.tokenrec text { font-size: 11px; font-weight: 600; fill: var(--background-fill-primary); text-anchor: middle; }
.tokenrec .legend .found { color: var(--mark); } .tokenrec .legend .history { color: var(--seen); }
.tokenrec .alert { border-left: 4px solid var(--mark); padding: .5rem .75rem; background: var(--background-fill-secondary); }
"""


def build(showcase: Showcase, metrics: Mapping[str, Any], name: str = "TokenRec") -> gr.Blocks:
    """The page, which [`serve`] shows.

    Args:
        showcase: the repository's answers.
        metrics: its `metrics.json`.
        name: the heading.
    """
    users, filters = [("someone new", ""), *((user, user) for user in showcase.users[:LISTED])], showcase.filters
    items = [(title, item) for item, title in list(showcase.titles.items())[:LISTED]]

    def answer(user: str, history: list[str], top_k: float, column: str | None, values: list[str]) -> list[str]:
        # After another column was chosen, the values may still be those of the former one.
        chosen = [filters[column][text] for text in values if text in filters[column]] if column else []
        try:
            found = showcase.ask(user or None, history, int(top_k), {str(column): chosen} if chosen else {})
        except (KeyError, ValueError) as error:
            return [alert(str(error.args[0])), *[""] * 6]
        return [
            status(user, found),
            suggestions("Recommended", "by TokenRec", found.recommended, "cosine"),
            suggestions("Nearest", "to the mean of the history", found.nearest, "cosine"),
            suggestions("Popular", "the same for everyone", found.popular, "times seen"),
            item_map(showcase, found),
            token_table(showcase, user, found),
            prompt(found),
        ]

    def html(content: str = "") -> gr.HTML:
        return gr.HTML(content, apply_default_css=False, padding=False)

    with gr.Blocks(title=name, analytics_enabled=False) as page:
        html(f"<style>{STYLE}</style>{heading(showcase, name)}")
        with gr.Tab("Recommend"):
            with gr.Row():
                user = gr.Dropdown(
                    users,
                    value=showcase.users[0] if showcase.users else "",
                    label="User",
                    info=f"Type to search{_listed(showcase.users)}.",
                    allow_custom_value=len(showcase.users) > LISTED,
                    min_width=220,
                )
                history = gr.Dropdown(
                    items,
                    value=[] if showcase.users else [item for _, item in items[:3]],
                    label="History, oldest first",
                    info=f"Type a title{_listed(showcase.titles)}. Empty: the user's own history.",
                    multiselect=True,
                    allow_custom_value=len(showcase.titles) > LISTED,
                    min_width=280,
                    scale=2,
                )
                top_k = gr.Slider(5, 50, value=10, step=5, label="Number of items", min_width=180)
            with gr.Row(visible=bool(filters)):
                column = gr.Dropdown(list(filters), value=None, label="Filter by", min_width=220)
                values = gr.Dropdown([], label="Only these values", multiselect=True, min_width=280, scale=3)
            message = html()
            with gr.Row():
                shown = [message]
                for _ in range(3):
                    with gr.Column(min_width=300):
                        shown.append(html())
            with gr.Row():
                for _ in range(2):
                    with gr.Column(min_width=300):
                        shown.append(html())
            with gr.Accordion("The prompt that T5 reads", open=False):
                shown.append(html())
        with gr.Tab("Training"):
            html(training(showcase, metrics))

        asked: list[Any] = [user, history, top_k, column, values]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
        gr.on([page.load, *(one.change for one in asked)], answer, asked, shown, **quiet)
        column.change(lambda one: gr.Dropdown(list(filters.get(one, ())), value=[]), column, values, **quiet)
    return page


@contextlib.contextmanager
def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves a page while a block runs, and gives its address.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    theme.set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    settings: dict[str, Any] = {"quiet": True, "share": False, "ssr_mode": False, "footer_links": []}
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, theme=theme, prevent_thread_lock=True, **settings
        )
    except OSError:
        raise OSError(f"port {port} of {host} cannot be served; give another --port.") from None
    try:
        yield address
    finally:
        page.close(verbose=False)


# Parts of the page, as HTML -------------------------------------------------------------------------------------------


def heading(showcase: Showcase, name: str) -> str:
    """Name and size of the repository."""
    facts = [f"{len(showcase.users):,} users" if showcase.users else "shared without users"]
    facts.append(f"{len(showcase.titles):,} items")
    for kind, (number, size) in showcase.recommender.tokenizer.codebooks.items():
        facts.append(f"{kind}s are {number} tokens of {size} codewords each")
    return _part(f"<h1>{escape(name)}</h1><p class=soft>{' · '.join(facts)}</p>")


def alert(sentence: str) -> str:
    """Why a question cannot be answered."""
    return _part(f"<p class=alert role=alert>{escape(sentence)}</p>")


def status(user: str | None, found: Answer) -> str:
    """The question that is answered."""
    who, count = f"user {user}" if user else "someone new", len(found.history)
    by = f"a history of {count} item{'s' * (count != 1)}" if count else "the id alone"
    return _part(f"<p class=soft role=status>For {escape(who)}, by {by}. Seen items are left out.</p>")


def suggestions(name: str, method: str, rows: Sequence[Suggestion], unit: str) -> str:
    """A table of items with rank, title, reasons and score."""
    best = max((row.score for row in rows), default=1)
    cells = [
        [str(rank), _named(row) + _because(row), _value(row.score, best, "," if unit == "times seen" else ".3f")]
        for rank, row in enumerate(rows, 1)
    ]
    return _part(f"<div class=items>{_table(name, method, ['#', 'item', unit], cells, 'Nothing is left.')}</div>")


def item_map(showcase: Showcase, found: Answer) -> str:
    """A drawing of the catalogue, with the history, the recommended items and the query on it."""
    recommended = [row.item for row in found.recommended]
    groups = [showcase.places(items) for items in (showcase.drawn, found.history, recommended)]
    places = np.concatenate([*groups, showcase.project(found.query)])
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (np.array([WIDTH, HEIGHT]) - 2 * MARGIN) / np.maximum(high - low, 1e-9)
    drawn, history, best, query = np.split((places - low) * scale + MARGIN, np.cumsum([len(one) for one in groups]))

    def marks(kind: str, at: np.ndarray, items: Sequence[str], draw: Callable[[int], str]) -> str:
        each = (
            f'<g transform="translate({x:.0f} {y:.0f})">{draw(row)}<title>{escape(showcase.titles[item])}</title></g>'
            for row, ((x, y), item) in enumerate(zip(at, items))
        )
        return f"<g class={kind}>{''.join(each)}</g>"

    ((x, y),) = query
    content = [
        marks("other", drawn, showcase.drawn, lambda _: "<circle r=3 />"),
        marks("history", history, found.history, lambda _: '<rect x="-4.5" y="-4.5" width=9 height=9 />'),
        # The best come last, so that they lie on top.
        marks("found", best[::-1], recommended[::-1], lambda row: f"<circle r=9 /><text y=4>{len(best) - row}</text>"),
        f'<path class=query d="M{x:.0f} {y - 9:.0f}l8 9l-8 9l-8-9z"><title>query</title></path>',
    ]
    label = f"Map of the items, with {len(history)} items of the history, {len(best)} recommended items and the query."
    return _part(
        f"<h2>Map of the items <small>two principal components, {showcase.explained:.0%} of the variance</small></h2>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">{"".join(content)}</svg>'
        "<div class=legend aria-hidden=true><span>● items</span><span class=history>■ history</span>"
        "<span class=found>❶ recommended</span><span>◆ query</span></div>"
    )


def token_table(showcase: Showcase, user: str | None, found: Answer) -> str:
    """The tokens of the user and of each item of the history."""
    rows = [["user", escape(user), _marked(showcase.user_tokens(user))]] if user else []
    rows += [
        [str(number), escape(showcase.titles[item]), _marked(tokens)]
        for number, (item, tokens) in enumerate(zip(found.history, found.tokens), 1)
    ]
    table = _table("Tokens", "of the user and the history", ["", "name", "tokens"], rows)
    return _part(f"<div class=scroll tabindex=0 role=region aria-label=Tokens>{table}</div>")


def prompt(found: Answer) -> str:
    """The prompt, with its code tokens marked."""
    return _part(f"<p>{_marked(found.prompt)}</p>")


def training(showcase: Showcase, metrics: Mapping[str, Any]) -> str:
    """Accuracy by method, time by stage, and use of the codebooks, of which users have the most."""
    tables = []
    for split in (name for name in ("test", "validation") if metrics.get(name)):
        results = metrics[split]
        best = {key: max(own[key] for own in results.values()) for key in SHOWN}
        rows = [
            [escape(LABELS[name]), *(_value(own[key], best[key]) for key in SHOWN)] for name, own in results.items()
        ]
        tables.append(_table("Accuracy", f"on {split} items", ["", *map(str.upper, SHOWN)], rows))
    seconds = metrics.get("seconds", {})
    longest = max((took for stages in seconds.values() for took in stages.values()), default=1)
    stages = list(dict.fromkeys(stage for run in seconds.values() for stage in run))
    rows = [
        [
            STAGES.get(stage, stage),
            *(_value(run[stage], longest, ".1f") if stage in run else "" for run in seconds.values()),
        ]
        for stage in stages
    ]
    tables.append(_table("Seconds", "of each stage", ["", *seconds], rows))
    for kind, (_, size) in reversed(showcase.recommender.tokenizer.codebooks.items()):
        rows = [
            [str(one.book), _value(one.used, 1, ".0%"), _value(one.perplexity, size, ".1f")]
            for one in showcase.usage(kind)
        ]
        tables.append(_table(f"Codebooks of {kind}s", f"{size} codewords each", ["book", "used", "perplexity"], rows))
    return _part(f"<div class=columns>{''.join(f'<div>{one}</div>' for one in tables)}</div>")


def _part(content: str) -> str:
    return f"<div class=tokenrec>{content}</div>"


def _table(name: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]], nothing: str = "None.") -> str:
    """A table of HTML cells."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    body = body or f'<tr><td colspan="{len(header)}" class=soft>{nothing}</td></tr>'
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in header)
    caption = f"<caption>{escape(name)} <small>{escape(about)}</small></caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _named(row: Suggestion) -> str:
    return escape(row.title) + f" <span class=soft>{escape(row.item)}</span>" * (row.title != row.item)


def _because(row: Suggestion) -> str:
    return f"<small>because of {escape(', '.join(row.because))}</small>" * bool(row.because)


def _value(value: float, best: float, form: str = ".3f") -> str:
    """A number with a bar of its share of the best."""
    share = min(max(value / best, 0.0), 1.0) if best > 0 else 0.0
    return f'<span class=value><b>{value:{form}}</b><span class=bar style="--share:{share:.0%}"></span></span>'


def _marked(text: str) -> str:
    """A text with the code tokens in the colour of their kind."""
    tokens = re.sub(r"&lt;([uv])(\d+-\d+)&gt;", r"<span class=\1>&lt;\1\2&gt;</span>", escape(text))
    return f"<code>{tokens}</code>"


def _listed(all_of_them: Sequence | Mapping) -> str:
    return f" the first {LISTED:,}, or the id of any other" * (len(all_of_them) > LISTED)
