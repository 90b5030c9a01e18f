"""From a table of interactions to integer rows, in the shape of MovieLens-20M."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from measure import Row, once, peak

from tokenrec_hf import EmbeddingStore, leave_one_out, load_interactions
from tokenrec_hf.data.splits import index_splits

ROWS = 20_000_000


def rows() -> list[Row]:
    """The time of each step for an interaction, and the memory of the indexed interactions."""
    return prepared(ROWS)[0]


def prepared(count: int) -> tuple[list[Row], object, object]:
    """The rows, the splits and the indexed splits of so many made-up ratings."""
    found: list[Row] = []
    table = ratings(count)
    before = peak()
    each = {"amount": count, "unit": "µs"}
    with once(found, "read and clean, an interaction", **each):
        interactions = load_interactions(table)
    with once(found, "leave one out, an interaction", **each):
        splits = leave_one_out(interactions)
    with once(found, "index, an interaction", bar="≤ 1 µs", **each):
        data = index_splits(splits, "test")
    size = (data.interactions.users.nbytes + data.interactions.items.nbytes) / len(data.interactions)
    found.append(Row("memory of the rows", size, "bytes an interaction", bar="≤ 16 bytes"))
    store = EmbeddingStore(1)
    for kind, ids in (("user", data.user_ids), ("item", data.item_ids)):
        store.upsert(kind, ids, torch.zeros(len(ids), 1))
    indptr = data.interactions.indptr
    with once(found, "seen items of the store, an interaction", bar="≤ 1 µs", **each):
        names = np.array(data.item_ids, dtype=object)[data.interactions.items]
        store.set_seen(data.user_ids, [names[start:end] for start, end in zip(indptr, indptr[1:])])
    found.append(Row(f"most memory of all steps, {count:,} interactions", peak() - before, "GB beside the table"))
    return found, splits, data


def ratings(count: int) -> Dataset:
    """Made-up ratings with MovieLens-20M's numbers: 145 a user, 741 an item, both skewed; repetitions are dropped later."""
    random = np.random.default_rng(0)
    activity = random.lognormal(0, 1, max(1, count // 145))
    users = random.choice(len(activity), count, p=activity / activity.sum())
    items = (max(20, count // 741) * random.random(count) ** 2).astype(np.int64)
    columns = {"user_id": users, "item_id": items, "timestamp": random.integers(10**9, size=count)}
    return Dataset(pa.table(columns))
