"""Vectors in the space of a trained collaborative model, in closed form (section II-E2 of TokenRec).

*Fold-in* gives cold-start users and items vectors: one step of LightGCN's propagation from the known vectors (He et al., 2020),
calibrated by ridge regression on the users and items with known vectors. It takes milliseconds and works for any collaborative
model. With FISM, whose items have rows in two or three tables, `fold_in_items` finds these rows and `smooth_tables` improves
those of rare items. *Alignment* rotates the vectors of a retrained model back into the old space. All leave MQ-Tokenizers and
T5 valid. Rows and vectors only, no ids and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..models.modeling_collaborative import FISMModel

# By kind, `"user"` or `"item"`, and the two sides of each interaction.
Tensors = dict[str, torch.Tensor]
SIDES = (("user", "item"), ("item", "user"))

# Of the mean eigenvalue of X^T X. On LastFM with a fifth of the users, or of the items, left out, 1e-4 to 3e-2 were alike.
RIDGE = 1e-2
# The power of its length that the predicted part of a cold-start item's vector gets. Chosen on the validation items
# of Beauty, LastFM and MovieLens-100K: with 1, cold-start items are found too rarely on Beauty; below .5, they
# displace too many others on MovieLens-100K (`examples/paper/new_items.py`).
PREDICTED_LENGTH = 0.5
# Weight in a history of an item that no known item came after.
FAINT = 1e-3
# Interactions of a chunk: few enough that their vectors stay in the cache.
CHUNK = 1 << 13


class UnreachedError(ValueError):
    """A cold-start user or item without a chain of interactions to a known one.

    Args:
        kind: `"user"` or `"item"`.
        row: its row.
    """

    def __init__(self, kind: str, row: int):
        super().__init__(
            f"the cold-start {kind} in row {row} has no interaction that leads to a known user or item; supply a vector or "
            "leave it out."
        )
        self.kind, self.row = kind, row


def fold_in(
    user_vectors: torch.Tensor, item_vectors: torch.Tensor, users: np.ndarray, items: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of cold-start users and items from their interactions.

    With d_u and d_i the numbers of interactions, the features of a user are x_u = sum_i q_i / sqrt(d_u d_i) over the items of
    u, and its vector is x_u W. W is the ridge regression of the known users' vectors on their features. The contribution of
    the user itself to q_i is subtracted from these features first, because a cold-start user has not contributed to q_i.
    Items likewise.

    Args:
        user_vectors: p of the known users, `[U, d]`.
        item_vectors: q of the known items, `[I, d]`.
        users: user row of each interaction, int64 `[n]`; rows from U on are cold-start users.
        items: item row of each interaction, int64 `[n]`; rows from I on are cold-start items.

    Returns:
        Vectors of the cold-start users `[U', d]` and items `[I', d]`, in row order, up to the largest row in the interactions.

    Raises:
        UnreachedError: no chain of interactions leads from a cold-start user or item to a known user or item.
    """
    known = {"user": len(user_vectors), "item": len(item_vectors)}
    rows = {"user": torch.from_numpy(np.asarray(users)), "item": torch.from_numpy(np.asarray(items))}
    vectors = {}
    for kind, start in (("user", user_vectors), ("item", item_vectors)):
        count = max(known[kind], int(rows[kind].max()) + 1 if len(rows[kind]) else 0)
        vectors[kind] = torch.cat([start.float(), torch.zeros(count - known[kind], start.shape[1])])
    ready = {kind: torch.arange(len(vectors[kind])) < count for kind, count in known.items()}
    weights = _calibrate(vectors, rows, ready)
    while not all(flags.all() for flags in ready.values()):
        links = ready["user"][rows["user"]] & ready["item"][rows["item"]]
        degree = {kind: torch.bincount(rows[kind][links], minlength=len(vectors[kind])) for kind in rows}
        found = {}
        for kind, other in SIDES:
            # Interactions of cold-start rows with rows that have a vector already.
            usable = ~ready[kind][rows[kind]] & ready[other][rows[other]]
            mine, theirs = rows[kind][usable], rows[other][usable]
            own = torch.bincount(mine, minlength=len(vectors[kind]))
            features = _propagate(vectors[other], mine, theirs, own, degree[other].clamp(min=1))
            new = own > 0
            found[kind] = new, features[new] @ weights[kind]
        if not any(new.any() for new, _ in found.values()):
            kind = "user" if not ready["user"].all() else "item"
            raise UnreachedError(kind, int((~ready[kind]).nonzero()[0]))
        for kind, (new, values) in found.items():
            vectors[kind][new] = values
            ready[kind] |= new
    return vectors["user"][known["user"] :], vectors["item"][known["item"] :]


