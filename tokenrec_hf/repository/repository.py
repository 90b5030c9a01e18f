"""A trained repository in a local folder, as one object that reads, changes, measures and shares it.

Only this module knows how several files change together or not at all. `info` reads JSON files and imports neither torch nor
transformers; all other methods import what they need when they are called.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..models.codes import (
    COLLABORATIVE,
    MANIFEST,
    MQ_FOLDERS,
    RepositoryFolder,
    check_repository,
    fetch_repository,
    flush_names,
    read_json,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..models.embedding_store import Store
    from ..models.recommender import Recommender
    from ..training.recipe import Recipe
    from .audit import Check
    from .update import NewVectors

# The two runs of a training, and the stages of each.
SELECTION, REFIT = "selection", "refit"
RETRIEVAL, EVALUATION = "retrieval", "evaluation"
STAGES = (COLLABORATIVE, *MQ_FOLDERS.values(), RETRIEVAL, EVALUATION)
# Retraining is due when the cold-start users or items are more than this share of the trained ones, or when their codes lose
# this many times the variance that the trained ones lose (of the floor, where these lose almost nothing).
DUE_SHARE, DUE_ERROR, DUE_FLOOR = 0.2, 2.0, 0.1
STAGED, LOCK = ".update", ".update.lock"


class Repository:
    """A trained repository in a local folder.

    Opening it completes a change that was interrupted after its commit.

    Args:
        folder: the `--output_dir` of a training, finished or not.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.parts = Path(folder), RepositoryFolder(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`."
            )
        if self.parts.committed.is_dir():
            self._check_links()
            with FileLock(self.folder / LOCK):
                self._finish()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> Repository:
        """The repository in a folder or on the Hub, from where it is downloaded."""
        return cls(fetch_repository(name, revision=revision, token=token))

    @property
    def recipe(self) -> Recipe:
        """The settings of the training, with the values chosen on validation in place of `auto`."""
        from ..training.recipe import Recipe

        return Recipe.load(config=self.parts.recipe)

    @property
    def metrics(self) -> dict[str, Any]:
        """The measurements of the training: the content of `metrics.json`."""
        return read_json(self.parts.metrics)

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `load_interactions` that the training data were read with; read further interactions alike."""
        return self.metrics.get("reading", {}) if self.parts.metrics.is_file() else {}

    def recommender(self, store: Store | None = None) -> Recommender:
        """Opens the repository to recommend; `store` replaces its own store, for example by one on Milvus."""
        from ..models.recommender import Recommender

        return Recommender.from_pretrained(self.folder, store=store)

    def evaluate(self, split: str = "test", variant: str = "tokenrec", store: Store | None = None) -> dict[str, Any]:
        """Ranks all items for every user of a split.

        Args:
            split: `"validation"` or `"test"`. After a refit, validation items are ranked by the model of the selection run,
                which has not been trained on them.
            variant: the prompts, a name of [`~evaluation.variants.VARIANTS`].
            store: item vectors in place of the repository's own.

        Returns:
            `split`, `variant`, the number of `users`, the `metrics` by row, and HR@20 by length of the history
            (`hr@20_by_history`) of the variant and of the collaborative vectors.

        Raises:
            FileNotFoundError: the repository is unfinished or has no interactions.
            ValueError: `store` with a split that another model is evaluated on.
        """
        from ..data.splits import index_splits
        from ..evaluation.ranking import evaluate_baselines, evaluate_vectors, hit_rates_by_history, retrieval_queries
        from ..models.recommender import Recommender

        check_repository(self.folder)
        data, recipe, folder = index_splits(self.splits(), split), self.recipe, self.folder
        if split == "validation" and read_json(self.record("run"))["refit"]:
            if store is not None:
                raise ValueError("the given store holds the vectors of the refit; evaluate it on the test split.")
            folder = self.selection
        # The recommender checks that its parts are undamaged and belong together.
        store = Recommender.from_pretrained(folder, store=store).store
        metrics = evaluate_baselines(data, store)
        batch_size = recipe.retrieval.training["per_device_eval_batch_size"]
        users = [data.user_ids[row] for row in data.holdout.users]
        queries = retrieval_queries(folder, data, recipe.collator_arguments, variant, batch_size)
        items = store.get("item", data.item_ids)
        metrics[variant] = evaluate_vectors(queries, items, data)
        by_history = hit_rates_by_history(
            {"collaborative_cosine": store.get("user", users), variant: queries}, items, data
        )
        return {
            "split": split,
            "variant": variant,
            "users": len(users),
            "metrics": metrics,
            "hr@20_by_history": by_history,
        }

    def add(
        self,
        users: NewVectors | None = None,
        items: NewVectors | None = None,
        interactions: Dataset | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        retrain: bool = False,
    ) -> dict[str, Any]:
        """Adds users, items and interactions, and metadata of items; see [`~update.add`]."""
        from .update import add

        return add(self, users=users, items=items, interactions=interactions, metadata=metadata, retrain=retrain)

    def remove(self, users: Sequence[str] = (), items: Sequence[str] = ()) -> dict[str, int]:
        """Deletes users and withdraws items; see [`~update.remove`]."""
        from .update import remove

        return remove(self, users=users, items=items)

    def audit(self) -> list[Check]:
        """Checks that no part of the repository has seen the held-out items; see [`~audit.audit`]."""
        from .audit import audit

        return audit(self)

    def info(self) -> dict[str, Any]:
        """Counts, settings, results and sizes, also of an unfinished training.

        Raises:
            FileNotFoundError: the folder holds no trained repository.
            ValueError: a file is damaged.
        """
        model, tokenizer, store, metrics, additions, run = (
            read_json(path) if path.is_file() else {}
            for path in (
                self.folder / "config.json",
                self.folder / "tokenizer_config.json",
                self.parts.store / "store.json",
                self.parts.metrics,
                self.parts.additions,
                self.record("run"),
            )
        )
        if not run and "codebooks" not in tokenizer:
            raise FileNotFoundError(
                f"{self.folder} is no trained repository; give the --output_dir of `tokenrec train`."
            )
        recipe, finished = run.get("recipe", {}), bool(metrics) or not run
        document = {
            "finished": finished,
            "dataset": metrics.get("dataset"),
            "recipe": metrics.get("recipe") or recipe.get("recipe"),
            "seed": metrics.get("seed", recipe.get("seed")),
            "refit": metrics.get("refit", run.get("refit")),
            "counts": store.get("counts"),
            "interactions": metrics.get("interactions"),
            "embedding_dim": store.get("embedding_dim"),
            "codebooks": tokenizer.get("codebooks"),
            "space_ids": model.get("space_ids") or tokenizer.get("space_ids"),
            "additions": additions or None,
            "retraining_due": _retraining_due(additions, metrics),
            **{name: metrics.get(name) for name in ("codes", "epochs", "seconds", "validation", "test")},
            "bytes": _size(self.folder) - _size(self.parts.training),
            "training_bytes": _size(self.parts.training),
        }
        if not finished:
            runs = (SELECTION, REFIT) if run["refit"] else (SELECTION,)
            document["stages"] = {
                name: [stage for stage in STAGES if path.is_file() and stage in read_json(path)]
                for name, path in ((name, self.record(name)) for name in runs)
            }
        return document

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
        """Uploads the repository in one commit and returns the address; see [`~hub.push`]."""
        from .hub import push

        return push(
            self,
            repo_id,
            private=private,
            revision=revision,
            include_users=include_users,
            token=token,
            commit_message=commit_message,
        )

    # The training that the repository comes from; these parts are never shared.

    @property
    def selection(self) -> Path:
        """The repository of the selection run, where there is a refit."""
        return self.parts.training / SELECTION

    @property
    def interactions(self) -> Path:
        """The folder of the three splits."""
        return self.parts.training / "interactions"

    def record(self, name: str) -> Path:
        """The JSON file of the settings (`"run"`) or of the finished stages of a run (`"selection"`, `"refit"`)."""
        return self.parts.training / f"{name}.json"

    def splits(self) -> DatasetDict:
        """The interactions of training and evaluation.

        Raises:
            FileNotFoundError: they are missing, for example because the repository is from the Hub.
        """
        from datasets import Dataset, DatasetDict

        from ..data.splits import SPLITS

        paths = {name: self.interactions / f"{name}.parquet" for name in SPLITS}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(
                    f"{self.interactions} has no {path.name}, so there is nothing to evaluate on; evaluate in the folder that "
                    "`tokenrec train` wrote."
                )
        return DatasetDict({name: Dataset.from_parquet(str(path), keep_in_memory=True) for name, path in paths.items()})

    @contextmanager
    def change(self) -> Iterator[RepositoryFolder]:
        """A folder for new files; when the block ends, they replace the files of their names, all or none of them.

        Raises:
            ValueError: another process is changing the repository.
        """
        self._check_links()
        lock, staged = FileLock(self.folder / LOCK), self.folder / STAGED
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.folder} is being changed by another process; try again when that has finished."
            ) from None
        try:
            self._finish()
            staged.mkdir()
            yield RepositoryFolder(staged)
            for path in (*staged.rglob("*"), staged):
                _flush(path)
            # The commit: before this renaming nothing has changed, after it `_finish` completes the change.
            os.rename(staged, self.parts.committed)
            flush_names(self.folder)
            self._finish()
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            lock.release()

    def _check_links(self) -> None:
        """Makes sure that a change stays inside the folder.

        Raises:
            ValueError: a folder of the repository, or a file that a change writes, is a link.
        """
        changed = (
            self.parts.committed,
            self.folder / STAGED,
            self.folder / LOCK,
            self.parts.training,
            self.interactions,
        )
        folders = (self.parts.store, self.parts.collaborative, *map(self.parts.mq, MQ_FOLDERS))
        for path in (*changed, *folders, *self.parts.committed.rglob("*")):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, so a change would reach outside the repository; replace it by what it "
                    "links to."
                )

    def _finish(self) -> None:
        """Drops an uncommitted change and completes a committed one."""
        shutil.rmtree(self.folder / STAGED, ignore_errors=True)
        committed = self.parts.committed
        if not committed.is_dir():
            return
        from ..models.embedding_store import remove_leftovers

        # The manifest of the store comes last, because the files that it names must be there then.
        for path in sorted(committed.rglob("*"), key=lambda path: path.name == MANIFEST):
            if path.is_file():
                target = self.folder / path.relative_to(committed)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        remove_leftovers(self.parts.store)
        shutil.rmtree(committed)


def _retraining_due(additions: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """The reasons to retrain: too many cold-start users or items, or codes that describe them badly."""
    reasons = []
    for kind, added in additions.items():
        trained, error = metrics[f"{kind}s"], metrics["codes"][kind]["reconstruction_error"]
        if added["count"] > DUE_SHARE * trained:
            reasons.append(f"{added['count']} {kind}s were added to {trained}")
        # Where users are histories, a cold-start item's vector has a part that codes need not describe, see `fold_in_items`.
        described = kind == "user" or not metrics["users_are_histories"]
        if described and added["reconstruction_error"] > DUE_ERROR * max(error, DUE_FLOOR):
            reasons.append(
                f"the codes of new {kind}s lose {added['reconstruction_error']:.0%} of the variance, in training {error:.0%}"
            )
    return reasons


def _flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    if path.is_dir():
        flush_names(path)
        return
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
