import gzip
import json
import os
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.data.interactions import load_interactions
from tokenrec_hf.data.splits import leave_one_out

DATA = Path(os.environ.get("TOKENREC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")

ROWS = [("u1", "b", 5.0, 30), ("u2", "a", 3.0, 10), ("u1", "a", 4.0, 20), ("u2", "b", 1.0, 10), ("u1", "c", 2.0, 20)]
# Grouped by user in order of first appearance, in time order, equal times in file order.
CLEAN = [("u1", "a", 20), ("u1", "c", 20), ("u1", "b", 30), ("u2", "a", 10), ("u2", "b", 10)]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
        return path

    return write_file


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"the real data set {name} is not in {DATA}; set TOKENREC_DATA_DIR")
    return DATA / name


def tuples(dataset):
    return list(zip(*dataset[:].values()))


def delimited(delimiter, header):
    return "".join(delimiter.join(str(value) for value in row) + "\n" for row in [header, *ROWS])


PLAIN = ("user_id", "item_id", "rating", "timestamp")


@pytest.mark.parametrize(
    "name", ["a.csv", "a.CSV", "a.tsv", "a.inter", "a.jsonl", "a.json", "a.parquet", "a.csv.gz", "a.jsonl.gz"]
)
def test_every_format_gives_the_same_interactions(name, tmp_path):
    typed = [f"{column}:{kind}" for column, kind in zip(PLAIN, ["token", "token", "float", "float"])]
    kind = name.removesuffix(".gz").rsplit(".")[-1].lower()
    if kind == "parquet":
        pa.parquet.write_table(pa.table([pa.array(column) for column in zip(*ROWS)], names=PLAIN), tmp_path / name)
    else:
        text = {
            "csv": delimited(",", PLAIN),
            "tsv": delimited("\t", PLAIN),
            "inter": delimited("\t", typed),
        }.get(kind) or "".join(json.dumps({"text": "a\nb", **dict(zip(PLAIN, row))}) + "\n" for row in ROWS)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = load_interactions(tmp_path / name)
    assert found.column_names == ["user_id", "item_id", "timestamp"]
    assert [found.features[column].dtype for column in found.column_names] == ["string", "string", "int64"]
    assert tuples(found) == CLEAN
    assert tuples(load_interactions(str(tmp_path / name))) == CLEAN


def test_a_dataset_is_cleaned_like_a_file():
    given_rows = Dataset.from_dict(dict(zip(PLAIN, zip(*ROWS))))
    assert tuples(load_interactions(given_rows)) == CLEAN
    assert tuples(load_interactions(given_rows.select([1, 3]))) == CLEAN[3:]
    assert tuples(load_interactions(load_interactions(given_rows))) == CLEAN


@pytest.mark.parametrize(
    "header",
    [
        "user,item,score,time",
        "userID,artistID,weight,datetime",
        "reviewerID,asin,overall,unixReviewTime",
        "uid,iid,rating,Unix_Timestamp",
    ],
)
def test_columns_are_found_by_their_common_names(write, header):
    path = write("a.csv", delimited(",", header.split(",")))
    assert tuples(load_interactions(path)) == CLEAN
    assert tuples(load_interactions(path, min_rating=4)) == [("u1", "a", 20), ("u1", "b", 30)]


def test_columns_can_be_named(write):
    path = write("a.csv", delimited(",", ["who", "what", "liked", "when"]))
    named = {"user_column": "who", "item_column": "what", "rating_column": "liked", "timestamp_column": "when"}
    assert tuples(load_interactions(path, **named)) == CLEAN
    # A named column goes before a column with a common name.
    path = write("b.csv", "user_id,item_id,session\n1,2,x\n")
    assert tuples(load_interactions(path, user_column="session")) == [("x", "2")]


