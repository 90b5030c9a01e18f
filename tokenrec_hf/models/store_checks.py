"""What every embedding store checks before it touches anything: kinds, ids, lists and matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .exact_search import ITEM_CHUNK
from .id_index import check_ids

KINDS = ("user", "item")


def check_vectors(
    embedding_dim: int, kind: str, ids: Sequence[str], vectors: torch.Tensor | np.ndarray
) -> tuple[list[str], torch.Tensor]:
    """`ids`, each once, and their vectors `[n, d]` in memory of their own; the last one of an id counts."""
    names = check_ids(check_id_list(check_kind(kind), ids), kind)
    matrix = check_matrix(embedding_dim, vectors, f"{kind} vectors", "n")
    if len(names) != len(matrix):
        raise ValueError(f"{len(names)} {kind} ids were given with {len(matrix)} vectors; give one vector for each id.")
    for start in range(0, len(names), ITEM_CHUNK):
        bad = ~torch.isfinite(matrix[start : start + ITEM_CHUNK]).all(dim=1)
        if bad.any():
            name = names[start + int(bad.nonzero()[0])]
            raise ValueError(
                f"the vector of {kind} {name!r} holds NaN or an infinity; leave {kind} {name!r} out or mend its vector."
            )
    last = {name: position for position, name in enumerate(names)}
    if len(last) < len(names):
        return list(last), matrix[list(last.values())]
    return names, matrix.clone() if isinstance(vectors, torch.Tensor) else matrix


def check_queries(embedding_dim: int, queries: torch.Tensor | np.ndarray, top_k: int) -> torch.Tensor:
    """Queries as a float32 CPU tensor `[B, embedding_dim]`, or a ValueError that says what is wrong with them or `top_k`."""
    matrix = check_matrix(embedding_dim, queries, "queries", "B")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; ask for at least 1 item.")
    bad = ~torch.isfinite(matrix).all(dim=1)
    if bad.any():
        raise ValueError(f"query {int(bad.nonzero()[0])} holds NaN or an infinity; no item can be compared with it.")
    return matrix


def check_matrix(embedding_dim: int, vectors: torch.Tensor | np.ndarray, what: str, count: str) -> torch.Tensor:
    """`vectors` as a float32 CPU tensor of shape `[count, embedding_dim]`, or a ValueError that names `what`."""
    if isinstance(vectors, torch.Tensor):
        matrix = vectors.detach().to("cpu", torch.float32)
    else:
        matrix = torch.from_numpy(np.array(vectors, dtype=np.float32))
    if matrix.ndim != 2:
        raise ValueError(
            f"{what} have shape {list(matrix.shape)} but the store expects [{count}, {embedding_dim}]; pass a "
            "matrix with one row each."
        )
    if matrix.shape[1] != embedding_dim:
        raise ValueError(
            f"{what} have {matrix.shape[1]} dimensions but the store holds vectors of {embedding_dim}; pass "
            f"vectors of {embedding_dim} or make a store with embedding_dim={matrix.shape[1]}."
        )
    return matrix


def check_kind(kind: str) -> str:
    """`kind`, or a ValueError where it is neither `"user"` nor `"item"`."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'user' or 'item'.")
    return kind


def check_id_list(kind: str, ids: Sequence[str]) -> Sequence[str]:
    """`ids`, or a ValueError where they are a single string."""
    if isinstance(ids, str):
        raise ValueError(f"{kind} ids are the single string {ids[:60]!r}; pass a list of ids.")
    return ids


def list_lengths(lists: Sequence[Sequence[str]], expected: int, what: str, of: str) -> np.ndarray:
    """The length of each list, int64 `[expected]`; ValueError where there is not one list for each."""
    if len(lists) != expected or str in set(map(type, lists)):
        found = "strings" if len(lists) == expected else f"{len(lists)} lists of item ids"
        raise ValueError(f"{what} holds {found}; pass one list of item ids for each {of}, {expected} in all.")
    return np.fromiter(map(len, lists), dtype=np.int64, count=expected)
