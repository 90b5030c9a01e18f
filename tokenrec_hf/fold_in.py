"""Vectors of newcomers in the space of a collaborative model that stays as it is (section II-E2 of TokenRec).

*Fold-in* takes one step of LightGCN's propagation from the known vectors (He et al., 2020) and calibrates it, in closed
form, on the users and items whose vectors are known: milliseconds, no training, and any collaborative model may have made
the vectors. *Alignment* turns the vectors of a model that was trained anew back into the old space. Both leave the
MQ-Tokenizers and T5 valid. Rows and vectors only: knows nothing about ids or files.

With FISM a user is what the items of the history say, so new items need a second kind of vector: what they say of their
users. It is folded in alike, from the rest of these users' histories.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .modeling_collaborative import FISMModel

# Of the mean eigenvalue of X^T X. On LastFM with a fifth of the users, or of the items, left out, 1e-4 to 3e-2 were alike.
RIDGE = 1e-2


def fold_in(
    user_vectors: torch.Tensor, item_vectors: torch.Tensor, users: np.ndarray, items: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors for users and items that the collaborative model has never seen, from their interactions.

    With d_u and d_i the numbers of interactions, the features of a user are x_u = sum_i q_i / sqrt(d_u d_i) over the items of
    u, and its vector is x_u W. W is the ridge regression of the known users' vectors on their features, from which the part
    that q_i owes to the user itself is taken away first, because a newcomer has left no trace in q_i. Items likewise.

    Args:
        user_vectors: p of the known users, `[U, d]`.
        item_vectors: q of the known items, `[I, d]`.
        users: user row of each interaction, known or new, int64 `[n]`; rows from U on are newcomers.
        items: item row of each interaction, int64 `[n]`; rows from I on are newcomers.

    Returns:
        Vectors of the new users `[U', d]` and new items `[I', d]`, in row order, up to the largest row that is named.

    Raises:
        ValueError: no chain of interactions leads from a newcomer to a known user or item.
    """
    known = {"user": len(user_vectors), "item": len(item_vectors)}
    rows = {"user": torch.from_numpy(np.asarray(users)), "item": torch.from_numpy(np.asarray(items))}
    vectors = {}
    for kind, start in (("user", user_vectors), ("item", item_vectors)):
        count = max(known[kind], int(rows[kind].max()) + 1 if len(rows[kind]) else 0)
        vectors[kind] = torch.cat([start.float(), torch.zeros(count - known[kind], start.shape[1])])
    ready = {kind: torch.arange(len(vectors[kind])) < count for kind, count in known.items()}
    weights = _calibrate(vectors, rows, ready)
    while not all(one.all() for one in ready.values()):
        links = ready["user"][rows["user"]] & ready["item"][rows["item"]]
        degree = {kind: torch.bincount(rows[kind][links], minlength=len(vectors[kind])) for kind in rows}
        found = {}
        for kind, other in (("user", "item"), ("item", "user")):
            # Newcomers whose other side has a vector already.
            usable = ~ready[kind][rows[kind]] & ready[other][rows[other]]
            mine, theirs = rows[kind][usable], rows[other][usable]
            own = torch.bincount(mine, minlength=len(vectors[kind]))
            features = _propagate(vectors[other], mine, theirs, own, degree[other].clamp(min=1))
            new = own > 0
            found[kind] = new, features[new] @ weights[kind]
        if not any(new.any() for new, _ in found.values()):
            kind = "user" if not ready["user"].all() else "item"
            row = int((~ready[kind]).nonzero()[0])
            raise ValueError(
                f"new {kind} in row {row} has no interaction that leads to a known user or item, so nothing can be said about "
                "it; supply a vector or leave it out."
            )
        for kind, (new, values) in found.items():
            vectors[kind][new] = values
            ready[kind] |= new
    return vectors["user"][known["user"] :], vectors["item"][known["item"] :]


