"""Requests that a stranger typed: whatever stands in place of an id, a list or a number, the answer is a sentence."""

import numpy as np
import pytest
from transformers import pipeline

from tokenrec_hf import Recommender

# In place of the id of a user or an item. None of them is known, whatever they look like to a reader of text.
IDS = {
    "another mention": "u001 item_f003",
    "a line of its own": "u001\nx",
    "two items": "f001 item_f002",
    "the codes of a user": "<u1-1><u2-2><u3-3>",
    "an end token": "u001</s>",
    "a sentinel": "<extra_id_0>",
    "nothing": "",
    "a space": " ",
    "a space behind": "u001 ",
    "a zero": "u001\0",
    "an invisible space": "u001\u200b",
    "a turned direction": "\u202eu001",
    "a wide digit": "u００1",
    "a combining accent": "u001\u0301",
    "half a pair": "u001\ud800",
    "punctuation": "u001.",
    "another case": "U001",
    "a path": "../u001",
    "a format": "{user}",
    "very long": "x" * 100_000,
}
# In place of a list of ids.
LISTS = {"text": "u001", "bytes": b"u001", "a number": 7, "a dict": {"u001": 1}, "numbers": [1, 2], "a list in a list": [["u001"]], "nan": [float("nan")], "truth": [True]}  # fmt: skip
NUMBERS = {"true": True, "a fraction": 2.5, "zero": 0, "negative": -1, "text": "3", "none": None, "nan": float("nan")}
PROMPTS = {
    "nothing": "",
    "blank": "   ",
    "an id alone": "u001",
    "nobody": "nobody",
    "a word that no one is called": "What is new?",
    "a mention without an id": "user_ and item_",
}


@pytest.fixture(scope="module")
def recommender(trained_repository):
    return Recommender.from_pretrained(trained_repository)


@pytest.fixture(scope="module")
def recommend(trained_repository):
    return pipeline("generative-retrieval", model=str(trained_repository), device="cpu")


def sentence(caught):
    said = str(caught.value.args[0])
    assert len(said) < 600 and "\n" not in said.replace("\\n", "")
    return said


@pytest.mark.parametrize("strange", IDS.values(), ids=IDS)
def test_an_id_is_one_id_or_unknown(recommender, recommend, strange):
    calls = [
        lambda: recommender.recommend([strange]),
        lambda: recommender.recommend(["u001"], [["f001", strange]]),
        lambda: recommender.recommend([None], [[strange]]),
        lambda: recommender.similar_items([strange]),
        lambda: recommend({"user": strange}),
        lambda: recommend({"user": "u001", "history": ["f001", strange]}),
        lambda: recommend({"history": [strange]}),
    ]
    for call in calls:
        with pytest.raises((KeyError, ValueError)) as caught:
            call()
        assert "unknown" in sentence(caught) or "not in the store" in sentence(caught) or "neither" in sentence(caught)


@pytest.mark.parametrize("strange", IDS.values(), ids=IDS)
def test_a_strange_id_is_left_out_when_asked(recommender, recommend, strange):
    """It stands for nothing: a user is answered as if nobody were named, a history as if the item were not in it."""
    found = recommender.recommend([strange, "u001"], [None, ["f001", strange]], top_k=3, on_unknown="skip")
    expected = recommender.recommend(["u001"], [["f001"]], top_k=3)[0]
    assert found[0] == [] and [row["item"] for row in found[1]] == [row["item"] for row in expected]
    assert all("is unknown" in row["note"] and len(row["note"]) < 200 for row in found[1])
    assert recommend([{"user": strange}, {"history": [strange]}], on_unknown="skip") == [[], []]


@pytest.mark.parametrize("strange", LISTS.values(), ids=LISTS)
def test_what_is_no_list_of_ids_is_refused(recommender, recommend, strange):
    calls = [lambda: recommender.recommend(strange), lambda: recommender.recommend(["u001"], [strange])]
    calls += [lambda: recommend({"history": strange}), lambda: recommend({"user": "u001", "history": strange})]
    for call in calls:
        with pytest.raises((ValueError, KeyError)) as caught:
            call()
        assert sentence(caught)


@pytest.mark.parametrize("strange", NUMBERS.values(), ids=NUMBERS)
def test_a_number_of_items_is_a_positive_whole_number(recommender, strange):
    with pytest.raises(ValueError, match="ask for at least 1 item") as caught:
        recommender.recommend(["u001"], top_k=strange)
    assert sentence(caught)
    assert len(recommender.recommend(["u001"], top_k=np.int64(3))[0]) == 3


@pytest.mark.parametrize("strange", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_that_names_nobody_and_nothing_is_refused(recommend, strange):
    with pytest.raises(ValueError, match="names no user and no item") as caught:
        recommend(strange)
    assert sentence(caught)


@pytest.mark.parametrize(
    "text", ["What next for user_u001 \ud800?", "user_u001 " + "x" * 1_000_000], ids=["half a pair", "long"]
)
def test_a_text_that_cannot_be_read_is_refused_or_skipped(recommend, text):
    with pytest.raises(ValueError, match="text 0 ") as caught:
        recommend(text)
    assert sentence(caught)
    assert recommend([text, {"user": "u001"}], top_k=3, on_unknown="skip") == [[], recommend({"user": "u001"}, top_k=3)]


FILTERS = {
    "no name": ({"": 1}, "is not made of letters"),
    "a path": ({"../genre": "jazz"}, "is not made of letters"),
    "two operators": ({"price<>": 3}, "is not made of letters"),
    "code": ({"__import__('os')": 1}, "is not made of letters"),
    "a number for a name": ({7: 1}, "is not made of letters"),
    "nan": ({"price<": float("nan")}, "give a string, a boolean or a finite number"),
    "a dict": ({"price": {"<": 3}}, "give a string, a boolean or a finite number"),
}


@pytest.mark.parametrize(("where", "says"), FILTERS.values(), ids=FILTERS)
def test_a_filter_that_cannot_be_is_refused(recommender, where, says):
    for call in (recommender.recommend, recommender.similar_items):
        with pytest.raises(ValueError, match=says) as caught:
            call(["u001"] if call == recommender.recommend else ["f001"], where=where)
        assert sentence(caught)


def test_one_request_of_a_list_does_not_change_another(recommender):
    """Rows of a batch have nothing to do with each other."""
    users = recommender.store.ids("user")[:6]
    together = recommender.recommend(users, top_k=5)
    for user, found in zip(users, together):
        assert [row["item"] for row in recommender.recommend([user], top_k=5)[0]] == [row["item"] for row in found]
