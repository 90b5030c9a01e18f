import numpy as np
import pytest
import torch

from tokenrec_hf import EmbeddingStore, Recommender, rerank
from tokenrec_hf.cli.app import main
from tokenrec_hf.repository import reranking
from tokenrec_hf.repository.export import export_recommendations
from tokenrec_hf.repository.reranking import answer_reranked

DIM = 6


@pytest.fixture(scope="module")
def store():
    """40 items; those whose number leaves 3 after division by 4 have no genre."""
    store = EmbeddingStore(DIM)
    store.upsert("item", [f"i{n}" for n in range(40)], torch.randn(40, DIM, generator=torch.Generator().manual_seed(0)))
    store.set_metadata(
        [f"i{n}" for n in range(40) if n % 4 < 3], [{"genre": "abc"[n % 4]} for n in range(40) if n % 4 < 3]
    )
    return store


@pytest.fixture(scope="module")
def candidates(store):
    """Lists of several lengths."""
    ids, scores = store.search(torch.randn(5, DIM, generator=torch.Generator().manual_seed(1)), 30)
    lists = [[{"item": item, "score": score} for item, score in zip(*rows)] for rows in zip(ids, scores)]
    return [rows[: 30 - 7 * at] for at, rows in enumerate(lists)]


def by_hand(store, rows, top_k, diversity, max_per):
    """The definition, item by item."""
    vectors = store.get("item", [row["item"] for row in rows]).double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    genres = [values.get("genre") for values in store.metadata([row["item"] for row in rows])]
    chosen = []
    while len(chosen) < top_k:
        best = None
        for at, row in enumerate(rows):
            used = sum(genres[one] == genres[at] for one in chosen)
            if at in chosen or (max_per and genres[at] is not None and used >= max_per):
                continue
            nearest = max((vectors[at] @ vectors[one] for one in chosen), default=0.0)
            value = (1 - diversity) * row["score"] - diversity * nearest
            if best is None or value > best[0] + 1e-7:
                best = value, at
        if best is None:
            break
        chosen.append(best[1])
    return [rows[at] for at in chosen]


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("diversity", [0, 0.3, 1])
def test_the_choice_is_that_of_the_definition(store, candidates, monkeypatch, diversity, limit, chunk):
    monkeypatch.setattr(reranking, "CHUNK", chunk)
    found = rerank(store, candidates, 9, diversity=diversity, max_per=limit and {"genre": limit})
    assert found == [by_hand(store, rows, 9, diversity, limit) for rows in candidates]
    assert rerank(store, [], 3, diversity=diversity) == [] and rerank(store, [[]], 3, diversity=diversity) == [[]]


def test_items_without_a_score_keep_their_order(store):
    rows = [{"item": f"i{n}", "score": None, "note": "popular"} for n in (4, 8, 1, 0, 5, 2)]
    assert rerank(store, [rows], 4, diversity=0.9) == [rows[:4]]
    assert rerank(store, [rows], 4, max_per={"genre": 1}) == [[rows[0], rows[2], rows[5]]]


@pytest.mark.parametrize("diversity", [-0.1, 1.1, float("nan")])
def test_a_diversity_out_of_range_is_refused(store, candidates, diversity):
    with pytest.raises(ValueError, match="it must be between 0 and 1"):
        rerank(store, candidates, 3, diversity=diversity)


@pytest.mark.parametrize("limit", [0, True, 2.0, "3"])
def test_a_limit_that_is_no_positive_integer_is_refused(store, candidates, limit):
    with pytest.raises(ValueError, match="max_per of genre is .*; it must be an integer of at least 1"):
        rerank(store, candidates, 3, max_per={"genre": limit})


def test_no_items_and_a_limit_of_metadata_that_no_item_has_are_refused(store, candidates):
    with pytest.raises(ValueError, match="top_k is -1; it must be at least 1"):
        rerank(store, candidates, -1)
    with pytest.raises(ValueError, match="no item has the metadata 'gnre' of max_per"):
        rerank(store, candidates, 3, max_per={"gnre": 1})


@pytest.fixture(scope="module")
def recommender(trained_repository):
    """All items but three are of one genre."""
    recommender = Recommender.from_pretrained(trained_repository)
    items = recommender.store.ids("item")
    recommender.store.set_metadata(items, [{"genre": "folk" if n < 3 else "jazz"} for n in range(len(items))])
    return recommender


def test_more_candidates_are_asked_for_where_a_limit_leaves_too_few(recommender):
    """All genres fill the list, however far down; each user is answered as alone."""
    users = recommender.store.ids("user")[:6]
    inputs = recommender.tokenize(users)
    found = answer_reranked(recommender, inputs, top_k=4, max_per={"genre": 2}, exclude_seen=False)
    every = recommender.answer(inputs, top_k=300, exclude_seen=False)
    folk = set(recommender.store.ids("item")[:3])
    for rows, ranked in zip(found, every):
        kinds = [[row["item"] for row in ranked if (row["item"] in folk) == wanted][:2] for wanted in (True, False)]
        assert {row["item"] for row in rows} == {*kinds[0], *kinds[1]}
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for user, rows in zip(users, answer_reranked(recommender, inputs, top_k=5, diversity=0.4)):
        alone = answer_reranked(recommender, recommender.tokenize([user]), top_k=5, diversity=0.4)[0]
        assert [row["item"] for row in alone] == [row["item"] for row in rows]


def test_the_export_and_the_command_rerank(recommender, trained_repository, tmp_path, capsys):
    pd = pytest.importorskip("pandas")
    users = recommender.store.ids("user")[:3]
    expected = answer_reranked(recommender, recommender.tokenize(users), top_k=4, diversity=0.5)
    export_recommendations(recommender, tmp_path / "out.parquet", users, top_k=4, diversity=0.5)
    found = pd.read_parquet(tmp_path / "out.parquet").item_id.tolist()
    assert found == [row["item"] for rows in expected for row in rows]
    assert found != [row["item"] for rows in recommender.recommend(users, top_k=4) for row in rows]
    argv = ["recommend", str(trained_repository), "--user", users[0], "--top-k", "4", "--diversity", "0.5"]
    assert main(argv) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown == [row["item"] for row in expected[0]]
