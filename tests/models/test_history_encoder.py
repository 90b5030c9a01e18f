import shutil

import numpy as np
import pytest
import torch

from tokenrec_hf import EmbeddingStore, FISMConfig, FISMModel, HistoryEncoder
from tokenrec_hf.models.codes import IdIndex


@pytest.fixture(params=[{}, {"half_life": 3.0}, {"half_life": 3.0, "recent_half_life": 0.5}], ids=str)
def model(request):
    torch.manual_seed(0)
    return FISMModel(FISMConfig(embedding_dim=6, num_users=0, num_items=5, num_interactions=0, **request.param)).eval()


@pytest.fixture
def encoder(model):
    return HistoryEncoder(model, IdIndex(list("abcde")))


def naive(model, history):
    """p of item rows with their ages, from the equation in the docstring of FISMModel."""
    config, total = model.config, np.zeros(6)
    for row, age in history:
        weight = 1 if config.half_life is None else 2 ** (-age / config.half_life)
        total += weight * model.history_table.weight[row].detach().numpy()
        if model.recent_table is not None:
            total += 2 ** (-age / config.recent_half_life) * model.recent_table.weight[row].detach().numpy()
    return total / np.linalg.norm(total)


def test_a_vector_is_that_of_the_equation(model, encoder):
    vectors, known = encoder.encode([["a", "c", "e"], ["b"]])
    assert known.tolist() == [True, True]
    expected = [naive(model, [(0, 2), (2, 1), (4, 0)]), naive(model, [(1, 0)])]
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-6)


def test_items_that_it_does_not_know_make_the_others_older_and_say_nothing(model, encoder):
    vectors, known = encoder.encode([["a", "new", "c", "newer"], ["new"], []])
    assert known.tolist() == [True, False, False]
    np.testing.assert_allclose(vectors[0].numpy(), naive(model, [(0, 3), (2, 1)]), atol=1e-6)
    assert not vectors[1:].any()


def test_there_may_be_no_histories(encoder):
    vectors, known = encoder.encode([])
    assert vectors.shape == (0, 6) and known.shape == (0,)


def test_ids_and_items_must_be_as_many(model):
    with pytest.raises(ValueError, match="there are 4 ids for 5 items"):
        HistoryEncoder(model, IdIndex(list("abcd")))


def test_it_makes_of_seen_items_the_vectors_that_training_left(fism_repository):
    store = EmbeddingStore.open(fism_repository)
    vectors, known = HistoryEncoder.from_pretrained(fism_repository).encode(store.seen(store.ids("user")))
    assert known.all()
    torch.testing.assert_close(vectors, store.vectors("user"), rtol=0, atol=1e-5)


def test_what_is_saved_has_the_items_and_nobody_s_history(fism_repository, tmp_path):
    encoder = HistoryEncoder.from_pretrained(fism_repository)
    encoder.save_pretrained(tmp_path / "collaborative")
    again = HistoryEncoder.from_pretrained(tmp_path)
    assert again.model.config.num_users == 0 and again.model.edge_items.numel() == 0
    assert again.items.ids() == encoder.items.ids()
    histories = EmbeddingStore.open(fism_repository).seen(["u001", "u002"])
    assert torch.equal(again.encode(histories)[0], encoder.encode(histories)[0])
    # The one that was saved goes on as it was.
    assert encoder.model.edge_items.numel() > 0


def test_other_models_and_folders_have_none(trained_repository, fism_repository, tmp_path):
    assert HistoryEncoder.from_pretrained(trained_repository) is None
    assert HistoryEncoder.from_pretrained(tmp_path) is None
    shutil.copytree(fism_repository, tmp_path / "old")
    (tmp_path / "old" / "collaborative" / "ids.safetensors").unlink()
    assert HistoryEncoder.from_pretrained(tmp_path / "old") is None
