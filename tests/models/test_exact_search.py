import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenrec_hf.models import embedding_store as module
from tokenrec_hf.models.embedding_store import exact_search, inverse_lengths, stable_topk, unit_rows

no_pairs = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def chunks(items, size=module.ITEM_CHUNK):
    """Item vectors as `exact_search` takes them."""
    return [(part, inverse_lengths(part)) for part in items.split(size) if len(part)]


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


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(100, 700), k=st.integers(1, 6), group=st.integers(2, 9))
def test_stable_topk_of_many_columns_is_a_stable_sort_cut_off(data, width, k, group):
    scores = np.random.default_rng(data.draw(st.integers(0, 9))).integers(
        -2, data.draw(st.integers(-1, 90)), (3, width)
    )
    scores = scores.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP", group)
        columns, values = stable_topk(torch.from_numpy(scores), k)
    expected = naive_order(scores)[:, :k]
    assert columns.tolist() == expected.tolist()
    assert values.tolist() == np.take_along_axis(scores, expected, axis=1).tolist()


def test_stable_topk_takes_the_first_columns_of_thousands_of_equal_scores():
    columns, _ = stable_topk(torch.zeros(3, 20_000), 50)
    assert columns.tolist() == [list(range(50))] * 3


def test_stable_topk_makes_nothing_on_another_device_than_that_of_the_scores():
    scores = torch.randn(3, 20_000)
    # A tensor made without a device would be on meta, and could not be used with the scores: on a GPU it fails likewise.
    with torch.device("meta"):
        columns, _ = stable_topk(scores, 10)
    assert columns.tolist() == scores.topk(10).indices.tolist()


def test_stable_topk_ranks_finite_scores_above_masked_ones():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    columns, values = stable_topk(scores, 3)
    assert columns[0, :2].tolist() == [3, 1]
    assert values.tolist() == [[2.0, 1.0, -torch.inf]]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), num_items=st.integers(0, 40), num_queries=st.integers(0, 9), top_k=st.integers(1, 45))
def test_search_in_chunks_is_a_stable_sort_of_all_cosines(data, num_items, num_queries, top_k):
    # Items on an axis, of a length that divides exactly, have cosines without rounding, so that ties are ties.
    axes = data.draw(hnp.arrays(np.int64, num_items, elements=st.integers(0, 2)))
    lengths = data.draw(hnp.arrays(np.float32, num_items, elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 4.0])))
    items = np.eye(3, dtype=np.float32)[axes] * lengths[:, None]
    queries = data.draw(hnp.arrays(np.float32, (num_queries, 3), elements=st.integers(-1, 1)))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(-1, 45)), max_size=40))
    pairs = [pair for pair in pairs if pair[0] < num_queries]
    allowed = data.draw(st.none() | hnp.arrays(bool, num_items))
    exclude = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERY_CHUNK", data.draw(st.integers(1, 4)))
        rows, scores = exact_search(
            unit_rows(torch.from_numpy(queries)),
            chunks(torch.from_numpy(items), data.draw(st.integers(1, 12))),
            top_k,
            exclude[:, 0],
            exclude[:, 1],
            None if allowed is None else torch.from_numpy(allowed),
        )
    assert rows.shape == scores.shape == (num_queries, top_k)
    for query in range(num_queries):
        lengths = np.linalg.norm(items, axis=1) * np.linalg.norm(queries[query])
        own = np.round(items @ queries[query] / np.where(lengths > 0, lengths, 1), 4)
        left = [
            item
            for item in np.argsort(-own, kind="stable").tolist()
            if (query, item) not in pairs and (allowed is None or allowed[item])
        ]
        assert rows[query].tolist() == left[:top_k] + [-1] * (top_k - len(left))
        np.testing.assert_allclose(scores[query, : len(left)], own[left[:top_k]], atol=1e-4)
        assert torch.isneginf(scores[query, len(left) :]).all()


def test_ties_are_in_row_order_across_the_real_chunk_size():
    items = torch.zeros(2 * module.ITEM_CHUNK + 100, 3)
    items[:, 0] = 1
    items[[5, module.ITEM_CHUNK - 1, module.ITEM_CHUNK, 2 * module.ITEM_CHUNK + 99], 1] = 1
    rows, _ = exact_search(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), chunks(items), 6, *no_pairs)
    assert rows[0].tolist() == [5, module.ITEM_CHUNK - 1, module.ITEM_CHUNK, 2 * module.ITEM_CHUNK + 99, 0, 1]
    assert rows[1].tolist() == [0, 1, 2, 3, 4, 6 - 1]


# Fewer queries than dimensions and more: scores are scaled in one case, vectors in the other.
@pytest.mark.parametrize("num_queries", [3, 20])
def test_random_vectors_give_the_scores_of_double_precision(num_queries):
    generator = np.random.default_rng(0)
    items, queries = generator.normal(size=(5_000, 16)), generator.normal(size=(num_queries, 16))
    items *= generator.lognormal(sigma=3, size=(5_000, 1))
    rows, scores = exact_search(
        unit_rows(torch.from_numpy(queries).float()), chunks(torch.from_numpy(items).float()), 10, *no_pairs
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


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1.0, 1e10, 1e25, 3e38])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_cosines_are_right_beside_vectors_of_any_size(size, num_queries):
    items = torch.tensor([[3.0, 4.0], [size, size], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0]]).repeat(num_queries, 1)
    rows, scores = exact_search(queries, chunks(items), 3, *no_pairs)
    best = 0.5**0.5 if size else 0.0
    expected = sorted([(-0.6, 0), (-best, 1), (1.0, 2)])
    assert rows.tolist() == [[row for _, row in expected]] * num_queries
    torch.testing.assert_close(scores, torch.tensor([[-score for score, _ in expected]] * num_queries))


def test_inverse_lengths_say_where_they_cannot_be_used():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [1e30, 0.0], [3e38, 3e38]])
    inverse = inverse_lengths(vectors)
    assert inverse[0] == 0.2
    assert inverse[1:].isnan().all()
