import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_checks import DIM, HOSTILE, AgainstDictionaries, snapshot

from tokenrec_hf.models.codes import COMMITTED, LOCK
from tokenrec_hf.models.embedding_store import (
    MANIFEST,
    EmbeddingStore,
    ItemMetadata,
    Ragged,
    check_metadata,
    check_where,
)

SEQUENCES = int(os.environ.get("TOKENREC_SEQUENCES", "60"))


def numbered(prefix, count):
    return [f"{prefix}{i}" for i in range(count)]


@pytest.fixture
def store():
    """Four users and six items; the users have seen a few items."""
    generator = torch.Generator().manual_seed(0)
    store = EmbeddingStore(DIM, {"user": "hash-u", "item": "hash-i"})
    store.upsert("user", numbered("u", 4), torch.randn(4, DIM, generator=generator))
    store.upsert("item", numbered("i", 6), torch.randn(6, DIM, generator=generator))
    store.set_seen(["u0", "u2"], [["i3", "i1"], ["i5", "i0", "i1"]])
    return store


def test_any_sequence_of_operations_agrees_with_dictionaries(tmp_path):
    machine = type("Machine", (AgainstDictionaries,), {"root": tmp_path})
    test = machine.TestCase()
    test.settings = settings(max_examples=SEQUENCES, stateful_step_count=15, deadline=None)
    test.runTest()


# ---- ids and vectors


def test_vectors_are_kept_raw_and_returned_in_the_order_asked(store):
    vectors = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.2, 0.3]])
    store.upsert("item", ["new", "i1"], vectors)
    store.search(vectors, 2)
    assert torch.equal(store.get("item", ["i1", "new", "i1"]), vectors[[1, 0, 1]])


def test_the_store_shares_no_memory_with_what_comes_in_or_goes_out(store):
    vectors = torch.ones(1, DIM)
    store.upsert("item", ["new"], vectors)
    vectors.zero_()
    store.get("item", ["new"]).zero_()
    assert store.get("item", ["new"]).tolist() == [[1.0] * DIM]


def test_of_an_id_given_twice_the_last_vector_counts(store):
    store.upsert("item", ["i1", "new", "new", "i1"], np.arange(12.0).reshape(4, DIM))
    assert store.get("item", ["new", "i1"]).tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    assert store.ids("item") == [*numbered("i", 6), "new"]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, np.float16, np.float64, np.dtype(">f4")]
)
def test_any_float_type_is_stored_as_float32(store, dtype):
    rows = [[1.0, -2.5, 0.25]]
    vectors = torch.tensor(rows, dtype=dtype) if isinstance(dtype, torch.dtype) else np.array(rows, dtype=dtype)
    if isinstance(vectors, np.ndarray):
        vectors.flags.writeable = False
    store.upsert("item", ["new"], vectors)
    assert store.vectors("item").dtype == torch.float32
    assert store.get("item", ["new"]).tolist() == rows


