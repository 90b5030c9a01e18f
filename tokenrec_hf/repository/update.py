"""Cold-start users and items, and removals, in a trained repository (sections II-E2 and III-C of TokenRec, arXiv 2406.10450).

Vectors are given, folded in from interactions (`training.closed_forms`), or retrained and rotated into the old space; codes
follow from vectors. T5 and the MQ-Tokenizers never change. All files change together or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from ..data.interaction_matrix import InteractionMatrix
from ..data.reading import as_text, item_metadata, read_ids
from ..models.codes import COLLABORATIVE, IdIndex, RepositoryFolder, check_ids, check_repository, read_json
from ..models.configuration_tokenrec import T5GenerativeRetrievalConfig
from ..models.embedding_store import KINDS, WITHDRAWN, EmbeddingStore, Vectors
from ..models.modeling_collaborative import (
    CollaborativeModel,
    FISMModel,
    HistoryEncoder,
    load_collaborative,
    save_collaborative,
)
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.recommender import check_list, load_history_encoder, load_model
from ..models.tokenization_tokenrec import TokenRecTokenizer
from ..training.closed_forms import UnreachedError, align, fold_in, fold_in_items

if TYPE_CHECKING:
    from datasets import Dataset

    from .repository import Repository

# Of the epochs of the first training of the collaborative model.
RETRAIN_SHARE = 0.25
VECTOR_COLUMNS = ("vector", "embedding", "embeddings")
# Ids by kind, `"user"` or `"item"`.
Ids = dict[str, list[str]]
# Item ids by user, oldest first.
_Histories = dict[str, list[str]]


@dataclass
class NewVectors:
    """Users or items with their vectors.

    Args:
        ids: n ids.
        vectors: `[n, d]`, in the space of the collaborative model.
        metadata: the metadata of each item; items only.
    """

    ids: Sequence[str]
    vectors: Vectors
    metadata: Sequence[dict[str, Any]] | None = None


def read_vectors(path: str | os.PathLike, kind: str) -> NewVectors:
    """Reads a Parquet file with a column of ids (`id`, or `user_id` / `item_id`) and one of vectors (`vector` or `embedding`).

    Further columns of items are metadata, which recommendations can be filtered by.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file, or its columns are not these.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a Parquet file with ids and vectors.")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no Parquet file ({str(error).splitlines()[0]}); write one with ids and vectors."
        ) from None
    ids = _column(path, table, "ids", ("id", f"{kind}_id"))
    vectors = _column(path, table, "vectors", VECTOR_COLUMNS)
    others = [name for name in table.column_names if name not in (ids, vectors)]
    if others and kind == "user":
        raise ValueError(
            f"{path} has the column {others[0]!r} besides ids and vectors; only items have metadata. Drop it."
        )
    column = table[vectors].combine_chunks()
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(test(column.type) for test in is_list):
        raise ValueError(f"{path}: the column {vectors!r} holds {column.type} but must hold lists of numbers.")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] is None:
        raise ValueError(
            f"{path}: {vectors!r} does not hold one vector of the same length in each row, but lengths {lengths[:5]}."
        )
    if not (pa.types.is_floating(column.type.value_type) or pa.types.is_integer(column.type.value_type)):
        raise ValueError(f"{path}: the column {vectors!r} holds {column.type} but must hold lists of numbers.")
    with np.errstate(over="ignore"):
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    if not (fine := np.isfinite(flat).all(axis=1)).all():
        raise ValueError(f"{path}: the vector of row {fine.argmin() + 1} has a value that is missing or no float32.")
    metadata = item_metadata(table.select(others).to_pandas(integer_object_nulls=True), str(path)) if others else None
    return NewVectors(read_ids(table[ids].to_pylist(), ids, str(path)), torch.from_numpy(flat), metadata)


def _column(path: str | os.PathLike, table: pa.Table, content: str, allowed: Sequence[str]) -> str:
    """The name of the only column with one of the allowed names."""
    found = [name for name in allowed if name in table.column_names]
    if len(found) != 1:
        raise ValueError(
            f"{path} has the columns {', '.join(table.column_names)}, so it is not clear which holds the {content}; name "
            f"exactly one {' or '.join(allowed)}."
        )
    return found[0]


