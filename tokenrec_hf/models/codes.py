"""Ids to rows and to codes as arrays; the names of a trained repository's files, and reading and writing of single files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

MAX_ID_LENGTH = 256


def check_ids(ids: Iterable[str], kind: str = "id") -> list[str]:
    """Returns `ids` as a list of strings after checking each one.

    Raises:
        ValueError: an id is empty, longer than 256 characters, contains white space, or is not Unicode text.
    """
    checked = [str(one) for one in ids]
    for one in checked:
        # str.split() drops every kind of white space, so a clean id is its own only part.
        clean = one.split() == [one] and (one.isascii() or one == _encoded(one).decode(errors="replace"))
        if not clean or len(one) > MAX_ID_LENGTH:
            problem = (
                "is empty" if not one else "contains white space" if one.split() != [one] else "is not Unicode text"
            )
            if len(one) > MAX_ID_LENGTH:
                problem = f"has {len(one)} characters, more than {MAX_ID_LENGTH}"
            raise ValueError(
                f"{kind} {one[:60]!r} {problem}; ids are strings of 1 to {MAX_ID_LENGTH} characters without white space."
            )
    return checked


def _encoded(one: str) -> bytes:
    # A half of a surrogate pair has no UTF-8; it is passed on as bytes that no valid id has.
    return one.encode(errors="surrogatepass")


def _hashes(encoded: Sequence[bytes]) -> np.ndarray:
    digest = b"".join([blake2b(one, digest_size=8).digest() for one in encoded])
    return np.frombuffer(digest, dtype=np.uint64)


class IdIndex:
    """An ordered set of string ids; the row of an id is its position.

    Args:
        ids: the ids, unique, in row order.

    Raises:
        ValueError: an id is given twice, or is not a valid id.
    """

    def __init__(self, ids: Iterable[str] = (), kind: str = "id"):
        encoded = [one.encode() for one in check_ids(ids, kind)]
        self._blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum([len(one) for one in encoded], dtype=np.int64)]).astype(np.int64)
        hashes = _hashes(encoded)
        self._order = np.argsort(hashes, kind="stable").astype(np.int64)
        self._hashes = hashes[self._order]
        rows = self.rows([one.decode() for one in encoded])
        repeated = np.flatnonzero(rows != np.arange(len(encoded)))
        if len(repeated):
            raise ValueError(f"{kind} {encoded[repeated[0]].decode()!r} is given more than once; ids must be unique.")

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> IdIndex:
        """Rebuilds an index from `arrays()`, without hashing any id again.

        Raises:
            ValueError: the arrays do not fit together.
        """
        index = cls.__new__(cls)
        index._blob, index._offsets = arrays["blob"], arrays["offsets"]
        index._order, index._hashes = arrays["order"], arrays["hashes"]
        count = len(index._offsets) - 1
        if len(index._order) != count or len(index._hashes) != count or index._offsets[-1] != len(index._blob):
            raise ValueError("the id table is damaged: its arrays have different lengths.")
        return index

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays that make up the index: `blob`, `offsets`, `order` and `hashes`, for a safetensors file."""
        return {"blob": self._blob, "offsets": self._offsets, "order": self._order, "hashes": self._hashes}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self._bytes(range(len(self))[row]).decode()

    def __contains__(self, one: str) -> bool:
        return bool(self.rows([one])[0] >= 0)

    def _bytes(self, row: int) -> bytes:
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes()

    def ids(self, rows: np.ndarray | Sequence[int] | None = None) -> list[str]:
        """The ids at `rows`, in that order (all of them by default)."""
        if rows is None:
            blob, offsets = self._blob.tobytes(), self._offsets.tolist()
            return [blob[a:b].decode() for a, b in zip(offsets, offsets[1:])]
        return [self._bytes(row).decode() for row in np.asarray(rows, dtype=np.int64)]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id as int64 `[len(ids)]`; -1 where the id is not in the index."""
        encoded = [_encoded(str(one)) for one in ids]
        found = np.full(len(encoded), -1, dtype=np.int64)
        if not len(self) or not encoded:
            return found
        hashes = _hashes(encoded)
        position = np.searchsorted(self._hashes, hashes)
        for i in np.flatnonzero(self._hashes[np.minimum(position, len(self) - 1)] == hashes):
            at = int(position[i])
            # Two ids may share a hash: walk the (nearly always single) run of equal hashes.
            while at < len(self) and self._hashes[at] == hashes[i]:
                if self._bytes(self._order[at]) == encoded[i]:
                    found[i] = self._order[at]
                    break
                at += 1
        return found

    def extended(self, ids: Sequence[str], kind: str = "id") -> IdIndex:
        """A new index with `ids`, none of which may be present, appended in order."""
        new = IdIndex(ids, kind)
        present = self.rows(ids)
        if (present >= 0).any():
            raise ValueError(f"{kind} {ids[int(np.argmax(present >= 0))]!r} is already present.")
        index = IdIndex.__new__(IdIndex)
        index._blob = np.concatenate([self._blob, new._blob])
        index._offsets = np.concatenate([self._offsets, new._offsets[1:] + self._offsets[-1]])
        # Both are sorted, so one is put into the other: no sorting of millions for a handful.
        places = np.searchsorted(self._hashes, new._hashes, side="right")
        index._hashes = np.insert(self._hashes, places, new._hashes)
        index._order = np.insert(self._order, places, new._order + len(self))
        return index

    def kept(self, keep: np.ndarray) -> IdIndex:
        """A new index with the rows where the boolean array `keep` `[n]` is true, in the same order."""
        index = IdIndex.__new__(IdIndex)
        lengths = np.diff(self._offsets)
        index._blob = self._blob[np.repeat(keep, lengths)]
        index._offsets = np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64)
        stays = keep[self._order]
        index._hashes = self._hashes[stays]
        index._order = (np.cumsum(keep) - 1)[self._order[stays]]
        return index


def save_indexes(indexes: Mapping[str, IdIndex], path: str | os.PathLike) -> None:
    """Writes the ids of several kinds into one safetensors file."""
    save_file(
        {f"{kind}.{name}": array for kind, index in indexes.items() for name, array in index.arrays().items()}, path
    )


def load_indexes(path: str | os.PathLike) -> dict[str, IdIndex]:
    """Reads what `save_indexes` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    try:
        for name, array in load_file(path).items():
            parts.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = array
        return {kind: IdIndex.from_arrays(arrays) for kind, arrays in parts.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again.") from error


class CodeTable:
    """The ids of one kind and their codes. Never changed: `updated` makes a new table.

    Args:
        kind: `"user"` or `"item"`.
        index: the `n` ids.
        codes: integers `[n, K]` of values in `[0, L)`.
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
        # The most bytes of an id, and so at least its characters: no longer text can be one.
        self.longest = int(np.diff(index.arrays()["offsets"]).max(initial=0))
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __getstate__(self) -> dict[str, Any]:
        # What `owners` has built is not state: the fingerprint that `datasets` takes of a tokenizer must not change with it.
        return {**self.__dict__, "_sorted": None}

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 `[n]`.

        Raises:
            KeyError: an id is not in the table.
        """
        if isinstance(ids, str):
            raise ValueError(f"{self.kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
        rows = self.index.rows(ids)
        if (rows < 0).any():
            one = ids[int(np.argmax(rows < 0))]
            raise KeyError(
                f"{self.kind} {one!r} is unknown to this tokenizer; add it with `tokenrec add`, or give it codes with "
                f"add_{self.kind}s."
            )
        return rows

    def owners(self, codes: np.ndarray) -> np.ndarray:
        """The row that has these codes `[m, K]`, int64 `[m]`; -1 where none has, or more than one."""
        if self._sorted is None:
            keys = _keys(self.codes)
            order = np.argsort(keys, kind="stable")
            self._sorted = keys[order], order
        keys, order = self._sorted
        wanted = _keys(codes)
        first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        owners = np.full(len(codes), -1, dtype=np.int64)
        for i in np.flatnonzero(first < last):
            rows = order[first[i] : last[i]]
            rows = rows[(self.codes[rows] == codes[i]).all(axis=1)]
            if len(rows) == 1:
                owners[i] = rows[0]
        return owners

    def updated(self, ids: Sequence[str], codes: np.ndarray) -> CodeTable:
        """A table in which `ids`, each once, have `codes` `[m, K]`: those known instead of their old ones, the others at the end."""
        rows = self.index.rows(ids)
        is_new = rows < 0
        merged = np.concatenate([self.codes, codes[is_new]])
        merged[rows[~is_new]] = codes[~is_new]
        index = self.index.extended([one for one, new in zip(ids, is_new) if new], self.kind)
        return CodeTable(self.kind, index, merged, self.codebook_size)

    def without(self, ids: Sequence[str]) -> CodeTable:
        """A table without `ids`; those that are not in it are ignored."""
        rows = self.index.rows(ids)
        keep = np.ones(len(self), dtype=bool)
        keep[rows[rows >= 0]] = False
        return CodeTable(self.kind, self.index.kept(keep), self.codes[keep], self.codebook_size)


def save_tables(tables: Mapping[str, CodeTable], path: str) -> None:
    """Writes the tables of all kinds into one safetensors file, whole or not at all."""
    arrays = {}
    for kind, table in tables.items():
        arrays[f"{kind}.codes"] = table.codes
        arrays.update({f"{kind}.{name}": np.ascontiguousarray(one) for name, one in table.index.arrays().items()})
    save_file(arrays, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_tables(path: str, codebooks: Mapping[str, Sequence[int]]) -> dict[str, CodeTable]:
    """Reads what `save_tables` wrote.

    Args:
        path: the file.
        codebooks: K and L of each kind.

    Raises:
        ValueError: the file is damaged, or does not fit `codebooks`.
    """
    tables = {}
    try:
        arrays = load_file(path)
        for kind, (num_codebooks, codebook_size) in codebooks.items():
            parts = {name.partition(".")[2]: one for name, one in arrays.items() if name.startswith(f"{kind}.")}
            tables[kind] = CodeTable(kind, IdIndex.from_arrays(parts), parts["codes"], codebook_size)
            if tables[kind].codes.shape[1] != num_codebooks:
                found = tables[kind].codes.shape[1]
                raise ValueError(f"each {kind} has {found} codes but there are {num_codebooks} codebooks")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again, or make the tokenizer again with from_components."
        ) from error
    return tables


def forget_ids(path: str | os.PathLike, kind: str) -> None:
    """Removes all ids of one kind, and their codes, from a file that `save_tables` wrote; the number of codebooks stays."""
    tables = load_file(path)
    tables[f"{kind}.codes"] = tables[f"{kind}.codes"][:0]
    tables.update({f"{kind}.{name}": one for name, one in IdIndex([]).arrays().items()})
    save_file(tables, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def _keys(codes: np.ndarray) -> np.ndarray:
    """One uint64 a row of codes `[n, K]`: the same for equal rows, and nearly always, not surely, another for different ones."""
    keys = np.zeros(len(codes), dtype=np.uint64)
    for column in codes.T:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64)
    return keys


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a file whole or not at all: yields a temporary path, which takes the place of `path` when the block ends.

    The content is on the disk when this returns, also after a power failure. On an error the former file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Brings a file, or the names in a folder where a folder can be opened, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or train in another folder.") from error


# The folders of a trained repository.
STORE, COLLABORATIVE = "store", "collaborative"
MQ_FOLDERS = {"user": "mq_user", "item": "mq_item"}
# Files without which a folder is not a trained repository.
REQUIRED = ("config.json", "tokenizer.json", "codes.safetensors", f"{STORE}/store.json", "model.safetensors")
# The files of a trained repository; other files in its folder, such as checkpoints, are ignored.
CONTENT = (
    *("*.json", "*.safetensors", "*.py", "README.md", "recipe.yaml", f"{STORE}/*"),
    *(f"{folder}/*" for folder in MQ_FOLDERS.values()),
)
WITH_USERS = (f"{COLLABORATIVE}/*",)


class RepositoryFolder:
    """The names of a trained repository's parts.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.store = self.path / STORE
        self.collaborative = self.path / COLLABORATIVE
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.json"
        # Counts of the users and items that were added after training.
        self.additions = self.path / "additions.json"
        # Splits, records of finished stages and the selection run; never uploaded.
        self.training = self.path / "training"
        # A change of several files that has been decided but not carried out.
        self.committed = self.path / ".update-committed"

    def mq(self, kind: str) -> Path:
        """The MQ-Tokenizer of `"user"` or `"item"`."""
        return self.path / MQ_FOLDERS[kind]


def check_repository(folder: str | os.PathLike) -> None:
    """Checks that a folder holds a finished trained repository.

    Raises:
        FileNotFoundError: a part is missing; the message names it and the remedy.
        ValueError: a change of the repository was interrupted.
    """
    parts = RepositoryFolder(folder)
    if not parts.path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`.")
    if parts.committed.is_dir():
        raise ValueError(
            f"a change of {folder} was interrupted or is under way; if no other process changes it, open it once with "
            "`Repository(folder)` or any `tokenrec` command to finish the change."
        )
    unfinished = parts.training.is_dir()
    # The metrics are written last.
    needed = [parts.path / name for name in REQUIRED] + [parts.metrics] * unfinished
    for path in needed:
        if not path.is_file():
            if unfinished:
                advice = "training has not finished; run the same `tokenrec train` again to continue"
            else:
                advice = "it is no trained repository; give the --output_dir of `tokenrec train`"
            raise FileNotFoundError(f"{folder} has no {path.relative_to(parts.path)}: {advice}.")


def fetch_repository(name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a trained repository, downloaded from the Hub if `name` is not a local folder.

    Args:
        name: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the Hub repository.
        token: Hub token; by default the one that is logged in.

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
            allowed = [*CONTENT, *WITH_USERS]
            return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=allowed))
        except HFValidationError:
            raise FileNotFoundError(
                f"there is no folder {name}, and no Hub repository can have that name; train one with `tokenrec train "
                f"--output_dir {name}` or check the path."
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
