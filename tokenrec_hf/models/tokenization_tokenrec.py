"""The tokenizer: text that names users and items by their ids, to the token ids that T5 reads.

`user_03` becomes `user_<u1-128><u2-21><u3-35>` and `item_08` becomes `item_<v1-42><v2-12><v3-98>` (Eq. 7 of TokenRec, arXiv
2406.10450): a token per codebook, so that 2*K*L new tokens name any number of users and items. The code token of book k (from 1)
and codeword w (from 0) is `<uk-(w+1)>` or `<vk-(w+1)>`. The codes of each id are a table of arrays beside the vocabulary. The
tokenizer does not learn codes, and needs torch only to make codes for new vectors.
"""

from __future__ import annotations

import inspect
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer
from transformers import BatchEncoding, TokenizersBackend

from .codes import MAX_ID_LENGTH, MQ_FOLDERS, CodeTable, IdIndex, check_ids, load_tables, read_json, save_tables
from .prompts import SPACE, PromptTemplate

if TYPE_CHECKING:
    import torch

    from .modeling_mq_tokenizer import MQTokenizerModel

LETTERS = {"user": "u", "item": "v"}

# "superuser_03" and "multi-item_list" name nothing, and expanded names stay. The second group is the run of characters that the
# id begins; it is not consumed, because more names may follow in it. The pattern begins with a character that few words have,
# and looks back from there, because that is five times as fast.
_MENTION = re.compile(
    rf"_(?<=(user|item)_)(?<!\w.{{5}})(?<!\w-.{{5}})(?!<[uv]\d+-\d+>)(?=(\S{{1,{MAX_ID_LENGTH + 1}}}))", re.DOTALL
)
_CODE_TOKEN = re.compile(r"<(?=[uv]\d+-\d+>)")
_NON_WORD = re.compile(r"\W")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Characters of a text at most.
MAX_TEXT_LENGTH = 1_000_000
# Texts and entities whose tokens are remembered at most, of each kind.
_REMEMBERED = 65_536
# T5's pipeline begins a new word after an added token, so it decodes "item_08," as "item_08 ,".
_SPACE_AFTER_CODE = re.compile(r"(<[uv]\d+-\d+>) (?=[,.;:!?)\]}'’”»…])")