def test_typed_columns_can_be_named_without_their_type(write):
    path = write("a.inter", "who:token\titem_id:token\nx\ty\n")
    assert tuples(load_interactions(path, user_column="who")) == [("x", "y")]
    assert tuples(load_interactions(path, user_column="who:token")) == [("x", "y")]


def test_without_timestamps_the_file_order_is_the_time_order(write):
    path = write("a.csv", "user_id,item_id\nb,2\na,9\nb,1\na,3\n")
    found = load_interactions(path)
    assert found.column_names == ["user_id", "item_id"]
    assert tuples(found) == [("b", "2"), ("b", "1"), ("a", "9"), ("a", "3")]


def test_byte_order_mark_quotes_and_windows_line_ends_are_read(write):
    path = write("a.csv", '\ufeff"user_id","item_id","note"\r\n"1","2","a, ""b""\r\nc"\r\n1,3,\r\n')
    assert tuples(load_interactions(path)) == [("1", "2"), ("1", "3")]


def test_quotation_marks_in_atomic_files_are_ordinary_characters(write):
    path = write("a.inter", 'user_id:token\titem_id:token\n"1\t2"\n"1\t3\n')
    assert tuples(load_interactions(path)) == [('"1', '2"'), ('"1', "3")]


def test_ids_in_text_keep_their_leading_zeros(write):
    assert tuples(load_interactions(write("a.csv", "user_id,item_id\n007,08\n7,8\n"))) == [("007", "08"), ("7", "8")]


def test_numeric_ids_become_text_without_a_decimal_point(write):
    numbers = {"user_id": pa.array([1, 2], pa.int32()), "item_id": [10.0, 20.0]}
    assert tuples(load_interactions(Dataset(pa.table(numbers)))) == [("1", "10"), ("2", "20")]
    assert tuples(load_interactions(write("a.csv", "user_id,item_id\n1.0,10.0\n2.0,20.0\n"))) == [
        ("1", "10"),
        ("2", "20"),
    ]
    # A single id that looks otherwise shows that the point belongs to the ids.
    assert tuples(load_interactions(write("b.csv", "user_id,item_id\n1,v1.0\n1,2.0\n"))) == [
        ("1", "v1.0"),
        ("1", "2.0"),
    ]


def test_dictionary_encoded_ids_are_read():
    users = pa.array(["b", "a", "b"]).dictionary_encode()
    assert tuples(load_interactions(Dataset(pa.table({"user": users, "item": ["1", "2", "3"]})))) == [
        ("b", "1"),
        ("b", "3"),
        ("a", "2"),
    ]


MISSING = ["", "NULL", "null", "nan", "NaN", "N/A", r"\N", "<NA>", " "]


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_missing_value_is_named_or_dropped(write, name, missing):
    rows = [("u", "a", "1"), (missing, "b", "2"), ("v", "c", "3"), ("u", "d", missing), ("u", missing, missing)]
    text = (
        delimited_rows(rows) if name == "a.csv" else "".join(json.dumps(dict(zip(HEADER, row))) + "\n" for row in rows)
    )
    path = write(name, text)
    says = (
        r" has 1 of 5 rows without user id \(row 2\) and 1 of 5 rows without item id \(row 5\) and "
        r"2 of 5 rows without timestamp \(rows 4, 5\); .* drops 3 rows\.$"
    )
    with pytest.raises(ValueError, match=says):
        load_interactions(path)
    assert tuples(load_interactions(path, drop_incomplete=True)) == [("u", "a", 1), ("v", "c", 3)]


HEADER = ("user_id", "item_id", "timestamp")


def delimited_rows(rows, header=HEADER):
    return "".join(",".join(row) + "\n" for row in [header, *rows])


def test_names_of_places_and_people_are_ids(write):
    """Namibia, and a user who calls herself None."""
    assert tuples(load_interactions(write("a.csv", "user_id,item_id\nNA,None\n"))) == [("NA", "None")]


