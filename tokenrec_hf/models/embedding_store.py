"""Stores of the collaborative vectors of users and items, and the exact retrieval of items by cosine (Eq. 19 of TokenRec).

[`EmbeddingStore`] keeps ids, raw vectors, seen items and item metadata in memory. It loads them by memory map and saves them as
whole files, atomically. [`Store`] is the interface that it shares with the engines of `tokenrec_hf.store`. The vectors are the
source of truth: codes are made of them and can be made again. The module knows nothing about models, codes or prompts; it only
carries the hash (`space_id`) of each kind's MQ-Tokenizer.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import operator
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, compress
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import huggingface_hub
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from .codes import (
    LOCK,
    MANIFEST,
    STORE_FOLDER,
    IdIndex,
    atomic_write,
    check_ids,
    current,
    damage_named,
    fetch_repository,
    read_json,
    read_whole,
)
from .functional import ITEM_CHUNK, exact_search, scorable, search_one, unit_rows

KINDS = ("user", "item")
FORMAT_VERSION = 1
WITHDRAWN = "withdrawn"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# A condition of a filter: a name, and how values are compared with those wanted.
_CONDITION = re.compile("(.*?)(<=?|>=?|~|)", re.DOTALL)
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_DATA_FILE = re.compile(r"[a-z]+-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.(users|items|store)[-.].*\.tmp|\.tmp\w{6}")

Vectors = torch.Tensor | np.ndarray
Where = Mapping[str, Any]  # a filter of `EmbeddingStore.search`
_Method = TypeVar("_Method", bound=Callable[..., Any])


class Store(Protocol):
    """Interface of all stores: the methods that recommending, evaluation and updates call.

    [`EmbeddingStore`] documents the methods; `tokenrec_hf.store.open_store` opens a store of any engine.
    """

    embedding_dim: int
    space_ids: dict[str, str | None]

    def upsert(self, kind: str, ids: Sequence[str], vectors: Vectors) -> None:
        """Adds vectors, or replaces those of ids that are present."""

    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """Removes ids, their vectors, and their part in the seen items."""

    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """Raw vectors of `ids`, float32 `[n, embedding_dim]`, in the order asked."""

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """Whether each id is in the store, boolean `[n]`."""

    def ids(self, kind: str) -> list[str]:
        """All ids, in the order of `vectors`."""

    def count(self, kind: str) -> int:
        """The number of ids."""

    def vectors(self, kind: str) -> torch.Tensor:
        """All raw vectors, float32 `[count, embedding_dim]`, to be read only."""

    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Replaces the seen items of users."""

    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Appends to the seen items of users."""

    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """The ids of the items that each user has seen, oldest first."""

    def popular(self, top_k: int, where: Where | None = None) -> dict[str, int]:
        """The items that users have seen most often, with the number of times."""

    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Merges names and values into the metadata of items."""

    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The metadata of each item, values by name."""

    def search(
        self, queries: Vectors, top_k: int, exclude: Sequence[Sequence[str]] | None = None, where: Where | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """The items of highest cosine with each query `[B, embedding_dim]`, and their cosines, best first."""

    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder that [`EmbeddingStore.open`] opens."""

    def close(self) -> None:
        """Releases connections, if the store has any."""

    def withdraw(self, item_ids: Sequence[str]) -> None:
        """Withdraws items for good: no search returns them any more, while histories may go on to name them.

        Sets `"withdrawn": True` in their metadata; new vectors and interactions do not change it.

        Raises:
            ValueError: an item is not in the store.
        """
        self.set_metadata(item_ids, [{WITHDRAWN: True}] * len(item_ids))

    def check_space(self, kind: str, space_id: str, who: str) -> None:
        """Makes sure that the store belongs to a given MQ-Tokenizer; a store that is not tied to any passes.

        Args:
            kind: `"user"` or `"item"`.
            space_id: the hash of the MQ-Tokenizer that the other side uses.
            who: the other side, for the message, for example `"the tokenizer"`.

        Raises:
            ValueError: the two hashes differ.
        """
        own = self.space_ids[check_kind(kind)]
        if own not in (None, space_id):
            raise ValueError(
                f"the {kind} vectors of the store belong to MQ-Tokenizer {own} but {who} was made with {space_id}; "
                "load store and tokenizer of the same repository, or make the codes again from this store."
            )