def fold_in_history_tables(
    model: FISMModel, users: np.ndarray, items: np.ndarray, ages: np.ndarray, num_trained: int
) -> list[torch.Tensor]:
    """What new items say of their users: rows for the tables of a [`FISMModel`] that histories are made of.

    With p_{u-i} the vector of what u has had but i, among the items of the training, the features of an item are
    x_i = sum_u p_{u-i} / sqrt(d_i) over its d_i users, and its row is x_i W. W is the ridge regression of the rows of the items
    of the training on their features.

    Args:
        model: its `history_table`, and `recent_table` if there is one, are asked for.
        users: user row of each interaction, int64 `[n]`.
        items: item row of each interaction, int64 `[n]`; rows from `num_trained` on are newcomers.
        ages: number of items that its user has had since, int64 `[n]`.
        num_trained: number of items that the model was trained with.

    Returns:
        For each of these tables the rows of the newcomers, `[I', d]`, in row order, up to the largest row that is named.
    """
    user, item, age = (torch.from_numpy(np.asarray(one)) for one in (users, items, ages))
    trained = item < num_trained
    said = torch.zeros(len(item), model.config.embedding_dim)
    tables = [table for table in (model.history_table, model.recent_table) if table is not None]
    with torch.no_grad():
        said[trained] = model.summands(item[trained], age[trained])
        total = torch.zeros(int(user.max()) + 1, said.shape[1]).index_add_(0, user, said)
        others = F.normalize(total[user] - said, dim=-1)  # p_{u-i}, [n, d]
        count = torch.bincount(item, minlength=num_trained)
        features = torch.zeros(len(count), said.shape[1]).index_add_(0, item, others)
        features = features / count.clamp(min=1).sqrt()[:, None]
        known, new = features[:num_trained], features[num_trained:]
        return [new @ _ridge(known, table.weight[:num_trained], count[:num_trained]) for table in tables]


def align(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The rotation that brings vectors of a model trained anew into the space of the old one (orthogonal Procrustes).

    Lengths and angles, and with them scores, stay as they are.

    Args:
        old: vectors of the users and items that both models know, `[n, d]`.
        new: the same in the new model, in the same order, `[n, d]`.

    Returns:
        The orthogonal R `[d, d]` for which `new @ R` is closest to `old` (Schoenemann, 1966).
    """
    u, _, v = torch.linalg.svd(new.double().T @ old.double())
    return (u @ v).to(new.dtype)


def _calibrate(vectors, rows, ready) -> dict[str, torch.Tensor]:
    """W of users and of items `[d, d]`, from the interactions of known users with known items."""
    links = ready["user"][rows["user"]] & ready["item"][rows["item"]]
    pairs = {kind: rows[kind][links] for kind in rows}
    degree = {kind: torch.bincount(pairs[kind], minlength=len(vectors[kind])) for kind in rows}
    features = {
        kind: _propagate(vectors[other], pairs[kind], pairs[other], degree[kind], degree[other])
        for kind, other in (("user", "item"), ("item", "user"))
    }
    raw = {kind: _ridge(features[kind], vectors[kind], degree[kind]) for kind in rows}
    # What each link adds to a node's features by way of the node itself: 1 / (d_u d_i) of its own vector, mapped.
    share = 1 / (degree["user"][pairs["user"]] * degree["item"][pairs["item"]]).float()
    weights = {}
    for kind, other in (("user", "item"), ("item", "user")):
        own = torch.zeros(len(vectors[kind])).index_add_(0, pairs[kind], share)
        left = features[kind] - own[:, None] * (vectors[kind] @ raw[other])
        weights[kind] = _ridge(left, vectors[kind], degree[kind])
    return weights


def _propagate(source, mine, theirs, own_degree, their_degree) -> torch.Tensor:
    """sum of source / sqrt(d_own d_their) over the links of each node: `[number of nodes, d]`."""
    weight = (own_degree[mine] * their_degree[theirs]).float().rsqrt()
    return torch.zeros(len(own_degree), source.shape[1]).index_add_(0, mine, source[theirs] * weight[:, None])


def _ridge(features: torch.Tensor, targets: torch.Tensor, degree: torch.Tensor) -> torch.Tensor:
    """The ridge regression of `targets` `[n, d]` on `features` `[n, d]` of the nodes with interactions: `[d, d]`."""
    x, y = features[degree > 0].double(), targets[degree > 0].double()
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, x.T @ y).float()
