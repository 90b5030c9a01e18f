"""The files of an embedding store: safetensors named after their content, and a `store.json` that names them.

`store.json` is replaced last, so whoever stops in the middle of saving leaves the former store whole, and it carries
the size and SHA-256 of every file, so damage is noticed on loading. Small changes go into files of their own beside the
large ones. Knows nothing about what is in the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

FORMAT_VERSION = 1
MANIFEST = "store.json"
CHANGES = "changes"

_DATA_FILE = re.compile(r"[a-z]+-[0-9a-f]{8}\.safetensors")


Arrays = dict[str, np.ndarray]


def save_files(folder: str | os.PathLike, facts: dict[str, Any], arrays: dict[str, Arrays]) -> dict[str, Any]:
    """Writes a store to a folder, replacing the one that is there.

    Args:
        folder: made if absent.
        facts: what `store.json` says besides its format version and the files.
        arrays: by the name of a file, in small letters, its arrays by name.

    Returns:
        The content of `store.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        files = {name: _save(folder, Path(temporary), name, contents) for name, contents in arrays.items()}
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files, "changes": []}
        _replace_manifest(folder, Path(temporary), manifest)
    remove_leftovers(folder)
    return manifest


def append_changes(
    folder: str | os.PathLike, manifest: dict[str, Any], facts: dict[str, Any], changes: Arrays
) -> dict[str, Any]:
    """Adds a file of changes to a store on disk; the cost is that of the changes, whatever the size of the store.

    Args:
        folder: where the store is.
        manifest: its `store.json`, as `save_files`, `load_files` or this function gave it.
        facts: what takes the place of the facts in it.
        changes: the arrays of the file.

    Returns:
        The new content of `store.json`.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        entry = _save(folder, Path(temporary), CHANGES, changes)
        manifest = {**manifest, **facts, "changes": [*manifest["changes"], entry]}
        _replace_manifest(folder, Path(temporary), manifest)
    return manifest


def is_current(folder: str | os.PathLike, manifest: dict[str, Any]) -> bool:
    """Whether `manifest` is what `store.json` of the folder says now."""
    path = Path(folder) / MANIFEST
    return path.is_file() and path.read_bytes() == _manifest_bytes(manifest)


def load_files(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Arrays], list[Arrays]]:
    """Reads what [`save_files`] and [`append_changes`] wrote: the whole `store.json`, the arrays, and those of the changes.

    The arrays are memory maps of the files: read when they are used, and copied, page by page, where they are changed.

    Raises:
        ValueError: a file is missing, damaged or of another format version.
    """
    path = Path(folder) / MANIFEST
    files: dict[str, tuple[str, int, str]] = {}
    changes: list[tuple[str, int, str]] = []
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            for name, entry in manifest["files"].items():
                files[name] = _described(entry)
            changes = [_described(entry) for entry in manifest.setdefault("changes", [])]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, f"it does not describe a store: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version} but this tokenrec_hf reads version {FORMAT_VERSION}; install the "
            "version that wrote it or rebuild the store by `tokenrec train`."
        )
    arrays = {name: _load(Path(folder), *entry) for name, entry in files.items()}
    return manifest, arrays, [_load(Path(folder), *entry) for entry in changes]


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the data files that `store.json` does not name, and what interrupted saves left."""
    manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    keep = {entry["file"] for entry in [*manifest["files"].values(), *manifest.get("changes", [])]}
    for path in Path(folder).iterdir():
        if path.name.startswith(".saving-"):
            shutil.rmtree(path, ignore_errors=True)
        elif _DATA_FILE.fullmatch(path.name) and path.name not in keep:
            # A file that somebody still reads cannot be removed on Windows; the next save tries again.
            with suppress(OSError):
                path.unlink()


def flush_names(folder: str | os.PathLike) -> None:
    """Brings the names in a folder to the disk, where a folder can be opened: a power failure must not undo a renaming."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def damaged(path: Path, problem: str) -> ValueError:
    """The error that says that a file of a store is unusable, why, and what to do."""
    return ValueError(
        f"{path} is damaged ({problem}); restore the store from a copy or rebuild it by `tokenrec train`."
    )


def _described(entry: dict[str, Any]) -> tuple[str, int, str]:
    return str(entry["file"]), entry["bytes"], entry["sha256"]


def _save(folder: Path, temporary: Path, name: str, contents: Arrays) -> dict[str, Any]:
    """Writes a data file, brings it to its place, and describes it."""
    new = temporary / name
    save_file({key: np.ascontiguousarray(array) for key, array in contents.items()}, new)
    _flush(new)
    sha256 = _sha256(new)
    file = f"{name}-{sha256[:8]}.safetensors"
    size = new.stat().st_size
    os.replace(new, folder / file)
    return {"file": file, "bytes": size, "sha256": sha256}


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _replace_manifest(folder: Path, temporary: Path, manifest: dict[str, Any]) -> None:
    new = temporary / MANIFEST
    new.write_bytes(_manifest_bytes(manifest))
    _flush(new)
    os.replace(new, folder / MANIFEST)
    flush_names(folder)


def _load(folder: Path, file: str, size: int, sha256: str) -> Arrays:
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
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
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
