import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf import fold_in as module
from tokenrec_hf.configuration_collaborative import FISMConfig
from tokenrec_hf.fold_in import align, fold_in, fold_in_history_tables
from tokenrec_hf.modeling_collaborative import FISMModel


def random_interactions(generator, num_users, num_items, per_user):
    """Each user with some different items, and each item with a user."""
    pairs = {(user, item) for user in range(num_users) for item in generator.choice(num_items, per_user, replace=False)}
    pairs |= {(item % num_users, item) for item in range(num_items)}
    return np.array(sorted(pairs)).T


def naive_features(own, other, links):
    """x = sum of the neighbours' vectors / sqrt(d d'), node by node, and what of it goes through the node itself."""
    mine = {row: [b for a, b in links if a == row] for row in range(len(own))}
    theirs = {row: [a for a, b in links if b == row] for row in range(len(other))}
    features, loops = np.zeros(own.shape), np.zeros(len(own))
    for row, neighbours in mine.items():
        for one in neighbours:
            features[row] += other[one] / np.sqrt(len(neighbours) * len(theirs[one]))
            loops[row] += 1 / (len(neighbours) * len(theirs[one]))
    return features, loops


def naive_ridge(x, y):
    gram = x.T @ x
    return np.linalg.solve(gram + module.RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)


def test_new_users_are_the_calibrated_sum_of_their_items():
    generator = np.random.default_rng(0)
    p, q = generator.normal(size=(30, 4)), generator.normal(size=(20, 4))
    users, items = random_interactions(generator, 30, 20, 5)
    history = [3, 7, 7 + 4]
    found, none = fold_in(
        torch.tensor(p),
        torch.tensor(q),
        np.concatenate([users, [30] * 3]),
        np.concatenate([items, history]),
    )
    links = list(zip(users, items))
    x, loops = naive_features(p, q, links)
    y, _ = naive_features(q, p, [(b, a) for a, b in links])
    to_items = naive_ridge(y, q)
    weight = naive_ridge(x - loops[:, None] * (p @ to_items), p)
    degree = np.bincount(items)
    expected = sum(q[item] / np.sqrt(3 * degree[item]) for item in history) @ weight
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    assert none.shape == (0, 4)


def low_rank(seed=0, num_users=400, num_items=300):
    """Vectors of a factor model and interactions of each user with the items it scores highest."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(num_users, 8, generator=generator), torch.randn(num_items, 8, generator=generator)
    items = (p @ q.T).topk(20).indices
    return p, q, np.repeat(np.arange(num_users), 20), items.flatten().numpy()


def test_newcomers_land_near_the_vectors_that_made_their_interactions():
    p, q, users, items = low_rank()
    new_p, _ = fold_in(p[:350], q, users, items)
    cosines = torch.cosine_similarity(new_p, p[350:])
    assert cosines.mean() > 0.9
    seen = items < 250
    known = np.isin(np.arange(300), items[seen])
    order = np.concatenate([np.flatnonzero(known), np.setdiff1d(np.unique(items), np.flatnonzero(known))])
    rows = np.argsort(np.concatenate([order, np.setdiff1d(np.arange(300), order)]))
    _, new_q = fold_in(p, q[order[: known.sum()]], users, rows[items])
    cosines = torch.cosine_similarity(new_q, q[order[known.sum() :]])
    assert len(cosines) > 30 and cosines.mean() > 0.8


def test_newcomers_that_know_only_newcomers_come_second():
    p, q, users, items = low_rank()
    new_p, new_q = fold_in(p, q, np.concatenate([users, [400, 400, 401]]), np.concatenate([items, [5, 300, 300]]))
    # Item 300 is made of user 400, and user 401 of item 300.
    first, _ = fold_in(p, q, np.append(users, 400), np.append(items, 5))
    torch.testing.assert_close(new_p[0], first[0])
    assert torch.isfinite(new_q).all() and torch.isfinite(new_p).all() and new_p[1].norm() > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), order=st.permutations(range(6)))
def test_the_order_of_newcomers_and_of_interactions_does_not_matter(seed, order):
    p, q, users, items = low_rank(seed, 60, 50)
    shuffled = np.random.default_rng(seed).permutation(len(users))
    moved = np.concatenate([np.arange(54), 54 + np.argsort(order)])[users]
    one, _ = fold_in(p[:54], q, users, items)
    two, _ = fold_in(p[:54], q, moved[shuffled], items[shuffled])
    torch.testing.assert_close(two, one[list(order)], rtol=1e-4, atol=1e-5)


def test_whoever_cannot_be_reached_is_named():
    p, q, users, items = low_rank()
    with pytest.raises(ValueError, match="new user in row 401 has no interaction that leads to a known user or item"):
        fold_in(p, q, np.concatenate([users, [400, 401]]), np.concatenate([items, [3, 300]]))


def test_nobody_new_is_nothing_new():
    p, q, users, items = low_rank()
    new_p, new_q = fold_in(p, q, users, items)
    assert new_p.shape == new_q.shape == (0, 8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1_000), size=st.integers(1, 9))
def test_alignment_finds_the_rotation_back(seed, size):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(40, size, generator=generator)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    found = align(old, old @ rotation)
    torch.testing.assert_close(old @ rotation @ found, old, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found @ found.T, torch.eye(size), atol=1e-5, rtol=0)


def test_alignment_is_the_best_of_all_rotations():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(50, 3, generator=generator), torch.randn(50, 3, generator=generator)
    best = (new @ align(old, new) - old).norm()
    for _ in range(200):
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
        assert (new @ rotation - old).norm() >= best - 1e-5


@pytest.mark.parametrize("half_life", [None, 4])
def test_what_new_items_say_is_the_calibrated_sum_of_the_rest_of_their_users(half_life):
    torch.manual_seed(0)
    model = FISMModel(FISMConfig(num_items=40, embedding_dim=6, half_life=half_life, recent_half_life=0.5))
    generator = np.random.default_rng(0)
    histories = [generator.permutation(44)[: generator.integers(2, 9)].tolist() for _ in range(60)]
    histories.append([43])  # has nothing else
    users = np.repeat(np.arange(61), [len(one) for one in histories])
    items = np.concatenate(histories)
    ages = np.concatenate([np.arange(len(one))[::-1] for one in histories])
    found = fold_in_history_tables(model, users, items, ages.copy(), num_trained=40)
    a = model.history_table.weight.detach().double().numpy()
    b = None if half_life is None else model.recent_table.weight.detach().double().numpy()

    def said(item, age):
        return a[item] if b is None else a[item] * 2 ** (-age / half_life) + b[item] * 2 ** (-age / 0.5)

    features, degree = np.zeros((44, 6)), np.zeros(44)
    for history in histories:
        for place, item in enumerate(history):
            rest = np.zeros(6)
            for other, one in enumerate(history):
                if other != place and one < 40:
                    rest = rest + said(one, len(history) - 1 - other)
            features[item] += rest / max(np.linalg.norm(rest), 1e-12)
            degree[item] += 1
    features /= np.sqrt(np.maximum(degree, 1))[:, None]
    had = degree[:40] > 0
    tables = [a] if b is None else [a, b]
    expected = [features[40:] @ naive_ridge(features[:40][had], table[had]) for table in tables]
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
