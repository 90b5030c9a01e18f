"""The data sets known by name: where their owners publish them, how they are fetched, and a made-up one, `demo`.

A named set is looked for in the folder `TOKENREC_DATA_DIR`, then in the cache, and is then downloaded from its owner and
checked; the package itself ships no data. The sets are those of section III-A of TokenRec (arXiv 2406.10450) and
MovieLens 100K. Knows where raw files are and how they are laid out, not how interactions are read or cleaned.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.request import Request, urlopen

import numpy as np
from datasets import Dataset
from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_MOVIELENS_TERMS = (
    "research use with acknowledgement; no redistribution and no commercial use without GroupLens' permission."
)
_HETREC_TERMS = "non-commercial use; cite Last.fm and the HetRec 2011 workshop."
_AMAZON_TERMS = "its owners state no licence and offer it for research; cite McAuley et al., SIGIR 2015."


@dataclass(frozen=True)
class RawFile:
    """A file of interactions, or a folder of `train.txt` and `test.txt`, as it lies on disk.

    Args:
        path: the file or folder.
        member: the file inside, where `path` is a zip archive.
        delimiter: what separates the columns, where the name of the file does not tell.
        columns: the names of the columns, where the file has no header.
    """

    path: Path
    member: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        """The ending of the name that tells the format, without `.gz`: `.csv` for `log.csv.gz`."""
        return Path(self.path.name.removesuffix(".gz")).suffix.lower()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes of the file, unpacked.

        Raises:
            ValueError: the archive is damaged or lacks the member.
        """
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                    yield stream  # type: ignore[misc]
            elif self.path.suffix == ".gz":
                with gzip.open(self.path) as stream:
                    yield stream  # type: ignore[misc]
            else:
                with self.path.open("rb") as stream:
                    yield stream
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(f"{self} cannot be unpacked ({error}); delete it and fetch it again.") from error


@dataclass(frozen=True)
class DataSource:
    """A public data set at its owner.

    Args:
        name: the name users give.
        url: the address of the file.
        md5: of that file, in hexadecimal; None where no checksum is known.
        member: the file of interactions inside the archive; None where the download is that file.
        delimiter: see [`RawFile`].
        columns: see [`RawFile`].
        k_core: the users and items kept have at least this many interactions with each other; 1 keeps everybody.
        num_users: the users expected after that.
        num_items: the items expected after that.
        num_interactions: the interactions expected after that.
        terms: the terms of use, in one line.
    """

    name: str
    url: str
    md5: str | None
    member: str | None
    delimiter: str | None
    columns: tuple[str, ...] | None
    k_core: int
    num_users: int
    num_items: int
    num_interactions: int
    terms: str

    @property
    def file_name(self) -> str:
        """The name of the file that is downloaded."""
        return self.url.rsplit("/", 1)[-1]

    def downloaded(self, path: Path) -> RawFile:
        """The file of interactions in the owner's file at `path`."""
        return RawFile(path, self.member, self.delimiter, self.columns)

    def places(self, folder: Path) -> list[RawFile]:
        """Where the set may lie in a folder of its own: prepared, as an atomic file, unpacked, or as downloaded."""
        unpacked = PurePosixPath(self.member or self.file_name).name
        return [
            RawFile(folder / "train.txt"),
            RawFile(folder / f"{self.name}.inter"),
            RawFile(folder / unpacked, delimiter=self.delimiter, columns=self.columns),
            self.downloaded(folder / self.file_name),
        ]


_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_GROUPLENS = "https://files.grouplens.org/datasets"
_AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"

DATA_SOURCES: dict[str, DataSource] = {
    source.name: source
    for source in [
        DataSource(
            name="ml-100k",
            url=f"{_GROUPLENS}/movielens/ml-100k.zip",
            md5="0e33842e24a9c977be4e0107933c0723",
            member="ml-100k/u.data",
            delimiter="\t",
            columns=_RATING_COLUMNS,
            k_core=1,
            num_users=943,
            num_items=1682,
            num_interactions=100_000,
            terms=_MOVIELENS_TERMS,
        ),
        DataSource(
            name="ml-1m",
            url=f"{_GROUPLENS}/movielens/ml-1m.zip",
            md5="c4d9eecfca2ab87c1945afe126590906",
            member="ml-1m/ratings.dat",
            delimiter="::",
            columns=_RATING_COLUMNS,
            k_core=5,
            num_users=6040,
            num_items=3416,
            num_interactions=999_611,
            terms=_MOVIELENS_TERMS,
        ),
        # HetRec's listening counts have no time, so the paper's sequences must come from the times of tags: a user has
        # interacted with an artist when first tagging them. This derivation is our inference; the counts below are the paper's.
        DataSource(
            name="lastfm",
            url=f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
            md5="296d61afe4e8632b173fc2dd3be20ce2",
            member="user_taggedartists-timestamps.dat",
            delimiter="\t",
            columns=None,
            k_core=5,
            num_users=1090,
            num_items=3646,
            num_interactions=52_551,
            terms=_HETREC_TERMS,
        ),
        DataSource(
            name="beauty",
            url=f"{_AMAZON}/reviews_Beauty_5.json.gz",
            md5=None,
            member=None,
            delimiter=None,
            columns=None,
            k_core=1,
            num_users=22_363,
            num_items=12_101,
            num_interactions=198_502,
            terms=_AMAZON_TERMS,
        ),
        DataSource(
            name="clothing",
            url=f"{_AMAZON}/reviews_Clothing_Shoes_and_Jewelry_5.json.gz",
            md5=None,
            member=None,
            delimiter=None,
            columns=None,
            k_core=1,
            num_users=39_387,
            num_items=23_033,
            num_interactions=278_677,
            terms=_AMAZON_TERMS,
        ),
    ]
}