def test_vectors_that_require_gradients_are_detached(store):
    store.upsert("item", ["new"], torch.ones(1, DIM, requires_grad=True))
    assert not store.vectors("item").requires_grad


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["new"], torch.ones(1, 2), r"item vectors have shape \[1, 2\] but the store expects \[n, 3\]"),
        (["new"], torch.ones(DIM), r"item vectors have shape \[3\] but the store expects \[n, 3\]"),
        (["new", "i1"], torch.ones(1, DIM), "2 item ids were given with 1 vectors"),
        (
            ["new", "i1"],
            torch.tensor([[1.0] * DIM, [1.0, torch.nan, 1.0]]),
            "vector of item 'i1' holds NaN or an infinity",
        ),
        (
            ["i0", "new"],
            torch.tensor([[1.0] * DIM, [1.0, torch.inf, 1.0]]),
            "vector of item 'new' holds NaN or an infinity",
        ),
        (["new"], np.full((1, DIM), 1e300), "vector of item 'new' holds NaN or an infinity"),
        (["i0", " a"], torch.ones(2, DIM), "item ' a' begins or ends with a space"),
        ("abc", torch.ones(3, DIM), "single string 'abc'"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_refused_upsert_says_why_and_changes_nothing(store, ids, vectors, message):
    before = snapshot(store)
    with pytest.raises(ValueError, match=message):
        store.upsert("item", ids, vectors)
    assert snapshot(store) == before


@pytest.mark.parametrize("method", ["upsert", "delete", "get", "rows", "ids", "count", "vectors", "check_space"])
def test_an_unknown_kind_is_named(store, method):
    arguments = {"upsert": (["a"], torch.ones(1, DIM)), "delete": (["a"],), "get": (["a"],), "rows": (["a"],)}
    arguments["check_space"] = ("hash", "the tokenizer")
    with pytest.raises(ValueError, match="kind is 'items'; it must be 'user' or 'item'"):
        getattr(store, method)("items", *arguments.get(method, ()))
    with pytest.raises(ValueError, match="kind is 'items'"):
        EmbeddingStore(DIM, {"items": "hash"})


def test_getting_a_missing_id_names_the_first_one(store):
    with pytest.raises(KeyError, match="item 'missing' is not in the store"):
        store.get("item", ["i1", "missing", "also-missing"])


def test_hostile_ids_are_ids_like_any_other(tmp_path):
    store = EmbeddingStore(DIM)
    vectors = torch.eye(len(HOSTILE))[:, :DIM] + torch.arange(float(len(HOSTILE)))[:, None]
    for kind in ("user", "item"):
        store.upsert(kind, HOSTILE, vectors)
    store.set_seen(HOSTILE, [[one] for one in HOSTILE])
    store.save_pretrained(tmp_path)
    store = EmbeddingStore.open(tmp_path)
    assert torch.equal(store.get("item", HOSTILE[::-1]), vectors.flip(0))
    assert store.seen(HOSTILE) == [[one] for one in HOSTILE]
    found, _ = store.search(vectors, len(HOSTILE), exclude=[[one] for one in HOSTILE])
    for one, items in zip(HOSTILE, found):
        assert sorted([*items, one]) == sorted(HOSTILE)
    store.delete("item", HOSTILE[2:3])
    assert store.ids("item") == HOSTILE[:2] + HOSTILE[3:]


def test_deleting_closes_the_gaps_and_unknown_ids_are_ignored(store):
    kept = store.get("item", ["i0", "i2", "i5"])
    store.delete("item", ["i1", "i3", "never-there", "i4", "i1"])
    assert store.ids("item") == ["i0", "i2", "i5"]
    assert torch.equal(store.vectors("item"), kept)


# ---- seen items


def test_seen_items_are_in_the_order_recorded_and_unknown_users_have_seen_nothing(store):
    assert store.seen(["u2", "stranger", "u1", "u0"]) == [["i5", "i0", "i1"], [], [], ["i3", "i1"]]
    assert EmbeddingStore(DIM).seen(["stranger"]) == [[]]


def test_setting_replaces_and_adding_appends(store):
    store.set_seen(["u0", "u1"], [["i2"], []])
    store.add_seen(["u2", "u0"], [["i3"], ["i4", "i2"]])
    assert store.seen(numbered("u", 4)) == [["i2", "i4", "i2"], [], ["i5", "i0", "i1", "i3"], []]


def test_of_a_user_given_twice_the_last_list_counts_and_added_ones_follow_each_other(store):
    store.set_seen(["u1", "u0", "u1"], [["i0", "i1"], ["i2"], ["i3"]])
    assert store.seen(["u0", "u1"]) == [["i2"], ["i3"]]
    store.add_seen(["u1", "u0", "u1"], [["i5"], ["i4"], ["i0"]])
    assert store.seen(["u0", "u1"]) == [["i2", "i4"], ["i3", "i5", "i0"]]


def test_deleted_items_and_users_leave_the_seen_items(store):
    store.delete("item", ["i1", "i5"])
    assert store.seen(numbered("u", 4)) == [["i3"], [], ["i0"], []]
    store.delete("user", ["u0", "u1"])
    assert store.seen(["u0", "u2", "u3"]) == [[], ["i0"], []]
    store.upsert("user", ["u0"], torch.ones(1, DIM))
    assert store.seen(["u0"]) == [[]]


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        (["u0", "nobody"], [["i0"], ["i1"]], "user 'nobody' of the seen items is not in the store"),
        (["u0", "u1"], [["i0"], ["i1", "nothing"]], "item 'nothing' of the seen items is not in the store"),
        (["u0", "u1"], [["i0"]], "holds 1 lists of item ids; pass one list of item ids for each user, 2 in all"),
        (["u0"], ["i0"], "holds strings; pass one list of item ids for each user"),
    ],
)
@pytest.mark.parametrize("method", ["set_seen", "add_seen"])
def test_refused_seen_items_are_named_and_change_nothing(store, method, users, items, message):
    before = snapshot(store)
    with pytest.raises(ValueError, match=message):
        getattr(store, method)(users, items)
    assert snapshot(store) == before


# ---- search


def test_search_ranks_by_cosine_like_plain_numpy():
    generator = np.random.default_rng(1)
    items, queries = generator.normal(size=(500, 8)), generator.normal(size=(7, 8))
    items *= generator.lognormal(sigma=3, size=(500, 1))
    store = EmbeddingStore(8)
    store.upsert("item", numbered("i", 500), items)
    ids, scores = store.search(queries, 20)
    for query, found, own in zip(queries, ids, scores):
        cosines = np.array([query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in items])
        best = np.argsort(-cosines)[:20]
        assert found == [f"i{row}" for row in best]
        np.testing.assert_allclose(own, cosines[best], atol=1e-6)


def test_excluded_items_are_never_returned_and_unknown_ones_ignored(store):
    everything = set(store.ids("item"))
    exclude = [["i1", "i2", "i1"], [], ["stranger"], sorted(everything)]
    ids, scores = store.search(torch.randn(4, DIM), 50, exclude)
    assert [set(one) for one in ids] == [everything - {"i1", "i2"}, everything, everything, set()]
    assert [len(one) for one in scores] == [4, 6, 6, 0]


def test_seen_items_are_never_recommended(store):
    users = ["u0", "u2"]
    ids, _ = store.search(store.get("user", users), 6, exclude=store.seen(users))
    assert set(ids[0]) == set(numbered("i", 6)) - {"i3", "i1"}
    assert set(ids[1]) == set(numbered("i", 6)) - {"i5", "i0", "i1"}


