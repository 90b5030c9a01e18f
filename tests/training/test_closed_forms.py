import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models.configuration_tokenrec import FISMConfig
from tokenrec_hf.models.modeling_collaborative import FISMModel
from tokenrec_hf.training import closed_forms as module
from tokenrec_hf.training.closed_forms import UnreachedError, align, fold_in, fold_in_items, smooth_tables


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


def test_cold_start_vectors_land_near_those_that_made_their_interactions():
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


def test_users_and_items_with_only_cold_start_neighbours_come_second():
    p, q, users, items = low_rank()
    new_p, new_q = fold_in(p, q, np.concatenate([users, [400, 400, 401]]), np.concatenate([items, [5, 300, 300]]))
    # Item 300 is made of user 400, and user 401 of item 300.
    first, _ = fold_in(p, q, np.append(users, 400), np.append(items, 5))
    torch.testing.assert_close(new_p[0], first[0])
    assert torch.isfinite(new_q).all() and torch.isfinite(new_p).all() and new_p[1].norm() > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), order=st.permutations(range(6)))
def test_the_order_of_cold_start_rows_and_of_interactions_does_not_matter(seed, order):
    p, q, users, items = low_rank(seed, 60, 50)
    shuffled = np.random.default_rng(seed).permutation(len(users))
    moved = np.concatenate([np.arange(54), 54 + np.argsort(order)])[users]
    one, _ = fold_in(p[:54], q, users, items)
    two, _ = fold_in(p[:54], q, moved[shuffled], items[shuffled])
    torch.testing.assert_close(two, one[list(order)], rtol=1e-4, atol=1e-5)


def test_an_unreached_user_is_named():
    p, q, users, items = low_rank()
    with pytest.raises(
        UnreachedError, match="cold-start user in row 401 has no interaction that leads to a known user or item"
    ):
        fold_in(p, q, np.concatenate([users, [400, 401]]), np.concatenate([items, [3, 300]]))


def test_without_cold_start_rows_nothing_is_returned():
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


def random_histories(seed, num_users, num_items, trained):
    """Histories with items of the training and cold-start items, the last of which come late."""
    generator = np.random.default_rng(seed)
    histories = [generator.permutation(trained)[: generator.integers(3, 9)].tolist() for _ in range(num_users)]
    for number, history in enumerate(histories):
        if number % 3 == 0:
            history.insert(int(generator.integers(len(history) + 1)), trained + number % (num_items - trained))
        if number % 5 == 0:
            history.append(num_items)
    return histories


def flat(histories):
    return np.repeat(np.arange(len(histories)), [len(one) for one in histories]), np.concatenate(histories)


def unit(vector):
    return vector / max(np.linalg.norm(vector), 1e-12)


def naive_sides(histories, trained, half_life, a, q, b):
    """The p of what comes before each interaction, and the direction of the q that come after it, history by history."""
    for history in histories:
        for place, item in enumerate(history):
            earlier = [one for one in history[:place] if one < trained][::-1]
            later = [one for one in history[place + 1 :] if one < trained]
            if half_life is None:
                rest = earlier + later
                yield item, unit(sum(a[rest], np.zeros(a.shape[1]))), unit(sum(q[rest], np.zeros(a.shape[1])))
                continue
            before, after = np.zeros(a.shape[1]), np.zeros(a.shape[1])
            for age, one in enumerate(earlier):
                before += a[one] * 2 ** (-age / half_life) + b[one] * 2 ** (-age / 0.5)
            for distance, one in enumerate(later):
                after += q[one] * 2 ** (-distance / half_life)
            yield item, unit(before), unit(after)


def naive_lengthened(vector, gram):
    basis = np.linalg.eigh(gram)[1]
    basis = basis * np.sign(basis.sum(axis=0))
    mirrored = basis @ (basis.T @ vector)[::-1]
    away = unit(mirrored - mirrored @ unit(vector) * unit(vector))
    return vector + np.sqrt(max(0, 1 - vector @ vector)) * away


def naive_side_features(histories, trained, count, half_life, a, q, b):
    """Features of both sides `[2, count, d]`, of how many interactions they are, and the second moments of what comes before."""
    d = a.shape[1]
    features, numbers, gram = np.zeros((2, count, d)), np.zeros((2, count), dtype=int), np.zeros((d, d))
    for item, *sides in naive_sides(histories, trained, half_life, a, q, b):
        for side, value in enumerate(sides):
            features[side, item] += value
            numbers[side, item] += bool(value.any())
        gram += np.outer(sides[0], sides[0])
    return features / np.sqrt(np.maximum(numbers, 1))[..., None], numbers, gram


