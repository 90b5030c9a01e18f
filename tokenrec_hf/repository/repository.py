"""What a trained repository holds, how it was made and how good it is: read from its files, without loading a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..models.codes import read_json
from ..models.embedding_store import MANIFEST, EmbeddingStore, flush_names, remove_leftovers
from ..models.recommender import Recommender, RepositoryFolder, fetch_repository
from ..training.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from .audit import Check
    from .update import NewVectors

STAGES = ("collaborative", "mq_user", "mq_item", "retrieval", "evaluation")
# It is time to train anew: newcomers are more than this share of what was trained on, or their codes
# lose this many times the variance that training lost (or half of the floor, where training lost next to nothing).
DUE_SHARE, DUE_ERROR, DUE_FLOOR = 0.2, 2.0, 0.1


class Repository:
    """A trained repository in a local folder: everything that changes it, measures it or shares it.

    Opening one brings a change that was interrupted after it had happened to its end.

    Args:
        folder: what `tokenrec train` wrote, or is writing.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`."
            )
        finish_update(self.folder)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> Repository:
        """That of a folder, or of a Hub repository, which is downloaded."""
        return cls(fetch_repository(name, revision=revision, token=token))

    @property
    def recipe(self) -> Recipe:
        """The settings that it was trained with, with what was chosen on validation in the place of `auto`."""
        return Recipe.load(config=RepositoryFolder(self.folder).recipe)

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured: the content of `metrics.json`."""
        return read_json(RepositoryFolder(self.folder).metrics)

    def recommender(self, store: EmbeddingStore | None = None) -> Recommender:
        """Opens it to recommend; `store` takes the place of its own, for example one on Milvus."""
        return Recommender.from_pretrained(self.folder, store=store)

    def evaluate(
        self, split: str = "test", variant: str = "tokenrec", store: EmbeddingStore | None = None
    ) -> dict[str, Any]:
        """Ranks all items for every user of a split; see [`~evaluation.ranking`] for the variants.

        Returns:
            `split`, `variant`, the number of `users`, and the `metrics` by method.
        """
        from .build import evaluate_repository

        return evaluate_repository(self.folder, split, variant, store)

    def add(
        self,
        users: NewVectors | None = None,
        items: NewVectors | None = None,
        interactions: Dataset | None = None,
        retrain: bool = False,
    ) -> dict[str, Any]:
        """Adds users, items and interactions; see [`~update.add_to_repository`]."""
        from .update import add_to_repository

        return add_to_repository(self.folder, users=users, items=items, interactions=interactions, retrain=retrain)

    def remove(self, users: Sequence[str] = (), items: Sequence[str] = ()) -> dict[str, int]:
        """Deletes users and withdraws items; see [`~update.remove_from_repository`]."""
        from .update import remove_from_repository

        return remove_from_repository(self.folder, users=users, items=items)

    def audit(self) -> list[Check]:
        """Checks that nothing in it has seen its held-out items; see [`~audit.audit`]."""
        from .audit import audit

        return audit(self.folder)

    def info(self) -> dict[str, Any]:
        """Counts, settings, results and sizes, also of one whose training has not finished."""
        return describe_repository(self.folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        include_users: bool = False,
        token: str | bool | None = None,
        commit_message: str = "Upload TokenRec recommender",
    ) -> str:
        """Uploads it in one commit and returns the address; see [`~hub.push_repository`]."""
        from .hub import push_repository

        return push_repository(
            self.folder,
            repo_id,
            private=private,
            revision=revision,
            include_users=include_users,
            token=token,
            commit_message=commit_message,
        )


def describe_repository(folder: str | os.PathLike) -> dict[str, Any]:
    """Counts, settings, results and sizes of a repository, also of one whose training has not finished.

    Raises:
        FileNotFoundError: the folder holds no trained repository.
        ValueError: a file of it is damaged.
    """
    folder = Path(folder)
    found = {
        name: read_json(path) if (path := folder / place).is_file() else {}
        for name, place in {
            "model": "config.json",
            "tokenizer": "tokenizer_config.json",
            "store": "store/store.json",
            "metrics": "metrics.json",
            "additions": "additions.json",
            "run": "training/run.json",
            "collaborative": "collaborative/config.json",
        }.items()
    }
    if not found["run"] and "codebooks" not in found["tokenizer"]:
        raise FileNotFoundError(f"{folder} is no trained repository; give the --output_dir of `tokenrec train`.")
    metrics = found["metrics"]
    recipe = found["run"].get("recipe", {})
    document = {
        "finished": bool(metrics) or not found["run"],
        "dataset": metrics.get("dataset"),
        "recipe": metrics.get("recipe") or recipe.get("recipe"),
        "seed": metrics.get("seed", recipe.get("seed")),
        "refit": metrics.get("refit", found["run"].get("refit")),
        "counts": found["store"].get("counts"),
        "interactions": metrics.get("interactions"),
        "embedding_dim": found["store"].get("embedding_dim"),
        "codebooks": found["tokenizer"].get("codebooks"),
        "space_ids": found["model"].get("space_ids") or found["tokenizer"].get("space_ids"),
        "additions": found["additions"] or None,
        "retraining_due": _retraining_due(
            found["additions"], metrics, is_fism=found["collaborative"].get("model_type") == "tokenrec_fism"
        ),
        **{name: metrics.get(name) for name in ("codes", "epochs", "seconds", "validation", "test")},
        "bytes": _size(folder) - _size(folder / "training"),
        "training_bytes": _size(folder / "training"),
    }
    if not document["finished"]:
        runs = ("selection", "refit") if found["run"]["refit"] else ("selection",)
        records = {name: folder / "training" / f"{name}.json" for name in runs}
        document["stages"] = {
            run: [stage for stage in STAGES if path.is_file() and stage in read_json(path)]
            for run, path in records.items()
        }
    return document


def _retraining_due(additions: Mapping[str, Any], metrics: Mapping[str, Any], is_fism: bool) -> list[str]:
    """Why the repository should be trained anew, if it should: newcomers that are too many, or that its codes describe badly.

    With FISM new items get part of their length in directions that codes need not describe, see `fold_in_items`.
    """
    reasons = []
    for kind, added in additions.items():
        trained, error = metrics[f"{kind}s"], metrics["codes"][kind]["reconstruction_error"]
        if added["count"] > DUE_SHARE * trained:
            reasons.append(f"{added['count']} {kind}s were added to {trained}")
        told_by_codes = kind == "user" or not is_fism
        if told_by_codes and added["reconstruction_error"] > DUE_ERROR * max(error, DUE_FLOOR):
            reasons.append(
                f"the codes of new {kind}s lose {added['reconstruction_error']:.0%} of the variance, in training {error:.0%}"
            )
    return reasons


def _size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
