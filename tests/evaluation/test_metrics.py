import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenrec_hf.evaluation.metrics import (
    RankingMetrics,
    evaluate_embeddings,
    hit_rate,
    mrr,
    ndcg,
    target_ranks,
    weighted_ranks,
)

DATA = Path(os.environ.get("TOKENREC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")


def naive_masked(scores, target, seen):
    """The scores of one user, with -inf for seen items other than the target."""
    masked = [float(score) for score in scores]
    for item in seen:
        if item != target:
            masked[item] = -math.inf
    return masked


def naive_rank(scores, target, seen):
    masked = naive_masked(scores, target, seen)
    return sum(score >= masked[target] for item, score in enumerate(masked) if item != target)


def naive_metrics(scores, targets, seen, top_ks, popularity):
    """Every metric by a loop over users, from its definition."""
    users, num_items = len(targets), len(popularity)
    results = {}
    for k in top_ks:
        hits = gains = reciprocals = popular = 0.0
        recommended = set()
        for own, target, items in zip(scores, targets, seen):
            rank = naive_rank(own, target, items)
            if rank < k:
                hits, gains, reciprocals = hits + 1, gains + 1 / math.log2(rank + 2), reciprocals + 1 / (rank + 1)
            masked = naive_masked(own, target, items)
            best = sorted((-score, item) for item, score in enumerate(masked) if score > -math.inf)[:k]
            recommended |= {item for _, item in best}
            popular += sum(popularity[item] for _, item in best) / len(best)
        results |= {f"hr@{k}": hits / users, f"ndcg@{k}": gains / users, f"mrr@{k}": reciprocals / users}
        results[f"coverage@{k}"] = len(recommended) / num_items
        results[f"popularity@{k}"] = popular / users / max(popularity) if max(popularity) else 0.0
    return results


def as_pairs(seen):
    return (
        torch.tensor([row for row, items in enumerate(seen) for _ in items], dtype=torch.int64),
        torch.tensor([item for items in seen for item in items], dtype=torch.int64),
    )


@st.composite
def rankings(draw):
    """Scores with many ties, targets, and seen items, some of them twice, some of them the target."""
    users, num_items = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    scores = draw(hnp.arrays(np.float32, (users, num_items), elements=st.integers(-3, 3)))
    one = st.integers(0, num_items - 1)
    targets = draw(st.lists(one, min_size=users, max_size=users))
    seen = draw(st.lists(st.lists(one, max_size=8), min_size=users, max_size=users))
    return scores, targets, seen


@given(case=rankings())
def test_ranks_agree_with_a_loop_over_users(case):
    scores, targets, seen = case
    before = scores.copy()
    ranks = target_ranks(torch.from_numpy(scores), torch.tensor(targets), as_pairs(seen))
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [naive_rank(*one) for one in zip(scores, targets, seen)]
    assert (scores == before).all()


@settings(deadline=None)
@given(case=rankings(), top_ks=st.lists(st.integers(1, 15), min_size=1, max_size=3, unique=True), data=st.data())
def test_streamed_metrics_agree_with_a_loop_over_users(case, top_ks, data):
    scores, targets, seen = case
    popularity = data.draw(hnp.arrays(np.int64, scores.shape[1], elements=st.integers(0, 9)))
    cut = data.draw(st.integers(0, len(targets)))
    metrics = RankingMetrics(scores.shape[1], top_ks, popularity)
    for part in (slice(0, cut), slice(cut, None)):
        metrics.update(scores[part], np.array(targets[part], dtype=np.int64), as_pairs(seen[part]))
    expected = naive_metrics(scores, targets, seen, top_ks, popularity.tolist())
    assert metrics.compute() == pytest.approx(expected)
    ranks_only = RankingMetrics(scores.shape[1], top_ks)
    for part in (slice(0, cut), slice(cut, None)):
        ranks_only.update(scores[part], np.array(targets[part], dtype=np.int64), as_pairs(seen[part]))
    assert ranks_only.compute() == pytest.approx(
        {name: value for name, value in expected.items() if name.split("@")[0] in ("hr", "ndcg", "mrr")}
    )


@given(ranks=st.lists(st.integers(0, 40), min_size=1), k=st.integers(1, 50))
def test_single_metrics_agree_with_their_definitions(ranks, k):
    first = [rank for rank in ranks if rank < k]
    assert hit_rate(torch.tensor(ranks), k) == pytest.approx(len(first) / len(ranks))
    assert ndcg(np.array(ranks), k) == pytest.approx(sum(1 / math.log2(rank + 2) for rank in first) / len(ranks))
    assert mrr(torch.tensor(ranks), k) == pytest.approx(sum(1 / (rank + 1) for rank in first) / len(ranks))


def test_a_model_that_scores_everything_alike_earns_nothing():
    ranks = target_ranks(torch.zeros(4, 50), torch.tensor([0, 1, 25, 49]))
    assert ranks.tolist() == [49] * 4
    assert hit_rate(ranks, 20) == ndcg(ranks, 20) == mrr(ranks, 20) == 0


def test_seen_items_do_not_stand_before_the_target():
    scores, targets = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([2])
    assert target_ranks(scores, targets).tolist() == [2]
    assert target_ranks(scores, targets, ([0, 0], [0, 1])).tolist() == [0]


def test_the_target_is_ranked_even_where_it_is_listed_as_seen():
    assert target_ranks(torch.tensor([[0.9, 0.8, 0.7]]), [1], ([0, 0], [1, 0])).tolist() == [0]


def test_negative_scores_are_not_overtaken_by_seen_items():
    assert target_ranks(torch.tensor([[-0.9, -0.5, -0.1]]), [1], ([0], [2])).tolist() == [0]


def test_metrics_do_not_depend_on_how_users_are_batched():
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(101, 8, generator=generator), torch.randn(60, 8, generator=generator)
    targets = torch.randint(60, (101,), generator=generator).numpy()
    indptr = np.arange(0, 5 * 102, 5)
    seen = torch.randint(60, (505,), generator=generator).numpy()
    arguments = (queries, items, targets, indptr, seen)
    whole = evaluate_embeddings(*arguments, cosine=True, batch_size=1_000, popularity=np.arange(60))
    assert evaluate_embeddings(*arguments, cosine=True, batch_size=7, popularity=np.arange(60)) == pytest.approx(whole)
    assert set(whole) == {
        f"{name}@{k}" for name in ("hr", "ndcg", "mrr", "coverage", "popularity") for k in (10, 20, 30)
    }


@pytest.mark.parametrize("cosine", [True, False])
def test_vectors_are_ranked_like_a_loop_over_users_ranks_them(cosine):
    generator = np.random.default_rng(2)
    queries, items = generator.normal(size=(40, 6)), generator.normal(size=(80, 6)) * generator.lognormal(size=(80, 1))
    targets = generator.integers(80, size=40)
    seen = [generator.integers(80, size=generator.integers(0, 12)).tolist() for _ in range(40)]
    popularity = generator.integers(1, 100, size=80)
    scores = queries @ items.T
    if cosine:
        scores /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(items, axis=1)
    found = evaluate_embeddings(
        torch.from_numpy(queries),
        torch.from_numpy(items),
        targets,
        np.cumsum([0, *map(len, seen)]),
        np.concatenate(seen).astype(np.int32),
        cosine=cosine,
        top_ks=(1, 5, 20),
        batch_size=16,
        popularity=popularity,
    )
    assert found == pytest.approx(naive_metrics(scores, targets, seen, (1, 5, 20), popularity.tolist()))


def test_popularity_is_one_if_all_users_get_the_most_popular_item():
    metrics = RankingMetrics(3, [1], popularity=[2, 8, 4])
    metrics.update(torch.tensor([[0.0, 1.0, 0.0]] * 2), [0, 2])
    assert metrics.compute()["popularity@1"] == 1
    metrics.update(torch.tensor([[0.0, 0.0, 1.0]] * 2), [0, 2])
    assert metrics.compute()["popularity@1"] == 0.75
    assert metrics.compute()["coverage@1"] == pytest.approx(2 / 3)


def test_lists_are_looked_at_only_where_popularity_is_given():
    metrics = RankingMetrics(3, [1])
    metrics.update(torch.rand(2, 3), [0, 2])
    assert set(metrics.compute()) == {"hr@1", "ndcg@1", "mrr@1"}


def test_half_precision_and_gradients_are_accepted():
    scores = torch.tensor([[0.5, 0.25, 0.75]], dtype=torch.bfloat16, requires_grad=True)
    assert target_ranks(scores, [0], ([0], [2])).tolist() == [0]
    assert target_ranks(np.array([[3, 1, 2]]), [2]).tolist() == [1]


@pytest.mark.parametrize(
    ("scores", "targets", "seen", "message"),
    [
        (torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), [0, 0], None, "scores of row 1 hold NaN"),
        (torch.rand(2, 3), [0], None, r"scores have shape \[2, 3\] and targets \[1\]"),
        (torch.rand(2, 3), [0, 1, 2], None, r"scores have shape \[2, 3\] and targets \[3\]"),
        (torch.rand(3), [0], None, r"scores have shape \[3\]"),
        (torch.rand(1, 3), [3], None, "targets names an item outside 0..2"),
        (torch.rand(1, 3), [-1], None, "targets names an item outside 0..2"),
        (torch.rand(1, 3), [0], ([0], [5]), "seen names an item outside 0..2"),
        (torch.rand(1, 3), [0], ([0, 0], [1]), "seen has 2 rows but 1 items"),
        (torch.rand(1, 3), [0], ([0], [1, 2]), "seen has 1 rows but 2 items"),
    ],
)
def test_refused_scores_say_why(scores, targets, seen, message):
    with pytest.raises(ValueError, match=message):
        target_ranks(scores, targets, seen)


