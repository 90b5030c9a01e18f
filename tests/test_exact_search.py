import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenrec_hf import exact_search as module
from tokenrec_hf.exact_search import exact_search, stable_topk, unit_rows

no_pairs = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def naive_order(scores):
    """Columns by score, equal scores in column order: what a stable sort says."""
    return np.argsort(-scores, axis=1, kind="stable")


@given(
    scores=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(-2, 2)),
    k=st.integers(1, 35),
)
def test_stable_topk_is_a_stable_sort_cut_off(scores, k):
    columns, values = stable_topk(torch.from_numpy(scores), k)
    expected = naive_order(scores)[:, :k]
    assert columns.tolist() == expected.tolist()
    assert values.tolist() == np.take_along_axis(scores, expected, axis=1).tolist()


def test_stable_topk_takes_the_first_columns_of_thousands_of_equal_scores():
    columns, _ = stable_topk(torch.zeros(3, 20_000), 50)
    assert columns.tolist() == [list(range(50))] * 3


def test_stable_topk_ranks_finite_scores_above_masked_ones():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    columns, values = stable_topk(scores, 3)
    assert columns[0, :2].tolist() == [3, 1]
    assert values.tolist() == [[2.0, 1.0, -torch.inf]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_items=st.integers(0, 40), num_queries=st.integers(0, 9), top_k=st.integers(1, 45))
def test_search_in_chunks_is_a_stable_sort_of_all_scores(data, num_items, num_queries, top_k):
    # Small whole numbers make every product exact, so that ties are ties in any order of summation.
    numbers = st.integers(-1, 1)
    items = data.draw(hnp.arrays(np.float32, (num_items, 2), elements=numbers))
    queries = data.draw(hnp.arrays(np.float32, (num_queries, 2), elements=numbers))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(-1, 45)), max_size=40))
    pairs = [pair for pair in pairs if pair[0] < num_queries]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ITEM_CHUNK", data.draw(st.integers(1, 12)))
        patch.setattr(module, "QUERY_CHUNK", data.draw(st.integers(1, 4)))
        exclude = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        rows, scores = exact_search(
            torch.from_numpy(queries), torch.from_numpy(items), top_k, exclude[:, 0], exclude[:, 1]
        )
    assert rows.shape == scores.shape == (num_queries, top_k)
    for query in range(num_queries):
        own = items @ queries[query]
        allowed = [item for item in np.argsort(-own, kind="stable").tolist() if (query, item) not in pairs]
        expected = allowed[:top_k]
        assert rows[query].tolist() == expected + [-1] * (top_k - len(expected))
        assert scores[query, : len(expected)].tolist() == own[expected].tolist()
        assert torch.isneginf(scores[query, len(expected) :]).all()


def test_ties_are_in_row_order_across_the_real_chunk_size():
    items = torch.zeros(2 * module.ITEM_CHUNK + 100, 3)
    items[:, 0] = 1
    items[[5, module.ITEM_CHUNK - 1, module.ITEM_CHUNK, 2 * module.ITEM_CHUNK + 99], 1] = 1
    rows, _ = exact_search(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), items, 6, *no_pairs)
    assert rows[0].tolist() == [5, module.ITEM_CHUNK - 1, module.ITEM_CHUNK, 2 * module.ITEM_CHUNK + 99, 0, 1]
    assert rows[1].tolist() == [0, 1, 2, 3, 4, 6 - 1]


def test_random_vectors_give_the_scores_of_double_precision():
    generator = np.random.default_rng(0)
    items, queries = generator.normal(size=(5_000, 16)), generator.normal(size=(20, 16))
    rows, scores = exact_search(
        unit_rows(torch.from_numpy(queries).float()), unit_rows(torch.from_numpy(items).float()), 10, *no_pairs
    )
    lengths = np.linalg.norm(items, axis=1) * np.linalg.norm(queries, axis=1)[:, None]
    cosines = queries @ items.T / lengths
    assert rows.tolist() == naive_order(cosines)[:, :10].tolist()
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :10], atol=1e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_unit_rows_have_length_one_whatever_their_size(size):
    unit = unit_rows(torch.tensor([[size, -size, 0.0]]))
    torch.testing.assert_close(unit, torch.tensor([[0.5**0.5, -(0.5**0.5), 0.0]]))


def test_a_zero_row_stays_zero_and_the_input_is_left_alone():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(unit_rows(vectors), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert vectors.tolist() == [[0.0, 0.0], [3.0, 4.0]]