def add(
    repository: Repository,
    *,
    users: NewVectors | None = None,
    items: NewVectors | None = None,
    interactions: Dataset | None = None,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    retrain: bool = False,
) -> dict[str, Any]:
    """Adds users, items and interactions, new vectors of known users and items, or metadata of items.

    Args:
        repository: a finished repository.
        users: vectors of users.
        items: vectors of items.
        interactions: columns `user_id` and `item_id`, in time order. Cold-start users and items without given vectors are
            folded in; all interactions become seen items, after those of a user that are known, unless these are repeated
            here too: then the order of these rows counts. Known ids keep their vectors. With FISM, every user of an interaction
            gets the vector of the whole history, and cold-start items count in histories from then on.
        metadata: by item id, names and values, such as `{"title": "Alien"}`; items that are not in the store are ignored.
        retrain: continue the training of the collaborative model on all seen items, for a quarter of its epochs, and rotate
            the result into the old space; the vectors and codes of all change, but those of ids that never had interactions.

    Returns:
        The numbers of new `users` and `items`, of known ones with new vectors (`users_changed`, `items_changed`), of new
        `interactions` and of items with new metadata (`described`), and by kind the `reconstruction_error` of the codes of all
        these users and items: the share of variance that is lost, comparable to that of training.

    Raises:
        FileNotFoundError: the repository is unfinished.
        TypeError: an argument has another type.
        ValueError: an argument is wrong; then nothing has changed.
    """
    check_repository(repository.folder)
    _check_given(users, items, interactions, metadata)
    with repository.change() as staged:
        space = _Space(repository)
        store = space.store
        before = {kind: store.count(kind) for kind in KINDS}
        changed: Ids = {}
        for kind, given in (("item", items), ("user", users)):
            if given is not None:
                ids, vectors = _text_ids(given.ids, kind), space.lifted(kind, given.vectors)
                if (empty := (vectors == 0).all(dim=1)).any() and len(vectors) == len(ids):
                    raise ValueError(
                        f"the vector of {kind} {ids[int(empty.byte().argmax())]!r} is all zeros; give others."
                    )
                store.upsert(kind, ids, vectors)
                changed[kind] = list(dict.fromkeys(ids))
                if given.metadata is not None:
                    store.set_metadata(ids, given.metadata)
        recorded = 0
        if interactions is not None:
            pairs = (_text_ids(interactions[f"{kind}_id"][:], kind) for kind in KINDS)
            histories, recorded = _histories(store, *pairs)
            encoder = load_history_encoder(repository.folder)
            if encoder is None:
                found = _fold_in(space, histories)
            else:
                found = _fold_in_histories(space, encoder, histories, set(changed.get("user", ())), staged)
            for kind, ids in found.items():
                changed[kind] = list(dict.fromkeys([*changed.get(kind, ()), *ids]))
            store.set_seen(list(histories), list(histories.values()))
        is_known = store.contains("item", list(metadata or ())).tolist()
        described = dict(compress((metadata or {}).items(), is_known))
        store.set_metadata(list(described), list(described.values()))
        if retrain:
            for kind, ids in _retrain(space, staged).items():
                changed[kind] = list(dict.fromkeys([*changed.get(kind, ()), *ids]))
        errors = _update_codes(space, staged, changed)
        added = {kind: store.count(kind) - count for kind, count in before.items()}
        _note_additions(space, staged, added)
        store.save_pretrained(staged.store)
    return {
        **{f"{kind}s": count for kind, count in added.items()},
        **{f"{kind}s_changed": len(changed.get(kind, ())) - count for kind, count in added.items()},
        "interactions": recorded,
        "described": len(described),
        "reconstruction_error": errors,
    }


