"""SASRec, BERT4Rec and S3-Rec: they learn what follows what, and look at no more than their papers allow."""

import numpy as np
import pytest
import torch
from baselines.bert4rec import BERT4Rec, cloze_mask
from baselines.closed_forms import Popularity
from baselines.s3rec import S3Rec, segments
from baselines.sasrec import SASRec

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout, index_splits
from tokenrec_hf.evaluation.baselines import evaluate_baseline

KINDS = (SASRec, BERT4Rec, S3Rec)
SMALL = {"dim": 32, "dropout": 0.0, "learning_rate": 3e-3, "batch_size": 32}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def chains():
    """150 users and 40 items in a circle: a history goes from any item to the next ones, so the last one tells what follows.

    Every item is as popular as any other, up to chance.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(3, 9, 150)
    users = np.repeat(np.arange(150), lengths)
    step = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    items = (np.repeat(random.integers(0, 40, 150), lengths) + step) % 40
    train = InteractionMatrix(users, items, 150, 40)
    last = train.items[train.indptr[1:] - 1]
    return train, Holdout(np.arange(150), (last + 1) % 40)


def fresh(kind, train, **settings):
    """A baseline whose encoder is untrained, in evaluation."""
    baseline = kind(seed=0, **{**kind.grid[0], **SMALL, "pretrain_epochs": 0, **settings})
    baseline.fit(train, None, epochs=0)
    return baseline


@each_kind
def test_it_solves_a_task_in_which_the_last_item_tells_the_next(kind, chains):
    train, holdout = chains
    baseline = kind(seed=0, **{**kind.grid[0], **SMALL, "pretrain_epochs": 5})
    baseline.fit(train, None, epochs=40)
    popularity = Popularity()
    popularity.fit(train, None)
    top_10 = {one: evaluate_baseline(one, train, holdout)["ndcg@10"] for one in (popularity, baseline)}
    assert top_10[baseline] > 0.8
    assert top_10[popularity] < 0.4


@each_kind
def test_it_beats_popularity_on_the_demo_set(kind, demo_splits):
    demo = index_splits(demo_splits, "validation")
    popularity = Popularity()
    popularity.fit(demo.interactions, None)
    baseline = kind(seed=0, **{**kind.grid[0], **SMALL, "num_layers": 1, "dropout": 0.1, "pretrain_epochs": 2})
    baseline.fit(demo.interactions, None, epochs=12)
    known, learned = (
        evaluate_baseline(one, demo.interactions, demo.holdout)["ndcg@20"] for one in (popularity, baseline)
    )
    assert learned > 1.5 * known


@each_kind
def test_equal_seeds_give_equal_scores_and_others_do_not(kind, chains):
    scores = []
    for seed in (0, 0, 1):
        baseline = kind(seed=seed, **{**kind.grid[0], **SMALL, "dropout": 0.5, "pretrain_epochs": 1})
        baseline.fit(chains[0], None, epochs=1)
        scores.append(baseline.scores(np.arange(5)))
    assert scores[0].equal(scores[1])
    assert not scores[0].allclose(scores[2])


@each_kind
def test_scores_of_a_user_do_not_depend_on_who_is_in_the_batch(kind, chains):
    baseline = fresh(kind, chains[0])
    together = baseline.scores(np.arange(20))
    assert together.shape == (20, 40)
    for user in range(20):
        assert baseline.scores(np.array([user]))[0].allclose(together[user], atol=1e-5)


@each_kind
def test_only_the_last_items_of_a_long_history_count(kind):
    random = np.random.default_rng(0)
    items = random.integers(0, 30, 25)
    changed = np.concatenate([random.integers(0, 30, 15), items[15:]])
    train = InteractionMatrix(np.repeat([0, 1], 25), np.concatenate([items, changed]), 2, 30)
    scores = fresh(kind, train, max_length=10).scores(np.arange(2))
    assert scores[0].allclose(scores[1], atol=1e-6)


@each_kind
def test_histories_longer_than_the_maximum_are_trained_on(kind):
    items = np.tile(np.arange(30), 10)
    train = InteractionMatrix(np.repeat(np.arange(10), 30), items, 10, 30)
    baseline = kind(seed=0, **{**kind.grid[0], **SMALL, "max_length": 7, "pretrain_epochs": 1})
    baseline.fit(train, None, epochs=1)
    assert baseline.scores(np.arange(10)).isfinite().all()


def test_an_item_on_either_side_changes_a_mask_in_bert4rec(chains):
    encoder = fresh(BERT4Rec, chains[0]).encoder
    items = torch.arange(8)[None]
    items[0, 4] = 41
    with torch.no_grad():
        before = encoder(items)[0, 4]
        for position in (1, 6):
            changed = items.clone()
            changed[0, position] = 30
            assert not before.allclose(encoder(changed)[0, 4], atol=1e-5)


def test_the_cloze_mask_is_as_stated():
    torch.manual_seed(0)
    lengths = torch.randint(2, 11, (20_000,))
    inside = torch.arange(10) < lengths[:, None]
    last = torch.arange(10) == lengths[:, None] - 1

    masked = cloze_mask(lengths, 10, probability=0.3, last_only=0.0)
    assert not (masked & ~inside).any()
    assert masked.any(dim=1).all()
    not_last = inside & ~last
    assert masked[not_last].float().mean().item() == pytest.approx(0.3, abs=0.01)

    assert cloze_mask(lengths, 10, probability=0.3, last_only=1.0).equal(last)
    alone = (cloze_mask(lengths, 10, probability=1.0, last_only=0.25) == last).all(dim=1)
    assert alone.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_segments_lie_in_their_rows_and_have_up_to_half_of_them():
    torch.manual_seed(0)
    lengths = torch.randint(1, 11, (20_000,))
    first, length = segments(lengths)
    assert (first >= 0).all() and (first + length <= lengths).all()
    assert (length >= 1).all() and (length <= (lengths // 2).clamp(min=1)).all()
    of_ten = lengths == 10
    assert set(zip(first[of_ten].tolist(), length[of_ten].tolist())) == {
        (start, size) for size in range(1, 6) for start in range(10 - size + 1)
    }


def test_s3rec_pretrains_both_objectives_and_attends_causally_afterwards(chains):
    train, _ = chains
    baseline = fresh(S3Rec, train)
    starts, ends = train.indptr[:64], train.indptr[1:65]

    def losses():
        baseline.encoder.causal = False
        torch.manual_seed(0)
        with torch.no_grad():
            return [baseline.pretraining_loss(starts, ends, 0).item() for _ in range(5)]

    before = losses()
    baseline.settings["pretrain_epochs"] = 20
    baseline.pretrain()
    assert baseline.encoder.causal
    assert np.mean(losses()) < np.mean(before) - 1