def test_columns_that_are_not_used_are_not_checked(write):
    path = write("a.csv", "user_id,item_id,rating,event\nu,a,,\nu,b,good,nan\nu,c,inf,NULL\n")
    assert tuples(load_interactions(path)) == [("u", "a"), ("u", "b"), ("u", "c")]
    with pytest.raises(ValueError, match=r"1 of 3 rows without rating \(row 1\)"):
        load_interactions(path, min_rating=1)
    with pytest.raises(ValueError, match="the rating 'good' of row 2 is not a number"):
        load_interactions(path, min_rating=1, drop_incomplete=True)


def test_timestamps_in_seconds_and_milliseconds_are_not_mixed(write):
    path = write("a.csv", "user_id,item_id,time\nu,a,1600000000\nu,b,1600000001000\n")
    with pytest.raises(
        ValueError, match="timestamps 1600000000 of row 1 and 1600000001000 of row 2 are in different units"
    ):
        load_interactions(path)


def test_events_are_chosen_by_their_names(write, caplog):
    rows = [
        ("u", "a", "view"),
        ("u", "b", "cart"),
        ("u", "c", "buy"),
        ("u", "b", "buy"),
        ("v", "a", ""),
        ("v", "c", "cart"),
    ]
    path = write("a.csv", delimited_rows(rows, ("user_id", "item_id", "event")))
    assert tuples(load_interactions(path, events=["cart", "buy"])) == [("u", "b"), ("u", "c"), ("v", "c")]
    assert len(load_interactions(path)) == 5
    with pytest.raises(ValueError, match=r"has no event 'sell'; its events are 'buy', 'cart', 'view'\.$"):
        load_interactions(path, events=["sell"])
    assert tuples(load_interactions(path, events=["buy", "sell"])) == [("u", "c"), ("u", "b")]
    assert "has no event 'sell'; its events are 'buy', 'cart', 'view'." in caplog.text
    with pytest.raises(ValueError, match="events is the single string 'buy'; pass a list"):
        load_interactions(path, events="buy")
    with pytest.raises(ValueError, match="has no event 'cart=3'; .* Events have no weights; name the ones that count"):
        load_interactions(path, events=["cart=3"])
    with pytest.raises(ValueError, match="needs events, but .* has no event column; name it by event_column"):
        load_interactions(write("b.csv", "user_id,item_id,kind\nu,a,cart\n"), events=["cart"])
    path = write("b.csv", "user_id,item_id,kind\nu,a,1\nu,b,2\n")
    assert tuples(load_interactions(path, event_column="kind", events=["2"])) == [("u", "b")]


def test_numbers_and_text_may_be_mixed_in_the_ids_of_json_lines(write):
    rows = [{"user_id": user, "item_id": item} for user, item in [(7, 10**20), ("A7", 1.0), (2**63 + 1, "01")]]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert tuples(load_interactions(path)) == [("7", str(10**20)), ("A7", "1"), (str(2**63 + 1), "01")]


