"""What the commands say about ids, metadata and values that a repository does not have: those that it has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.embedding_store import Store
    from ..models.recommender import Recommender

# Unknown ids that get a suggestion, ids that are compared with each (a second's work), and values that are listed.
MOST_UNKNOWN, MOST_COMPARED, MOST_LISTED = 3, 50_000, 8


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


def check_filters(store: Store, where: Mapping[str, Sequence[Any]], names: Iterable[str] = ()) -> None:
    """Makes sure that some item has each value of a filter.

    Args:
        store: holds the metadata.
        where: a filter with a list of values for each condition.
        names: further names of metadata.

    Raises:
        ValueError: no item has a value or a name; the message lists those that there are.
    """
    import numpy as np

    from ..models.embedding_store import WITHDRAWN, condition_parts

    # Any query finds an item if one is left.
    query = np.ones((1, store.embedding_dim), dtype=np.float32)
    wanted = [(condition, value) for condition, values in where.items() for value in values]
    unmet = [(one, value) for one, value in wanted if not store.search(query, 1, where={one: [value]})[0][0]]
    if not unmet and not names:
        return
    known: dict[str, dict[Any, None]] = {}
    for values in store.metadata(store.ids("item")):
        for name, value in values.items():
            known.setdefault(name, {})[value] = None
    known.pop(WITHDRAWN, None)
    for name in (*(condition_parts(condition)[0] for condition, _ in unmet), *names):
        if name not in known:
            there = (
                f"there are {_listed(known)}" if known else "items have none; give them some with `add --item-metadata`"
            )
            raise ValueError(f"no item has the metadata {name!r:.100}; {there}.")
    for condition, value in unmet:
        name, sign = condition_parts(condition)
        raise ValueError(f"no item fits {name}{sign or '='}{value!s:.100}; {name} is {_described(list(known[name]))}.")


def _described(values: Sequence[Any]) -> str:
    """The range of numbers, or the first of other values."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return f"between {min(values)} and {max(values)}"
    return _listed(values)


def _listed(values: Iterable[Any]) -> str:
    listed = list(values)
    more = f" and {len(listed) - MOST_LISTED} more" * (len(listed) > MOST_LISTED)
    return ", ".join(repr(value)[:60] for value in listed[:MOST_LISTED]) + more