def _locked(method: _Method) -> _Method:
    """Makes a method of a store exclude all other such methods of the same store while it runs."""

    @functools.wraps(method)
    def run(self: EmbeddingStore, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, run)


class Lockable:
    """Keeps threads apart by `_lock`. Every copy is a deep one, with a lock of its own."""

    _lock: threading.RLock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __copy__(self) -> Lockable:
        return copy.deepcopy(self)


class EmbeddingStore(Lockable, Store):
    """Ids, raw vectors and seen items of users and items, in memory, with exact cosine search over the items.

    Rows keep the order in which ids were first added; deleting closes the gaps. Every change is checked before anything is
    touched, so a call that raises has changed nothing. New or deleted ids cost a copy of all vectors of their kind: pass many ids
    a call. Threads may read and write at once: each call sees the store before or after another call, never in between.

    Args:
        embedding_dim: d, the number of dimensions of users' and items' vectors.
        space_ids: for `"user"` and `"item"`, the hash of that kind's MQ-Tokenizer (encoder and codebooks); `None` as long as the
            kind is not tied to one.

    Raises:
        ValueError: `embedding_dim` is not positive, or `space_ids` has another key than `"user"` and `"item"`.
    """

    def __init__(self, embedding_dim: int, space_ids: Mapping[str, str | None] | None = None):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be at least 1.")
        self.embedding_dim = int(embedding_dim)
        self.space_ids: dict[str, str | None] = dict.fromkeys(KINDS)
        for kind, space_id in (space_ids or {}).items():
            self.space_ids[check_kind(kind)] = space_id
        self._lock = threading.RLock()
        self._manifests: dict[Path, dict[str, Any]] = {}  # As they were read or written last, by folder.
        self._index = {kind: IdIndex() for kind in KINDS}
        self._vectors = {kind: torch.empty(0, self.embedding_dim, dtype=torch.float32, device="cpu") for kind in KINDS}
        # Item rows of each user, int32, and the item vectors with their factors, once they are needed.
        self._seen = Ragged(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int32))
        self._metadata = ItemMetadata()
        self._scorable: tuple[torch.Tensor, torch.Tensor] | None = None

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"EmbeddingStore(embedding_dim={self.embedding_dim}, {counts})"

    # ---- open, save, share

    @classmethod
    def open(cls, folder: str | os.PathLike) -> EmbeddingStore:
        """Opens the store in a folder, or in the store folder of a trained repository.

        The vectors are memory-mapped: they are read as they are used, and changes stay in memory until the store is saved.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        for place in (Path(folder), Path(folder) / STORE_FOLDER):
            if (current(place) / MANIFEST).is_file():
                return read_whole(place, functools.partial(cls._load, place))
        raise FileNotFoundError(
            f"there is no embedding store in {folder} ({MANIFEST} is missing); make one with `tokenrec train`."
        )

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> EmbeddingStore:
        """Opens the store of a trained repository: a local folder or a Hub repository, of which only the store is downloaded.

        Args:
            name: a folder (of a repository, or of a store itself), or the id of a Hub repository.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.

        Raises:
            FileNotFoundError: there is no such folder or repository, or no store in it.
            OSError: the Hub refuses the download.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        return cls.open(fetch_repository(name, revision=revision, token=token, patterns=(f"{STORE_FOLDER}/*",)))

    @_locked
    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder, replacing the store that is there.

        A crash at any point leaves the former store whole. When the call returns, the new store is on the disk.

        Args:
            folder: made if absent.
            include_users: whether users' ids, vectors and seen items are written. Without them, those of a former store in the
                folder are removed.

        Raises:
            ValueError: the folder holds another store than when this one was opened from it or saved to it. It stays.
        """
        folder, kinds = Path(folder), KINDS if include_users else ("item",)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            self._check_unchanged(folder)
            try:
                manifest = {
                    "format_version": FORMAT_VERSION,
                    "embedding_dim": self.embedding_dim,
                    "space_ids": dict(self.space_ids),
                    "counts": {kind: self.count(kind) for kind in kinds},
                    "files": {f"{kind}s": _save_arrays(folder, f"{kind}s", self._arrays(kind)) for kind in kinds},
                }
                with atomic_write(folder / MANIFEST) as path:
                    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
                self._manifests[folder.resolve()] = manifest
            finally:
                remove_leftovers(folder)

    def push_to_hub(
        self,
        repo_id: str,
        include_users: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload embedding store",
    ) -> huggingface_hub.CommitInfo:
        """Uploads the store to its folder in a Hub model repository, which is made if absent.

        Args:
            repo_id: `name` or `organisation/name`.
            include_users: whether users' ids, vectors and seen items are uploaded too. They are personal data: without this
                argument they are left out, and those of an earlier upload are removed from the branch.
            private: whether a repository that is made here is private; by default the setting of the organisation.
            token: Hub token; by default the one that is logged in.
            revision: the branch, made if absent; by default the main one.
            commit_message: the message of the commit.
        """
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_users=include_users)
            return huggingface_hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=STORE_FOLDER,
                token=token,
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=LOCK,
                delete_patterns=[f"{kind}s-*.safetensors" for kind in KINDS],
            )

    def close(self) -> None:
        """Does nothing: an embedded store holds no connection."""

    # ---- ids and vectors

    @_locked
    def upsert(self, kind: str, ids: Sequence[str], vectors: Vectors) -> None:
        """Adds vectors, or replaces those of ids that are present.

        Args:
            kind: `"user"` or `"item"`.
            ids: n ids; of an id that is given twice the last vector counts. New ids are appended in the order given.
            vectors: `[n, embedding_dim]`, any float type; stored as float32, not normalised.

        Raises:
            ValueError: an id or the shape is wrong, or a vector holds NaN or an infinity. Nothing was changed then.
        """
        names, matrix = check_vectors(self.embedding_dim, kind, ids, vectors)
        rows = self._index[kind].rows(names)
        new = rows < 0
        self._vectors[kind][rows[~new]] = matrix[~new]
        if new.any():
            self._index[kind] = self._index[kind].extended(list(compress(names, new.tolist())), kind)
            self._vectors[kind] = torch.cat([self._vectors[kind], matrix[new]])
            if kind == "user":
                lengths = np.append(self._seen.lengths, np.zeros(new.sum(), dtype=np.int64))
                self._seen = Ragged.from_lengths(lengths, self._seen.values)
            else:
                self._metadata.add_items(int(new.sum()))
        if kind == "item":
            self._scorable = None

    @_locked
    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """Removes ids, their vectors, and their part in the seen items; ids that are not present are ignored."""
        keep = ~np.isin(np.arange(self.count(kind)), self.rows(kind, ids))
        if keep.all():
            return
        if kind == "user":
            self._seen = self._seen.take(np.flatnonzero(keep))
        else:
            users, items = self._seen.rows, self._seen.values
            stays = keep[items]
            moved = (np.cumsum(keep, dtype=np.int32) - 1)[items[stays]]
            self._seen = Ragged.from_lengths(np.bincount(users[stays], minlength=len(self._seen)), moved)
            self._metadata.keep(keep)
            self._scorable = None
        self._index[kind] = self._index[kind].kept(keep)
        self._vectors[kind] = self._vectors[kind][keep]

    @_locked
    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """The raw vectors of `ids`, float32 `[n, embedding_dim]`, in the order asked.

        Raises:
            KeyError: an id is not in the store.
        """
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            name = str(list(ids)[int(np.argmax(rows < 0))])
            raise KeyError(f"{kind} {name!r:.100} is not in the store; add it first.")
        return self._vectors[kind][rows]

    @_locked
    def rows(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`; -1 where the id is not in the store."""
        return self._index[check_kind(kind, ids)].rows(ids)

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """Whether each id is in the store, boolean `[n]`."""
        return self.rows(kind, ids) >= 0

    @_locked
    def ids(self, kind: str) -> list[str]:
        """All ids, in row order."""
        return self._index[check_kind(kind)].ids()

    @_locked
    def count(self, kind: str) -> int:
        """The number of ids."""
        return len(self._index[check_kind(kind)])

    @_locked
    def vectors(self, kind: str) -> torch.Tensor:
        """All raw vectors, float32 `[count, embedding_dim]`, in row order: the store's own tensor, to be read only."""
        return self._vectors[check_kind(kind)]

    # ---- seen items

    @_locked
    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Replaces the seen items of users.

        Args:
            user_ids: n users of the store; of a user who is given twice the last list counts.
            item_ids_per_user: for each user, ids of items of the store, oldest first; an item may come up again.

        Raises:
            ValueError: a user or an item is not in the store, or the lengths differ. Nothing was changed then.
        """
        users, new = self._checked_seen(user_ids, item_ids_per_user)
        chosen = np.arange(len(self._seen))
        chosen[users] = len(self._seen) + np.arange(len(users))
        lengths = np.concatenate([self._seen.lengths, new.lengths])
        self._seen = Ragged.from_lengths(lengths, np.concatenate([self._seen.values, new.values])).take(chosen)

    @_locked
    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Appends to the seen items of users; arguments and errors of [`~EmbeddingStore.set_seen`]."""
        users, new = self._checked_seen(user_ids, item_ids_per_user)
        rows = np.concatenate([self._seen.rows, users[new.rows]])
        self._seen = Ragged.from_pairs(rows, np.concatenate([self._seen.values, new.values]), len(self._seen))

    @_locked
    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """The ids of the items that each user has seen, oldest first; an empty list for an unknown user."""
        rows = self.rows("user", user_ids)
        lists = self._seen.take(rows[rows >= 0])
        names, ends = self._index["item"].ids(lists.values), lists.indptr.tolist()
        known = (names[start:end] for start, end in zip(ends, ends[1:]))
        return [next(known) if row >= 0 else [] for row in rows]

    @_locked
    def popular(self, top_k: int, where: Where | None = None) -> dict[str, int]:
        """How often users have seen the `top_k` items that they have seen most often, the most popular first.

        Of equal ones the first in the store comes first. `where` is as in [`~EmbeddingStore.search`].
        """
        counts, allowed = np.bincount(self._seen.values, minlength=self.count("item")), self.allowed(where)
        rows = np.flatnonzero(counts if allowed is None else counts * allowed)
        rows = rows[np.argsort(-counts[rows], kind="stable")[:top_k]]
        return dict(zip(self._index["item"].ids(rows), counts[rows].tolist()))

    # ---- metadata of items

    @_locked
    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Merges names and values into the metadata of items, by which searches can be filtered.

        Args:
            item_ids: n items of the store.
            metadata: for each item values by name, `{"category": "jazz", "in_stock": True}`: strings, booleans or finite
                numbers; `None` removes a name. Names are made of letters, digits and underscores, 64 at most.

        Raises:
            ValueError: an item is not in the store, or a name or a value is not as described. Nothing was changed then.
        """
        checked = check_metadata(metadata, len(item_ids))
        self._metadata.set(self._rows_of("item", item_ids, "the metadata"), checked)

    @_locked
    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The metadata of each item, values by name.

        Raises:
            ValueError: an item is not in the store.
        """
        return [dict(self._metadata.items[row]) for row in self._rows_of("item", item_ids, "the metadata")]

    @_locked
    def allowed(self, where: Where | None = None) -> np.ndarray | None:
        """The items that a search with this filter may return, boolean `[count]`; `None` if it may return all.

        Raises:
            ValueError: `where` has a wrong value, or a name that no item has.
        """
        return self._metadata.allowed(check_where(where or {}))

    # ---- search

    @_locked
    def search(
        self, queries: Vectors, top_k: int, exclude: Sequence[Sequence[str]] | None = None, where: Where | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """The items of highest cosine with each query, best first (Eq. 19).

        Args:
            queries: `[B, embedding_dim]`; need not be normalised.
            top_k: how many items to return for each query; fewer come back only where fewer remain.
            exclude: for each query, ids of items that must not be returned; ids that are not in the store are ignored.
            where: only items whose metadata has these values: `{"category": ["jazz", "folk"], "in_stock": True}` stands
                for either category and in stock. `{"price<": 30, "title~": "blue"}` compares numbers, with `<`, `<=`, `>` or `>=`,
                and looks for a part of a text in any case. An item without the name is left out.

        Returns:
            For each query, item ids and their cosines. Items of equal score come in row order; a zero vector scores 0.

        Raises:
            ValueError: `queries` has the wrong shape or holds NaN or an infinity, `top_k` is below 1, `exclude` has not
                one list for each query, or `where` has a wrong value, or a name that no item has.
        """
        unit, lists, lengths = check_search(self.embedding_dim, queries, top_k, exclude)
        allowed = self.allowed(where)
        if self._scorable is None:
            self._scorable = scorable(self._vectors["item"])
        if len(unit) == 1:
            items, factors = (part.numpy() for part in self._scorable)
            excluded = self._index["item"].rows(list(lists[0]))
            best, cosines = search_one(unit[0].numpy(), items, factors, top_k, excluded, allowed)
            return [self._index["item"].ids(best)], [cosines.tolist()]
        rows, scores = exact_search(
            unit,
            *self._scorable,
            # Beyond the number of items there is only padding.
            min(top_k, max(self.count("item"), 1)),
            torch.from_numpy(np.repeat(np.arange(len(unit)), lengths)),
            torch.from_numpy(self._index["item"].rows(list(chain.from_iterable(lists)))),
            None if allowed is None else torch.from_numpy(allowed),
        )
        found = (rows >= 0).sum(dim=1).tolist()
        names = [self._index["item"].ids(own[:count].numpy()) for own, count in zip(rows, found)]
        return names, [own[:count].tolist() for own, count in zip(scores, found)]

    # ---- helpers

    def _check_unchanged(self, folder: Path) -> None:
        path, known = folder / MANIFEST, self._manifests.get(folder.resolve())
        if current(folder) != Path(os.path.abspath(folder)) or known and path.is_file() and read_json(path) != known:
            raise ValueError(
                f"the store in {folder} was changed by another process or object since it was opened, or a change of its "
                "repository was interrupted (see `tokenrec verify`); open it again and repeat the change."
            )

    def _checked_seen(
        self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, Ragged]:
        """Rows of users, int64 `[n]`, and their lists of item rows, int32."""
        lengths = list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        users = self._rows_of("user", user_ids, "the seen items")
        items = self._rows_of("item", list(chain.from_iterable(item_ids_per_user)), "the seen items")
        return users, Ragged.from_lengths(lengths, items.astype(np.int32))

    def _rows_of(self, kind: str, ids: Sequence[str], place: str) -> np.ndarray:
        """The row of each id, or a ValueError that names the first id that is not in the store."""
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            name = str(list(ids)[int(np.argmax(rows < 0))])
            raise ValueError(
                f"{kind} {name!r:.100} of {place} is not in the store; add it first with upsert({kind!r}, ...)."
            )
        return rows

    def _arrays(self, kind: str) -> dict[str, torch.Tensor]:
        """All content of a kind, by the names in its file."""
        arrays = self._index[kind].arrays()
        if kind == "user":
            arrays |= {"seen_indptr": self._seen.indptr, "seen_items": self._seen.values}
        else:
            # Only the items that have any: most stores have none.
            known = {row: values for row, values in enumerate(self._metadata.items) if values}
            arrays["metadata"] = np.frombuffer(bytearray(json.dumps(known).encode()), dtype=np.uint8)
        return {"vectors": self._vectors[kind], **{name: torch.from_numpy(array) for name, array in arrays.items()}}

    @classmethod
    def _load(cls, place: Path) -> EmbeddingStore:
        path = (folder := current(place)) / MANIFEST
        manifest = read_json(path)
        if manifest.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {manifest['format_version']} but this tokenrec_hf reads version {FORMAT_VERSION}; "
                "install the version that wrote it or rebuild the store by `tokenrec train`."
            )
        with damage_named(
            path, "it does not fit its files; restore the store from a copy or rebuild it by `tokenrec train`"
        ):
            store = cls(manifest["embedding_dim"], manifest["space_ids"])
            store._manifests[place.resolve()] = manifest
            # Items first: the users' seen items point to their rows.
            for kind in sorted(manifest["counts"]):
                store._fill(kind, _load_arrays(folder, **manifest["files"][f"{kind}s"]))
                if store.count(kind) != manifest["counts"][kind]:
                    raise ValueError(f"there are no {manifest['counts'][kind]} {kind}s with an id and a vector each")
            return store

    def _fill(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over the content of a file of `_arrays`, after checking that it fits together."""
        vectors, arrays = tensors["vectors"], {name: tensor.numpy() for name, tensor in tensors.items()}
        index = IdIndex.from_arrays(arrays)
        if vectors.dtype != torch.float32 or vectors.shape != (len(index), self.embedding_dim):
            raise ValueError(f"there are no {len(index)} float32 {kind} vectors of {self.embedding_dim} dimensions")
        if (row := _first_not_finite(vectors)) is not None:
            raise ValueError(f"the vector of {kind} {index[row]!r} holds NaN or an infinity")
        self._index[check_kind(kind)], self._vectors[kind] = index, vectors
        if kind == "item":
            known = json.loads(arrays["metadata"].tobytes())
            if not all(row.isdecimal() for row in known):
                raise ValueError("the metadata do not name items by their rows")
            self._metadata = ItemMetadata([{}] * len(index))
            self._metadata.set(list(map(int, known)), check_metadata(list(known.values()), len(known)))
        else:
            self._seen = Ragged(arrays["seen_indptr"], arrays["seen_items"])
            fits = len(self._seen) == len(index) and self._seen.is_valid(self.count("item"))
            if not fits or self._seen.values.dtype != np.int32:
                raise ValueError("the seen items do not fit the users and items")


class ItemMetadata:
    """Metadata of items: a dict of values by name for each item, which is replaced and never changed.

    Args:
        items: the dicts, checked by [`check_metadata`], without values of `None`.
    """

    def __init__(self, items: Sequence[dict[str, Any]] = ()):
        self.items = list(items)
        # By name, a number for each value, and the number of each item's value; made when a search needs them.
        self._columns: dict[str, tuple[dict[tuple[bool, Any], int], np.ndarray]] = {}

    def set(self, rows: Iterable[int], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Merges checked names and values into those of the items at `rows` `[m]`; `None` removes a name."""
        for row, values in zip(rows, metadata):
            merged = {**self.items[row], **values}
            self.items[row] = {name: value for name, value in merged.items() if value is not None}
        self._columns.clear()

    def add_items(self, count: int) -> None:
        """Adds items without metadata at the end."""
        self.items += [{}] * count
        self._columns.clear()

    def keep(self, keep: np.ndarray) -> None:
        """Removes the items where the boolean array `keep` `[n]` is false and closes the gaps."""
        self.items = list(compress(self.items, keep.tolist()))
        self._columns.clear()

    def allowed(self, where: Mapping[str, Sequence[Any]]) -> np.ndarray | None:
        """The items that a search may return, boolean `[n]`: not withdrawn, one of the values for every name; `None` for all.

        Raises:
            ValueError: no item has one of the names.
        """
        for name in dict.fromkeys(condition_parts(condition)[0] for condition in where):
            if self.items and not self._column(name)[0].keys() - {_key(None)}:
                known = ", ".join(map(repr, sorted({*chain.from_iterable(self.items)} - {WITHDRAWN})[:8]))
                there = f"there are {known}" if known else "`tokenrec add --item-metadata` adds some"
                raise ValueError(f"no item has the metadata {name!r}; {there}.")
        conditions = [self._holds(name, wanted) for name, wanted in where.items()]
        if (withdrawn := self._holds(WITHDRAWN, [True])).any():
            conditions.append(~withdrawn)
        return np.logical_and.reduce(conditions) if conditions else None

    def _holds(self, condition: str, wanted: Sequence[Any]) -> np.ndarray:
        """Whether each item fulfils a condition for one of the values `wanted`, boolean `[n]`."""
        name, sign = condition_parts(condition)
        numbers, column = self._column(name)
        wanted = [value for value in wanted if value is not None]
        if sign:
            sought = [number for key, number in numbers.items() if any(_fits(*key, sign, value) for value in wanted)]
        else:
            sought = [numbers[_key(value)] for value in wanted if _key(value) in numbers]
        return np.isin(column, sought) if sought else np.zeros(len(column), dtype=bool)

    def _column(self, name: str) -> tuple[dict[tuple[bool, Any], int], np.ndarray]:
        """A number for each value of a name, by key, and the number of each item's value."""
        if name not in self._columns:
            keys = [_key(values.get(name)) for values in self.items]
            numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
            column = np.fromiter(map(numbers.__getitem__, keys), dtype=np.int32, count=len(keys))
            self._columns[name] = numbers, column
        return self._columns[name]


class Ragged:
    """Lists of different lengths in one array (CSR): list r is `values[indptr[r] : indptr[r + 1]]`.

    Args:
        indptr: int64 `[num_lists + 1]`, from 0 to the number of values, ascending.
        values: `[indptr[-1]]`.
    """

    def __init__(self, indptr: np.ndarray, values: np.ndarray):
        self.indptr, self.values = indptr, values

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, values: np.ndarray) -> Ragged:
        """Lists of these lengths `[num_lists]`, one after the other."""
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, num_lists: int) -> Ragged:
        """Each of `values` `[n]` in the list that `rows` `[n]` names, in the order given."""
        order = np.argsort(rows, kind="stable")
        return cls.from_lengths(np.bincount(rows, minlength=num_lists), values[order])

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, int64 `[num_lists]`."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """The list of each value, int64 `[n]`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def ranks(self) -> np.ndarray:
        """The place of each value in its list, from 0, int64 `[n]`."""
        return np.arange(len(self.values)) - np.repeat(self.indptr[:-1], self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists at `rows` `[m]`, in that order."""
        lengths = self.lengths[rows]
        starts = Ragged.from_lengths(lengths, np.repeat(self.indptr[rows], lengths))
        return Ragged(starts.indptr, self.values[starts.values + starts.ranks])

    def is_valid(self, bound: int) -> bool:
        """Whether the arrays fit together, with all values in `[0, bound)`."""
        is_whole = self.indptr.ndim == self.values.ndim == 1 and self.indptr.dtype == np.int64
        starts_at_0 = is_whole and len(self.indptr) > 0 and self.indptr[0] == 0 and self.indptr[-1] == len(self.values)
        in_range = self.values.min(initial=0) >= 0 and self.values.max(initial=-1) < bound
        return bool(starts_at_0 and (self.lengths >= 0).all() and in_range)

    def padded(self, fill: int) -> np.ndarray:
        """A rectangle `[num_lists, longest]` (at least one column) filled up with `fill`."""
        table = np.full((len(self), max(1, int(self.lengths.max(initial=0)))), fill, dtype=np.int64)
        table[self.rows, self.ranks] = self.values
        return table


def check_vectors(
    embedding_dim: int, kind: str, ids: Sequence[str], vectors: Vectors
) -> tuple[list[str], torch.Tensor]:
    """Unique ids and their vectors, float32 `[n, d]`, perhaps the memory given; of a repeated id the last vector counts.

    Raises:
        ValueError: an id, the shape or the length is wrong, or a vector holds NaN or an infinity.
    """
    names = check_ids(ids, check_kind(kind, ids))
    matrix = _checked_matrix(embedding_dim, vectors, f"{kind} vectors", "n")
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} {kind} ids were given with {len(matrix)} vectors; give one vector for each id.")
    if (row := _first_not_finite(matrix)) is not None:
        raise ValueError(
            f"the vector of {kind} {names[row]!r} holds NaN or an infinity; leave the {kind} out or correct its vector."
        )
    last = {name: row for row, name in enumerate(names)}
    if len(last) < len(names):
        return list(last), matrix[list(last.values())]
    return names, matrix


def check_search(
    embedding_dim: int, queries: Vectors, top_k: int, exclude: Sequence[Sequence[str]] | None
) -> tuple[torch.Tensor, Sequence[Sequence[str]], np.ndarray]:
    """Unit queries, float32 `[B, embedding_dim]`, the ids to exclude for each, and their numbers; errors of `search`."""
    matrix = _checked_matrix(embedding_dim, queries, "queries", "B")
    if isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; ask for at least 1 item, in whole numbers.")
    if (row := _first_not_finite(matrix)) is not None:
        raise ValueError(f"query {row} holds NaN or an infinity; no item can be compared with it.")
    lists = [()] * len(matrix) if exclude is None else exclude
    return unit_rows(matrix), lists, list_lengths(lists, len(matrix), "exclude", "query")


def _checked_matrix(embedding_dim: int, vectors: Vectors, role: str, rows: str) -> torch.Tensor:
    """`vectors` as a float32 CPU tensor `[rows, embedding_dim]`, or a ValueError that names their role."""
    if isinstance(vectors, torch.Tensor):
        matrix = vectors.detach().to("cpu", torch.float32)
    else:
        matrix = torch.from_numpy(np.array(vectors, dtype=np.float32))
    if matrix.ndim != 2 or matrix.shape[1] != embedding_dim:
        raise ValueError(
            f"{role} have shape {list(matrix.shape)} but the store expects [{rows}, {embedding_dim}]; pass a matrix with a "
            "row for each, or make a store of another embedding_dim."
        )
    return matrix


def _first_not_finite(matrix: torch.Tensor) -> int | None:
    """The first row of `[n, d]` with NaN or an infinity."""
    if math.isfinite(matrix.sum()):
        return None
    # In parts, because the masks of a large matrix would take as much memory as the matrix.
    for start, part in zip(range(0, len(matrix), ITEM_CHUNK), matrix.split(ITEM_CHUNK)):
        if not (fine := torch.isfinite(part).all(dim=1)).all():
            return start + int(fine.int().argmin())
    return None


def check_kind(kind: str, ids: Sequence[str] = ()) -> str:
    """`kind`, or a ValueError where it is neither `"user"` nor `"item"`, or `ids` are a single string."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'user' or 'item'.")
    if isinstance(ids, str):
        raise ValueError(f"{kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
    return kind


def list_lengths(lists: Sequence[Sequence[str]], expected: int, name: str, owner: str) -> np.ndarray:
    """The length of each list, int64 `[expected]`, or a ValueError if there is not a list for each owner."""
    if len(lists) != expected or str in set(map(type, lists)):
        found = "strings" if len(lists) == expected else f"{len(lists)} lists of item ids"
        raise ValueError(f"{name} holds {found}; pass one list of item ids for each {owner}, {expected} in all.")
    return np.fromiter(map(len, lists), dtype=np.int64, count=expected)


def check_metadata(metadata: Sequence[Mapping[str, Any]], num_items: int) -> list[dict[str, Any]]:
    """Names and values of each item as a plain dict; a value of `None` stands for no value.

    Raises:
        ValueError: there are not `num_items` of them, a name is no identifier of up to 64 characters, or a value is no string,
            boolean or finite number.
    """
    if len(metadata) != num_items:
        raise ValueError(f"there is metadata for {len(metadata)} items but {num_items} ids; pass one for each.")
    return [{_checked_name(name): _checked_value(name, value) for name, value in values.items()} for values in metadata]


def check_where(where: Where) -> dict[str, list[Any]]:
    """A filter with a list of values for every condition; errors of [`check_metadata`]."""
    if not isinstance(where, Mapping):
        raise ValueError(f"where is {where!r:.100}; give values by name, such as {{'genre': 'jazz'}}.")
    several = (list, tuple, set, frozenset)
    lists = {condition: wanted if isinstance(wanted, several) else [wanted] for condition, wanted in where.items()}
    names = {condition: _checked_name(condition_parts(condition)[0]) for condition in lists}
    return {condition: [_checked_value(names[condition], one) for one in wanted] for condition, wanted in lists.items()}


def condition_parts(condition: str) -> tuple[str, str]:
    """The name of a filter's condition, and its operator or ""."""
    return cast(re.Match, _CONDITION.fullmatch(str(condition))).groups()  # type: ignore[return-value]


def _fits(is_bool: bool, value: Any, sign: str, wanted: Any) -> bool:
    """Whether a value of metadata, with its key, contains or compares with the value wanted; numbers only with numbers."""
    if value is None or is_bool:
        return False
    if sign == "~":
        return str(wanted).casefold() in str(value).casefold()
    return isinstance(value, str) == isinstance(wanted, str) and _COMPARISONS[sign](value, wanted)


def _key(value: Any) -> tuple[bool, Any]:
    """A key that tells booleans from numbers: in Python, True equals 1."""
    return isinstance(value, bool), value


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"the metadata name {str(name)[:80]!r} is not made of letters, digits and underscores, 64 at most; rename it."
        )
    return name


