import datetime
import re

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.data import splits as splits_module
from tokenrec_hf.data.splits import SPLITS, fingerprint, index_splits, leave_one_out, temporal_split


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


def test_filtered_splits_are_those_of_their_rows():
    pairs = [(f"u{row % 7}", f"i{row % 11}") for row in range(40)]
    every = splits_of(train=pairs, validation=pairs[:3], test=pairs[3:6])
    some = index_splits(
        DatasetDict({name: split.filter(lambda row: row["item_id"] != "i4") for name, split in every.items()}), "test"
    )
    kept = {
        name: [pair for pair in part if pair[1] != "i4"]
        for name, part in (("train", pairs), ("validation", pairs[:3]), ("test", pairs[3:6]))
    }
    same = index_splits(splits_of(**kept), "test")
    assert (some.user_ids, some.item_ids) == (same.user_ids, same.item_ids)
    assert some.interactions.items.tolist() == same.interactions.items.tolist()
    assert some.holdout.targets.tolist() == same.holdout.targets.tolist()


def test_an_item_that_is_only_held_out_has_a_row():
    splits = splits_of(train=[("a", "x"), ("b", "y")], validation=[("a", "z")], test=[("a", "new")])
    data = index_splits(splits, "validation")
    assert data.item_ids == ["x", "y", "z", "new"]
    assert (data.interactions.num_users, data.interactions.num_items) == (2, 4)
    assert data.interactions.popularity().tolist() == [1, 1, 0, 0]


def test_ids_that_are_not_stripped_are_refused():
    splits = splits_of(train=[("a", "x")], validation=[("a", "y")], test=[("a ", "z")])
    with pytest.raises(ValueError, match="user 'a ' begins or ends with a space"):
        index_splits(splits, "validation")


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_a_fingerprint_does_not_depend_on_how_many_ids_are_read_at_once(block, monkeypatch):
    ids = Dataset.from_dict({"user_id": ["a", "bb", "c", "d", "é"]})["user_id"]
    known = fingerprint(ids, ["x"])
    assert re.fullmatch("[0-9a-f]{16}", known)
    monkeypatch.setattr(splits_module, "BLOCK", block)
    assert fingerprint(ids, ["x"]) == known
    assert len({known, fingerprint(["a", "bb", "c", "d"], ["é", "x"]), fingerprint(["a", "bbc", "d", "é"], ["x"])}) == 3


def timed(rows):
    return Dataset.from_dict(dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows)))))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 20)), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
)
def test_a_temporal_split_equals_a_naive_reference(pairs, share):
    rows = [(user, f"i{number}", time) for number, (user, time) in enumerate(pairs)]
    at = sorted(time for *_, time in rows)[int(share * len(rows))]
    expected = {name: [] for name in SPLITS}
    for user in dict.fromkeys(user for user, *_ in rows):
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        past, later = [row for row in own if row[2] < at], [row for row in own if row[2] >= at]
        if len(past) >= 2 and later:
            expected["validation"].append(past.pop())
            expected["test"].append(later[0])
        expected["train"] += past
    if not expected["test"]:
        with pytest.raises(ValueError, match="no user has two interactions before"):
            temporal_split(timed(rows), share)
        return
    found = temporal_split(timed(rows), share)
    assert {name: list(zip(*found[name][:].values())) for name in SPLITS} == expected


@pytest.mark.parametrize("unit", [1, 10**3, 10**9])
def test_a_date_is_found_in_times_of_any_unit(unit):
    """2024-05-01T00:00 is 1714521600."""
    rows = [("u", f"i{step}", (1714521600 + 60 * (step - 2)) * unit) for step in range(4)]
    for date in ("2024-05-01", "2024-05-01T02:00+02:00", "2024-04-30 23:59:30.5Z", "2024-05-01 00:00:00 UTC"):
        assert temporal_split(timed(rows), date)["test"]["item_id"][:] == ["i2"]


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("soon", "at is 'soon'; it must be a date such as 2024-05-17 or a share between 0 and 1"),
        ("0", "at is 0; it must be a date"),
        ("1.0", "at is 1.0; it must be a date"),
        ("05/11/2023", "at is '05/11/2023'; it must be a date such as"),
        ("now", "at is 'now'; it must be a date such as"),
        ("10:30", "at is '10:30'; it must be a date such as"),
        ("2024-13-01", "at is '2024-13-01'; it must be a date such as"),
        ("2024-05-01", "the timestamps are no times since 1970, so 2024-05-01 cannot be found"),
    ],
)
def test_a_moment_that_cannot_be_found_is_refused(at, says):
    with pytest.raises(ValueError, match=says):
        temporal_split(timed([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]), at)


WXYZ = {"user_id": ["a"] * 4, "item_id": list("wxyz")}
MONTHS = [datetime.datetime(2024, month, 1) for month in (4, 3, 2, 1)]


@pytest.mark.parametrize("times", [["10", "9", "8", "7"], [4.5, 3, 2, 1], MONTHS, [str(month) for month in MONTHS]])
def test_times_of_any_type_are_in_order(times):
    interactions = Dataset.from_dict(WXYZ | {"timestamp": times})
    assert leave_one_out(interactions)["test"]["item_id"][:] == ["w"]
    assert temporal_split(interactions, 0.75)["test"]["item_id"][:] == ["w"]


@pytest.mark.parametrize("at", ["2024-04-01", datetime.date(2024, 4, 1)])
def test_a_date_is_found_in_a_column_of_dates(at):
    assert temporal_split(Dataset.from_dict(WXYZ | {"timestamp": MONTHS}), at)["test"]["item_id"][:] == ["w"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"timestamp": [3, None, 1, 2]}, "1 of 4 rows without timestamp .row 2."),
        ({"timestamp": [3, float("nan"), 1, 2]}, "1 of 4 rows without timestamp .row 2."),
        ({"timestamp": ["1", "soon", "2", "3"]}, "the timestamp 'soon' of row 2 is not a number or an ISO 8601 date"),
        ({"user_id": ["a", None, "a", "a"]}, "1 of 4 rows without user id .row 2."),
        ({"item_id": [1.5, 2, 3, 4]}, "the item ids are of type double; ids are text or whole numbers"),
        ({"user_id": [], "item_id": []}, "holds no interactions"),
    ],
)
def test_values_that_are_missing_or_wrong_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        leave_one_out(Dataset.from_dict(WXYZ | changes))


def test_ids_that_are_numbers_become_text():
    splits = leave_one_out(Dataset.from_dict({"user_id": [7, 7, 7], "item_id": [3, 1, 2]}))
    assert [splits[name][0] for name in SPLITS] == [{"user_id": "7", "item_id": item} for item in "312"]


def test_without_times_there_is_no_moment():
    with pytest.raises(ValueError, match="no column 'timestamp', so there is no moment"):
        temporal_split(Dataset.from_dict({"user_id": ["u"], "item_id": ["a"]}), 0.5)
