"""One suite for all stores: embedded, Milvus Lite by file, Milvus Lite by a server on loopback, and a server of one's own.

Set TOKENREC_MILVUS_URI to run it against that server too, and TOKENREC_SEQUENCES=1000 / TOKENREC_KILLS=100 for long runs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("pymilvus", reason="needs the extra milvus")

from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.store import milvus as module
from tokenrec_hf.store.engines import open_store
from tokenrec_hf.store.milvus import MilvusStore

DIM = 3
KINDS = ("user", "item")
SEQUENCES = int(os.environ.get("TOKENREC_SEQUENCES", "10"))
KILLS = int(os.environ.get("TOKENREC_KILLS", "2"))
SERVER = os.environ.get("TOKENREC_MILVUS_URI")
HOSTILE = [
    "it's",
    'say"so"',
    'zz"]-or-id-not-in-["zz',
    "back\\slash",
    "日本語",
    "é́",
    "%s{}$",
    "a%22b",
    "a/../b",
    "/about",
    "x" * 256,
    "漢" * 256,
    "-1",
    "𝕏",
]


def start_server(folder):
    """A Milvus Lite server on loopback, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).parent / "milvus-lite"
    server = subprocess.Popen(
        [str(command), "server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise RuntimeError("the Milvus Lite server did not start")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, uri = start_server(tmp_path_factory.mktemp("milvus-server"))
    yield uri
    process.terminate()
    process.wait()


class Embedded:
    """Makes and reopens embedded stores."""

    def __init__(self, folder):
        self.folder = folder

    def make(self, dim=DIM, space_ids=None):
        store = EmbeddingStore(dim, space_ids)
        store.save_pretrained(self.folder)
        return store

    def reopened(self, store):
        store.save_pretrained(self.folder)
        return EmbeddingStore.open(self.folder)


class Milvus:
    """Makes and reopens stores on Milvus."""

    def __init__(self, uri):
        self.uri, self.prefix = str(uri), ""

    def make(self, dim=DIM, space_ids=None):
        self.prefix = "t" + uuid.uuid4().hex[:12]
        return MilvusStore(self.uri, embedding_dim=dim, space_ids=space_ids, prefix=self.prefix)

    def reopened(self, store):
        store.close()
        return MilvusStore(self.uri, prefix=self.prefix)


@pytest.fixture(params=["embedded", "lite", "server", *["own"] * bool(SERVER)])
def backend(request, tmp_path, tmp_path_factory):
    if request.param == "embedded":
        return Embedded(tmp_path)
    if request.param == "lite":
        # One database: each has a server of its own inside the process.
        return Milvus(tmp_path_factory.getbasetemp() / "lite.db")
    return Milvus(request.getfixturevalue("server") if request.param == "server" else SERVER)


def filled(store):
    """Four users and six items; the users have seen a few items."""
    generator = torch.Generator().manual_seed(0)
    store.upsert("user", [f"u{i}" for i in range(4)], torch.randn(4, DIM, generator=generator))
    store.upsert("item", [f"i{i}" for i in range(6)], torch.randn(6, DIM, generator=generator))
    store.set_seen(["u0", "u2"], [["i3", "i1"], ["i5", "i0", "i1"]])
    return store


def everything(store):
    """All that a store tells, whatever its order."""
    users, items = sorted(store.ids("user")), sorted(store.ids("item"))
    return (
        dict(zip(users, store.get("user", users).tolist())),
        dict(zip(items, store.get("item", items).tolist())),
        dict(zip(users, store.seen(users))),
        dict(zip(items, store.metadata(items))),
        store.space_ids,
        store.embedding_dim,
    )


def cosines(query, vectors):
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    return vectors @ query / np.where(lengths > 0, lengths, 1)


def test_vectors_are_kept_raw_and_returned_in_the_order_asked(backend):
    store = filled(backend.make())
    vectors = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.2, 0.3]])
    store.upsert("item", ["new", "i1", "new"], torch.cat([torch.ones(1, DIM), vectors.flip(0)]))
    assert torch.equal(store.get("item", ["i1", "new", "i1"]), vectors[[1, 0, 1]])
    assert store.count("item") == 7 and store.count("user") == 4
    assert store.contains("item", ["new", "old"]).tolist() == [True, False]
    assert dict(zip(store.ids("item"), store.vectors("item").tolist()))["new"] == vectors[0].tolist()
    with pytest.raises(KeyError, match="item 'missing' is not in the store"):
        store.get("item", ["i1", "missing"])


