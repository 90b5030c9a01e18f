"""The embedding store: where the collaborative vectors of users and items live, and where items are retrieved from.

Holds, in memory, the ids, the raw vectors, what each user has already interacted with and what is known about items,
and finds the items whose vectors have the highest cosine with a query (Eq. 19 of TokenRec, arXiv 2406.10450), exactly.
The vectors are the source of truth for everything downstream. Knows nothing about how they were made, about codes,
prompts or models; it only carries the hashes (`space_ids`) of the MQ-Tokenizers that the codes were made with.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .exact_search import exact_search, unit_rows
from .id_index import IdIndex
from .item_metadata import WITHDRAWN, ItemMetadata, check_metadata, check_where
from .seen_items import SeenItems
from .store_changes import pack_changes, unpack_changes
from .store_checks import KINDS, check_id_list, check_kind, check_queries, check_vectors, list_lengths
from .store_files import MANIFEST, append_changes, damaged, is_current, load_files, save_files
from .store_hub import StoreHubMixin
from .vector_table import VectorTable

# A store on disk is written anew when it has more files of changes than this, or when these hold more than a quarter of it.
MAX_CHANGES, MAX_CHANGED_SHARE = 16, 4


def _extra(module: str) -> Any:
    """A sibling that needs what only an extra installs."""
    # Not by an import statement: code on the Hub takes along all that it imports.
    return importlib.import_module(f"tokenrec_hf.store.{module}")


def _locked(method: Callable) -> Callable:
    """Makes a method of a store exclude all others of the same store while it runs."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class EmbeddingStore(StoreHubMixin):
    """Ids, raw vectors and seen items of users and items, in memory, with exact cosine search over the items.

    Rows keep the order in which ids were first added; deleting closes the gaps. Every change is checked before anything
    is touched, so a call that raises has changed nothing. A change costs a pass over the ids: pass many ids a call.
    Threads may read and write at once: each call sees the store before or after another one, never in between.

    Args:
        embedding_dim: d, the number of dimensions of users' and items' vectors.
        space_ids: for `"user"` and `"item"`, the hash of that kind's MQ-Tokenizer (encoder and codebooks); `None` as
            long as the kind is not tied to one.

    Raises:
        ValueError: `embedding_dim` is not positive, or `space_ids` has another key than `"user"` and `"item"`.
    """

    def __init__(self, embedding_dim: int, space_ids: dict[str, str] | None = None):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; it must be at least 1.")
        self.embedding_dim = int(embedding_dim)
        self.space_ids: dict[str, str | None] = dict.fromkeys(KINDS)
        for kind, space_id in (space_ids or {}).items():
            self.space_ids[check_kind(kind)] = space_id
        self._lock = threading.RLock()
        self._index = {kind: IdIndex() for kind in KINDS}
        self._vectors = {kind: VectorTable(torch.empty(0, self.embedding_dim)) for kind in KINDS}
        self._seen = SeenItems()
        self._metadata = ItemMetadata()
        self._approximate: Any = None
        # Where the store was opened from or last saved to, with its manifest, and what has changed since, call by call.
        self._saved: tuple[Path, dict[str, Any]] | None = None
        self._changes: list[tuple[str, list[Any], torch.Tensor | None]] = []

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"EmbeddingStore(embedding_dim={self.embedding_dim}, {counts})"

    # ---- open, save, share

    @classmethod
    def open(cls, path_or_uri: str | os.PathLike, token: str | None = None) -> EmbeddingStore:
        """Opens the store in a folder, in the `store/` folder of a trained repository, or on Milvus.

        The files are memory-mapped, so a large store opens at once and takes memory as it is used.

        Args:
            path_or_uri: a folder; the path of a Milvus Lite database, which ends in `.db`; or the address of a Milvus
                server or cluster, `http://host:19530` or `https://...`. See [`MilvusEmbeddingStore`].
            token: of the Milvus server.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        if str(path_or_uri).startswith(("http://", "https://")) or str(path_or_uri).endswith(".db"):
            return _extra("milvus").MilvusEmbeddingStore(str(path_or_uri), token=token)
        for folder in (Path(path_or_uri), Path(path_or_uri) / "store"):
            if (folder / MANIFEST).is_file():
                return cls._load(folder)
        raise FileNotFoundError(
            f"there is no embedding store in {path_or_uri} ({MANIFEST} is missing); give the folder of a store or of a "
            "trained repository, or make one with `tokenrec train`."
        )

    @_locked
    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder, replacing the store that is there.

        In the folder that the store was opened from or last saved to, only what has changed since is written, as long as
        it is little and nobody was deleted. Whoever stops in between leaves the former store whole, and what was saved
        when this returns is on the disk.

        Args:
            folder: made if absent.
            include_users: whether users' ids, vectors and seen items are written. Without them, those of a former store
                in the folder are removed.
        """
        folder, kinds = Path(folder).resolve(), KINDS if include_users else ("item",)
        facts = {
            "embedding_dim": self.embedding_dim,
            "space_ids": dict(self.space_ids),
            "counts": {kind: self.count(kind) for kind in kinds},
        }
        manifest = self._manifest_to_extend(folder, facts)
        if manifest is None:
            facts["metadata"] = self._metadata.values
            manifest = save_files(folder, facts, {f"{kind}s": self._arrays(kind) for kind in kinds})
        elif self._changes:
            manifest = append_changes(folder, manifest, facts, pack_changes(self._changes))
        if include_users:
            self._saved, self._changes = (folder, manifest), []

    def close(self) -> None:
        """Nothing: there is nothing to close here, as there is in stores on a server."""

    # ---- ids and vectors

    @_locked
    def upsert(self, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray) -> None:
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
        if new.any():
            self._index[kind] = self._index[kind].extended([names[i] for i in np.flatnonzero(new)], kind)
            self._vectors[kind].append(matrix if new.all() else matrix[torch.from_numpy(new)])
            (self._seen.add_users if kind == "user" else self._metadata.add_items)(int(new.sum()))
        if not new.all():
            self._vectors[kind].put(torch.from_numpy(rows[~new]), matrix[torch.from_numpy(~new)])
        if kind == "item" and self._approximate is not None:
            self._approximate.added(int(new.sum()))
            self._approximate.replaced(rows[~new])
        self._record("upsert", [kind, names], matrix)

    @_locked
    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """Removes ids, their vectors, and their part in the seen items; ids that are not present are ignored."""
        rows = self.rows(kind, ids)
        rows = rows[rows >= 0]
        if not len(rows):
            return
        keep = np.ones(self.count(kind), dtype=bool)
        keep[rows] = False
        if kind == "user":
            self._seen.keep_users(keep)
            # Nothing of a user may be left in the files: they are written anew.
            self._saved = None
        else:
            self._seen.keep_items(keep)
            self._metadata.keep(keep)
            if self._approximate is not None:
                self._approximate.kept(keep)
        self._index[kind] = self._index[kind].kept(keep)
        self._vectors[kind].keep(torch.from_numpy(keep))
        self._record("delete", [kind, list(ids)])

    @_locked
    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """The raw vectors of `ids`, float32 `[n, embedding_dim]`, in the order asked.

        Raises:
            KeyError: an id is not in the store.
        """
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            raise KeyError(f"{kind} {ids[int(np.argmax(rows < 0))]!r} is not in the store; add it with upsert.")
        return self._vectors[kind].take(torch.from_numpy(rows))

    @_locked
    def rows(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`; -1 where the id is not in the store."""
        return self._index[check_kind(kind)].rows(check_id_list(kind, ids))

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
        return self._vectors[check_kind(kind)].all()

    def check_space(self, kind: str, space_id: str, who: str) -> None:
        """Makes sure that the store belongs to the MQ-Tokenizer that somebody else uses; one not tied yet passes.

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

    # ---- seen items

    @_locked
    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Replaces what users have already interacted with.

        Args:
            user_ids: n users of the store; of a user who is given twice the last list counts.
            item_ids_per_user: for each user, ids of items of the store, oldest first; an item may come up again.

        Raises:
            ValueError: a user or an item is not in the store, or the lengths differ. Nothing was changed then.
        """
        self._seen.replace(*self._checked_seen(user_ids, item_ids_per_user))
        self._record("set_seen", [list(user_ids), [list(one) for one in item_ids_per_user]])

    @_locked
    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """Appends to what users have already interacted with; arguments and errors of [`~EmbeddingStore.set_seen`]."""
        self._seen.add(*self._checked_seen(user_ids, item_ids_per_user))
        self._record("add_seen", [list(user_ids), [list(one) for one in item_ids_per_user]])

    @_locked
    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """The ids of the items that each user has interacted with, oldest first; an empty list for an unknown user."""
        indptr, items = self._seen.of(self.rows("user", user_ids))
        names = self._index["item"].ids(items)
        return [names[start:end] for start, end in zip(indptr.tolist(), indptr[1:].tolist())]

    # ---- what is known about items

    @_locked
    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Records what is known about items, to filter a search by; names that are not given stay as they are.

        Args:
            item_ids: n items of the store.
            metadata: for each item values by name, `{"category": "jazz", "in_stock": True}`: strings, booleans or finite
                numbers; `None` takes a name away. Names are made of letters, digits and underscores, 64 at most.

        Raises:
            ValueError: an item is not in the store, or a name or a value is not as said. Nothing was changed then.
        """
        checked = check_metadata(metadata)
        if len(checked) != len(item_ids):
            raise ValueError(f"there is metadata for {len(checked)} items but {len(item_ids)} ids; pass one for each.")
        rows = self._rows_of("item", item_ids, "the metadata")
        self._metadata.set(rows, checked)
        self._record("set_metadata", [list(item_ids), checked])

    @_locked
    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What is known about each item, values by name.

        Raises:
            ValueError: an item is not in the store.
        """
        return self._metadata.get(self._rows_of("item", item_ids, "the metadata"))

    def withdraw(self, item_ids: Sequence[str]) -> None:
        """Withdraws items for good: no search returns them any more, while histories may go on to name them.

        What is recorded is `"withdrawn": True` in their metadata; new vectors and interactions do not change it.

        Raises:
            ValueError: an item is not in the store.
        """
        self.set_metadata(item_ids, [{WITHDRAWN: True}] * len(item_ids))

    # ---- search

    @_locked
    def search(
        self,
        queries: torch.Tensor | np.ndarray,
        top_k: int,
        exclude: Sequence[Sequence[str]] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """The items of highest cosine with each query, best first (Eq. 19).

        Args:
            queries: `[B, embedding_dim]`; need not be normalised.
            top_k: how many items to return for each query; fewer come back only where fewer remain.
            exclude: for each query, ids of items that must not be returned; ids that are not in the store are ignored.
            where: only items whose metadata has these values: `{"category": ["jazz", "folk"], "in_stock": True}` stands
                for either category and in stock. An item without the name is left out.

        Returns:
            For each query, item ids and their cosines. Items of equal score come in row order; a zero vector scores 0.

        Raises:
            ValueError: `queries` has the wrong shape or holds NaN or an infinity, `top_k` is below 1, `exclude` has not
                one list for each query, or `where` has a wrong name or value.
        """
        unit = unit_rows(check_queries(self.embedding_dim, queries, top_k))
        lengths = np.zeros(len(unit), dtype=np.int64)
        items = np.empty(0, dtype=np.int64)
        if exclude is not None:
            lengths = list_lengths(exclude, len(unit), "exclude", "query")
            items = self._index["item"].rows(list(chain.from_iterable(exclude)))
        allowed = self._metadata.allowed(check_where(where or {}))
        # Beyond the number of items there is only padding.
        top_k = min(top_k, max(self.count("item"), 1))
        if self._approximate is not None and allowed is None and len(unit) and self.count("item"):
            rows, scores = self._nearly(unit, top_k, lengths, items)
        else:
            rows, scores = self._exactly(unit, top_k, lengths, items, allowed)
        names = iter(self._index["item"].ids(np.concatenate([np.empty(0, dtype=np.int64), *rows])))
        return [[next(names) for _ in found] for found in rows], [own.tolist() for own in scores]

    @_locked
    def use_index(self, kind: str | None, effort: int | None = None) -> None:
        """Searches approximately from now on, by FAISS; the index is not saved.

        It is built when it is first needed. What changes later is found at once, a search with a filter and one of withdrawn
        items is exact, and so is the search of a query for which the index has not found `top_k` items. The T5 pass takes 10
        to 100 times as long as an exact search among a million items in batches, so measure before you use this.

        Args:
            kind: `"ivf"` or `"hnsw"`; `None` searches exactly again.
            effort: lists looked into (`ivf`, by default 64) or candidates kept (`hnsw`, 128); more misses less.

        Raises:
            ImportError: FAISS is not installed (`pip install "tokenrec-hf[faiss]"`).
            ValueError: an unknown kind.
        """
        changed = _extra("faiss").ApproximateIndex(kind, effort, self.count("item")) if kind is not None else None
        if changed is not None and self._approximate is not None and self._approximate.kind == kind:
            self._approximate.effort = changed.effort
        else:
            self._approximate = changed

    def _exactly(self, unit, top_k, lengths, items, allowed) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows and cosines for unit queries `[B, d]`; `items` are the excluded rows, `lengths` of them for each query."""
        rows, scores = exact_search(
            unit,
            self._vectors["item"].chunks(),
            top_k,
            torch.from_numpy(np.repeat(np.arange(len(unit)), lengths)),
            torch.from_numpy(items),
            None if allowed is None else torch.from_numpy(allowed),
        )
        found = (rows >= 0).sum(dim=1).tolist()
        return (
            [row[:count] for row, count in zip(rows.numpy(), found)],
            [row[:count] for row, count in zip(scores.numpy(), found)],
        )

    def _nearly(self, unit, top_k, lengths, items) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As `_exactly`, by the approximate index, and exactly where that has found too few."""
        excluded = np.split(items, np.cumsum(lengths)[:-1])
        rows, scores = self._approximate.search(unit, self._vectors["item"], top_k, excluded)
        for at, found in enumerate(rows):
            if len(found) < top_k:
                [rows[at]], [scores[at]] = self._exactly(
                    unit[at : at + 1], top_k, lengths[at : at + 1], excluded[at], None
                )
        return rows, scores

    # ---- checks

    def _checked_seen(
        self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """User rows `[n]`, lengths of the lists `[n]` and the item rows of all lists one after the other."""
        lengths = list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        users = self._rows_of("user", user_ids, "the seen items")
        return users, lengths, self._rows_of("item", list(chain.from_iterable(item_ids_per_user)), "the seen items")

    def _rows_of(self, kind: str, ids: Sequence[str], what: str) -> np.ndarray:
        """The row of each id, or a ValueError that names the first that is not in the store."""
        rows = self.rows(kind, ids)
        if (rows < 0).any():
            name = ids[int(np.argmax(rows < 0))]
            raise ValueError(f"{kind} {name!r} of {what} is not in the store; add it first with upsert({kind!r}, ...).")
        return rows

    # ---- files

    def _record(self, method: str, arguments: list[Any], vectors: torch.Tensor | None = None) -> None:
        """Notes a change for the next save, unless the next save writes everything anyway."""
        if self._saved is not None:
            self._changes.append((method, arguments, vectors))
        else:
            self._changes.clear()

    def _manifest_to_extend(self, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest of a folder that holds this store as it was before the changes, if they are few enough to go beside it."""
        if self._saved is None or self._saved[0] != folder or facts["counts"].keys() != set(KINDS):
            return None
        manifest = self._saved[1]
        changed = sum(entry["bytes"] for entry in manifest["changes"])
        changed += sum(vectors.nbytes for _, _, vectors in self._changes if vectors is not None)
        few = len(manifest["changes"]) < MAX_CHANGES and MAX_CHANGED_SHARE * changed <= sum(
            entry["bytes"] for entry in manifest["files"].values()
        )
        same = all(manifest[name] == facts[name] for name in ("embedding_dim", "space_ids"))
        return manifest if few and same and is_current(folder, manifest) else None

    def _arrays(self, kind: str) -> dict[str, np.ndarray]:
        """Everything that the store knows of a kind, by the names in its file."""
        arrays = {f"ids.{name}": array for name, array in self._index[kind].arrays().items()}
        arrays["vectors"] = self._vectors[kind].all().numpy()
        if kind == "user":
            return arrays | {"seen.indptr": self._seen.indptr, "seen.items": self._seen.items}
        return arrays | {f"metadata.{name}": column for name, column in self._metadata.columns.items()}

    @classmethod
    def _load(cls, folder: Path) -> EmbeddingStore:
        manifest, arrays, changes = load_files(folder)
        try:
            store = cls(manifest["embedding_dim"], manifest["space_ids"])
            # Items first: the users' seen items point to their rows.
            for kind in sorted(manifest["counts"]):
                store._fill(kind, arrays[f"{kind}s"], manifest.get("metadata", {}))
            for method, arguments, vectors in chain.from_iterable(map(unpack_changes, changes)):
                getattr(store, method)(*arguments, *([] if vectors is None else [vectors]))
            for kind, count in manifest["counts"].items():
                if store.count(kind) != count:
                    raise ValueError(f"there are no {count} {kind}s with an id and a vector each.")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"it does not fit its files: {error}") from error
        if store.space_ids.keys() == manifest["counts"].keys():
            store._saved = folder.resolve(), manifest
        return store

    def _fill(self, kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Sequence[Any]]) -> None:
        """Takes over what `_arrays` gave, after checking that it fits together."""
        vectors = torch.from_numpy(arrays["vectors"])
        index = IdIndex.from_arrays({key[4:]: array for key, array in arrays.items() if key.startswith("ids.")})
        if vectors.dtype != torch.float32 or vectors.shape != (len(index), self.embedding_dim):
            raise ValueError(
                f"there are no {len(index)} float32 {kind} vectors of {self.embedding_dim} dimensions with an id each."
            )
        self._index[check_kind(kind)], self._vectors[kind] = index, VectorTable(vectors)
        if kind == "user":
            self._seen = SeenItems(arrays["seen.indptr"], arrays["seen.items"])
            if self._seen.num_users != len(index) or self._seen.items.max(initial=-1) >= self.count("item"):
                raise ValueError("the seen items do not fit the users and items.")
        else:
            columns = {key[9:]: array for key, array in arrays.items() if key.startswith("metadata.")}
            self._metadata = ItemMetadata(len(index), columns, metadata)
