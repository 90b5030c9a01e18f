"""What the page of `tokenrec demo` shows of a repository, as plain data; the module knows nothing about the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..models.embedding_store import WITHDRAWN
from ..models.functional import unit_rows
from ..models.recommender import Recommender
from .naming import code_tokens, item_titles

Where = Mapping[str, Sequence[Any]]

# The most items that the map draws, and the most values of a column of metadata that is offered as a filter.
MAP_ITEMS, FILTER_VALUES = 2_000, 1_000


@dataclass(frozen=True)
class Suggestion:
    """An item of a list: id, title, score, and the titles of the history items that are nearest to it."""

    item: str
    title: str
    score: float
    because: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to one question, beside the answers of two simple methods.

    Args:
        prompt: what T5 has read, with code tokens.
        history: item ids, oldest first.
        tokens: the code tokens of each item of the history.
        query: what T5 has made of the prompt, `[1, d]`.
        recommended: the items nearest to the query, with cosines.
        nearest: the items nearest to the mean vector of the history, with cosines.
        popular: the items that users have seen most often, with the number of times.
    """

    prompt: str
    history: list[str]
    tokens: list[str]
    query: torch.Tensor
    recommended: list[Suggestion]
    nearest: list[Suggestion]
    popular: list[Suggestion]


@dataclass(frozen=True)
class Usage:
    """How a codebook is used: the share of its codewords that are, and exp of the entropy of all its codewords."""

    book: int
    used: float
    perplexity: float


class Showcase:
    """A recommender, and what the page needs of all items, computed once.

    Args:
        recommender: an open repository.
        titles: of items that have no `title` in their metadata.
    """

    def __init__(self, recommender: Recommender, titles: Mapping[str, str] | None = None):
        self.recommender, store = recommender, recommender.store
        self.users, items = store.ids("user"), store.ids("item")
        named = item_titles(recommender, titles or {}, items)
        self.titles = {item: title or item for item, title in zip(items, named)}
        self.filters = _filters(store.metadata(items))
        # Principal component analysis of the directions of the item vectors: only their cosines count.
        unit = unit_rows(store.vectors("item"))
        self._centre = unit.mean(dim=0)
        variances, axes = torch.linalg.eigh((unit - self._centre).T @ (unit - self._centre))
        self._axes, self.explained = axes[:, -2:].flip(1), float(variances[-2:].sum() / variances.sum())
        # Those of a large catalogue at equal distances in the order of the store.
        self.drawn = [items[row] for row in np.linspace(0, len(items) - 1, min(len(items), MAP_ITEMS), dtype=int)]

    def ask(self, user: str | None, history: Sequence[str], top_k: int = 10, where: Where | None = None) -> Answer:
        """Recommends to a user, or to an anonymous one by a history; seen items are left out of every list.

        Args:
            user: user id, or None.
            history: item ids, oldest first; if empty, those of the user in the store.
            top_k: number of items in each list.
            where: only items with one of the values of each column.

        Raises:
            KeyError: an id is unknown.
            ValueError: there is neither a user nor a history.
        """
        if user is None and not history:
            raise ValueError("Choose a user, or items for the history of someone new.")
        recommender, store = self.recommender, self.recommender.store
        inputs = recommender.tokenize([user], [history or None])
        shown = inputs["item_ids"][0]
        seen = {*shown, *chain.from_iterable(store.seen(inputs["user_ids"][0]))}
        query = recommender.model.encode_by_length(inputs["input_ids"], inputs["attention_mask"]).float().cpu()
        prompt = recommender.tokenizer.decode(inputs["input_ids"][0], resolve_ids=False, skip_special_tokens=True)
        mean = unit_rows(store.get("item", shown)).mean(dim=0, keepdim=True) if shown else None
        popular = [row for row in store.popular(top_k + len(seen), where).items() if row[0] not in seen]
        return Answer(
            prompt=str(prompt),
            history=shown,
            tokens=code_tokens(recommender, "item", shown),
            query=query,
            recommended=self._search(query, shown, seen, top_k, where),
            nearest=[] if mean is None else self._search(mean, shown, seen, top_k, where),
            popular=[Suggestion(item, self.titles[item], count) for item, count in popular[:top_k]],
        )

    def user_tokens(self, user: str) -> str:
        """The code tokens of a user."""
        return code_tokens(self.recommender, "user", [user])[0]

    def places(self, items: Sequence[str]) -> np.ndarray:
        """Where items lie on the map, `[n, 2]`."""
        return self.project(self.recommender.store.get("item", items))

    def project(self, vectors: torch.Tensor) -> np.ndarray:
        """Where vectors `[n, d]` lie on the map, `[n, 2]`."""
        return ((unit_rows(vectors) - self._centre) @ self._axes).numpy()

    def usage(self, kind: str) -> list[Usage]:
        """How each codebook is used by the users or items of the repository; empty if there are none."""
        _, size = self.recommender.tokenizer.codebooks[kind]
        result = []
        for book, column in enumerate(self.recommender.tokenizer.codes(kind).T, 1):
            shares = np.bincount(column, minlength=size) / max(len(column), 1)
            entropy = -(shares * np.log(shares, where=shares > 0, out=np.zeros(size))).sum()
            result.append(Usage(book, float((shares > 0).mean()), float(np.exp(entropy))))
        return result

    def _search(
        self, vector: torch.Tensor, history: list[str], seen: set[str], top_k: int, where: Where | None
    ) -> list[Suggestion]:
        (items,), (scores,) = self.recommender.store.search(vector, top_k, [sorted(seen)], where)
        reasons = self.recommender.reasons(items, history)
        return [
            Suggestion(item, self.titles[item], score, [self.titles[one] for one in because])
            for item, score, because in zip(items, scores, reasons)
        ]


def _filters(metadata: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The columns of metadata with few values: for each, its values by their text."""
    columns: dict[str, dict[str, Any]] = {}
    for own in metadata:
        for name, value in own.items():
            columns.setdefault(name, {})[str(value)] = value
    return {
        name: dict(sorted(values.items()))
        for name, values in columns.items()
        if name not in ("title", WITHDRAWN) and len(values) <= FILTER_VALUES
    }