def test_json_lines_are_typed_over_all_rows(write, monkeypatch):
    late, early = (
        {"user_id": "a", "item_id": "late", "timestamp": 30},
        {"user_id": "a", "item_id": "early", "timestamp": 10.5},
    )
    text = "".join(json.dumps(row) + "\n" for row in [{"rating": 1, **late}, {"rating": 2.5, "x": [], **early}])
    # A field that the first line lacks is a field all the same, and its missing value is named.
    for first in ({}, {"timestamp": None}):
        path = write("b.jsonl", json.dumps({"user_id": "b", "item_id": "x", "rating": 1, **first}) + "\n" + text)
        for rows in (1, 2, 10):
            monkeypatch.setattr("tokenrec_hf.data.reading._BATCH_ROWS", rows)
            with pytest.raises(ValueError, match=r"has 1 of 3 rows without timestamp \(row 1\)"):
                load_interactions(path)
    for rows in (1, 2):
        monkeypatch.setattr("tokenrec_hf.data.reading._BATCH_ROWS", rows)
        path = write("a.jsonl", text)
        assert tuples(load_interactions(path)) == [("a", "early", 10.5), ("a", "late", 30.0)]
        assert tuples(load_interactions(path, min_rating=2)) == [("a", "early", 10.5)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_is_read_alike_in_batches_of_any_size(write, monkeypatch, name):
    text = (
        delimited(",", PLAIN) if name == "a.csv" else "".join(json.dumps(dict(zip(PLAIN, row))) + "\n" for row in ROWS)
    )
    for rows in (1, 2, 5):
        monkeypatch.setattr("tokenrec_hf.data.reading._BATCH_ROWS", rows)
        assert tuples(load_interactions(write(name, text))) == CLEAN


def test_only_the_needed_columns_have_to_be_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("user_id,item_id,title\nu,i,Café\n".encode("latin-1"))
    assert tuples(load_interactions(path)) == [("u", "i")]


@pytest.mark.parametrize("dates", [["2024-05-17", "2024-05-16"], ["2024-05-17T00:00:00Z", "2024-05-16 00:00:00Z"]])
def test_iso_dates_become_seconds(write, dates):
    path = write("a.csv", f"user_id,item_id,datetime\n1,a,{dates[0]}\n1,b,{dates[1]}\n")
    found = load_interactions(path)
    assert tuples(found) == [("1", "b", 1715817600), ("1", "a", 1715904000)]
    assert found.features["timestamp"].dtype == "int64"


@pytest.mark.parametrize(
    "times", [[datetime(2024, 5, 17), datetime(2024, 5, 16)], [date(2024, 5, 17), date(2024, 5, 16)]]
)
def test_typed_dates_become_seconds(times):
    rows = Dataset.from_dict({"user_id": [1, 1], "item_id": [1, 2], "time": times})
    assert tuples(load_interactions(rows)) == [("1", "2", 1715817600), ("1", "1", 1715904000)]


def test_fractions_of_seconds_decide_the_order(write):
    path = write("a.csv", "user_id,item_id,time\n1,a,2024-05-17T00:00:00.75\n1,b,2024-05-17T00:00:00.25\n")
    assert tuples(load_interactions(path)) == [("1", "b", 1715904000.25), ("1", "a", 1715904000.75)]
    path = write("b.csv", "user_id,item_id,time\n1,a,2.5\n1,b,1\n")
    assert tuples(load_interactions(path)) == [("1", "b", 1.0), ("1", "a", 2.5)]


def test_nanosecond_timestamps_are_read(write, tmp_path):
    times = [1600000002123456789, 1600000000123456789, 1600000001000000000]
    table = pa.table({"user_id": ["a"] * 3, "item_id": list("xyz"), "timestamp": pa.array(times, pa.timestamp("ns"))})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    expected = [("a", "y", 1600000000.123456), ("a", "z", 1600000001.0), ("a", "x", 1600000002.123456)]
    assert tuples(load_interactions(tmp_path / "a.parquet")) == expected
    for zone in ("", "Z"):
        rows = "".join(
            f"a,{item},{time}{zone}\n" for item, time in zip("xyz", table["timestamp"].cast(pa.string()).to_pylist())
        )
        assert tuples(load_interactions(write("a.csv", "user_id,item_id,timestamp\n" + rows))) == expected


def test_large_integer_timestamps_stay_exact(write):
    path = write("a.csv", f"user_id,item_id,time\n1,a,{2**60 + 1}\n1,b,{2**60}\n")
    assert tuples(load_interactions(path)) == [("1", "b", 2**60), ("1", "a", 2**60 + 1)]
    rows = [{"user_id": 1, "item_id": item, "time": time} for item, time in [("a", 2**60 + 1), ("b", 2**60)]]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert tuples(load_interactions(path)) == [("1", "b", 2**60), ("1", "a", 2**60 + 1)]


def test_of_repeated_interactions_the_first_in_time_remains(write):
    path = write("a.csv", "user_id,item_id,time\n1,a,9\n1,b,5\n1,a,3\n2,a,1\n2,a,1\n")
    assert tuples(load_interactions(path)) == [("1", "a", 3), ("1", "b", 5), ("2", "a", 1)]
    assert tuples(load_interactions(path, keep="last")) == [("1", "b", 5), ("1", "a", 9), ("2", "a", 1)]


# Against naive references --------------------------------------------------------------------------------------------

log = st.lists(
    st.tuples(st.sampled_from("pqrst"), st.sampled_from("abcde"), st.integers(1, 5), st.integers(0, 4)),
    min_size=1,
    max_size=40,
)


def naive_clean(rows, min_rating, k):
    users = list(dict.fromkeys(user for user, *_ in rows))
    kept = []
    for user in users:
        seen = set()
        for _, item, rating, time in sorted((row for row in rows if row[0] == user), key=lambda row: row[3]):
            if rating >= min_rating and item not in seen:
                seen.add(item)
                kept.append((user, item, time))
    while True:
        fewer = [
            row
            for row in kept
            if sum(row[0] == other[0] for other in kept) >= k and sum(row[1] == other[1] for other in kept) >= k
        ]
        if fewer == kept:
            return kept
        kept = fewer


@settings(max_examples=150, deadline=None)
@given(log, st.integers(0, 5), st.integers(1, 3))
def test_cleaning_equals_a_naive_reference(rows, min_rating, k):
    dataset = Dataset.from_dict(dict(zip(PLAIN, zip(*rows))))
    expected = naive_clean(rows, min_rating, k)
    if expected:
        assert tuples(load_interactions(dataset, min_rating=min_rating, k_core=k)) == expected
    else:
        with pytest.raises(ValueError, match="is left after"):
            load_interactions(dataset, min_rating=min_rating, k_core=k)


@settings(max_examples=150, deadline=None)
@given(log, st.integers(3, 4), st.booleans())
def test_leave_one_out_equals_a_naive_reference(rows, least, timed):
    names = PLAIN if timed else PLAIN[:3]
    expected = {"train": [], "validation": [], "test": []}
    for user in dict.fromkeys(user for user, *_ in rows):
        own = [row[: len(names)] for row in rows if row[0] == user]
        own = sorted(own, key=lambda row: row[3]) if timed else own
        if len(own) < least:
            expected["train"] += own
        else:
            expected["train"] += own[:-2]
            expected["validation"].append(own[-2])
            expected["test"].append(own[-1])
    dataset = Dataset.from_dict(dict(zip(names, zip(*rows))))
    if not expected["test"]:
        with pytest.raises(ValueError, match=f"no user has {least} interactions or more"):
            leave_one_out(dataset, min_interactions=least)
    else:
        splits = leave_one_out(dataset, min_interactions=least)
        assert isinstance(splits, DatasetDict)
        assert {name: tuples(split) for name, split in splits.items()} == expected
        assert all(split.column_names == list(names) for split in splits.values())


def test_users_with_few_interactions_are_in_train_only(write):
    path = write("a.csv", "user_id,item_id\na,1\nb,1\na,2\nb,2\na,3\nc,1\n")
    splits = leave_one_out(load_interactions(path))
    assert tuples(splits["train"]) == [("a", "1"), ("b", "1"), ("b", "2"), ("c", "1")]
    assert tuples(splits["validation"]) == [("a", "2")]
    assert tuples(splits["test"]) == [("a", "3")]


# Folders of train.txt and test.txt -----------------------------------------------------------------------------------


def test_a_folder_gives_the_whole_sequences_of_test_txt(write):
    write("set/train.txt", "7 1 2 3\n5 2\n")
    folder = write("set/test.txt", "7 1 2 3 9\n5 2 1\n").parent
    assert tuples(load_interactions(folder)) == [("7", "1"), ("7", "2"), ("7", "3"), ("7", "9"), ("5", "2"), ("5", "1")]


def test_train_txt_alone_is_enough(write):
    folder = write("set/train.txt", "\ufeffa x y z\nb y\n\n").parent
    assert tuples(load_interactions(folder)) == [("a", "x"), ("a", "y"), ("a", "z"), ("b", "y")]


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ("1 2 3\n2 4\n", "1 2 3 4\n2 5 6\n", r"line 2 of .*test\.txt must be line 2 of .*train\.txt and one more item"),
        ("1 2 3\n2 4\n", "1 2 3\n2 4\n", r"line 1 of .*test\.txt must be line 1 of .*train\.txt"),
        ("1 2\n2 4\n", "1 2 3\n", r"train\.txt has 2 lines but .*test\.txt has 1"),
        ("1 2\n\n3 4\n", "1 2 3\n\n3 4 5\n", r"line 2 of .*test\.txt must hold a user and at least one item"),
        ("1 2\n2\n", None, r"line 2 of .*train\.txt must hold a user and at least one item, not '2'"),
        ("1 2\n2 3\n1 3\n", None, r"line 3 of .*train\.txt is a second line of user '1'"),
        ("", None, r"test_.* holds no interactions"),
        (None, "1 2\n", r"has no train\.txt"),
    ],
)
def test_an_error_in_a_folder_is_named(write, tmp_path, train, test, sentence):
    for name, content in [("train.txt", train), ("test.txt", test)]:
        if content is not None:
            write(name, content)
    with pytest.raises(ValueError, match=sentence):
        load_interactions(tmp_path)