def _checked_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value):
        return value.item() if isinstance(value, np.generic) else value
    raise ValueError(
        f"the metadata {name!r} is {str(value)[:80]!r} ({type(value).__name__}); give a string, a boolean or a finite number."
    )


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the data files that the manifest of a store does not name, and files of interrupted saves."""
    manifest = Path(folder) / MANIFEST
    keep = {entry["file"] for entry in read_json(manifest)["files"].values()} if manifest.is_file() else ()
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name) or (_DATA_FILE.fullmatch(path.name) and path.name not in keep):
            # Windows does not remove a file that is still mapped; the next save tries again.
            with suppress(OSError):
                path.unlink()


def _save_arrays(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes a data file that is named by its content, and describes it for the manifest."""
    written = folder / f".{name}-{secrets.token_hex(4)}.tmp"
    save_file(tensors, written)
    size, sha256 = written.stat().st_size, _sha256(written)
    file = f"{name}-{sha256[:16]}.safetensors"
    with atomic_write(folder / file) as path:
        os.replace(written, path)
    return {"file": file, "bytes": size, "sha256": sha256}


def _load_arrays(folder: Path, file: str, bytes: int, sha256: str) -> dict[str, torch.Tensor]:
    """The tensors of a data file: memory maps, copied page by page where they are changed."""
    if not _DATA_FILE.fullmatch(file):
        raise ValueError(f"{file!r} is not the name of a data file")
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{file} is missing")
    if path.stat().st_size != bytes:
        raise ValueError(f"{file} has {path.stat().st_size} bytes instead of {bytes}")
    if _sha256(path) != sha256:
        raise ValueError(f"the content of {file} is not the saved one")
    return load_file(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