def test_equal_scores_come_in_row_order():
    store = EmbeddingStore(2)
    store.upsert("item", numbered("i", 300), torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]).repeat(100, 1))
    ids, scores = store.search(torch.tensor([[1.0, 0.0]]), 201)
    assert ids == [[f"i{row}" for row in range(300) if row % 3 != 1] + ["i1"]]
    assert scores == [[1.0] * 200 + [0.0]]


def test_zero_vectors_score_zero():
    store = EmbeddingStore(2)
    store.upsert("item", ["zero", "same", "opposite"], torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    assert store.search(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 3) == (
        [["same", "zero", "opposite"], ["zero", "same", "opposite"]],
        [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]],
    )


def test_search_sees_every_change_at_once(store):
    query = torch.tensor([[1.0, 2.0, 3.0]])
    store.upsert("item", ["twin"], query)
    assert store.search(query, 1)[0] == [["twin"]]
    store.upsert("item", ["twin"], -query)
    assert store.search(query, 7)[0][0][-1] == "twin"
    before = dict(zip(*(one[0] for one in store.search(query, 7))))
    store.delete("item", ["i2", "i4"])
    after = dict(zip(*(one[0] for one in store.search(query, 7))))
    assert after == pytest.approx({item: score for item, score in before.items() if item not in ("i2", "i4")})


def test_an_empty_store_and_an_empty_batch_find_nothing(store):
    assert EmbeddingStore(DIM).search(torch.ones(2, DIM), 5, [["x"], []]) == ([[], []], [[], []])
    assert store.search(torch.ones(0, DIM), 5, []) == ([], [])


@pytest.mark.parametrize(
    ("queries", "top_k", "exclude", "message"),
    [
        (torch.ones(1, 2), 5, None, r"queries have shape \[1, 2\] but the store expects \[B, 3\]"),
        (torch.ones(DIM), 5, None, r"queries have shape \[3\] but the store expects \[B, 3\]"),
        (torch.tensor([[1.0] * DIM, [torch.nan] * DIM]), 5, None, "query 1 holds NaN or an infinity"),
        (torch.ones(1, DIM), 0, None, "top_k is 0"),
        (
            torch.ones(2, DIM),
            5,
            [["i0"]],
            "exclude holds 1 lists of item ids; pass one list of item ids for each query, 2",
        ),
        (torch.ones(1, DIM), 5, ["i0"], "exclude holds strings"),
    ],
)
def test_a_refused_search_says_why(store, queries, top_k, exclude, message):
    with pytest.raises(ValueError, match=message):
        store.search(queries, top_k, exclude)


# ---- what is known about items


def test_a_filter_takes_one_or_several_values_of_every_name(store):
    items = numbered("i", 5)
    store.set_metadata(
        items,
        [
            {"genre": "jazz", "stock": True},
            {"genre": "folk", "stock": True},
            {"genre": "jazz", "stock": False},
            {"genre": "noise", "stock": True},
            {"stock": True},
        ],
    )

    def found(**where):
        return sorted(store.search(torch.ones(1, DIM), 10, where=where)[0][0])

    assert found(genre="jazz") == ["i0", "i2"]
    assert found(genre=["jazz", "folk"], stock=True) == ["i0", "i1"]
    assert found(stock=1) == [] and found(genre="polka") == []
    with pytest.raises(ValueError, match="no item has the metadata 'other'; there are 'genre', 'stock'."):
        found(genre="jazz", other="x")
    assert found() == numbered("i", 6)
    store.set_metadata(["i0", "i4"], [{"genre": None}, {"genre": "jazz"}])
    assert found(genre="jazz") == ["i2", "i4"]
    assert store.metadata(["i4", "i0"]) == [{"stock": True, "genre": "jazz"}, {"stock": True}]


def test_filters_compare_numbers_and_look_for_parts_of_texts(store):
    items = store.ids("item")[:5]
    metadata = [
        {"price": 10, "title": "Blue Train"},
        {"price": 29.5, "title": "Kind of BLUE"},
        {"price": 30, "title": "Giant Steps"},
        {"price": "30", "title": 30},
        {"price": True},
    ]
    store.set_metadata(items, metadata)

    def found(**where):
        where = {
            name.replace("_lt", "<").replace("_gt", ">").replace("_e", "=").replace("_has", "~"): value
            for name, value in where.items()
        }
        return sorted(store.search(torch.ones(1, DIM), 10, where=where)[0][0])

    assert found(price_lt=30) == items[:2] and found(price_lt_e=30) == items[:3]
    assert found(price_gt=10, price_lt=30) == [items[1]] and found(price_gt_e=29.5) == items[1:3]
    assert found(title_has="blue") == items[:2] and found(title_has=["steps", "train"]) == [items[0], items[2]]
    assert found(title_has="blue", price_lt=20) == [items[0]] and found(title_has="3") == [items[3]]
    assert found(price_lt=None) == found(price_lt="cheap", price_gt="z") == []
    assert found(price_lt="4") == [items[3]]
    for wrong in ("price=<", "<", "price <", "price~~"):
        with pytest.raises(ValueError, match="is not made of letters, digits and underscores"):
            store.search(torch.ones(1, DIM), 1, where={wrong: 1})


