import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenrec_hf.models import functional
from tokenrec_hf.models.functional import (
    dropout,
    exact_search,
    linear_cross_entropy,
    sampled_cross_entropy,
    scorable,
    search_one,
    stable_topk,
    unit,
    unit_rows,
)


def drawn_pairs(rows, items, targets, generator):
    """Pairs of rows and items that are no targets, in random order, and as `excluded` takes them. Item 0 always competes."""
    pairs = {(row, item) for row in range(rows) for item in range(items) if torch.rand((), generator=generator) < 0.3}
    pairs = sorted(
        pairs - {(row, item) for row in range(rows) for item in targets[row].tolist()} - {(r, 0) for r in range(rows)}
    )
    pairs = [pairs[place] for place in torch.randperm(len(pairs), generator=generator)]
    return pairs, tuple(torch.tensor([pair[side] for pair in pairs]).long() for side in (0, 1))


def naive(x, y, targets, weights, excluded):
    """The loss row by row and target by target, in float64."""
    total = 0.0
    for row, (query, weight) in enumerate(zip(x.double(), weights.double())):
        competing = [item for item in range(len(y)) if (row, item) not in excluded]
        log_sum = torch.stack([query @ y[item].double() for item in competing]).logsumexp(0)
        terms = [log_sum - query @ y[item].double() for item in targets[row].tolist() if item >= 0]
        total += weight * sum(terms) / len(terms) if terms else 0
    return total


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_loss_and_its_gradients_are_the_naive_ones(data):
    rows, items, width, most = (data.draw(st.integers(1, 7), label) for label in ("n", "m", "w", "P"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x, y = (torch.randn(size, width, generator=generator).requires_grad_() for size in (rows, items))
    # Row 0 may be all padding.
    targets = torch.randint(-3, items, (rows, most), generator=generator)
    weights = torch.rand(rows, generator=generator)
    pairs, excluded = drawn_pairs(rows, items, targets, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "LOGITS", data.draw(st.integers(1, 50), "logits at once"))
        found = linear_cross_entropy(x, y, targets, weights=weights, excluded=excluded)
        gradients = torch.autograd.grad(3 * found, (x, y))
    expected = naive(x, y, targets, weights, set(pairs))
    assert found.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-4, abs=1e-5)
    if isinstance(expected, torch.Tensor):
        for one, other in zip(gradients, torch.autograd.grad(3 * expected, (x, y), allow_unused=True)):
            assert torch.allclose(one, other.float(), atol=1e-4)


def naive_sampled(x, y, sample, targets, weights, excluded):
    """The loss row by row, in float64: each sampled item that is no target stands for as many items as there are for a draw."""
    total = 0.0
    for row, (query, weight) in enumerate(zip(x.double(), weights.double())):
        mine = [item for item in targets[row].tolist() if item >= 0]
        if mine:
            others = [item for item in sample.tolist() if item not in mine and (row, item) not in excluded]
            terms = [(query @ y[item].double()).exp() for item in mine]
            terms += [(query @ y[item].double()).exp() * len(y) / len(sample) for item in others]
            total += weight * (sum(terms).log() - sum(query @ y[item].double() for item in mine) / len(mine))
    return total


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_sampled_loss_and_its_gradients_are_the_naive_ones(data):
    rows, items, width, most = (data.draw(st.integers(1, 7), label) for label in ("n", "m", "w", "P"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x, y = (torch.randn(size, width, generator=generator).requires_grad_() for size in (rows, items))
    # No item is a target of a row twice.
    targets = torch.stack([torch.randperm(items + most, generator=generator)[:most] - most for _ in range(rows)])
    weights = torch.rand(rows, generator=generator)
    sample = torch.randint(items, (data.draw(st.integers(1, 12), "sample"),), generator=generator)
    pairs, excluded = drawn_pairs(rows, items, targets, generator)
    options = {"weights": weights, "excluded": excluded}
    found = sampled_cross_entropy(x, lambda chosen: y[chosen], sample, targets, items, **options)
    expected = naive_sampled(x, y, sample, targets, weights, set(pairs))
    assert found.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-4, abs=1e-5)
    if isinstance(expected, torch.Tensor):
        wanted = torch.autograd.grad(expected, (x, y), allow_unused=True)
        for one, other in zip(torch.autograd.grad(found, (x, y)), wanted):
            assert torch.allclose(one, other.float(), atol=1e-4)


def test_a_sample_that_has_all_items_equally_often_gives_the_loss_over_all_items():
    torch.manual_seed(0)
    x, y, targets = torch.randn(30, 8), torch.randn(50, 8), torch.randint(0, 50, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled_cross_entropy(x, lambda rows: y[rows], torch.arange(50).repeat(3), targets, 50)
    assert found.item() == pytest.approx(linear_cross_entropy(x, y, targets).item(), rel=1e-5)


def test_one_target_a_row_is_pytorchs_cross_entropy_also_under_mixed_precision():
    torch.manual_seed(0)
    x, y, targets = torch.randn(300, 16), torch.randn(500, 16), torch.randint(0, 500, (300,))
    plain = F.cross_entropy(x @ y.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, y, targets)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)


def test_without_gradients_the_loss_is_the_same():
    torch.manual_seed(0)
    x, y, targets = torch.randn(9, 4).requires_grad_(), torch.randn(5, 4), torch.randint(0, 5, (9,))
    with torch.no_grad():
        found = linear_cross_entropy(x, y, targets)
    assert not found.requires_grad and found.equal(linear_cross_entropy(x, y, targets).detach())


def test_nothing_to_predict_is_a_loss_and_a_gradient_of_zero():
    x, y = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = linear_cross_entropy(x, y, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and not y.grad.any()


def test_unit_vectors_and_their_gradients_are_those_of_normalize():
    torch.manual_seed(0)
    x, weights = torch.randn(3, 5, 7, dtype=torch.float64).requires_grad_(), torch.randn(3, 5, 7, dtype=torch.float64)
    assert torch.allclose(unit(x), F.normalize(x, dim=-1), atol=1e-12)
    found, expected = (
        torch.autograd.grad((f(x) * weights).sum(), x)[0] for f in (unit, lambda x: F.normalize(x, dim=-1))
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_vector_of_zeros_stays_zero():
    assert unit(torch.zeros(2, 3)).equal(torch.zeros(2, 3))


def test_the_fast_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1001, 301), 0.25)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropout(torch.ones(3), 0.25, training=False).equal(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.0, 0.001, 0.5, 1.0])
def test_dropped_tensors_keep_their_type_and_gradients_are_dropped_alike(dtype, probability):
    x = torch.ones(37, 3, dtype=dtype, requires_grad=True)
    dropped = dropout(x, probability)
    dropped.sum().backward()
    assert dropped.dtype == dtype
    assert x.grad.equal(dropped)
    assert probability < 1 or not dropped.any()


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


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(100, 700), k=st.integers(1, 6), group=st.integers(2, 9))
def test_stable_topk_of_many_columns_is_a_stable_sort_cut_off(data, width, k, group):
    scores = np.random.default_rng(data.draw(st.integers(0, 9))).integers(
        -2, data.draw(st.integers(-1, 90)), (3, width)
    )
    scores = scores.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "GROUP", group)
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
        patch.setattr(functional, "QUERY_CHUNK", data.draw(st.integers(1, 4)))
        patch.setattr(functional, "ITEM_CHUNK", data.draw(st.integers(1, 12)))
        patch.setattr(functional, "SCORES", data.draw(st.integers(0, 60)))
        rows, scores = exact_search(
            unit_rows(torch.from_numpy(queries)),
            *scorable(torch.from_numpy(items)),
            top_k,
            exclude[:, 0],
            exclude[:, 1],
            None if allowed is None else torch.from_numpy(allowed),
        )
    assert rows.shape == scores.shape == (num_queries, top_k)
    for query in range(num_queries):
        unit = unit_rows(torch.from_numpy(queries[[query]]))[0].numpy()
        scored = [part.numpy() for part in scorable(torch.from_numpy(items))]
        excluded = np.array([item for row, item in pairs if row == query and item < num_items], dtype=np.int64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "GROUP", data.draw(st.sampled_from([1, 2, 32])))
            alone, cosines = search_one(unit, *scored, top_k, excluded, allowed)
        left = rows[query] >= 0
        assert alone.tolist() == rows[query][left].tolist() and cosines.tolist() == scores[query][left].tolist()
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
    items = torch.zeros(2 * functional.ITEM_CHUNK + 100, 3)
    items[:, 0] = 1
    items[[5, functional.ITEM_CHUNK - 1, functional.ITEM_CHUNK, 2 * functional.ITEM_CHUNK + 99], 1] = 1
    rows, _ = exact_search(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), *scorable(items), 6, *no_pairs)
    assert rows[0].tolist() == [
        5,
        functional.ITEM_CHUNK - 1,
        functional.ITEM_CHUNK,
        2 * functional.ITEM_CHUNK + 99,
        0,
        1,
    ]
    assert rows[1].tolist() == [0, 1, 2, 3, 4, 6 - 1]


