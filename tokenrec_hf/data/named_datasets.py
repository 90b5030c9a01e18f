"""The data sets known by name: where their owners publish them, and how they are downloaded.

A named set is looked up in the folder `TOKENREC_DATA_DIR`, then in the cache, and is then downloaded from its owner and
checked. The package ships no data. The sets are those of section III-A of TokenRec (arXiv 2406.10450) and MovieLens 100K.
"""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pooch
from requests.exceptions import ChunkedEncodingError, RequestException
from tqdm import tqdm

from .demo import demo_titles
from .files import RawFile

logger = logging.getLogger(__name__)

# The address of data sets on the Hub, as in `datasets` and `fsspec`.
HUB = "hf://datasets/"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DataSource:
    """A public data set at its owner.

    Args:
        name: the name that users give.
        url: the address of the file.
        counts: the numbers of users, items and interactions that remain after cleaning.
        terms: the terms of use, in one line.
        md5: the checksum of the file, in hexadecimal; None if none is published.
        member: the file of interactions inside the archive; None if the download is that file.
        delimiter: see [`RawFile`].
        columns: see [`RawFile`].
        k_core: the remaining users and items have at least this many interactions with each other; 1 keeps all.
    """

    name: str
    url: str
    counts: tuple[int, int, int]
    terms: str
    md5: str | None = None
    member: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None
    k_core: int = 1

    @property
    def file_name(self) -> str:
        """The name of the downloaded file."""
        return self.url.rsplit("/", 1)[-1]


_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_GROUPLENS = "https://files.grouplens.org/datasets"
_AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_MOVIELENS_TERMS = (
    "research use with acknowledgement; no redistribution and no commercial use without GroupLens' permission."
)
_AMAZON_TERMS = "its owners state no licence and offer it for research; cite McAuley et al., SIGIR 2015."

_SOURCES = (
    DataSource(
        name="ml-100k",
        url=f"{_GROUPLENS}/movielens/ml-100k.zip",
        counts=(943, 1682, 100_000),
        terms=_MOVIELENS_TERMS,
        md5="0e33842e24a9c977be4e0107933c0723",
        member="ml-100k/u.data",
        delimiter="\t",
        columns=_RATING_COLUMNS,
    ),
    DataSource(
        name="ml-1m",
        url=f"{_GROUPLENS}/movielens/ml-1m.zip",
        counts=(6040, 3416, 999_611),
        terms=_MOVIELENS_TERMS,
        md5="c4d9eecfca2ab87c1945afe126590906",
        member="ml-1m/ratings.dat",
        delimiter="::",
        columns=_RATING_COLUMNS,
        k_core=5,
    ),
    # The listening counts of HetRec have no time, so the paper's sequences must come from the times of tags: a user
    # interacts with an artist at the first tag. This derivation is our inference; the counts are the paper's.
    DataSource(
        name="lastfm",
        url=f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
        counts=(1090, 3646, 52_551),
        terms="non-commercial use; cite Last.fm and the HetRec 2011 workshop.",
        md5="296d61afe4e8632b173fc2dd3be20ce2",
        member="user_taggedartists-timestamps.dat",
        delimiter="\t",
        k_core=5,
    ),
    DataSource("beauty", f"{_AMAZON}/reviews_Beauty_5.json.gz", (22_363, 12_101, 198_502), _AMAZON_TERMS),
    DataSource(
        "clothing", f"{_AMAZON}/reviews_Clothing_Shoes_and_Jewelry_5.json.gz", (39_387, 23_033, 278_677), _AMAZON_TERMS
    ),
    DataSource("toys", f"{_AMAZON}/reviews_Toys_and_Games_5.json.gz", (19_412, 11_924, 167_597), _AMAZON_TERMS),
)
DATA_SOURCES = {source.name: source for source in _SOURCES}