def test_a_withdrawn_item_is_never_found_whatever_comes_later(store, tmp_path):
    store.withdraw(["i1"])
    store.upsert("item", ["i1"], torch.ones(1, DIM))
    store.add_seen(["u1"], [["i1"]])
    store.save_pretrained(tmp_path)
    for one in (store, EmbeddingStore.open(tmp_path)):
        ids, _ = one.search(torch.ones(1, DIM), 10)
        assert sorted(ids[0]) == ["i0", "i2", "i3", "i4", "i5"]
        assert one.search(torch.ones(1, DIM), 10, where={"withdrawn": True})[0] == [[]]
        assert one.seen(["u1"]) == [["i1"]] and one.get("item", ["i1"]).tolist() == [[1.0] * DIM]


@pytest.mark.parametrize(
    ("items", "metadata", "message"),
    [
        (["i0", "nothing"], [{"a": 1}, {"a": 2}], "item 'nothing' of the metadata is not in the store"),
        (["i0"], [], "metadata for 0 items but 1 ids"),
        (["i0"], [{"a b": 1}], "metadata name 'a b' is not made of letters"),
        (["i0"], [{"a": [1]}], r"metadata 'a' is '\[1\]' \(list\); give a string"),
        (["i0"], [{"a": float("nan")}], "metadata 'a' is 'nan'"),
    ],
)
def test_refused_metadata_is_named_and_changes_nothing(store, items, metadata, message):
    before = snapshot(store)
    with pytest.raises(ValueError, match=message):
        store.set_metadata(items, metadata)
    assert snapshot(store) == before


# ---- open, save, share


def test_a_saved_store_gives_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(3)
    store = EmbeddingStore(17)
    store.upsert("item", numbered("i", 3_001), torch.randn(3_001, 17, generator=generator))
    store.delete("item", numbered("i", 1))
    store.upsert("item", ["i7"], torch.randn(1, 17, generator=generator))
    store.save_pretrained(tmp_path)
    queries = torch.randn(33, 17, generator=generator)
    assert EmbeddingStore.open(tmp_path).search(queries, 100) == store.search(queries, 100)


def test_of_two_that_opened_a_store_the_second_to_save_is_refused_and_can_repeat_its_change(store, tmp_path):
    store.save_pretrained(tmp_path)
    first, second = EmbeddingStore.open(tmp_path), EmbeddingStore.open(tmp_path)
    first.upsert("item", ["theirs"], torch.ones(1, DIM))
    first.save_pretrained(tmp_path)
    for late in (second, store):
        late.upsert("item", ["mine"], torch.ones(1, DIM))
        with pytest.raises(
            ValueError, match="the store in .* was changed by another process or object since it was opened"
        ):
            late.save_pretrained(tmp_path)
        assert snapshot(EmbeddingStore.open(tmp_path)) == snapshot(first)
    again = EmbeddingStore.open(tmp_path)
    again.upsert("item", ["mine"], torch.ones(1, DIM))
    again.save_pretrained(tmp_path)
    assert EmbeddingStore.open(tmp_path).contains("item", ["theirs", "mine"]).all()


def test_a_store_may_be_saved_again_and_elsewhere_and_over_a_store_that_it_never_opened(store, tmp_path):
    EmbeddingStore(DIM).save_pretrained(tmp_path / "there")
    for _ in range(2):
        for folder in (tmp_path / "here", tmp_path / "there"):
            store.upsert("item", ["more"], torch.rand(1, DIM))
            store.save_pretrained(folder)
            assert snapshot(EmbeddingStore.open(folder)) == snapshot(store)


def test_a_store_is_not_saved_beneath_a_change_of_its_repository(store, tmp_path):
    """Readers would not see it, and the change would replace it."""
    store.save_pretrained(tmp_path / "store")
    store.save_pretrained(tmp_path / COMMITTED / "store")
    opened = EmbeddingStore.open(tmp_path)
    with pytest.raises(ValueError, match="a change of its repository was interrupted"):
        opened.save_pretrained(tmp_path / "store")


def test_nothing_of_a_deleted_user_is_left_in_the_files(tmp_path):
    store = EmbeddingStore(64)
    store.upsert("item", numbered("i", 50), torch.randn(50, 64))
    store.upsert("user", numbered("u", 50), torch.randn(50, 64))
    store.save_pretrained(tmp_path)
    store.upsert("user", ["somebody"], torch.full((1, 64), 12345.678))
    store.add_seen(["somebody"], [["i1"]])
    store.save_pretrained(tmp_path)
    trace = np.float32(12345.678).tobytes()
    assert any(b"somebody" in path.read_bytes() and trace in path.read_bytes() for path in tmp_path.iterdir())
    store.delete("user", ["somebody"])
    store.save_pretrained(tmp_path)
    assert not any(b"somebody" in path.read_bytes() or trace in path.read_bytes() for path in tmp_path.iterdir())


