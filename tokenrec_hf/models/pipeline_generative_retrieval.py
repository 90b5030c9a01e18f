"""The transformers pipeline of the task `generative-retrieval`: users and histories in, items with scores out.

It reads requests and leaves the answers to [`Recommender`]. It is apart from the recommender because of `transformers.pipelines`:
its import takes 0.02 s after that of T5, but also brings torchvision and other libraries where they are installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .codes import COLLABORATIVE, MQ_FOLDERS, RepositoryFolder, fetch_repository
from .embedding_store import EmbeddingStore, Store
from .modeling_t5_retrieval import T5ForGenerativeRetrieval
from .prompts import PromptTemplate
from .recommender import OnUnknown, Recommender
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
            inputs: a request, or a list, dataset, dataset column or generator of requests. A request is a dict with `"user"` (an id),
                `"history"` (item ids, oldest first) or both; or, as a string, a whole prompt such as
                `"What should user_03 try after item_08 then?"`. Without a history the store's is used; with an empty history
                the prompt names the user only.
            top_k, exclude_seen, where: see [`~Recommender.recommend`].
            prompt: the wording for requests that are dicts: a [`PromptTemplate`] text with `{user}`, `{history}` or both, or a
                finished text. For an anonymous user, `{user}` becomes the user tokens of the history, if the collaborative
                model makes user vectors of histories.
            on_unknown: `"error"` (the default) refuses unknown users and items, those of a whole list at once; `"skip"` and
                `"popular"` answer the requests without them, see [`~Recommender.recommend`]. A prompt in text that names one is
                not read at all then.
            batch_size: number of requests per forward pass.

        Returns:
            A list of `{"item": id, "score": cosine}`, best first; for several requests a list of such lists, and for a
            generator an iterator over them. A `"note"` in each entry says what was left out of the request.

        Raises:
            KeyError: a user or an item is unknown.
            ValueError: a request or a prompt is invalid.
        """
        # The base class takes only a list for several requests, but so is a dataset, and its column is a sequence too.
        is_dataset = hasattr(inputs, "column_names") and hasattr(inputs, "__len__")
        if is_dataset or isinstance(inputs, Sequence) and not isinstance(inputs, str):
            inputs = list(inputs)
            if not inputs:
                return []
            asked = {**self._preprocess_params, **kwargs}.get("on_unknown", "error")
            if asked == "error" and not any(isinstance(one, str) for one in inputs):
                users, histories = zip(*map(self._read, inputs))
                self.recommender.known(users, histories)
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes a repository: store, tokenizer, models, and the code that `trust_remote_code=True` runs.

        Args:
            save_directory: the folder, which is created if absent.
            kwargs: passed to the model's `save_pretrained`.
        """
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory)
        self.recommender.store.save_pretrained(RepositoryFolder(save_directory).store)
        self.tokenizer.save_pretrained(save_directory)
        # What makes user tokens of histories, where the repository has it.
        for part in (COLLABORATIVE, *MQ_FOLDERS.values()):
            source, target = Path(self.recommender.folder or save_directory, part), Path(save_directory, part)
            if source.is_dir() and source.resolve() != target.resolve():
                shutil.copytree(source, target, dirs_exist_ok=True)
        # The model comes last, because config.json marks the folder as a repository.
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError, because the store of `save_pretrained` holds personal data of users."""
        raise NotImplementedError(
            "a pipeline is not pushed by itself: write it to a folder with save_pretrained and share that with `tokenrec push`, "
            "which leaves the users' data out."
        )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        if unknown := set(kwargs) - {"prompt", "on_unknown", "top_k", "exclude_seen", "where"}:
            raise TypeError(f"a pipeline of this task takes no argument {min(unknown)!r}.")
        given = {name: value for name, value in kwargs.items() if value is not None}
        reading = {name: given[name] for name in ("prompt", "on_unknown") if name in given}
        return reading, {name: value for name, value in given.items() if name != "prompt"}, {}

    def preprocess(  # type: ignore[override]
        self, request: Mapping | str, prompt: str | None = None, on_unknown: OnUnknown = "error"
    ) -> dict[str, Any]:
        """The tokens of a request's prompt, `[1, T]`, the ids of its users and items, and a note of what was left out."""
        if isinstance(request, str):
            inputs = self._read_text(request, on_unknown)
        else:
            template = PromptTemplate(prompt) if prompt and {"{", "}"} & set(prompt) else None
            user, history = self._read(request)
            inputs = self.recommender.tokenize([user], [history], template, on_unknown)
            if prompt and not template:
                text = self._named(prompt)
                named = {name: [[*text[name][0], *inputs[name][0]]] for name in ("user_ids", "item_ids")}
                inputs = {**inputs, **text, **named}
        single = {name: inputs[name][0] for name in ("item_ids", "notes")}
        return {**inputs, **single, "user_ids": tuple(inputs["user_ids"][0])}

    def _forward(self, inputs: Mapping[str, Any], **kwargs: Any) -> dict[str, list]:  # type: ignore[override]
        # A batch of one comes as `preprocess` made it; in larger ones each entry is a list over the requests.
        alone = isinstance(inputs["user_ids"], tuple)
        if alone:
            inputs = {**inputs, **{name: [inputs[name]] for name in ("user_ids", "item_ids", "notes")}}
        found = self.recommender.answer(inputs, **kwargs)
        return {"recommendations": found[0] if alone else found}

    def postprocess(self, outputs: Mapping[str, list]) -> list[dict]:  # type: ignore[override]
        """The items of one request."""
        return outputs["recommendations"]

    def _read(self, request: Mapping) -> tuple[Any, Any]:
        """The user and the history of a request; the recommender checks them."""
        if not isinstance(request, Mapping) or not set(request) <= {"user", "history"}:
            raise ValueError(
                f"a request is {request!r:.100} but must be a dict with 'user', 'history' or both, or a prompt as a string."
            )
        return request.get("user"), request.get("history")

    def _read_text(self, text: str, on_unknown: OnUnknown) -> Mapping[str, Any]:
        """The inputs of a request that is a whole prompt."""
        try:
            encoded = self._named(text)
        except (KeyError, ValueError) as error:
            if on_unknown == "error":
                raise
            return {**self.recommender.tokenize([None], [[]], on_unknown=on_unknown), "notes": [error.args[0]]}
        return {**encoded, "notes": [""]}

    def _named(self, text: str) -> Mapping[str, Any]:
        """The tokens of a finished prompt, which must name a user or an item."""
        encoded = self.tokenizer([text], return_tensors="pt", return_entities=True)
        if not (encoded["user_ids"][0] or encoded["item_ids"][0]):
            raise ValueError(
                f"the prompt {text!r:.100} names no user and no item, as in 'What would user_03 enjoy next?'; for an id alone "
                'pass {"user": "03"} or {"history": ["08"]}.'
            )
        return encoded
