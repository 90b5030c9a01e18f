"""Vectors of newcomers in the space of a collaborative model that stays as it is (section II-E2 of TokenRec).

*Fold-in* takes one step of LightGCN's propagation from the known vectors (He et al., 2020) and calibrates it, in closed
form, on the users and items whose vectors are known: milliseconds, no training, and any collaborative model may have made
the vectors. *Alignment* turns the vectors of a model that was trained anew back into the old space. Both leave the
MQ-Tokenizers and T5 valid. Rows and vectors only: knows nothing about ids or files.

With FISM, only items have rows, in two tables or three: what they are as recommendations and what they say of whoever has had
them. `fold_in_items` finds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..models.modeling_collaborative import FISMModel

# Of the mean eigenvalue of X^T X. On LastFM with a fifth of the users, or of the items, left out, 1e-4 to 3e-2 were alike.
RIDGE = 1e-2
# How much an item counts in a history that nothing known came after.
FAINT = 1e-3
# Interactions that are looked at at once.
CHUNK = 1 << 18


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


def fold_in_items(model: FISMModel, users: np.ndarray, items: np.ndarray, num_trained: int) -> list[torch.Tensor]:
    """Rows of new items in the tables of a [`FISMModel`], from the histories that they are in.

    People come to an item from what they had before it, and go on to what they have after it. With p_{u<i} the vector of what u
    had before i, x_i = sum_u p_{u<i} / sqrt(d_i) over the d_i users who had something before says where q_i is, and
    y_i = sum_u q_{u>i} / sqrt(d'_i), with q_{u>i} of length 1 along sum_j 2^(-n_j / half_life) q_j, j having come n_j items after i,
    says what i says of its users. So q_i is x_i W and the rows of the other tables are y_i W', ridge regressions of the rows of the
    items of the training on their features. An item that nothing known came after speaks of its users by what came before it, but
    so faintly that it is heard only by those who have nothing else. Without a `half_life`, both sides are the rest of the
    history.

    x_i W is shorter than 1 by what it does not know of the item, and its products with users are of the right size; by cosine
    it would be too large and the item recommended to too many. So q_i is made as long as the others in those directions in
    which users differ least.

    Args:
        model: its tables; rows of items from `num_trained` on are not looked at.
        users: user row of each interaction, sorted and each user's in time order, int64 `[n]`.
        items: item row of each interaction, int64 `[n]`; rows from `num_trained` on are newcomers.
        num_trained: number of items that the model was trained with.

    Returns:
        For each of `model.tables()` the rows of the newcomers, `[I', d]`, in row order, up to the largest row that is named; zeros
        where no chain of interactions leads to an item of the training.
    """
    user, item = (torch.from_numpy(np.asarray(one, dtype=np.int64)) for one in (users, items))
    count = max(num_trained, int(item.max()) + 1 if len(item) else 0)
    tables = []
    for _, module in model.tables():
        rows = module.weight.detach().cpu()[:num_trained]
        rows = F.normalize(rows, dim=-1) if module is model.item_table else rows
        tables.append(torch.cat([rows, rows.new_zeros(count - num_trained, rows.shape[1])]))
    maps: list[list[torch.Tensor]] = []
    basis = torch.empty(0)
    unknown = torch.arange(count) >= num_trained
    while unknown.any():
        features, known_of, gram = _features(model, tables, ~unknown, user, item)
        if not maps:
            maps = [
                [_ridge(x[:num_trained], table[:num_trained], n[:num_trained]) for x, n in zip(features, known_of)]
                for table in tables
            ]
            basis = torch.linalg.eigh(gram)[1]
            # Which of two opposite directions it returns is up to the library.
            basis = basis * basis.sum(dim=0).sign()
        reached = unknown & (known_of[0] + known_of[1] > 0)
        if not reached.any():
            break
        for number, (table, (_, module)) in enumerate(zip(tables, model.tables())):
            is_target = module is model.item_table
            best, other = (0, 1) if is_target else (1, 0)
            estimates = [x @ w for x, w in zip(features, maps[number])]
            instead = estimates[other] if is_target else FAINT * estimates[other]
            found = torch.where((known_of[best] > 0)[:, None], estimates[best], instead)[reached]
            table[reached] = _lengthened(found, basis) if is_target else found
        unknown &= ~reached
    return [table[num_trained:] for table in tables]


def smooth_tables(model: FISMModel, users: np.ndarray, items: np.ndarray) -> None:
    """Moves the rows of items some of the way to what is expected of items with such neighbours in the histories.

    With x_i and y_i as in [`fold_in_items`], z_i = (x_i, y_i) W'' is the ridge regression of a table's rows on both features. Rows
    become a mean of the trained one and z_i, in which z_i has the weight `history_smoothing` of the model's configuration, and
    `item_smoothing` in the table of q. Rows of rare items are trained from a few examples; the regression has
    seen all items.

    Args:
        model: changed in place.
        users: user row of each interaction, sorted and each user's in time order, int64 `[n]`: those of the training.
        items: item row of each interaction, int64 `[n]`.
    """
    user, item = (torch.from_numpy(np.asarray(one, dtype=np.int64)) for one in (users, items))
    tables = [
        F.normalize(module.weight.detach().cpu(), dim=-1)
        if module is model.item_table
        else module.weight.detach().cpu()
        for _, module in model.tables()
    ]
    everything = torch.ones(len(tables[0]), dtype=torch.bool)
    features, numbers, _ = _features(model, tables, everything, user, item)
    both = torch.cat(features, dim=1)  # [num_items, 2d]
    had = (numbers[0] + numbers[1]) > 0
    with torch.no_grad():
        for table, (_, module) in zip(tables, model.tables()):
            is_target = module is model.item_table
            share = model.config.item_smoothing if is_target else model.config.history_smoothing
            expected = both @ _ridge(both, table, had)
            module.weight.copy_(torch.where(had[:, None], torch.lerp(table, expected, share), table))


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


def _sides(model: FISMModel, tables, known, users, items) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes before each interaction, as p, and what comes after it, as a mean q: `[n, d]` each, of length 1 or 0.

    Items that are not `known` are passed over, as if they were not there.
    """
    config, inside = model.config, known[items]
    said, targets = tables[0], tables[1]
    if config.half_life is None:
        before, after = (_rests(table[items], users) for table in (said, targets))
    else:
        there = items[inside]
        before = _decayed_sums(said[there], users, inside, config.half_life)
        if model.recent_table is not None and config.recent_half_life is not None:
            before += _decayed_sums(tables[2][there], users, inside, config.recent_half_life)
        backwards = targets[there].flip(0), users.max() - users.flip(0), inside.flip(0)
        after = _decayed_sums(*backwards, config.half_life).flip(0)
    return F.normalize(before, dim=-1), F.normalize(after, dim=-1)


def _rests(rows: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """For each row the sum of the others of its user, `[n, d]`."""
    total = rows.new_zeros(int(users.max()) + 1, rows.shape[1]).index_add_(0, users, rows)
    rest = total[users] - rows
    # What rounding leaves of nothing is nothing.
    return rest * (rest.norm(dim=1, keepdim=True) > 1e-5 * total[users].norm(dim=1, keepdim=True))


def _decayed_sums(rows: torch.Tensor, users: torch.Tensor, inside: torch.Tensor, half_life: float) -> torch.Tensor:
    """For each interaction the sum of the rows before it, n of them ago counting 2^(-(n - 1) / half_life): `[n, d]`.

    Args:
        rows: of the interactions that are `inside`, in their order, `[m, d]`.
        users: of all interactions, ascending, `[n]`.
        inside: which interactions have a row, bool `[n]`.
        half_life: in rows.
    """
    owners = users[inside]
    places = torch.arange(len(owners)) - torch.searchsorted(owners, owners)
    # Of a row and those before it: of the last span of them, then of the last 2 * span.
    sums, span = rows.clone(), 1
    while len(later := (places >= span).nonzero().flatten()):
        sums.index_add_(0, later, sums[later - span], alpha=2 ** (-span / half_life))
        span *= 2
    latest = inside.long().cumsum(0) - inside.long() - 1
    result = rows.new_zeros(len(users), rows.shape[1])
    found = (latest >= 0).nonzero().flatten()
    found = found[owners[latest[found]] == users[found]]
    result[found] = sums[latest[found]]
    return result


def _features(
    model: FISMModel,
    tables: Sequence[torch.Tensor],
    known: torch.Tensor,
    users: torch.Tensor,
    items: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """What of the `known` items (bool `[num_items]`) comes before and after items.

    Returns:
        For both sides the sum over the interactions of each item, over the root of the number of those where there is anything on
        this side, `[num_items, d]`; these numbers, `[num_items]`; and the second moments `[d, d]` of what comes before.
    """
    count, width = tables[0].shape
    totals, numbers = (
        [torch.zeros(count, width) for _ in range(2)],
        [torch.zeros(count, dtype=torch.long) for _ in range(2)],
    )
    gram = torch.zeros(width, width)
    # Whole users, as many as make up a chunk.
    firsts = torch.searchsorted(users, users[::CHUNK].contiguous())
    bounds = [*firsts.unique().tolist(), len(users)]
    for start, end in zip(bounds, bounds[1:]):
        part = items[start:end]
        sides = _sides(model, tables, known, users[start:end] - users[start], part)
        gram += sides[0].T @ sides[0]
        for side, total, number in zip(sides, totals, numbers):
            total.index_add_(0, part, side)
            number += torch.bincount(part[(side != 0).any(dim=1)], minlength=count)
    return [total / number.clamp(min=1).sqrt()[:, None] for total, number in zip(totals, numbers)], numbers, gram


def _lengthened(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Vectors `[n, d]` of length 1 whose products with users are about those of the given ones.

    Args:
        vectors: longer ones stay as they are.
        basis: orthonormal columns `[d, d]`, those in which users differ least first.
    """
    # The mirror image, so that items that are alike stay alike: what is large where users differ most, where they differ least.
    mirrored = (vectors @ basis).flip(1) @ basis.T
    along = F.normalize(vectors, dim=-1)
    away = F.normalize(mirrored - (mirrored * along).sum(dim=1, keepdim=True) * along, dim=-1)
    return vectors + (1 - vectors.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt() * away


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
