"""How the commands, the page and the service name users and items: by titles and code tokens; of unknown ones, the closest known.

Also the recommendations as documents, which are lists of named items.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

from .arguments import read_scalar
from .output import Document

if TYPE_CHECKING:
    from ..models.embedding_store import Store
    from ..models.recommender import Recommendation, Recommender

# Unknown ids that get a suggestion, ids that are compared with each (a second's work), and values that are listed.
MOST_UNKNOWN, MOST_COMPARED, MOST_LISTED = 3, 50_000, 8


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


@contextmanager
def suggestions(recommender: Recommender, **given: Sequence[str] | None) -> Iterator[None]:
    """Adds the closest known ids to a KeyError about unknown ones.

    Args:
        recommender: knows the ids.
        given: the ids of the request, by kind: `user=["03"], item=["08", "24"]`.
    """
    try:
        yield
    except KeyError as error:
        found = []
        for kind, ids in given.items():
            unknown = compress(ids or (), ~recommender.tokenizer.contains(kind, ids or ()))
            for one in islice(unknown, MOST_UNKNOWN):
                similar = (name for name in recommender.tokenizer.ids(kind) if abs(len(name) - len(one)) <= 2)
                found += difflib.get_close_matches(one, list(islice(similar, MOST_COMPARED)), n=1, cutoff=0.7)
        hint = f" Did you mean {' and '.join(map(repr, found))}?" if found else ""
        raise KeyError(f"{error.args[0]}{hint}") from None


def typed_filters(store: Store, where: Mapping[str, Sequence[str]], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    """A filter with the values as the metadata have them: `1984` may be a number or a text.

    Args:
        store: holds the metadata.
        where: the text of the values for each condition.
        names: further names of metadata, which some item must have.

    Raises:
        ValueError: no item has a name, or one of the values; the message lists those that there are.
    """
    import numpy as np

    from ..models.embedding_store import condition_parts

    # Any query finds an item if one is left, and a search refuses names that no item has.
    query = np.ones((1, store.embedding_dim), dtype=np.float32)
    for name in names:
        store.search(query, 1, where={name: []})
    filters: dict[str, list[Any]] = {}
    for condition, text in ((condition, text) for condition, texts in where.items() for text in texts):
        number = read_scalar(text)
        is_typed = not isinstance(number, str) and math.isfinite(number) and not condition.endswith("~")
        candidates = [number, text] if is_typed else [text]
        met = [value for value in candidates if store.search(query, 1, where={condition: [value]})[0][0]]
        if not met:
            name, sign = condition_parts(condition)
            known = dict.fromkeys(values[name] for values in store.metadata(store.ids("item")) if name in values)
            raise ValueError(f"no item fits {name}{sign or '='}{text:.100}; {name} is {_described(list(known))}.")
        filters.setdefault(condition, []).extend(met)
    return filters


def _described(values: Sequence[Any]) -> str:
    """The range of numbers, or the first of other values."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return f"between {min(values)} and {max(values)}"
    more = f" and {len(values) - MOST_LISTED} more" * (len(values) > MOST_LISTED)
    return ", ".join(repr(value)[:60] for value in values[:MOST_LISTED]) + more
