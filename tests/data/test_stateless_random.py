import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.data.stateless_random import bounded, stateless_random


def splitmix64(state):
    """The reference finaliser, with Python's unlimited integers."""
    top = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & top
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & top
    return state ^ (state >> 31)


@given(st.integers(0, 2**63), st.integers(0, 2**20), st.lists(st.integers(0, 2**62), max_size=5), st.integers(0, 2**33))
def test_random_numbers_are_a_hash_that_plain_integers_reproduce(seed, epoch, examples, first):
    golden, top = 0x9E3779B97F4A7C15, 2**64 - 1
    run = splitmix64((seed + golden) & top) + splitmix64((epoch + 0xBF58476D1CE4E5B9) & top)
    expected = [
        [splitmix64((splitmix64((run + e * golden) & top) + (first + d + 1) * golden) & top) for d in range(3)]
        for e in examples
    ]
    found = stateless_random(seed, epoch, np.array(examples, dtype=np.int64), 3, first)
    assert found.dtype == np.uint64
    assert found.tolist() == expected


def test_a_stream_continues_where_another_ends():
    examples = np.arange(10)
    whole = stateless_random(3, 4, examples, 8)
    assert np.array_equal(whole[:, 5:], stateless_random(3, 4, examples, 3, first_draw=5))


def test_random_numbers_do_not_repeat_across_seeds_epochs_examples_and_draws():
    examples = np.arange(50)
    drawn = np.concatenate([stateless_random(s, e, examples, 20).ravel() for s in range(5) for e in range(5)])
    assert len(np.unique(drawn)) == 5 * 5 * 50 * 20


def test_random_bits_are_fair():
    drawn = stateless_random(0, 0, np.arange(20_000), 1)[:, 0]
    ones = np.unpackbits(drawn.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.02


def test_bounded_covers_its_range_evenly():
    values = bounded(stateless_random(0, 0, np.arange(70_000), 1)[:, 0], 7)
    counts = np.bincount(values, minlength=7)
    assert values.dtype == np.int64 and len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-square with 6 degrees of freedom, p = 0.001


def test_bounded_takes_a_bound_for_each_number():
    random = stateless_random(0, 0, np.arange(1000), 1)[:, 0]
    bounds = np.arange(1000) % 5 + 1
    assert (bounded(random, bounds) < bounds).all()
