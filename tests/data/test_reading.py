"""Files in the formats that people have: a table of how each is written, and that all of them give the same interactions."""

import bz2
import datetime
import gzip
import io
import json
import logging
import lzma
import zipfile
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from datasets import Dataset, DatasetDict

from tokenrec_hf.data.interactions import ReadingOptions, load_interactions, read_interactions
from tokenrec_hf.data.reading import read_items
from tokenrec_hf.models.embedding_store import check_metadata

# User, item, rating, time.
ROWS = [
    ("7", "b1", "5", "978300760"),
    ("9", "a2", "3", "978302109"),
    ("7", "a2", "4", "978301968"),
    ("9", "c3", "1", "978300275"),
    ("7", "c3", "2", "978824291"),
]
CLEAN = [
    ("7", "b1", 978300760),
    ("7", "a2", 978301968),
    ("7", "c3", 978824291),
    ("9", "c3", 978300275),
    ("9", "a2", 978302109),
]
HEADER = ("user_id", "item_id", "rating", "timestamp")


def lines(delimiter, header=HEADER, rows=ROWS, end="\n"):
    return end.join(delimiter.join(map(str, row)) for row in [*([header] if header else []), *rows]) + end


def objects(header=HEADER, rows=ROWS):
    return [dict(zip(header, row)) for row in rows]


