import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.data.interaction_matrix import InteractionMatrix


@st.composite
def interactions(draw):
    num_users, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    pair = st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items - 1))
    return num_users, num_items, draw(st.lists(pair, max_size=25))


def matrix_of(num_users, num_items, pairs):
    users, items = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return InteractionMatrix(users, items, num_users, num_items)


def lists_of(num_users, pairs):
    """The naive matrix: a list of items per user."""
    rows = {user: [] for user in range(num_users)}
    for user, item in pairs:
        rows[user].append(item)
    return rows


@given(interactions())
def test_rows_lengths_and_popularity_are_those_of_a_dictionary_of_lists(drawn):
    num_users, num_items, pairs = drawn
    matrix, rows = matrix_of(*drawn), lists_of(num_users, pairs)
    assert len(matrix) == len(pairs)
    assert [matrix.of(user).tolist() for user in range(num_users)] == list(rows.values())
    assert matrix.lengths.tolist() == [len(row) for row in rows.values()]
    assert matrix.popularity().tolist() == [sum(i == item for _, i in pairs) for item in range(num_items)]


@given(interactions(), st.data())
def test_rows_of_several_users_come_one_after_the_other_in_the_order_asked_for(drawn, data):
    num_users, _, pairs = drawn
    asked = data.draw(st.lists(st.integers(0, num_users - 1), max_size=8))
    indptr, items = matrix_of(*drawn).of_users(np.array(asked, dtype=np.int64))
    rows = lists_of(num_users, pairs)
    assert [items[a:b].tolist() for a, b in zip(indptr, indptr[1:])] == [rows[user] for user in asked]


@given(interactions())
def test_contains_is_membership_in_a_set_of_pairs(drawn):
    num_users, num_items, pairs = drawn
    users, items = np.divmod(np.arange(num_users * num_items), num_items)
    known = set(pairs)
    assert matrix_of(*drawn).contains(users, items).tolist() == [pair in known for pair in zip(users, items)]


@given(interactions(), st.integers(1, 4), st.integers(0, 2**40), st.integers(0, 1000))
def test_negatives_are_never_interacted_items(drawn, num_negatives, seed, epoch):
    num_users, num_items, pairs = drawn
    rows = lists_of(num_users, pairs)
    users = np.array([user for user in rows if len(set(rows[user])) < num_items and len(rows[user]) < num_items])
    users = users.astype(np.int64)
    drawn_negatives = matrix_of(*drawn).sample_negatives(users, num_negatives, seed=seed, epoch=epoch, examples=users)
    assert drawn_negatives.shape == (len(users), num_negatives)
    for user, row in zip(users, drawn_negatives):
        assert set(row.tolist()) <= set(range(num_items)) - set(rows[user])


@pytest.fixture(scope="module")
def crowded():
    """30 users who know 40 of 50 items, so that most draws are rejected."""
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(50)[:40] for _ in range(30)])
    return InteractionMatrix(np.repeat(np.arange(30), 40), items, 30, 50)


def test_negatives_do_not_depend_on_batch_order_or_size(crowded):
    examples = np.arange(200)
    users = examples % 30
    whole = crowded.sample_negatives(users, 5, seed=1, epoch=2, examples=examples)
    order = np.random.default_rng(1).permutation(200)
    shuffled = crowded.sample_negatives(users[order], 5, seed=1, epoch=2, examples=examples[order])
    assert np.array_equal(shuffled, whole[order])
    single = [crowded.sample_negatives(users[[i]], 5, seed=1, epoch=2, examples=examples[[i]]) for i in range(200)]
    assert np.array_equal(np.concatenate(single), whole)


def test_negatives_change_with_seed_epoch_and_example(crowded):
    users = np.zeros(100, dtype=np.int64)
    draw = crowded.sample_negatives
    base = draw(users, 4, seed=1, epoch=1, examples=np.arange(100))
    for other in (
        draw(users, 4, seed=2, epoch=1, examples=np.arange(100)),
        draw(users, 4, seed=1, epoch=2, examples=np.arange(100)),
        draw(users, 4, seed=1, epoch=1, examples=np.arange(100, 200)),
    ):
        # Ten candidates: one in ten agrees by chance.
        assert (base == other).mean() < 0.25


def test_negatives_are_uniform_over_the_items_left(crowded):
    count = 20_000
    negatives = crowded.sample_negatives(np.zeros(count, dtype=np.int64), 1, seed=0, epoch=0, examples=np.arange(count))
    free = np.setdiff1d(np.arange(50), crowded.of(0))
    observed = np.bincount(negatives[:, 0], minlength=50)[free]
    expected = count / len(free)
    assert ((observed - expected) ** 2 / expected).sum() < 28  # chi-square with 9 degrees of freedom, p = 0.001


def test_negatives_of_disjoint_streams_are_independent(crowded):
    count = 4000
    users, examples = np.arange(count) % 30, np.arange(count)
    one = crowded.sample_negatives(users, 1, seed=0, epoch=0, examples=examples, first_draw=0)
    two = crowded.sample_negatives(users, 1, seed=0, epoch=0, examples=examples, first_draw=1)
    assert abs((one == two).mean() - 0.1) < 0.03


def test_a_user_with_every_item_has_no_negative():
    matrix = InteractionMatrix([0, 1, 1, 1], [2, 0, 1, 2], 2, 3)
    with pytest.raises(ValueError, match="user row 1 has interacted with all 3 items.*remove this user or add items"):
        matrix.sample_negatives(np.array([0, 1]), 1, seed=0, epoch=0, examples=np.arange(2))


def test_a_user_with_repeated_interactions_still_gets_the_item_that_is_left():
    matrix = InteractionMatrix([0, 0, 0, 0], [2, 2, 0, 2], 1, 3)
    negatives = matrix.sample_negatives(np.zeros(50, dtype=np.int64), 2, seed=0, epoch=0, examples=np.arange(50))
    assert (negatives == 1).all()


def test_a_user_who_repeatedly_met_all_items_has_no_negative():
    matrix = InteractionMatrix([0, 0, 0], [0, 1, 0], 1, 2)
    with pytest.raises(ValueError, match="has interacted with all 2 items"):
        matrix.sample_negatives(np.array([0]), 1, seed=0, epoch=0, examples=np.arange(1))


def test_negatives_that_are_drawn_again_do_not_depend_on_each_other():
    # Of 200 items two are left, so nearly every negative is drawn many times.
    matrix = InteractionMatrix([0] * 198, range(198), 1, 200)
    one, other = matrix.sample_negatives(np.zeros(2, dtype=np.int64), 200, seed=0, epoch=0, examples=np.arange(2))
    assert set(one) == set(other) == {198, 199}
    halves = one == 198, other == 198, one == other, one[1:] == other[:-1]
    assert all(60 < half.sum() < 140 for half in halves)
