import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from test_embedding_store import DIM, AgainstDictionaries

pytest.importorskip("faiss", reason="needs the extra faiss")

from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.store.faiss import KINDS


class AgainstDictionariesWithAnIndex(AgainstDictionaries):
    """With so few items and so much effort, an approximate search misses nothing, whatever has changed since it was built."""

    def prepared(self, store):
        store.use_index(self.index)
        return store


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_operations_agrees_with_dictionaries(kind, tmp_path):
    machine = type("Machine", (AgainstDictionariesWithAnIndex,), {"root": tmp_path, "index": kind})
    test = machine.TestCase()
    test.settings = settings(
        max_examples=int(os.environ.get("TOKENREC_SEQUENCES", "30")), stateful_step_count=15, deadline=None
    )
    test.runTest()


def clustered(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, 16, generator=generator)
    return centres[torch.randint(50, (count,), generator=generator)] + 0.3 * torch.randn(count, 16, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_most_of_the_nearest_are_found_and_the_excluded_never(kind):
    vectors = clustered(5_000)
    ids = [f"i{i}" for i in range(5_000)]
    exact, store = EmbeddingStore(16), EmbeddingStore(16)
    for one in (exact, store):
        one.upsert("item", ids, vectors)
    store.use_index(kind)
    queries = clustered(40, seed=1)
    exclude = [ids[at : at + 200 * (at % 2)] for at in range(40)]
    expected, _ = exact.search(queries, 20, exclude)
    found, scores = store.search(queries, 20, exclude)
    assert [len(one) for one in found] == [20] * 40
    assert all(not set(one) & set(without) for one, without in zip(found, exclude))
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, expected)]) > 0.95
    for query, one, own in zip(queries, found, scores):
        np.testing.assert_allclose(own, torch.cosine_similarity(query[None], exact.get("item", one)), atol=1e-5)
    store.use_index(None)
    assert store.search(queries, 20, exclude)[0] == expected


def test_little_effort_misses_more():
    vectors = torch.randn(5_000, 16, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    store = EmbeddingStore(16)
    store.upsert("item", [f"i{i}" for i in range(5_000)], vectors)
    expected, _ = store.search(queries, 20)
    shares = []
    for effort in (1, 8, 64):
        store.use_index("ivf", effort)
        shares.append(np.mean([len(set(a) & set(b)) for a, b in zip(store.search(queries, 20)[0], expected)]))
    assert shares[0] < shares[1] < shares[2]


def test_a_search_with_more_items_excluded_than_the_index_finds_is_exact():
    store = EmbeddingStore(DIM)
    ids = [f"i{i}" for i in range(2_000)]
    store.upsert("item", ids, torch.randn(2_000, DIM))
    store.use_index("ivf", 1)
    found, _ = store.search(torch.randn(1, DIM), 50, [ids[50:]])
    assert sorted(found[0]) == sorted(ids[:50])


def test_an_unknown_index_is_refused():
    with pytest.raises(ValueError, match="there is no index 'annoy'; choose ivf or hnsw"):
        EmbeddingStore(DIM).use_index("annoy")
