"""What the page shows, without a page."""

import numpy as np
import pytest
import torch

from tokenrec_hf import Recommender
from tokenrec_hf.cli.naming import code_tokens, known_titles
from tokenrec_hf.cli.showcase import MAP_ITEMS, Showcase

GENRES = ("sea", "space", "crime")


@pytest.fixture(scope="module")
def recommender(trained_repository):
    """The trained recommender, whose items have a genre and a year."""
    recommender = Recommender.from_pretrained(trained_repository)
    items = recommender.store.ids("item")
    recommender.store.set_metadata(items, [{"genre": GENRES[n % 3], "year": 1980 + n % 5} for n in range(len(items))])
    return recommender


@pytest.fixture(scope="module")
def showcase(recommender):
    return Showcase(recommender, known_titles("demo"))


def listed(rows):
    return [row.item for row in rows]


def test_a_user_gets_what_the_recommender_recommends(recommender, showcase):
    found = showcase.ask("u001", [], top_k=7)
    expected = recommender.recommend(["u001"], top_k=7)[0]
    assert [(row.item, row.score) for row in found.recommended] == [(row["item"], row["score"]) for row in expected]
    assert found.history == recommender.store.seen(["u001"])[0]
    reasons = recommender.reasons(listed(found.recommended), found.history)
    titles = known_titles("demo")
    assert [list(row.because) for row in found.recommended] == [[titles[one] for one in row] for row in reasons]
    assert found.recommended[0].title == titles[found.recommended[0].item]


def test_someone_new_gets_what_a_history_alone_gets(recommender, showcase):
    found = showcase.ask(None, ["f001", "f011"], top_k=5)
    assert listed(found.recommended) == [
        row["item"] for row in recommender.recommend([None], [["f001", "f011"]], top_k=5)[0]
    ]
    assert found.history == ["f001", "f011"]


def test_no_list_holds_an_item_that_has_been_seen(recommender, showcase):
    found = showcase.ask("u001", ["f001", "f002"], top_k=300)
    seen = {"f001", "f002", *recommender.store.seen(["u001"])[0]}
    for rows in (found.recommended, found.nearest, found.popular):
        assert not seen & set(listed(rows)) and len(rows) == 300 - len(seen)


def test_the_nearest_items_are_those_of_the_mean_direction_of_the_history(recommender, showcase):
    history = ["f001", "f002", "f003"]
    vectors = torch.nn.functional.normalize(recommender.store.vectors("item"))
    cosines = torch.nn.functional.normalize(vectors[recommender.store.rows("item", history)].mean(0), dim=0) @ vectors.T
    best = [recommender.store.ids("item")[row] for row in cosines.argsort(descending=True).tolist()]
    assert listed(showcase.ask(None, history, top_k=5).nearest) == [item for item in best if item not in history][:5]


def test_the_popular_items_are_those_of_most_users(recommender, showcase):
    users = recommender.store.ids("user")
    seen = [set(items) for items in recommender.store.seen(users)]
    found = showcase.ask(None, ["f300"], top_k=4).popular
    assert [row.score for row in found] == [sum(row.item in own for own in seen) for row in found]
    assert found[0].score == max(sum(item in own for own in seen) for item in showcase.titles if item != "f300")


def test_a_filter_holds_for_every_list(recommender, showcase):
    assert list(showcase.filters["genre"]) == sorted(GENRES)
    assert showcase.filters["year"] == {str(year): year for year in range(1980, 1985)}
    found = showcase.ask("u001", [], top_k=300, where={"genre": ["sea"], "year": [1980, 1981]})
    for rows in (found.recommended, found.nearest, found.popular):
        own = recommender.store.metadata(listed(rows))
        assert rows and all(one["genre"] == "sea" and one["year"] in (1980, 1981) for one in own)


def test_the_prompt_and_the_tokens_are_those_of_the_tokenizer(recommender, showcase):
    found = showcase.ask("u001", ["f001", "f002"])
    assert found.tokens == code_tokens(recommender, "item", ["f001", "f002"])
    assert all(tokens in found.prompt for tokens in [*found.tokens, showcase.user_tokens("u001")])
    assert "</s>" not in found.prompt and "f001" not in found.prompt


@pytest.mark.parametrize(
    ("user", "history", "error", "says"),
    [
        (None, [], ValueError, "Choose a user, or items for the history of someone new."),
        ("nobody", [], KeyError, "nobody"),
        ("u001", ["nothing"], KeyError, "nothing"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(showcase, user, history, error, says):
    with pytest.raises(error, match=says):
        showcase.ask(user, history)


def test_the_map_keeps_as_much_of_the_variance_as_it_says(recommender, showcase):
    unit = torch.nn.functional.normalize(recommender.store.vectors("item"))
    places = showcase.places(recommender.store.ids("item"))
    assert places.shape == (300, 2) and len(showcase.drawn) == min(300, MAP_ITEMS)
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-5)
    largest = torch.linalg.eigvalsh(torch.cov(unit.T))[-2:].flip(0)
    np.testing.assert_allclose(places.var(axis=0, ddof=1), largest.numpy(), rtol=1e-3)
    assert showcase.explained == pytest.approx(float(largest.sum() / unit.var(dim=0).sum()), rel=1e-3)


def test_the_use_of_a_codebook_counts_its_codewords(recommender, showcase):
    codes = recommender.tokenizer.codes("item")
    usage = showcase.usage("item")
    assert [one.book for one in usage] == [1, 2, 3]
    assert [one.used for one in usage] == [len(set(column)) / 32 for column in codes.T.tolist()]
    statistics = [1 <= one.perplexity <= 32 * one.used + 1e-6 for one in usage]
    assert all(statistics)


def test_a_repository_without_users_still_answers_histories(trained_repository, tmp_path):
    full = Recommender.from_pretrained(trained_repository)
    full.store.save_pretrained(tmp_path, include_users=False)
    shared = Showcase(Recommender(full.model, full.tokenizer, type(full.store).open(tmp_path)))
    found = shared.ask(None, ["f001"])
    assert len(found.recommended) == 10 and found.popular == [] and shared.users == []
    assert found.recommended[0].title == found.recommended[0].item
