"""The data sets of the stages: their draws, new in each epoch and repeatable."""

import numpy as np
import pytest
import torch

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.modeling_collaborative import FISMModel
from tokenrec_hf.training.datasets import (
    NEXT_ITEMS,
    HistoryDataset,
    InteractionDataset,
    LengthGroupedSampler,
    past_user_embeddings,
)


def test_negatives_of_the_collaborative_stage_are_new_in_each_epoch_and_never_interactions():
    random = np.random.default_rng(0)
    pairs = [(user, item) for user in range(20) for item in random.permutation(30)[:6]]
    interactions = InteractionMatrix(*np.array(pairs).T, 20, 30)
    dataset = InteractionDataset(interactions, 5, seed=0)
    assert len(dataset) == len(interactions)
    rows = list(range(len(dataset)))
    first = dataset.__getitems__(rows)
    assert not interactions.contains(first["user_ids"].numpy()[:, None], first["negative_ids"].numpy()).any()
    pairs = set(zip(first["user_ids"].tolist(), first["labels"].tolist()))
    assert pairs == set(zip(interactions.users.tolist(), interactions.items.tolist()))
    # A draw belongs to its interaction, whatever the batch.
    assert torch.equal(dataset.__getitems__(rows[5:9])["negative_ids"], first["negative_ids"][5:9])
    dataset.set_epoch(1)
    assert not torch.equal(dataset.__getitems__(rows)["negative_ids"], first["negative_ids"])


@pytest.mark.parametrize("ordered", [True, False])
def test_histories_are_split_anew_in_every_epoch_into_past_and_other_items(ordered):
    random = np.random.default_rng(0)
    histories = [random.permutation(20)[: 1 + user].tolist() for user in range(12)]
    pairs = [(user, item) for user, history in enumerate(histories) for item in history]
    dataset = HistoryDataset(InteractionMatrix(*np.array(pairs).T, 12, 20), ordered, 0, seed=3)
    assert dataset.users.tolist() == list(range(1, 12))
    sizes = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(list(range(len(dataset))))
        for row, user in enumerate(batch["user_ids"].tolist()):
            mine = batch["history_rows"] == row
            known, ages = batch["history_items"][mine].tolist(), batch["history_ages"][mine].tolist()
            wanted = [item for item in batch["labels"][row].tolist() if item != -100]
            sizes.add((user, len(known)))
            if ordered:
                assert known + wanted == histories[user][: len(known) + min(NEXT_ITEMS, user + 1 - len(known))]
                assert ages == list(reversed(range(len(known))))
            else:
                assert sorted(known + wanted) == sorted(histories[user])
                assert ages == [len(histories[user]) - 1 - histories[user].index(item) for item in known]
    assert {size for user, size in sizes if user == 3} == {1, 2, 3}


def test_users_of_histories_get_negatives_of_their_own():
    interactions = InteractionMatrix(np.repeat(np.arange(6), 3), np.arange(18), 6, 20)
    dataset = HistoryDataset(interactions, True, 4, seed=3)
    first = dataset.__getitems__([0, 1, 2, 3])
    assert first["negative_ids"].shape == (4, 4)
    assert not interactions.contains(first["user_ids"].numpy()[:, None], first["negative_ids"].numpy()).any()
    assert torch.equal(dataset.__getitems__([2, 3])["negative_ids"], first["negative_ids"][2:])
    dataset.set_epoch(1)
    assert not torch.equal(dataset.__getitems__([0, 1, 2, 3])["negative_ids"], first["negative_ids"])


def test_examples_of_like_length_share_a_batch_in_an_order_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 1030)
    sampler = LengthGroupedSampler(lambda epoch: lengths, 1030, 10, seed=0)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1030))
    other = list(LengthGroupedSampler(lambda epoch: lengths, 1030, 10, seed=1))
    assert orders[1] == orders[2] and orders[0] != orders[1] and other != orders[0]
    batches = lengths[np.array(orders[0]).reshape(-1, 10)]
    spread = (batches.max(1) - batches.min(1)).mean()
    at_random = lengths[:1030].reshape(-1, 10)
    assert spread < 0.2 * (at_random.max(1) - at_random.min(1)).mean()
    # Within a group too, the batches come in a random order.
    assert 0.3 < (np.diff(batches[: LengthGroupedSampler.GROUP].mean(1)) < 0).mean() < 0.7


def test_examples_are_grouped_by_their_lengths_in_the_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, (2, 100))
    sampler = LengthGroupedSampler(lambda epoch: lengths[epoch], 100, 10, seed=0)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = lengths[epoch][np.array(list(sampler)).reshape(-1, 10)]
        assert sorted(zip(batches.min(1), batches.max(1))) == [
            (part.min(), part.max()) for part in np.sort(lengths[epoch]).reshape(-1, 10)
        ]


@pytest.mark.parametrize("half_life", [None, 2])
def test_vectors_of_pasts_are_those_of_parts_of_the_histories(half_life):
    users, items = np.array([0, 0, 0, 1, 2, 2]), np.array([3, 1, 2, 0, 1, 3])
    interactions = InteractionMatrix(users, items, 3, 4)
    config = FISMModel.config_class(embedding_dim=5, half_life=half_life)
    model = FISMModel.from_interactions(config, interactions)
    table = model.history_table.weight.detach()
    weight = 1.0 if half_life is None else 2 ** (-1 / half_life)
    parts = {0: [[3], [1], [2], [3, 1], [3, 2], [1, 2]], 2: [[1], [3]]}
    if half_life:
        parts = {0: [[3], [3, 1]], 2: [[1]]}
    possible = {
        user: [
            torch.nn.functional.normalize(sum(table[i] * weight**age for age, i in enumerate(part[::-1])), dim=0)
            for part in mine
        ]
        for user, mine in parts.items()
    }
    found = past_user_embeddings(model, interactions, 20)
    assert found.shape == (40, 5)  # a user with one item has no past
    for vector, user in zip(found, [0, 2] * 20):
        assert any(torch.allclose(vector, one, atol=1e-5) for one in possible[user])
    assert len(found.unique(dim=0)) > 2
    assert len(past_user_embeddings(model, interactions, 0)) == 0