def test_masks_and_ranks_that_are_none_are_refused():
    queries, items = np.eye(2, dtype=np.float32), torch.eye(2, dtype=torch.bfloat16)
    assert evaluate_embeddings(queries, items, [0, 1], [0, 0, 0], [], cosine=True, top_ks=(1,))["hr@1"] == 1
    for indptr in ([1, 1, 1], [0, 2, 1]):
        with pytest.raises(ValueError, match="pass a target for each query, and the seen items of each query as CSR"):
            evaluate_embeddings(queries, items, [0, 1], indptr, [0], cosine=True)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=r"seen names a row outside 0\.\.1"):
            target_ranks(torch.eye(2), [0, 1], ([row], [0]))
    with pytest.raises(ValueError, match="a rank is -1; ranks begin with 0"):
        ndcg([0, -1], 5)


def test_other_refusals_say_why():
    with pytest.raises(ValueError, match="no user to compute hr@10 of"):
        RankingMetrics(3).compute()
    with pytest.raises(ValueError, match="no user to compute ndcg@5 of"):
        ndcg(torch.empty(0, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="give at least one K"):
        RankingMetrics(3, top_ks=())
    with pytest.raises(ValueError, match="popularity has 2 entries for 3 items"):
        RankingMetrics(3, popularity=[1, 2])
    with pytest.raises(ValueError, match="scores are given for 4 items but the catalogue has 3"):
        RankingMetrics(3).update(torch.rand(1, 4), [0])
    queries, items = torch.rand(2, 4), torch.rand(5, 4)
    with pytest.raises(ValueError, match="2 queries, 1 targets"):
        evaluate_embeddings(queries, items, [0], np.zeros(3), [], cosine=True)
    with pytest.raises(ValueError, match="2 entries of seen_indptr"):
        evaluate_embeddings(queries, items, [0, 1], np.zeros(2), [], cosine=True)
    with pytest.raises(ValueError, match="queries have 4 dimensions but items have 3"):
        evaluate_embeddings(queries, items[:, :3], [0, 1], np.zeros(3), [], cosine=True)


@pytest.mark.data
def test_popularity_ranking_of_lastfm_has_the_metrics_measured_independently():
    if not (DATA / "lastfm" / "train.txt").is_file():
        pytest.skip("needs the LastFM split: set TOKENREC_DATA_DIR to the folder that holds lastfm/")
    lines = {name: (DATA / "lastfm" / f"{name}.txt").read_text().splitlines() for name in ("train", "test")}
    read = {name: [line.split()[1:] for line in own] for name, own in lines.items()}
    items = {item: row for row, item in enumerate(sorted({item for line in read["test"] for item in line}))}
    seen = [[items[item] for item in line] for line in read["train"]]
    targets = np.array([items[line[-1]] for line in read["test"]])
    counts = np.bincount(np.concatenate(seen), minlength=len(items))
    found = evaluate_embeddings(
        torch.ones(len(seen), 1),
        torch.from_numpy(counts).float()[:, None],
        targets,
        np.cumsum([0, *map(len, seen)]),
        np.concatenate(seen),
        cosine=False,
        popularity=counts,
    )
    # Ties count against us here, so the number may lie a little below one that breaks them by row order.
    assert found["hr@20"] == pytest.approx(0.0606, abs=0.004)
    assert found["ndcg@20"] == pytest.approx(0.0243, abs=0.002)


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_ranks_of_several_weights_are_those_of_each_weight(num_users, num_items, seed):
    random = np.random.default_rng(seed)
    # Whole numbers, so that no score depends on the order of a sum but by the items' lengths.
    queries, items = (torch.from_numpy(random.integers(-9, 9, (count, 5))).float() for count in (num_users, num_items))
    targets, counts = random.integers(num_items, size=num_users), random.integers(0, 4, num_users)
    seen = np.concatenate([[0], np.cumsum(counts)]), random.integers(num_items, size=counts.sum())
    weights = (0.0, 0.5, 2.0)
    found = weighted_ranks(queries, items, 3, weights, targets, *seen)
    assert found.shape == (len(weights), num_users)
    for weight, ranks in zip(weights, found):
        scale = torch.tensor([1.0] * 3 + [weight] * 2)
        scores = (queries * scale).double() @ torch.nn.functional.normalize(items.double(), dim=1).T
        for user in range(num_users):
            mine, others = scores[user, targets[user]], np.ones(num_items, dtype=bool)
            others[[*seen[1][seen[0][user] : seen[0][user + 1]], targets[user]]] = False
            gap = (scores[user, others] - mine).numpy()
            # Scores that are equal but for rounding may come in any order.
            assert (gap > 1e-4).sum() <= ranks[user] <= (gap > -1e-4).sum()