def test_hostile_ids_are_ids_like_any_other(backend):
    store = backend.make()
    vectors = torch.eye(len(HOSTILE))[:, :DIM] + torch.arange(1.0, len(HOSTILE) + 1)[:, None]
    for kind in KINDS:
        store.upsert(kind, HOSTILE, vectors)
    store.set_seen(HOSTILE, [[one, HOSTILE[0]] for one in HOSTILE])
    store = backend.reopened(store)
    assert torch.equal(store.get("item", HOSTILE[::-1]), vectors.flip(0))
    assert store.seen(HOSTILE) == [[one, HOSTILE[0]] for one in HOSTILE]
    found, _ = store.search(vectors, len(HOSTILE), exclude=[[one] for one in HOSTILE])
    assert all(sorted([*items, one]) == sorted(HOSTILE) for one, items in zip(HOSTILE, found))
    for at, one in enumerate(HOSTILE):
        store.delete("item", [one])
        assert sorted(store.ids("item")) == sorted(HOSTILE[at + 1 :])
    assert store.seen(HOSTILE) == [[]] * len(HOSTILE) and store.count("user") == len(HOSTILE)


def test_search_ranks_by_cosine_like_plain_numpy(backend):
    generator = np.random.default_rng(1)
    items = generator.normal(size=(500, 8)).astype(np.float32) * generator.lognormal(size=(500, 1)).astype(np.float32)
    queries = generator.normal(size=(9, 8)).astype(np.float32)
    store = backend.make(8)
    store.upsert("item", [f"i{i}" for i in range(500)], items)
    exclude = [[f"i{i}" for i in generator.choice(500, 40 * at)] for at in range(9)]
    ids, scores = store.search(queries, 20, exclude)
    for query, without, found, own in zip(queries, exclude, ids, scores):
        expected = cosines(query, items)
        order = [row for row in np.argsort(-expected) if f"i{row}" not in without][:20]
        assert found == [f"i{row}" for row in order]
        np.testing.assert_allclose(own, expected[order], atol=1e-5)


def test_of_equal_scores_any_may_come_and_zero_vectors_score_zero(backend):
    store = backend.make(2)
    store.upsert("item", [f"i{i}" for i in range(30)], np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]] * 10))
    store.upsert("item", ["zero"], np.zeros((1, 2)))
    ids, scores = store.search(np.array([[1.0, 0.0], [0.0, 0.0]]), 21)
    assert sorted(ids[0][:20]) == sorted(f"i{i}" for i in range(30) if i % 3 != 1)
    np.testing.assert_allclose(scores[0], [1.0] * 20 + [0.0], atol=1e-6)
    np.testing.assert_allclose(scores[1], [0.0] * 21, atol=1e-6)


def test_never_fewer_come_back_while_enough_remain(backend):
    store = filled(backend.make())
    items = store.ids("item")
    ids, _ = store.search(torch.randn(3, DIM), 4, [items[:2], ["stranger"] * 3, items])
    assert [len(one) for one in ids] == [4, 4, 0] and not set(ids[0]) & set(items[:2])
    assert [len(one) for one in store.search(torch.randn(1, DIM), 50)[0]] == [6]
    assert backend.make().search(torch.ones(2, DIM), 5, [["x"], []]) == ([[], []], [[], []])