def test_a_store_that_was_opened_does_not_change_its_files(store, tmp_path):
    store.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = EmbeddingStore.open(tmp_path)
    opened.upsert("item", ["i0"], torch.ones(1, DIM))
    opened.delete("item", ["i1"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_given_to_a_store_stays_the_callers(store, empty):
    store = EmbeddingStore(DIM) if empty else store
    given = torch.ones(2, DIM)
    store.upsert("item", ["a", "b"], given)
    given.zero_()
    assert store.get("item", ["a", "b"]).tolist() == [[1.0] * DIM] * 2
    store.upsert("item", ["a"], torch.zeros(1, DIM))
    assert given.tolist() == [[0.0] * DIM] * 2


def test_threads_that_read_see_every_write_whole(store):
    """A writer moves all vectors from one axis to another; whoever reads finds them on one of the two."""
    ids = numbered("x", 2_000)
    axes = torch.eye(DIM)
    store = EmbeddingStore(DIM)
    store.upsert("item", ids, axes[:1].repeat(len(ids), 1))
    done, wrong = threading.Event(), []

    def read():
        while not done.is_set():
            vectors = store.get("item", ids)
            scores = store.search(axes[:1], len(ids))[1][0]
            if len(vectors.unique(dim=0)) != 1 or len(set(scores)) != 1:
                wrong.append(scores)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        store.upsert("item", ids, axes[turn % 2][None].repeat(len(ids), 1))
        store.delete("item", [f"y{turn - 1}"])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


class Slowly(list):
    """A list that is read once it may be."""

    def __init__(self, values):
        super().__init__(values)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __iter__(self):
        self.begun.set()
        self.may_end.wait()
        return super().__iter__()


def is_kept_waiting(call, given, other):
    """Whether a call does not end while another one reads `given`."""
    first, second = threading.Thread(target=other), threading.Thread(target=call)
    first.start()
    given.begun.wait()
    second.start()
    second.join(0.05)
    waits = second.is_alive()
    given.may_end.set()
    first.join()
    second.join()
    return waits


@pytest.mark.parametrize(
    "call",
    [
        lambda store, _: store.upsert("item", ["i0"], torch.ones(1, DIM)),
        lambda store, _: store.delete("item", ["i0"]),
        lambda store, _: store.get("item", ["i0"]),
        lambda store, _: store.vectors("item"),
        lambda store, _: store.rows("item", ["i0"]),
        lambda store, _: store.ids("item"),
        lambda store, _: store.count("item"),
        lambda store, _: store.set_seen(["u0"], [["i0"]]),
        lambda store, _: store.add_seen(["u0"], [["i0"]]),
        lambda store, _: store.seen(["u0"]),
        lambda store, _: store.popular(1),
        lambda store, _: store.metadata(["i0"]),
        lambda store, _: store.allowed({"genre": "jazz"}),
        lambda store, _: store.search(torch.ones(1, DIM), 1),
        lambda store, folder: store.save_pretrained(folder),
    ],
)
def test_a_call_waits_for_that_of_another_thread_to_end(store, call, tmp_path):
    metadata = Slowly([{"genre": "jazz"}])
    assert is_kept_waiting(lambda: call(store, tmp_path), metadata, lambda: store.set_metadata(["i0"], metadata))


@pytest.mark.parametrize("name", ["set_seen", "add_seen"])
def test_other_calls_wait_for_changes_of_seen_items(store, name):
    lists = Slowly([["i0"]])
    assert is_kept_waiting(lambda: store.count("item"), lists, lambda: getattr(store, name)(["u0"], lists))


STREAM = """
import sys, torch
from tokenrec_hf.models.embedding_store import EmbeddingStore
torch.set_num_threads(1)
store = EmbeddingStore.open(sys.argv[1])
for batch in range(10_000):
    store.upsert("item", [f"{batch}-{i}" for i in range(20)], torch.full((20, 4), float(batch)))
    store.upsert("item", ["last"], torch.full((1, 4), float(batch)))
    store.save_pretrained(sys.argv[1])
    print(batch, flush=True)
"""


@pytest.mark.slow
def test_every_acknowledged_batch_survives_a_kill_and_none_is_half_there(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(int(os.environ.get("TOKENREC_KILLS", "4"))):
        folder = tmp_path / "store"
        shutil.rmtree(folder, ignore_errors=True)
        EmbeddingStore(4).save_pretrained(folder)
        child = subprocess.Popen([sys.executable, "-c", STREAM, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline().strip() == "0"
        # The moment counts from the first batch, so that the kill falls into the stream and not into the start.
        time.sleep(random.uniform(0, 0.4))
        child.kill()
        acknowledged = [0, *(int(line) for line in child.stdout if line.endswith("\n"))]
        child.wait()
        store = EmbeddingStore.open(folder)
        found = {int(one.split("-")[0]) for one in store.ids("item") if one != "last"}
        assert found == set(range(len(found))) and len(found) in (len(acknowledged), len(acknowledged) + 1)
        for batch in found:
            assert (store.get("item", [f"{batch}-{i}" for i in range(20)]) == batch).all()
        assert store.count("item") == 20 * len(found) + 1
        assert store.get("item", ["last"])[0, 0] == max(found)


def test_an_empty_store_can_be_saved(tmp_path):
    EmbeddingStore(DIM).save_pretrained(tmp_path)
    assert snapshot(EmbeddingStore.open(tmp_path)) == snapshot(EmbeddingStore(DIM))


def test_a_store_opens_from_its_folder_and_from_its_repository(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    for opened in (
        EmbeddingStore.open(tmp_path / "store"),
        EmbeddingStore.open(str(tmp_path)),
        EmbeddingStore.from_pretrained(tmp_path),
        EmbeddingStore.from_pretrained(tmp_path / "store"),
    ):
        assert snapshot(opened) == snapshot(store)


def test_users_are_left_out_when_asked_also_those_of_a_former_store(store, tmp_path):
    store.save_pretrained(tmp_path)
    store.save_pretrained(tmp_path, include_users=False)
    opened = EmbeddingStore.open(tmp_path)
    assert opened.count("user") == 0 and opened.ids("item") == store.ids("item")
    assert not list(tmp_path.glob("users-*"))
    opened.upsert("user", ["u0"], torch.ones(1, DIM))
    assert opened.seen(["u0"]) == [[]]


def test_a_folder_without_a_store_is_not_found(tmp_path):
    for open_it in (EmbeddingStore.open, EmbeddingStore.from_pretrained):
        with pytest.raises(FileNotFoundError, match="there is no embedding store in .*store.json is missing"):
            open_it(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no embedding store"):
        EmbeddingStore.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder .* and no Hub repository can have that name"):
        EmbeddingStore.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"embedding_dim": 4}, "there are no 6 float32 item vectors of 4 dimensions"),
        ({"embedding_dim": "3"}, "does not fit"),
        ({"counts": {"item": 5}}, "there are no 5 items with an id and a vector each"),
        ({"counts": {"item": 6, "thing": 1}}, "things"),
        ({"space_ids": {"things": "hash"}}, "kind is 'things'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(store, tmp_path, change, why):
    store.save_pretrained(tmp_path)
    manifest = tmp_path / "store.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(ValueError, match=f"store.json is damaged .*{why}"):
        EmbeddingStore.open(tmp_path)


def test_users_of_another_store_do_not_fit_its_items(store, tmp_path):
    store.save_pretrained(tmp_path / "old")
    store.delete("item", ["i0"])
    store.save_pretrained(tmp_path / "new")
    old, new = (json.loads((tmp_path / name / "store.json").read_text()) for name in ("old", "new"))
    users = next((tmp_path / "old").glob("users-*"))
    users.rename(tmp_path / "new" / users.name)
    new["files"]["users"] = old["files"]["users"]
    (tmp_path / "new" / "store.json").write_text(json.dumps(new))
    with pytest.raises(ValueError, match="store.json is damaged .*seen items do not fit"):
        EmbeddingStore.open(tmp_path / "new")


def test_space_ids_travel_with_the_store_and_a_mismatch_names_both(store, tmp_path):
    store.save_pretrained(tmp_path)
    opened = EmbeddingStore.open(tmp_path)
    opened.check_space("user", "hash-u", "the tokenizer")
    with pytest.raises(
        ValueError,
        match="item vectors of the store belong to MQ-Tokenizer hash-i but the tokenizer was made with other",
    ):
        opened.check_space("item", "other", "the tokenizer")
    EmbeddingStore(DIM).check_space("item", "anything", "the tokenizer")


def test_an_embedding_dim_below_one_is_refused():
    with pytest.raises(ValueError, match="embedding_dim is 0"):
        EmbeddingStore(0)


# ---- files


def data_file(folder, name="items"):
    return next(folder.glob(f"{name}-*.safetensors"))


def names(folder):
    return {path.name for path in folder.iterdir()} - {LOCK}


def test_saving_twice_gives_the_same_bytes(store, tmp_path):
    for folder in ("first", "second", "second"):
        store.save_pretrained(tmp_path / folder)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("first", "second")
    )
    assert first == second
    assert len(names(tmp_path / "first")) == 3


def test_a_new_save_leaves_nothing_of_the_old_one_but_other_files_alone(store, tmp_path):
    store.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    (tmp_path / ".users-0123abcd.tmp").write_text("half of a killed save")
    (tmp_path / ".store.json-0123abcd.tmp").write_text("half of another")
    (tmp_path / ".tmpVsodXC").write_text("what safetensors leaves when it is killed")
    store.upsert("item", ["new"], torch.ones(1, DIM))
    store.save_pretrained(tmp_path)
    assert names(tmp_path) == {
        MANIFEST, "notes.txt", "model.safetensors", data_file(tmp_path).name, data_file(tmp_path, "users").name
    }  # fmt: skip
    assert snapshot(EmbeddingStore.open(tmp_path)) == snapshot(store)


@pytest.mark.parametrize("crash_at", range(5))
def test_a_crash_while_saving_leaves_the_former_store(store, tmp_path, monkeypatch, crash_at):
    """Two files are written, named by their content, and then the manifest that names them."""
    store.save_pretrained(tmp_path)
    before = snapshot(store)
    store.upsert("item", ["new", "i0"], torch.ones(2, DIM))
    store.delete("user", ["u2"])
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(os.path.basename(target))
        if len(calls) == crash_at + 1:
            raise OSError("no power")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no power"):
        store.save_pretrained(tmp_path)
    assert (calls[-1] == MANIFEST) == (crash_at == 4)
    monkeypatch.undo()
    assert snapshot(EmbeddingStore.open(tmp_path)) == before
    store.save_pretrained(tmp_path)
    assert snapshot(EmbeddingStore.open(tmp_path)) == snapshot(store)
    assert len(names(tmp_path)) == 3


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def append(path):
    path.write_bytes(path.read_bytes() + b"more")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (os.remove, "is missing"),
        (cut_off, "bytes instead of"),
        (append, "bytes instead of"),
        (flip_a_bit, "not the saved one"),
    ],
)
@pytest.mark.parametrize("kind", ["users", "items"])
def test_a_harmed_data_file_is_named(store, tmp_path, kind, harm, why):
    store.save_pretrained(tmp_path)
    path = data_file(tmp_path, kind)
    harm(path)
    with pytest.raises(
        ValueError, match=f"store.json is damaged .*{path.name} .*{why}.*restore the store from a copy or rebuild it"
    ):
        EmbeddingStore.from_pretrained(tmp_path)


def rewritten(folder, content, name="items"):
    """Puts other content in the place of a data file, with a manifest that says it is right."""
    path = data_file(folder, name)
    path.write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_a_file_that_was_never_safetensors_is_named(store, tmp_path):
    store.save_pretrained(tmp_path)
    rewritten(tmp_path, b"not tensors")
    with pytest.raises(ValueError, match="store.json is damaged .*deserializ.*does not fit its files"):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "array", "why"),
    [
        ("items", "vectors", torch.ones(6, DIM, dtype=torch.float64), "there are no 6 float32 item vectors of 3 dim"),
        ("items", "vectors", torch.ones(5, DIM), "there are no 6 float32 item vectors of 3 dim"),
        ("items", "offsets", torch.tensor([0, 1]), "the id table is damaged"),
        ("items", "metadata", torch.tensor(list(b'{"6": {"a": 1}}'), dtype=torch.uint8), "out of range"),
        ("items", "metadata", torch.tensor(list(b"{"), dtype=torch.uint8), "Expecting"),
        ("items", "metadata", torch.tensor(list(b"[]"), dtype=torch.uint8), "has no attribute"),
        ("items", "metadata", torch.tensor(list(b'{"0": 1}'), dtype=torch.uint8), "has no attribute"),
        ("users", "seen_items", torch.tensor([0, 1, 2, 3, 6], dtype=torch.int32), "the seen items do not fit"),
        ("users", "seen_items", torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32), "the seen items do not fit"),
        ("users", "seen_items", torch.tensor([0, 1, 2, 3, 4]), "the seen items do not fit"),
        ("users", "seen_indptr", torch.tensor([0, 3, 1, 5, 5]), "the seen items do not fit"),
        ("users", "seen_indptr", torch.tensor([0, 5, 5, 5]), "the seen items do not fit"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(store, tmp_path, kind, name, array, why):
    store.save_pretrained(tmp_path)
    arrays = safetensors.torch.load_file(data_file(tmp_path, kind))
    rewritten(tmp_path, safetensors.torch.save({**arrays, name: array}), kind)
    with pytest.raises(ValueError, match=f"store.json is damaged .*{why}"):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"format_version": 1}', '{"format_version": 1, "files": {"a": {}}}']
)
def test_a_manifest_that_describes_nothing_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="store.json is damaged"):
        EmbeddingStore.open(tmp_path)