def locate(name: str) -> RawFile:
    """The raw file of a named data set, downloaded if it is not on this machine.

    Looked for in `$TOKENREC_DATA_DIR/<name>/` (`train.txt` and `test.txt`, `<name>.inter`, the owner's file, or the archive
    it comes in), then in the cache (`$TOKENREC_CACHE`, by default `~/.cache/tokenrec_hf/datasets`). For `lastfm`, the
    prepared `train.txt` and `test.txt` are exactly the paper's data; what is made from the owner's archive (first tag of
    each user and artist, 5-core) is our inference of how they were made.

    Args:
        name: a key of `DATA_SOURCES`.

    Raises:
        FileNotFoundError: the set is not on this machine and cannot be downloaded.
        ConnectionError: the download stopped early.
        ValueError: the download is not the file that is expected.
    """
    source = DATA_SOURCES[name]
    if folder := os.environ.get("TOKENREC_DATA_DIR"):
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"TOKENREC_DATA_DIR is {folder!r}, which is not a folder; correct or unset it.")
        for raw in source.places(Path(folder).expanduser() / name):
            if raw.path.is_file():
                return RawFile(raw.path.parent) if raw.path.name == "train.txt" else raw
    cache = os.environ.get("TOKENREC_CACHE") or "~/.cache/tokenrec_hf/datasets"
    target = Path(cache).expanduser() / source.file_name
    if not target.is_file():
        _download(source, target)
    return source.downloaded(target)


def load_item_titles(source: str | os.PathLike) -> dict[str, str]:
    """The titles of items by their id, to show beside recommendations.

    Args:
        source: `demo`, `ml-100k`, or an atomic file (`.item`, or the `.inter` beside it).

    Returns:
        Titles by item id; empty where the source has none.
    """
    if source == "demo":
        return _demo_titles()
    raw = locate(source) if source == "ml-100k" else RawFile(Path(source))
    if raw.path.suffix in (".inter", ".item"):
        raw = RawFile(raw.path.with_suffix(".item"))
        delimiter, encoding, first = "\t", "utf-8", 1
    else:
        raw = RawFile(raw.path, "ml-100k/u.item") if raw.member else RawFile(raw.path.with_name("u.item"))
        delimiter, encoding, first = "|", "latin-1", 0
    if not raw.path.is_file():
        return {}
    with raw.open() as stream:
        rows = [line.split(delimiter) for line in stream.read().decode(encoding).splitlines()]
    title = next((i for i, name in enumerate(rows[0]) if "title" in name or "name" in name), 1) if first else 1
    return {row[0]: row[title] for row in rows[first:] if len(row) > title}


def demo_interactions(seed: int = 0, num_users: int = 400, num_items: int = 300) -> Dataset:
    """A small made-up data set from which tastes can be learned, the same for the same arguments.

    Items (films) belong to ten genres and are unequally popular within them (Zipf). Half of the users like one genre, the
    others two, and everybody watches something else now and then: 10 to 30 films a user, in no particular order of taste.

    Args:
        seed: of the random numbers.
        num_users: number of users, `u001`, `u002`, ...
        num_items: number of items, `f001`, `f002`, ..., at least 30.

    Returns:
        Columns `user_id`, `item_id` and `timestamp` (int64, seconds), grouped by user and in time order.

    Raises:
        ValueError: there are too few users or items.
    """
    if num_users < 1 or num_items < 30:
        raise ValueError(f"the demo data set needs 1 user and 30 items or more, not {num_users} and {num_items}.")
    random = np.random.Generator(np.random.PCG64(seed))
    genre, rank = np.arange(num_items) % len(_GENRES), np.arange(num_items) // len(_GENRES)
    popularity = np.where(np.arange(len(_GENRES))[:, None] == genre, (rank + 2.0) ** -0.8, 0)
    popularity /= popularity.sum(axis=1, keepdims=True)
    audience = (np.arange(len(_GENRES)) + 3.0) ** -0.5

    first = random.choice(len(_GENRES), num_users, p=audience / audience.sum())
    second = (first + random.integers(1, len(_GENRES), num_users)) % len(_GENRES)
    share = np.where(random.random(num_users) < 0.5, 0, 0.3)[:, None]
    taste = (1 - share) * popularity[first] + share * popularity[second]
    chance = 0.85 * taste + 0.15 * popularity.mean(axis=0)

    counts = random.integers(10, 31, num_users)
    # The items with the largest log-probabilities plus Gumbel noise are a draw without replacement.
    drawn = np.argsort(-(np.log(chance) + random.gumbel(size=chance.shape)), axis=1)
    items = drawn[np.arange(num_items) < counts[:, None]]
    users = np.repeat(np.arange(num_users), counts)
    items = items[np.lexsort((random.random(len(items)), users))]

    hours = np.cumsum(random.integers(1, 100, len(items)))
    started = hours[np.cumsum(counts) - counts]
    timestamps = 1_704_067_200 + 3600 * (hours - np.repeat(started, counts))
    user_ids, item_ids = _numbered("u", num_users), _numbered("f", num_items)
    return Dataset.from_dict(
        {
            "user_id": user_ids[users].tolist(),
            "item_id": item_ids[items].tolist(),
            "timestamp": timestamps.astype(np.int64),
        }
    )


