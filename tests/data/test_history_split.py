import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.data.history_split import shuffled_order, split_histories
from tokenrec_hf.models.embedding_store import Ragged

histories = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=6)


def ragged(lists):
    return Ragged.from_lengths(
        np.array([len(one) for one in lists]), np.array([item for one in lists for item in one], dtype=np.int64)
    )


def lists_of(values):
    return [values.values[a:b].tolist() for a, b in zip(values.indptr, values.indptr[1:])]


def split(lists, longest, num_targets, shuffle, seed=0, epoch=0):
    users = np.arange(len(lists)) + 10
    draws = {"seed": seed, "epoch": epoch, "order_draw": 0, "size_draw": 1}
    return split_histories(
        ragged(lists), users, longest_past=np.array(longest), num_targets=num_targets, shuffle=shuffle, **draws
    )


@given(histories, st.data(), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_the_targets_follow_the_past_in_the_order_of_the_history(lists, data, num_targets, shuffle, seed):
    longest = [data.draw(st.integers(0, max(len(one) - 1, 0))) for one in lists]
    found = split(lists, longest, num_targets, shuffle, seed)
    positions = iter(found.positions.tolist())
    for history, most, past, targets in zip(lists, longest, lists_of(found.past), lists_of(found.targets)):
        assert bool(past) == bool(most) and len(past) <= most
        assert [history[next(positions)] for _ in past] == past
        if not shuffle:
            assert past == history[: len(past)]
            first = len(past) if most else max(len(history) - num_targets, 0)
            assert targets == history[first : first + num_targets]
        else:
            assert len(targets) == min(num_targets, len(history) - len(past))
            remaining = list(history)
            for item in past + targets:
                remaining.remove(item)


def test_the_size_of_the_past_is_uniform_and_belongs_to_the_user():
    lists = [list(range(6))] * 3000
    sizes = split(lists, [5] * 3000, 1, True).past.lengths
    counts = np.bincount(sizes, minlength=6)[1:]
    assert ((counts - 600) ** 2 / 600).sum() < 18.5  # chi-square with 4 degrees of freedom, p = 0.001
    assert (split(lists[:7], [5] * 7, 1, True).past.lengths == sizes[:7]).all()
    assert (split(lists, [5] * 3000, 1, True, epoch=1).past.lengths != sizes).any()


def test_a_number_of_targets_for_each_history_is_accepted():
    found = split([[1, 2, 3], [4, 5, 6]], [1, 1], np.array([1, 2]), False)
    assert lists_of(found.targets) == [[2], [5, 6]]


def test_a_shuffled_order_keeps_histories_together_and_is_random_within_them():
    histories = ragged([list(range(50)), [], list(range(50))])
    users = np.array([4, 2, 9])
    orders = [shuffled_order(users, histories.rows, histories.ranks, seed, 0, 0).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order[:50]) == list(range(50)) and sorted(order[50:]) == list(range(50, 100))
        assert order[:50] != sorted(order[:50])
        assert order[:50] != [place - 50 for place in order[50:]]
