"""A trained repository, opened for reading: [`Recommender`] answers from it.

Recommending is one query per prompt (Eq. 17-18 of TokenRec, arXiv 2406.10450) and a search for the items nearest to it by
cosine (Eq. 19). Nothing here changes a repository.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError

from .codes import RepositoryFolder, check_repository, fetch_repository
from .embedding_store import EmbeddingStore, Store
from .modeling_collaborative import HistoryEncoder, collaborative_class, load_collaborative
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate, render
from .tokenization_tokenrec import TokenRecTokenizer


class Recommendation(TypedDict):
    """An item id and the cosine between its vector and the query."""

    item: str
    score: float


def load_model(folder: str | os.PathLike) -> T5ForGenerativeRetrieval:
    """Loads the T5 of a trained repository.

    Raises:
        ValueError: the weights are damaged.
    """
    try:
        return T5ForGenerativeRetrieval.from_pretrained(folder)
    except SafetensorError as error:
        raise ValueError(
            f"{Path(folder) / 'model.safetensors'} is damaged ({error}); restore it from a copy or train again."
        ) from None


def load_history_encoder(folder: str | os.PathLike) -> HistoryEncoder | None:
    """Loads the collaborative model as a [`HistoryEncoder`], or returns None if it is absent or has a vector per user."""
    source = RepositoryFolder(folder).collaborative
    if not source.is_dir() or not collaborative_class(source).users_are_histories:
        return None
    model, ids = load_collaborative(source)
    return HistoryEncoder(model, ids["item"])


class Recommender:
    """Model, tokenizer and store of one repository, checked against each other.

    Args:
        model: a [`T5ForGenerativeRetrieval`].
        tokenizer: its [`TokenRecTokenizer`].
        store: its [`EmbeddingStore`], or another store with the same vectors.
        folder: the repository's folder. Its history encoder makes user tokens from the history of an anonymous user; without
            it, their prompts name items only.

    Raises:
        ValueError: the three belong to different MQ-Tokenizers.
    """

    def __init__(
        self,
        model: T5ForGenerativeRetrieval,
        tokenizer: TokenRecTokenizer,
        store: Store,
        folder: str | os.PathLike | None = None,
    ):
        for kind, space_id in tokenizer.space_ids.items():
            store.check_space(kind, space_id, "the tokenizer")
            trained_on = (model.config.space_ids or {}).get(kind, space_id)
            if trained_on != space_id:
                raise ValueError(
                    f"the model was trained on {kind} tokens of MQ-Tokenizer {trained_on} but the tokenizer makes those of "
                    f"{space_id}; load model and tokenizer of the same repository."
                )
        self.model, self.tokenizer, self.store, self.folder = model, tokenizer, store, folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        store: Store | None = None,
    ) -> Recommender:
        """Opens a trained repository.

        Args:
            name: its folder, or its name on the Hub.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
            store: replaces the repository's own store, for example by one on Milvus.

        Raises:
            FileNotFoundError: the repository is missing, or its training has not finished.
            OSError: the Hub refuses the download.
            ValueError: its parts are damaged or do not belong together, or a change of it was interrupted.
        """
        folder = fetch_repository(name, revision=revision, token=token)
        check_repository(folder)
        store = store or EmbeddingStore.open(RepositoryFolder(folder).store)
        return cls(load_model(folder), TokenRecTokenizer.from_pretrained(folder), store, folder)

    @cached_property
    def history_encoder(self) -> HistoryEncoder | None:
        """Makes user vectors from histories; loaded when the first anonymous user asks. None without FISM or a folder."""
        return None if self.folder is None else load_history_encoder(self.folder)

    def recommend(
        self,
        users: Sequence[str | None],
        histories: Sequence[Sequence[str] | None] | None = None,
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        where: Mapping[str, Any] | None = None,
        template: PromptTemplate | None = None,
    ) -> list[list[Recommendation]]:
        """The best items for each user.

        Args:
            users: user ids; `None` for an anonymous user, of whom only the history is known.
            histories: for each user the item ids to show the model, oldest first. `None` takes the history in the store; an
                empty history asks by user id only.
            top_k: number of items; fewer are returned where fewer are left.
            exclude_seen: leave out the items of the histories and those that the store records as seen.
            where: only items with this metadata, see [`EmbeddingStore.search`].
            template: the wording; one without history ignores the histories.

        Returns:
            Per user a list of `{"item": id, "score": cosine}`, best first.

        Raises:
            KeyError: an id is unknown to the tokenizer.
            ValueError: the number of histories is not that of users, a request has neither a user nor a history, or the template
                does not fit the request.
        """
        shown = self._histories(users, histories)
        prompts = self.prompts(users, shown, template)
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt", return_entities=True)
        # Whole histories: items that are cut from the prompt have been seen too.
        return self.answer({**inputs, "item_ids": shown}, top_k=top_k, exclude_seen=exclude_seen, where=where)

    def similar_items(
        self, item_ids: Sequence[str], *, top_k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[list[Recommendation]]:
        """The items nearest to each of `item_ids` by the cosine of their vectors in the store, without the item itself.

        Args:
            item_ids: ids in the store.
            top_k: number of items; fewer are returned where fewer are left.
            where: only items with this metadata, see [`EmbeddingStore.search`].

        Returns:
            Per item a list of `{"item": id, "score": cosine}`, best first.

        Raises:
            KeyError: an id is not in the store.
        """
        return self._search(self.store.get("item", item_ids), top_k, [[item] for item in item_ids], where)

    def prompts(
        self,
        users: Sequence[str | None],
        histories: Sequence[Sequence[str] | None] | None = None,
        template: PromptTemplate | None = None,
    ) -> list[str]:
        """The prompts of `recommend`, with histories cut to the latest items that fit into the model's input."""
        shown = self._histories(users, histories)
        written = []
        for user, history, name in zip(users, shown, self._names(users, shown)):
            default = (
                HISTORY_ONLY_TEMPLATE if name is None else (HISTORY_TEMPLATES if history else USER_ONLY_TEMPLATES)[0]
            )
            wording = template or default
            if wording.names_user and name is None:
                raise ValueError(
                    f"prompt template {wording.text!r} names a user, but the request has no user id and no user tokens can be "
                    "made from its history; use a template with {history} alone."
                )
            if user is not None and not wording.names_user:
                raise ValueError(f"prompt template {wording.text!r} must hold {{user}} once, because it is for a user.")
            latest = history[len(history) - self._room(wording, len(history)) :]
            written.append(render(wording, name or "", latest))
        return written

    def answer(
        self,
        inputs: Mapping[str, Any],
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        where: Mapping[str, Any] | None = None,
    ) -> list[list[Recommendation]]:
        """The best items for tokenised prompts.

        Args:
            inputs: `input_ids` and `attention_mask`, `[B, T]`, and for each prompt the lists `user_ids` and `item_ids` of the
                tokenizer's `return_entities=True`.
            top_k, exclude_seen, where: see `recommend`.

        Raises:
            ValueError: `exclude_seen` without the ids.
        """
        queries = self.model.encode_by_length(inputs["input_ids"], inputs["attention_mask"])
        excluded = None
        if exclude_seen:
            if "user_ids" not in inputs or "item_ids" not in inputs:
                raise ValueError(
                    "exclude_seen needs the ids that the prompts name: tokenise them with return_entities=True, or pass "
                    "exclude_seen=False."
                )
            recorded = [self.store.seen(users) for users in inputs["user_ids"]]
            excluded = [
                [*named, *(item for items in seen for item in items)]
                for named, seen in zip(inputs["item_ids"], recorded)
            ]
        return self._search(queries.float().cpu(), top_k, excluded, where)

    def _search(
        self, queries: torch.Tensor, top_k: int, excluded: list[list[str]] | None, where: Mapping[str, Any] | None
    ) -> list[list[Recommendation]]:
        ids, scores = self.store.search(queries, top_k, excluded, where)
        return [[{"item": item, "score": score} for item, score in zip(*row)] for row in zip(ids, scores)]

    def _names(self, users: Sequence[str | None], histories: Sequence[list[str]]) -> list[str | None]:
        """The text after `user_` in each prompt: an id, the code tokens of an anonymous user's history, or None."""
        names = list(users)
        rows = [row for row, user in enumerate(users) if user is None]
        if (empty := next((row for row in rows if not histories[row]), None)) is not None:
            raise ValueError(f"request {empty} names neither a user nor a history; give one of them.")
        if rows and self.history_encoder is not None:
            vectors, known = self.history_encoder.encode([histories[row] for row in rows])
            for row, text, is_known in zip(rows, self.tokenizer.code_text("user", vectors), known):
                names[row] = text if is_known else None
        return names

    def _histories(
        self, users: Sequence[str | None], histories: Sequence[Sequence[str] | None] | None
    ) -> list[list[str]]:
        """The given history of each user, and the one in the store where None is given."""
        given = [None] * len(users) if histories is None else histories
        if len(given) != len(users):
            raise ValueError(f"there are {len(given)} histories for {len(users)} users; pass one for each, or None.")
        seen = iter(self.store.seen([user for user in users if user is not None]))
        recorded = [[] if user is None else next(seen) for user in users]
        return [own if history is None else list(history) for history, own in zip(given, recorded)]

    def _room(self, template: PromptTemplate, wanted: int) -> int:
        """How many of `wanted` history items fit beside the words of a template."""
        if not template.uses_history or not wanted:
            return 0
        words = sum(map(len, self.tokenizer.split_prompt(template)))
        user, item = (self.tokenizer.entity_token_ids(kind, []).shape[1] for kind in ("user", "item"))
        return min(wanted, (self.tokenizer.model_max_length - words - user * template.names_user) // item)