def naive_tables(model, count):
    """a, q of length 1, and b or None, of the first items."""
    a, q, *b = (table.weight.detach()[:count].double().numpy() for _, table in model.tables())
    return a, np.array([unit(row) for row in q]), b[0] if b else None


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("half_life", [None, 3])
def test_new_items_are_found_from_what_comes_before_and_after_them(half_life, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    trained, d = 40, 6
    model = FISMModel(FISMConfig(num_items=trained + 2, embedding_dim=d, half_life=half_life, recent_half_life=0.5))
    histories = random_histories(0, 90, trained + 4, trained)
    found = fold_in_items(model, *flat(histories), num_trained=trained)
    a, q, b = naive_tables(model, trained)
    features, numbers, gram = naive_side_features(histories, trained, trained + 5, half_life, a, q, b)
    # Nothing comes after the last of the cold-start items.
    assert numbers[1, -1] == (0 if half_life else numbers[0, -1])
    assert len(found) == len(model.tables())
    known = features[:, :trained]
    for number, (table, rows) in enumerate(zip([a, q, b], found)):
        maps = [naive_ridge(known[side], table) for side in (0, 1)]
        best = 0 if number == 1 else 1
        for item, row in enumerate(rows, start=trained):
            if numbers[best, item]:
                expected = features[best, item] @ maps[best]
            else:
                expected = features[1 - best, item] @ maps[1 - best] * (1 if number == 1 else module.FAINT)
            if number == 1:
                expected = naive_lengthened(unit(expected) * np.linalg.norm(expected) ** module.PREDICTED_LENGTH, gram)
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("half_life", [None, 3])
def test_smoothing_moves_rows_to_what_their_neighbours_say(half_life):
    torch.manual_seed(0)
    config = FISMConfig(num_items=41, embedding_dim=4, half_life=half_life, recent_half_life=0.5)
    config.history_smoothing, config.item_smoothing = 0.75, 0.25
    model = FISMModel(config)
    a, q, b = naive_tables(model, 41)
    histories = [[item for item in one if item < 40] for one in random_histories(0, 60, 44, 40)]
    features, numbers, _ = naive_side_features(histories, 41, 41, half_life, a, q, b)
    both = np.concatenate(features, axis=1)
    had = numbers.any(axis=0)
    assert not had[40]  # without interactions: it stays
    smooth_tables(model, *flat(histories))
    for (_, table), before, share in zip(model.tables(), (a, q, b), (0.75, 0.25, 0.75)):
        expected = (1 - share) * before + share * both @ naive_ridge(both[had], before[had])
        np.testing.assert_allclose(table.weight.detach()[had], expected[had], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(table.weight.detach()[40], before[40], rtol=1e-5)


def test_items_with_only_cold_start_neighbours_come_second_and_unreached_items_get_zeros():
    torch.manual_seed(0)
    model = FISMModel(FISMConfig(num_items=30, embedding_dim=4))
    histories = [*random_histories(1, 60, 31, 30), [30, 32], [33], [33, 34]]
    for rows in fold_in_items(model, *flat(histories), num_trained=30):
        assert rows.shape == (5, 4)
        assert rows[:3].any(dim=1).all()
        assert not rows[3:].any()
    assert [len(rows) for rows in fold_in_items(model, *flat(histories[:10]), num_trained=32)] == [0, 0]


def test_new_items_are_ranked_like_items_of_the_training():
    # Two groups of users, each with items of its own; FISM knows half of the items.
    generator = np.random.default_rng(0)
    taste = torch.nn.functional.normalize(torch.tensor([[3.0, 1, 0, 0], [-3.0, 1, 0, 0]]), dim=-1)
    kind = torch.arange(80) % 2
    rows = torch.nn.functional.normalize(taste[kind] + 0.8 * torch.randn(80, 4, generator=torch.manual_seed(0)), dim=-1)
    model = FISMModel(FISMConfig(num_items=40, embedding_dim=4))
    with torch.no_grad():
        model.history_table.weight.copy_(rows[:40])
        model.item_table.weight.copy_(rows[:40])
    histories = [(2 * generator.permutation(40)[:8] + user % 2).tolist() for user in range(200)]
    q = fold_in_items(model, *flat(histories), num_trained=40)[1]
    torch.testing.assert_close(q.norm(dim=1), torch.ones(40))
    users = taste[torch.arange(40) % 2]
    # Those of the own kind before the others, and not before all that have been trained.
    own, other = (users * q).sum(dim=1), (users.flip(0) * q).sum(dim=1)
    assert (own > other).float().mean() > 0.95
    trained = (users * rows[:40]).sum(dim=1)
    assert abs(own.mean() - trained.mean()) < 0.15
