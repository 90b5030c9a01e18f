"""Tomorrow's users and items in a trained repository (sections II-E2 and III-C of TokenRec, arXiv 2406.10450)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ..data.interaction_matrix import InteractionMatrix
from ..models.codes import IdIndex
from ..models.configuration_tokenrec import FISMConfig
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import (
    FISMModel,
    HistoryEncoder,
    augment_norm,
    load_collaborative,
    save_collaborative,
)
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.recommender import RepositoryFolder, check_repository
from ..models.tokenization_tokenrec import TokenRecTokenizer
from ..training.closed_forms import align, fold_in, fold_in_items
from ..training.recipe import load_recipe
from .repository import finish_update, repository_update

ADDITIONS = "additions.json"
# Of the epochs that the collaborative model was first trained for.
RETRAIN_SHARE = 0.25
VECTOR_COLUMNS = ("vector", "embedding", "embeddings")
_NO_INTERACTIONS = (
    "the store of {folder} knows no interactions of users (a repository that was pushed without users has none), so nobody can be "
    "folded in; supply vectors instead."
)
_UNREACHED = (
    "new {kind} {id!r} has no interaction that leads to a known item, so nothing can be said about it; supply a vector or leave it "
    "out."
)


@dataclass
class NewVectors:
    """Users or items with their vectors.

    Args:
        ids: n ids.
        vectors: `[n, d]`, of the collaborative model's space, with or without the coordinate that `augment_norm` adds.
        metadata: of items, what is known about each.
    """

    ids: Sequence[str]
    vectors: torch.Tensor
    metadata: Sequence[dict[str, Any]] | None = None


def read_vectors(path: str | os.PathLike, kind: str) -> NewVectors:
    """Reads a Parquet file with a column of ids (`id`, or `user_id` / `item_id`) and one of vectors (`vector` or `embedding`).

    Further columns of items are metadata to filter recommendations by.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file, or has not these columns.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a Parquet file with ids and vectors.")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no Parquet file ({str(error).splitlines()[0]}); write one with ids and vectors."
        ) from None
    names = {"ids": ("id", f"{kind}_id"), "vectors": VECTOR_COLUMNS}
    chosen = {}
    for what, allowed in names.items():
        found = [name for name in allowed if name in table.column_names]
        if len(found) != 1:
            raise ValueError(
                f"{path} has the columns {', '.join(table.column_names)}, so it is not clear which holds the {what}; name "
                f"exactly one {' or '.join(allowed)}."
            )
        chosen[what] = found[0]
    column = table[chosen["vectors"]].combine_chunks()
    if not (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        raise ValueError(
            f"{path}: the column {chosen['vectors']!r} holds {column.type} but must hold lists of numbers."
        )
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] is None:
        raise ValueError(
            f"{path}: {chosen['vectors']!r} does not hold one vector of the same length in each row, but lengths {lengths[:5]}."
        )
    flat = np.array(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    others = [name for name in table.column_names if name not in chosen.values()]
    if others and kind == "user":
        raise ValueError(
            f"{path} has the column {others[0]!r} besides ids and vectors; only items have metadata. Drop it."
        )
    return NewVectors(
        [str(one) for one in table[chosen["ids"]].to_pylist()],
        torch.from_numpy(flat.reshape(len(column), -1)),
        table.select(others).to_pylist() if others else None,
    )


def add_to_repository(
    folder: str | os.PathLike,
    *,
    users: NewVectors | None = None,
    items: NewVectors | None = None,
    interactions: Dataset | None = None,
    retrain: bool = False,
) -> dict[str, Any]:
    """Adds users and items to a trained repository, or new vectors and interactions of those that it has.

    Args:
        folder: a trained repository in a local folder.
        users: vectors of users.
        items: vectors of items.
        interactions: columns `user_id` and `item_id`, in time order. Users and items that are neither in the store nor given
            with vectors are folded in; all interactions become seen items. Those of known ids keep their vectors. With FISM,
            all users that they name get the vector that it makes of everything they have had, and new items say something
            of their users from then on.
        retrain: go on training the collaborative model on everything that users have seen, for a quarter of the epochs it
            had, and turn the result into the old space; all vectors and codes change.

    Returns:
        What was done: how many `users` and `items` are new, how many were there already and have new vectors
        (`users_changed`, `items_changed`), the new `interactions`, and by kind the `reconstruction_error` of the codes of all of
        these: the share of variance that is lost, to be compared with that of training.

    Raises:
        FileNotFoundError: the folder is no finished repository.
        ValueError: something given is wrong; then nothing has changed.
    """
    folder = Path(folder)
    finish_update(folder)
    check_repository(folder)
    with repository_update(folder) as staged:
        space = _Space(folder, EmbeddingStore.open(staged / "store"))
        before = {kind: space.store.count(kind) for kind in ("user", "item")}
        changed: dict[str, list[str]] = {}
        for kind, given in (("item", items), ("user", users)):
            if given is not None:
                space.store.upsert(kind, given.ids, space.lifted(kind, given.vectors))
                changed[kind] = list(dict.fromkeys(given.ids))
                if given.metadata is not None:
                    space.store.set_metadata(given.ids, given.metadata)
        recorded = 0
        if interactions is not None:
            pairs = interactions["user_id"][:], interactions["item_id"][:]
            encoder = RepositoryFolder(folder).load_history_encoder()
            if encoder is None:
                found = _fold_in(space, *pairs)
            else:
                found = _fold_in_histories(space, encoder, *pairs, changed.get("user", []), staged)
            for kind, ids in found.items():
                changed[kind] = list(dict.fromkeys(changed.get(kind, []) + ids))
            recorded = _record(space.store, *pairs)
        if retrain:
            _retrain(space, staged)
            changed = {kind: space.store.ids(kind) for kind in ("user", "item")}
        errors = _give_codes(folder, staged, space.store, changed)
        added = {kind: space.store.count(kind) - count for kind, count in before.items()}
        _note_additions(folder, staged, added, errors)
        space.store.save_pretrained(staged / "store")
    return {
        **{f"{kind}s": count for kind, count in added.items()},
        **{f"{kind}s_changed": len(changed.get(kind, ())) - count for kind, count in added.items()},
        "interactions": recorded,
        "reconstruction_error": errors,
    }


class _Space:
    """The store of a repository and how its vectors are made of those of the collaborative model."""

    def __init__(self, folder: Path, store: EmbeddingStore):
        self.folder, self.store = folder, store
        self.recipe = load_recipe(config=folder / "recipe.yaml")
        self.augmented = bool(self.recipe["collaborative"]["augment_norm"])
        # All items of training have the same.
        self.norm = float(store.vectors("item").norm(dim=1).max()) if self.augmented and store.count("item") else None

    def plain(self, kind: str) -> torch.Tensor:
        """All vectors of a kind, without the coordinate that `augment_norm` has added."""
        vectors = self.store.vectors(kind)
        return vectors[:, :-1] if self.augmented else vectors

    def lifted(self, kind: str, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of the collaborative model as the store has them; such as have the store's size already stay."""
        if vectors.shape[1] == self.store.embedding_dim:
            return vectors
        plain = self.store.embedding_dim - self.augmented
        if not self.augmented or vectors.shape[1] != plain:
            sizes = f"{plain}" + f" or {plain + 1}" * self.augmented
            raise ValueError(
                f"the {kind} vectors have {vectors.shape[1]} dimensions but those of {self.folder} have {sizes}; pass vectors "
                "of the collaborative model that it was trained with."
            )
        return augment_norm(vectors, vectors, self.norm)[kind == "item"]


def _unknown(store: EmbeddingStore, kind: str, ids: Sequence[str]) -> list[str]:
    """Those of `ids` that the store does not have, each once."""
    ids = list(dict.fromkeys(ids))
    return [one for one, known in zip(ids, store.contains(kind, ids)) if not known]


def _fold_in_histories(
    space: _Space,
    encoder: HistoryEncoder,
    users: Sequence[str],
    items: Sequence[str],
    supplied: Sequence[str],
    staged: Path,
) -> dict[str, list[str]]:
    """With FISM: new items get vectors, and all users named that of everything they have had; returns their ids.

    Users whose vectors were `supplied` keep them.
    """
    new_items = _unknown(space.store, "item", items)
    encoder = _with_new_items(space, encoder, users, items, staged)
    kept = set(supplied)
    names = [user for user in dict.fromkeys(users) if user not in kept]
    if not names:
        return {"user": [], "item": new_items}
    histories = {user: dict.fromkeys(seen) for user, seen in zip(names, space.store.seen(names))}
    for user, item in zip(users, items):
        if user in histories:
            histories[user].setdefault(item)
    vectors, known = encoder.encode([list(history) for history in histories.values()])
    known &= (vectors != 0).any(dim=1).numpy()
    pooled = [user for user, useful in zip(names, known) if useful]
    if lost := [user for user in _unknown(space.store, "user", names) if user not in set(pooled)]:
        raise ValueError(_UNREACHED.format(kind="user", id=lost[0]))
    if pooled:
        space.store.upsert("user", pooled, space.lifted("user", vectors[torch.from_numpy(known)]))
    return {"user": pooled, "item": new_items}


def _with_new_items(
    space: _Space, encoder: HistoryEncoder, users: Sequence[str], items: Sequence[str], staged: Path
) -> HistoryEncoder:
    """Puts new items into the store and stages a FISM that knows all items of after its training that anybody has had.

    Those of earlier additions, too, say of their users what the interactions by now make of it; their vectors in the store stay.
    """
    store, former = space.store, RepositoryFolder(space.folder).load_collaborative()[1]
    trained = len(encoder.items) - encoder.model.config.num_folded_items
    trained_ids, new_items = encoder.items.ids()[:trained], _unknown(store, "item", items)
    names = [*store.ids("item"), *new_items]
    rows = IdIndex(trained_ids, "item").rows(names)
    if not len(former["user"]) and new_items:
        raise ValueError(_NO_INTERACTIONS.format(folder=space.folder))
    if not len(former["user"]) or (rows >= 0).all():
        return encoder
    user_rows, item_rows = _all_interactions(store, users, items, names)
    newcomers = np.flatnonzero((rows < 0) & (np.bincount(item_rows, minlength=len(rows)) > 0))
    rows[newcomers] = trained + np.arange(len(newcomers))
    tables = fold_in_items(cast(FISMModel, encoder.model), user_rows, rows[item_rows], trained)
    stored = newcomers < store.count("item")
    tables[1][torch.from_numpy(stored)] = space.plain("item")[torch.from_numpy(newcomers[stored])]
    if (lost := (tables[1] == 0).all(dim=1).numpy()).any():
        raise ValueError(_UNREACHED.format(kind="item", id=names[newcomers[lost][0]]))
    if new_items:
        store.upsert("item", new_items, tables[1][torch.from_numpy(~stored)])
    old = encoder.model
    sizes = {"num_items": trained + len(newcomers), "num_folded_items": len(newcomers)}
    model = FISMModel(FISMConfig.from_dict({**old.config.to_dict(), **sizes}))
    model.edge_users, model.edge_items = old.edge_users, old.edge_items
    with torch.no_grad():
        for (_, table), (_, previous), more in zip(model.tables(), old.tables(), tables):
            table.weight.copy_(torch.cat([previous.weight[:trained], more]))
    ids = [*trained_ids, *(names[row] for row in newcomers)]
    save_collaborative(model, {"user": former["user"].ids(), "item": ids}, staged / "collaborative")
    return HistoryEncoder(model.eval(), IdIndex(ids, "item"))


def _all_interactions(
    store: EmbeddingStore, users: Sequence[str], items: Sequence[str], item_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """User and item row of what users have seen and of further interactions, each pair once, by user and then in time order."""
    known = store.ids("user")
    indptr, seen = _seen_rows(store, known)
    index = IdIndex([*known, *_unknown(store, "user", users)], "user")
    user_rows = np.concatenate([np.repeat(np.arange(len(known)), np.diff(indptr)), index.rows(users)])
    item_rows = np.concatenate([seen, IdIndex(item_names, "item").rows(items)])
    first = np.sort(np.unique(user_rows * len(item_names) + item_rows, return_index=True)[1])
    order = first[np.argsort(user_rows[first], kind="stable")]
    return user_rows[order], item_rows[order]


def _fold_in(space: _Space, users: Sequence[str], items: Sequence[str]) -> dict[str, list[str]]:
    """Puts users and items that the store does not have into it; returns their ids."""
    store = space.store
    new = {kind: _unknown(store, kind, ids) for kind, ids in (("user", users), ("item", items))}
    if not any(new.values()):
        return {}
    known = store.ids("user")
    indptr, seen = _seen_rows(store, known)
    if not len(seen):
        raise ValueError(_NO_INTERACTIONS.format(folder=space.folder))
    rows = {"user": np.repeat(np.arange(len(known)), np.diff(indptr)), "item": seen}
    for kind, ids in (("user", users), ("item", items)):
        index = IdIndex([*store.ids(kind), *new[kind]], kind)
        rows[kind] = np.concatenate([rows[kind], index.rows(ids)])
    try:
        vectors = dict(
            zip(("user", "item"), fold_in(space.plain("user"), space.plain("item"), rows["user"], rows["item"]))
        )
    except ValueError as error:
        raise ValueError(_with_id(str(error), store, new)) from None
    for kind, ids in new.items():
        if ids:
            store.upsert(kind, ids, space.lifted(kind, vectors[kind]))
    return new


def _with_id(message: str, store: EmbeddingStore, new: dict[str, list[str]]) -> str:
    """The message of `fold_in` with the id in the place of its row."""
    _, kind, _, _, row, rest = message.split(" ", 5)
    return f"{kind} {new[kind][int(row) - store.count(kind)]!r} {rest}"


def _seen_rows(store: EmbeddingStore, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What users have seen, as CSR rows of items."""
    seen = store.seen(users)
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in seen])]).astype(np.int64)
    return indptr, store.rows("item", [item for one in seen for item in one])


def _record(store: EmbeddingStore, users: Sequence[str], items: Sequence[str]) -> int:
    """Appends interactions to the seen items, except those that are there already; returns how many."""
    names = list(dict.fromkeys(users))
    lists = {user: dict.fromkeys(seen) for user, seen in zip(names, store.seen(names))}
    before = {user: len(seen) for user, seen in lists.items()}
    for user, item in zip(users, items):
        lists[user].setdefault(item)
    new = {user: list(seen)[before[user] :] for user, seen in lists.items() if len(seen) > before[user]}
    store.add_seen(list(new), list(new.values()))
    return sum(map(len, new.values()))


def _retrain(space: _Space, staged: Path) -> None:
    """Goes on training the collaborative model on everything that users have seen; new vectors for everybody."""
    # The Trainer takes longer to import than newcomers take to be added.
    from ..training.stages import train_collaborative

    store = space.store
    ids = {kind: store.ids(kind) for kind in ("user", "item")}
    indptr, seen = _seen_rows(store, ids["user"])
    matrix = InteractionMatrix(np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), seen, *map(len, ids.values()))
    old, former = RepositoryFolder(space.folder).load_collaborative()
    if not len(former["user"]):
        raise ValueError(
            f"{space.folder} was pushed without users, so its collaborative model would forget them; add without retraining."
        )
    model = old.resized(matrix)
    model.config.num_folded_items = 0
    with torch.no_grad():
        rows = {kind: former[kind].rows(ids[kind]) for kind in ids}
        common = {kind: torch.from_numpy(found >= 0) for kind, found in rows.items()}
        for (kind, table), (_, previous) in zip(model.tables(), old.tables()):
            table.weight[common[kind]] = previous.weight[torch.from_numpy(rows[kind][rows[kind] >= 0])]
    metrics = json.loads((space.folder / "metrics.json").read_text(encoding="utf-8"))
    epochs = max(1, round(RETRAIN_SHARE * metrics["epochs"]["collaborative"]))
    settings = space.recipe["collaborative"]
    with tempfile.TemporaryDirectory() as checkpoints:
        train_collaborative(matrix, settings, Path(checkpoints), epochs=epochs, seed=space.recipe["seed"], start=model)
    vectors = {"user": model.user_embeddings(), "item": model.item_embeddings()}
    rotation = align(
        torch.cat([space.plain(kind)[known] for kind, known in common.items()]),
        torch.cat([vectors[kind][known] for kind, known in common.items()]),
    )
    with torch.no_grad():
        # All of these models are linear in their tables, so turning these turns the vectors.
        for _, table in model.tables():
            table.weight.copy_(table.weight @ rotation)
    for kind, new in (("user", model.user_embeddings()), ("item", model.item_embeddings())):
        store.upsert(kind, ids[kind], space.lifted(kind, new))
    save_collaborative(model, ids, staged / "collaborative")


def _give_codes(folder: Path, staged: Path, store: EmbeddingStore, changed: dict[str, list[str]]) -> dict[str, float]:
    """Makes the codes of changed vectors and stages the code table; returns the share of variance lost, by kind."""
    tokenizer = TokenRecTokenizer.from_pretrained(folder)
    errors = {}
    for kind, ids in changed.items():
        if not ids:
            continue
        store.check_space(kind, tokenizer.space_ids[kind], "the tokenizer")
        vectors = store.get(kind, ids)
        (tokenizer.add_users if kind == "user" else tokenizer.add_items)(dict(zip(ids, vectors)))
        errors[kind] = MQTokenizerModel.from_pretrained(folder / f"mq_{kind}").reconstruction_error(vectors)
    tokenizer.save_codes(staged)
    return errors


def _note_additions(folder: Path, staged: Path, added: dict[str, int], errors: dict[str, float]) -> None:
    """Keeps count of what has been added since the training, and of how well the codes describe it."""
    known = {kind: {"count": 0, "reconstruction_error": 0.0} for kind in added}
    if (folder / ADDITIONS).is_file():
        known = json.loads((folder / ADDITIONS).read_text(encoding="utf-8"))
    for kind, error in errors.items():
        before, count = known[kind], max(added[kind], 1)
        total = before["count"] * before["reconstruction_error"] + count * error
        known[kind] = {
            "count": before["count"] + added[kind],
            "reconstruction_error": total / (before["count"] + count),
        }
    (staged / ADDITIONS).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def remove_from_repository(
    folder: str | os.PathLike, *, users: Sequence[str] = (), items: Sequence[str] = ()
) -> dict[str, int]:
    """Deletes users with everything that is known of them, and withdraws items from sale.

    Of a user no id, vector, code, seen item or interaction is left in any file of the repository, those of the training
    included; what the weights of T5 and the MQ-Tokenizers have learned from many users stays. An item that is withdrawn is
    never recommended again, also not when interactions with it are added later; histories may go on to name it.

    Args:
        folder: a trained repository in a local folder.
        users: ids of users.
        items: ids of items.

    Returns:
        How many `users` and `items` it was.

    Raises:
        FileNotFoundError: the folder is no finished repository.
        ValueError: an id is not in the store; then nothing has changed.
    """
    folder = Path(folder)
    finish_update(folder)
    check_repository(folder)
    with repository_update(folder) as staged:
        store = EmbeddingStore.open(staged / "store")
        for kind, ids in (("user", users), ("item", items)):
            missing = [one for one, known in zip(ids, store.contains(kind, ids)) if not known]
            if missing:
                raise ValueError(f"{kind} {missing[0]!r} is not in the store of {folder}; nothing was removed.")
        if items:
            store.withdraw(items)
        if users:
            # First, so that whoever stops in between leaves users that are still known here, to be removed again.
            _forget_selection(folder, users)
            store.delete("user", users)
            _forget_codes(folder, staged, users)
            _forget_collaborative(folder, staged, users)
            _forget_interactions(folder, staged, users)
        store.save_pretrained(staged / "store")
    return {"users": len(set(users)), "items": len(set(items))}


def _forget_selection(folder: Path, users: Sequence[str]) -> None:
    """Takes users out of the repository of the selection run, which has been trained on them too."""
    selection = folder / "training" / "selection"
    if (selection / "store").is_dir():
        known = EmbeddingStore.open(selection / "store").contains("user", users)
        remove_from_repository(selection, users=[one for one, there in zip(users, known) if there])


def _forget_codes(folder: Path, staged: Path, users: Sequence[str]) -> None:
    tokenizer = TokenRecTokenizer.from_pretrained(folder)
    tokenizer.remove("user", users)
    tokenizer.save_codes(staged)


def _forget_collaborative(folder: Path, staged: Path, users: Sequence[str]) -> None:
    """Takes users' embeddings and edges out of the collaborative model."""
    source = RepositoryFolder(folder).collaborative
    if not source.is_dir():
        return
    model, former = load_collaborative(source)
    keep = np.ones(len(former["user"]), dtype=bool)
    rows = former["user"].rows(users)
    keep[rows[rows >= 0]] = False
    names = {"user": former["user"].kept(keep).ids(), "item": former["item"].ids()}
    save_collaborative(model.without_users(keep), names, RepositoryFolder(staged).collaborative)


def _forget_interactions(folder: Path, staged: Path, users: Sequence[str]) -> None:
    """Takes users out of the interactions that the repository was trained and evaluated on."""
    gone = pa.array(users)
    for path in (folder / "training" / "interactions").glob("*.parquet"):
        table = pq.read_table(path)
        left = table.filter(pc.invert(pc.is_in(table["user_id"], gone)))
        target = staged / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(left, target)
