"""Ids of items as rows of symbols: random, sequential and collaborative (Hua et al., SIGIR-AP 2023, arXiv 2305.06569).

Ids are int64 `[num_items, L]`. Shorter ids are padded with -1. Ids are unique, and none is a prefix of another.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.cluster.vq import kmeans2
from scipy.sparse.linalg import eigsh

from tokenrec_hf.data.interaction_matrix import InteractionMatrix

BASE = 100


def numbers_as_symbols(numbers: np.ndarray) -> np.ndarray:
    """Decimal numbers as pairs of digits, all of the same length. T5 also writes about two digits a token.

    Args:
        numbers: non-negative, `[n]`.

    Returns:
        int64 `[n, L]`, symbols `0..BASE - 1`.
    """
    length = 1
    while BASE**length <= numbers.max():
        length += 1
    return numbers[:, None] // BASE ** np.arange(length - 1, -1, -1) % BASE


def random_ids(train: InteractionMatrix, seed: int) -> np.ndarray:
    """RID: the items numbered in random order."""
    return numbers_as_symbols(np.random.default_rng(seed).permutation(train.num_items))


def sequential_ids(train: InteractionMatrix, seed: int) -> np.ndarray:
    """SID: the items numbered as they first appear, user by user, in the *training* interactions.

    Numbers over all data, as in P5's code, let the model find a user's held-out items by counting on. Items without a training
    interaction come last in random order, because the order of rows may reveal their users.
    """
    warm, first = np.unique(train.items, return_index=True)
    cold = np.setdiff1d(np.arange(train.num_items), warm)
    order = np.concatenate([warm[np.argsort(first)], np.random.default_rng(seed).permutation(cold)])
    numbers = np.empty(train.num_items, dtype=np.int64)
    numbers[order] = np.arange(train.num_items)
    return numbers_as_symbols(numbers)


def collaborative_ids(train: InteractionMatrix, seed: int, num_clusters: int = 20, leaf_size: int = BASE) -> np.ndarray:
    """CID: recursive spectral clustering of the item co-occurrence graph.

    An id is the path of an item's clusters. A cluster of at most `leaf_size` items is not split; its items are numbered in
    random order.

    Args:
        train: interactions of the graph; the weight of an edge is the number of users of both items.
        seed: seed of k-means and of the numbers in a cluster.
        num_clusters: number of parts of a split cluster.
        leaf_size: size of the largest cluster that is not split.
    """
    random = np.random.default_rng(seed)
    shape = (train.num_users, train.num_items)
    seen = sp.csr_array((np.ones(len(train)), (train.users, train.items)), shape=shape)
    seen.data[:] = 1  # also for repeated interactions
    graph = sp.csr_array(seen.T @ seen)
    graph.setdiag(0)
    ids: list[tuple[int, ...]] = [()] * train.num_items
    waiting = [((), np.arange(train.num_items))]
    while waiting:
        prefix, items = waiting.pop()
        if len(items) <= leaf_size:
            for number, item in enumerate(random.permutation(items)):
                ids[item] = (*prefix, number)
            continue
        parts = spectral_clusters(graph[items][:, items], num_clusters, random)
        waiting += [((*prefix, part), items[parts == part]) for part in range(parts.max() + 1)]
    table = np.full((train.num_items, max(map(len, ids))), -1)
    for item, symbols in enumerate(ids):
        table[item, : len(symbols)] = symbols
    return table


def spectral_clusters(graph: sp.csr_array, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """Normalised spectral clustering (Ng, Jordan and Weiss, 2001): the cluster of each node, from 0 and without gaps.

    Without edges, or if only one cluster is found, the nodes are split into equal parts at random.
    """
    size = graph.shape[0]
    at_random = random.permutation(size) % num_clusters
    if not graph.sum():
        return at_random
    scale = 1 / np.sqrt(np.maximum(graph.sum(axis=1), 1))
    normalized = sp.diags_array(scale) @ graph @ sp.diags_array(scale)
    # Full precision: a looser tolerance misses some of the equal eigenvalues of a disconnected graph.
    _, vectors = eigsh(normalized, k=num_clusters, which="LA", v0=random.random(size))
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    _, found = kmeans2(rows, num_clusters, minit="++", rng=random, missing="warn")
    names, parts = np.unique(found, return_inverse=True)
    return parts if len(names) > 1 else at_random
