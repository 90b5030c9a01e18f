"""The tokenizer: text that names users and items by their ids, to the token ids that T5 reads.

`user_03` becomes `user_<u1-128><u2-21><u3-35>` and `item_08` becomes `item_<v1-42><v2-12><v3-98>` (Eq. 7 of TokenRec, arXiv
2406.10450): a token per codebook, so that 2*K*L new tokens name any number of users and items. The code token of book k (from 1)
and codeword w (from 0) is `<uk-(w+1)>` or `<vk-(w+1)>`. The codes of each id are a table of arrays beside the vocabulary. The
tokenizer does not learn codes, and needs torch only to make codes for new vectors.
"""

from __future__ import annotations

import os
import re
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import Tokenizer
from transformers import TokenizersBackend

from .codes import MAX_ID_LENGTH, MQ_FOLDERS, CodeTable, IdIndex, check_ids, load_tables, save_tables
from .prompts import PromptTemplate

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding

    from .modeling_mq_tokenizer import MQTokenizerModel

LETTERS = {"user": "u", "item": "v"}

# "superuser_03" and "multi-item_list" name nothing, and expanded names stay. The second group is the run of characters that the
# id begins; it is not consumed, because more names may follow in it.
_MENTION = re.compile(rf"(?<!\w)(?<!\w-)(user|item)_(?!<[uv]\d+-\d+>)(?=(\S{{1,{MAX_ID_LENGTH + 1}}}))")
_CODE_TOKEN = re.compile(r"<[uv]\d+-\d+>")
_NON_WORD = re.compile(r"\W")
# T5's pipeline begins a new word after an added token, so it decodes "item_08," as "item_08 ,".
_SPACE_AFTER_CODE = re.compile(r"(<[uv]\d+-\d+>) (?=[,.;:!?)\]}'’”»…])")


