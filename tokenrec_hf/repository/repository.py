"""A trained repository in a local folder, as one object that reads, changes, measures and shares it.

Only this module knows how several files change together or not at all. `info` reads JSON files and imports neither torch nor
transformers; all other methods import what they need when they are called.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..models.codes import (
    COLLABORATIVE,
    COMMITTED,
    LOCK,
    MANIFEST,
    MQ_FOLDERS,
    RepositoryFolder,
    check_repository,
    current,
    fetch_repository,
    flush_names,
    read_json,
    read_whole,
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
# The result of the last `tokenrec compare`.
COMPARISON = "comparison"
STAGES = (COLLABORATIVE, *MQ_FOLDERS.values(), RETRIEVAL, EVALUATION)
# Retraining is due when the cold-start users or items are more than this share of the trained ones, or when their codes lose
# this many times the variance that the trained ones lose (of the floor, where these lose almost nothing).
DUE_SHARE, DUE_ERROR, DUE_FLOOR = 0.2, 2.0, 0.1
# A change that is not committed, the copies that pushes are made from, and the files of interrupted writes, of which
# safetensors makes the second kind.
STAGED, PUSHED, TEMPORARY = ".update", ".push-", re.compile(r"\..+-[0-9a-f]{8}\.tmp|\.tmp\w{6}")
_Method = TypeVar("_Method", bound=Callable[..., Any])
# A full disk, a file-size limit and a quota, as Python, safetensors and Arrow report them.
_NO_SPACE = re.compile(r"[Ee]rr(?:no|or) (?:27|28|122)\b")


def _whole(method: _Method) -> _Method:
    """Makes a method of a repository run again if a change came between, so that all files it reads are of one state."""

    @wraps(method)
    def run(self: Repository, *args: Any, **kwargs: Any) -> Any:
        return read_whole(self.parts.store, lambda: method(self, *args, **kwargs))

    return cast(_Method, run)


class Repository:
    """A trained repository in a local folder.

    A change of several files is seen whole or not at all. One that was interrupted after its commit is put in place by the next
    change, or by `repair`; until then all readers find its files where they are.

    Args:
        folder: the `--output-dir` of a training, finished or not.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.parts = Path(folder), RepositoryFolder(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder}; train one with `tokenrec train --output-dir {folder}`."
            )
        if (self.folder / COMMITTED).is_dir():
            self._check_links()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> Repository:
        """The repository in a folder or on the Hub, from where it is downloaded into the cache, to read but not to change."""
        return cls(fetch_repository(name, revision=revision, token=token))

    @property
    def recipe(self) -> Recipe:
        """The settings of the training, with the values chosen on validation in place of `auto`."""
        from ..training.recipe import Recipe

        return Recipe.open(self.parts.recipe)

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

    @_whole
    def evaluate(self, split: str = "test", variant: str = "tokenrec", store: Store | None = None) -> dict[str, Any]:
        """Ranks all items for every user of a split.

        Args:
            split: `"validation"` or `"test"`. After a refit, validation items are ranked by the model of the selection run,
                which has not been trained on them.
            variant: the prompts, a name of [`~evaluation.variants.VARIANTS`].
            store: item vectors in place of the repository's own.

        Returns:
            `split`, `variant`, the number of `users`, the `metrics` by row, HR@20 by length of the history
            (`hr@20_by_history`) and by training interactions of the held-out item (`hr@20_by_popularity`) of the variant and of
            the collaborative vectors, and the variant's [`~ranking.calibration`].

        Raises:
            FileNotFoundError: the repository is unfinished or has no interactions.
            ValueError: `store` with a split that another model is evaluated on.
        """
        from ..data.splits import SPLITS, index_splits
        from ..evaluation.metrics import embedding_ranks
        from ..evaluation.ranking import (
            calibration,
            evaluate_baselines,
            evaluate_vectors,
            hit_rates_by_size,
            retrieval_queries,
        )
        from ..evaluation.variants import VARIANTS
        from ..models.recommender import Recommender

        check_repository(self.folder)
        for name, value, choices in (("split", split, SPLITS[1:]), ("variant", variant, VARIANTS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
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
        queries = retrieval_queries(folder, data, recipe.collator_arguments, [variant], batch_size)[variant]
        items = store.get("item", data.item_ids)
        metrics[variant] = evaluate_vectors(queries, items, data)
        targets, seen = data.holdout.targets, data.interactions.of_users(data.holdout.users)
        ranks = {
            name: embedding_ranks(own, items, targets, *seen, cosine=True).numpy()
            for name, own in {"collaborative_cosine": store.get("user", users), variant: queries}.items()
        }
        return {
            "split": split,
            "variant": variant,
            "users": len(users),
            "metrics": metrics,
            "hr@20_by_history": hit_rates_by_size(ranks, data.interactions.lengths[data.holdout.users]),
            "hr@20_by_popularity": hit_rates_by_size(ranks, data.interactions.popularity()[targets]),
            "calibration": calibration(queries, items, data),
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

    def remove(self, users: Sequence[str] = (), items: Sequence[str] = ()) -> dict[str, Any]:
        """Deletes users and withdraws items; see [`~update.remove`]."""
        from .update import remove

        return remove(self, users=users, items=items)

    @_whole
    def audit(self) -> list[Check]:
        """Checks that no part of the repository has seen the held-out items; see [`~audit.audit`]."""
        from .audit import audit

        return audit(self)

    @_whole
    def verify(self) -> list[Check]:
        """Checks the files of the repository against their checksums and against each other; see [`~verify.verify`]."""
        from .verify import verify

        return verify(self)

    def repair(self) -> None:
        """Completes or drops an interrupted change, removes leftovers, and makes the codes again if they are wrong.

        Raises:
            FileNotFoundError: there is no store.
            ValueError: a file is damaged that cannot be made again, or another process is changing the repository.
        """
        from .verify import repair

        repair(self)

    @_whole
    def info(self) -> dict[str, Any]:
        """Counts, settings, results and sizes, also of an unfinished training.

        Raises:
            FileNotFoundError: the folder holds no trained repository.
            ValueError: a file is damaged.
        """
        metrics, run = (read_json(path) if path.is_file() else {} for path in (self.parts.metrics, self.record("run")))
        finished = bool(metrics) or not run
        model, tokenizer, store, additions = (
            # A training that is interrupted leaves parts of files.
            read_json(path) if finished and path.is_file() else {}
            for path in (
                self.folder / "config.json",
                self.folder / "tokenizer_config.json",
                current(self.parts.store) / MANIFEST,
                current(self.parts.additions),
            )
        )
        if not run and "codebooks" not in tokenizer:
            raise FileNotFoundError(
                f"{self.folder} is no trained repository; give the --output-dir of `tokenrec train`."
            )
        recipe = run.get("recipe", {})
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
            "retraining_due": _retraining_due(additions, metrics) if metrics else [],
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
        """The JSON file of the settings (`"run"`), of the finished stages of a run (`"selection"`, `"refit"`), or of a comparison."""
        return self.parts.training / f"{name}.json"

    @_whole
    def splits(self) -> DatasetDict:
        """The interactions of training and evaluation.

        Raises:
            FileNotFoundError: they are missing, for example because the repository is from the Hub.
        """
        from datasets import Dataset, DatasetDict

        from ..data.splits import SPLITS

        paths = {name: current(self.interactions / f"{name}.parquet") for name in SPLITS}
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

        An interrupted change is completed or dropped before. Every change saves the store.

        Raises:
            ValueError: another process is changing the repository, a folder of it is a link, or it is in the Hub's cache.
            OSError: the disk is full; then nothing has changed.
        """
        self.check_own()
        staged = self.folder / STAGED
        with (
            exclusive(self.folder),
            exclusive(self.parts.store),
            space_named(self.folder, "the repository is as it was"),
        ):
            self._recover()
            staged.mkdir()
            try:
                yield RepositoryFolder(staged)
                make_readable(staged)
                for path in (*staged.rglob("*"), staged):
                    _flush(path)
                # The commit: before this renaming nothing has changed, after it readers see the change.
                os.rename(staged, self.folder / COMMITTED)
                flush_names(self.folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            # Readers find the change, whether or not it can be put in place now; if not, the next change does that.
            with suppress(OSError):
                self._finish()

    def leftovers(self) -> list[Path]:
        """What interrupted changes, writes and pushes have left: files and folders that no process works on."""
        found = [*self.folder.glob(STAGED), *self.dead_copies()]
        temporary = (path for path in contents(self.folder) if TEMPORARY.fullmatch(path.name))
        hidden = (PUSHED, STAGED)
        return found + [path for path in temporary if not path.relative_to(self.folder).parts[0].startswith(hidden)]

    def sweep(self) -> None:
        """Removes the leftovers; for those who have excluded other processes."""
        for path in self.leftovers():
            if path.is_symlink() or path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)

    def dead_copies(self) -> list[Path]:
        """The copies for pushes that no process works on."""
        found = []
        for path in self.folder.glob(f"{PUSHED}*"):
            if path.is_dir() and not path.is_symlink():
                with suppress(ValueError), exclusive(path):
                    found.append(path)
        return found

    def check_own(self) -> None:
        """Makes sure that a change stays inside the folder, and that this is no copy that others read.

        Raises:
            ValueError: the folder is in the Hub's cache, or a folder or file of it is a link.
        """
        place = self.folder.resolve()
        if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
            name = place.parents[1].name.removeprefix("models--").replace("--", "/")
            raise ValueError(
                f"{self.folder} is the cached copy of the Hub repository {name}, which other programs read; download one to change "
                f"with `hf download {name} --local-dir out`."
            )
        self._check_links()

    def _check_links(self) -> None:
        """Makes sure that a change stays inside the folder.

        Raises:
            ValueError: a folder of the repository, or a file that a change writes, is a link.
        """
        changed = (
            self.folder / COMMITTED,
            self.folder / STAGED,
            self.folder / LOCK,
            self.parts.store / LOCK,
            self.parts.training,
            self.interactions,
            self.selection,
        )
        folders = [
            folder
            for parts in (self.parts, RepositoryFolder(self.selection))
            for folder in (parts.store, parts.collaborative, *map(parts.mq, MQ_FOLDERS))
        ]
        for path in (*changed, *folders, *contents(self.folder / COMMITTED)):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, so a change would reach outside the repository; replace it by what it "
                    "links to."
                )

    def _recover(self) -> None:
        """Completes a committed change, and removes an uncommitted one and the files of processes that have died."""
        if (self.folder / COMMITTED).is_dir():
            self._finish()
        self.sweep()
        self._sweep_stores()

    def _finish(self) -> None:
        """Puts the files of a committed change in place. Until all are, readers find them in the change."""
        committed, finished = self.folder / COMMITTED, self.folder / STAGED
        for path in sorted(committed.rglob("*")):
            if path.is_file() and path.name != LOCK:
                _place(path, self.folder / path.relative_to(committed))
        shutil.rmtree(finished, ignore_errors=True)
        os.rename(committed, finished)
        flush_names(self.folder)
        shutil.rmtree(finished)
        self._sweep_stores()

    def _sweep_stores(self) -> None:
        """Removes what the stores of the repository and of the selection run held before."""
        from ..models.embedding_store import remove_leftovers

        for folder in (self.folder, self.selection):
            if (store := RepositoryFolder(folder).store).is_dir():
                remove_leftovers(store)


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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Excludes other processes from changing a folder.

    Raises:
        ValueError: another process is changing it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is being changed by another process; try again when that has finished.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def space_named(folder: Path, state: str) -> Iterator[None]:
    """Turns the error of a full disk into a sentence, which says in what `state` the folder is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _NO_SPACE.search(str(error)):
            raise
        raise OSError(
            f"no space left for {folder}, or a file is larger than allowed ({error}); {state}. Make room and try again."
        ) from error


def make_readable(folder: Path) -> None:
    """Gives the weights in a folder the permissions of new files: safetensors makes files that nobody else may read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def _flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    if path.is_dir():
        flush_names(path)
        return
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _place(path: Path, target: Path) -> None:
    """Gives a file of a change its place in the repository, too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            os.link(path, temporary)
        except OSError:
            # Not every file system has links.
            shutil.copyfile(path, temporary)
            _flush(temporary)
        os.replace(temporary, target)
        flush_names(target.parent)
    finally:
        # Renaming does nothing where both are links to the same file.
        temporary.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Bytes of all files under a folder."""
    total = 0
    for path in contents(folder):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def contents(folder: Path) -> Iterator[Path]:
    """All files and folders under a folder, also while others appear and disappear; links are not followed."""
    return (Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files))
