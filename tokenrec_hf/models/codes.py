"""Ids and their codes: row numbers of ids ([`IdIndex`]), code tuples of ids ([`CodeTable`]), and both as files.

Code k of a user or an item is the codeword that the MQ-Tokenizer chose in codebook k (Eq. 8 of TokenRec, arXiv
2406.10450). Being the lowest module of the package, which needs no torch, it also holds the file helpers of all others,
[`atomic_write`] and [`read_json`], and the names and the download of a trained repository, [`RepositoryFolder`]. It knows
nothing about vectors, tokens or models.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .prompts import SPACE

MAX_ID_LENGTH = 256
# Control and format characters (categories Cc and Cf) and white space but the space, which cannot be seen; half of a surrogate pair.
_NOT_IN_IDS = (
    rf"{SPACE}\x00-\x1f\x7f-\xa0\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u1680\u180e\u2000-\u200f\u2028-\u202f"
    r"\u205f-\u2064\u2066-\u206f\u3000\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\ud800-\udfff"
)
_ID = re.compile(rf"(?! )[^{_NOT_IN_IDS}]{{1,{MAX_ID_LENGTH}}}(?<! )")
_UNSEEN = re.compile(rf"[{_NOT_IN_IDS}]")


def check_ids(ids: Iterable[str], kind: str = "id") -> list[str]:
    """Returns `ids` as a list of strings after checking each of them.

    Raises:
        ValueError: an id is empty, longer than 256 characters, begins or ends with a space, or contains ␣, other white space,
            control or format characters, or half of a surrogate pair.
    """
    checked = [str(name) for name in ids]
    for name in checked:
        if not _ID.fullmatch(name):
            bad = _UNSEEN.search(name)
            problem = f"contains the character {bad[0]!a}" if bad else "begins or ends with a space"
            if not 1 <= len(name) <= MAX_ID_LENGTH:
                problem = f"has {len(name)} characters, more than {MAX_ID_LENGTH}" if name else "is empty"
            raise ValueError(
                f"{kind} {name[:60]!r} {problem}; ids are 1 to {MAX_ID_LENGTH} visible characters (not {SPACE}), with spaces between."
            )
    return checked


class IdIndex:
    """An ordered set of string ids; the row of an id is its position. An index never changes.

    Args:
        ids: n unique ids, in row order.
        kind: names the ids in error messages, for example `"item"`.

    Raises:
        ValueError: an id is given twice, or is not a valid id.
    """

    _rows: dict[str, int] | None = None

    def __init__(self, ids: Iterable[str] = (), kind: str = "id"):
        self._ids = check_ids(ids, kind)
        if len(self._positions()) < len(self._ids):
            repeated = next(name for row, name in enumerate(self._ids) if self._positions()[name] != row)
            raise ValueError(f"{kind} {repeated!r} is given more than once; ids must be unique.")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> str:
        return self._ids[row]

    def __contains__(self, name: str) -> bool:
        return str(name) in self._positions()

    def ids(self, rows: np.ndarray | Sequence[int] | None = None) -> list[str]:
        """The ids at `rows` `[m]`, in that order; by default all."""
        if rows is None:
            return list(self._ids)
        return [self._ids[row] for row in np.asarray(rows, dtype=np.int64).tolist()]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[m]`; -1 where the id is not in the index.

        Raises:
            ValueError: `ids` is a single string.
        """
        if isinstance(ids, str):
            raise ValueError(f"ids are the single string {ids[:60]!r}; pass a list of ids.")
        row_of = self._positions().get
        return np.fromiter((row_of(str(name), -1) for name in ids), dtype=np.int64, count=len(ids))

    def extended(self, ids: Sequence[str], kind: str = "id") -> IdIndex:
        """A new index with `ids` appended in order.

        Raises:
            ValueError: an id is present already, is given twice, or is not a valid id.
        """
        new = IdIndex(ids, kind)._ids
        positions = self._positions()
        for name in new:
            if name in positions:
                raise ValueError(f"{kind} {name!r} is already present.")
        return self._of(self._ids + new, positions | {name: len(self) + row for row, name in enumerate(new)})

    def kept(self, keep: np.ndarray) -> IdIndex:
        """A new index with the rows where the boolean array `keep` `[n]` is true, in the same order."""
        return self._of(list(compress(self._ids, keep.tolist())))

    def arrays(self) -> dict[str, np.ndarray]:
        """The ids as arrays for a safetensors file: `blob` (UTF-8, uint8) and `offsets` (int64 `[n + 1]`) into it."""
        encoded = [name.encode() for name in self._ids]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return {
            "blob": np.frombuffer(bytearray().join(encoded), dtype=np.uint8),
            "offsets": np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> IdIndex:
        """Rebuilds an index from [`~IdIndex.arrays`].

        Raises:
            ValueError: the arrays do not fit together.
        """
        blob, bounds = arrays["blob"].tobytes(), arrays["offsets"]
        offsets = bounds.tolist()
        is_whole = bounds.ndim == 1 and bounds.dtype.kind == "i" and bool(offsets)
        if not is_whole or offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(bounds) < 1).any():
            raise ValueError("the id table is damaged: its offsets do not fit its text.")
        index = cls._of([blob[start:end].decode() for start, end in zip(offsets, offsets[1:])])
        # Much faster than to check one id after the other, which finds what is wrong.
        ends = np.frombuffer(blob, dtype=np.uint8)[np.concatenate([bounds[:-1], bounds[1:] - 1])]
        is_fine = not (ends == ord(" ")).any() and not _UNSEEN.search(blob.decode())
        is_fine = is_fine and np.diff(bounds).max(initial=0) <= MAX_ID_LENGTH
        return index if is_fine and len(index._positions()) == len(index) else cls(index._ids)

    def __getstate__(self) -> dict[str, list[str]]:
        # `datasets` takes fingerprints of pickles, and looking ids up must not change them.
        return {"_ids": self._ids}

    @classmethod
    def _of(cls, ids: list[str], rows: dict[str, int] | None = None) -> IdIndex:
        """An index of ids that are known to be valid and unique."""
        index = cls.__new__(cls)
        index._ids, index._rows = ids, rows
        return index

    def _positions(self) -> dict[str, int]:
        if self._rows is None:
            self._rows = dict(zip(self._ids, range(len(self._ids))))
        return self._rows