class TokenRecTokenizer(TokenizersBackend):
    """A T5 tokenizer that knows users and items by their ids.

    Ids may appear in all inputs of a Hugging Face tokenizer: batches, pairs, words (`is_split_into_words=True`) and targets. An id
    is a string of up to 256 characters, written `user_<id>` or `item_<id>` where a word begins, with `␣` in place of spaces. The
    id is the longest beginning of the characters up to the next white space that is known and ends where a word ends: `(user_03)`,
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
        allow_code_text: read code tokens that a text writes out, such as `<u1-128>`, as code tokens. They name all users or items
            that have the codes. By default they are plain text, so that nobody is meant who is not named.

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
        allow_code_text: bool = False,
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
        self.codebooks = {kind: list(codebooks[kind]) for kind in LETTERS if kind in codebooks}
        self.space_ids, self.on_unknown, self.allow_code_text = dict(space_ids or {}), on_unknown, allow_code_text
        self._transient = _Transient()
        own = {name: getattr(self, name) for name in ("codebooks", "space_ids", "on_unknown", "allow_code_text")}
        kwargs.pop("added_tokens_decoder", None)  # tokenizer.json has them; copying them took most of the time
        super().__init__(*args, **own, **kwargs)
        for kind in LETTERS:
            sizes = self.codebooks.get(kind, [])
            if len(sizes) != 2 or not all(type(size) is int and 1 <= size <= len(self) for size in sizes):
                raise ValueError(
                    f"the codebooks of {kind}s are {str(sizes):.80} but must be their number and their size, which the vocabulary of "
                    f"{len(self)} tokens has code tokens for; load the files of one save together."
                )
        self._vocabularies = {
            kind: _CodeVocabulary(kind, self.backend_tokenizer, *self.codebooks[kind]) for kind in LETTERS
        }
        self._tables = tables or load_tables(str(codes_file), self.codebooks)
        self._end: list[int] = self.backend_tokenizer.encode("").ids
        self._revision: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> TokenRecTokenizer:
        """Loads the tokenizer as every other one and records the revision, which is also that of the MQ-Tokenizers.

        Raises:
            ValueError: a file is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        try:
            tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception:
            # The message of a parser does not say which file it parsed.
            for path in (folder / "tokenizer_config.json", folder / cls.vocab_files_names["tokenizer_file"]):
                if path.is_file():
                    read_json(path)
            raise
        tokenizer._revision, tokenizer._transient.token = kwargs.get("revision"), kwargs.get("token")
        return tokenizer

    def ids(self, kind: str) -> list[str]:
        """All ids of `"user"` or `"item"`, in row order: that of the store, with later additions last."""
        return self._table(kind).index.ids()

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """Whether each id is known, boolean `[n]`."""
        return self._table(kind).index.rows(ids) >= 0

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
            self._transient.mqs[kind] = mq

    def vector_token_ids(self, kind: str, vectors: torch.Tensor) -> np.ndarray:
        """The tokens of users or items that have vectors `[n, d]` and no id, as [`~TokenRecTokenizer.entity_token_ids`].

        Raises:
            ValueError: there is no MQ-Tokenizer of this tokenizer's space, or the vectors have another size.
        """
        return self._vocabularies[kind].entity_tokens(self._mq(kind).encode(vectors).cpu().numpy())

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
        if isinstance(next(iter(ids_or_rows), None), str):
            rows = table.rows(cast("Sequence[str]", ids_or_rows))
        else:
            rows = np.asarray(ids_or_rows, dtype=np.int64)
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(table):
                raise IndexError(f"{kind} rows {rows.min()} to {rows.max()} are not all in [0, {len(table)}).")
        return vocabulary.entity_tokens(table.codes[rows])

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
        parts = [*map(self._tokens, before), [*self._tokens(after), *self._end]]
        return tuple(np.array(part, dtype=np.int64) for part in parts)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keeps `tokenizer_file`, which the inherited method would rebuild without its normaliser and decoder."""
        return kwargs

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, return_entities: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        is_words = bool(kwargs.get("is_split_into_words") and text and isinstance(text[0], str))
        batched = isinstance(text, (list, tuple)) and not is_words
        parsed = self._parse([*_strings(text), *_strings(text_pair)])
        if text_pair is None and self._is_simple(text, kwargs):
            data = self._assemble(parsed, **kwargs)
            if not batched and not kwargs.get("return_tensors"):
                data = {name: rows[0] for name, rows in data.items()}
            encoding: BatchEncoding = _TextEncoding(
                data, kwargs.get("return_tensors"), lambda: self._by_backend(text, None, parsed, kwargs)
            )
        else:
            encoding = self._by_backend(text, text_pair, parsed, kwargs)
        if not return_entities:
            return encoding

        parts = (text, text_pair or ()) if batched else ([text], [text_pair])
        owners = [row for part in parts for row, example in enumerate(part) for _ in _strings(example)]
        for kind in LETTERS:
            found: list[list[str]] = [[] for _ in parts[0]]
            for row, (words, entities) in zip(owners, parsed):
                found[row] += [entity.name for entity in entities if entity.kind == kind] + self._coded(kind, words)
            if kwargs.get("return_overflowing_tokens"):
                found = [found[row] for row in encoding["overflow_to_sample_mapping"]]
            flat = not batched and kwargs.get("return_tensors") is None and not kwargs.get("return_overflowing_tokens")
            encoding[f"{kind}_ids"] = found[0] if flat else found
        return encoding

    def _by_backend(self, text: Any, text_pair: Any, parsed: Sequence[_Parsed], kwargs: Mapping) -> BatchEncoding:
        """The encoding of texts in which the code tokens are written out."""
        written = iter(
            "".join(
                chain.from_iterable(zip_longest(map(self._plain, words), (one.text for one in entities), fillvalue=""))
            )
            for words, entities in parsed
        )
        text, text_pair = _replaced(text, written), _replaced(text_pair, written)
        with self._lock:
            return super()._encode_plus(text, text_pair, **kwargs)

    def _is_simple(self, text: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether `_assemble` makes all that is asked for: the tokens of texts without pairs, cut and padded."""
        texts = [text] if isinstance(text, str) else text
        truncation, length = kwargs.get("truncation_strategy", "do_not_truncate"), kwargs.get("max_length")
        return (
            bool(texts)
            and all(isinstance(one, str) for one in texts)
            and not any(value for name, value in kwargs.items() if name not in _ASSEMBLED)
            and truncation in ("do_not_truncate", "longest_first", "only_first")
            and not (kwargs.get("padding_strategy") == "max_length" and truncation == "do_not_truncate")
            and (length is None or length > len(self._end))
            and not self.split_special_tokens
        )

    def _assemble(
        self,
        parsed: Sequence[_Parsed],
        add_special_tokens: bool = True,
        padding_strategy: str = "do_not_pad",
        truncation_strategy: str = "do_not_truncate",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backend makes of texts, from the tokens of words and entities, which are remembered.

        Code tokens part a text: the backend encodes the words on both sides of them independently.
        """
        end = self._end if add_special_tokens else []
        known = {word: self._tokens(word) for word in set(chain.from_iterable(words for words, _ in parsed))}
        rows = []
        for words, entities in parsed:
            row: list[int] = []
            for word, entity in zip(words, entities):
                row += known[word]
                row += entity.tokens
            row += known[words[-1]]
            if truncation_strategy != "do_not_truncate" and max_length is not None:
                room = max_length - len(end)
                row = row[max(0, len(row) - room) :] if self.truncation_side == "left" else row[:room]
            rows.append(row + end)
            self._eventual_warn_about_too_long_sequence(rows[-1], max_length, verbose)
        lengths = np.array([len(row) for row in rows])
        data: dict[str, Any]
        if padding_strategy != "do_not_pad" or (return_tensors and lengths.min() == lengths.max()):
            width = lengths.max() if padding_strategy != "max_length" or max_length is None else max_length
            if padding_strategy != "do_not_pad" and pad_to_multiple_of:
                width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
            place = np.arange(width)
            if (padding_side or self.padding_side) == "left":
                place = place[::-1]
            is_token = place < lengths[:, None]  # [B, T]
            tokens = np.full(is_token.shape, self.pad_token_id, dtype=np.int64)
            tokens[is_token] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
            data = {"input_ids": tokens, "attention_mask": is_token.astype(np.int64)}
            if not return_tensors:
                data = {name: array.tolist() for name, array in data.items()}
            elif return_tensors == "pt":
                import torch

                # BatchEncoding would copy them, which takes a tenth of the time of a short batch.
                data = {name: torch.from_numpy(array) for name, array in data.items()}
        else:
            data = {"input_ids": rows, "attention_mask": [[1] * length for length in lengths.tolist()]}
        if return_attention_mask is False:
            del data["attention_mask"]
        return data

    def _decode(  # type: ignore[override]
        self, token_ids: int | list[int], *args: Any, resolve_ids: bool = True, **kwargs: Any
    ) -> str:
        text = _SPACE_AFTER_CODE.sub(r"\1", super()._decode(token_ids, *args, **kwargs))
        for kind, vocabulary in self._vocabularies.items() if resolve_ids else ():
            if found := vocabulary.pattern.findall(text):
                table = self._tables[kind]
                rows = table.owners(np.array(found, dtype=np.int64).reshape(len(found), -1) - 1)
                names = iter([f"{kind}_{table.index[row].replace(' ', SPACE)}" if row >= 0 else None for row in rows])
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
        if kind not in self._transient.mqs:
            from .modeling_mq_tokenizer import MQTokenizerModel

            name, folder = self.name_or_path, MQ_FOLDERS[kind]
            try:
                if not name:
                    raise OSError("this tokenizer was not loaded from a folder or repository")
                access = {"revision": self._revision or "main", "token": self._transient.token}
                mq = MQTokenizerModel.from_pretrained(name, subfolder=folder, **access)
            except OSError as error:
                raise ValueError(
                    f"no MQ-Tokenizer to make {kind} codes with: there is none in {folder} of {name or 'the tokenizer'!r}; give "
                    f"the one that made this tokenizer's codes with attach({kind}_mq=...)."
                ) from error
            self.attach(**{f"{kind}_mq": mq})
        return self._transient.mqs[kind]

    def _parse(self, texts: Sequence[str]) -> list[_Parsed]:
        """Parts each text into words and the entities between them: n + 1 strings, which are words, and n entities."""
        for row, text in enumerate(texts):
            if len(text) > MAX_TEXT_LENGTH:
                raise ValueError(f"text {row} has {len(text)} characters, more than {MAX_TEXT_LENGTH}; shorten it.")
            if not text.isascii() and _SURROGATE.search(text):
                raise ValueError(f"text {row} holds half of a surrogate pair, so it is not Unicode text: {text!r:.80}.")
        matches = [[(m.end(), m[1], m[2]) for m in _MENTION.finditer(text)] for text in texts]
        tables = self._tables
        found = {kind: self._remembered(kind, table) for kind, table in tables.items()}
        missing = {(kind, run) for mentions in matches for _, kind, run in mentions if run not in found[kind]}
        for kind in {kind for kind, _ in missing}:
            found[kind] |= self._find(kind, tables[kind], [run for of, run in missing if of == kind])
        parsed = []
        for text, mentions in zip(texts, matches):
            words: list[str] = []
            entities: list[_Entity] = []
            end = 0
            for after, kind, run in mentions:
                # A name within the last id is part of that id.
                if after - len("user_") < end:
                    continue
                if (entity := found[kind][run]) is None:
                    if self.on_unknown == "error" and (name := run.rstrip("".join(filter(_may_follow, run)))):
                        name = name.replace(SPACE, " ")
                        raise KeyError(
                            f"the text names {kind} {name!r:.100}, which is unknown to this tokenizer; add it with `tokenrec add`, give "
                            f"it codes with add_{kind}s, or set on_unknown='keep' to leave such words as they are."
                        )
                    continue
                words.append(text[end:after])
                entities.append(entity)
                end = after + len(entity.name)
            parsed.append(([*words, text[end:]], entities))
        return parsed

    def _remembered(self, kind: str, table: CodeTable) -> dict[str, _Entity | None]:
        """The known id that begins each run of characters, if there is any, of earlier texts."""
        of_table, known = self._transient.found.get(kind, (None, {}))
        if of_table is not table or len(known) > _REMEMBERED:
            known = {}
            self._transient.found[kind] = table, known
        return known

    def _find(self, kind: str, table: CodeTable, runs: Sequence[str]) -> dict[str, _Entity | None]:
        """The known id that begins each run of characters, if there is any."""
        candidates = {run: _beginnings(run.replace(SPACE, " "), table.longest) for run in runs}
        ids = list(dict.fromkeys(chain.from_iterable(candidates.values())))
        rows = table.index.rows(ids)
        at = np.flatnonzero(rows >= 0)
        texts, tokens = self._vocabularies[kind].expansions(table.codes[rows[at]])
        entities = {ids[row]: _Entity(kind, ids[row], text, own) for row, text, own in zip(at.tolist(), texts, tokens)}
        return {
            run: next((entities[name] for name in beginnings if name in entities), None)
            for run, beginnings in candidates.items()
        }

    def _tokens(self, words: str) -> list[int]:
        """The tokens of a text without entities and without the end-of-sequence token, remembered."""
        known, words = self._transient.words, self._plain(words)
        if (tokens := known.get(words)) is None:
            with self._lock:
                backend = self.backend_tokenizer
                backend.no_padding()
                backend.no_truncation()
                backend.encode_special_tokens = False
                tokens = backend.encode(words, add_special_tokens=False).ids
            if len(known) >= _REMEMBERED:
                known.clear()
            if len(words) <= MAX_ID_LENGTH:
                known[words] = tokens
        return tokens

    def _plain(self, words: str) -> str:
        """Words without code tokens, unless they are allowed: with a mark in them, which the backend's normaliser removes."""
        return words if self.allow_code_text or "<" not in words else _CODE_TOKEN.sub("<\x01", words)

    def _coded(self, kind: str, words: Sequence[str]) -> list[str]:
        """The ids that words name by their codes, where that is allowed."""
        found = self._vocabularies[kind].pattern.findall("\n".join(words)) if self.allow_code_text else []
        table = self._tables[kind]
        rows = (np.flatnonzero((table.codes == np.array(one, dtype=np.int64) - 1).all(axis=1)) for one in found)
        return list(chain.from_iterable(map(table.index.ids, rows)))

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        # A new token changes how words are split.
        self._transient.words.clear()
        return super()._add_tokens(*args, **kwargs)


# Arguments of an encoding that `_assemble` knows. Others come with a value that says no, or the backend encodes.
_ASSEMBLED = inspect.signature(TokenRecTokenizer._assemble).parameters


class _Transient:
    """What a tokenizer can make or load again; no part of its pickles, copies and fingerprints.

    Attributes:
        words: the tokens of texts without entities.
        found: by kind, the table of ids and the entity that each run of characters begins with.
        mqs: the MQ-Tokenizer of each kind.
        token: that the tokenizer was loaded with, for private repositories of the Hub.
    """

    def __init__(self) -> None:
        self.words: dict[str, list[int]] = {}
        self.found: dict[str, tuple[CodeTable, dict[str, _Entity | None]]] = {}
        self.mqs: dict[str, MQTokenizerModel] = {}
        self.token: str | bool | None = None

    def __reduce__(self) -> tuple:
        return _Transient, ()


class _Entity(NamedTuple):
    """A user or an item that a text names, with its code tokens as text and as vocabulary ids."""

    kind: str
    name: str
    text: str
    tokens: list[int]


# The n + 1 words around n entities, and the entities.
_Parsed = tuple[list[str], list[_Entity]]


class _TextEncoding(BatchEncoding):
    """A `BatchEncoding` of which the backend's view (`tokens()`, `word_ids()`, offsets) is made when it is first asked for."""

    def __init__(self, data: dict[str, Any], tensor_type: str | None, by_backend: Callable[[], BatchEncoding]):
        super().__init__(data, tensor_type=tensor_type)
        self._by_backend = by_backend
        del self._encodings

    @cached_property
    def _encodings(self) -> Any:  # type: ignore[override]
        return self._by_backend().encodings

    def __reduce__(self) -> tuple:
        return BatchEncoding, (self.data, self._encodings)


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

    def entity_tokens(self, codes: np.ndarray) -> np.ndarray:
        """The tokens of entities with these codes `[n, K]`, int64 `[n, P + K]`."""
        prefix = np.broadcast_to(self.prefix_ids, (len(codes), len(self.prefix_ids)))
        return np.concatenate([prefix, self.token_ids[np.arange(len(self.names)), codes]], axis=1)

    def expansions(self, codes: np.ndarray) -> tuple[list[str], list[list[int]]]:
        """The code tokens of codes `[n, K]`, as text and as vocabulary ids."""
        books = np.arange(len(self.names))
        return ["".join(names) for names in self.names[books, codes]], self.token_ids[books, codes].tolist()


def token_names(kind: str, num_codebooks: int, codebook_size: int) -> np.ndarray:
    """The names of the code tokens, strings `[K, L]`."""
    names = [[f"<{LETTERS[kind]}{k}-{w}>" for w in range(1, codebook_size + 1)] for k in range(1, num_codebooks + 1)]
    return np.array(names, dtype=object)


def check_names(kind: str, ids: Sequence[str]) -> None:
    """Refuses ids that begin like a code token, because no text could name them."""
    like_code = next((name for name in ids if _CODE_TOKEN.match(name)), None)
    if like_code is not None:
        raise ValueError(f"{kind} {like_code[:60]!r} begins like a code token, so no text could name it; rename it.")


def code_table(kind: str, ids: Sequence[str], vectors: torch.Tensor, mq: MQTokenizerModel) -> CodeTable:
    """The table of new, unique ids with the codes of their vectors `[n, d]`."""
    check_names(kind, ids)
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


def _may_follow(character: str) -> bool:
    """Whether a word may end before this character: punctuation and symbols, but no combining accent or vowel sign."""
    return unicodedata.category(character)[0] in "PS"


def _strings(text: Any) -> Iterator[str]:
    """The strings in a string or nested lists and tuples of strings."""
    if isinstance(text, str):
        yield text
    elif isinstance(text, (list, tuple)):
        yield from chain.from_iterable(map(_strings, text))


def _replaced(text: Any, strings: Iterator[str]) -> Any:
    """A copy of `text` with each string replaced by the next of `strings`."""
    if isinstance(text, str):
        return next(strings)
    if isinstance(text, (list, tuple)):
        return type(text)(_replaced(part, strings) for part in text)
    return text
