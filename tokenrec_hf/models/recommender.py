"""A trained repository, opened for reading: the names of its parts, its download, and [`Recommender`], which answers from it.

Recommending is one query per prompt (Eq. 17-18 of TokenRec, arXiv 2406.10450) and a search for the items nearest to it by
cosine (Eq. 19). Nothing here changes a repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from .codes import IdIndex
from .embedding_store import MANIFEST, EmbeddingStore
from .modeling_collaborative import CollaborativeModel, HistoryEncoder, collaborative_class, load_collaborative
from .modeling_mq_tokenizer import MQTokenizerModel
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate, render
from .tokenization_tokenrec import MQ_FOLDERS, TokenRecTokenizer

if TYPE_CHECKING:
    from typing import TypedDict

    class Recommendation(TypedDict):
        """An item id and the cosine between its vector and the query."""

        item: str
        score: float


STORE, COLLABORATIVE = "store", "collaborative"
# Files without which a folder is not a trained repository.
REQUIRED = ("config.json", "tokenizer.json", "codes.safetensors", f"{STORE}/{MANIFEST}", "model.safetensors")
# The files of a trained repository; other files in its folder, such as checkpoints, are ignored.
CONTENT = (
    *("*.json", "*.safetensors", "*.py", "README.md", "recipe.yaml", f"{STORE}/*"),
    *(f"{folder}/*" for folder in MQ_FOLDERS.values()),
)
WITH_USERS = (f"{COLLABORATIVE}/*",)


class RepositoryFolder:
    """The names of a trained repository's parts, and how they are opened for reading.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.store = self.path / STORE
        self.collaborative = self.path / COLLABORATIVE
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.json"
        # Counts of the users and items that were added after training.
        self.additions = self.path / "additions.json"
        # Splits, records of finished stages and the selection run; never uploaded.
        self.training = self.path / "training"
        # A change of several files that has been decided but not carried out.
        self.committed = self.path / ".update-committed"

    def mq(self, kind: str) -> Path:
        """The MQ-Tokenizer of `"user"` or `"item"`."""
        return self.path / MQ_FOLDERS[kind]

    def load_model(self) -> T5ForGenerativeRetrieval:
        """Loads the T5.

        Raises:
            ValueError: the weights are damaged.
        """
        try:
            return T5ForGenerativeRetrieval.from_pretrained(self.path)
        except SafetensorError as error:
            raise ValueError(
                f"{self.path / 'model.safetensors'} is damaged ({error}); restore it from a copy or train again."
            ) from None

    def load_tokenizer(self) -> TokenRecTokenizer:
        """Loads the tokenizer with its code table."""
        return TokenRecTokenizer.from_pretrained(self.path)

    def open_store(self) -> EmbeddingStore:
        """Opens the embedding store."""
        return EmbeddingStore.open(self.store)

    def load_mq(self, kind: str) -> MQTokenizerModel:
        """Loads the MQ-Tokenizer of `"user"` or `"item"`."""
        return MQTokenizerModel.from_pretrained(self.mq(kind))

    def load_collaborative(self) -> tuple[CollaborativeModel, dict[str, IdIndex]]:
        """Loads the collaborative model and the `"user"` and `"item"` ids of its rows."""
        return load_collaborative(self.collaborative)

    @property
    def has_histories(self) -> bool:
        """Whether a collaborative model is here that computes user vectors from histories."""
        return self.collaborative.is_dir() and collaborative_class(self.collaborative).users_are_histories

    def load_history_encoder(self) -> HistoryEncoder | None:
        """Loads the collaborative model as a [`HistoryEncoder`], or returns None if it is absent or has a vector per user."""
        if not self.has_histories:
            return None
        model, ids = self.load_collaborative()
        return HistoryEncoder(model, ids["item"])


