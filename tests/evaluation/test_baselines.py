"""The baselines in closed form compute what their papers say; a comparison is paired and tuned on validation."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from tokenrec_hf import Repository, leave_one_out
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation import baselines
from tokenrec_hf.evaluation.baselines import (
    BASELINES,
    EASE,
    IALS,
    ItemKNN,
    Popularity,
    baseline_ranks,
    best_settings,
    evaluate_baseline,
)
from tokenrec_hf.evaluation.metrics import hit_rate, ndcg
from tokenrec_hf.evaluation.sequence import SASRec
from tokenrec_hf.repository import comparison
from tokenrec_hf.repository.comparison import bootstrap, compare


@pytest.fixture(params=[1024, 7])
def blocks(monkeypatch, request):
    """Matrices in one block and in several."""
    monkeypatch.setattr(baselines, "ROWS", request.param)


def test_popularity_is_the_number_of_interactions(small):
    assert Popularity(small).scores(np.array([3, 7])).tolist() == [np.bincount(small.items, minlength=25).tolist()] * 2


@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_knn_sums_the_similarities_of_the_nearest_neighbours(neighbours, small, dense, blocks):
    expected = np.zeros((60, 25))
    for item in range(25):
        similarity = np.zeros(25)
        for other in range(25):
            common, both = dense[:, item] @ dense[:, other], dense[:, item].sum() * dense[:, other].sum()
            if item != other and common:
                similarity[other] = common / (np.sqrt(both) + 2)
        nearest = sorted(range(25), key=lambda other: (-np.float32(similarity[other]), other))[:neighbours]
        expected[:, item] = dense[:, nearest] @ similarity[nearest]
    users = np.random.default_rng(1).permutation(60)
    found = ItemKNN(small, neighbours=neighbours, shrinkage=2).scores(users)
    np.testing.assert_allclose(found, expected[users], atol=1e-6)


def test_ease_is_the_ridge_regression_of_each_item_on_the_others(small, dense, blocks):
    weights = np.zeros((25, 25))
    for item in range(25):
        others = np.delete(np.arange(25), item)
        gram = dense[:, others].T @ dense[:, others] + 3 * np.eye(24)
        weights[others, item] = np.linalg.solve(gram, dense[:, others].T @ dense[:, item])
    np.testing.assert_allclose(EASE(small, l2=3).scores(np.arange(60)), dense @ weights, atol=1e-4)


def test_ials_ends_where_each_vector_solves_its_weighted_least_squares_problem(small, dense, monkeypatch):
    monkeypatch.setattr(IALS, "iterations", 200)
    baseline = IALS(small, factors=4, weight=5, l2=1)
    users, items = baseline.user_vectors.double().numpy(), baseline.item_vectors.double().numpy()
    for own, other, matrix in ((users, items, dense), (items, users, dense.T)):
        for vector, row in zip(own, matrix):
            confidence = np.where(row > 0, 5.0, 1.0)
            gram = other.T @ (confidence[:, None] * other) + np.eye(4)
            np.testing.assert_allclose(vector, np.linalg.solve(gram, other.T @ (confidence * row)), atol=2e-3)
    np.testing.assert_allclose(baseline.scores(np.arange(60)), users @ items.T, atol=1e-5)


@pytest.mark.parametrize("kind", BASELINES.values())
def test_an_item_is_ranked_among_those_that_its_user_has_not_seen(kind, demo_splits):
    data = index_splits(demo_splits, "validation")
    data.holdout.users, data.holdout.targets = data.holdout.users[:300], data.holdout.targets[:300]
    baseline = kind(data.interactions, factors=8) if kind is IALS else kind(data.interactions)
    expected = []
    for user, target in zip(data.holdout.users, data.holdout.targets):
        scores = baseline.scores(np.array([user]))[0].clone()
        scores[data.interactions.of(user)] = -torch.inf
        expected.append(int((scores >= scores[target]).sum()) - 1)
    assert baseline_ranks(baseline, data.interactions, data.holdout).tolist() == expected
    assert evaluate_baseline(baseline, data.interactions, data.holdout)["ndcg@20"] == pytest.approx(
        ndcg(torch.tensor(expected), 20)
    )


def test_the_best_settings_are_those_of_the_best_ndcg_on_the_held_out_items(demo_splits):
    data = index_splits(demo_splits, "validation")
    train = data.interactions
    measured = [ndcg(baseline_ranks(EASE(train, **one), train, data.holdout), 20) for one in EASE.grid]
    assert best_settings(EASE, data) == EASE.grid[int(np.argmax(measured))]
    assert len(set(measured)) == len(EASE.grid)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        mean, low, high = bootstrap(random.normal(0.3, 1, 200), seed)
        assert low < mean < high
        held += low <= 0.3 <= high
    assert 88 <= held <= 100
    assert bootstrap(np.full(50, 0.25)) == [0.25, 0.25, 0.25]
    values = random.random(80)
    assert bootstrap(values, 1) == bootstrap(values, 1) != bootstrap(values, 2)


@pytest.fixture
def short(monkeypatch):
    """LightGCN and SASRec are trained for a few epochs, and iALS is small."""
    monkeypatch.setattr(IALS, "grid", ({"factors": 16, "weight": 10, "l2": 3},))
    monkeypatch.setattr(SASRec, "max_epochs", 4)
    quick = {"num_layers": 1, "dropout": 0.1, "learning_rate": 0.01}
    monkeypatch.setattr(SASRec, "grid", ({**quick, "batch_size": 64}, {**quick, "batch_size": 1000}))
    train = comparison.train_collaborative
    few = {"num_train_epochs": 4, "per_device_train_batch_size": 512, "learning_rate": 0.02}

    def trained(interactions, settings, *others, **more):
        return train(interactions, settings.model_copy(update={"training": few, "evaluate_every": 2}), *others, **more)

    monkeypatch.setattr(comparison, "train_collaborative", trained)


def test_a_repository_is_compared_on_the_test_items_it_was_measured_on(
    demo_splits, trained_repository, tmp_path, short
):
    repository = Repository(shutil.copytree(trained_repository, tmp_path / "out"))
    found = compare(demo_splits, repository)
    methods = {one["name"]: one for one in found["methods"]}
    assert list(methods) == [*BASELINES, "lightgcn", "sasrec", "collaborative_cosine", "tokenrec"]
    assert json.loads(repository.record("comparison").read_text()) == found
    assert methods["lightgcn"]["ndcg@20"] > 2 * methods["popularity"]["ndcg@20"]
    assert methods["sasrec"]["ndcg@20"] > 1.5 * methods["popularity"]["ndcg@20"]
    assert (found["users"], found["reference"]) == (1000, "tokenrec")
    for name in ("popularity", "collaborative_cosine", "tokenrec"):
        for metric in ("hr@20", "ndcg@20"):
            assert methods[name][metric] == pytest.approx(repository.metrics["test"][name][metric], abs=1e-6)
    assert methods["tokenrec"]["difference"] is None
    mean, low, high = methods["popularity"]["difference"]["hr@20"]
    assert mean == pytest.approx(methods["popularity"]["hr@20"] - methods["tokenrec"]["hr@20"]) and low < mean < high


def test_without_a_repository_the_best_baseline_is_the_reference(monkeypatch, short):
    rows = [(f"u{user}", f"i{(user % 2) * 10 + (user + step) % 10}") for user in range(40) for step in range(6)]
    splits = leave_one_out(Dataset.from_dict({"user_id": [u for u, _ in rows], "item_id": [i for _, i in rows]}))
    found = compare(splits)
    best = max(found["methods"], key=lambda one: one["ndcg@20"])
    assert [one["name"] for one in found["methods"]] == [*BASELINES, "lightgcn", "sasrec"]
    assert found["reference"] == best["name"] != "popularity" and best["difference"] is None
    assert found["methods"][4]["settings"]["epochs"] in (2, 4) and found["methods"][5]["settings"]["epochs"] in (2, 4)
    test = index_splits(splits, "test")
    ease = EASE(test.interactions, **found["methods"][2]["settings"])
    ranks = baseline_ranks(ease, test.interactions, test.holdout)
    assert found["methods"][2]["hr@20"] == hit_rate(ranks, 20)
    monkeypatch.setattr(comparison, "MOST_ITEMS", 19)
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    said = []
    assert [one["name"] for one in compare(splits, log=said.append)["methods"]] == [
        *("popularity", "itemknn", "lightgcn", "sasrec")
    ]
    assert 'iALS is left out: it needs pip install "tokenrec-hf[compare]"' in said
    assert "EASE is left out: 20 items are more than 19" in said
