import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.data import splits as splits_module
from tokenrec_hf.data.splits import SPLITS, fingerprint, index_splits


def splits_of(**pairs):
    return DatasetDict(
        {
            name: Dataset.from_dict({"user_id": [u for u, _ in pairs[name]], "item_id": [i for _, i in pairs[name]]})
            for name in SPLITS
        }
    )


rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=6)


@settings(deadline=None)
@given(rows, rows, rows, st.sampled_from(["validation", "test"]))
def test_rows_are_numbered_in_order_of_first_appearance(train, validation, test, evaluate_on):
    data = index_splits(splits_of(train=train, validation=validation, test=test), evaluate_on)
    pairs = [*train, *validation, *test]
    assert data.user_ids == list(dict.fromkeys(user for user, _ in pairs))
    assert data.item_ids == list(dict.fromkeys(item for _, item in pairs))
    trained = train if evaluate_on == "validation" else train + validation
    for row, user in enumerate(data.user_ids):
        assert [data.item_ids[item] for item in data.interactions.of(row)] == [i for u, i in trained if u == user]
    held_out = [
        (data.user_ids[user], data.item_ids[item]) for user, item in zip(data.holdout.users, data.holdout.targets)
    ]
    assert held_out == (validation if evaluate_on == "validation" else test)


def test_an_item_that_is_only_held_out_has_a_row():
    splits = splits_of(train=[("a", "x"), ("b", "y")], validation=[("a", "z")], test=[("a", "new")])
    data = index_splits(splits, "validation")
    assert data.item_ids == ["x", "y", "z", "new"]
    assert (data.interactions.num_users, data.interactions.num_items) == (2, 4)
    assert data.interactions.popularity().tolist() == [1, 1, 0, 0]


def test_ids_with_white_space_are_refused():
    splits = splits_of(train=[("a", "x")], validation=[("a", "y")], test=[("a b", "z")])
    with pytest.raises(ValueError, match="user 'a b' contains white space"):
        index_splits(splits, "validation")


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_a_fingerprint_does_not_depend_on_how_many_ids_are_read_at_once(block, monkeypatch):
    ids = Dataset.from_dict({"user_id": ["a", "bb", "c", "d", "é"]})["user_id"]
    known = fingerprint(ids, ["x"])
    monkeypatch.setattr(splits_module, "BLOCK", block)
    assert fingerprint(ids, ["x"]) == known
    assert len({known, fingerprint(["a", "bb", "c", "d"], ["é", "x"]), fingerprint(["a", "bbc", "d", "é"], ["x"])}) == 3