def fetch_repository(name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a trained repository, downloaded from the Hub if `name` is not a local folder.

    Args:
        name: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the Hub repository.
        token: Hub token; by default the one that is logged in.

    Raises:
        FileNotFoundError: there is no such folder and no such repository, or the Hub cannot be reached and the repository is not
            in the cache.
        OSError: the Hub refuses the download.
    """
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(str(name), revision):
        try:
            allowed = [*CONTENT, *WITH_USERS]
            return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=allowed))
        except HFValidationError:
            raise FileNotFoundError(
                f"there is no folder {name}, and no Hub repository can have that name; train one with `tokenrec train "
                f"--output_dir {name}` or check the path."
            ) from None


def check_repository(folder: str | os.PathLike) -> None:
    """Checks that a folder holds a finished trained repository.

    Raises:
        FileNotFoundError: a part is missing; the message names it and the remedy.
        ValueError: a change of the repository was interrupted.
    """
    parts = RepositoryFolder(folder)
    if not parts.path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`.")
    if parts.committed.is_dir():
        raise ValueError(
            f"a change of {folder} was interrupted or is under way; if no other process changes it, open it once with "
            "`Repository(folder)` or any `tokenrec` command to finish the change."
        )
    unfinished = parts.training.is_dir()
    # The metrics are written last.
    needed = [parts.path / name for name in REQUIRED] + [parts.metrics] * unfinished
    for path in needed:
        if not path.is_file():
            if unfinished:
                advice = "training has not finished; run the same `tokenrec train` again to continue"
            else:
                advice = "it is no trained repository; give the --output_dir of `tokenrec train`"
            raise FileNotFoundError(f"{folder} has no {path.relative_to(parts.path)}: {advice}.")


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of the Hub's client into one sentence each."""
    try:
        yield
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"the Hub repository {name} has no revision {revision!r}; see its branches and tags."
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, and on the Hub no repository of that name that your token may read; check the "
            "name, or log in with `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, it has not been downloaded before, and the Hub cannot be reached; connect, or "
            "unset HF_HUB_OFFLINE."
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name for a Hub repository ({error}); give it as organisation/name.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login` and a token that may write there" if status in (401, 403) else "try again"
        raise OSError(
            f"the Hub refused {name} with status {status} ({error.server_message or error}); {advice}."
        ) from None
    except (OfflineModeIsEnabled, HTTPError, RuntimeError) as error:
        # The client raises RuntimeError for an interrupted upload.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(
            f"the Hub could not be reached for {name} ({reason}); connect, unset HF_HUB_OFFLINE, or try again."
        ) from error


class Recommender:
    """Model, tokenizer and store of one repository, checked against each other.

    Args:
        model: a [`T5ForGenerativeRetrieval`].
        tokenizer: its [`TokenRecTokenizer`].
        store: its [`EmbeddingStore`], or another store with the same vectors.
        history_encoder: makes user tokens from the history of an anonymous user. Without it, their prompts name items only.

    Raises:
        ValueError: the three belong to different MQ-Tokenizers.
    """

    def __init__(
        self,
        model: T5ForGenerativeRetrieval,
        tokenizer: TokenRecTokenizer,
        store: EmbeddingStore,
        history_encoder: HistoryEncoder | None = None,
    ):
        for kind, space_id in tokenizer.space_ids.items():
            store.check_space(kind, space_id, "the tokenizer")
            trained_on = (model.config.space_ids or {}).get(kind, space_id)
            if trained_on != space_id:
                raise ValueError(
                    f"the model was trained on {kind} tokens of MQ-Tokenizer {trained_on} but the tokenizer makes those of "
                    f"{space_id}; load model and tokenizer of the same repository."
                )
        self.model, self.tokenizer, self.store, self.history_encoder = model, tokenizer, store, history_encoder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        store: EmbeddingStore | None = None,
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
        parts = RepositoryFolder(fetch_repository(name, revision=revision, token=token))
        check_repository(parts.path)
        tokenizer, encoder = parts.load_tokenizer(), parts.load_history_encoder()
        return cls(parts.load_model(), tokenizer, store or parts.open_store(), encoder)

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
        encoded = self.tokenizer(
            self.prompts(users, shown, template), padding=True, return_tensors="pt", return_entities=True
        )
        # Whole histories: items that are cut from the prompt have been seen too.
        inputs = {**encoded, "item_ids": shown}
        return self.answer(inputs, top_k=top_k, exclude_seen=exclude_seen, where=where)

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
            wording = template or _default_template(name, history)
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
        """
        queries = self.model.encode_by_length(inputs["input_ids"], inputs["attention_mask"])
        excluded = None
        if exclude_seen:
            recorded = [self.store.seen(users) for users in inputs["user_ids"]]
            excluded = [
                [*named, *(item for items in seen for item in items)]
                for named, seen in zip(inputs["item_ids"], recorded)
            ]
        return self._search(queries.float().cpu(), top_k, excluded, where)

    def _search(
        self,
        queries: torch.Tensor,
        top_k: int,
        excluded: list[list[str]] | None,
        where: Mapping[str, Any] | None,
    ) -> list[list[Recommendation]]:
        ids, scores = self.store.search(queries, top_k, excluded, where)
        return [[{"item": item, "score": score} for item, score in zip(*row)] for row in zip(ids, scores)]

    def _names(self, users: Sequence[str | None], histories: Sequence[list[str]]) -> list[str | None]:
        """The text after `user_` in each prompt: an id, the code tokens of an anonymous user's history, or None."""
        names = list(users)
        rows = [row for row, user in enumerate(users) if user is None]
        for row in rows:
            if not histories[row]:
                raise ValueError(f"request {row} names neither a user nor a history; give one of them.")
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


def _default_template(name: str | None, history: Sequence[str]) -> PromptTemplate:
    """The wording for a request with or without a user name and a history."""
    if name is None:
        return HISTORY_ONLY_TEMPLATE
    return HISTORY_TEMPLATES[0] if history else USER_ONLY_TEMPLATES[0]