def test_a_folder_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "train.txt").write_bytes("1 é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 text"):
        load_interactions(tmp_path)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("", {}, r"a\.csv is empty"),
        ("user_id,item_id\n", {}, r"a\.csv holds no interactions"),
        (
            "user_id,thing,rating\n1,2,3\n",
            {},
            r"a\.csv has no item column .* 'user_id', 'thing', 'rating'\. .*item_column",
        ),
        (
            "user_id,item_id\n1,2\n",
            {"user_column": "who"},
            r"a\.csv has no column 'who'; its columns are 'user_id', 'item_id'",
        ),
        ("user_id,item_id\n1,2\n,3\n,4\n", {}, r"a\.csv has 2 of 3 rows without user id \(rows 2, 3\)"),
        ("user_id,item_id\n1,2\n1,\n", {}, r"a\.csv has 1 of 2 rows without item id \(row 2\)"),
        ("user_id,item_id\n1,a\u200bb\n", {}, r"a\.csv: item id 'a\\u200bb' contains the character"),
        (
            "user_id,item_id,rating\n1,2,3\n1,3,nan\n",
            {"min_rating": 1},
            r"a\.csv has 1 of 2 rows without rating \(row 2\)",
        ),
        (
            "user_id,item_id,rating\n1,2,3\n1,3,\n",
            {"min_rating": 1},
            r"a\.csv has 1 of 2 rows without rating \(row 2\)",
        ),
        (
            "user_id,item_id,rating\n1,2,inf\n",
            {"min_rating": 1},
            r"1 of 1 rows have an infinite rating, the first of them row 1",
        ),
        (
            "user_id,item_id,rating\n1,2,3\n1,3,good\n",
            {"min_rating": 1},
            r"a\.csv: the rating 'good' of row 2 is not a number",
        ),
        (
            "user_id,item_id,time\n1,2,3\n1,3,\n",
            {},
            r"a\.csv has 1 of 2 rows without timestamp \(row 2\)",
        ),
        (
            "user_id,item_id,time\n1,2,2024-01-01\n1,3,soon\n",
            {},
            r"the timestamp 'soon' of row 2 is not a number or an ISO 8601",
        ),
        ("user_id,item_id,time\n1,2,2024-01-01\n1,3,17\n", {}, r"timestamps are written in more than one way"),
        ("user_id,item_id\n1,2\n1,2,3\n", {}, r"a\.csv cannot be read: .*Expected 2 fields in line 3, saw 3"),
        ("user_id,item_id\n1,2,3\n1,2,3\n", {}, r"a\.csv cannot be read: row 1 has more fields than the 2 columns"),
        ("user_id,item_id,time\n1,2,3\n1\n", {}, r"a\.csv has 1 of 2 rows without item id \(row 2\)"),
        ("user_id/item_id\n1/2\n", {}, r"a\.csv has a single column, 'user_id/item_id'; separate its columns by ','"),
        ('user_id,item_id\n1,"2\n', {}, r"a\.csv cannot be read"),
        ("user_id,item_id\n1,2\n", {"min_rating": 4}, r"min_rating=4 needs ratings, but .*a\.csv has no rating column"),
        (
            "user_id,item_id,rating\n1,2,3\n",
            {"min_rating": 4},
            r"none of the 1 interactions of .*a\.csv is left after min_rating=4;",
        ),
        ("user_id,item_id\n1,2\n", {"k_core": 2}, r"is left after k_core=2;"),
        ("user_id,item_id\n1,2\n", {"k_core": 0}, r"k_core is 0"),
        ("user_id,item_id\n1,2\n", {"keep": "all"}, r"keep is 'all'; .* the 'first' or the 'last' is kept"),
        ("user_id,item_id\n1,\n", {"drop_incomplete": True}, r"is left after drop_incomplete=True;"),
        (
            "user_id,item_id,time\n1,,\n1,2,\n",
            {"drop_incomplete": True},
            r"none of the 2 .* after drop_incomplete=True;",
        ),
    ],
)
def test_an_error_in_a_table_is_named(write, content, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_interactions(write("a.csv", content), **options)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"user_id": [], "item_id": []}, "the data set holds no interactions"),
        ({"user_id": ["a"]}, "the data set has no item column"),
        (
            {"user_id": ["a", None], "item_id": ["1", "2"]},
            r"the data set has 1 of 2 rows without user id \(row 2\)",
        ),
        ({"user_id": [1.0, float("nan")], "item_id": [1, 2]}, "1 of 2 rows without user id"),
        ({"user_id": ["", "b"], "item_id": [1, 2]}, "1 of 2 rows without user id"),
        ({"user_id": [1.5, 2.0], "item_id": [1, 2]}, "the user ids are of type double; ids are text or whole numbers"),
        ({"user_id": [[1], [2]], "item_id": [1, 2]}, "the user ids are of type list"),
        ({"user_id": [1], "item_id": [1], "timestamp": [float("nan")]}, "1 of 1 rows without timestamp"),
        ({"user_id": [1], "item_id": [1], "timestamp": [[3]]}, "the timestamps are of type list.*, not numbers"),
    ],
)
def test_an_error_in_a_dataset_is_named(columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_interactions(Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "[1, 2]\n", "must hold one JSON object on each line, but line 1 is a list"),
        ("a.jsonl", "user_id,item_id\n", "must hold one JSON object on each line, but line 1 is not valid JSON"),
        (
            "a.jsonl",
            '{"user_id": 1, "item_id": 2}\n\n{"user_id": 1\n',
            r"a\.jsonl must hold .*, but line 3 is not valid JSON",
        ),
        ("a.jsonl", '{"user_id": 1, "item_id": 2}\n\n7\n', r"a\.jsonl must hold .*, but line 3 is a int"),
        ("a.jsonl", '{"user_id": true, "item_id": 2}\n{"user_id": "x", "item_id": 2}\n', r"a\.jsonl cannot be read"),
        ("a.jsonl", "\n", r"a\.jsonl is empty"),
        ("a.parquet", "user_id", r"a\.parquet cannot be read"),
        ("a.xlsx", "user_id", r"a\.xlsx has an unknown file extension; give a text file"),
        ("a.csv.gz", "user_id,item_id\n", r"a\.csv\.gz cannot be unpacked"),
    ],
)
def test_an_unreadable_file_is_named(write, name, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_interactions(write(name, content))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        FileNotFoundError, match="'movielens' is neither a file, a folder nor a known data set .*demo, ml-100k.*beauty"
    ):
        load_interactions("movielens")


