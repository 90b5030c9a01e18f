"""Whether the files of a trained repository are undamaged and belong together, and the repair of what can be made again.

[`~audit.audit`] asks whether the measurements are honest; this module asks whether the folder is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..models.codes import (
    COLLABORATIVE,
    COMMITTED,
    MQ_FOLDERS,
    STORE_FOLDER,
    RepositoryFolder,
    check_repository,
    current,
    damage_named,
    read_json,
    save_tables,
)
from ..models.embedding_store import KINDS, EmbeddingStore
from ..models.modeling_collaborative import collaborative_class, load_collaborative
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from ..models.tokenization_tokenrec import TokenRecTokenizer, code_table
from .audit import Check, Result, codes_and_vectors
from .repository import SELECTION, Repository, contents

REPOSITORY = "repository"


def verify(repository: Repository) -> list[Check]:
    """Checks that every file of a trained repository is undamaged, and that the files agree with each other.

    Args:
        repository: a finished repository. Parts that a push leaves out may be missing.

    Returns:
        The checks of the repository (`run` is `"repository"`), and of that of the selection run if there is one.

    Raises:
        FileNotFoundError: the repository is unfinished.
    """
    check_repository(repository.folder)
    checks = [
        Check(REPOSITORY, "changes", *_changes(repository)),
        Check(REPOSITORY, "settings", *_found(lambda: _settings(repository))),
        *_parts(REPOSITORY, repository.parts),
    ]
    if repository.interactions.is_dir():
        checks.append(Check(REPOSITORY, "interactions", *_found(lambda: _interactions(repository))))
    if repository.selection.is_dir():
        checks += _parts(SELECTION, RepositoryFolder(repository.selection))
    return checks


def repair(repository: Repository) -> None:
    """Repairs a trained repository; see [`~repository.Repository.repair`]."""
    # Before the folder is changed: without a store there is nothing to repair.
    EmbeddingStore.open(repository.parts.store)
    with repository.change() as staged:
        store = EmbeddingStore.open(repository.parts.store)
        if not _decided(lambda: _codes(repository.parts))[0]:
            tables = {}
            for kind in KINDS:
                mq = MQTokenizerModel.from_pretrained(repository.parts.mq(kind))
                store.check_space(kind, mq.space_id, "the MQ-Tokenizer")
                vectors = store.vectors(kind)[:, : mq.config.embedding_dim]
                tables[kind] = code_table(kind, store.ids(kind), vectors, mq)
            save_tables(tables, staged.path / "codes.safetensors")
        store.save_pretrained(staged.store)


def _decided(check: Callable[[], Result]) -> Result:
    """The result of a check; an error means that it has not passed."""
    try:
        return check()
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        return False, " ".join(str(error).split())


def _found(check: Callable[[], str]) -> Result:
    """The result of a check that returns a finding or raises an error."""
    return _decided(lambda: (True, check()))


def _changes(repository: Repository) -> Result:
    """Whether no change was interrupted, and no process has left files behind."""
    remedy = "unless a process is changing the repository, run `tokenrec verify --repair`."
    if (repository.folder / COMMITTED).is_dir():
        return False, f"a change is committed and readers see it, but not all of its files are in place; {remedy}"
    if leftovers := repository.leftovers():
        return (
            False,
            f"{len(leftovers)} files or folders are left of interrupted work, such as {leftovers[0]}; {remedy}",
        )
    return True, "no change was interrupted, and nothing is left of one."


def _settings(repository: Repository) -> str:
    names = (path.relative_to(repository.folder) for path in contents(repository.folder) if path.suffix == ".json")
    # Not those of a change that is being written.
    paths = [repository.folder / name for name in names if not name.parts[0].startswith(".")]
    for path in paths:
        read_json(path)
    if repository.parts.recipe.is_file():
        with damage_named(repository.parts.recipe, "restore it from a copy"):
            repository.recipe.to_dict()
    return f"{len(paths)} JSON files and the recipe can be read."


def _parts(run: str, parts: RepositoryFolder) -> list[Check]:
    """The checks of the models, the tokenizer and the store in a folder."""
    models: dict[str, Callable[[], str]] = {"model": lambda: _weights(T5ForGenerativeRetrieval, parts.path)}
    for kind, name in MQ_FOLDERS.items():
        models[name] = lambda kind=kind: _weights(MQTokenizerModel, parts.mq(kind))  # type: ignore[misc]
    if current(parts.collaborative).is_dir():
        models[COLLABORATIVE] = lambda: _collaborative(parts)
    return [
        *(Check(run, name, *_found(check)) for name, check in models.items()),
        Check(run, STORE_FOLDER, *_found(lambda: _store(parts))),
        Check(run, "codes", *_decided(lambda: _codes(parts))),
    ]


def _weights(model_class: type[PreTrainedModel], folder: Path) -> str:
    read_json(folder / "config.json")
    loaded: Any = model_class.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit config.json: {wrong[0]} is missing or too much.")
    return f"{model.num_parameters()} weights fit config.json."


def _collaborative(parts: RepositoryFolder) -> str:
    folder = current(parts.collaborative)
    finding = _weights(collaborative_class(folder), folder)
    model, ids = load_collaborative(parts.collaborative)
    for kind, table in model.tables():
        if len(ids[kind]) != len(table.weight):
            raise ValueError(f"{folder} has {len(ids[kind])} {kind} ids for {len(table.weight)} rows.")
    return finding.replace("config.json", "config.json and ids.safetensors")


def _store(parts: RepositoryFolder) -> str:
    store = EmbeddingStore.open(parts.store)
    return f"{store.count('user')} users and {store.count('item')} items have the checksums of {parts.store.name}/store.json."


def _codes(parts: RepositoryFolder) -> Result:
    return codes_and_vectors(parts, TokenRecTokenizer.from_pretrained(parts.path), EmbeddingStore.open(parts.store))


def _interactions(repository: Repository) -> str:
    store, splits, count = EmbeddingStore.open(repository.parts.store), repository.splits(), 0
    for name, split in splits.items():
        count += len(split)
        for kind in KINDS:
            ids = list(dict.fromkeys(split[f"{kind}_id"][:]))
            unknown = [one for one, known in zip(ids, store.contains(kind, ids)) if not known]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} {kind}s of {name}.parquet, such as {unknown[0]!r}, are not in the store."
                )
    return f"the users and items of {count} interactions are in the store."
