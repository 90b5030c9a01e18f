import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tokenrec_hf.data.interactions import load_interactions
from tokenrec_hf.data.named_datasets import DATA_SOURCES, load_item_titles, locate

DATA = Path(os.environ.get("TOKENREC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")

UDATA = "".join(f"{user}\t{item}\t{1 + item % 5}\t{100 - item}\n" for user in (3, 1, 2) for item in range(1, 6))


def packed(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


MOVIES = packed({"ml-100k/u.data": UDATA, "ml-100k/u.item": "1|Café (1995)|x\n2|Two|x\n".encode("latin-1")})


def tuples(dataset):
    return list(zip(*dataset[:].values()))


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """No data on disk, an empty cache, no proxy, not told to be offline."""
    monkeypatch.setenv("TOKENREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("TOKENREC_DATA_DIR", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def server():
    """Serves `answers[path] = (bytes sent, length promised or None)`, and counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.path not in self.server.answers:
                self.send_error(404)
                return
            content, length = self.server.answers[self.path]
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answers, server.requests = {}, 0
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def publish(server, monkeypatch):
    """Lets a named data set come from the server on this machine."""

    def publish_content(name, content, length=..., md5=..., **changes):
        source = DATA_SOURCES[name]
        server.answers[f"/{source.file_name}"] = (content, len(content) if length is ... else length)
        md5 = hashlib.md5(content).hexdigest() if md5 is ... else md5
        url = f"http://127.0.0.1:{server.server_port}/{source.file_name}"
        monkeypatch.setitem(DATA_SOURCES, name, dataclasses.replace(source, url=url, md5=md5, **changes))

    return publish_content


def test_a_data_set_is_downloaded_once(publish, server, tmp_path):
    publish("ml-100k", MOVIES)
    first = load_interactions("ml-100k")
    assert (len(first), first[0]) == (15, {"user_id": "3", "item_id": "5", "timestamp": 95})
    assert os.listdir(tmp_path / "cache") == ["ml-100k.zip"]
    server.answers.clear()
    assert tuples(load_interactions("ml-100k")) == tuples(first)
    assert server.requests == 1


def test_the_terms_of_use_are_told_before_a_download(publish, caplog):
    publish("ml-100k", MOVIES)
    with caplog.at_level(logging.WARNING):
        locate("ml-100k")
        assert "Terms of use of ml-100k: research use" in caplog.text
        caplog.clear()
        locate("ml-100k")
    assert not caplog.text


def test_counts_that_are_not_the_known_ones_are_told(publish, caplog):
    publish("ml-100k", MOVIES)
    load_interactions("ml-100k")
    assert (
        "gives 3 users, 5 items and 15 interactions, but ml-100k is known to have 943, 1682 and 100000" in caplog.text
    )
    caplog.clear()
    load_interactions("ml-100k", min_rating=2)
    publish("ml-100k", MOVIES, counts=(3, 5, 15))
    load_interactions("ml-100k")
    assert not caplog.text


def test_a_file_with_a_wrong_checksum_is_deleted_from_the_cache(publish, tmp_path):
    publish("ml-100k", MOVIES, md5="0" * 32)
    with pytest.raises(
        ValueError,
        match=rf"ml-100k.zip\) does not match the known hash: expected md5:0000.* got {hashlib.md5(MOVIES).hexdigest()}",
    ):
        locate("ml-100k")
    assert os.listdir(tmp_path / "cache") == []


def test_an_interrupted_download_is_deleted_and_can_be_repeated(publish, tmp_path):
    publish("ml-100k", MOVIES[:100], length=len(MOVIES))
    with pytest.raises(
        ConnectionError,
        match=f"ml-100k.zip stopped early .*100 bytes read, {len(MOVIES) - 100} more expected.*; try again",
    ):
        locate("ml-100k")
    assert os.listdir(tmp_path / "cache") == []
    publish("ml-100k", MOVIES)
    assert locate("ml-100k").path.read_bytes() == MOVIES


REVIEWS = "".join(
    json.dumps(
        {
            "reviewerID": f"A{user}",
            "asin": f"B{item}",
            "reviewText": "so\nso",
            "overall": score,
            "unixReviewTime": 50 - item,
        }
    )
    + "\n"
    for user, item, score in [(1, 1, 5), (2, 1, 4.5), (1, 2, 1)]
)


WHOLE = gzip.compress(REVIEWS.encode())


@pytest.mark.parametrize("content", [WHOLE[:-9], WHOLE[:10] + b"\xff" + WHOLE[11:], b"<html>gone</html>"])
def test_without_a_checksum_a_download_must_be_a_whole_gzip_file(publish, tmp_path, content):
    publish("beauty", content, length=None, md5=None)
    with pytest.raises(ValueError, match=r"reviews_Beauty_5\.json\.gz is not a whole gzip file"):
        locate("beauty")
    assert os.listdir(tmp_path / "cache") == []


def test_amazon_reviews_are_read_straight_from_the_archive(publish):
    publish("beauty", gzip.compress(REVIEWS.encode()), md5=None)
    assert tuples(load_interactions("beauty")) == [("A1", "B2", 48), ("A1", "B1", 49), ("A2", "B1", 49)]
    assert tuples(load_interactions("beauty", min_rating=4.5)) == [("A1", "B1", 49), ("A2", "B1", 49)]


def test_movielens_1m_is_reduced_to_its_5_core_unless_told_otherwise(publish):
    full = [(user, item) for user in range(5) for item in range(5)]
    rows = [*full, (5, 0), (0, 9)]
    text = "".join(f"{user}::{item}::3::{item}\n" for user, item in rows)
    publish("ml-1m", packed({"ml-1m/ratings.dat": text}))
    assert tuples(load_interactions("ml-1m")) == [(str(user), str(item), item) for user, item in full]
    assert len(load_interactions("ml-1m", k_core=1)) == len(rows)


def test_lastfm_counts_the_first_tag_of_each_user_and_artist(publish):
    rows = [(user, artist, tag, 1000 * tag + artist) for tag in (8, 7) for user in range(5) for artist in range(5)]
    text = "userID\tartistID\ttagID\ttimestamp\n" + "".join(
        "\t".join(map(str, row)) + "\n" for row in [*rows, (9, 0, 1, 1)]
    )
    publish("lastfm", packed({"user_taggedartists-timestamps.dat": text}))
    assert tuples(load_interactions("lastfm")) == [
        (str(user), str(artist), 7000 + artist) for user in range(5) for artist in range(5)
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("u.data", UDATA.encode()),
        ("ml-100k.zip", MOVIES),
        ("ml-100k.inter", b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + UDATA.encode()),
    ],
)
def test_copies_on_disk_are_taken_before_the_cache_and_the_network(
    publish, server, tmp_path, monkeypatch, name, content
):
    publish("ml-100k", b"never asked for")
    (tmp_path / "data" / "ml-100k").mkdir(parents=True)
    (tmp_path / "data" / "ml-100k" / name).write_bytes(content)
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(tmp_path / "data"))
    assert len(load_interactions("ml-100k")) == 15
    assert server.requests == 0


def test_a_prepared_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "lastfm").mkdir()
    (tmp_path / "lastfm" / "train.txt").write_text("0 1 2\n1 2 3\n")
    (tmp_path / "lastfm" / "test.txt").write_text("0 1 2 3\n1 2 3 4\n")
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(tmp_path))
    assert tuples(load_interactions("lastfm")) == [
        ("0", "1"),
        ("0", "2"),
        ("0", "3"),
        ("1", "2"),
        ("1", "3"),
        ("1", "4"),
    ]


def test_a_mistyped_data_folder_is_an_error_not_a_download(publish, server, tmp_path, monkeypatch):
    publish("ml-100k", MOVIES)
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(tmp_path / "dta"))
    with pytest.raises(FileNotFoundError, match="TOKENREC_DATA_DIR is .*dta.*which is not a folder"):
        load_interactions("ml-100k")
    assert server.requests == 0


def test_a_damaged_archive_is_named(tmp_path, monkeypatch):
    (tmp_path / "ml-1m").mkdir()
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(tmp_path))
    for content in (b"not a zip", packed({"other": "x"})):
        (tmp_path / "ml-1m" / "ml-1m.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"ml-1m/ratings\.dat in .*ml-1m\.zip cannot be unpacked .*fetch it again"):
            load_interactions("ml-1m")


@pytest.mark.parametrize("content", [WHOLE[:-9], WHOLE[:10] + b"\xff" + WHOLE[11:], b"<html>gone</html>"])
def test_a_damaged_copy_on_disk_is_named(tmp_path, monkeypatch, content):
    (tmp_path / "beauty").mkdir()
    (tmp_path / "beauty" / "reviews_Beauty_5.json.gz").write_bytes(content)
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"reviews_Beauty_5\.json\.gz cannot be unpacked .*fetch it again"):
        load_interactions("beauty")


def test_an_absent_set_names_file_address_and_variable(publish, server, monkeypatch):
    publish("ml-1m", MOVIES)
    url = DATA_SOURCES["ml-1m"].url
    server.answers.clear()
    with pytest.raises(
        FileNotFoundError, match=f"ml-1m.zip of the data set 'ml-1m' .* {url} does not give it .*404.*TOKENREC_DATA_DIR"
    ):
        locate("ml-1m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=f"{url} is not asked because HF_HUB_OFFLINE is set; .*TOKENREC_DATA_DIR"
    ):
        locate("ml-1m")
    assert server.requests == 1


def test_an_unreachable_server_names_file_address_and_variable(publish, server):
    publish("ml-1m", MOVIES)
    server.shutdown()
    server.server_close()
    with pytest.raises(
        FileNotFoundError, match=r"ml-1m\.zip of .* http://127.0.0.1.* does not give it .*TOKENREC_DATA_DIR"
    ):
        locate("ml-1m")


@pytest.mark.parametrize("name", DATA_SOURCES)
def test_every_known_set_has_an_address_and_terms_of_use(name):
    source = DATA_SOURCES[name]
    assert source.name == name
    assert source.url.startswith("https://")
    assert source.md5 is None or (len(source.md5) == 32 and int(source.md5, 16))
    # Where no checksum is known, the gzip file's own must do.
    assert source.md5 or source.url.endswith(".gz")
    assert source.terms.endswith(".")


# Titles --------------------------------------------------------------------------------------------------------------


def test_titles_come_from_the_archive(publish):
    publish("ml-100k", MOVIES)
    assert load_item_titles("ml-100k") == {"1": "Café (1995)", "2": "Two"}


def test_titles_come_from_atomic_files(tmp_path):
    (tmp_path / "a.item").write_text(
        "item_id:token\tyear:token\tmovie_title:token_seq\n7\t1995\tToy Story\n", encoding="utf-8"
    )
    assert load_item_titles(tmp_path / "a.inter") == load_item_titles(str(tmp_path / "a.item")) == {"7": "Toy Story"}


def test_sources_without_titles_have_none(tmp_path, server):
    assert load_item_titles("lastfm") == {}
    assert load_item_titles(tmp_path / "a.csv") == {}
    assert load_item_titles(tmp_path) == {}
    assert server.requests == 0


@pytest.mark.data
def test_movielens_100k_has_a_title_for_every_item(monkeypatch):
    if not (DATA / "ml-100k").is_dir():
        pytest.skip(f"the real data set ml-100k is not in {DATA}; set TOKENREC_DATA_DIR")
    monkeypatch.setenv("TOKENREC_DATA_DIR", str(DATA))
    titles = load_item_titles("ml-100k")
    assert titles["1"] == "Toy Story"
    assert set(load_interactions("ml-100k").unique("item_id")) == set(titles)
