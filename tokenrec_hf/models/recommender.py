"""A trained repository, opened for reading: [`Recommender`] answers from it.

Recommending is one query per prompt (Eq. 17-18 of TokenRec, arXiv 2406.10450) and a search for the items nearest to it by
cosine (Eq. 19). Nothing here changes a repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from safetensors import SafetensorError

from .codes import RepositoryFolder, check_repository, damage_named, fetch_repository, read_json, read_whole
from .configuration_tokenrec import T5GenerativeRetrievalConfig
from .embedding_store import EmbeddingStore, Store, stable_topk, unit_rows
from .modeling_collaborative import HistoryEncoder, collaborative_class, load_collaborative
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate
from .tokenization_tokenrec import TokenRecTokenizer


class Recommendation(TypedDict):
    """An item id and the cosine between its vector and the query."""

    item: str
    score: float


def load_model(folder: str | os.PathLike) -> T5ForGenerativeRetrieval:
    """Loads the T5 of a trained repository.

    Raises:
        ValueError: the configuration or the weights are damaged.
    """
    advice = "restore it from a copy or train again"
    read_json(Path(folder) / "config.json")
    with damage_named(Path(folder) / "config.json", advice):
        config = T5GenerativeRetrievalConfig.from_pretrained(folder)
    try:
        return T5ForGenerativeRetrieval.from_pretrained(folder, config=config)
    except (SafetensorError, RuntimeError) as error:
        # The report of transformers about weights of another size comes before its error.
        reason = " ".join(str(error).split()) if isinstance(error, SafetensorError) else "it does not fit config.json"
        raise ValueError(f"{Path(folder) / 'model.safetensors'} is damaged ({reason}); {advice}.") from None


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
            ValueError: its parts are damaged or do not belong together.
        """
        folder = fetch_repository(name, revision=revision, token=token)
        check_repository(folder)
        model, place = load_model(folder), RepositoryFolder(folder).store
        return read_whole(
            place,
            lambda: cls(model, TokenRecTokenizer.from_pretrained(folder), store or EmbeddingStore.open(place), folder),
        )

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
            ValueError: an argument is no list of ids, the number of histories is not that of users, a request has neither a user
                nor a history, or the template does not fit the request.
        """
        return self.answer(
            self.tokenize(users, histories, template), top_k=top_k, exclude_seen=exclude_seen, where=where
        )

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

    def reasons(self, item_ids: Sequence[str], history: Sequence[str], *, most: int = 2) -> list[list[str]]:
        """The items of a history that are nearest to each item by the cosine of their vectors, nearest first.

        Args:
            item_ids: ids in the store, as recommended to the user of the history.
            history: item ids; those that are not in the store are left out.
            most: how many to name.

        Raises:
            KeyError: one of `item_ids` is not in the store.
        """
        seen = list(dict.fromkeys(history))
        known = [item for item, is_known in zip(seen, self.store.contains("item", seen)) if is_known]
        cosines = unit_rows(self.store.get("item", item_ids)) @ unit_rows(self.store.get("item", known)).T
        # An item is no reason for itself.
        cosines[
            torch.tensor([[item == one for one in known] for item in item_ids], dtype=torch.bool).view(cosines.shape)
        ] = -torch.inf
        columns, scores = stable_topk(cosines, most)
        return [
            [known[column] for column, score in zip(*row) if score > -torch.inf]
            for row in zip(columns.tolist(), scores.tolist())
        ]

    def tokenize(
        self,
        users: Sequence[str | None],
        histories: Sequence[Sequence[str] | None] | None = None,
        template: PromptTemplate | None = None,
    ) -> dict[str, Any]:
        """The prompts of `recommend` as `answer` takes them, with histories cut to the latest items that fit the model's input.

        Prompts are made of the tokens of ids, not of text, so that an id cannot be read as anything else.
        """
        users = check_list(users, "users", optional=True)
        shown = self._histories(users, histories)
        rows = [
            self._prompt(number, tokens, history, template if template else _wording(tokens, history), user is not None)
            for number, (user, tokens, history) in enumerate(zip(users, self._user_tokens(users, shown), shown))
        ]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [B, T]
        tokens = np.full(is_token.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        tokens[is_token] = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
        return {
            "input_ids": torch.from_numpy(tokens),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
            "user_ids": [[] if user is None else [user] for user in users],
            # Whole histories: items that are cut from the prompt have been seen too.
            "item_ids": shown,
        }

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
        if not len(inputs["input_ids"]):
            return []
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

    def _user_tokens(self, users: Sequence[str | None], histories: Sequence[list[str]]) -> list[np.ndarray | None]:
        """The tokens of each user, those of the history of an anonymous one, or None where no tokens can be made."""
        known = [row for row, user in enumerate(users) if user is not None]
        tokens: list[np.ndarray | None] = [None] * len(users)
        for row, own in zip(known, self.tokenizer.entity_token_ids("user", [cast(str, users[row]) for row in known])):
            tokens[row] = own
        anonymous = [row for row, user in enumerate(users) if user is None]
        if (empty := next((row for row in anonymous if not histories[row]), None)) is not None:
            raise ValueError(f"request {empty} names neither a user nor a history; give one of them.")
        if anonymous and self.history_encoder is not None:
            vectors, is_known = self.history_encoder.encode([histories[row] for row in anonymous])
            made = self.tokenizer.vector_token_ids("user", vectors)
            for row, own, useful in zip(anonymous, made, is_known):
                tokens[row] = own if useful else None
        return tokens

    def _prompt(
        self, number: int, user: np.ndarray | None, history: list[str], wording: PromptTemplate, is_named: bool
    ) -> np.ndarray:
        """The tokens of one prompt, int64 `[T]`."""
        if wording.names_user and user is None:
            raise ValueError(
                f"prompt template {wording.text!r} names a user, but request {number} has no user id and no user tokens can be "
                "made from its history; use a template with {history} alone."
            )
        if is_named and not wording.names_user:
            raise ValueError(f"prompt template {wording.text!r} must hold {{user}} once, because it is for a user.")
        words, entities = self.tokenizer.split_prompt(wording), []
        if user is not None and wording.names_user:
            entities.append(user)
        if wording.uses_history:
            size = self.tokenizer.entity_token_ids("item", []).shape[1]
            room = self.tokenizer.model_max_length - sum(map(len, (*words, *entities)))
            latest = history[len(history) - min(len(history), room // size) :]
            entities.append(self.tokenizer.entity_token_ids("item", latest).ravel())
        return np.concatenate([words[0], *chain.from_iterable(zip(entities, words[1:]))])

    def _histories(
        self, users: Sequence[str | None], histories: Sequence[Sequence[str] | None] | None
    ) -> list[list[str]]:
        """The given history of each user, and the one in the store where None is given."""
        given = [None] * len(users) if histories is None else histories
        if isinstance(given, str) or len(given) != len(users):
            found = "a single string" if isinstance(given, str) else f"{len(given)} histories"
            raise ValueError(f"there are {found} for {len(users)} users; pass one history for each, or None.")
        seen = iter(self.store.seen([user for user in users if user is not None]))
        recorded = [[] if user is None else next(seen) for user in users]
        return [
            own if history is None else check_list(history, f"the history of request {row}")
            for row, (history, own) in enumerate(zip(given, recorded))
        ]


def _wording(user: np.ndarray | None, history: list[str]) -> PromptTemplate:
    """The default template of a request."""
    if user is None:
        return HISTORY_ONLY_TEMPLATE
    return (HISTORY_TEMPLATES if history else USER_ONLY_TEMPLATES)[0]


def check_list(ids: Any, what: str, optional: bool = False) -> list:
    """`ids` as a list.

    Raises:
        ValueError: it is a single string or no sequence, or an entry is no string (nor None, if that is allowed).
    """
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise ValueError(f"{what} must be a list of ids, not {ids!r:.100}.")
    listed = list(ids)
    for one in listed:
        if not isinstance(one, str) and not (optional and one is None):
            raise ValueError(f"{what} must be a list of ids, which are strings, but one is {one!r:.100}.")
    return listed