def test_another_format_version_is_refused_by_number(tmp_path):
    (tmp_path / MANIFEST).write_text('{"format_version": 2, "anything": "new"}')
    with pytest.raises(ValueError, match="has format version 2 but this tokenrec_hf reads version 1"):
        EmbeddingStore.open(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(store, tmp_path):
    store.save_pretrained(tmp_path / "store")
    shutil.copy(data_file(tmp_path / "store"), tmp_path)
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    manifest["files"]["items"]["file"] = "../" + manifest["files"]["items"]["file"]
    (tmp_path / "store" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not the name of a data file"):
        EmbeddingStore.open(tmp_path / "store")


# ---- the Hub


class FakeHub:
    """Stands for the Hub: keeps what was uploaded, as one folder a repository, and hands it out again."""

    def __init__(self, root, monkeypatch):
        self.root, self.calls = root, []
        for name in ("create_repo", "create_branch", "upload_folder", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", options))

    def upload_folder(self, repo_id, folder_path, path_in_repo, delete_patterns, **options):
        self.calls.append(("upload_folder", options))
        target = self.root / repo_id / path_in_repo
        target.mkdir(parents=True, exist_ok=True)
        for pattern in delete_patterns:
            for path in target.glob(pattern):
                path.unlink()
        for path in Path(folder_path).glob("[!.]*"):
            (target / path.name).write_bytes(path.read_bytes())

    def snapshot_download(self, repo_id, **options):
        self.calls.append(("snapshot_download", options))
        return str(self.root / repo_id)


def test_pushing_leaves_users_out_unless_asked_and_what_was_pushed_loads(store, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path, monkeypatch)
    store.push_to_hub("demo", include_users=True, private=True, token="t", revision="branch", commit_message="why")
    assert snapshot(EmbeddingStore.from_pretrained("me/demo", revision="branch", token="t")) == snapshot(store)
    assert hub.calls == [
        ("create_repo", {"private": True, "token": "t", "exist_ok": True}),
        ("create_branch", {"branch": "branch", "token": "t", "exist_ok": True}),
        ("upload_folder", {"token": "t", "revision": "branch", "commit_message": "why", "ignore_patterns": LOCK}),
        ("snapshot_download", {"revision": "branch", "token": "t", "allow_patterns": ["store/*"]}),
    ]
    store.push_to_hub("demo")
    assert EmbeddingStore.from_pretrained("me/demo").count("user") == 0
    assert sorted(path.name[:5] for path in (tmp_path / "me/demo/store").iterdir()) == ["items", "store"]


def test_a_hub_repository_without_a_store_is_not_found(tmp_path, monkeypatch):
    FakeHub(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="there is no embedding store in .*me/other"):
        EmbeddingStore.from_pretrained("me/other")


# ---- metadata as columns

NAMES = st.sampled_from(["genre", "price", "withdrawn"])
VALUES = st.sampled_from([True, False, 0, 1, 1.0, 2.5, "1", "", "it's"])


def same(a, b):
    return type(a) is bool and type(b) is bool and a == b or type(a) is not bool and type(b) is not bool and a == b


@settings(max_examples=200, deadline=None)
@given(data=st.data(), where=st.dictionaries(NAMES, VALUES | st.lists(VALUES, max_size=2), max_size=2))
def test_any_changes_and_filters_give_what_dictionaries_give(data, where):
    metadata, known = ItemMetadata(), []
    for _ in range(data.draw(st.integers(0, 8))):
        action = data.draw(st.sampled_from(["add", "set", "keep", "copy"]))
        if action == "add":
            count = data.draw(st.integers(0, 3))
            metadata.add_items(count)
            known += [{} for _ in range(count)]
        elif action == "set" and known:
            rows = data.draw(st.lists(st.integers(0, len(known) - 1), max_size=4))
            new = [data.draw(st.dictionaries(NAMES, st.none() | VALUES, max_size=2)) for _ in rows]
            metadata.set(np.array(rows, dtype=np.int64), check_metadata(new, len(new)))
            for row, values in zip(rows, new):
                known[row] = {name: value for name, value in (known[row] | values).items() if value is not None}
        elif action == "keep":
            keep = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
            metadata.keep(np.array(keep, dtype=bool))
            known = [values for values, kept in zip(known, keep) if kept]
        else:
            metadata = ItemMetadata(metadata.items)
        with suppress(ValueError):
            metadata.allowed({"genre": ["1"]})
    found = metadata.items
    assert [set(one) for one in found] == [set(one) for one in known]
    assert all(same(one[name], values[name]) for one, values in zip(found, known) for name in values)
    checked = check_where(where)
    if known and not all(any(name in values for values in known) for name in checked):
        with pytest.raises(ValueError, match="no item has the metadata"):
            metadata.allowed(checked)
        return
    expected = [
        not same(values.get("withdrawn"), True)
        and all(name in values and any(same(values[name], one) for one in wanted) for name, wanted in checked.items())
        for values in known
    ]
    allowed = metadata.allowed(checked)
    assert expected == ([True] * len(known) if allowed is None else allowed.tolist())


# ---- lists of different lengths


@settings(max_examples=150, deadline=None)
@given(lists=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), data=st.data())
def test_lists_in_one_array_are_what_lists_are(lists, data):
    lengths = np.array([len(one) for one in lists], dtype=np.int64)
    ragged = Ragged.from_lengths(lengths, np.array(sum(lists, []), dtype=np.int32))
    assert len(ragged) == len(lists) and ragged.lengths.tolist() == lengths.tolist()
    assert list(zip(ragged.rows, ragged.ranks, ragged.values)) == [
        (row, rank, value) for row, one in enumerate(lists) for rank, value in enumerate(one)
    ]
    assert [row[row >= 0].tolist() for row in ragged.padded(-1)] == lists
    asked = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=5)) if lists else []
    taken = ragged.take(np.array(asked, dtype=np.int64))
    assert [taken.values[a:b].tolist() for a, b in zip(taken.indptr, taken.indptr[1:])] == [lists[row] for row in asked]
    assert taken.values.dtype == np.int32 and taken.indptr.dtype == np.int64
    order = data.draw(st.permutations(range(len(ragged.values))))
    pairs = Ragged.from_pairs(ragged.rows[order], ragged.values[order], len(lists))
    mine = [[ragged.values[at] for at in order if ragged.rows[at] == row] for row in range(len(lists))]
    assert [pairs.values[a:b].tolist() for a, b in zip(pairs.indptr, pairs.indptr[1:])] == mine


