"""The page of `tokenrec demo`, made with Gradio of the answers of a [`Showcase`].

Results are tables and a drawing in HTML, which screen readers can read, which fit a phone, and which follow the light or dark
colours of the page. The page asks no other host for anything.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .markup import STYLE, bar, columns, part, table, training
from .showcase import Answer, Showcase, Suggestion

# Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError:
    raise ImportError('the page needs Gradio: pip install "tokenrec-hf[demo]".') from None

# Users and items that can be chosen from a list; the ids of others are typed.
LISTED = 5_000
WIDTH, HEIGHT, MARGIN = 640, 420, 16


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
            html(part(columns(training(showcase, metrics))))

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
    return part(f"<h1>{escape(name)}</h1><p class=soft>{' · '.join(facts)}</p>")


def alert(sentence: str) -> str:
    """Why a question cannot be answered."""
    return part(f"<p class=alert role=alert>{escape(sentence)}</p>")


def status(user: str | None, found: Answer) -> str:
    """The question that is answered."""
    who, count = f"user {user}" if user else "someone new", len(found.history)
    by = f"a history of {count} item{'s' * (count != 1)}" if count else "the id alone"
    return part(f"<p class=soft role=status>For {escape(who)}, by {by}. Seen items are left out.</p>")


def suggestions(name: str, method: str, rows: Sequence[Suggestion], unit: str) -> str:
    """A table of items with rank, title, reasons and score."""
    best = max((row.score for row in rows), default=1)
    cells = [
        [str(rank), _named(row) + _because(row), bar(row.score, best, "," if unit == "times seen" else ".3f")]
        for rank, row in enumerate(rows, 1)
    ]
    return part(f"<div class=items>{table(name, method, ['#', 'item', unit], cells, 'Nothing is left.')}</div>")


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
    return part(
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
    tokens = table("Tokens", "of the user and the history", ["", "name", "tokens"], rows)
    return part(f"<div class=scroll tabindex=0 role=region aria-label=Tokens>{tokens}</div>")


def prompt(found: Answer) -> str:
    """The prompt, with its code tokens marked."""
    return part(f"<p>{_marked(found.prompt)}</p>")


def _named(row: Suggestion) -> str:
    return escape(row.title) + f" <span class=soft>{escape(row.item)}</span>" * (row.title != row.item)


def _because(row: Suggestion) -> str:
    return f"<small>because of {escape(', '.join(row.because))}</small>" * bool(row.because)


def _marked(text: str) -> str:
    """A text with the code tokens in the colour of their kind."""
    tokens = re.sub(r"&lt;([uv])(\d+-\d+)&gt;", r"<span class=\1>&lt;\1\2&gt;</span>", escape(text))
    return f"<code>{tokens}</code>"


def _listed(all_of_them: Sequence | Mapping) -> str:
    return f" the first {LISTED:,}, or the id of any other" * (len(all_of_them) > LISTED)