def _check_given(
    users: NewVectors | None,
    items: NewVectors | None,
    interactions: Dataset | None,
    metadata: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    """Refuses arguments of [`add`] that are of another type, and metadata that only [`remove`] gives."""
    for kind, given in (("user", users), ("item", items)):
        if given is not None and not isinstance(given, NewVectors):
            raise TypeError(f"{kind}s must be NewVectors(ids, vectors), not a {type(given).__name__}.")
    columns = getattr(interactions, "column_names", None) or ()  # None for a stream whose columns are unknown
    if interactions is not None and not {"user_id", "item_id"} <= set(columns):
        raise TypeError(
            f"interactions must be a Dataset of user_id and item_id, as from load_interactions, not a {type(interactions).__name__}."
        )
    for described in chain((items.metadata if items else None) or (), (metadata or {}).values()):
        if WITHDRAWN in described:
            raise ValueError(f"the metadata {WITHDRAWN!r} are not to be given; withdraw items with `remove`.")


def _text_ids(ids: Sequence[Any], kind: str) -> list[str]:
    """Ids as text, also where they are numbers."""
    listed = list(ids)
    if (row := next((row for row, one in enumerate(listed, 1) if one is None or one != one), None)) is not None:
        raise ValueError(f"row {row} has no {kind} id; complete it or leave it out.")
    return check_ids([str(as_text(one)) for one in listed], f"{kind} id")


def _histories(store: EmbeddingStore, users: Sequence[str], items: Sequence[str]) -> tuple[_Histories, int]:
    """The histories of these users with further interactions, and the number of these that are not in the store.

    New items stand at the end of a history, unless the interactions of a user name all items seen so far: then their order counts.
    """
    given: dict[str, dict[str, None]] = {user: {} for user in users}
    for user, item in zip(users, items):
        given[user].setdefault(item)
    histories, recorded = {}, 0
    for (user, mine), seen in zip(given.items(), store.seen(list(given))):
        known = set(seen)
        new = [item for item in mine if item not in known]
        histories[user] = list(mine) if len(mine) - len(new) == len(known) else [*seen, *new]
        recorded += len(new)
    return histories, recorded


class _Space:
    """The store of a repository, and the relation of its vectors to those of the collaborative model."""

    def __init__(self, repository: Repository):
        self.repository, self.store = repository, EmbeddingStore.open(repository.parts.store)
        self.retrieval = T5GenerativeRetrievalConfig.from_pretrained(repository.folder)
        # Dimensions of the collaborative vectors; T5's part follows them.
        self.dim = self.retrieval.embedding_dim

    def plain(self, kind: str) -> torch.Tensor:
        """All collaborative vectors of a kind."""
        return self.store.vectors(kind)[:, : self.dim]

    def lifted(self, kind: str, vectors: Vectors) -> torch.Tensor:
        """Vectors of the collaborative model or of the store as vectors of the store, without T5's part."""
        given = vectors if isinstance(vectors, torch.Tensor) else torch.from_numpy(np.array(vectors, dtype=np.float32))
        if given.dim() != 2 or given.shape[1] not in (self.dim, self.store.embedding_dim):
            raise ValueError(
                f"the {kind} vectors have shape {list(given.shape)} but those of {self.repository.folder} have {self.dim} dimensions; "
                "pass a matrix of vectors of the collaborative model of its training."
            )
        return F.pad(given[:, : self.dim], (0, self.store.embedding_dim - self.dim))

    def new(self, kind: str, ids: Iterable[str]) -> list[str]:
        """The ids that are not in the store, each once."""
        unique = list(dict.fromkeys(ids))
        return [name for name, known in zip(unique, self.store.contains(kind, unique)) if not known]

    def seen(self, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The seen items of users, as user numbers and item rows, int64 `[n]` each."""
        lists = self.store.seen(users)
        numbers = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
        return numbers, self.store.rows("item", [item for items in lists for item in items])

    def no_interactions(self) -> ValueError:
        """The error of a fold-in without anything to calibrate it with."""
        return ValueError(
            f"the store of {self.repository.folder} has no interactions of users (a repository that was pushed without users has "
            "none), so cold-start users and items cannot be folded in; supply vectors instead."
        )


def _unreached(kind: str, name: str) -> ValueError:
    return ValueError(
        f"the new {kind} {name!r} has no interaction that leads to a known user or item; supply a vector or leave it out."
    )


def _fold_in(space: _Space, histories: _Histories) -> Ids:
    """Puts cold-start users and items into the store; returns their ids."""
    store = space.store
    new = {"user": space.new("user", histories), "item": space.new("item", chain.from_iterable(histories.values()))}
    if not any(new.values()):
        return {}
    if not len(space.seen(store.ids("user"))[0]):
        raise space.no_interactions()
    rows = _all_interactions(space, histories, [*store.ids("item"), *new["item"]])
    try:
        vectors = fold_in(space.plain("user"), space.plain("item"), *rows)
    except UnreachedError as error:
        raise _unreached(error.kind, new[error.kind][error.row - store.count(error.kind)]) from None
    for kind, found in zip(KINDS, vectors):
        if new[kind]:
            store.upsert(kind, new[kind], space.lifted(kind, found))
    return new


def _fold_in_histories(
    space: _Space, encoder: HistoryEncoder, histories: _Histories, supplied: set[str], staged: RepositoryFolder
) -> Ids:
    """The fold-in where users are histories: cold-start items get rows and vectors, users the vectors of whole histories.

    Args:
        space: changed.
        encoder: the history encoder of the repository.
        histories: those that have changed.
        supplied: users with given vectors, which they keep.
        staged: receives the collaborative model with the cold-start items.

    Returns:
        The ids with new vectors.
    """
    new_items = space.new("item", chain.from_iterable(histories.values()))
    encoder = _with_new_items(space, encoder, histories, new_items, staged)
    users = [user for user in histories if user not in supplied]
    if not users:
        return {"user": [], "item": new_items}
    vectors, known = encoder.encode([list(dict.fromkeys(histories[user])) for user in users])
    known &= (vectors != 0).any(dim=1).numpy()
    encoded = list(compress(users, known.tolist()))
    if unreached := set(space.new("user", users)) - set(encoded):
        raise _unreached("user", next(user for user in users if user in unreached))
    if encoded:
        space.store.upsert("user", encoded, space.lifted("user", vectors[torch.from_numpy(known)]))
    return {"user": encoded, "item": new_items}


def _with_new_items(
    space: _Space, encoder: HistoryEncoder, histories: _Histories, new_items: list[str], staged: RepositoryFolder
) -> HistoryEncoder:
    """Puts cold-start items into the store and stages a model with a row for every item that has interactions.

    Items of earlier additions get new rows from all interactions by now; their vectors in the store stay.
    """
    store, model = space.store, encoder.model
    former = load_collaborative(space.repository.parts.collaborative)[1]["user"].ids()
    trained = len(encoder.items) - model.config.num_folded_items
    trained_ids = encoder.items.ids()[:trained]
    names = [*store.ids("item"), *new_items]
    rows = IdIndex(trained_ids, "item").rows(names)
    if not former and new_items:
        raise space.no_interactions()
    if not former or (rows >= 0).all():
        return encoder
    user_rows, item_rows = _all_interactions(space, histories, names)
    added = np.flatnonzero((rows < 0) & (np.bincount(item_rows, minlength=len(rows)) > 0))
    rows[added] = trained + np.arange(len(added))
    tables = fold_in_items(cast(FISMModel, model), user_rows, rows[item_rows], trained)
    stored = torch.from_numpy(added < store.count("item"))
    tables[1][stored] = space.plain("item")[torch.from_numpy(added)[stored]]
    if (unreached := (tables[1] == 0).all(dim=1).numpy()).any():
        raise _unreached("item", names[added[unreached][0]])
    if new_items:
        store.upsert("item", new_items, space.lifted("item", tables[1][~stored]))
    sizes = {"num_items": trained + len(added), "num_folded_items": len(added)}
    larger = type(model)(type(model.config).from_dict({**model.config.to_dict(), **sizes}))
    larger.edge_users, larger.edge_items = model.edge_users, model.edge_items
    with torch.no_grad():
        for (_, table), (_, previous), more in zip(larger.tables(), model.tables(), tables):
            table.weight.copy_(torch.cat([previous.weight[:trained], more]))
    ids = [*trained_ids, *(names[row] for row in added)]
    save_collaborative(larger, {"user": former, "item": ids}, staged.collaborative)
    return HistoryEncoder(larger.eval(), IdIndex(ids, "item"))


def _all_interactions(space: _Space, histories: _Histories, item_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """User and item rows of all histories, those that have changed included; each pair once, by user and then in time order."""
    known = space.store.ids("user")
    index = IdIndex([*known, *space.new("user", histories)], "user")
    users, items = space.seen(known)
    changed = index.rows(list(histories))
    others = ~np.isin(users, changed)
    users = np.concatenate([users[others], np.repeat(changed, [len(history) for history in histories.values()])])
    more = IdIndex(item_names, "item").rows(list(chain.from_iterable(histories.values())))
    items = np.concatenate([items[others], more])
    first = np.sort(np.unique(users * len(item_names) + items, return_index=True)[1])
    order = first[np.argsort(users[first], kind="stable")]
    return users[order], items[order]


def _retrain(space: _Space, staged: RepositoryFolder) -> Ids:
    """Continues the training of the collaborative model on all seen items; returns the ids, which get new vectors.

    Ids that were not trained before and have no interactions keep their vectors: there is nothing to learn about them.
    """
    # Trainer takes longer to import than a fold-in takes.
    from ..training.stages import train_collaborative

    store, repository = space.store, space.repository
    source = repository.parts.collaborative
    old, former = load_collaborative(source) if source.is_dir() else (None, {})
    if old is None or not len(former["user"]):
        raise ValueError(
            f"{repository.folder} was pushed without users, so its collaborative model cannot be retrained; add without "
            "retraining."
        )
    if not repository.parts.metrics.is_file():
        raise ValueError(
            f"{repository.folder} has no metrics.json, which tells the epochs of its training; add without retraining."
        )
    recipe, epochs = repository.recipe, repository.metrics["epochs"][COLLABORATIVE]
    if not epochs:
        raise ValueError(
            f"the item vectors of {repository.folder} were given and not trained, so they cannot be retrained; add without "
            "retraining."
        )
    rows = dict(zip(KINDS, space.seen(store.ids("user"))))
    ids: Ids = {}
    for kind in KINDS:
        names = store.ids(kind)
        trained = former[kind].rows(names) >= 0
        trained[rows[kind]] = True
        ids[kind] = list(compress(names, trained.tolist()))
        rows[kind] = np.cumsum(trained)[rows[kind]] - 1
    matrix = InteractionMatrix(rows["user"], rows["item"], len(ids["user"]), len(ids["item"]))
    model = old.resized(matrix)
    model.config.num_folded_items = 0
    earlier = {kind: torch.from_numpy(former[kind].rows(ids[kind])) for kind in KINDS}
    with torch.no_grad():
        for (kind, table), (_, previous) in zip(model.tables(), old.tables()):
            table.weight[earlier[kind] >= 0] = previous.weight[earlier[kind][earlier[kind] >= 0]]
    with tempfile.TemporaryDirectory() as checkpoints:
        train_collaborative(
            matrix,
            recipe.collaborative,
            Path(checkpoints),
            epochs=max(1, round(RETRAIN_SHARE * epochs)),
            seed=recipe.seed,
            start=model,
        )
    vectors = {"user": model.user_embeddings(), "item": model.item_embeddings()}
    rotation = align(
        torch.cat([store.get(kind, ids[kind])[earlier[kind] >= 0, : space.dim] for kind in KINDS]),
        torch.cat([vectors[kind][earlier[kind] >= 0] for kind in KINDS]),
    )
    with torch.no_grad():
        # Vectors are linear in the tables up to their length, so rotated tables give rotated vectors.
        for _, table in model.tables():
            table.weight.copy_(table.weight @ rotation)
    for kind, new in (("user", model.user_embeddings()), ("item", model.item_embeddings())):
        store.upsert(kind, ids[kind], space.lifted(kind, new))
    save_collaborative(model, ids, staged.collaborative)
    return ids


def _update_codes(space: _Space, staged: RepositoryFolder, changed: Ids) -> dict[str, float]:
    """Computes the codes of changed vectors, and T5's part of the items' vectors, which is made of their codes.

    Stages the code table; returns the share of variance lost, by kind.
    """
    store, parts = space.store, space.repository.parts
    mqs, errors = {}, {}
    vectors = {kind: store.get(kind, ids)[:, : space.dim] for kind, ids in changed.items() if ids}
    for kind in vectors:
        mqs[kind] = MQTokenizerModel.from_pretrained(parts.mq(kind))
        store.check_space(kind, mqs[kind].space_id, "the MQ-Tokenizer")
        errors[kind] = mqs[kind].reconstruction_error(vectors[kind])
    tokenizer = TokenRecTokenizer.from_pretrained(parts.path)
    tokenizer.attach(user_mq=mqs.get("user"), item_mq=mqs.get("item"))
    for kind, add_to in (("user", tokenizer.add_users), ("item", tokenizer.add_items)):
        if kind in vectors:
            add_to(dict(zip(changed[kind], vectors[kind])))
    tokenizer.save_codes(staged.path)
    if "item" in vectors and space.dim < store.embedding_dim:
        items = changed["item"]
        store.upsert("item", items, load_model(parts.path).item_vectors(vectors["item"], tokenizer.item_tokens(items)))
    return errors


def _note_additions(space: _Space, staged: RepositoryFolder, added: dict[str, int]) -> None:
    """Counts the additions since the training, and measures the error of their codes."""
    parts = space.repository.parts
    known = read_json(parts.additions) if parts.additions.is_file() else {}
    noted = {}
    for kind, count in added.items():
        total = count + (known[kind]["count"] if known else 0)
        # They are the last of the store; users that were deleted may be among those counted.
        vectors = space.plain(kind)[-total:] if total else ()
        error = MQTokenizerModel.from_pretrained(parts.mq(kind)).reconstruction_error(vectors) if len(vectors) else 0.0
        noted[kind] = {"count": total, "reconstruction_error": error}
    staged.additions.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


# Removal --------------------------------------------------------------------------------------------------------------


def remove(repository: Repository, *, users: Sequence[str] = (), items: Sequence[str] = ()) -> dict[str, Any]:
    """Deletes users with all their data, and withdraws items from sale.

    No id, vector, code, seen item or interaction of a deleted user is left in any file of the repository, those of the
    training included. The weights of T5 and the MQ-Tokenizers, which many users have shaped, stay. A withdrawn item is never
    recommended again, also after further interactions with it; histories may still name it.

    Args:
        repository: a finished repository.
        users: ids of users.
        items: ids of items.

    Returns:
        The numbers of deleted `users` and withdrawn `items`, and by kind the ids that are `not_found`: removing what is not
        there is no error, so a call that was interrupted can be repeated.

    Raises:
        FileNotFoundError: the repository is unfinished.
        ValueError: an argument is no list of ids, or another process is changing the repository.
    """
    check_repository(repository.folder)
    asked: Ids = {kind: list(dict.fromkeys(check_list(ids, f"{kind}s"))) for kind, ids in zip(KINDS, (users, items))}
    with repository.change() as staged:
        store = EmbeddingStore.open(repository.parts.store)
        is_there = {kind: store.contains(kind, ids) for kind, ids in asked.items()}
        store.withdraw(list(compress(asked["item"], is_there["item"])))
        if asked["user"]:
            _forget(repository, staged, store, asked["user"])
            selection = type(repository)(repository.selection) if repository.selection.is_dir() else None
            if selection is not None and selection.parts.store.is_dir():
                nested = RepositoryFolder(staged.path / selection.folder.relative_to(repository.folder))
                _forget(selection, nested, EmbeddingStore.open(selection.parts.store), asked["user"])
        store.save_pretrained(staged.store)
    return {
        "users": int(is_there["user"].sum()),
        "items": int(is_there["item"].sum()),
        "not_found": {kind: list(compress(ids, ~is_there[kind])) for kind, ids in asked.items()},
    }


def _forget(repository: Repository, staged: RepositoryFolder, store: EmbeddingStore, users: Sequence[str]) -> None:
    """Stages the files of a repository without users; ids that only some of the files know are removed from these."""
    store.delete("user", users)
    store.save_pretrained(staged.store)
    _forget_codes(repository, staged, users)
    _forget_collaborative(repository, staged, users)
    _forget_interactions(repository, staged, users)


def without_users(model: CollaborativeModel, keep: np.ndarray) -> CollaborativeModel:
    """A collaborative model with the same items and only some of the users.

    Args:
        model: any collaborative model.
        keep: whether to keep each user, bool `[num_users]`. The others lose their rows in the tables and their interactions.
    """
    users, items = model.interactions() or (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    inside = keep[users]
    rows = (np.cumsum(keep) - 1)[users[inside]]
    left = model.resized(InteractionMatrix(rows, items[inside], int(keep.sum()), model.config.num_items))
    with torch.no_grad():
        for (kind, table), (_, former) in zip(left.tables(), model.tables()):
            table.weight.copy_(former.weight[torch.from_numpy(keep)] if kind == "user" else former.weight)
    return left.eval()


def _forget_codes(repository: Repository, staged: RepositoryFolder, users: Sequence[str]) -> None:
    tokenizer = TokenRecTokenizer.from_pretrained(repository.folder)
    tokenizer.remove("user", users)
    tokenizer.save_codes(staged.path)


def _forget_collaborative(repository: Repository, staged: RepositoryFolder, users: Sequence[str]) -> None:
    """Removes users' embeddings and interactions from the collaborative model, where there is one."""
    source = repository.parts.collaborative
    if not source.is_dir():
        return
    model, former = load_collaborative(source)
    keep = np.ones(len(former["user"]), dtype=bool)
    rows = former["user"].rows(users)
    keep[rows[rows >= 0]] = False
    names = {"user": former["user"].kept(keep).ids(), "item": former["item"].ids()}
    save_collaborative(without_users(model, keep), names, staged.collaborative)


def _forget_interactions(repository: Repository, staged: RepositoryFolder, users: Sequence[str]) -> None:
    """Removes users from the interactions of training and evaluation."""
    gone = pa.array(users)
    for path in repository.interactions.glob("*.parquet"):
        table = pq.read_table(path)
        target = staged.path / path.relative_to(repository.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pc.invert(pc.is_in(table["user_id"], gone))), target)