# Fewer queries than dimensions and more: scores are scaled in one case, vectors in the other.
@pytest.mark.parametrize("num_queries", [3, 20])
def test_random_vectors_give_the_scores_of_double_precision(num_queries):
    generator = np.random.default_rng(0)
    items, queries = generator.normal(size=(5_000, 16)), generator.normal(size=(num_queries, 16))
    items *= generator.lognormal(sigma=3, size=(5_000, 1))
    rows, scores = exact_search(
        unit_rows(torch.from_numpy(queries).float()), *scorable(torch.from_numpy(items).float()), 10, *no_pairs
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
    rows, scores = exact_search(queries, *scorable(items), 3, *no_pairs)
    best = 0.5**0.5 if size else 0.0
    expected = sorted([(-0.6, 0), (-best, 1), (1.0, 2)])
    assert rows.tolist() == [[row for _, row in expected]] * num_queries
    torch.testing.assert_close(scores, torch.tensor([[-score for score, _ in expected]] * num_queries))


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_vectors_are_scored_as_they_are_unless_one_is_too_short_or_long(size):
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    items, factors = scorable(vectors)
    assert items is vectors and factors.tolist() == pytest.approx([0.2, 0.0])
    items, factors = scorable(torch.cat([vectors, torch.tensor([[size, size]])]))
    torch.testing.assert_close(items * factors[:, None], torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.5**0.5, 0.5**0.5]]))
