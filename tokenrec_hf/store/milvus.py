"""The embedding store on Milvus: a Milvus Lite database in a folder, a server, or a cluster, by one and the same code.

Three collections hold items, users, and what users have seen. What users of the store name themselves (ids, metadata) is
percent-encoded before it goes into a filter expression, because pymilvus does not escape it: data never becomes syntax.
Reads see the writes of the same store at once (consistency level Session). Knows nothing about models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch

from ..models.codes import check_ids
from ..models.embedding_store import (
    KINDS,
    WITHDRAWN,
    EmbeddingStore,
    check_id_list,
    check_kind,
    check_metadata,
    check_queries,
    check_vectors,
    check_where,
    list_lengths,
    unit_rows,
)

# Bytes of seen items in one row; a field holds 65,535.
SEEN_BYTES = 60_000


def encoded(one: str) -> str:
    """An id or a value in letters, digits and `%._~-` only, so that it can stand between quotes."""
    return quote(one, safe="", errors="surrogatepass")


def one_of(field: str, ids: Sequence[str]) -> str:
    """The filter for rows whose field is one of `ids`."""
    return f"{field} in " + json.dumps([encoded(one) for one in ids])


def field_of(name: str) -> str:
    """The field that holds the values of a name of metadata."""
    return f"m_{name}"


def value_of(value: Any) -> str:
    """A value of metadata as text that is equal for equal values only; of `None`, text that no value has."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"s.{encoded(value)}"
    return f"b.{value}" if isinstance(value, bool) else f"n.{float(value)!r}"


def filter_of(where: Mapping[str, Sequence[Any]]) -> str:
    """The expression for items that are not withdrawn and have one of the values of every name."""
    parts = [f"{WITHDRAWN} == false"]
    parts += [
        f"{field_of(name)} in {json.dumps([value_of(value) for value in wanted])}" for name, wanted in where.items()
    ]
    return " and ".join(parts)


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The encoded seen items of each user, from rows in any order."""
    lists: dict[str, list[str]] = {}
    parts = {row["user"]: row["parts"] for row in rows if row["part"] == 0}
    for row in sorted(rows, key=lambda row: row["part"]):
        if row["part"] < parts.get(row["user"], 0):
            lists.setdefault(row["user"], []).extend(row["items"].split())
    return lists


def parted(user: str, items: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a user's seen items, all encoded; each tells how many there are, so that one that is left over is none."""
    parts: list[list[str]] = [[]]
    size = 0
    for item in items:
        size += len(item) + 1
        if size > SEEN_BYTES:
            parts.append([])
            size = len(item) + 1
        parts[-1].append(item)
    for part, of_part in enumerate(parts):
        yield {"id": f"{user}/{part}", "user": user, "part": part, "parts": len(parts), "items": " ".join(of_part)}


# What one request may ask for: rows found by a search or a query, ids in a filter, rows written.
MAX_FOUND, MAX_NAMED, MAX_WRITTEN = 16_384, 1_000, 5_000
# No user's row has this id, because a slash within an id is encoded.
ABOUT = "/about"
_LEVEL = {"consistency_level": "Session"}


