"""A trained repository, opened: model, tokenizer and store together, ready to recommend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from .embedding_store import MANIFEST, STORE_FOLDER, EmbeddingStore, Store
from .modeling_collaborative import HistoryEncoder
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import HISTORY_ONLY_TEMPLATE, HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate, render
from .tokenization_tokenrec import TokenRecTokenizer


@dataclass(frozen=True)
class RepositoryFolder:
    """The names of a trained repository's parts, and how they are opened for reading.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def store(self) -> Path:
        """The embedding store: ids, vectors, seen items and item metadata."""
        return self.path / STORE_FOLDER

    @property
    def collaborative(self) -> Path:
        """The collaborative model, with the ids of its rows."""
        return self.path / "collaborative"

    def mq(self, kind: str) -> Path:
        """The MQ-Tokenizer of `"user"` or `"item"`."""
        return self.path / f"mq_{kind}"

    @property
    def recipe(self) -> Path:
        """The settings that the repository was trained with."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """What was measured."""
        return self.path / "metrics.json"

    @property
    def additions(self) -> Path:
        """How many users and items were added since the training."""
        return self.path / "additions.json"

    @property
    def training(self) -> Path:
        """Splits, records of finished stages and the selection run; stays on this machine."""
        return self.path / "training"


# Without these, a folder is no trained repository.
REQUIRED = ("config.json", "tokenizer.json", "codes.safetensors", f"{STORE_FOLDER}/{MANIFEST}", "model.safetensors")
# What a trained repository holds; whatever else lies in its folder (checkpoints, interactions) is nobody else's business.
CONTENT = ("*.json", "*.safetensors", "*.py", "README.md", "recipe.yaml", "mq_user/*", "mq_item/*", f"{STORE_FOLDER}/*")
WITH_USERS = ("collaborative/*",)


def fetch_repository(name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a trained repository, downloaded from the Hub unless it is here.

    Args:
        name: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the Hub repository.
        token: Hub token; by default the one that is logged in.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository, or it has not been downloaded and the Hub is
            out of reach.
        OSError: the Hub refuses.
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
    """Makes sure that a folder is a finished trained repository.

    Raises:
        FileNotFoundError: it is not; the message says what is missing and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`.")
    unfinished = (folder / "training").is_dir()
    # metrics.json is written last of all.
    missing = [name for name in (*REQUIRED, *["metrics.json"] * unfinished) if not (folder / name).is_file()]
    if missing:
        if unfinished:
            advice = "training has not finished; run the same `tokenrec train` again and it goes on where it stopped"
        else:
            advice = "it is no trained repository; give the --output_dir of `tokenrec train`"
        raise FileNotFoundError(f"{folder} has no {missing[0]}: {advice}.")


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What can go wrong between here and the Hub, each said in one sentence."""
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
        # The last is how the client reports that an upload broke off.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(
            f"the Hub could not be reached for {name} ({reason}); connect, unset HF_HUB_OFFLINE, or try again."
        ) from error


class Recommender:
    """Model, tokenizer and store of one repository, checked against each other.

    Args:
        model: a [`T5ForGenerativeRetrieval`].
        tokenizer: its [`TokenRecTokenizer`].
        store: its [`EmbeddingStore`].
        history_encoder: makes user tokens of the history of somebody who is not known; without it, T5 has the items alone
            to go by.

    Raises:
        ValueError: the three belong to different MQ-Tokenizers.
    """

    def __init__(
        self,
        model: T5ForGenerativeRetrieval,
        tokenizer: TokenRecTokenizer,
        store: Store,
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
        self.model, self.tokenizer, self.store = model.eval(), tokenizer, store
        self.history_encoder = history_encoder

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
            store: in the place of the repository's own, for example one on Milvus.

        Raises:
            FileNotFoundError: the repository is missing, or training in it has not finished.
            OSError: the Hub refuses.
            ValueError: its parts are damaged or do not belong together.
        """
        folder = fetch_repository(name, revision=revision, token=token)
        check_repository(folder)
        return cls(
            load_model(folder),
            TokenRecTokenizer.from_pretrained(folder),
            store or EmbeddingStore.open(folder),
            HistoryEncoder.from_pretrained(folder),
        )

    def recommend(
        self,
        users: Sequence[str | None],
        histories: Sequence[Sequence[str] | None] | None = None,
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        where: Mapping[str, Any] | None = None,
        template: PromptTemplate | None = None,
    ) -> list[list[dict]]:
        """The best items for each user.

        Args:
            users: user ids; `None` for somebody of whom nothing but the history is known.
            histories: for each user the ids of items to show the model, oldest first; `None` takes what the store knows. An empty one
                asks by user id only.
            top_k: how many items; fewer come back where fewer are left.
            exclude_seen: leave out the items of the histories and those that the store knows the user has seen.
            where: only items with this metadata, see [`EmbeddingStore.search`].
            template: the wording; one without history ignores the histories.

        Returns:
            Per user a list of `{"item": id, "score": cosine}`, best first.

        Raises:
            KeyError: an id is unknown to the tokenizer.
            ValueError: there is not one history for each user, or neither a user nor a history, or the template does not
                name the user where there is one, or does where there is none and no history encoder.
        """
        chosen = self._histories(users, histories)
        inputs = self.tokenizer(
            self.prompts(users, chosen, template), padding=True, return_tensors="pt", return_entities=True
        )
        # Whole histories: what a prompt leaves out was seen all the same.
        inputs["item_ids"] = chosen
        return self.model.recommend(inputs, self.store, top_k=top_k, exclude_seen=exclude_seen, where=where)

    def prompts(
        self,
        users: Sequence[str | None],
        histories: Sequence[Sequence[str] | None] | None = None,
        template: PromptTemplate | None = None,
    ) -> list[str]:
        """The prompts that `recommend` asks with: histories cut to the latest items that the model can read."""
        chosen = self._histories(users, histories)
        written = []
        for user, history, name in zip(users, chosen, self._names(users, chosen)):
            wording = template or _usual(name, history)
            if wording.names_user and name is None:
                raise ValueError(
                    f"prompt template {wording.text!r} names a user, but nobody is known by id and no user tokens can be made of "
                    "the history; use one with {history} alone."
                )
            if user is not None and not wording.names_user:
                raise ValueError(f"prompt template {wording.text!r} must hold {{user}} once, because it is for a user.")
            shown = history[len(history) - self._room(wording, len(history)) :]
            written.append(render(wording, name or "", shown))
        return written

    def _names(self, users, histories) -> list[str | None]:
        """What follows `user_` in a prompt: an id, or the code tokens of the history of somebody who has none."""
        names = list(users)
        rows = [row for row, user in enumerate(users) if user is None]
        for row in rows:
            if not histories[row]:
                raise ValueError(f"request {row} names neither a user nor a history; give one of them.")
        if rows and self.history_encoder is not None:
            vectors, known = self.history_encoder.encode([histories[row] for row in rows])
            for row, text, useful in zip(rows, self.tokenizer.code_text("user", vectors), known):
                names[row] = text if useful else None
        return names

    def _histories(self, users, histories) -> list[list[str]]:
        seen = iter(self.store.seen([user for user in users if user is not None]))
        known = [[] if user is None else next(seen) for user in users]
        given = [None] * len(users) if histories is None else histories
        if len(given) != len(users):
            raise ValueError(f"there are {len(given)} histories for {len(users)} users; pass one for each, or None.")
        return [own if one is None else list(one) for one, own in zip(given, known)]

    def _room(self, template: PromptTemplate, wanted: int) -> int:
        """How many of `wanted` history items fit beside the words of a template."""
        if not template.uses_history or not wanted:
            return 0
        words = sum(map(len, self.tokenizer.split_prompt(template)))
        user, item = (self.tokenizer.entity_token_ids(kind, []).shape[1] for kind in ("user", "item"))
        return min(wanted, (self.tokenizer.model_max_length - words - user * template.names_user) // item)


def _usual(name: str | None, history: Sequence[str]) -> PromptTemplate:
    """The wording for a user (if there is a name) with this history."""
    if name is None:
        return HISTORY_ONLY_TEMPLATE
    return HISTORY_TEMPLATES[0] if history else USER_ONLY_TEMPLATES[0]


def load_model(folder: str | os.PathLike) -> T5ForGenerativeRetrieval:
    """The T5 of a trained repository.

    Raises:
        ValueError: its weights are damaged.
    """
    try:
        return T5ForGenerativeRetrieval.from_pretrained(folder)
    except SafetensorError as error:
        raise ValueError(
            f"{Path(folder) / 'model.safetensors'} is damaged ({error}); restore it from a copy or train again."
        ) from None