def test_filters_take_any_value_as_a_value(backend):
    store = filled(backend.make())
    values = ['" or true or "', "a\\", "jazz", "", True, 1, 2.5]
    items = sorted(store.ids("item"))
    for value in values:
        store.set_metadata(
            items, [{"tag": value}, {"tag": "other"}, {}, {"tag": value, "n": 1}, {"n": 1}, {"tag": None}]
        )
        assert sorted(store.search(torch.ones(1, DIM), 9, where={"tag": value})[0][0]) == [items[0], items[3]]
        assert store.search(torch.ones(1, DIM), 9, where={"tag": [value, "other"], "n": 1})[0][0] == [items[3]]
    assert store.search(torch.ones(1, DIM), 9, where={"tag": True})[0][0] == []
    store.set_metadata(items[:1], [{"tag": None}])
    assert store.metadata(items[:1]) == [{}]
    assert store.search(torch.ones(1, DIM), 9, where={"tag": 2.5})[0][0] == [items[3]]
    assert store.search(torch.ones(1, DIM), 9, where={"tag<": 3, "n>=": 1})[0][0] == [items[3]]
    assert store.search(torch.ones(1, DIM), 9, where={"tag~": "OTH"})[0][0] == [items[1]]
    store.set_metadata([items[0]], [{"gat": None}])
    for unknown in ({"gat": "other"}, {"tag": "other", "gat": 1}, {"gat<": 3}):
        with pytest.raises(ValueError, match="no item has the metadata 'gat'; there are 'n', 'tag'."):
            store.search(torch.ones(1, DIM), 9, where=unknown)
    with pytest.raises(ValueError, match="metadata name 'a == 1 or b' is not made of letters"):
        store.search(torch.ones(1, DIM), 9, where={"a == 1 or b": 1})


def test_a_withdrawn_item_is_never_found_whatever_comes_later(backend):
    store = filled(backend.make())
    store.withdraw(["i1"])
    store.upsert("item", ["i1"], torch.ones(1, DIM))
    store = backend.reopened(store)
    assert sorted(store.search(torch.ones(1, DIM), 9)[0][0]) == ["i0", "i2", "i3", "i4", "i5"]
    assert store.seen(["u0"]) == [["i3", "i1"]]


def test_seen_items_come_and_go_with_users_and_items(backend):
    store = filled(backend.make())
    store.add_seen(["u2", "u1", "u2"], [["i3"], ["i4", "i2"], ["i3"]])
    assert store.seen(["u2", "nobody", "u1", "u3"]) == [["i5", "i0", "i1", "i3", "i3"], [], ["i4", "i2"], []]
    store.set_seen(["u1", "u0", "u1"], [["i0"], [], ["i3"]])
    assert store.seen(["u0", "u1"]) == [[], ["i3"]]
    store.delete("item", ["i3", "i5", "never"])
    assert store.seen(["u2", "u1"]) == [["i0", "i1"], []]
    store.delete("user", ["u2", "nobody"])
    store.upsert("user", ["u2"], torch.ones(1, DIM))
    assert store.seen(["u2"]) == [[]]
    with pytest.raises(ValueError, match="user 'nobody' of the seen items is not in the store"):
        store.set_seen(["nobody"], [["i0"]])
    with pytest.raises(ValueError, match="item 'nothing' of the seen items is not in the store"):
        store.add_seen(["u0"], [["i0", "nothing"]])


def test_a_long_history_is_kept_whole(backend):
    store = backend.make()
    items = [f"{'long-item-name' * 5}-{i}" for i in range(3_000)]
    store.upsert("item", items, torch.randn(3_000, DIM))
    store.upsert("user", ["u"], torch.ones(1, DIM))
    store.set_seen(["u"], [items])
    assert store.seen(["u"]) == [items]
    store.set_seen(["u"], [items[:2]])
    assert backend.reopened(store).seen(["u"]) == [items[:2]]


def test_reopening_gives_everything_back(backend):
    store = filled(backend.make(space_ids={"user": "hash-u", "item": "hash-i"}))
    store.set_metadata(["i1"], [{"genre": "it's", "n": 3, "stock": False}])
    before = everything(store)
    store = backend.reopened(store)
    assert everything(store) == before
    store.space_ids = {"user": "other", "item": None}
    store = backend.reopened(store)
    assert store.space_ids == {"user": "other", "item": None}
    with pytest.raises(ValueError, match="user vectors of the store belong to MQ-Tokenizer other"):
        store.check_space("user", "hash", "the tokenizer")


