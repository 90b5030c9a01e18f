"""Random numbers without state: a hash of (seed, epoch, example, draw).

Negatives, history splits and prompt choices are drawn from [`stateless_random`]. A draw does not depend on batch size,
worker, process or the step at which training was interrupted, so a resumed run equals an uninterrupted run.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def stateless_random(seed: int, epoch: int, examples: np.ndarray, num_draws: int, first_draw: int = 0) -> np.ndarray:
    """Random 64-bit integers that depend on the arguments only.

    Args:
        seed: the seed of the run.
        epoch: the training epoch, from 0.
        examples: the number of each example, int64 `[n]`.
        num_draws: the number of integers for each example.
        first_draw: the number of the first draw. Disjoint ranges are independent streams.

    Returns:
        uint64 `[n, num_draws]`.
    """
    run = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN) + _mix(np.array([epoch], dtype=np.uint64) + _MIX_1)
    example = _mix(run + np.asarray(examples).astype(np.uint64) * _GOLDEN)
    draws = np.arange(first_draw + 1, first_draw + num_draws + 1, dtype=np.uint64) * _GOLDEN
    return _mix(example[:, None] + draws[None, :])


def bounded(random: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Maps random uint64 to int64 in `[0, bound)`. The bias is bound / 2^64."""
    return (random % np.asarray(bound, dtype=np.uint64)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit integers with output that passes statistical tests."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
