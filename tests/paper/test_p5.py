import numpy as np
import pytest
import torch
from baselines.beam_search import IdTrie, beam_search
from baselines.closed_forms import Popularity
from baselines.collm import CoLLM
from baselines.item_ids import collaborative_ids, numbers_as_symbols, random_ids, sequential_ids
from baselines.p5 import P5CID, P5RID, P5SID
from baselines.pod import POD

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout, index_splits
from tokenrec_hf.evaluation.baselines import evaluate_baseline

TINY_T5 = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 2}
FAMILY = (P5RID, P5SID, P5CID, POD, CoLLM)


@pytest.fixture(scope="module")
def circle():
    """200 users who go round a circle of 40 items from anywhere: the next item is known, and popularity says nothing."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 9, 200)
    starts = random.integers(0, 40, 200)
    users = np.repeat(np.arange(200), lengths)
    steps = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    name = random.permutation(40)
    train = InteractionMatrix(users, name[(starts[users] + steps) % 40], 200, 40)
    return train, Holdout(np.arange(200), name[(starts + lengths) % 40])


@pytest.fixture(scope="module")
def demo(demo_splits):
    return index_splits(demo_splits, "validation")


def untrained(kind, train, **settings):
    """A baseline ready to score, with random weights."""
    torch.manual_seed(0)
    baseline = kind(**{"t5": TINY_T5, **settings})
    baseline.train = train
    baseline.build(train)
    baseline.network.eval()
    return baseline


@pytest.mark.parametrize("kind", FAMILY)
def test_the_next_item_of_a_circle_is_learnt(kind, circle):
    train, holdout = circle
    baseline = kind(
        seed=0, t5=TINY_T5, lr=0.01, dropout=0.0, targets=1, batch_size=32, max_steps=140, evaluate_every=70
    )
    baseline.fit(train, holdout)
    popularity = Popularity()
    popularity.fit(train, None)
    known, learned = (evaluate_baseline(one, train, holdout)["ndcg@20"] for one in (popularity, baseline))
    assert learned > 1.5 * known
    assert baseline.epochs > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILY)
def test_it_beats_popularity_on_the_demo_set(kind, demo):
    t5 = {**TINY_T5, "num_decoder_layers": 1}
    baseline = kind(seed=0, t5=t5, lr=0.01, dropout=0.0, targets=4, beams=20, max_steps=600, evaluate_every=300)
    baseline.fit(demo.interactions, demo.holdout)
    popularity = Popularity()
    popularity.fit(demo.interactions, None)
    known, learned = (
        evaluate_baseline(one, demo.interactions, demo.holdout)["ndcg@20"] for one in (popularity, baseline)
    )
    assert learned > 1.5 * known


@pytest.mark.parametrize("kind", [P5SID, P5CID, POD, CoLLM])
def test_beams_for_all_items_are_exact(kind, demo):
    train = demo.interactions
    baseline = untrained(kind, train, beams=train.num_items)
    users = np.array([0, 7, 31])
    found, scores = baseline.recommend(users)
    # By hand: transformers' own decoder writes the id of every item for every user.
    ends = train.indptr[users + 1]
    starts = np.maximum(train.indptr[users], ends - baseline.settings["max_history"])
    tokens, words = baseline.prompts(users, starts, ends)
    network = baseline.network
    with torch.no_grad():
        states, mask = network.encode(tokens, words)
        labels = torch.from_numpy(np.where(baseline.codes >= 0, baseline.codes + network.first_symbol, -100))
        for row, user in enumerate(users):
            n = train.num_items
            logits = network.t5(
                encoder_outputs=(states[row : row + 1].expand(n, -1, -1),),
                attention_mask=mask[row : row + 1].expand(n, -1),
                labels=labels,
            ).logits
            terms = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            naive = (terms * (labels >= 0)).sum(dim=1)
            naive[train.of(user)] = -torch.inf
            left = n - len(train.of(user))
            torch.testing.assert_close(naive[found[row, :left]], scores[row, :left], atol=1e-4, rtol=1e-4)
            assert sorted(found[row, :left].tolist()) == sorted(set(range(n)) - set(train.of(user).tolist()))
            assert (found[row, left:] == -1).all()


def test_beam_search_finds_ids_of_different_lengths():
    codes = np.array([[0, -1, -1], [1, 0, -1], [1, 1, 0], [1, 1, 1], [2, 0, 0]])
    trie = IdTrie(codes)
    steps = torch.tensor([0.5, 0.3, 0.2]).log()
    everything = trie.open_nodes(2, np.array([1]), np.array([0]))
    items, scores = beam_search(lambda prefixes: steps.expand(*prefixes.shape[:2], 3), trie, everything, 5)
    probabilities = [0.5, 0.3 * 0.5, 0.3 * 0.3 * 0.5, 0.3 * 0.3 * 0.3, 0.2 * 0.5 * 0.5]
    best = sorted(range(5), key=lambda item: -probabilities[item])
    assert items[0].tolist() == best
    torch.testing.assert_close(scores[0].exp(), torch.tensor([probabilities[item] for item in best]))
    assert items[1].tolist() == [item for item in best if item != 0] + [-1]


def test_few_beams_give_as_many_unseen_items(demo):
    baseline = untrained(P5SID, demo.interactions, beams=20)
    users = np.arange(demo.interactions.num_users)
    scored = baseline.scores(users) > -torch.inf
    assert (scored.sum(dim=1) == 20).all()
    assert not scored[demo.interactions.users, demo.interactions.items].any()


def test_scores_do_not_depend_on_who_else_is_asked_about(demo):
    baseline = untrained(P5SID, demo.interactions)
    together, alone = baseline.scores(np.arange(100)), baseline.scores(np.array([17]))
    same = (together[17] > -torch.inf) & (alone[0] > -torch.inf)
    assert same.sum() >= 29  # two items may be too close for the last beam
    torch.testing.assert_close(together[17][same], alone[0][same])


@pytest.mark.parametrize("make", [random_ids, sequential_ids, collaborative_ids])
def test_ids_are_unique_and_decode_to_their_item(make, demo):
    codes = make(demo.interactions, 0)
    trie = IdTrie(codes)
    for item, symbols in enumerate(codes.tolist()):
        node = 0
        for symbol in symbols:
            node = trie.children[node, max(symbol, 0)]
        assert trie.items[node] == item


def test_ids_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="unique and none a prefix"):
        IdTrie(np.array([[0, -1], [0, 1]]))
    with pytest.raises(ValueError, match="unique and none a prefix"):
        IdTrie(np.array([[0, 1], [0, 1]]))


def test_numbers_have_two_digits_a_symbol():
    assert numbers_as_symbols(np.array([0, 7, 1234, 10203])).tolist() == [[0, 0, 0], [0, 0, 7], [0, 12, 34], [1, 2, 3]]


def test_sequential_ids_count_training_items_only_and_know_nothing_of_rows():
    # Item 3 is held out of user 0's history, item 5 of user 1's.
    train = InteractionMatrix(np.array([0, 0, 1, 1, 1]), np.array([4, 1, 1, 2, 0]), 2, 6)
    numbers = sequential_ids(train, 0)[:, 0]
    assert numbers[[4, 1, 2, 0]].tolist() == [0, 1, 2, 3]
    cold = {tuple(sequential_ids(train, seed)[[3, 5], 0]) for seed in range(20)}
    assert cold == {(4, 5), (5, 4)}
    # Rows given in the order of all data, held-out items too, as `index_splits` may give them: nothing changes.
    renamed = np.array([5, 3, 1, 0, 2, 4])
    other = InteractionMatrix(train.users, renamed[train.items], 2, 6)
    assert sequential_ids(other, 0)[renamed[[4, 1, 2, 0]], 0].tolist() == [0, 1, 2, 3]


def test_collaborative_ids_share_the_beginning_where_items_share_users():
    groups = np.repeat(np.arange(4), 30)
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 6)
    items = (users % 4) * 30 + random.integers(0, 30, len(users))
    train = InteractionMatrix(users, items, 400, 120)
    codes = collaborative_ids(train, 0, num_clusters=4, leaf_size=40)
    assert len({(group, first) for group, first in zip(groups, codes[:, 0])}) == 4


def test_a_graph_without_edges_is_cut_at_random():
    train = InteractionMatrix(np.arange(50), np.arange(50), 50, 50)
    IdTrie(collaborative_ids(train, 0, num_clusters=3, leaf_size=10))


def test_several_beginnings_are_decoded_as_transformers_decodes_each(demo):
    baseline = untrained(P5SID, demo.interactions)
    network = baseline.network
    tokens, words, targets = next(iter(baseline.batches(0)))
    prefixes = torch.randint(100, (len(tokens), 5, 2))
    states, mask = network.encode(tokens, words)
    ours = network.decode(states, mask, prefixes)
    start = torch.zeros(len(tokens), 1, dtype=torch.long)
    for beam in range(5):
        written = torch.cat([start, prefixes[:, beam] + network.first_symbol], dim=1)
        theirs = network.t5(encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=written).logits
        torch.testing.assert_close(ours[:, beam], theirs, atol=1e-4, rtol=1e-4)


def test_t5_drops_the_share_it_is_told_to_in_training_only(demo):
    network = untrained(P5SID, demo.interactions, dropout=0.25).network
    layers = [layer for name, layer in network.t5.named_modules() if name.endswith("dropout")]
    assert layers
    ones = torch.ones(1001, 301)
    for layer in layers:
        dropped = layer.train()(ones)
        assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert dropped.mean().item() == pytest.approx(1, abs=0.01)
        assert torch.equal(layer.eval()(ones), ones)


def test_a_prompt_holds_the_history_before_its_target(demo):
    train = demo.interactions
    baseline = untrained(P5SID, train, targets=3, max_history=5)
    item_of = {tuple(row): item for item, row in enumerate(baseline.item_tokens.tolist())}
    code_of = {tuple(row): item for item, row in enumerate(baseline.codes.tolist())}
    user_of = {tuple(row): user for user, row in enumerate(baseline.user_tokens.tolist())}
    met = 0
    for tokens, words, targets in baseline.batches(3):
        for row in range(len(tokens)):
            parts = [tuple(tokens[row][words[row] == word].tolist()) for word in range(1, 7)]
            history = train.of(user_of[parts[0]]).tolist()
            shown = [item_of[part] for part in parts[1:] if any(part)]
            wanted = [code_of[tuple(target)] for target in targets[row].tolist() if target[0] >= 0]
            cut = [c for c in range(1, len(history)) if history[max(0, c - 5) : c] == shown]
            assert any(history[c : c + 3] == wanted for c in cut)
            met += 1
    assert met == (train.lengths > 1).sum()


def test_pod_asks_without_words_and_learns_with_and_without(demo):
    pod, p5 = (untrained(kind, demo.interactions) for kind in (POD, P5SID))
    users, ends = np.array([3]), demo.interactions.indptr[[4]]
    tokens, words = pod.prompts(users, ends - 2, ends)
    assert (words[0] > 0).sum() == len(words[0]) - 1  # and the end of the sequence
    assert p5.prompts(users, ends - 2, ends)[0].shape[1] > tokens.shape[1] + 3
    assert len({(words[0, 1:] == 0).sum().item() for _, words, _ in (pod.batches(0))}) > 1


def test_a_refit_of_the_same_seed_gives_the_same_scores(circle):
    train, _ = circle
    runs = []
    for _ in range(2):
        baseline = P5SID(seed=3, t5=TINY_T5, batch_size=32)
        baseline.fit(train, None, epochs=2)
        runs.append(baseline.scores(np.arange(20)))
    torch.testing.assert_close(runs[0], runs[1], atol=0, rtol=0)
