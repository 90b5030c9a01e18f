"""How users and items leave a trained repository: users with everything that is known of them, items by being withdrawn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..data.interaction_matrix import InteractionMatrix
from ..models.embedding_store import EmbeddingStore
from ..models.id_index import load_indexes
from ..models.repository_files import check_repository
from ..models.tokenization_tokenrec import TokenRecTokenizer
from .collaborative_files import load_collaborative, resized, save_collaborative
from .transaction import repository_update


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
    check_repository(folder)
    folder = Path(folder)
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
    source = folder / "collaborative"
    if not source.is_dir():
        return
    if not (source / "ids.safetensors").is_file():
        shutil.rmtree(source)
        return
    former = load_indexes(source / "ids.safetensors")
    keep = np.ones(len(former["user"]), dtype=bool)
    rows = former["user"].rows(users)
    keep[rows[rows >= 0]] = False
    old = load_collaborative(source)
    edges: tuple[np.ndarray, np.ndarray] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    if hasattr(old, "edge_users"):
        of_users, of_items = old.edge_users.numpy(), old.edge_items.numpy()
        edges = (np.cumsum(keep) - 1)[of_users[keep[of_users]]], of_items[keep[of_users]]
    model = resized(old, InteractionMatrix(*edges, int(keep.sum()), len(former["item"])))
    with torch.no_grad():
        for (kind, table), (_, previous) in zip(model.tables(), old.tables()):
            table.weight.copy_(previous.weight[torch.from_numpy(keep)] if kind == "user" else previous.weight)
    names = {"user": former["user"].kept(keep).ids(), "item": former["item"].ids()}
    save_collaborative(model, names, staged / "collaborative")


def _forget_interactions(folder: Path, staged: Path, users: Sequence[str]) -> None:
    """Takes users out of the interactions that the repository was trained and evaluated on."""
    gone = pa.array(users)
    for path in (folder / "training" / "interactions").glob("*.parquet"):
        table = pq.read_table(path)
        left = table.filter(pc.invert(pc.is_in(table["user_id"], gone)))
        target = staged / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(left, target)