def existing(source: str | os.PathLike) -> Path:
    """The path of a file or a folder with interactions.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source).expanduser()
    if not source or not path.exists():
        names = ", ".join(["demo", *DATA_SOURCES])
        raise FileNotFoundError(
            f"{str(source)!r} is neither a file, a folder nor a known data set ({names}); a data set on the Hub is "
            f"{HUB}organisation/name."
        )
    return path


def locate(name: str) -> RawFile:
    """Finds the raw file of a named data set, and downloads it if it is not on this machine.

    The set is looked up in `$TOKENREC_DATA_DIR/<name>/` (`train.txt` and `test.txt`, `<name>.inter`, the owner's file, or
    its archive), then in the cache (`$TOKENREC_CACHE`, by default `~/.cache/tokenrec_hf/datasets`). For `lastfm`, the
    prepared `train.txt` and `test.txt` are exactly the paper's data. The data made from the owner's archive (first tag of
    each user and artist, 5-core) are our inference.

    Args:
        name: a key of `DATA_SOURCES`.

    Raises:
        FileNotFoundError: the set is not on this machine and cannot be downloaded.
        ConnectionError: the download stopped early.
        ValueError: the downloaded file is not the expected file.
    """
    source = DATA_SOURCES[name]
    downloaded = RawFile(Path(source.file_name), source.member, source.delimiter, source.columns)
    if data := os.environ.get("TOKENREC_DATA_DIR"):
        if not Path(data).expanduser().is_dir():
            raise FileNotFoundError(f"TOKENREC_DATA_DIR is {data!r}, which is not a folder; correct or unset it.")
        folder = Path(data).expanduser() / name
        if (folder / "train.txt").is_file():
            return RawFile(folder)
        unpacked = replace(downloaded, path=Path(Path(source.member or source.file_name).name), member=None)
        for raw in (RawFile(Path(f"{name}.inter")), unpacked, downloaded):
            if (folder / raw.path).is_file():
                return replace(raw, path=folder / raw.path)
    cache = os.environ.get("TOKENREC_CACHE") or "~/.cache/tokenrec_hf/datasets"
    target = Path(cache).expanduser() / source.file_name
    if not target.is_file():
        _download(source, target)
    return replace(downloaded, path=target)


def load_item_titles(source: str | os.PathLike) -> dict[str, str]:
    """The titles of items by their id, to show beside recommendations.

    Args:
        source: `demo`, `ml-100k`, or an atomic file (`.item`, or the `.inter` beside it).

    Returns:
        Titles by item id; empty if the source has none.
    """
    if source == "demo":
        return demo_titles()
    raw = locate(source) if source == "ml-100k" else RawFile(Path(source))
    header = raw.path.suffix in (".inter", ".item")
    if header:
        raw, delimiter, encoding = RawFile(raw.path.with_suffix(".item")), "\t", "utf-8"
    else:
        raw = RawFile(raw.path, "ml-100k/u.item") if raw.member else RawFile(raw.path.with_name("u.item"))
        delimiter, encoding = "|", "latin-1"
    if not raw.path.is_file():
        return {}
    with raw.open() as stream:
        rows = [line.split(delimiter) for line in stream.read().decode(encoding).splitlines()]
    title = next((i for i, name in enumerate(rows[0]) if header and ("title" in name or "name" in name)), 1)
    return {row[0]: row[title] for row in rows[header:] if len(row) > title}


def _download(source: DataSource, target: Path) -> None:
    absent = (
        f"{source.file_name} of the data set {source.name!r} is not on this machine and {source.url} %s; download it "
        f"elsewhere, put it into a folder {source.name!r}, and set TOKENREC_DATA_DIR to the folder that contains it."
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(absent % "is not asked because HF_HUB_OFFLINE is set")

    def fetch(url: str, output_file: str, _: object) -> None:
        # pooch needs a total that is not zero before it knows the size.
        with tqdm(total=1, unit="B", unit_scale=True, desc=source.file_name, disable=None) as bar:
            # Without "identity", requests unpacks a file that the server sends packed, and the checksum would differ.
            headers = {"User-Agent": "tokenrec-hf", "Accept-Encoding": "identity"}
            pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, headers=headers)(url, output_file, None)
        if source.md5 is None:
            try:
                with gzip.open(output_file) as stream:
                    while stream.read(_CHUNK):
                        pass
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"the file at {url} is not a whole gzip file ({error}); try again.") from error

    logger.warning("Terms of use of %s: %s", source.name, source.terms)
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        known = source.md5 and f"md5:{source.md5}"
        pooch.retrieve(source.url, known_hash=known, fname=target.name, path=target.parent, downloader=fetch)
    except ChunkedEncodingError as error:
        raise ConnectionError(f"the download of {source.url} stopped early ({error}); try again.") from error
    except RequestException as error:
        raise FileNotFoundError(absent % f"does not give it ({error})") from error
