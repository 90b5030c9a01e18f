"""The files of an embedding store: safetensors named after their content, and a `store.json` that names them.

`store.json` is replaced last, so whoever stops in the middle of saving leaves the former store whole, and it carries
the size and SHA-256 of every file, so damage is noticed on loading. Knows nothing about what is in the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

FORMAT_VERSION = 1
MANIFEST = "store.json"

_DATA_FILE = re.compile(r"[a-z]+-[0-9a-f]{8}\.safetensors")


def save_files(folder: str | os.PathLike, facts: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes a store to a folder, replacing the one that is there.

    Args:
        folder: made if absent.
        facts: what `store.json` says besides its format version and the files.
        arrays: by the name of a file, in small letters, its arrays by name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        for name, contents in arrays.items():
            new = Path(temporary) / name
            save_file({key: np.ascontiguousarray(array) for key, array in contents.items()}, new)
            _flush(new)
            sha256 = _sha256(new)
            file = f"{name}-{sha256[:8]}.safetensors"
            files[name] = {"file": file, "bytes": new.stat().st_size, "sha256": sha256}
            os.replace(new, folder / file)
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
        new = Path(temporary) / MANIFEST
        new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _flush(new)
        os.replace(new, folder / MANIFEST)
    _remove_leftovers(folder, keep=[entry["file"] for entry in files.values()])


def load_files(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Reads what [`save_files`] wrote: the whole `store.json`, and the arrays.

    Raises:
        ValueError: a file is missing, damaged or of another format version.
    """
    path = Path(folder) / MANIFEST
    files = {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            for name, entry in manifest["files"].items():
                files[name] = str(entry["file"]), entry["bytes"], entry["sha256"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, f"it does not describe a store: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version} but this tokenrec_hf reads version {FORMAT_VERSION}; install the "
            "version that wrote it or rebuild the store by `tokenrec train`."
        )
    return manifest, {name: _load(Path(folder), *entry) for name, entry in files.items()}


def damaged(path: Path, problem: str) -> ValueError:
    """The error that says that a file of a store is unusable, why, and what to do."""
    return ValueError(
        f"{path} is damaged ({problem}); restore the store from a copy or rebuild it by `tokenrec train`."
    )


def _load(folder: Path, file: str, size: int, sha256: str) -> dict[str, np.ndarray]:
    path = folder / file
    if not _DATA_FILE.fullmatch(file):
        raise damaged(folder / MANIFEST, f"{file!r} is not the name of a data file")
    if not path.is_file():
        raise damaged(path, "it is missing")
    if path.stat().st_size != size:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {size}")
    if _sha256(path) != sha256:
        raise damaged(path, "its content is not what was saved")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, f"it is not a safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Brings a file to the disk: after a power failure its new name must not stand for missing content."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _remove_leftovers(folder: Path, keep: Iterable[str]) -> None:
    """Removes the data files of former stores and what interrupted saves left."""
    for path in folder.iterdir():
        if path.name.startswith(".saving-"):
            shutil.rmtree(path, ignore_errors=True)
        elif _DATA_FILE.fullmatch(path.name) and path.name not in keep:
            # A file that somebody still reads cannot be removed on Windows; the next save tries again.
            with suppress(OSError):
                path.unlink()