# ----------------------------------------------------------------------------------------------------------------------


def _download(source: DataSource, target: Path) -> None:
    absent = (
        f"{source.file_name} of the data set {source.name!r} is not on this machine and {source.url} %s; download it "
        f"elsewhere, put it in a folder {source.name!r}, and let TOKENREC_DATA_DIR name the folder around that."
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(absent % "is not asked because HF_HUB_OFFLINE is set")
    try:
        response = urlopen(Request(source.url, headers={"User-Agent": "tokenrec-hf"}), timeout=30)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(absent % f"does not give it ({error})") from error
    logger.warning("Terms of use of %s: %s", source.name, source.terms)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with response, part.open("wb") as file:
            md5 = _copy(response, file, source)
        _check(source, part, md5)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _copy(response, file: BinaryIO, source: DataSource) -> str:
    """Writes what the server sends to `file`; returns its MD5."""
    size = int(response.headers.get("Content-Length") or 0)
    digest = hashlib.md5(usedforsecurity=False)
    broken: Exception | None = None
    with tqdm(total=size or None, unit="B", unit_scale=True, desc=source.file_name, disable=None) as bar:
        try:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        except (ConnectionError, TimeoutError, HTTPException) as error:
            broken = error
    if broken or (size and file.tell() != size):
        whole = f" of {size:,}" if size else ""
        raise ConnectionError(
            f"the download of {source.url} stopped after {file.tell():,}{whole} bytes; try again."
        ) from broken
    return digest.hexdigest()


def _check(source: DataSource, part: Path, md5: str) -> None:
    problem = None
    if source.md5 is not None:
        if md5 != source.md5:
            problem = f"has the MD5 checksum {md5} instead of {source.md5}"
    else:
        # Without a published checksum, the one inside the gzip file at least shows that it is whole.
        try:
            with gzip.open(part) as stream:
                while stream.read(_CHUNK):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            problem = f"is not a whole gzip file ({error})"
    if problem:
        raise ValueError(
            f"what was downloaded from {source.url} {problem}, and was thrown away; try again, or see its owner's page."
        )


_GENRES = (
    ("Harbor", "Tide", "Lighthouse", "Sailor", "Reef"),
    ("Comet", "Orbit", "Colony", "Signal", "Android"),
    ("Detective", "Alibi", "Witness", "Cipher", "Verdict"),
    ("Wedding", "Letter", "Summer", "Dance", "Kiss"),
    ("Castle", "Dragon", "Wizard", "Crown", "Oath"),
    ("Saddle", "Canyon", "Sheriff", "Prairie", "Outlaw"),
    ("Cellar", "Mirror", "Scream", "Crypt", "Shadow"),
    ("Cousin", "Roommate", "Holiday", "Mix-Up", "Parrot"),
    ("Regiment", "Trench", "Armistice", "Convoy", "Medal"),
    ("Melody", "Encore", "Drummer", "Stage", "Ballad"),
)
_ADJECTIVES = (
    "Silent", "Last", "Crimson", "Hidden", "Golden", "Broken", "Distant", "Restless", "Midnight", "Forgotten", "Second", "Lucky",
)  # fmt: skip


def _numbered(letter: str, count: int) -> np.ndarray:
    return np.array([f"{letter}{number:03d}" for number in range(1, count + 1)])


def _demo_titles(num_items: int = 300) -> dict[str, str]:
    titles = []
    for item in range(num_items):
        rank, genre = divmod(item, len(_GENRES))
        # 12 adjectives and 5 nouns have no common divisor, so a genre has 60 different titles.
        titles.append(f"The {_ADJECTIVES[rank % 12]} {_GENRES[genre][rank % 5]}")
    return dict(zip(_numbered("f", num_items).tolist(), titles))