def fold_in_items(model: FISMModel, users: np.ndarray, items: np.ndarray, num_trained: int) -> list[torch.Tensor]:
    """Rows of cold-start items in the tables of a [`FISMModel`], from the histories with them.

    Users come to an item from the items before it and go on to the items after it. With p_{u<i} the vector of the history of u
    before i, x_i = sum_u p_{u<i} / sqrt(d_i) over the d_i users with such a history predicts q_i. With q_{u>i} of length 1
    along sum_j 2^(-n_j / half_life) q_j, where j came n_j items after i, y_i = sum_u q_{u>i} / sqrt(d'_i) predicts the rows of
    the other tables. So q_i is x_i W and the other rows are y_i W', where W and W' are the ridge regressions of the trained
    items' rows on their features. An item that no known item came after gets its other rows from x_i, with weight `FAINT`, so
    that it matters only in histories without any other item. Without a `half_life`, both sides are the rest of the history.

    x_i W is shorter than 1, by the part of q_i that it does not predict. As it is, too few users would be near to it, and divided
    by its length r too many. So it gets the length r^`PREDICTED_LENGTH`, and q_i length 1 in the directions in which users
    differ least.

    Args:
        model: its tables; rows of items from `num_trained` on are ignored.
        users: user row of each interaction, sorted and each user's in time order, int64 `[n]`.
        items: item row of each interaction, int64 `[n]`; rows from `num_trained` on are cold-start items.
        num_trained: number of items of the training.

    Returns:
        For each of `model.tables()` the rows of the cold-start items, `[I', d]`, in row order, up to the largest row in the
        interactions; zeros where no chain of interactions leads to an item of the training.
    """
    user, item = (torch.from_numpy(np.asarray(one, dtype=np.int64)) for one in (users, items))
    count = max(num_trained, int(item.max()) + 1 if len(item) else 0)
    tables = [F.pad(rows[:num_trained], (0, 0, 0, count - num_trained)) for rows in _rows(model)]
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
            # The sign of an eigenvector is arbitrary and differs between libraries.
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
            if is_target:
                length = found.norm(dim=1, keepdim=True).clamp(min=1e-12)
                found = _lengthened(found * length ** (PREDICTED_LENGTH - 1), basis)
            table[reached] = found
        unknown &= ~reached
    return [table[num_trained:] for table in tables]


def smooth_tables(model: FISMModel, users: np.ndarray, items: np.ndarray) -> bool:
    """Moves the rows of items towards their prediction from the neighbours in the histories.

    With x_i and y_i as in [`fold_in_items`], z_i = (x_i, y_i) W'' is the ridge regression of a table's rows on both features.
    A row becomes the weighted mean of itself and z_i; the weight of z_i is `history_smoothing` of the model's configuration,
    or `item_smoothing` in the table of q. Rows of rare items are trained from a few examples; the regression uses all items.

    Args:
        model: changed in place.
        users: user row of each interaction, sorted and each user's in time order, int64 `[n]`; training only.
        items: item row of each interaction, int64 `[n]`.

    Returns:
        Whether the tables changed: False where both weights are 0.
    """
    if not (model.config.history_smoothing or model.config.item_smoothing):
        return False
    user, item = (torch.from_numpy(np.asarray(one, dtype=np.int64)) for one in (users, items))
    tables = _rows(model)
    features, numbers, _ = _features(model, tables, torch.ones(len(tables[0]), dtype=torch.bool), user, item)
    both = torch.cat([*features], dim=1)  # [num_items, 2d]
    had = (numbers[0] + numbers[1]) > 0
    with torch.no_grad():
        for table, (_, module) in zip(tables, model.tables()):
            is_target = module is model.item_table
            share = model.config.item_smoothing if is_target else model.config.history_smoothing
            expected = both @ _ridge(both, table, had)
            module.weight.copy_(torch.where(had[:, None], torch.lerp(table, expected, share), table))
    return True


