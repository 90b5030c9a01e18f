import numpy as np
import protocol_errors
import pytest
import torch

from tokenrec_hf.data.interaction_matrix import InteractionMatrix


@pytest.fixture(scope="module")
def sequences():
    """What each user has done, the test item last: around the length at which the cut begins, in no order of rows."""
    random = np.random.default_rng(0)
    return {user: random.permutation(80)[:length] for user, length in ((2, 50), (0, 51), (3, 52), (1, 70))}


@pytest.fixture(scope="module")
def true(sequences):
    users = np.array(list(sequences))
    pairs = [(user, item) for user, items in sequences.items() for item in items[:-1]]
    trained_on = InteractionMatrix(*np.array(pairs).T, 4, 80)
    targets = np.array([items[-1] for items in sequences.values()])
    return protocol_errors.Ranking(users, targets, *trained_on.of_users(users)), trained_on


def test_only_sequences_of_more_than_51_items_are_cut_and_to_their_first_51(sequences, true):
    cut = protocol_errors.cut_first(*true)
    for number, items in enumerate(sequences.values()):
        assert cut.targets[number] == items[:51][-1]
        assert cut.seen[cut.indptr[number] : cut.indptr[number + 1]].tolist() == items[:51][:-1].tolist()
    some = cut.of(np.array([False, True, False, True]))
    assert some.users.tolist() == [0, 1] and np.diff(some.indptr).tolist() == [50, 50]
    assert some.seen[50:].tolist() == sequences[1][:50].tolist()


@pytest.mark.parametrize(("cosine", "seen_score"), [(False, -np.inf), (True, -np.inf), (True, 0.0)])
def test_ranks_are_those_of_a_naive_count(sequences, true, cosine, seen_score):
    torch.manual_seed(0)
    vectors = torch.randn(4, 5), torch.randn(80, 5)
    ranks = []
    for user, items in sequences.items():
        scores = vectors[1] @ vectors[0][user]
        if cosine:
            scores = torch.cosine_similarity(vectors[1], vectors[0][user][None])
        scores[items[:-1]] = seen_score
        ranks.append(int((scores > scores[items[-1]]).sum()))
    found = protocol_errors.rank(vectors, true[0], cosine=cosine, seen_score=seen_score)
    assert found["hr@20"] == np.mean([rank < 20 for rank in ranks])
    assert found["hr@10"] == np.mean([rank < 10 for rank in ranks])
    assert len(set(ranks)) > 2


def test_the_table_has_dot_product_and_cosine_side_by_side():
    records = [
        {"metrics": {f"ours, {way}": {"hr@20": value, "ndcg@20": value / 2} for way in ("dot product", "cosine")}}
        for value in (0.2, 0.4)
    ]
    assert protocol_errors.table(records)[-1] == (
        "| ours, dot product / cosine | .3000 ± .1414 / .3000 ± .1414 | .1500 ± .0707 / .1500 ± .0707 |"
    )
