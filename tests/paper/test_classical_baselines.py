"""The baselines that know no order and no language: they learn, and they compute what their papers say."""

import numpy as np
import pytest
import torch
from baselines.base import TRIALS
from baselines.closed_forms import EASE, ItemKNN, Popularity
from baselines.ials import IALS
from baselines.lightgcn import LightGCN
from baselines.mf_bpr import MFBPR
from baselines.neumf import NeuMF, NeuMFModel
from baselines.registry import BASELINES, load_baseline

from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation.baselines import evaluate_baseline

LEARNERS = (ItemKNN, EASE, IALS, MFBPR, NeuMF, LightGCN)


@pytest.fixture(scope="module")
def demo(demo_splits):
    return index_splits(demo_splits, "validation")


@pytest.mark.parametrize("kind", LEARNERS, ids=lambda kind: kind.name)
def test_it_beats_popularity(kind, demo):
    popularity = Popularity()
    popularity.fit(demo.interactions, None)
    baseline = kind(seed=0, **kind.grid[0])
    baseline.max_epochs = 30
    baseline.fit(demo.interactions, demo.holdout)
    known, learned = (
        evaluate_baseline(one, demo.interactions, demo.holdout)["ndcg@20"] for one in (popularity, baseline)
    )
    assert learned > 2 * known


@pytest.mark.parametrize("kind", [IALS, MFBPR, NeuMF, LightGCN], ids=lambda kind: kind.name)
def test_equal_seeds_give_equal_scores_and_others_do_not(kind, small):
    scores = []
    for seed in (0, 0, 1):
        baseline = kind(seed=seed, **kind.grid[0])
        baseline.fit(small, None, epochs=2)
        scores.append(baseline.scores(np.arange(60)))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("kind", [MFBPR, NeuMF, LightGCN], ids=lambda kind: kind.name)
def test_the_best_epoch_on_validation_is_kept_and_a_refit_of_its_length_is_the_same(kind, demo):
    selected, again = (kind(seed=3, **kind.grid[0]) for _ in range(2))
    selected.max_epochs, selected.every = 12, 3
    selected.fit(demo.interactions, demo.holdout)
    assert selected.epochs in (3, 6, 9, 12)
    again.fit(demo.interactions, None, selected.epochs)
    users = np.arange(20)
    torch.testing.assert_close(again.scores(users), selected.scores(users))


def test_neumf_scores_all_items_as_its_layers_do_for_each_pair():
    torch.manual_seed(0)
    model = NeuMFModel(5, 7, dim=4, dropout=0.5).eval()
    users = torch.tensor([4, 0, 2])
    logits = model.all_logits(users)
    for row, user in enumerate(users.tolist()):
        for item in range(7):
            pair = torch.cat([model.mlp_users.weight[user], model.mlp_items.weight[item]])
            hidden = torch.relu(model.hidden.weight @ pair + model.hidden.bias)
            deep = torch.relu(model.output.weight @ hidden + model.output.bias)
            product = model.gmf_users.weight[user] * model.gmf_items.weight[item]
            expected = model.predict.weight[0] @ torch.cat([product, deep]) + model.predict.bias[0]
            torch.testing.assert_close(logits[row, item], expected)
            torch.testing.assert_close(model(torch.tensor(user), torch.tensor(item)), expected)


def test_lightgcn_scores_by_the_dot_product_of_its_propagated_vectors(small, dense):
    baseline = LightGCN(num_layers=2, loss_type="bpr", lr=0.01)
    baseline.fit(small, None, epochs=2)
    counts = np.zeros((60, 25))
    np.add.at(counts, (small.users, small.items), 1)
    graph = np.block([[np.zeros((60, 60)), counts], [counts.T, np.zeros((25, 25))]])
    degree = np.maximum(graph.sum(axis=1), 1)
    graph /= np.sqrt(np.outer(degree, degree))
    tables = (baseline.model.user_table.weight, baseline.model.item_table.weight)
    first = torch.cat(tables).detach().double().numpy()
    mean = (first + graph @ first + graph @ graph @ first) / 3
    np.testing.assert_allclose(baseline.scores(np.arange(60)), mean[:60] @ mean[60:].T, atol=1e-4)


def test_lightgcns_softmax_lets_the_different_items_of_a_batch_compete(small):
    torch.manual_seed(0)
    baseline = LightGCN(num_layers=1, loss_type="softmax", temperature=0.2)
    baseline.model = baseline.build(small, **baseline.settings)
    rows = np.array([0, 5, 9, 30, 31, 50])
    users, items = (torch.nn.functional.normalize(one).detach() for one in baseline.model.representations())
    competitors = sorted(set(small.items[rows].tolist()))
    losses = []
    for user, item in zip(small.users[rows], small.items[rows]):
        scores = [float(users[user] @ items[other]) / 0.2 for other in competitors]
        losses.append(np.log(np.exp(scores).sum()) - scores[competitors.index(item)])
    assert baseline.loss(small, rows, epoch=0).item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_of_the_command_line_has_one_setting_or_as_many_as_all_others(name):
    kind = load_baseline(name)
    assert kind.name == name
    assert len(kind.grid) in (1, TRIALS)
    assert len({str(settings) for settings in kind.grid}) == len(kind.grid)


def test_an_unknown_baseline_gets_a_sentence():
    with pytest.raises(ValueError, match="there is no baseline 'nope'; choose among popularity"):
        load_baseline("nope")
