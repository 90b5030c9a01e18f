"""Users and items as the commands, the page and the service name them: by titles and by code tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.recommender import Recommender


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
