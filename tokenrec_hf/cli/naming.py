"""Users, items and recommendations as the commands, the page and the service name them: by titles and by code tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .output import Document

if TYPE_CHECKING:
    from ..models.recommender import Recommendation, Recommender


def known_titles(dataset: str | None) -> dict[str, str]:
    """The titles of the items of a known data set, by id; empty for any other."""
    if dataset == "demo":
        from ..data.demo import demo_titles

        return demo_titles()
    if dataset != "ml-100k":
        return {}
    # Imports pandas and datasets, which a recommendation needs for nothing else.
    from ..data.named_datasets import load_item_titles

    try:
        return load_item_titles(dataset)
    except OSError:
        return {}


def item_titles(recommender: Recommender, titles: Mapping[str, str], items: Sequence[str]) -> list[str | None]:
    """The title of each item: its metadata `title`, or that of a known data set."""
    described = recommender.store.metadata(items)
    return [str(own["title"]) if "title" in own else titles.get(item) for item, own in zip(items, described)]


def code_tokens(recommender: Recommender, kind: str, ids: Sequence[str]) -> list[str]:
    """The code tokens of users or items, as they appear in a prompt."""
    tokenizer = recommender.tokenizer
    names, codes = tokenizer.code_token_ids(kind), tokenizer.codes(kind, ids)
    return ["".join(tokenizer.convert_ids_to_tokens(names[range(len(names)), row].tolist())) for row in codes]


def recommended(
    recommender: Recommender,
    titles: Mapping[str, str],
    user: str | None,
    history: list[str],
    found: Sequence[Recommendation],
) -> Document:
    """A user's recommendations with the items of the history that are the reasons for each."""
    rows = ranked(recommender, titles, found)
    reasons = recommender.reasons([row["item"] for row in rows], history) if history else [[] for _ in rows]
    is_known = user is not None and recommender.tokenizer.contains("user", [user]).all()
    return {
        "user": user,
        "tokens": code_tokens(recommender, "user", [str(user)])[0] if is_known else None,
        "history": history,
        "recommendations": [{**row, "because": items} for row, items in zip(rows, reasons)],
    }


def ranked(recommender: Recommender, titles: Mapping[str, str], found: Sequence[Recommendation]) -> list[Document]:
    """Items with rank, tokens and title."""
    items = [row["item"] for row in found]
    named = item_titles(recommender, titles, items)
    return [
        {"rank": rank, "item": row["item"], "score": row["score"], "tokens": code, "title": title}
        for rank, (row, code, title) in enumerate(zip(found, code_tokens(recommender, "item", items), named), 1)
    ]