class CodeTable:
    """The ids of one kind and their codes. A table never changes: `updated` and `without` make new ones.

    Args:
        kind: `"user"` or `"item"`.
        index: the n ids.
        codes: integers `[n, K]` in `[0, L)`.
        codebook_size: L.

    Raises:
        ValueError: the codes are not integers, not as many as the ids, or out of range.
    """

    def __init__(self, kind: str, index: IdIndex, codes: np.ndarray, codebook_size: int):
        if codes.dtype.kind not in "iu" or codes.ndim != 2 or len(codes) != len(index):
            found = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"the {kind} codes are {found} but should be integers [{len(index)}, K]")
        if codes.size and not 0 <= codes.min() <= codes.max() < codebook_size:
            raise ValueError(
                f"{kind} codes go from {codes.min()} to {codes.max()} but should be in [0, {codebook_size})"
            )
        self.kind, self.index, self.codebook_size = kind, index, codebook_size
        self.codes = np.ascontiguousarray(codes, dtype=np.uint16 if codebook_size <= 1 << 16 else np.uint32)
        # Characters of the longest id: no longer text can be an id.
        self.longest = max(map(len, index.ids()), default=0)
        self._owners: dict[tuple[int, ...], int] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owners": None}

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[m]`.

        Raises:
            KeyError: an id is not in the table.
            ValueError: `ids` is a single string.
        """
        rows = self.index.rows(ids)
        if (rows < 0).any():
            name = str(list(ids)[int(np.argmax(rows < 0))])
            raise KeyError(
                f"{self.kind} {name!r:.100} is unknown to this tokenizer; add it with `tokenrec add`, or give it codes with "
                f"add_{self.kind}s."
            )
        return rows

    def owners(self, codes: np.ndarray) -> np.ndarray:
        """The row that has the codes `[m, K]`, int64 `[m]`; -1 where no row has them, or more than one has."""
        if self._owners is None:
            self._owners = {}
            for row, code in enumerate(map(tuple, self.codes.tolist())):
                self._owners[code] = -1 if code in self._owners else row
        return np.array([self._owners.get(tuple(code), -1) for code in codes.tolist()], dtype=np.int64)

    def updated(self, ids: Sequence[str], codes: np.ndarray) -> CodeTable:
        """A table in which the unique `ids` have `codes` `[m, K]`; ids that are new come at the end."""
        rows = self.index.rows(ids)
        is_new = rows < 0
        merged = np.concatenate([self.codes, codes[is_new]])
        merged[rows[~is_new]] = codes[~is_new]
        index = self.index.extended(list(compress(ids, is_new)), self.kind)
        return CodeTable(self.kind, index, merged, self.codebook_size)

    def without(self, ids: Sequence[str]) -> CodeTable:
        """A table without `ids`; ids that are not in the table are ignored."""
        keep = ~np.isin(np.arange(len(self)), self.index.rows(ids))
        return CodeTable(self.kind, self.index.kept(keep), self.codes[keep], self.codebook_size)


def save_indexes(indexes: Mapping[str, IdIndex], path: str | os.PathLike) -> None:
    """Writes the ids of several kinds into one safetensors file, atomically."""
    _save_parts({kind: index.arrays() for kind, index in indexes.items()}, path)


def load_indexes(path: str | os.PathLike) -> dict[str, IdIndex]:
    """Reads a file that [`save_indexes`] wrote.

    Raises:
        ValueError: the file is damaged.
    """
    with damage_named(path, "copy it again"):
        return {kind: IdIndex.from_arrays(arrays) for kind, arrays in _load_parts(path).items()}


def save_tables(tables: Mapping[str, CodeTable], path: str | os.PathLike) -> None:
    """Writes the code tables of all kinds into one safetensors file, atomically."""
    _save_parts({kind: {"codes": table.codes, **table.index.arrays()} for kind, table in tables.items()}, path)


def load_tables(path: str | os.PathLike, codebooks: Mapping[str, Sequence[int]]) -> dict[str, CodeTable]:
    """Reads a file that [`save_tables`] wrote.

    Args:
        path: the file.
        codebooks: K and L of each kind.

    Raises:
        ValueError: the file is damaged, or does not fit `codebooks`.
    """
    tables = {}
    with damage_named(path, "copy it again, or make the tokenizer again with build_tokenizer"):
        parts = read_whole(Path(path).parent / STORE_FOLDER, lambda: _load_parts(path))
        for kind, (num_codebooks, codebook_size) in codebooks.items():
            codes = parts[kind]["codes"]
            tables[kind] = CodeTable(kind, IdIndex.from_arrays(parts[kind]), codes, codebook_size)
            if codes.shape[1] != num_codebooks:
                raise ValueError(f"each {kind} has {codes.shape[1]} codes but there are {num_codebooks} codebooks")
    return tables


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Replaces a file whole or not at all: yields a temporary path beside it, to be written inside the block.

    At the end of the block the content is brought to the disk and takes the name `path`. After an error the temporary file is
    removed and the former file stays. A killed process leaves a hidden file that ends in `.tmp`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into; make it first.")
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        # safetensors makes files that nobody else may read.
        temporary.chmod(mode)
        # Before the renaming: after a power failure the name must not stand for missing content.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_names(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_names(folder: str | os.PathLike) -> None:
    """Brings the file names of a folder to the disk, where the system can, so that renamings outlive a power failure."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def current(path: str | os.PathLike) -> Path:
    """Where readers find a file or a folder: in a change that is committed but not in place yet, if it is there."""
    path = Path(os.path.abspath(path))
    changed = (parent / COMMITTED / path.relative_to(parent) for parent in path.parents)
    return next(filter(os.path.exists, changed), path)


def read_whole(store: str | os.PathLike, read: Callable[[], Any]) -> Any:
    """What `read()` returns; it is called again if a change, which replaces the manifest of the repository's store, came between."""
    while True:
        before = _state(store)
        try:
            found = read()
        except Exception:
            if _state(store) == before:
                raise
        else:
            if _state(store) == before:
                return found


def _state(store: str | os.PathLike) -> tuple[Path, bytes] | None:
    with suppress(OSError):
        return (path := current(store) / MANIFEST), path.read_bytes()
    return None


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    with damage_named(path, "copy it again, or train in another folder"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content


@contextmanager
def damage_named(path: str | os.PathLike, advice: str) -> Iterator[None]:
    """Turns an error about the content of a file into a ValueError that names the file and says what to do."""
    from huggingface_hub.errors import StrictDataclassError

    wrong = (SafetensorError, LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
    try:
        yield
    except (*wrong, StrictDataclassError) as flaw:
        raise ValueError(f"{path} is damaged ({' '.join(str(flaw).split())}); {advice}.") from flaw


def _save_parts(parts: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike) -> None:
    arrays = {f"{kind}.{name}": array for kind, part in parts.items() for name, array in part.items()}
    with atomic_write(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def _load_parts(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(current(path)).items():
        kind, _, part = name.partition(".")
        parts.setdefault(kind, {})[part] = array
    return parts


# The folders of a trained repository.
STORE_FOLDER, COLLABORATIVE = "store", "collaborative"
MQ_FOLDERS = {"user": "mq_user", "item": "mq_item"}
# The file of the store that names all others.
MANIFEST = "store.json"
# A change that is committed, and the lock of those who change a folder.
COMMITTED, LOCK = ".update-committed", ".update.lock"
# Files without which a folder is not a trained repository.
REQUIRED = ("config.json", "tokenizer.json", "codes.safetensors", f"{STORE_FOLDER}/{MANIFEST}", "model.safetensors")
# The files of a trained repository that are downloaded.
CONTENT = (
    *("*.json", "*.safetensors", "*.py", "README.md", "recipe.yaml", f"{STORE_FOLDER}/*"),
    *(f"{folder}/*" for folder in MQ_FOLDERS.values()),
)
WITH_USERS = (f"{COLLABORATIVE}/*",)


class RepositoryFolder:
    """The names of the parts of a trained repository in the folder `path`."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.store = self.path / STORE_FOLDER
        self.collaborative = self.path / COLLABORATIVE
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.json"
        # Counts of the users and items that were added after training.
        self.additions = self.path / "additions.json"
        # Splits, records of finished stages and the selection run; never uploaded.
        self.training = self.path / "training"

    def mq(self, kind: str) -> Path:
        """The MQ-Tokenizer of `"user"` or `"item"`."""
        return self.path / MQ_FOLDERS[kind]


def check_repository(folder: str | os.PathLike) -> None:
    """Checks that a folder holds a finished trained repository.

    Raises:
        FileNotFoundError: a part is missing; the message names it and the remedy.
    """
    parts = RepositoryFolder(folder)
    if not parts.path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; train one with `tokenrec train --output-dir {folder}`.")
    needed, advice = list(REQUIRED), "it is no trained repository; give the --output-dir of `tokenrec train`"
    if parts.training.is_dir():
        # The metrics are written last.
        needed.append(parts.metrics.name)
        advice = "training has not finished; run the same `tokenrec train` again to continue"
    for name in needed:
        if not (parts.path / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: {advice}.")


def fetch_repository(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    patterns: Sequence[str] = (*CONTENT, *WITH_USERS),
) -> Path:
    """The folder of a trained repository, downloaded from the Hub if `name` is not a local folder.

    Args:
        name: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the Hub repository.
        token: Hub token; by default the one that is logged in.
        patterns: the files to download; by default all of a trained repository.

    Raises:
        FileNotFoundError: there is no such folder and no such repository, or the Hub cannot be reached and the repository is not
            in the cache.
        OSError: the Hub refuses the download.
    """
    if Path(name).is_dir():
        return Path(name)
    # The client is imported here, because it takes longer to import than a local folder takes to be read.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    with hub_errors(str(name), revision):
        try:
            return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=list(patterns)))
        except HFValidationError:
            raise FileNotFoundError(
                f"there is no folder {name}, and no Hub repository can have that name; train one with `tokenrec train "
                f"--output-dir {name}` or check the path."
            ) from None


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of the Hub's client into one sentence each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"the Hub repository {name} has no revision {revision!r}; see its branches and tags."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, and on the Hub no repository of that name that your token may read; check the "
            "name, or log in with `hf auth login`."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, it has not been downloaded before, and the Hub cannot be reached; connect, or "
            "unset HF_HUB_OFFLINE."
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is no name for a Hub repository ({error}); give it as organisation/name.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login` and a token that may write there" if status in (401, 403) else "try again"
        raise OSError(
            f"the Hub refused {name} with status {status} ({error.server_message or error}); {advice}."
        ) from None
    except (errors.OfflineModeIsEnabled, errors.HTTPError, RuntimeError) as error:
        # The client raises RuntimeError for an interrupted upload.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(
            f"the Hub could not be reached for {name} ({reason}); connect, unset HF_HUB_OFFLINE, or try again."
        ) from error