def test_a_dataset_dict_of_several_splits_is_refused():
    with pytest.raises(TypeError, match="a list of dicts, not from a DatasetDict of"):
        split = Dataset.from_dict({"user_id": [1], "item_id": [1]})
        load_interactions(DatasetDict(train=split, test=split))


def test_splitting_needs_three_interactions_of_a_user_and_the_columns():
    two = load_interactions(Dataset.from_dict({"user_id": [1, 1, 2], "item_id": [1, 2, 1]}))
    with pytest.raises(ValueError, match=r"no user has 3 interactions or more \(the most is 2\)"):
        leave_one_out(two)
    with pytest.raises(ValueError, match="min_interactions is 2; it must be 3 or more"):
        leave_one_out(two, min_interactions=2)
    with pytest.raises(ValueError, match="no column 'item_id' but 'user_id'"):
        leave_one_out(two.select_columns("user_id"))
    with pytest.raises(ValueError, match=r"holds no interactions"):
        leave_one_out(two.select([]))


# Real data -----------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"), [("lastfm", 1090, 3646, 52551), ("beauty", 22363, 12101, 198502)]
)
def test_prepared_sets_give_the_targets_of_their_files(name, users, items, interactions):
    folder = real(name)
    found = load_interactions(folder)
    assert (len(found.unique("user_id")), len(found.unique("item_id")), len(found)) == (users, items, interactions)
    splits = leave_one_out(found)
    lines = {
        split: [line.split() for line in (folder / f"{split}.txt").read_text().splitlines()]
        for split in ("train", "test")
    }
    assert tuples(splits["test"]) == [(line[0], line[-1]) for line in lines["test"]]
    assert tuples(splits["validation"]) == [(line[0], line[-1]) for line in lines["train"]]
    assert tuples(splits["train"]) == [(line[0], item) for line in lines["train"] for item in line[1:-1]]


