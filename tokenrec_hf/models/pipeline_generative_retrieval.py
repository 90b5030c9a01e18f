"""The transformers pipeline of the task `generative-retrieval`: users and histories in, items with scores out.

It reads requests and leaves the answers to [`Recommender`]. It is apart from the recommender because of `transformers.pipelines`:
its import takes 0.02 s after that of T5, but also brings torchvision and other libraries where they are installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .codes import RepositoryFolder, fetch_repository
from .embedding_store import EmbeddingStore, Store
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import PromptTemplate
from .recommender import Recommender
from .tokenization_tokenrec import TokenRecTokenizer


class GenerativeRetrievalPipeline(Pipeline):
    """Recommends items for users, for histories, or for prompts.

    Args:
        model: a [`T5ForGenerativeRetrieval`].
        tokenizer: its [`TokenRecTokenizer`].
        store: its [`EmbeddingStore`]; by default that of the repository and revision that the model was loaded from.
        kwargs: `batch_size` (1), `device`, and defaults for the arguments of a call.

    Raises:
        FileNotFoundError: no store was given and there is none beside the model.
        ValueError: the parts do not belong together.

    Example:
        >>> recommend = pipeline("generative-retrieval", model="out")
        >>> recommend({"user": "03", "history": ["08", "24"]}, top_k=2)
        [{'item': '63', 'score': 0.71}, {'item': '17', 'score': 0.69}]
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    model: T5ForGenerativeRetrieval
    tokenizer: TokenRecTokenizer  # type: ignore[assignment]

    def __init__(
        self, model: T5ForGenerativeRetrieval, tokenizer: TokenRecTokenizer, store: Store | None = None, **kwargs: Any
    ):
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)  # type: ignore[arg-type]
        folder = None
        if store is None:
            folder = fetch_repository(str(model.name_or_path), revision=model.loaded_revision)
            store = EmbeddingStore.open(RepositoryFolder(folder).store)
        self.recommender = Recommender(model, tokenizer, store, folder)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The best items for one request, or for each of several.

        Args:
            inputs: a request, or a list, dataset column or generator of requests. A request is a dict with `"user"` (an id),
                `"history"` (item ids, oldest first) or both; or, as a string, a whole prompt such as
                `"What should user_03 try after item_08 then?"`. Without a history the store's is used; with an empty history
                the prompt names the user only.
            top_k: number of items, 10 by default; fewer are returned where fewer are left.
            exclude_seen: leave out the items of the request and those that the store records as seen (the default).
            where: only items with this metadata, see [`EmbeddingStore.search`].
            prompt: the wording for requests that are dicts: a [`PromptTemplate`] text with `{user}`, `{history}` or both, or a
                finished text. For an anonymous user, `{user}` becomes the user tokens of the history, if the collaborative
                model makes user vectors of histories.
            batch_size: number of requests per forward pass.

        Returns:
            A list of `{"item": id, "score": cosine}`, best first; for several requests a list of such lists, and for a
            generator an iterator over them.

        Raises:
            KeyError: a user or an item is unknown.
            ValueError: a request or a prompt is invalid.
        """
        # The base class takes only a list for several requests, but the column of a dataset is a sequence too.
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes a repository: store, tokenizer, model, and the code that `trust_remote_code=True` runs.

        Args:
            save_directory: the folder, which is created if absent.
            kwargs: passed to the model's `save_pretrained`.
        """
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory)
        self.recommender.store.save_pretrained(RepositoryFolder(save_directory).store)
        self.tokenizer.save_pretrained(save_directory)
        # The model comes last, because config.json marks the folder as a repository.
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError, because the store of `save_pretrained` holds personal data of users."""
        raise NotImplementedError(
            "a pipeline is not pushed by itself: write it to a folder with save_pretrained and share that with `tokenrec push`, "
            "which leaves the users' data out."
        )

    def _sanitize_parameters(self, prompt: str | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if unknown := set(kwargs) - {"top_k", "exclude_seen", "where"}:
            raise TypeError(f"a pipeline of this task takes no argument {min(unknown)!r}.")
        return {"prompt": prompt} if prompt else {}, {k: v for k, v in kwargs.items() if v is not None}, {}

    def preprocess(  # type: ignore[override]
        self, request: Mapping | str, prompt: str | None = None
    ) -> dict[str, Any]:
        """The tokens of a request's prompt, `[1, T]`, and the ids of its users and items."""
        users: list[str] = []
        history: list[str] = []
        if not isinstance(request, str):
            users, history = self._read(request)
            if prompt is None or {"{", "}"} & set(prompt):
                template = None if prompt is None else PromptTemplate(prompt)
                inputs = self.recommender.tokenize(users or [None], [history], template)
                return {**inputs, "user_ids": tuple(inputs["user_ids"][0]), "item_ids": tuple(inputs["item_ids"][0])}
        text = request if isinstance(request, str) else prompt
        encoded = self.tokenizer([text], return_tensors="pt", return_entities=True)
        if isinstance(request, str) and not (encoded["user_ids"][0] or encoded["item_ids"][0]):
            raise ValueError(
                f"the prompt {_short(request)} names no user and no item, as in 'What would user_03 enjoy next?'; for an id alone "
                'pass {"user": "03"} or {"history": ["08"]}.'
            )
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "user_ids": (*encoded["user_ids"][0], *users),
            "item_ids": (*encoded["item_ids"][0], *history),
        }

    def _forward(  # type: ignore[override]
        self, inputs: Mapping[str, Any], top_k: int = 10, exclude_seen: bool = True, where: Mapping | None = None
    ) -> dict[str, list]:
        # A batch of one comes as `preprocess` made it; in larger ones each entry is a list over the requests.
        alone = isinstance(inputs["user_ids"], tuple)
        if alone:
            inputs = {**inputs, "user_ids": [inputs["user_ids"]], "item_ids": [inputs["item_ids"]]}
        found = self.recommender.answer(inputs, top_k=top_k, exclude_seen=exclude_seen, where=where)
        return {"recommendations": found[0] if alone else found}

    def postprocess(self, outputs: Mapping[str, list]) -> list[dict]:  # type: ignore[override]
        """The items of one request."""
        return outputs["recommendations"]

    def _read(self, request: Mapping) -> tuple[list[str], list[str]]:
        """The users (one or none) and the history of a request, checked."""
        if not isinstance(request, Mapping) or not set(request) <= {"user", "history"}:
            raise ValueError(
                f"a request is {_short(request)} but must be a dict with 'user', 'history' or both, or a prompt as a string."
            )
        user, history = request.get("user"), request.get("history")
        if history is not None and (
            isinstance(history, str)
            or not isinstance(history, Iterable)
            or not all(isinstance(item, str) for item in history)
        ):
            raise ValueError(f"'history' is {_short(history)} but must be a list of item ids, which are strings.")
        if user is None and not history:
            raise ValueError(f"the request {_short(request)} names neither a user nor a history; give one of them.")
        if user is not None and not isinstance(user, str):
            raise ValueError(f"'user' is {_short(user)} but must be a user id, which is a string.")
        # Ids are checked here, because in a text the beginning of an unknown id may be a known id.
        users = [] if user is None else [user]
        self.tokenizer.codes("user", users)
        if history is None:
            return users, self.recommender.store.seen(users)[0]
        self.tokenizer.codes("item", list(history))
        return users, list(history)


def _short(thing: Any) -> str:
    text = repr(thing)
    return f"{text if len(text) <= 100 else text[:100] + '...'} ({type(thing).__name__})"