def test_what_is_no_id_is_no_id_of_the_store(backend):
    store = backend.make()
    store.upsert("item", ["a", "5"], np.eye(3)[:2])
    assert store.contains("item", ["a", "", None, 7]).tolist() == [True, False, False, False]
    with pytest.raises(KeyError, match="item .* is not in the store"):
        store.get("item", [None])
    store.delete("item", ["", "nowhere", "a"])
    assert store.ids("item") == ["5"]


def test_no_queries_have_no_answers_but_a_wrong_filter_is_told(backend):
    store = backend.make()
    store.upsert("item", ["a"], np.eye(3)[:1])
    assert store.search(np.empty((0, 3)), 2) == ([], [])
    with pytest.raises(ValueError, match="no item has the metadata 'gnre'"):
        store.search(np.empty((0, 3)), 2, where={"gnre": "jazz"})


def test_what_is_refused_changes_nothing(backend):
    store = filled(backend.make())
    before = everything(store)
    for call in (
        lambda: store.upsert("item", ["new", "a\nb"], torch.ones(2, DIM)),
        lambda: store.upsert("item", ["new"], torch.ones(1, DIM + 1)),
        lambda: store.upsert("item", ["new", "i0"], torch.tensor([[1.0] * DIM, [torch.nan] * DIM])),
        lambda: store.set_metadata(["i0", "new"], [{"a": 1}, {"a": 1}]),
        lambda: store.search(torch.ones(1, DIM), 0),
        lambda: store.search(torch.ones(2, DIM), 3, [[]]),
    ):
        with pytest.raises(ValueError):
            call()
    assert everything(store) == before


def test_a_store_is_saved_for_those_without_a_server(backend, tmp_path):
    store = filled(backend.make(space_ids={"user": "hash-u", "item": "hash-i"}))
    store.withdraw(["i2"])
    before = everything(store)
    store.save_pretrained(tmp_path / "saved")
    assert everything(EmbeddingStore.open(tmp_path / "saved")) == before
    store.save_pretrained(tmp_path / "shared", include_users=False)
    assert EmbeddingStore.open(tmp_path / "shared").count("user") == 0


