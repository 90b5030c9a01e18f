"""Changes to the files of a trained repository that happen together or not at all.

New files are written to a folder beside the old ones. Renaming that folder is the moment at which the change has happened;
whoever stops before has changed nothing, and whoever stops after leaves something that the next one finishes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..models.store_files import MANIFEST, flush_names, remove_leftovers

STAGED, COMMITTED, LOCK = ".update", ".update-committed", ".update.lock"


@contextmanager
def repository_update(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder for new files; when the block ends, each takes the place of the file of its name in the repository.

    The store lies in it already (as links to its large files), to be opened, changed and saved there.

    Args:
        folder: a trained repository.

    Raises:
        ValueError: another process is changing the repository.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is being changed by another process; try again when that has finished.") from None
    try:
        _finish(folder)
        staged = folder / STAGED
        _link_store(folder / "store", staged / "store")
        yield staged
        for path in staged.rglob("*"):
            if path.is_file():
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
        os.rename(staged, folder / COMMITTED)
        flush_names(folder)
        _finish(folder)
    finally:
        shutil.rmtree(folder / STAGED, ignore_errors=True)
        lock.release()


def finish_update(folder: str | os.PathLike) -> None:
    """Brings a change that was interrupted after it had happened to its end."""
    folder = Path(folder)
    if (folder / COMMITTED).is_dir():
        with FileLock(folder / LOCK):
            _finish(folder)


def _finish(folder: Path) -> None:
    shutil.rmtree(folder / STAGED, ignore_errors=True)
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    # The manifest of the store last, because it names files that must be there then.
    for path in sorted(committed.rglob("*"), key=lambda path: path.name == MANIFEST):
        if path.is_file():
            target = folder / path.relative_to(committed)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    remove_leftovers(folder / "store")
    shutil.rmtree(committed)


def _link_store(store: Path, staged: Path) -> None:
    staged.mkdir(parents=True)
    shutil.copyfile(store / MANIFEST, staged / MANIFEST)
    manifest = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    for entry in [*manifest["files"].values(), *manifest.get("changes", [])]:
        link = staged / entry["file"]
        if link.exists():
            continue
        try:
            os.link(store / entry["file"], link)
        except OSError:
            # Some file systems know no links.
            shutil.copyfile(store / entry["file"], link)