class TokenRecTokenizer(TokenizersBackend):
    """A T5 tokenizer that knows users and items by their ids.

    Ids may appear in all inputs of a Hugging Face tokenizer: batches, pairs, words (`is_split_into_words=True`) and targets. An id
    is a string of up to 256 characters without white space, written `user_<id>` or `item_<id>` where a word begins. The id is
    the longest beginning of the characters up to the next white space that is known and ends where a word ends: `(user_03)`,
    `user_03's` and `item_08,item_24` are understood, and so is an id such as `a.b-c(1)`. Ids are compared exactly, before any
    Unicode normalisation.

    With `return_entities=True` the encoding also holds the ids that each example names, in order, in the lists `user_ids` and
    `item_ids`, which stay lists with `return_tensors`. Decoding restores an id where no other id has the same codes; otherwise, and
    with `resolve_ids=False`, the code tokens stay. Offsets (`return_offsets_mapping`) refer to the expanded text. Truncation counts
    tokens and may cut inside an item: cut the history before writing the prompt.

    Args:
        codes_file: `codes.safetensors`, the ids and their codes; set by `from_pretrained`.
        tables: the same as objects; set by [`build_tokenizer`].
        codebooks: K and L of each kind, for example `{"user": [3, 256], "item": [3, 512]}`.
        space_ids: for each kind the fingerprint of the MQ-Tokenizer that made its codes.
        on_unknown: treatment of `user_...` or `item_...` without a known id: `"error"` raises `KeyError` (also for an ordinary
            word such as `user_friendly`), `"keep"` leaves it in the text.

    Example:
        >>> tokenizer = AutoTokenizer.from_pretrained("out")
        >>> tokenizer("I wonder what the user_03 will like.", return_tensors="pt")
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "codes_file": "codes.safetensors"}
    model_input_names = ["input_ids", "attention_mask"]
    # The effect of `register_for_auto_class`. Without the `auto_map` that it saves, `AutoTokenizer` of a process that does not
    # know this class would silently load a tokenizer that does not expand ids.
    _auto_class = "AutoTokenizer"
    # Padding and truncation are state of the shared Rust object. The lock belongs to the class, so that tokenizers pickle.
    _lock = threading.RLock()

    def __init__(
        self,
        *args: Any,
        codes_file: str | None = None,
        tables: dict[str, CodeTable] | None = None,
        codebooks: Mapping[str, Sequence[int]] | None = None,
        space_ids: dict[str, str] | None = None,
        on_unknown: str = "error",
        **kwargs: Any,
    ):
        if codebooks is None or (codes_file is None and tables is None):
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'this tokenizer'} has no codes.safetensors or was not saved by "
                "TokenRecTokenizer; make one with build_tokenizer."
            )
        if on_unknown not in ("error", "keep"):
            raise ValueError(f"on_unknown is {on_unknown!r}; it must be 'error' or 'keep'.")
        # transformers saves the attributes that are named like arguments of `super().__init__`.
        self.codebooks = {kind: list(codebooks[kind]) for kind in LETTERS}
        self.space_ids, self.on_unknown = dict(space_ids or {}), on_unknown
        super().__init__(*args, codebooks=self.codebooks, space_ids=self.space_ids, on_unknown=on_unknown, **kwargs)
        self._vocabularies = {
            kind: _CodeVocabulary(kind, self.backend_tokenizer, *self.codebooks[kind]) for kind in LETTERS
        }
        self._tables = tables or load_tables(str(codes_file), self.codebooks)
        self._mqs: dict[str, MQTokenizerModel] = {}
        self._revision: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> TokenRecTokenizer:
        """Loads the tokenizer as every other one and records the revision, which is also that of the MQ-Tokenizers."""
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        tokenizer._revision = kwargs.get("revision")
        return tokenizer

    def ids(self, kind: str) -> list[str]:
        """All ids of `"user"` or `"item"`, in row order: that of the store, with later additions last."""
        return self._table(kind).index.ids()

    def codes(self, kind: str, ids: Sequence[str] | None = None) -> np.ndarray:
        """The codes of `ids` (default: all, in row order), int64 `[n, K]` of values in `[0, L)`.

        Raises:
            KeyError: an id is unknown.
        """
        table = self._table(kind)
        codes = table.codes if ids is None else table.codes[table.rows(ids)]
        return codes.astype(np.int64)

    def add_users(self, vectors: Mapping[str, Any]) -> None:
        """Gives users codes made by the frozen MQ-Tokenizer (section II-E2); known users get new codes.

        Args:
            vectors: collaborative vector `[d]` of each user by id.

        Raises:
            ValueError: an id or a vector is invalid, or there is no MQ-Tokenizer of this tokenizer's space; then nothing is
                added.
        """
        self._add("user", vectors)

    def add_items(self, vectors: Mapping[str, Any]) -> None:
        """Gives items codes; otherwise as `add_users`."""
        self._add("item", vectors)

    def remove(self, kind: str, ids: Sequence[str]) -> None:
        """Removes users or items and their codes; unknown ids are ignored."""
        table = self._table(kind).without(ids)
        with self._lock:
            self._tables = {**self._tables, kind: table}

    def save_codes(self, folder: str | os.PathLike) -> None:
        """Writes only the ids and their codes, into a folder that has the rest of this tokenizer."""
        save_tables(self._tables, os.path.join(folder, self.vocab_files_names["codes_file"]))

    def attach(self, user_mq: MQTokenizerModel | None = None, item_mq: MQTokenizerModel | None = None) -> None:
        """Sets the MQ-Tokenizers for `add_users` and `add_items`, if they are not in their folders beside the tokenizer.

        They are neither saved, pickled nor copied with it.

        Raises:
            ValueError: an MQ-Tokenizer is not the one that made this tokenizer's codes.
        """
        for kind, mq in (("user", user_mq), ("item", item_mq)):
            if mq is None:
                continue
            if mq.space_id != self.space_ids[kind]:
                raise ValueError(
                    f"the {kind} codes of this tokenizer were made by MQ-Tokenizer {self.space_ids[kind]} but the one given is "
                    f"{mq.space_id}; use the one of the same repository, or make a new tokenizer with build_tokenizer."
                )
            self._mqs[kind] = mq

    def code_text(self, kind: str, vectors: torch.Tensor) -> list[str]:
        """The code tokens of vectors `[n, d]`, to be written after `user_` or `item_` in place of an id.

        Raises:
            ValueError: there is no MQ-Tokenizer of this tokenizer's space, or the vectors have another size.
        """
        codes, names = self._mq(kind).encode(vectors).cpu().numpy(), self._vocabularies[kind].names  # [n, K], [K, L]
        return ["".join(tokens) for tokens in names[np.arange(len(names)), codes]]

    def code_token_ids(self, kind: str) -> np.ndarray:
        """The vocabulary id of each code token, int64 `[K, L]`."""
        self._table(kind)
        return self._vocabularies[kind].token_ids.copy()

    def entity_token_ids(self, kind: str, ids_or_rows: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens of `user_<id>` or `item_<id>` within a text, int64 `[n, P + K]`: P of the word before the id, K codes.

        Args:
            kind: `"user"` or `"item"`.
            ids_or_rows: `n` ids, or `n` rows (positions in `ids(kind)`).

        Raises:
            KeyError: an id is unknown.
            IndexError: a row is out of range.
        """
        table, vocabulary = self._table(kind), self._vocabularies[kind]
        if len(ids_or_rows) and isinstance(ids_or_rows[0], str):
            rows = table.rows(cast("Sequence[str]", ids_or_rows))
        else:
            rows = np.asarray(ids_or_rows, dtype=np.int64)
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(table):
                raise IndexError(f"{kind} rows {rows.min()} to {rows.max()} are not all in [0, {len(table)}).")
        codes = vocabulary.token_ids[np.arange(len(vocabulary.token_ids)), table.codes[rows]]
        prefix = np.broadcast_to(vocabulary.prefix_ids, (len(rows), len(vocabulary.prefix_ids)))
        return np.concatenate([prefix, codes], axis=1)

    def item_tokens(self, ids: Sequence[str]) -> np.ndarray:
        """The code tokens of items, int64 `[n, K]`, as [`~T5ForGenerativeRetrieval.bind_items`] takes them.

        Raises:
            KeyError: an id is unknown.
        """
        return self.entity_token_ids("item", ids)[:, len(self._vocabularies["item"].prefix_ids) :]

    def split_prompt(self, template: PromptTemplate) -> tuple[np.ndarray, ...]:
        """The tokens of a template's static parts: before, between and after the placeholders, int64 arrays.

        Joined in turn with the `entity_token_ids` of user and history, they are the tokens of the rendered prompt, including
        the end-of-sequence token.
        """
        *before, after = template.static_parts
        parts = [self.encode(part, add_special_tokens=False) for part in before] + [self.encode(after)]
        return tuple(np.array(part, dtype=np.int64) for part in parts)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keeps `tokenizer_file`, which the inherited method would rebuild without its normaliser and decoder."""
        return kwargs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mqs": {}}

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, return_entities: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        expanded, named = self._expand([*_strings(text), *_strings(text_pair)])
        remaining = iter(expanded)
        text, text_pair = _replaced(text, remaining), _replaced(text_pair, remaining)
        with self._lock:
            encoding = super()._encode_plus(text, text_pair, **kwargs)
        if not return_entities:
            return encoding

        is_words = kwargs.get("is_split_into_words") and text and isinstance(text[0], str)
        batched = isinstance(text, (list, tuple)) and not is_words
        parts = (text, text_pair or ()) if batched else ([text], [text_pair])
        owners = [row for part in parts for row, example in enumerate(part) for _ in _strings(example)]
        for kind in LETTERS:
            found: list[list[str]] = [[] for _ in parts[0]]
            for row, entities in zip(owners, named):
                found[row] += [name for entity_kind, name in entities if entity_kind == kind]
            if kwargs.get("return_overflowing_tokens"):
                found = [found[row] for row in encoding["overflow_to_sample_mapping"]]
            flat = not batched and kwargs.get("return_tensors") is None and not kwargs.get("return_overflowing_tokens")
            encoding[f"{kind}_ids"] = found[0] if flat else found
        return encoding

    def _decode(  # type: ignore[override]
        self, token_ids: int | list[int], *args: Any, resolve_ids: bool = True, **kwargs: Any
    ) -> str:
        text = _SPACE_AFTER_CODE.sub(r"\1", super()._decode(token_ids, *args, **kwargs))
        for kind, vocabulary in self._vocabularies.items() if resolve_ids else ():
            if found := vocabulary.pattern.findall(text):
                table = self._tables[kind]
                rows = table.owners(np.array(found, dtype=np.int64).reshape(len(found), -1) - 1)
                names = iter([f"{kind}_{table.index[row]}" if row >= 0 else None for row in rows])
                text = vocabulary.pattern.sub(lambda match: next(names) or match[0], text)  # noqa: B023
        return text

    def _save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, file_names: tuple[str, ...], **kwargs: Any
    ) -> tuple[str, ...]:
        prefix = f"{kwargs['filename_prefix']}-" if kwargs.get("filename_prefix") else ""
        path = os.path.join(save_directory, prefix + self.vocab_files_names["codes_file"])
        save_tables(self._tables, path)
        with self._lock:
            # Padding and truncation of the last call are not part of the tokenizer.
            self.backend_tokenizer.no_padding()
            self.backend_tokenizer.no_truncation()
            return (*super()._save_pretrained(save_directory, file_names, **kwargs), path)

    def _table(self, kind: str) -> CodeTable:
        if kind not in self._tables:
            raise ValueError(f"kind is {kind!r}; it must be 'user' or 'item'.")
        return self._tables[kind]

    def _add(self, kind: str, vectors: Mapping[str, Any]) -> None:
        import torch

        mq, ids = self._mq(kind), check_ids(vectors, kind)
        size = mq.config.embedding_dim
        rows = [torch.as_tensor(vector, dtype=torch.float32).detach().cpu() for vector in vectors.values()]
        for name, row in zip(ids, rows):
            if row.shape != (size,):
                raise ValueError(
                    f"the vector of {kind} {name!r} has shape {list(row.shape)} but the MQ-Tokenizer expects [{size}]; pass "
                    f"vectors of {size} from the space it was trained on."
                )
        added = code_table(kind, ids, torch.stack(rows) if rows else torch.empty(0, size), mq)
        with self._lock:
            self._tables = {**self._tables, kind: self._tables[kind].updated(ids, added.codes)}

    def _mq(self, kind: str) -> MQTokenizerModel:
        if kind not in self._mqs:
            from .modeling_mq_tokenizer import MQTokenizerModel

            name, folder = self.name_or_path, MQ_FOLDERS[kind]
            try:
                if not name:
                    raise OSError("this tokenizer was not loaded from a folder or repository")
                mq = MQTokenizerModel.from_pretrained(name, subfolder=folder, revision=self._revision or "main")
            except OSError as error:
                raise ValueError(
                    f"no MQ-Tokenizer to make {kind} codes with: there is none in {folder} of {name or 'the tokenizer'!r}; give "
                    f"the one that made this tokenizer's codes with attach({kind}_mq=...)."
                ) from error
            self.attach(**{f"{kind}_mq": mq})
        return self._mqs[kind]

    def _expand(self, texts: Sequence[str]) -> tuple[list[str], list[list[tuple[str, str]]]]:
        """Replaces ids by code tokens; returns the texts and, per text, the entities found as (kind, id)."""
        found = self._find({mention for text in texts for mention in _MENTION.findall(text)})
        expanded, named = [], []
        for text in texts:
            pieces: list[str] = []
            entities: list[tuple[str, str]] = []
            end = 0
            for match in _MENTION.finditer(text):
                # A name within the last id is part of that id.
                if match.start() < end:
                    continue
                kind, run = match.groups()
                if (kind, run) not in found:
                    if self.on_unknown == "error" and (name := _without_end(run)):
                        raise KeyError(
                            f"the text names {kind} {name!r}, which is unknown to this tokenizer; add it with `tokenrec add`, give "
                            f"it codes with add_{kind}s, or set on_unknown='keep' to leave such words as they are."
                        )
                    continue
                name, tokens = found[kind, run]
                entities.append((kind, name))
                pieces += (text[end : match.start()], tokens)
                end = match.end() + len(name)
            expanded.append("".join([*pieces, text[end:]]))
            named.append(entities)
        return expanded, named

    def _find(self, mentions: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
        """Finds the known id that begins each run of characters: (kind, run) to (id, its expansion)."""
        found = {}
        for kind, table in self._tables.items():
            candidates = {run: _beginnings(run, table.longest) for run_kind, run in mentions if run_kind == kind}
            ids = list(dict.fromkeys(chain.from_iterable(candidates.values())))
            rows = table.index.rows(ids)
            known = np.flatnonzero(rows >= 0)
            names = self._vocabularies[kind].names
            tokens = reduce(add, [names[k][codes] for k, codes in enumerate(table.codes[rows[known]].T)], f"{kind}_")
            expansions = {ids[at]: text for at, text in zip(known.tolist(), tokens)}
            for run, beginnings in candidates.items():
                name = next((name for name in beginnings if name in expansions), None)
                if name is not None:
                    found[kind, run] = name, expansions[name]
        return found


class _CodeVocabulary:
    """The code tokens of one kind: names and vocabulary ids, both `[K, L]`, and the ids `[P]` of the word before them."""

    def __init__(self, kind: str, backend: Tokenizer, num_codebooks: int, codebook_size: int):
        self.names = token_names(kind, num_codebooks, codebook_size)
        self.token_ids = np.array([backend.token_to_id(name) or -1 for name in self.names.flat], dtype=np.int64)
        entity = backend.encode(f"{kind}_{''.join(self.names[:, 0])}", add_special_tokens=False).ids
        if (self.token_ids < 0).any() or entity[-num_codebooks:] != self.token_ids[:: max(codebook_size, 1)].tolist():
            raise ValueError(
                f"tokenizer.json does not have the {kind} code tokens {self.names.flat[0]} to {self.names.flat[-1]}; load the "
                "files of one save together."
            )
        self.token_ids = self.token_ids.reshape(self.names.shape)
        self.prefix_ids = np.array(entity[:-num_codebooks], dtype=np.int64)
        books = "".join(rf"<{LETTERS[kind]}{k}-([1-9]\d{{0,8}})>" for k in range(1, num_codebooks + 1))
        self.pattern = re.compile(rf"(?<!\w){kind}_{books}")


def token_names(kind: str, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """The names of the code tokens, strings `[K, L]`."""
    letter = LETTERS[kind]
    names = [[f"<{letter}{k}-{w}>" for w in range(1, codebook_size + 1)] for k in range(1, num_codebooks + 1)]
    return np.array(names, dtype=object)


def code_table(kind: str, ids: Sequence[str], vectors: torch.Tensor, mq: MQTokenizerModel) -> CodeTable:
    """The table of new, unique ids with the codes of their vectors `[n, d]`."""
    like_code = next((name for name in ids if _CODE_TOKEN.match(name)), None)
    if like_code is not None:
        raise ValueError(f"{kind} {like_code[:60]!r} begins like a code token, so no text could name it; rename it.")
    expected = mq.config.embedding_dim
    if vectors.shape[1] != expected:
        raise ValueError(
            f"{kind} embeddings have {vectors.shape[1]} dimensions but the MQ-Tokenizer expects {expected}; train it with "
            f"embedding_dim={vectors.shape[1]} or pass vectors of {expected}."
        )
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        name = ids[int(finite.long().argmin())]
        raise ValueError(f"the embedding of {kind} {name!r} holds NaN or infinity; give it a vector of finite numbers.")
    codes = mq.encode(vectors).cpu().numpy()
    return CodeTable(kind, IdIndex(ids, kind), codes, mq.config.codebook_size)


def _beginnings(run: str, longest: int) -> list[str]:
    """The beginnings of `run` that may be an id, longest first: all of it, or up to a punctuation mark or symbol."""
    whole = [run] if len(run) <= longest else []
    cuts = [match.start() for match in _NON_WORD.finditer(run, 1, longest + 1)]
    return whole + [run[:cut] for cut in reversed(cuts) if _may_follow(run[cut])]


def _without_end(run: str) -> str:
    """`run` without the punctuation and symbols at its end."""
    while run and _may_follow(run[-1]):
        run = run[:-1]
    return run


def _may_follow(character: str) -> bool:
    """Whether a word may end before this character: punctuation and symbols, but no combining accent or vowel sign."""
    return unicodedata.category(character)[0] in "PS"


def _strings(text: Any) -> Iterator[str]:
    """The strings in a string or nested lists and tuples of strings."""
    if isinstance(text, str):
        yield text
    elif isinstance(text, (list, tuple)):
        for part in text:
            yield from _strings(part)


def _replaced(text: Any, strings: Iterator[str]) -> Any:
    """A copy of `text` with each string replaced by the next of `strings`."""
    if isinstance(text, str):
        return next(strings)
    if isinstance(text, (list, tuple)):
        replaced = [_replaced(part, strings) for part in text]
        return replaced if isinstance(text, list) else tuple(replaced)
    return text
