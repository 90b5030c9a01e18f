import copy
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import settings
from store_checks import DIM, AgainstDictionaries

pytest.importorskip("faiss", reason="needs the extra faiss")

from tokenrec_hf import EmbeddingStore, FaissStore
from tokenrec_hf.store.faiss import INDEXES


class AgainstDictionariesWithAnIndex(AgainstDictionaries):
    """With so few items, an approximate search misses nothing, whatever has changed since the index was built."""

    def prepared(self, store):
        return FaissStore(store, self.index)

    def rows(self, kind, ids):
        return self.store.store.rows(kind, ids)


@pytest.mark.parametrize("index", INDEXES)
def test_any_sequence_of_operations_agrees_with_dictionaries(index, tmp_path):
    machine = type("Machine", (AgainstDictionariesWithAnIndex,), {"root": tmp_path, "index": index})
    test = machine.TestCase()
    test.settings = settings(
        max_examples=int(os.environ.get("TOKENREC_SEQUENCES", "30")), stateful_step_count=15, deadline=None
    )
    test.runTest()


def clustered(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, 16, generator=generator)
    return centres[torch.randint(50, (count,), generator=generator)] + 0.3 * torch.randn(count, 16, generator=generator)


def store_of(vectors):
    store = EmbeddingStore(vectors.shape[1])
    store.upsert("item", [f"i{row}" for row in range(len(vectors))], vectors)
    return store


def recall(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected)])


@pytest.mark.parametrize("index", INDEXES)
def test_most_of_the_nearest_are_found_and_the_excluded_never(index):
    exact = store_of(clustered(5_000))
    store, ids = FaissStore(exact, index), exact.ids("item")
    queries = clustered(40, seed=1)
    exclude = [ids[at : at + 200 * (at % 2)] for at in range(40)]
    expected, _ = exact.search(queries, 20, exclude)
    found, scores = store.search(queries, 20, exclude)
    assert [len(one) for one in found] == [20] * 40
    assert all(not set(one) & set(without) for one, without in zip(found, exclude))
    assert recall(found, expected) > 0.95
    for query, one, own in zip(queries, found, scores):
        np.testing.assert_allclose(own, torch.cosine_similarity(query[None], exact.get("item", one)), atol=1e-5)


@pytest.mark.parametrize(
    ("index", "parameter", "values"), [("ivf", "nprobe", (1, 8, 64)), ("hnsw", "ef_search", (1, 20, 200))]
)
def test_a_search_that_looks_at_less_misses_more(index, parameter, values):
    exact = store_of(torch.randn(5_000, 16, generator=torch.Generator().manual_seed(0)))
    queries = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    expected, _ = exact.search(queries, 20)
    store, shares = FaissStore(exact, index, **{parameter: values[0]}), []
    for value in values:
        setattr(store, parameter, value)
        shares.append(recall(store.search(queries, 20)[0], expected))
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("index", INDEXES)
def test_changes_and_withdrawals_are_found_before_the_index_is_built_again(index):
    store = FaissStore(store_of(clustered(5_000)), index)
    query = clustered(1, seed=2)
    [best], _ = store.search(query, 3)
    built = store._faiss
    store.upsert("item", ["new"], query)
    store.upsert("item", [best[0]], -query)
    store.delete("item", [best[1]])
    store.withdraw([best[2]])
    [found], [scores] = store.search(query, 50)
    assert found[0] == "new" and scores[0] == pytest.approx(1, abs=1e-5) and not set(found) & set(best)
    assert store._faiss is built
    store.upsert("item", [f"more{row}" for row in range(600)], clustered(600, seed=3))
    store.search(query, 3)
    assert store._faiss is not built


def test_a_filter_is_exact():
    exact = store_of(torch.randn(2_000, DIM, generator=torch.Generator().manual_seed(0)))
    exact.set_metadata(exact.ids("item")[::100], [{"genre": "jazz"}] * 20)
    query = torch.ones(1, DIM)
    store = FaissStore(exact, nprobe=1)
    assert store.search(query, 20, where={"genre": "jazz"}) == exact.search(query, 20, where={"genre": "jazz"})


def test_a_search_with_more_items_excluded_than_the_index_finds_is_exact():
    exact = store_of(torch.randn(2_000, DIM))
    ids = exact.ids("item")
    found, _ = FaissStore(exact, nprobe=1).search(torch.randn(1, DIM), 50, [ids[50:]])
    assert sorted(found[0]) == sorted(ids[:50])


def test_all_that_is_no_search_is_that_of_the_store(tmp_path):
    exact = store_of(torch.randn(20, DIM))
    store = FaissStore(exact)
    store.upsert("user", ["u"], torch.ones(1, DIM))
    store.set_seen(["u"], [["i1"]])
    store.add_seen(["u"], [["i2"]])
    store.space_ids = {"user": None, "item": "hash"}
    assert exact.seen(["u"]) == store.seen(["u"]) == [["i1", "i2"]]
    assert torch.equal(store.vectors("item"), exact.vectors("item")) and store.contains(
        "user", ["u", "v"]
    ).tolist() == [True, False]
    with pytest.raises(ValueError, match="belong to MQ-Tokenizer hash"):
        store.check_space("item", "other", "the tokenizer")
    store.save_pretrained(tmp_path)
    store.close()
    assert EmbeddingStore.open(tmp_path).ids("item") == exact.ids("item")
    assert repr(store) == "FaissStore(EmbeddingStore(embedding_dim=3, users=1, items=20), index='ivf')"


def test_threads_that_search_see_every_write_whole():
    store = FaissStore(store_of(clustered(3_000)))
    queries, done, wrong = clustered(5, seed=4), threading.Event(), []

    def read():
        while not done.is_set():
            found, _ = store.search(queries, 10)
            if [len(one) for one in found] != [10] * 5:
                wrong.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        store.upsert("item", [f"new{turn}", "i5"], clustered(2, seed=turn))
        store.delete("item", [f"i{turn}", f"new{turn - 3}"])
    done.set()
    reader.join()
    assert not wrong


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("index", [*INDEXES, None])
def test_a_copy_stands_apart(index, copied):
    exact = store_of(clustered(3_000))
    store = exact if index is None else FaissStore(exact, index)
    queries = clustered(4, seed=1)
    found = store.search(queries, 5)
    twin = copied(store)
    assert twin.search(queries, 5) == found
    twin.delete("item", [one[0] for one in found[0]])
    assert store.search(queries, 5) == found and twin.search(queries, 5) != found


def test_an_unknown_index_and_a_parameter_of_the_other_are_refused():
    with pytest.raises(ValueError, match="there is no index 'annoy'; choose ivf or hnsw"):
        FaissStore(EmbeddingStore(DIM), "annoy")
    for arguments in ({"index": "hnsw", "nprobe": 8}, {"index": "ivf", "ef_search": 8}):
        with pytest.raises(ValueError, match="nprobe belongs to index 'ivf' and ef_search to 'hnsw'"):
            FaissStore(EmbeddingStore(DIM), **arguments)