class AgainstDictionaries(RuleBasedStateMachine):
    """Any sequence of operations gives what plain dictionaries and lists give, on every store."""

    ids = st.sampled_from(["a", "b", "c", *HOSTILE[:4]])
    kinds = st.sampled_from(KINDS)
    numbers = st.integers(-2, 2).map(float)
    vectors = st.lists(st.tuples(ids, st.tuples(numbers, numbers, numbers)), max_size=5)
    names = st.sampled_from(["genre", "withdrawn"])
    values = st.sampled_from([True, False, 1, "a", 'b" or "'])

    @initialize()
    def start(self):
        self.store = type(self).shared
        for kind in KINDS:
            self.store.delete(kind, self.store.ids(kind))
        self.model, self.seen, self.known = {"user": {}, "item": {}}, {}, {}

    @rule(kind=kinds, rows=vectors)
    def upsert(self, kind, rows):
        self.store.upsert(kind, [one for one, _ in rows], np.array([row for _, row in rows]).reshape(-1, DIM))
        self.model[kind].update(rows)

    @rule(kind=kinds, ids=st.lists(ids, max_size=3))
    def delete(self, kind, ids):
        self.store.delete(kind, ids)
        for one in ids:
            self.model[kind].pop(one, None)
            (self.seen if kind == "user" else self.known).pop(one, None)
        self.seen = {user: [item for item in items if item in self.model["item"]] for user, items in self.seen.items()}

    @precondition(lambda self: all(self.model.values()))
    @rule(data=st.data(), replace=st.booleans())
    def see(self, data, replace):
        users = data.draw(st.lists(st.sampled_from(sorted(self.model["user"])), max_size=3))
        lists = [data.draw(st.lists(st.sampled_from(sorted(self.model["item"])), max_size=3)) for _ in users]
        (self.store.set_seen if replace else self.store.add_seen)(users, lists)
        for user, new in zip(users, lists):
            self.seen[user] = new if replace else self.seen.get(user, []) + new

    @precondition(lambda self: self.model["item"])
    @rule(data=st.data())
    def know(self, data):
        items = data.draw(st.lists(st.sampled_from(sorted(self.model["item"])), max_size=3))
        metadata = [data.draw(st.dictionaries(self.names, st.none() | self.values, max_size=2)) for _ in items]
        self.store.set_metadata(items, metadata)
        for item, new in zip(items, metadata):
            merged = self.known.get(item, {}) | new
            self.known[item] = {name: value for name, value in merged.items() if value is not None}

    @rule(
        query=st.tuples(numbers, numbers, numbers),
        top_k=st.integers(1, 8),
        exclude=st.lists(ids, max_size=4),
        where=st.dictionaries(names, values | st.lists(values, min_size=1, max_size=2), max_size=2),
    )
    def search(self, query, top_k, exclude, where):
        there = {name for item in self.model["item"] for name in self.known.get(item, {})}
        if self.model["item"] and not set(where) <= there:
            with pytest.raises(ValueError, match="no item has the metadata"):
                self.store.search(torch.tensor([query]), top_k, [exclude], where)
            return
        [found], [scores] = self.store.search(torch.tensor([query]), top_k, [exclude], where)
        items = [item for item in self.model["item"] if item not in exclude and self.matches(item, where)]
        vectors = np.array([self.model["item"][item] for item in items]).reshape(-1, DIM)
        expected = dict(zip(items, cosines(np.array(query), vectors)))
        assert len(found) == len(set(found)) == min(top_k, len(items)) and set(found) <= set(items)
        np.testing.assert_allclose(scores, [expected[item] for item in found], atol=1e-5)
        np.testing.assert_allclose(scores, sorted(expected.values(), reverse=True)[: len(found)], atol=1e-5)

    def matches(self, item, where):
        known = {name: json.dumps(value) for name, value in self.known.get(item, {}).items()}
        return known.get("withdrawn") != "true" and all(
            known.get(name) in [json.dumps(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
            for name, wanted in where.items()
        )

    @invariant()
    def everything_agrees(self):
        if not hasattr(self, "model"):
            return
        for kind, model in self.model.items():
            ids = sorted(model)
            assert sorted(self.store.ids(kind)) == ids and self.store.count(kind) == len(ids)
            assert self.store.get(kind, ids).tolist() == [list(model[one]) for one in ids]
        users, items = [*self.model["user"], "absent"], list(self.model["item"])
        assert self.store.seen(users) == [self.seen.get(user, []) for user in users]
        assert self.store.metadata(items) == [self.known.get(item, {}) for item in items]


@pytest.mark.slow
def test_any_sequence_of_operations_agrees_with_dictionaries(backend):
    machine = type("Machine", (AgainstDictionaries,), {"shared": backend.make()})
    test = machine.TestCase()
    test.settings = settings(max_examples=SEQUENCES, stateful_step_count=10, deadline=None)
    test.runTest()


# ---- what only Milvus does


def test_open_store_takes_an_address_a_path_or_a_folder(server, tmp_path):
    database = tmp_path / "vectors.db"
    store = filled(MilvusStore(database, embedding_dim=DIM))
    before = everything(store)
    opened = open_store(database)
    assert isinstance(opened, MilvusStore) and everything(opened) == before
    assert repr(opened) == f"MilvusStore('{database}', embedding_dim=3, users=4, items=6)"
    filled(MilvusStore(server, embedding_dim=DIM))
    assert everything(open_store(server)) == before
    opened.save_pretrained(tmp_path / "out" / "store")
    assert everything(open_store(tmp_path / "out")) == before
    with pytest.raises(ValueError, match="has vectors of 3 dimensions, not 4; give another prefix"):
        MilvusStore(server, embedding_dim=4)


def test_a_store_moves_to_milvus_once(server, tmp_path):
    store = filled(EmbeddingStore(DIM, {"user": "hash-u", "item": "hash-i"}))
    store.withdraw(["i4"])
    moved = MilvusStore.from_store(store, server, prefix="moved")
    assert everything(moved) == everything(store)
    assert everything(MilvusStore(server, prefix="moved")) == everything(store)
    with pytest.raises(ValueError, match="is not empty; give another prefix"):
        MilvusStore.from_store(store, server, prefix="moved")


def test_a_store_on_milvus_follows_another(server):
    """New users and items, vectors, interactions and metadata, and deletions: everything is as in the other store."""
    store = filled(EmbeddingStore(DIM, {"user": "hash-u", "item": "hash-i"}))
    store.set_metadata(["i0", "i1"], [{"genre": "jazz", "stock": True}, {"genre": "folk"}])
    moved = MilvusStore.from_store(store, server, prefix="follows")
    store.upsert("item", ["new", "i2"], torch.ones(2, DIM))
    store.upsert("user", ["newbie"], torch.ones(1, DIM))
    store.set_seen(["newbie", "u0", "u2"], [["new"], ["i3", "i1", "new"], []])
    store.set_metadata(["i0", "new"], [{"genre": None}, {"genre": "jazz"}])
    store.withdraw(["i4"])
    store.delete("user", ["u1"])
    store.delete("item", ["i5"])
    moved.copy_from(store)
    assert everything(moved) == everything(store)
    assert moved.search(torch.ones(1, DIM), 9, where={"genre": "jazz"})[0] == [["new"]]
    before = everything(moved)
    with pytest.raises(ValueError, match="has vectors of 5 dimensions but the store at http.* of 3"):
        moved.copy_from(EmbeddingStore(5))
    assert everything(moved) == before


def test_an_index_that_misses_items_is_searched_like_any_other(tmp_path):
    store = MilvusStore(SERVER or tmp_path / "hnsw.db", embedding_dim=8, prefix="t" + uuid.uuid4().hex, index="HNSW")
    vectors = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    store.upsert("item", [f"i{row}" for row in range(500)], vectors)
    [ids], _ = store.search(vectors[:1], 200, [["i0"]])
    unit = torch.nn.functional.normalize(vectors)
    expected = (unit @ unit[0]).argsort(descending=True)[1:201].tolist()
    assert len(ids) == 200 and len({int(one[1:]) for one in ids} & set(expected)) > 180


def test_a_collection_that_is_not_loaded_is_loaded_and_other_errors_are_told(server):
    store = filled(MilvusStore(server, embedding_dim=DIM, prefix="released"))
    before = everything(store)
    store._client.release_collection("released_items")
    assert everything(store) == before
    store._client.drop_collection("released_items")
    with pytest.raises(OSError, match="does not answer or refuses"):
        store.count("item")


def test_two_clients_see_each_others_writes(server):
    one = filled(MilvusStore(server, embedding_dim=DIM, prefix="two"))
    two = MilvusStore(server, prefix="two")
    two.upsert("item", ["theirs"], torch.ones(1, DIM))
    assert one.get("item", ["theirs"]).tolist() == [[1.0] * DIM]


def test_more_than_milvus_gives_at_once_is_searched_here(server, monkeypatch):
    store = filled(MilvusStore(server, embedding_dim=DIM, prefix="large"))
    queries = torch.randn(2, DIM)
    exclude = [["i0", "i1", "i2"], ["i5"]]
    expected = store.search(queries, 2, exclude)
    monkeypatch.setattr(module, "MAX_FOUND", 4)
    found = store.search(queries, 2, exclude)
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


def test_many_ids_are_several_requests(server, monkeypatch):
    monkeypatch.setattr(module, "MAX_NAMED", 3)
    monkeypatch.setattr(module, "MAX_WRITTEN", 4)
    store = filled(MilvusStore(server, embedding_dim=DIM, prefix="many"))
    ids = [f"n{i}" for i in range(11)]
    vectors = torch.randn(11, DIM)
    store.upsert("item", ids, vectors)
    assert torch.equal(store.get("item", ids), vectors)
    store.delete("item", ids[1:])
    assert sorted(store.ids("item")) == ["i0", "i1", "i2", "i3", "i4", "i5", "n0"]


def test_a_database_that_is_missing_or_does_not_answer_is_named(tmp_path):
    with pytest.raises(OSError, match="Milvus at http://127.0.0.1:1 does not answer or refuses .*check that it runs"):
        open_store("http://127.0.0.1:1")
    with pytest.raises(FileNotFoundError, match="there is no Milvus Lite database .*nothing.db"):
        open_store(tmp_path / "nothing.db")
    assert not (tmp_path / "nothing.db").exists()


def test_a_server_without_a_store_is_told(server):
    with pytest.raises(FileNotFoundError, match="there is no embedding store 'nobodys' at http"):
        MilvusStore(server, prefix="nobodys")


def test_a_server_that_comes_back_is_used_again(tmp_path):
    process, uri = start_server(tmp_path)
    store = filled(MilvusStore(uri, embedding_dim=DIM, timeout=5))
    before = everything(store)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(OSError, match="does not answer or refuses"):
        store.count("item")
    port = uri.rpartition(":")[2]
    command = Path(sys.executable).parent / "milvus-lite"
    process = subprocess.Popen(
        [str(command), "server", "--data-dir", str(tmp_path), "--host", "127.0.0.1", "--port", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                assert everything(store) == before
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise AssertionError("the store did not come back")
    finally:
        process.kill()
        process.wait()


STREAM = """
import sys, torch
from tokenrec_hf.store.milvus import MilvusStore
torch.set_num_threads(1)
store = MilvusStore(sys.argv[1], embedding_dim=4)
for batch in range(10_000):
    ids = [f"{batch}-{i}" for i in range(20)]
    store.upsert("item", [*ids, "last"], torch.full((21, 4), float(batch)))
    print(batch, flush=True)
"""
READ = """
import sys, json
from tokenrec_hf.store.engines import open_store
store = open_store(sys.argv[1])
ids = store.ids("item")
print(json.dumps([ids, store.get("item", ids).tolist()]))
"""


@pytest.mark.slow
def test_every_acknowledged_batch_survives_a_kill_and_none_is_half_there(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(KILLS):
        database = tmp_path / "kill.db"
        shutil.rmtree(database, ignore_errors=True)
        child = subprocess.Popen([sys.executable, "-c", STREAM, str(database)], stdout=subprocess.PIPE, text=True)
        lines = iter(child.stdout.readline, "")
        assert next(line for line in lines if line.strip() == "0")
        time.sleep(random.uniform(0, 0.5))
        child.kill()
        acknowledged = [0, *(int(line) for line in lines if line.endswith("\n"))]
        child.wait()
        read = subprocess.run([sys.executable, "-c", READ, str(database)], capture_output=True, text=True, check=True)
        ids, vectors = json.loads(read.stdout.splitlines()[-1])
        values = dict(zip(ids, vectors))
        found = {int(one.split("-")[0]) for one in ids if one != "last"}
        assert found == set(range(len(found))) and len(found) in (len(acknowledged), len(acknowledged) + 1)
        assert len(ids) == len(set(ids)) == 20 * len(found) + 1
        assert all(values[f"{batch}-{i}"] == [float(batch)] * 4 for batch in found for i in range(20))
        assert values["last"] == [float(max(found))] * 4


def test_a_closed_database_can_be_opened_by_others_and_an_open_one_says_what_to_do(tmp_path):
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    uri = str(tmp_path / "lite.db")
    first = MilvusStore(uri, embedding_dim=DIM)
    second = MilvusStore(uri)
    first.close()
    with pytest.raises(OSError, match="cannot be used"):
        first.count("item")
    second.upsert("item", ["a"], torch.ones(1, DIM))
    # As another process would.
    with pytest.raises(DataDirLockedError):
        MilvusLite(uri)
    second.close()
    second.close()
    other = MilvusLite(uri)
    with pytest.raises(
        OSError, match=r"the Milvus Lite database .*lite\.db cannot be used .*another process .* close it there"
    ):
        MilvusStore(uri)
    other.close()
    again = MilvusStore(uri)
    assert again.ids("item") == ["a"]
    again.close()


def test_a_store_whose_making_was_cut_off_is_refused(tmp_path, monkeypatch):
    uri = str(tmp_path / "lite.db")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MilvusStore, "_write_about", Mock(side_effect=KeyboardInterrupt))
        MilvusStore(uri, embedding_dim=DIM)
    with pytest.raises(ValueError, match=r"the embedding store .* was not finished; drop its collections"):
        MilvusStore(uri)