@pytest.mark.parametrize("indptr", [[], [0, 1], [1, 2], [0, 2, 1, 2], [0, 3]])
def test_bounds_that_do_not_fit_the_values_are_not_valid(indptr):
    assert not Ragged(np.array(indptr, dtype=np.int64), np.array([0, 1], dtype=np.int32)).is_valid(2)
    assert Ragged(np.array([0, 0, 2]), np.array([0, 1], dtype=np.int32)).is_valid(2)
    assert not Ragged(np.array([0, 0, 2]), np.array([0, 2], dtype=np.int32)).is_valid(2)
    assert not Ragged(np.array([[0, 2]]), np.array([[0, 1]], dtype=np.int32)).is_valid(2)


def test_a_folder_may_be_named_by_way_of_another(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    store = EmbeddingStore(2)
    store.upsert("item", ["a"], np.ones((1, 2)))
    for _ in range(2):
        store.save_pretrained("../store")
    assert EmbeddingStore.open(tmp_path / "store").ids("item") == ["a"]


def test_a_filter_that_is_no_mapping_is_refused():
    store = EmbeddingStore(2)
    store.upsert("item", ["a"], np.ones((1, 2)))
    with pytest.raises(ValueError, match="where is 'x=1'; give values by name"):
        store.search(np.ones((1, 2)), 1, where="x=1")
