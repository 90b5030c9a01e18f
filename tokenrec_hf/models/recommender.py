"""A trained repository, opened for reading: [`Recommender`] answers from it.

Recommending is one query per prompt (Eq. 17-18 of TokenRec, arXiv 2406.10450) and a search for the items nearest to it by
cosine (Eq. 19). Nothing here changes a repository.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from .codes import RepositoryFolder, check_repository, damage_named, fetch_repository, read_json, read_whole
from .configuration_tokenrec import T5GenerativeRetrievalConfig
from .embedding_store import EmbeddingStore, Store, Where
from .functional import stable_topk, unit_rows
from .modeling_collaborative import HistoryEncoder, collaborative_class, load_collaborative
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate
from .tokenization_tokenrec import TokenRecTokenizer

Users = Sequence[str | None]
Histories = Sequence[Sequence[str] | None]
OnUnknown = Literal["error", "skip", "popular"]


class Recommendation(TypedDict, total=False):
    """An item, the cosine between its vector and the query (None for a popular item), and what was left out of the request."""

    item: str
    score: float | None
    note: str


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
        users: Users,
        histories: Histories | None = None,
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        where: Where | None = None,
        template: PromptTemplate | str | None = None,
        on_unknown: OnUnknown = "error",
    ) -> list[list[Recommendation]]:
        """The best items for each user.

        Args:
            users: user ids; `None` for an anonymous user, of whom only the history is known.
            histories: for each user the item ids to show the model, oldest first. `None` takes the history in the store; an
                empty history asks by user id only.
            top_k: number of items; fewer are returned where fewer are left.
            exclude_seen: leave out the items of the histories and those that the store records as seen.
            where: only items with this metadata, see [`EmbeddingStore.search`].
            template: the wording, or the text of one; one without history ignores the histories.
            on_unknown: `"error"` names all requests with unknown ids. `"skip"` leaves unknown ids out: an unknown user is answered by
                the history alone, and without one by an empty list; with `"popular"`, by the items that users have seen most often.

        Returns:
            Per user a list of `{"item": id, "score": cosine}`, best first. Where something was left out of the request, each
            entry has a `"note"` that names it. Popular items have the score `None`.

        Raises:
            KeyError: an id is unknown to the tokenizer.
            ValueError: an argument is no list of ids, the number of histories is not that of users, a request has neither a user
                nor a history, the template does not fit, no item has the metadata of `where`, or no item is popular.
        """
        inputs = self.tokenize(users, histories, template, on_unknown)
        return self.answer(inputs, top_k=top_k, exclude_seen=exclude_seen, where=where, on_unknown=on_unknown)

    def similar_items(
        self, item_ids: Sequence[str], *, top_k: int = 10, where: Where | None = None
    ) -> list[list[Recommendation]]:
        """The items nearest to each of `item_ids` by the cosine of their vectors in the store, without the item itself.

        Args:
            item_ids: ids in the store.
            top_k, where: see `recommend`.

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
            ValueError: `most` is below 1, or `history` is a single string.
        """
        if most < 1:
            raise ValueError(f"most is {most}; it must be at least 1.")
        known = self._in_store(list(dict.fromkeys(check_list(history, "the history"))))
        cosines = unit_rows(self.store.get("item", item_ids)) @ unit_rows(self.store.get("item", known)).T
        # An item is no reason for itself.
        is_same = np.array(item_ids, dtype=object)[:, None] == np.array(known, dtype=object)
        cosines[torch.from_numpy(is_same)] = -torch.inf
        columns, scores = stable_topk(cosines, most)
        return [
            [known[column] for column, score in zip(*row) if score > -torch.inf]
            for row in zip(columns.tolist(), scores.tolist())
        ]

    def tokenize(
        self,
        users: Users,
        histories: Histories | None = None,
        template: PromptTemplate | str | None = None,
        on_unknown: OnUnknown = "error",
    ) -> dict[str, Any]:
        """The prompts of `recommend` as `answer` takes them, with histories cut to the latest items that fit the model's input.

        Prompts are made of the tokens of ids, not of text, so that an id cannot be read as anything else. A request of which
        nothing is known has a prompt without tokens, and `notes` say what was left out of each request.
        """
        template = PromptTemplate(template) if isinstance(template, str) else template
        users, shown, notes = self.known(users, histories, on_unknown)
        items = self.tokenizer.entity_token_ids("item", list(chain.from_iterable(shown)))  # [n, P + K]
        read = np.split(items, np.cumsum([len(history) for history in shown]))
        rows = [
            # The given wording may name the user who was left out.
            self._prompt(number, tokens, history, None if note and user is None else template, user is not None)
            for number, (user, tokens, history, note) in enumerate(
                zip(users, self._user_tokens(users, shown), read, notes)
            )
        ]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        is_token = np.arange(lengths.max(initial=1)) < lengths[:, None]  # [B, T]
        tokens = np.full(is_token.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        tokens[is_token] = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
        return {
            "input_ids": torch.from_numpy(tokens),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
            "user_ids": [[] if user is None else [user] for user in users],
            # Whole histories: items that are cut from the prompt have been seen too.
            "item_ids": shown,
            "notes": notes,
        }

    def known(
        self, users: Users, histories: Histories | None = None, on_unknown: OnUnknown = "error"
    ) -> tuple[list[str | None], list[list[str]], list[str]]:
        """Users and histories of known ids, and for each request a note of what was left out; arguments of `recommend`.

        Raises:
            KeyError: an id is unknown; all requests with one are counted, and the first are named.
            ValueError: an argument is no list of ids, or a request has neither a user nor a history.
        """
        if on_unknown not in (choices := get_args(OnUnknown)):
            raise ValueError(f"on_unknown is {on_unknown!r}; it must be one of {', '.join(map(repr, choices))}.")
        users = check_list(users, "users", optional=True)
        shown = self._histories(users, histories)
        named = {"user": [user for user in users if user is not None], "item": list(chain.from_iterable(shown))}
        unknown = {kind: set(compress(ids, ~self.tokenizer.contains(kind, ids))) for kind, ids in named.items()}
        notes = [_problem(user, history, unknown) for user, history in zip(users, shown)]
        if not any(notes):
            return users, shown, notes
        if on_unknown == "error":
            bad = [f"{note} (request {row})" if len(users) > 1 else note for row, note in enumerate(notes) if note]
            more = f"; and {len(bad) - 3} more requests" * (len(bad) > 3)
            raise (KeyError if any(unknown.values()) else ValueError)(
                f"{'; '.join(bad[:3])}{more}; correct or add what is unknown, or pass on_unknown='skip' or 'popular'."
            )
        users = [None if user in unknown["user"] else user for user in users]
        return users, [[item for item in history if item not in unknown["item"]] for history in shown], notes

    def answer(
        self,
        inputs: Mapping[str, Any],
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        where: Where | None = None,
        on_unknown: OnUnknown = "skip",
    ) -> list[list[Recommendation]]:
        """The best items for tokenised prompts.

        Args:
            inputs: `input_ids` and `attention_mask`, `[B, T]`, and for each prompt the lists `user_ids` and `item_ids` of the
                tokenizer's `return_entities=True`, which `exclude_seen` needs. A prompt without tokens has no items, or popular ones.
            top_k, exclude_seen, where, on_unknown: see `recommend`.
        """
        has_prompt, excluded = inputs["attention_mask"].any(dim=1), None
        is_asked = has_prompt.tolist()
        if exclude_seen:
            if "user_ids" not in inputs or "item_ids" not in inputs:
                raise ValueError("exclude_seen needs the ids that prompts name: tokenise with return_entities=True.")
            seen = iter(self.store.seen(list(chain.from_iterable(inputs["user_ids"]))))
            excluded = [
                [*named, *chain.from_iterable(next(seen) for _ in users)]
                for named, users in compress(zip(inputs["item_ids"], inputs["user_ids"]), is_asked)
            ]
        queries = self.model.encode_by_length(*(inputs[name][has_prompt] for name in ("input_ids", "attention_mask")))
        found = iter(self._search(queries.float().cpu(), top_k, excluded, where))
        popular = self._popular(top_k, where) if on_unknown == "popular" and not all(is_asked) else []
        answers = [next(found) if asked else [row.copy() for row in popular] for asked in is_asked]
        for rows, note, asked in zip(answers, inputs.get("notes", ()), is_asked):
            for row in rows if note else ():
                row["note"] = note if asked else f"{note}; these are the most popular items"
        return answers

    def _search(
        self, queries: torch.Tensor, top_k: int, excluded: list[list[str]] | None, where: Where | None
    ) -> list[list[Recommendation]]:
        ids, scores = self.store.search(queries, top_k, excluded, where)
        return [[{"item": item, "score": score} for item, score in zip(*row)] for row in zip(ids, scores)]

    def _popular(self, top_k: int, where: Where | None) -> list[Recommendation]:
        """The items that users have seen most often."""
        if not self.store.popular(1):
            raise ValueError("no item is popular: the store has no seen items of users; pass on_unknown='skip'.")
        return [{"item": item, "score": None} for item in self.store.popular(top_k, where)]

    def _user_tokens(self, users: Users, histories: Sequence[list[str]]) -> list[np.ndarray | None]:
        """The tokens of each user, those of the history of an anonymous one, or None where no tokens can be made."""
        known = [row for row, user in enumerate(users) if user is not None]
        tokens: list[np.ndarray | None] = [None] * len(users)
        for row, own in zip(known, self.tokenizer.entity_token_ids("user", [cast(str, users[row]) for row in known])):
            tokens[row] = own
        anonymous = [row for row, user in enumerate(users) if user is None and histories[row]]
        if anonymous and self.history_encoder is not None:
            vectors, is_known = self.history_encoder.encode([histories[row] for row in anonymous])
            for place in np.flatnonzero(~is_known):
                # Items that have vectors only: their mean, which is in the same space.
                given = self.store.get("item", self._in_store(histories[anonymous[place]]))[:, : vectors.shape[1]]
                vectors[place] = F.normalize(unit_rows(given).sum(dim=0), dim=0)
            for row, vector, own in zip(anonymous, vectors, self.tokenizer.vector_token_ids("user", vectors)):
                # Another store may have none of the items.
                tokens[row] = own if vector.any() else None
        return tokens

    def _in_store(self, items: list[str]) -> list[str]:
        """The items that the store has, which may be another one than the repository's."""
        return list(compress(items, self.store.contains("item", items)))

    def _prompt(
        self, number: int, user: np.ndarray | None, items: np.ndarray, template: PromptTemplate | None, is_named: bool
    ) -> np.ndarray:
        """The tokens of one prompt, int64 `[T]`, with the latest `items` `[n, P + K]`; none if nothing is known of the request."""
        if not is_named and not len(items):
            return np.empty(0, dtype=np.int64)
        default = (
            HISTORY_ONLY_TEMPLATE if user is None else (HISTORY_TEMPLATES if len(items) else USER_ONLY_TEMPLATES)[0]
        )
        wording = template or default
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
            room = self.tokenizer.model_max_length - sum(map(len, (*words, *entities)))
            entities.append(items[len(items) - min(len(items), room // items.shape[1]) :].ravel())
        return np.concatenate([words[0], *chain.from_iterable(zip(entities, words[1:]))])

    def _histories(self, users: Users, histories: Histories | None) -> list[list[str]]:
        """The given history of each user, and the one in the store where None is given."""
        given = [None] * len(users) if histories is None else histories
        if isinstance(given, str) or len(given) != len(users):
            found = "a single string" if isinstance(given, str) else f"{len(given)} histories"
            raise ValueError(f"there are {found} for {len(users)} users; pass one history for each, or None.")
        # Nobody is called "".
        seen = iter(self.store.seen([user or "" for user, history in zip(users, given) if history is None]))
        return [
            # An item counts once, as in training.
            next(seen) if history is None else list(dict.fromkeys(check_list(history, f"the history of request {row}")))
            for row, history in enumerate(given)
        ]


def _problem(user: str | None, history: Sequence[str], unknown: Mapping[str, Container[str]]) -> str:
    """What is wrong with a request, if anything, given the unknown ids of each kind."""
    bad = [("user", user)] * (user in unknown["user"])
    bad += [("item", item) for item in dict.fromkeys(history) if item in unknown["item"]]
    if not bad:
        return "" if user is not None or history else "neither a user nor a history is named"
    more = f" and {len(bad) - 3} more" * (len(bad) > 3)
    return ", ".join(f"{kind} {name!r:.100} is unknown" for kind, name in bad[:3]) + more


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