@pytest.mark.data
def test_movielens_100k_is_read_whole_and_in_time_order():
    found = load_interactions(real("ml-100k") / "ml-100k.inter")
    assert (len(found.unique("user_id")), len(found.unique("item_id")), len(found)) == (943, 1682, 100_000)
    users, times = np.array(found["user_id"][:]), np.array(found["timestamp"][:])
    same = users[1:] == users[:-1]
    assert same.sum() == 100_000 - 943
    assert (np.diff(times)[same] >= 0).all()


def test_a_stream_is_read_like_the_data_set():
    demo = load_interactions("demo")
    stream = demo.add_column("other", [0] * len(demo)).to_iterable_dataset(num_shards=3)
    assert load_interactions(stream)[:] == demo[:]


def test_interactions_go_to_the_hub_and_come_back(hub, tmp_path):
    script = """
from datasets import load_dataset
from tokenrec_hf import load_interactions

ours = load_interactions("demo")
ours.push_to_hub("tester/interactions", private=True)
assert load_interactions("hf://datasets/tester/interactions")[:] == ours[:]
assert load_interactions("hf://datasets/tester/interactions@main", k_core=5)[:] == load_interactions("demo", k_core=5)[:]
stream = load_dataset("tester/interactions", split="train", streaming=True)
assert load_interactions(stream)[:] == ours[:]
try:
    load_interactions("hf://datasets/tester/none")
except FileNotFoundError as error:
    print(error)
"""
    environment = {**os.environ, **hub.environment(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("hf://datasets/tester/none could not be read (")
    assert any(path.endswith(".parquet") for path in hub.files("tester/interactions", kind="dataset"))
