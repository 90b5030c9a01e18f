"""SASRec's encoder looks at no later item, its loss is over each next item, and its fast parts compute what the plain ones do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.evaluation.sequence import SASRec, padded, windows


@pytest.fixture
def untrained(small):
    """A SASRec that has seen no example, in evaluation."""
    model = SASRec(dim=32)
    model.fit(small, None, epochs=0)
    return model


def test_a_later_item_changes_nothing_before_it(untrained):
    items = torch.arange(8)[None]
    with torch.no_grad():
        before = untrained.encoder(items)
        items[0, 5] = 20
        after = untrained.encoder(items)
    assert before[0, :5].allclose(after[0, :5], atol=1e-6)
    assert not before[0, 5:].allclose(after[0, 5:], atol=1e-3)


def test_each_item_but_the_first_is_predicted_from_those_before_it(untrained, small):
    starts, ends = small.indptr[:4], small.indptr[1:5]
    losses = []
    with torch.no_grad():
        for start, end in zip(starts, ends):
            for position in range(start + 1, end):
                history = torch.from_numpy(small.items[start:position])[None]
                logits = untrained.encoder(history)[0, -1] @ untrained.encoder.items.weight[:25].T
                losses.append(F.cross_entropy(logits, torch.tensor(small.items[position])))
        loss = untrained.loss(starts, ends, 0)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-3)


def test_windows_cover_each_interaction_once_and_overlap_as_asked():
    train = InteractionMatrix(np.repeat(np.arange(4), [1, 5, 6, 14]), np.arange(26), 4, 26)
    starts, ends = windows(train, 5)
    assert sorted(zip(starts.tolist(), ends.tolist())) == [
        (0, 1),
        (1, 6),
        (6, 7),
        (7, 12),
        (12, 16),
        (16, 21),
        (21, 26),
    ]
    starts, ends = windows(train, 5, overlap=1)
    assert sorted(zip(starts.tolist(), ends.tolist())) == [(1, 6), (6, 12), (12, 16), (15, 21), (20, 26)]
    # Each item but the first of a user is a target once.
    targets = np.concatenate([np.arange(start + 1, end) for start, end in zip(starts, ends)])
    assert sorted(targets) == sorted(set(range(26)) - {0, 1, 6, 12})


def test_padding_comes_at_the_end():
    rows = padded(np.arange(10), np.array([0, 4, 9]), np.array([3, 9, 10]), -1)
    assert rows.tolist() == [[0, 1, 2, -1, -1], [4, 5, 6, 7, 8], [9, -1, -1, -1, -1]]
