"""Recommending to one user and to all users, with the sizes of recipe `best`.

The weights, the codes and the histories are random, which does not change the time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, compare

from tokenrec_hf import EmbeddingStore, MQTokenizerConfig, MQTokenizerModel, Recipe, Recommender
from tokenrec_hf.repository.export import export_recommendations
from tokenrec_hf.training.initialization import build_retrieval_model, build_tokenizer, retrieval_store

DIM, NUM_USERS, NUM_ITEMS = 128, 2_000, 12_000
# Number and size.
CODEBOOKS = {"user": (32, 512), "item": (4, 4096)}


def rows() -> list[Row]:
    """A request of one user in a process that has answered before, and a file for all users."""
    return [row for history in (10, 31, 100) for row in recommending(history)]


def recommending(history: int) -> list[Row]:
    """The rows of users with as many items."""
    recommender = untrained(history)
    user = recommender.store.ids("user")[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.parquet"
        return [
            compare(
                f"recommend, a user with {history} items",
                lambda: recommender.recommend([user]),
                bar="≤ 7 ms" if history == 31 else "",
            ),
            compare(
                f"recommend --all-users, a user with {history} items",
                lambda: export_recommendations(recommender, path),
                amount=NUM_USERS,
                turns=3,
                # 100,000 users a minute on two cores.
                bar="≤ 1.2 ms" if history <= 31 else "",
            ),
        ]


def untrained(history: int, **sizes: int) -> Recommender:
    """A recommender whose users have seen `history` items each; `sizes` of T5 replace those of recipe `best`."""
    random, store = np.random.default_rng(0), EmbeddingStore(DIM)
    items = [f"i{row}" for row in range(NUM_ITEMS)]
    for kind, ids in (("user", [f"u{row}" for row in range(NUM_USERS)]), ("item", items)):
        store.upsert(kind, ids, torch.from_numpy(random.standard_normal((len(ids), DIM), dtype=np.float32)))
    mqs = {
        kind: MQTokenizerModel(
            MQTokenizerConfig(embedding_dim=DIM, num_codebooks=count, codebook_size=size, residual=True)
        )
        for kind, (count, size) in CODEBOOKS.items()
    }
    store.space_ids = {kind: mq.space_id for kind, mq in mqs.items()}
    recipe = Recipe.load("best")
    recipe = recipe.changed(**{"retrieval.config": {**recipe.retrieval.config, **sizes}})
    tokenizer = build_tokenizer(
        user_mq=mqs["user"], item_mq=mqs["item"], store=store, model_max_length=recipe.prompts.max_length
    )
    model = build_retrieval_model(recipe.retrieval, tokenizer, mqs["user"], mqs["item"]).eval()
    model.config.history_weight = 0.5
    final = retrieval_store(store, model, tokenizer)
    seen = [[items[row] for row in random.choice(NUM_ITEMS, history, replace=False)] for _ in range(NUM_USERS)]
    final.set_seen(store.ids("user"), seen)
    return Recommender(model, tokenizer, final)