class MilvusEmbeddingStore(EmbeddingStore):
    """[`EmbeddingStore`] on Milvus; `EmbeddingStore.open` makes one of a path that ends in `.db` or of an address.

    What differs: items of equal score come in any order; `ids` come in any order, but always the same as `vectors`; an
    `upsert` of more than 5,000 ids is several requests, of which a crash may keep the first ones (each is kept whole); and two
    clients that change the same id at the same time do not wait for each other.

    Args:
        uri: the path of a Milvus Lite database, which ends in `.db`, or `http://host:19530`, `https://...`.
        token: `user:password` or API key of the server.
        embedding_dim: d, to make a new store; an existing one knows its own.
        space_ids: of a new store, see [`EmbeddingStore`].
        prefix: of the names of the three collections.
        index: of the item vectors. `"FLAT"` is exact; with another one, such as `"HNSW"` or `"AUTOINDEX"`, a search may miss
            items.
        timeout: seconds that a request may take.

    Raises:
        ImportError: `pymilvus` is not installed.
        FileNotFoundError: there is no store there, and no `embedding_dim` to make one.
        ValueError: there is one of another `embedding_dim`.
        OSError: the server does not answer, or refuses.
    """

    def __init__(
        self,
        uri: str | os.PathLike,
        token: str | None = None,
        *,
        embedding_dim: int | None = None,
        space_ids: dict[str, str] | None = None,
        prefix: str = "tokenrec",
        index: str = "FLAT",
        timeout: float = 30.0,
    ):
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise ImportError('Milvus needs pymilvus: pip install "tokenrec-hf[milvus]".') from None
        self.uri, self._timeout = str(uri), timeout
        self._names = {what: f"{prefix}_{what}s" for what in KINDS} | {"seen": f"{prefix}_seen"}
        remote = self.uri.startswith(("http://", "https://"))
        if not remote and embedding_dim is None and not Path(self.uri).exists():
            raise FileNotFoundError(f"there is no Milvus Lite database {self.uri}; make a store with embedding_dim.")
        with self._errors():
            self._client = MilvusClient(uri=self.uri, token=token or "", timeout=timeout)
            exists = self._client.has_collection(self._names["seen"], timeout=timeout)
        if not exists:
            if embedding_dim is None:
                raise FileNotFoundError(
                    f"there is no embedding store {prefix!r} at {self.uri}; make one with embedding_dim, or move one there with "
                    "MilvusEmbeddingStore.from_store."
                )
            plain = EmbeddingStore(embedding_dim, space_ids)
            self._create(plain.embedding_dim, plain.space_ids, index)
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

    @classmethod
    def from_store(
        cls, store: EmbeddingStore, uri: str | os.PathLike, token: str | None = None, **settings
    ) -> MilvusEmbeddingStore:
        """Moves a store to Milvus, where there must be none of this prefix yet.

        Args:
            store: any embedding store.
            uri, token, settings: as those of the class.

        Raises:
            ValueError: there are users or items there already.
        """
        moved = cls(uri, token, embedding_dim=store.embedding_dim, **settings)
        if any(moved.count(kind) for kind in KINDS):
            raise ValueError(f"the embedding store at {uri} is not empty; give another prefix.")
        moved.copy_from(store)
        return moved

    def copy_from(self, store: EmbeddingStore) -> None:
        """Makes this store say what another one says, for example after `tokenrec add` or `tokenrec remove`.

        All vectors are written again; who reads in the meantime finds some of the old and some of the new.

        Args:
            store: any embedding store.

        Raises:
            ValueError: it is of another `embedding_dim`.
        """
        if store.embedding_dim != self.embedding_dim:
            raise ValueError(
                f"{store} has vectors of {store.embedding_dim} dimensions but the store at {self.uri} of {self.embedding_dim}; "
                "move it there under another prefix."
            )
        for kind in KINDS:
            ids = self.ids(kind)
            self.delete(kind, [one for one, there in zip(ids, store.contains(kind, ids)) if not there])
        _copy(store, self)
        self.space_ids = dict(store.space_ids)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}s={self.count(kind)}" for kind in KINDS)
        return f"MilvusEmbeddingStore({self.uri!r}, embedding_dim={self.embedding_dim}, {counts})"

    @property
    def space_ids(self) -> dict[str, str | None]:  # type: ignore[override]
        """The hashes of the MQ-Tokenizers; assign a whole dict to change them."""
        return dict(self._space_ids)

    @space_ids.setter
    def space_ids(self, space_ids: dict[str, str | None]) -> None:
        self._write_about(self.embedding_dim, dict(space_ids))
        self._space_ids = dict(space_ids)

    # ---- save, close

    def save_pretrained(self, folder: str | os.PathLike, include_users: bool = True) -> None:
        """Writes the store to a folder as an embedded one; see [`EmbeddingStore.save_pretrained`]."""
        self._embedded(KINDS if include_users else ("item",)).save_pretrained(folder, include_users)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    # ---- ids and vectors

    def upsert(self, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray) -> None:
        """As [`EmbeddingStore.upsert`]; each 5,000 ids are one request, which happens whole or not at all."""
        names, matrix = check_vectors(self.embedding_dim, kind, ids, vectors)
        for start in range(0, len(names), MAX_WRITTEN):
            part = names[start : start + MAX_WRITTEN]
            self._write_vectors(kind, part, matrix[start : start + MAX_WRITTEN], self._known(kind, part))

    def delete(self, kind: str, ids: Sequence[str]) -> None:
        """As [`EmbeddingStore.delete`]. Deleting items reads what all users have seen."""
        names = check_ids(dict.fromkeys(check_id_list(check_kind(kind), ids)), kind) if len(ids) else []
        names = [one for one, there in zip(names, self.contains(kind, names)) if there]
        if not names:
            return
        if kind == "user":
            self._delete("seen", [row["id"] for row in self._seen_rows(names)])
        else:
            gone = set(map(encoded, names))
            for user, items in self._all_seen():
                left = [one for one in items if one not in gone]
                if len(left) < len(items):
                    self._write_seen({user: left})
        self._delete(kind, list(map(encoded, names)))

    def get(self, kind: str, ids: Sequence[str]) -> torch.Tensor:
        """As [`EmbeddingStore.get`]."""
        found = {row["id"]: row["vector"] for row in self._rows(check_kind(kind), _unique(kind, ids), ["vector"])}
        missing = next((one for one in ids if encoded(one) not in found), None)
        if missing is not None:
            raise KeyError(f"{kind} {missing!r} is not in the store; add it with upsert.")
        matrix = np.array([found[encoded(one)] for one in ids], dtype=np.float32)
        return torch.from_numpy(matrix.reshape(-1, self.embedding_dim))

    def rows(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """Not to be had here: rows are places in memory.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a store on Milvus has no rows; use ids, or an embedded store written by save_pretrained."
        )

    def contains(self, kind: str, ids: Sequence[str]) -> np.ndarray:
        """As [`EmbeddingStore.contains`]."""
        found = {row["id"] for row in self._rows(check_kind(kind), _unique(kind, ids), ["id"])}
        return np.array([encoded(one) in found for one in ids], dtype=bool)

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
        self._write_seen({encoded(user): list(map(encoded, items)) for user, items in last.items()})

    def add_seen(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        """As [`EmbeddingStore.add_seen`]."""
        self._check_seen_ids(user_ids, item_ids_per_user)
        users = list(dict.fromkeys(user_ids))
        lists = {user: list(map(encoded, items)) for user, items in zip(users, self.seen(users))}
        for user, items in zip(user_ids, item_ids_per_user):
            lists[user] += map(encoded, items)
        self._write_seen({encoded(user): items for user, items in lists.items()})

    def seen(self, user_ids: Sequence[str]) -> list[list[str]]:
        """As [`EmbeddingStore.seen`]."""
        lists = joined(self._seen_rows(_unique("user", user_ids)))
        return [list(map(unquote, lists.get(encoded(user), ()))) for user in user_ids]

    # ---- what is known about items

    def set_metadata(self, item_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """As [`EmbeddingStore.set_metadata`]; all of an item fits in 60 kB."""
        checked = check_metadata(metadata)
        if len(checked) != len(item_ids):
            raise ValueError(f"there is metadata for {len(checked)} items but {len(item_ids)} ids; pass one for each.")
        names = _unique("item", item_ids)
        known = dict(zip(names, self.metadata(names)))
        for one, values in zip(item_ids, checked):
            merged = known[one] | values
            # A name that was taken away stays until it is written: Milvus Lite keeps what an upsert does not mention.
            known[one] = merged
        for start in range(0, len(names), MAX_WRITTEN):
            part = names[start : start + MAX_WRITTEN]
            self._write_vectors("item", part, self.get("item", part), {one: known[one] for one in part})

    def metadata(self, item_ids: Sequence[str]) -> list[dict[str, Any]]:
        """As [`EmbeddingStore.metadata`]."""
        known = self._known("item", _unique("item", item_ids))
        missing = next((one for one in item_ids if one not in known), None)
        if missing is not None:
            raise ValueError(
                f"item {missing!r} of the metadata is not in the store; add it first with upsert('item', ...)."
            )
        return [dict(known[one]) for one in item_ids]

    # ---- search

    def search(
        self,
        queries: torch.Tensor | np.ndarray,
        top_k: int,
        exclude: Sequence[Sequence[str]] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """As [`EmbeddingStore.search`]; more is fetched than asked for, and what is excluded is left out here.

        Where `top_k` and the longest list of excluded items exceed 16,384 together, which is all that Milvus gives at once, the
        items are fetched and searched here.
        """
        matrix = unit_rows(check_queries(self.embedding_dim, queries, top_k))
        excluded = [set(map(encoded, one)) for one in exclude] if exclude is not None else [set()] * len(matrix)
        if exclude is not None:
            list_lengths(exclude, len(matrix), "exclude", "query")
        expression = filter_of(check_where(where or {}))
        if not len(matrix) or not self.count("item"):
            return [[] for _ in matrix], [[] for _ in matrix]
        limit = top_k + max(map(len, excluded))
        if limit > MAX_FOUND and self.count("item") > MAX_FOUND:
            return self._embedded(("item",)).search(queries, top_k, exclude, where)
        ids, scores = [], []
        # A request may be 64 MB at most, and so its answer.
        step = max(1, min(256, 1_000_000 // min(limit, MAX_FOUND)))
        for start in range(0, len(matrix), step):
            found = self._ask(
                "search",
                "item",
                data=matrix[start : start + step].tolist(),
                limit=min(limit, MAX_FOUND),
                filter=expression,
                output_fields=["id"],
                search_params={"metric_type": "COSINE"},
                **_LEVEL,
            )
            for hits, without in zip(found, excluded[start:]):
                left = [(unquote(hit["id"]), float(hit["distance"])) for hit in hits if hit["id"] not in without][
                    :top_k
                ]
                ids.append([one for one, _ in left])
                scores.append([score for _, score in left])
        return ids, scores

    def use_index(self, kind: str | None, effort: int | None = None) -> None:
        """Not to be had here: the index of a store on Milvus is chosen when it is made.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the index of a store on Milvus is chosen when it is made, with index='HNSW'.")

    # ---- helpers

    def _create(self, embedding_dim: int, space_ids: Mapping[str, str | None], index: str) -> None:
        from pymilvus import DataType

        fields = {
            "item": [("metadata", DataType.VARCHAR), (WITHDRAWN, DataType.BOOL)],
            "user": [],
            "seen": [
                ("user", DataType.VARCHAR),
                ("part", DataType.INT64),
                ("parts", DataType.INT64),
                ("items", DataType.VARCHAR),
            ],
        }
        # What is known of the store comes into the last collection, so a store that was not finished is seen to be none.
        for what, name in self._names.items():
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=what == "item")
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=4_096)
            # Milvus has no collection without vectors.
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2 if what == "seen" else embedding_dim)
            for field, kind in fields[what]:
                schema.add_field(field, kind, **({"max_length": 65_535} if kind == DataType.VARCHAR else {}))
            indexes = self._client.prepare_index_params()
            chosen = index if what == "item" else "FLAT"
            # Milvus 2.3 knows no defaults for these.
            params = {"M": 16, "efConstruction": 200} if chosen == "HNSW" else {}
            indexes.add_index("vector", index_type=chosen, metric_type="COSINE", params=params)
            with self._errors():
                self._client.create_collection(
                    name, schema=schema, index_params=indexes, timeout=self._timeout, **_LEVEL
                )
        self._write_about(embedding_dim, dict(space_ids))

    def _write_about(self, embedding_dim: int, space_ids: dict[str, str | None]) -> None:
        facts = json.dumps({"embedding_dim": embedding_dim, "space_ids": space_ids})
        self._upsert(
            "seen", [{"id": ABOUT, "vector": [0.0, 1.0], "user": ABOUT, "part": 0, "parts": 1, "items": facts}]
        )

    def _known(self, kind: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The metadata of those of `ids` that are in the store."""
        if kind == "user":
            return {}
        rows = self._rows("item", ids, ["metadata"])
        return {unquote(row["id"]): json.loads(row["metadata"]) for row in rows}

    def _write_vectors(self, kind: str, ids: Sequence[str], vectors: torch.Tensor, known: Mapping[str, Any]) -> None:
        rows = [{"id": encoded(one), "vector": vector} for one, vector in zip(ids, vectors.tolist())]
        if kind == "item":
            for one, row in zip(ids, rows):
                metadata = known.get(one, {})
                row["metadata"] = json.dumps({name: value for name, value in metadata.items() if value is not None})
                row[WITHDRAWN] = metadata.get(WITHDRAWN) is True
                row |= {field_of(name): value_of(value) for name, value in metadata.items()}
        self._upsert(kind, rows)

    def _write_seen(self, lists: Mapping[str, Sequence[str]]) -> None:
        """Replaces the seen items of users, all encoded. A reader counts the parts, so one that is left over is none."""
        rows = [{**row, "vector": [0.0, 1.0]} for user, items in lists.items() for row in parted(user, items)]
        for start in range(0, len(rows), 500):
            self._upsert("seen", rows[start : start + 500])

    def _check_seen_ids(self, user_ids: Sequence[str], item_ids_per_user: Sequence[Sequence[str]]) -> None:
        list_lengths(item_ids_per_user, len(user_ids), "item_ids_per_user", "user")
        for kind, ids in (("user", user_ids), ("item", list(chain.from_iterable(item_ids_per_user)))):
            names = _unique(kind, ids)
            missing = next((one for one, there in zip(names, self.contains(kind, names)) if not there), None)
            if missing is not None:
                raise ValueError(
                    f"{kind} {missing!r} of the seen items is not in the store; add it first with upsert({kind!r}, ...)."
                )

    def _seen_rows(self, users: Sequence[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for start in range(0, len(users), MAX_NAMED):
            rows += self._query(
                "seen", one_of("user", users[start : start + MAX_NAMED]), ["user", "part", "parts", "items"]
            )
        return rows

    def _all_seen(self) -> Iterator[tuple[str, list[str]]]:
        rows = self._scan("seen", ["user", "part", "parts", "items"])
        return iter(joined([row for row in rows if row["user"] != ABOUT]).items())

    def _rows(self, what: str, ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of `ids` that there are, in any order."""
        rows: list[dict[str, Any]] = []
        for start in range(0, len(ids), MAX_NAMED):
            rows += self._query(what, one_of("id", ids[start : start + MAX_NAMED]), fields)
        return rows

    def _query(self, what: str, expression: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        return list(self._ask("query", what, filter=expression, output_fields=["id", *fields], **_LEVEL))

    def _scan(self, what: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        """All rows of a collection."""
        rows: list[dict[str, Any]] = []
        iterator = self._ask("query_iterator", what, batch_size=5_000, output_fields=["id", *fields], **_LEVEL)
        with self._errors():
            while batch := iterator.next():
                rows += batch
            iterator.close()
        return rows

    def _upsert(self, what: str, rows: list[dict[str, Any]]) -> None:
        self._ask("upsert", what, rows)

    def _delete(self, what: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), MAX_NAMED):
            self._ask("delete", what, filter="id in " + json.dumps(list(ids[start : start + MAX_NAMED])))
        # Session makes one's own upserts visible; on a Milvus 2.3 server, a delete is only after somebody has waited for it.
        self._ask("query", what, filter="", output_fields=["count(*)"], consistency_level="Strong")

    def _load_collections(self) -> None:
        with self._errors():
            for name in self._names.values():
                self._client.load_collection(name, timeout=self._timeout)

    def _ask(self, method: str, what: str, *arguments: Any, **options: Any) -> Any:
        """One request about one of the collections; a server that was started again is made to load them first."""
        from pymilvus.exceptions import MilvusException

        with self._errors():
            ask = getattr(self._client, method)
            try:
                return ask(self._names[what], *arguments, timeout=self._timeout, **options)
            except MilvusException as error:
                if "load" not in str(error):
                    raise
            self._load_collections()
            return ask(self._names[what], *arguments, timeout=self._timeout, **options)

    def _embedded(self, kinds: Sequence[str]) -> EmbeddingStore:
        """The same as an embedded store."""
        store = EmbeddingStore(self.embedding_dim)
        store.space_ids = self.space_ids
        _copy(self, store, kinds)
        return store

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            reason = " ".join(str(error.message or error).split()).rstrip(".")
            raise OSError(
                f"Milvus at {self.uri} does not answer or refuses ({reason[:300]}); check that it runs, the address and the token."
            ) from error


def _copy(source: EmbeddingStore, target: EmbeddingStore, kinds: Sequence[str] = KINDS) -> None:
    """Puts everything that a store knows of `kinds` into one that has no other ids."""
    for kind in ("item", "user"):
        if kind in kinds:
            target.upsert(kind, source.ids(kind), source.vectors(kind))
    items = source.ids("item")
    # What is no longer known becomes None, which takes it away.
    pairs = zip(items, source.metadata(items), target.metadata(items))
    known = [(one, dict.fromkeys(before) | now) for one, now, before in pairs if now != before]
    if known:
        target.set_metadata([one for one, _ in known], [metadata for _, metadata in known])
    if "user" in kinds:
        users = source.ids("user")
        seen = [
            (user, now) for user, now, before in zip(users, source.seen(users), target.seen(users)) if now != before
        ]
        target.set_seen([user for user, _ in seen], [items for _, items in seen])


def _unique(kind: str, ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(check_id_list(kind, ids)))
