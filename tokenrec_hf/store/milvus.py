"""Store on Milvus: a Milvus Lite database in a folder, a server or a cluster, by the same code.

Three collections hold items, users, and the items that users have seen. Ids and metadata are percent-encoded before they enter
a filter expression, because pymilvus does not escape them: data never becomes syntax. Reads see the writes of the same store at
once (consistency level Session). The module knows nothing about models.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, compress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import torch

from ..models.embedding_store import (
    KINDS,
    WITHDRAWN,
    EmbeddingStore,
    Store,
    Vectors,
    check_kind,
    check_metadata,
    check_search,
    check_vectors,
    check_where,
    condition_parts,
    list_lengths,
)

# Limits of a request: rows found by a search or a query, ids in a filter, rows written.
MAX_FOUND, MAX_NAMED, MAX_WRITTEN = 16_384, 1_000, 5_000
SEEN_FIELDS = ("user", "part", "parts", "items")
# Bytes of seen items in a row; a field holds 65,535.
SEEN_BYTES = 60_000
# The row with the facts about the store. No user's row has this id, because a slash within an id is encoded.
ABOUT = "/about"
# Milvus' error code for a collection that the server has not loaded, `ErrCollectionNotLoaded`.
NOT_LOADED = 101
_LEVEL = {"consistency_level": "Session"}
_Thing = TypeVar("_Thing")
_open_stores: weakref.WeakSet[MilvusStore] = weakref.WeakSet()


class MilvusStore(Store):
    """[`Store`] on Milvus; its methods do what those of [`EmbeddingStore`] do.

    The differences: items of equal score come in any order; `ids` come in any order, which is that of `vectors`; an `upsert` of
    more than 5,000 ids is several requests, of which a crash may keep the first ones (each is kept whole); and two clients that
    change the same id at the same time do not wait for each other.

    Args:
        uri: the path of a Milvus Lite database, which ends in `.db`, or `http://host:19530`, `https://...`.
        token: `user:password` or API key of the server.
        embedding_dim: d, to make a new store; an existing store knows its own.
        space_ids: of a new store, see [`EmbeddingStore`].
        prefix: of the names of the three collections.
        index: of the item vectors. `"FLAT"` is exact; with another index, such as `"HNSW"` or `"AUTOINDEX"`, a search may miss
            items.
        timeout: seconds that a request may take.

    Raises:
        ImportError: `pymilvus` is not installed.
        FileNotFoundError: there is no store at `uri`, and no `embedding_dim` to make one.
        ValueError: the store at `uri` has another `embedding_dim`, or was not finished.
        OSError: the server does not answer, or refuses.
    """

    def __init__(
        self,
        uri: str | os.PathLike,
        token: str | None = None,
        *,
        embedding_dim: int | None = None,
        space_ids: Mapping[str, str | None] | None = None,
        prefix: str = "tokenrec",
        index: str = "FLAT",
        timeout: float = 30.0,
    ):
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise ImportError('Milvus needs pymilvus: pip install "tokenrec-hf[milvus]".') from None
        self.uri, self._timeout = str(uri), timeout
        self._names = {kind: f"{prefix}_{kind}s" for kind in KINDS} | {"seen": f"{prefix}_seen"}
        self._file = None if self.uri.startswith(("http://", "https://")) else os.path.abspath(self.uri)
        if self._file and embedding_dim is None and not Path(self.uri).exists():
            raise FileNotFoundError(f"there is no Milvus Lite database {self.uri}; make a store with embedding_dim.")
        with self._errors():
            self._client = MilvusClient(uri=self.uri, token=token or "", timeout=timeout)
        _open_stores.add(self)
        try:
            self._connect(prefix, embedding_dim, space_ids, index)
        except BaseException:
            self.close()
            raise

    def _connect(
        self, prefix: str, embedding_dim: int | None, space_ids: Mapping[str, str | None] | None, index: str
    ) -> None:
        """Finds the store or makes it; arguments of the class."""
        with self._errors():
            exists = self._client.has_collection(self._names["seen"], timeout=self._timeout)
        if not exists:
            if embedding_dim is None:
                raise FileNotFoundError(
                    f"there is no embedding store {prefix!r} at {self.uri}; make one with embedding_dim, or move one there "
                    "with MilvusStore.from_store."
                )
            # The embedded store checks the arguments.
            self._create(EmbeddingStore(embedding_dim, space_ids), index)
        self._load_collections()
        [about] = self._query("seen", f'id == "{ABOUT}"', ["items"]) or [{"items": "null"}]
        facts = json.loads(about["items"])
        if facts is None:
            raise ValueError(f"the embedding store {prefix!r} at {self.uri} was not finished; drop its collections.")
        self.embedding_dim, self._space_ids = facts["embedding_dim"], facts["space_ids"]
        if embedding_dim not in (None, self.embedding_dim):
            raise ValueError(
                f"the embedding store {prefix!r} at {self.uri} has vectors of {self.embedding_dim} dimensions, not "
                f"{embedding_dim}; give another prefix."
            )

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"MilvusStore({self.uri!r}, embedding_dim={self.embedding_dim}, {counts})"

    @property
    def space_ids(self) -> dict[str, str | None]:  # type: ignore[override]
        """The hashes of the MQ-Tokenizers; assign a whole dict to change them."""
        return dict(self._space_ids)

    @space_ids.setter
    def space_ids(self, space_ids: Mapping[str, str | None]) -> None:
        self._write_about(self.embedding_dim, space_ids)
        self._space_ids = dict(space_ids)

    # ---- copy, save, close

    @classmethod
    def from_store(cls, store: Store, uri: str | os.PathLike, token: str | None = None, **settings: Any) -> MilvusStore:
        """Copies a store to Milvus, where there must be none of this prefix yet.

        Args:
            store: a store of any engine.
            uri, token, settings: arguments of the class.

        Raises:
            ValueError: there are users or items there already.
        """
        copy = cls(uri, token, embedding_dim=store.embedding_dim, **settings)
        if any(copy.count(kind) for kind in KINDS):
            raise ValueError(f"the embedding store at {uri} is not empty; give another prefix.")
        copy.copy_from(store)
        return copy

    def copy_from(self, store: Store) -> None:
        """Makes the content of this store that of another, for example after `tokenrec add` or `tokenrec remove`.

        All vectors are written again. Readers find some of the old and some of the new content in the meantime.

        Args:
            store: a store of any engine.

        Raises:
            ValueError: `store` has another `embedding_dim`.
        """
        if store.embedding_dim != self.embedding_dim:
            raise ValueError(
                f"{store} has vectors of {store.embedding_dim} dimensions but the store at {self.uri} of {self.embedding_dim}; "
                "copy it under another prefix."
            )
        for kind in KINDS:
            ids = self.ids(kind)
            self.delete(kind, list(compress(ids, ~store.contains(kind, ids))))
        _copy(store, self)
        self.space_ids = dict(store.space_ids)

    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder that [`EmbeddingStore.open`] opens; see [`EmbeddingStore.save_pretrained`]."""
        self._embedded(KINDS if include_users else ("item",)).save_pretrained(folder, include_users)

    def close(self) -> None:
        """Closes the connection, and a Milvus Lite database once no store of this process uses it, for other processes to open."""
        self._client.close()
        _open_stores.discard(self)
        if self._file and all(store._file != self._file for store in _open_stores):
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._file)

    # ---- ids and vectors

    def upsert(self, kind: str, ids: Sequence[str], vectors: Vectors) -> None:
        """As [`EmbeddingStore.upsert`]; 5,000 ids are one request, which happens whole or not at all."""
        names, matrix = check_vectors(self.embedding_dim, kind, ids, vectors)
        for part, chunk in zip(_parts(names, MAX_WRITTEN), matrix.split(MAX_WRITTEN)):
            self._write_vectors(kind, part, chunk, self._known(kind, part))

    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """As [`EmbeddingStore.delete`]. Deleting items reads the seen items of all users."""
        names = _unique(kind, ids)
        names = list(compress(names, self.contains(kind, names)))
        if not names:
            return
        if kind == "user":
            self._delete("seen", [row["id"] for row in self._rows("seen", names, SEEN_FIELDS, "user")])
        else:
            gone = set(map(_encoded, names))
            for user, items in _joined(self._scan("seen", SEEN_FIELDS)).items():
                left = [item for item in items if item not in gone]
                if len(left) < len(items):
                    self._write_seen({user: left})
        self._delete(kind, list(map(_encoded, names)))

    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """As [`EmbeddingStore.get`]."""
        found = {row["id"]: row["vector"] for row in self._rows(kind, _unique(kind, ids), ["vector"])}
        for name in ids:
            if _encoded(name) not in found:
                raise KeyError(f"{kind} {name!r} is not in the store; add it first.")
        matrix = np.array([found[_encoded(name)] for name in ids], dtype=np.float32)
        return torch.from_numpy(matrix.reshape(-1, self.embedding_dim))

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """As [`EmbeddingStore.contains`]."""
        found = {row["id"] for row in self._rows(kind, _unique(kind, ids), ["id"])}
        return np.array([_encoded(name) in found for name in ids], dtype=bool)

    def ids(self, kind: str) -> list[str]:
        """All ids, in the order of `vectors`."""
        return [unquote(row["id"]) for row in self._scan(check_kind(kind), ["id"])]

    def count(self, kind: str) -> int:
        """The number of ids."""
        found = self._ask("query", check_kind(kind), filter="", output_fields=["count(*)"], **_LEVEL)
        return int(found[0]["count(*)"])

    def vectors(self, kind: str) -> torch.Tensor:
        """All raw vectors, float32 `[count, embedding_dim]`, in the order of `ids`, fetched from the database."""
        rows = [row["vector"] for row in self._scan(check_kind(kind), ["vector"])]
        return torch.tensor(np.array(rows, dtype=np.float32).reshape(-1, self.embedding_dim))

    # ---- seen items

    def set_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """As [`EmbeddingStore.set_seen`]."""
        self._check_seen_ids(user_ids, item_ids_per_user)
        last = dict(zip(user_ids, item_ids_per_user))
        self._write_seen({_encoded(user): list(map(_encoded, items)) for user, items in last.items()})

    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """As [`EmbeddingStore.add_seen`]."""
        self._check_seen_ids(user_ids, item_ids_per_user)
        users = list(dict.fromkeys(user_ids))
        lists = {user: list(map(_encoded, items)) for user, items in zip(users, self.seen(users))}
        for user, items in zip(user_ids, item_ids_per_user):
            lists[user] += map(_encoded, items)
        self._write_seen({_encoded(user): items for user, items in lists.items()})

    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """As [`EmbeddingStore.seen`]."""
        lists = _joined(self._rows("seen", _unique("user", user_ids), SEEN_FIELDS, "user"))
        return [list(map(unquote, lists.get(_encoded(user), ()))) for user in user_ids]

    def popular(self, top_k: int, where: Mapping[str, Any] | None = None) -> dict[str, int]:
        """As [`EmbeddingStore.popular`]; fetches the whole store."""
        return self._embedded(KINDS).popular(top_k, where)

    # ---- metadata of items

    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """As [`EmbeddingStore.set_metadata`]; all metadata of an item fits in 60 kB."""
        checked = check_metadata(metadata, len(item_ids))
        names = _unique("item", item_ids)
        known = dict(zip(names, self.metadata(names)))
        for item, values in zip(item_ids, checked):
            # A name that is removed stays, as None, until it is written: Milvus Lite keeps fields that an upsert leaves out.
            known[item] = known[item] | values
        for part in _parts(names, MAX_WRITTEN):
            self._write_vectors("item", part, self.get("item", part), known)

    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """As [`EmbeddingStore.metadata`]."""
        known = self._known("item", _unique("item", item_ids))
        _check_present("item", item_ids, known, "the metadata")
        return [dict(known[item]) for item in item_ids]

    # ---- search

    def search(
        self,
        queries: Vectors,
        top_k: int,
        exclude: Sequence[Sequence[str]] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """As [`EmbeddingStore.search`]; more items are fetched than asked for, and the excluded ones are left out here.

        Milvus returns at most 16,384 items. Where `top_k` and the longest list of excluded items exceed that together, or a filter
        has an operator, all items are fetched and searched here.
        """
        matrix, lists, _ = check_search(self.embedding_dim, queries, top_k, exclude)
        excluded = [set(map(_encoded, items)) for items in lists]
        conditions = check_where(where or {})
        expression = _filter_of(conditions)
        if not self.count("item"):
            return [[] for _ in matrix], [[] for _ in matrix]
        limit = top_k + max(map(len, excluded), default=0)
        has_operator = any(condition_parts(one)[1] for one in conditions)
        if has_operator or (limit > MAX_FOUND and self.count("item") > MAX_FOUND):
            return self._embedded(("item",)).search(queries, top_k, exclude, where)
        limit = min(limit, MAX_FOUND)
        ids, scores = [], []
        # A request and its answer may have 64 MB each.
        step = max(1, min(256, 1_000_000 // limit))
        for start in range(0, len(matrix), step):
            found = self._ask(
                "search",
                "item",
                data=matrix[start : start + step].tolist(),
                limit=limit,
                filter=expression,
                output_fields=["id"],
                search_params={"metric_type": "COSINE"},
                **_LEVEL,
            )
            for hits, without in zip(found, excluded[start:]):
                left = [hit for hit in hits if hit["id"] not in without][:top_k]
                ids.append([unquote(hit["id"]) for hit in left])
                scores.append([float(hit["distance"]) for hit in left])
        if not any(ids):
            for name in conditions:
                if not self._ask(
                    "query",
                    "item",
                    filter=f'exists m_{name} and m_{name} != ""',
                    output_fields=["id"],
                    limit=1,
                    **_LEVEL,
                ):
                    # Says which names there are.
                    self._embedded(("item",)).allowed(where)
        return ids, scores

    # ---- collections

    def _create(self, empty: EmbeddingStore, index: str) -> None:
        """Makes the collections of a store that is as `empty` says."""
        from pymilvus import DataType

        text, number = DataType.VARCHAR, DataType.INT64
        fields = {
            "item": [("metadata", text), (WITHDRAWN, DataType.BOOL)],
            "user": [],
            "seen": [("user", text), ("part", number), ("parts", number), ("items", text)],
        }
        # `seen` comes last and then gets the facts about the store, so that an unfinished store is recognised.
        for kind, name in self._names.items():
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=kind == "item")
            schema.add_field("id", text, is_primary=True, max_length=4_096)
            # Milvus has no collection without vectors.
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2 if kind == "seen" else empty.embedding_dim)
            for field, data_type in fields[kind]:
                schema.add_field(field, data_type, **({"max_length": 65_535} if data_type == text else {}))
            indexes = self._client.prepare_index_params()
            index_type = index if kind == "item" else "FLAT"
            # Milvus 2.3 has no defaults for these.
            params = {"M": 16, "efConstruction": 200} if index_type == "HNSW" else {}
            indexes.add_index("vector", index_type=index_type, metric_type="COSINE", params=params)
            with self._errors():
                self._client.create_collection(
                    name, schema=schema, index_params=indexes, timeout=self._timeout, **_LEVEL
                )
        self._write_about(empty.embedding_dim, empty.space_ids)

    def _write_about(self, embedding_dim: int, space_ids: Mapping[str, str | None]) -> None:
        facts = json.dumps({"embedding_dim": embedding_dim, "space_ids": dict(space_ids)})
        row = {"id": ABOUT, "vector": [0.0, 1.0], "user": ABOUT, "part": 0, "parts": 1, "items": facts}
        self._ask("upsert", "seen", [row])

    def _known(self, kind: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The metadata of the items among `ids` that are in the store."""
        if kind == "user":
            return {}
        rows = self._rows("item", ids, ["metadata"])
        return {unquote(row["id"]): json.loads(row["metadata"]) for row in rows}

    def _write_vectors(self, kind: str, ids: Sequence[str], vectors: torch.Tensor, known: Mapping[str, Any]) -> None:
        rows = [{"id": _encoded(name), "vector": vector} for name, vector in zip(ids, vectors.tolist())]
        if kind == "item":
            for name, row in zip(ids, rows):
                metadata = known.get(name, {})
                row["metadata"] = json.dumps({name: value for name, value in metadata.items() if value is not None})
                row[WITHDRAWN] = metadata.get(WITHDRAWN) is True
                row |= {f"m_{name}": _value_of(value) for name, value in metadata.items()}
        self._ask("upsert", kind, rows)

    def _write_seen(self, lists: Mapping[str, Sequence[str]]) -> None:
        """Replaces the seen items of users, all encoded. Readers count the parts, so stale parts are ignored."""
        rows = [{**row, "vector": [0.0, 1.0]} for user, items in lists.items() for row in _parted(user, items)]
        for part in _parts(rows, 500):
            self._ask("upsert", "seen", part)

    def _check_seen_ids(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        for kind, ids in (("user", user_ids), ("item", list(chain.from_iterable(item_ids_per_user)))):
            names = _unique(kind, ids)
            _check_present(kind, names, set(compress(names, self.contains(kind, names))), "the seen items")

    def _embedded(self, kinds: Sequence[str]) -> EmbeddingStore:
        """A copy as an embedded store."""
        store = EmbeddingStore(self.embedding_dim, self.space_ids)
        _copy(self, store, kinds)
        return store

    # ---- requests

    def _rows(self, kind: str, ids: Sequence[str], fields: Sequence[str], field: str = "id") -> list[dict[str, Any]]:
        """The rows whose `field` is among `ids`, in any order."""
        requests = (f"{field} in {json.dumps(names)}" for names in _parts(list(map(_encoded, ids)), MAX_NAMED))
        return [row for request in requests for row in self._query(kind, request, fields)]

    def _query(self, kind: str, expression: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        return list(self._ask("query", kind, filter=expression, output_fields=["id", *fields], **_LEVEL))

    def _scan(self, kind: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        """All rows of a collection, without the facts about the store."""
        rows: list[dict[str, Any]] = []
        iterator = self._ask("query_iterator", kind, batch_size=5_000, output_fields=["id", *fields], **_LEVEL)
        with self._errors():
            while batch := iterator.next():
                rows += batch
            iterator.close()
        return [row for row in rows if row["id"] != ABOUT]

    def _delete(self, kind: str, encoded_ids: list[str]) -> None:
        for names in _parts(encoded_ids, MAX_NAMED):
            self._ask("delete", kind, filter=f"id in {json.dumps(names)}")
        # Session shows a client its own upserts, but a Milvus 2.3 server its own deletes only after a strong read.
        self._ask("query", kind, filter="", output_fields=["count(*)"], consistency_level="Strong")

    def _load_collections(self) -> None:
        with self._errors():
            for name in self._names.values():
                self._client.load_collection(name, timeout=self._timeout)

    def _ask(self, method: str, kind: str, *arguments: Any, **options: Any) -> Any:
        """A request about a collection; a server that was started again is made to load the collections first."""
        from pymilvus.exceptions import MilvusException

        with self._errors():
            ask = getattr(self._client, method)
            try:
                return ask(self._names[kind], *arguments, timeout=self._timeout, **options)
            except MilvusException as error:
                if error.code != NOT_LOADED:
                    raise
            self._load_collections()
            return ask(self._names[kind], *arguments, timeout=self._timeout, **options)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            reason = " ".join(str(error.message or error).split()).rstrip(".")
            if self._file:
                raise OSError(
                    f"the Milvus Lite database {self.uri} cannot be used ({reason[:300]}); if another process has it open, close "
                    "it there."
                ) from error
            raise OSError(
                f"Milvus at {self.uri} does not answer or refuses ({reason[:300]}); check that it runs, the address and the "
                "token."
            ) from error


def _copy(source: Store, target: Store, kinds: Sequence[str] = KINDS) -> None:
    """Puts all content of `kinds` into a store that has no other ids."""
    for kind in sorted(kinds):
        target.upsert(kind, source.ids(kind), source.vectors(kind))
    items = source.ids("item")
    # A name that is no longer known becomes None, which removes it.
    pairs = zip(items, source.metadata(items), target.metadata(items))
    known = {item: dict.fromkeys(before) | now for item, now, before in pairs if now != before}
    if known:
        target.set_metadata(list(known), list(known.values()))
    if "user" in kinds:
        users = source.ids("user")
        lists = zip(users, source.seen(users), target.seen(users))
        seen = {user: now for user, now, before in lists if now != before}
        target.set_seen(list(seen), list(seen.values()))


def _check_present(kind: str, ids: Sequence[str], known: Container[str], place: str) -> None:
    missing = next((name for name in ids if name not in known), None)
    if missing is not None:
        raise ValueError(f"{kind} {missing!r} of {place} is not in the store; add it first with upsert({kind!r}, ...).")


def _unique(kind: str, ids: Sequence[str]) -> list[str]:
    check_kind(kind, ids)
    return list(dict.fromkeys(ids))


def _parts(things: list[_Thing], size: int) -> Iterator[list[_Thing]]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _encoded(name: str) -> str:
    """An id or a value in letters, digits and `%._~-` only, so that it can stand between quotes; "" for what is no text."""
    return quote(name, safe="", errors="surrogatepass") if isinstance(name, str) else ""


def _value_of(value: Any) -> str:
    """A value of metadata as text that is equal for equal values only; of `None`, text that no value has."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"s.{_encoded(value)}"
    return f"b.{value}" if isinstance(value, bool) else f"n.{float(value)!r}"


def _filter_of(where: Mapping[str, Sequence[Any]]) -> str:
    """The expression for items that are not withdrawn and have one of the values of every name."""
    conditions = [f"m_{name} in {json.dumps(list(map(_value_of, wanted)))}" for name, wanted in where.items()]
    return " and ".join([f"{WITHDRAWN} == false", *conditions])


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The encoded seen items of each user, from rows in any order."""
    lists: dict[str, list[str]] = {}
    parts = {row["user"]: row["parts"] for row in rows if row["part"] == 0}
    for row in sorted(rows, key=lambda row: row["part"]):
        if row["part"] < parts.get(row["user"], 0):
            lists.setdefault(row["user"], []).extend(row["items"].splitlines())
    return lists


def _parted(user: str, items: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a user's seen items, all encoded; each row tells how many there are."""
    parts: list[list[str]] = [[]]
    size = 0
    for item in items:
        size += len(item) + 1
        if size > SEEN_BYTES:
            parts.append([])
            size = len(item) + 1
        parts[-1].append(item)
    for part, members in enumerate(parts):
        yield {"id": f"{user}/{part}", "user": user, "part": part, "parts": len(parts), "items": "\n".join(members)}
