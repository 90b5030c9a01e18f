"""GTN and LTGNN: they learn, and their propagation is what their papers say."""

import numpy as np
import pytest
import torch
from baselines.closed_forms import Popularity
from baselines.gtn import GTN
from baselines.ltgnn import LTGNN

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation.baselines import evaluate_baseline

USERS, ITEMS = 20, 12


@pytest.fixture(scope="module")
def graph():
    """20 users and 12 items with 70 interactions, all different."""
    chosen = np.random.default_rng(0).choice(USERS * ITEMS, 70, replace=False)
    return InteractionMatrix(chosen // ITEMS, chosen % ITEMS, USERS, ITEMS)


@pytest.fixture(scope="module")
def adjacency(graph):
    """A, normalised by degrees, float64 `[32, 32]`."""
    matrix = np.zeros((USERS + ITEMS, USERS + ITEMS))
    matrix[graph.users, USERS + graph.items] = 1
    matrix += matrix.T
    scale = matrix.sum(axis=1).clip(min=1) ** -0.5
    return torch.from_numpy(scale[:, None] * matrix * scale)


def tables(model):
    return torch.cat([model.user_table.weight, model.item_table.weight]).detach()


@pytest.mark.parametrize("kind", [GTN, LTGNN], ids=lambda kind: kind.name)
def test_it_beats_popularity(kind, demo_splits):
    demo = index_splits(demo_splits, "validation")
    popularity = Popularity()
    popularity.fit(demo.interactions, None)
    baseline = kind(seed=0, **kind.grid[0])
    baseline.batch_size, baseline.max_epochs = 2048, 15
    baseline.fit(demo.interactions, demo.holdout)
    known, learned = (
        evaluate_baseline(one, demo.interactions, demo.holdout)["ndcg@20"] for one in (popularity, baseline)
    )
    assert learned > 2 * known


@pytest.mark.parametrize("kind", [GTN, LTGNN], ids=lambda kind: kind.name)
def test_equal_seeds_give_equal_scores_and_others_do_not(kind, graph):
    scores = []
    for seed in (0, 0, 1):
        baseline = kind(seed=seed, **kind.grid[0])
        baseline.fit(graph, None, epochs=2)
        scores.append(baseline.scores(np.arange(5)))
    assert scores[0].equal(scores[1])
    assert not scores[0].allclose(scores[2])


@pytest.mark.parametrize("smoothness", [0.03, 10.0])
def test_gtn_filters_as_the_naive_algorithm_does(graph, smoothness):
    model = GTN(seed=0).build(graph, smoothness=smoothness, num_layers=4, embedding_dim=8)
    start = tables(model).double().numpy()
    degrees = np.bincount(np.concatenate([graph.users, USERS + graph.items]), minlength=USERS + ITEMS) + 1
    embeddings, dual = start, np.zeros((len(graph), 8))
    for _ in range(4):
        following = np.zeros_like(dual)
        for edge, (user, item) in enumerate(zip(graph.users, USERS + graph.items)):
            difference = embeddings[user] / degrees[user] ** 0.5 - embeddings[item] / degrees[item] ** 0.5
            following[edge] = np.clip(dual[edge] + difference / 2, -smoothness, smoothness)
        dual, embeddings = following, start.copy()
        for edge, (user, item) in enumerate(zip(graph.users, USERS + graph.items)):
            embeddings[user] -= dual[edge] / degrees[user] ** 0.5
            embeddings[item] += dual[edge] / degrees[item] ** 0.5
    assert np.allclose(torch.cat(model.representations()).detach().numpy(), embeddings, atol=1e-5)


def test_gtn_with_many_layers_minimises_its_objective(graph):
    model = GTN(seed=0).build(graph, smoothness=0.05, num_layers=2000, embedding_dim=4)
    start, delta = tables(model), model.incidence()[0] @ torch.eye(USERS + ITEMS)

    def objective(embeddings):
        return 0.5 * (embeddings - start).square().sum() + 0.05 * (delta @ embeddings).abs().sum()

    with torch.no_grad():
        found = torch.cat(model.representations())
        nearby = [found + 0.01 * torch.randn(found.shape) for _ in range(50)]
    assert objective(found) < objective(start)
    assert all(objective(found) < objective(other) for other in nearby)


def test_ltgnn_reaches_the_solution_of_the_pagerank_equation(graph, adjacency):
    model = LTGNN(seed=0).build(graph, restart=0.3, embedding_dim=8)
    identity = torch.eye(USERS + ITEMS, dtype=torch.float64)
    solution = 0.3 * torch.linalg.solve(identity - 0.7 * adjacency, tables(model).double())
    direct = torch.cat([model.user_embeddings(), model.item_embeddings()]).double()
    assert direct.allclose(solution, atol=1e-4)

    model.memory.zero_()
    for _ in range(40):
        step = torch.cat(model.representations()).double()
    assert step.allclose(solution, atol=1e-4)


def test_ltgnn_reaches_the_gradient_of_the_pagerank_equation(graph, adjacency):
    model = LTGNN(seed=0).build(graph, restart=0.3, embedding_dim=8)
    weights = torch.randn(USERS + ITEMS, 8)
    for _ in range(40):
        model.zero_grad()
        (torch.cat(model.representations()) * weights).sum().backward()
    reached = torch.cat([model.user_table.weight.grad, model.item_table.weight.grad]).double()
    identity = torch.eye(USERS + ITEMS, dtype=torch.float64)
    exact = 0.3 * torch.linalg.solve(identity - 0.7 * adjacency, weights.double())
    assert reached.allclose(exact, atol=1e-4)