def align(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The rotation from the space of a retrained model into that of the old model (orthogonal Procrustes).

    Lengths and angles, and with them scores, do not change.

    Args:
        old: vectors of the users and items of both models, `[n, d]`.
        new: the same in the new model, in the same order, `[n, d]`.

    Returns:
        The orthogonal R `[d, d]` for which `new @ R` is closest to `old` (Schoenemann, 1966).
    """
    u, _, v = torch.linalg.svd(new.double().T @ old.double())
    return (u @ v).to(new.dtype)


def _rows(model: FISMModel) -> list[torch.Tensor]:
    """The rows of `model.tables()`; q has length 1."""
    tables = ((module is model.item_table, module.weight.detach().cpu()) for _, module in model.tables())
    return [F.normalize(rows, dim=-1) if is_target else rows for is_target, rows in tables]


def _sides(
    model: FISMModel, tables: Sequence[torch.Tensor], known: torch.Tensor, users: torch.Tensor, items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The history before each interaction, as p, and the items after it, as a mean q: `[n, d]` each, of length 1 or 0.

    Items that are not `known` are skipped.
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
    # A user with one item has no rest; rounding errors must not become one.
    return rest * (rest.norm(dim=1, keepdim=True) > 1e-5 * total[users].norm(dim=1, keepdim=True))


def _decayed_sums(rows: torch.Tensor, users: torch.Tensor, inside: torch.Tensor, half_life: float) -> torch.Tensor:
    """For each interaction the sum of the rows before it, the n-th last with weight 2^(-(n - 1) / half_life): `[n, d]`.

    `rows` `[m, d]` are those of the interactions that are `inside` (bool `[n]`); `users` `[n]` are ascending.
    """
    owners = users[inside]
    places = torch.arange(len(owners)) - torch.searchsorted(owners, owners)
    # Sums over the last `span` rows, doubled until they reach the first one.
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The features x_i and y_i of [`fold_in_items`] of all items, from the `known` items (bool `[num_items]`).

    Returns:
        x and y, `[2, num_items, d]`; the number of an item's interactions with something on these sides, `[2, num_items]`; and
        the second moments `[d, d]` of the vectors of the histories before the interactions.
    """
    count, width = tables[0].shape
    totals, numbers = torch.zeros(2, count, width), torch.zeros(2, count, dtype=torch.long)
    gram = torch.zeros(width, width)
    # Chunks end between users.
    firsts = torch.searchsorted(users, users[::CHUNK].contiguous())
    bounds = [*firsts.unique().tolist(), len(users)]
    for start, end in zip(bounds, bounds[1:]):
        part = items[start:end]
        sides = _sides(model, tables, known, users[start:end] - users[start], part)
        gram += sides[0].T @ sides[0]
        for side, total, number in zip(sides, totals, numbers):
            total.index_add_(0, part, side)
            number += torch.bincount(part[(side != 0).any(dim=1)], minlength=count)
    return totals / numbers.clamp(min=1).sqrt()[..., None], numbers, gram


def _lengthened(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Vectors `[n, d]` of length 1, or longer ones unchanged, with about the same products with users.

    The columns of the orthonormal `basis` `[d, d]` are sorted by how much users differ along them, ascending.
    """
    # The mirror image moves the large coordinates to the directions in which users differ least; similar items stay similar.
    mirrored = (vectors @ basis).flip(1) @ basis.T
    along = F.normalize(vectors, dim=-1)
    away = F.normalize(mirrored - (mirrored * along).sum(dim=1, keepdim=True) * along, dim=-1)
    return vectors + (1 - vectors.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt() * away


def _calibrate(vectors: Tensors, rows: Tensors, ready: Tensors) -> Tensors:
    """W of users and of items `[d, d]`, from the interactions of known users with known items."""
    links = ready["user"][rows["user"]] & ready["item"][rows["item"]]
    pairs = {kind: rows[kind][links] for kind in rows}
    degree = {kind: torch.bincount(pairs[kind], minlength=len(vectors[kind])) for kind in rows}
    features = {
        kind: _propagate(vectors[other], pairs[kind], pairs[other], degree[kind], degree[other])
        for kind, other in SIDES
    }
    raw = {kind: _ridge(features[kind], vectors[kind], degree[kind]) for kind in rows}
    # The contribution of each link to a node's features through the node itself: 1 / (d_u d_i) of its own vector, mapped.
    share = 1 / (degree["user"][pairs["user"]] * degree["item"][pairs["item"]]).float()
    weights = {}
    for kind, other in SIDES:
        own = torch.zeros(len(vectors[kind])).index_add_(0, pairs[kind], share)
        left = features[kind] - own[:, None] * (vectors[kind] @ raw[other])
        weights[kind] = _ridge(left, vectors[kind], degree[kind])
    return weights


def _propagate(
    source: torch.Tensor,
    mine: torch.Tensor,
    theirs: torch.Tensor,
    own_degree: torch.Tensor,
    their_degree: torch.Tensor,
) -> torch.Tensor:
    """sum of source / sqrt(d_own d_their) over the links of each node: `[number of nodes, d]`."""
    weight = (own_degree[mine] * their_degree[theirs]).float().rsqrt()
    return torch.zeros(len(own_degree), source.shape[1]).index_add_(0, mine, source[theirs] * weight[:, None])


def _ridge(features: torch.Tensor, targets: torch.Tensor, degree: torch.Tensor) -> torch.Tensor:
    """The ridge regression of `targets` `[n, d]` on `features` `[n, d]` of the nodes with interactions: `[d, d]`."""
    x, y = features[degree > 0].double(), targets[degree > 0].double()
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, x.T @ y).float()
