"""What any store that keeps the order of ids must do, as a state machine against plain dictionaries and lists."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenrec_hf.models.embedding_store import EmbeddingStore

DIM = 3
HOSTILE = [
    "it's",
    'say"so"',
    "zz']-or-id-not-in-['zz",
    "back\\slash",
    "日本語",
    "é́",
    "%s{}$",
    "a/../b",
    "x" * 256,
    "u1 item_2",
    "-1",
    "𝕏",
]


def snapshot(store):
    """Everything a store tells about itself."""
    kinds = ("user", "item")
    return (
        {kind: store.ids(kind) for kind in kinds},
        {kind: store.vectors(kind).tolist() for kind in kinds},
        store.seen(store.ids("user")),
        store.metadata(store.ids("item")),
        store.space_ids,
        store.embedding_dim,
    )


class AgainstDictionaries(RuleBasedStateMachine):
    """Any sequence of operations gives what plain dictionaries and lists give."""

    ids = st.sampled_from(["a", "b", "c", "d", "e", *HOSTILE[:4]])
    kinds = st.sampled_from(["user", "item"])
    numbers = st.integers(-2, 2).map(float)
    vectors = st.lists(st.tuples(ids, st.tuples(numbers, numbers, numbers)), max_size=6)
    names = st.sampled_from(["genre", "withdrawn"])
    values = st.sampled_from([True, False, 1, "a", 'it\'s "so"'])

    def prepared(self, store):
        """A store as it is to be tested."""
        return store

    def rows(self, kind, ids):
        return self.store.rows(kind, ids)

    @initialize(folder=st.uuids(), users=vectors, items=vectors)
    def start(self, folder, users, items):
        self.folder = self.root / str(folder)
        self.store = self.prepared(EmbeddingStore(DIM))
        self.model = {"user": {}, "item": {}}
        self.seen = {}
        self.known = {}
        self.upsert("user", users)
        self.upsert("item", items)

    @rule(kind=kinds, rows=vectors)
    def upsert(self, kind, rows):
        self.store.upsert(kind, [one for one, _ in rows], np.array([row for _, row in rows]).reshape(-1, DIM))
        for one, row in rows:
            self.model[kind][one] = row

    @rule(kind=kinds, ids=st.lists(ids, max_size=4))
    def delete(self, kind, ids):
        self.store.delete(kind, ids)
        for one in ids:
            self.model[kind].pop(one, None)
            if kind == "item":
                self.known.pop(one, None)
        if kind == "user":
            self.seen = {user: items for user, items in self.seen.items() if user not in ids}
        self.seen = {user: [item for item in items if item in self.model["item"]] for user, items in self.seen.items()}

    @rule(data=st.data(), replace=st.booleans())
    def see(self, data, replace):
        if not self.model["user"] or not self.model["item"]:
            return
        users = data.draw(st.lists(st.sampled_from(sorted(self.model["user"])), max_size=4))
        items = st.lists(st.sampled_from(sorted(self.model["item"])), max_size=4)
        lists = [data.draw(items) for _ in users]
        (self.store.set_seen if replace else self.store.add_seen)(users, lists)
        for user, new in zip(users, lists):
            self.seen[user] = new if replace else self.seen.get(user, []) + new

    @rule(data=st.data())
    def know(self, data):
        if not self.model["item"]:
            return
        items = data.draw(st.lists(st.sampled_from(sorted(self.model["item"])), max_size=4))
        metadata = [data.draw(st.dictionaries(self.names, st.none() | self.values, max_size=2)) for _ in items]
        self.store.set_metadata(items, metadata)
        for item, new in zip(items, metadata):
            merged = self.known.get(item, {}) | new
            self.known[item] = {name: value for name, value in merged.items() if value is not None}

    @rule()
    def save(self):
        self.store.save_pretrained(self.folder)

    @rule()
    def save_and_open_again(self):
        self.store.save_pretrained(self.folder)
        opened = EmbeddingStore.open(self.folder)
        assert snapshot(opened) == snapshot(self.store)
        self.store = self.prepared(opened)

    @rule(
        query=st.tuples(numbers, numbers, numbers),
        top_k=st.integers(1, 8),
        exclude=st.lists(ids, max_size=4),
        where=st.dictionaries(names, values | st.lists(values, max_size=2), max_size=2),
    )
    def search(self, query, top_k, exclude, where):
        if self.refused(where):
            with pytest.raises(ValueError, match="no item has the metadata"):
                self.store.search(torch.tensor([query]), top_k, [exclude], where)
            return
        [found], [scores] = self.store.search(torch.tensor([query]), top_k, [exclude], where)
        expected = {}
        for item, vector in self.model["item"].items():
            lengths = np.linalg.norm(vector) * np.linalg.norm(query)
            expected[item] = np.dot(vector, query) / lengths if lengths else 0.0
        allowed = [item for item in expected if item not in exclude and self.matches(item, where)]
        assert len(found) == len(set(found)) == min(top_k, len(allowed))
        assert set(found) <= set(allowed)
        np.testing.assert_allclose(scores, [expected[item] for item in found], atol=1e-6)
        np.testing.assert_allclose(
            scores, sorted((expected[one] for one in allowed), reverse=True)[: len(found)], atol=1e-6
        )

    @rule(top_k=st.integers(1, 8), where=st.dictionaries(names, values | st.lists(values, max_size=2), max_size=1))
    def popular(self, top_k, where):
        if self.refused(where):
            with pytest.raises(ValueError, match="no item has the metadata"):
                self.store.popular(top_k, where)
            return
        counts = Counter(item for items in self.seen.values() for item in items)
        seen = [item for item in self.model["item"] if counts[item] and self.matches(item, where)]
        best = sorted(seen, key=lambda item: -counts[item])[:top_k]
        assert list(self.store.popular(top_k, where).items()) == [(item, counts[item]) for item in best]

    def refused(self, where):
        """Whether there are items, and none has one of the names."""
        there = {name for item in self.model["item"] for name in self.known.get(item, {})}
        return bool(self.model["item"]) and not set(where) <= there

    def matches(self, item, where):
        known = {name: json.dumps(value) for name, value in self.known.get(item, {}).items()}
        return known.get("withdrawn") != "true" and all(
            known.get(name) in [json.dumps(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
            for name, wanted in where.items()
        )

    @invariant()
    def everything_agrees(self):
        assert self.store.metadata(list(self.model["item"])) == [self.known.get(one, {}) for one in self.model["item"]]
        for kind, model in self.model.items():
            assert self.store.ids(kind) == list(model)
            assert self.store.count(kind) == len(model)
            assert self.store.vectors(kind).tolist() == [list(row) for row in model.values()]
            backwards = list(model)[::-1]
            found = self.store.get(kind, backwards)
            assert found.dtype == torch.float32 and found.tolist() == [list(model[one]) for one in backwards]
            assert self.rows(kind, [*backwards, "absent"]).tolist() == [*range(len(model))][::-1] + [-1]
        users = [*self.model["user"], "absent"]
        assert self.store.seen(users) == [self.seen.get(user, []) for user in users]