def zipped(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return packed.getvalue()


def parquet(rows=ROWS):
    stream = io.BytesIO()
    pa_parquet.write_table(pa.Table.from_pylist(objects(rows=rows)), stream)
    return stream.getvalue()


ZSTD = pa.compress(lines(",").encode(), codec="zstd", asbytes=True)
YELP = ("review_id", "user_id", "business_id", "stars", "date")
NUMBERS = {"user_column": "1", "item_column": "2", "rating_column": "3", "timestamp_column": "4"}
# What it is, the name of the file, its content, and the options of `load_interactions`.
TABLE = [
    ("CSV", "a.csv", lines(","), {}),
    ("CSV with line ends of Windows", "a.csv", lines(",", end="\r\n"), {}),
    ("CSV with a byte order mark", "a.csv", lines(",").encode("utf-8-sig"), {}),
    ("CSV in UTF-16", "a.csv", lines(",").encode("utf-16"), {}),
    ("CSV with quotes", "a.csv", lines(",", rows=[[f'"{value}"' for value in row] for row in ROWS]), {}),
    ("CSV with spaces after commas", "a.csv", lines(", "), {}),
    ("CSV with spaces around ids", "a.csv", lines(",", rows=[(f"{u} ", f"{i} ", r, t) for u, i, r, t in ROWS]), {}),
    ("CSV without a last line end", "a.csv", lines(",").rstrip(), {}),
    ("CSV with a blank line", "a.csv", lines(",") + "\n\n", {}),
    ("CSV with semicolons", "a.csv", lines(";"), {}),
    ("CSV with decimal commas that are not needed", "a.csv", lines(";", rows=[(u, i, "5,5", t) for u, i, _, t in ROWS]).replace("rating", "note"), {}),
    ("CSV with tabs", "a.csv", lines("\t"), {}),
    ("CSV with bars", "a.csv", lines("|"), {}),
    ("CSV without a header", "a.csv", lines(",", header=None), {}),
    ("CSV without a header, times before ratings", "a.csv", lines(",", header=None, rows=[(u, i, t, r) for u, i, r, t in ROWS]), {}),
    ("CSV without a header, times as dates", "a.csv", lines(",", header=None, rows=[(u, i, r, datetime.datetime.fromtimestamp(int(t), datetime.UTC).isoformat()) for u, i, r, t in ROWS]), {}),
    ("CSV without a header, columns by number", "a.csv", lines(",", header=None), NUMBERS),
    ("CSV with a header, columns by number", "a.csv", lines(",", header=("who", "what", "stars!", "at")), NUMBERS),
    ("CSV with names of its own", "a.csv", lines(",", header=("wer", "was", "wie", "wann")), {"user_column": "wer", "item_column": "was", "timestamp_column": "wann"}),
    ("CSV with names of a shop", "a.csv", lines(",", header=("Customer", "Product", "Stars", "When")), {}),
    ("CSV with names of a library", "a.csv", lines(",", header=("member_id", "book", "rating", "ts")), {}),
    ("CSV with names in capitals", "a.csv", lines(",", header=("UserID", "ItemID", "Rating", "Timestamp")), {}),
    ("CSV in another order", "a.csv", lines(",", header=HEADER[::-1], rows=[row[::-1] for row in ROWS]), {}),
    ("TSV", "a.tsv", lines("\t"), {}),
    ("TSV with commas", "a.tsv", lines(","), {}),
    ("ratings.dat of MovieLens-1M", "ratings.dat", lines("::", header=None), {}),
    ("u.data of MovieLens-100K", "u.data", lines("\t", header=None), {}),
    ("ratings.csv of MovieLens-20M", "ratings.csv", lines(",", header=("userId", "movieId", "rating", "timestamp")), {}),
    ("ratings of Amazon without a header", "ratings_Beauty.csv", lines(",", header=None), {}),
    ("ratings of Amazon 2023", "Beauty.csv", lines(",", header=("user_id", "parent_asin", "rating", "timestamp")), {}),
    ("reviews of Amazon", "reviews.json", "\n".join(json.dumps(dict(zip(("reviewerID", "asin", "overall", "unixReviewTime"), (u, i, float(r), int(t))))) for u, i, r, t in ROWS), {}),
    ("reviews of Yelp", "review.json", "\n".join(json.dumps(dict(zip(YELP, ("x", u, i, r, pd.Timestamp(int(t), unit="s").isoformat(" "))))) for u, i, r, t in ROWS), {}),
    ("events of RetailRocket", "events.csv", lines(",", header=("timestamp", "visitorid", "event", "itemid", "transactionid"), rows=[(t, u, "view", i, "") for u, i, _, t in ROWS]), {}),
    ("atomic file of RecBole", "a.inter", lines("\t", header=("user_id:token", "item_id:token", "rating:float", "timestamp:float")), {}),
    ("text with spaces", "a.txt", lines(" "), {}),
    ("text with spaces, without a header", "a.txt", lines(" ", header=None), {}),
    ("text with bars, without a header", "a.log", lines("|", header=None), {}),
    ("a file without extension", "ratings", lines(","), {}),
    ("a file without extension, with bars in a column", "ratings", lines(",", header=("user_id", "item_id", "no|te", "timestamp"), rows=[(u, i, "5|6", t) for u, i, _, t in ROWS]), {}),
    ("JSON lines", "a.jsonl", "\n".join(map(json.dumps, objects())), {}),
    ("a JSON array", "a.json", json.dumps(objects()), {}),
    ("a JSON array over several lines", "a.json", json.dumps(objects(), indent=2), {}),
    ("Parquet", "a.parquet", parquet(), {}),
    ("gzip", "a.csv.gz", gzip.compress(lines(",").encode()), {}),
    ("gzip of ratings.dat", "ratings.dat.gz", gzip.compress(lines("::", header=None).encode()), {}),
    ("bzip2", "a.tsv.bz2", bz2.compress(lines("\t").encode()), {}),
    ("xz", "a.csv.xz", lzma.compress(lines(",").encode()), {}),
    ("Zstandard", "a.csv.zst", ZSTD, {}),
    ("zip", "a.zip", zipped(a_csv=lines(",")), {}),
    ("zip of JSON lines", "a.zip", zipped(a_jsonl="\n".join(map(json.dumps, objects()))), {}),
    ("UserBehavior of Taobao", "UserBehavior.csv", lines(",", header=None, rows=[(u, i, "4145813", "pv", t) for u, i, _, t in ROWS]), {}),
    ("user_log of Tmall", "user_log.csv", lines(",", header=("user_id", "item_id", "cat_id", "time_stamp", "action_type"), rows=[(u, i, "833", t, "0") for u, i, _, t in ROWS]), {}),
    ("events of REES46", "2019-Oct.csv", lines(",", header=("event_time", "event_type", "product_id", "price", "user_id"), rows=[(pd.Timestamp(int(t), unit="s").isoformat(" ") + " UTC", "view", i, "", u) for u, i, _, t in ROWS]), {}),
    ("events of REES46, some kinds", "2019-Oct.csv", lines(",", header=("event_time", "event_type", "product_id", "user_id"), rows=[(t, "cart", i, u) for u, i, _, t in ROWS] + [("1", "view", "x", "7")]), {"events": ["cart"]}),
    ("check-ins of Gowalla", "Gowalla.txt", lines("\t", header=None, rows=[(u, pd.Timestamp(int(t), unit="s").isoformat() + "Z", "30.2", "-97.7", i) for u, i, _, t in ROWS]), {"item_column": "5", "timestamp_column": "2"}),
    ("ratings of Book-Crossing, with a time", "BX.csv", lines(";", header=('"User-ID"', '"ISBN"', '"Book-Rating"', '"Date"'), rows=[[f'"{value}"' for value in row] for row in ROWS]), {}),
    ("CSV with missing values in a column that is not used", "a.csv", lines(",", rows=[(u, i, "NULL", t) for u, i, _, t in ROWS]), {}),
    ("CSV with incomplete rows", "a.csv", lines(",", rows=[*ROWS, ("nan", "b1", "1", "5"), ("7", "N/A", "1", "5"), ("7", "z", "1", "")]), {"drop_incomplete": True}),
    ("CSV with ratings to leave out", "a.csv", lines(",", rows=[*ROWS, ("7", "z", "0.5", "5")]), {"min_rating": 1}),
    ("CSV with a pair again, later", "a.csv", lines(",", rows=[*ROWS, ("7", "b1", "1", "978900000")]), {}),
    ("CSV with a pair earlier, the last counts", "a.csv", lines(",", rows=[("7", "a2", "1", "978000000"), *ROWS]), {"keep": "last"}),
    ("JSON lines with nulls in a column that is not used", "a.jsonl", "\n".join(json.dumps({**row, "rating": None}) for row in objects()), {}),
    ("times in dates", "a.csv", lines(",", rows=[(u, i, r, pd.Timestamp(int(t), unit="s").isoformat()) for u, i, r, t in ROWS]), {}),
]  # fmt: skip


def tuples(dataset):
    return list(zip(*dataset.select_columns(["user_id", "item_id", "timestamp"])[:].values()))


@pytest.mark.parametrize(("name", "content", "options"), [pytest.param(*entry, id=what) for what, *entry in TABLE])
def test_a_file_as_people_have_it_gives_the_interactions(tmp_path, name, content, options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tuples(load_interactions(path, **options)) == CLEAN


def test_the_table_is_long():
    assert len(TABLE) >= 40 and len({what for what, *_ in TABLE}) == len(TABLE)


FRAME = pd.DataFrame(objects())
OBJECTS = {
    "a data frame": lambda: FRAME,
    "a data frame with an index": lambda: FRAME.set_index(pd.Index([5, 6, 7, 8, 9])),
    "a table of Arrow": lambda: pa.Table.from_pandas(FRAME),
    "a list of dicts": objects,
    "a dictionary of one split": lambda: DatasetDict({"train": Dataset.from_list(objects())}),
    "a data set": lambda: Dataset.from_list(objects()),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_an_object_as_people_have_it_gives_the_interactions(make):
    assert tuples(load_interactions(make())) == CLEAN


@pytest.mark.parametrize("make", [list, pd.DataFrame])
def test_ids_of_several_types_are_refused_in_a_sentence(make):
    rows = [{"user_id": "a", "item_id": 1}, {"user_id": 2, "item_id": 1}]
    with pytest.raises(ValueError, match="values of several types .*; make ids text"):
        load_interactions(make(rows))


@pytest.mark.parametrize("source", [None, 5, ["a"]])
def test_what_is_no_source_of_interactions_is_refused(source):
    with pytest.raises(TypeError, match="interactions come from a name, a path, .*, not from a"):
        load_interactions(source)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_of_parts_is_one_table(tmp_path, suffix):
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        content = {
            ".csv": lines(",", rows=rows).encode(),
            ".jsonl": "\n".join(map(json.dumps, objects(rows=rows))).encode(),
            ".parquet": parquet(rows),
        }[suffix]
        (tmp_path / f"part-{number:05}{suffix}").write_bytes(content)
    (tmp_path / "_SUCCESS").touch()
    assert tuples(load_interactions(tmp_path)) == CLEAN


def test_ids_in_latin_1_are_read_and_said_to_be(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_bytes("user_id,item_id\nZoë,café\nZoë,tea\n".encode("latin-1"))
    assert load_interactions(path)["user_id"][:] == ["Zoë", "Zoë"]
    assert "a.csv is not UTF-8 text and is read as Latin-1" in caplog.text


def test_a_column_that_is_not_needed_may_be_in_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("user_id,item_id,title\nZoë,café,".encode() + "Café\n".encode("latin-1"))
    assert load_interactions(path)["user_id"][:] == ["Zoë"]


def test_json_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"user_id": "Zoë", "item_id": "tea"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 text"):
        load_interactions(path)


def test_what_was_found_is_said(tmp_path, caplog):
    path = tmp_path / "ratings.dat"
    path.write_text(lines("::", header=None))
    with caplog.at_level(logging.INFO, logger="tokenrec_hf"):
        load_interactions(path)
    assert caplog.messages == [
        f"{path}: UTF-8 text, columns separated by '::', without a header; users from column '1' (by its place), items from "
        "column '2' (by its place), timestamps from column '4' (by its values), not used: '3'. 5 rows; 2 users, 3 items and 5 "
        "interactions are kept, from 2000-12-31 22:04:35 to 2001-01-06 23:38:11."
    ]


def test_what_was_dropped_is_counted_by_reason(tmp_path):
    rows = [*ROWS, ROWS[0], ("", "a2", "5", "1"), ("7", "d4", "1", "978300761"), ("8", "a2", "4", "978300762")]
    rows.append(("9", "b1", "3", "978302110"))
    path = tmp_path / "a.csv"
    path.write_text(lines(",", header=("user_id", "thing", "rating", "timestamp"), rows=rows))
    options = ReadingOptions(item_column="thing", min_rating=2, drop_incomplete=True, k_core=2)
    interactions, report = read_interactions(path, options)
    assert report.dropped == {
        "incomplete": 1,
        "rated below 2": 2,
        "repeated (the first of each pair counts)": 1,
        "outside the 2-core": 2,
    }
    assert (report.rows, report.users, report.items, report.interactions) == (10, 2, 2, 4) and len(interactions) == 4
    assert (
        "10 rows; 1 incomplete, 2 rated below 2, 1 repeated (the first of each pair counts), 2 outside the 2-core are "
        "dropped; 2 users, 2 items and 4 interactions are kept"
    ) in str(report)
    assert options.given() == {"item_column": "thing", "min_rating": 2, "drop_incomplete": True, "k_core": 2}


def test_other_events_are_counted_apart(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,event\nu,a,buy\nu,b,view\n,c,view\n")
    _, report = read_interactions(path, ReadingOptions(events=["buy"]))
    assert report.dropped == {"of other events": 2}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"\n\n", r"a\.csv is empty"),
        ("a.csv", b"user_id\n1\n", r"single column, 'user_id'"),
        ("a.csv", b"alice,matrix\nbob,alien\n", r"no user column with a common name; .* give its number, from 1"),
        ("a.csv", b"wer;was\n1;2\n", r"no user column with a common name; its columns are 'wer', 'was'"),
        ("a.txt", b"what is this\nno table at all, as it seems\n", "columns"),
        ("a.bin", bytes(range(256)), r"a\.bin is no text file"),
        ("a.xlsx", b"PK", "unknown file extension"),
        ("a.csv.gz", b"no gzip", "cannot be unpacked"),
        ("a.csv.xz", b"no xz", "cannot be unpacked"),
        ("a.zip", zipped(a_csv="1,2", b_csv="1,2"), r"holds 2 files \('a\.csv', 'b\.csv'\); unpack it"),
        ("a.json", b"[1, 2", "is not valid JSON"),
        ("a.json", b'[{"user_id": 1, "item_id": 2}, 3]', "one JSON object on each line"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_a_sentence(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_interactions(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", [10**3, 10**6, 10**9])
def test_times_in_parts_of_seconds_are_in_order_and_shown_as_dates(tmp_path, unit):
    path = tmp_path / "a.csv"
    path.write_text(lines(",", rows=[(u, i, r, int(t) * unit) for u, i, r, t in ROWS]))
    found, report = read_interactions(path, ReadingOptions())
    assert tuples(found) == [(user, item, time * unit) for user, item, time in CLEAN]
    assert (report.first, report.last) == ("2000-12-31 22:04:35", "2001-01-06 23:38:11")


def test_small_times_of_a_file_without_header_are_its_fourth_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("u,a,5,3\nu,b,4,1\nu,c,1,2\n")
    assert tuples(load_interactions(path)) == [("u", "b", 1), ("u", "c", 2), ("u", "a", 3)]


def test_a_file_of_two_lines_without_header_loses_neither(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1,2\n1,3\n")
    assert load_interactions(path)["item_id"] == ["2", "3"]


def test_text_without_header_is_read_by_the_numbers_of_its_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("alice\tx\tmatrix\nbob\tx\talien\n")
    found = load_interactions(path, user_column="1", item_column="3")
    assert found[:] == {"user_id": ["alice", "bob"], "item_id": ["matrix", "alien"]}


def test_any_table_of_items_is_metadata_that_a_store_takes(tmp_path):
    """Odd names, missing and infinite values, lists: nothing may be refused after a training."""
    path = tmp_path / "items.parquet"
    table = {
        "item_id": ["a ", "b"],
        "title": ["Alien", None],
        "2020 sales": [1.5, None],
        "ratio": [float("inf"), 1.0],
        "tags": [["x", "y"], []],
        "new": [True, False],
        "year:float": [1979, 1986],
    }
    pa_parquet.write_table(pa.table(table), path)
    ids, metadata = read_items(path)
    assert ids == ["a", "b"] and check_metadata(metadata, 2) == metadata
    assert metadata[0] == {
        "title": "Alien", "_2020_sales": 1.5, "ratio": "inf", "tags": "x, y", "new": True, "year": 1979,
    }  # fmt: skip
    assert metadata[1] == {"ratio": "1.0", "new": False, "year": 1986}


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl"])
def test_numbers_of_items_are_numbers_and_text_is_text(tmp_path, name):
    path = tmp_path / name
    rows = [{"id": "7", "title": "Up", "year": "2009"}, {"id": "9", "title": "1917", "year": ""}]
    text = "id,title,year\n7,Up,2009\n9,1917,\n"
    path.write_text(
        text if name.endswith("csv") else "\n".join(json.dumps({**row, "year": row["year"] or None}) for row in rows)
    )
    assert read_items(path) == (["7", "9"], [{"title": "Up", "year": 2009}, {"title": "1917"}])


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl", "items.parquet"])
def test_text_of_items_keeps_its_zeros(tmp_path, name):
    frame = pd.DataFrame(
        {
            "id": ["a", "b"],
            "title": ["007", "12"],
            "isbn": ["0001", "12"],
            "code": ["1e3", "2"],
            "price": ["1.50", "12"],
        }
    ).assign(share=["1e-05", "0.5"], sku=["12345678901234567890", "1"])
    write = {"items.csv": frame.to_csv, "items.jsonl": frame.to_json, "items.parquet": frame.to_parquet}[name]
    write(tmp_path / name, **({"orient": "records", "lines": True} if name == "items.jsonl" else {"index": False}))
    expected = [
        {"title": "007", "isbn": "0001", "code": "1e3", "price": 1.5, "share": 1e-05, "sku": "12345678901234567890"},
        {"title": "12", "isbn": "12", "code": "2", "price": 12, "share": 0.5, "sku": "1"},
    ]
    assert read_items(tmp_path / name) == (["a", "b"], expected)


def test_times_and_decimals_of_items_can_be_compared(tmp_path):
    times = [datetime.datetime(2024, 5, 17), datetime.datetime(2024, 5, 17, 9, 30), None]
    table = {
        "id": ["a", "b", "c"],
        "released": pa.array(times, pa.timestamp("ns")),
        "day": pa.array([datetime.date(2024, 5, 17), None, None]),
        "price": pa.array([Decimal("1.50"), None, Decimal("2")]),
        "year": pa.array([1979, None, 1986]),
    }
    pa_parquet.write_table(pa.table(table), tmp_path / "items.parquet")
    _, metadata = read_items(tmp_path / "items.parquet")
    assert metadata == [
        {"released": "2024-05-17", "day": "2024-05-17", "price": 1.5, "year": 1979},
        {"released": "2024-05-17 09:30:00"},
        {"price": 2.0, "year": 1986},
    ]
    assert isinstance(metadata[0]["year"], int)


@pytest.mark.parametrize("name", ["items.csv", "items.parquet"])
def test_items_have_the_ids_of_the_interactions_where_pandas_wrote_both(tmp_path, name, caplog):
    frame = pd.DataFrame({"item_id": [1.0, 20.0], "title": ["Up", "Alien"]})
    frame.to_csv(tmp_path / name, index=False) if name.endswith("csv") else frame.to_parquet(tmp_path / name)
    interactions = tmp_path / "interactions.csv"
    interactions.write_text("user_id,item_id\nu,1.0\nu,20.0\n")
    assert read_items(tmp_path / name)[0] == load_interactions(interactions)["item_id"][:] == ["1", "20"]
    assert "interactions.csv: the item ids are all written like 1.0 and are read like 1." in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "items.jsonl",
            '{"id": "a", "title": "Café"}'.encode("latin-1"),
            "items.jsonl is not UTF-8 text .* save it as UTF-8",
        ),
        ("items.csv", b"id,title\na,Up\nb,Alien\n" * 30 + b"c,Up,1\n", "items.csv cannot be read: .* in line"),
        ("items.csv", b"id,title,title\na,Up,Alien\n", "items.csv has two columns of one name"),
        ("items.parquet", b"PAR1", "items.parquet cannot be read: "),
    ],
)
def test_an_error_in_a_table_of_items_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / name)


def test_a_broken_line_of_json_is_counted_from_one(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"user":"a","item":"x"}\n{"user":"a","item":\n{"user":"a","item":"z"}\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        load_interactions(path)


def test_a_header_after_blank_lines_is_no_interaction(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\n\nuser_id,item_id\nu1,i1\nu1,i2\n")
    assert load_interactions(path)["user_id"][:] == ["u1", "u1"]


LONG_IDS = [1234567890123456780 + number for number in range(4)]


def test_long_ids_of_json_stay_whole_where_a_row_has_none(tmp_path):
    path = tmp_path / "table.jsonl"
    rows = [{"user_id": 7, "item_id": one} for one in LONG_IDS] + [{"user_id": 7}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_interactions(path, drop_incomplete=True)["item_id"][:] == list(map(str, LONG_IDS))


def test_long_ids_of_items_stay_whole_where_values_are_missing(tmp_path):
    path = tmp_path / "items.jsonl"
    rows = [{"item_id": one, "year": 1999} for one in LONG_IDS[:2]] + [{"item_id": LONG_IDS[2]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_items(path) == (list(map(str, LONG_IDS[:3])), [{"year": 1999}, {"year": 1999}, {}])


def test_parts_with_ids_as_numbers_and_as_text_are_one_table(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\nu1,i1\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"user_id": 1, "item_id": 2}))
    assert load_interactions(tmp_path)[:] == {"user_id": ["u1", "1"], "item_id": ["i1", "2"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_quotes_are_characters_between_double_colons(tmp_path, encoding):
    path = tmp_path / "ratings.dat"
    path.write_text('u1::5" disc::5\nu1::café::4\nu2::café::3\n', encoding=encoding)
    found = load_interactions(path, user_column="1", item_column="2")
    assert found["item_id"][:] == ['5" disc', "café", "café"]


def test_missing_values_of_items_are_no_values(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("id,title,year\n1,Up,1999\n2,N/A,nan\n3,NULL,2005\n")
    assert read_items(path)[1] == [{"title": "Up", "year": 1999}, {}, {"year": 2005}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,title\n1,Up\n,Alien\n", "row 2 has no id; give every row an id"),
        ("id,withdrawn\n1,true\n", "withdraw items with"),
    ],
)
def test_tables_of_items_that_would_do_harm_are_refused(tmp_path, text, message):
    path = tmp_path / "items.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_items(path)
