"""Training in the shape of MovieLens-20M.

138,000 users, 27,000 items and 20 million interactions, made up. Reading and splitting are the benchmark `preparation`.
FISM and T5 take 100 steps of their training; the other stages are whole.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, once, peak
from preparation import ratings

from tokenrec_hf import EmbeddingStore, FISMModel, Recipe, leave_one_out, load_interactions
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation.ranking import evaluate_vectors
from tokenrec_hf.repository.build import build_collator
from tokenrec_hf.training.closed_forms import smooth_tables
from tokenrec_hf.training.initialization import build_retrieval_model, build_tokenizer, start_from_singular_vectors
from tokenrec_hf.training.stages import train_collaborative, train_mq_tokenizer, train_retrieval

INTERACTIONS, STEPS = 20_000_000, 100
# The smoothing that follows the training is measured on its own.
CHANGES = {
    "collaborative.config.half_life": 8,
    "collaborative.config.history_smoothing": 0.0,
    "collaborative.config.item_smoothing": 0.0,
    "prompts.shuffle_history": False,
    "retrieval.most_steps": None,
    "retrieval.training.max_steps": STEPS,
}


def rows() -> list[Row]:
    """All stages, the ranking of all users, and the most memory."""
    data = index_splits(leave_one_out(load_interactions(ratings(INTERACTIONS))), "test")
    whole, recipe = Recipe.load("best"), Recipe.load("best", overrides=CHANGES)
    interactions, settings, found = data.interactions, recipe.collaborative, list[Row]()
    model = FISMModel.from_interactions(settings.model_configuration(), interactions)
    with once(found, "FISM: start from the singular vectors"):
        start_from_singular_vectors(model, interactions)
    with tempfile.TemporaryDirectory() as folder:
        epoch = np.count_nonzero(interactions.lengths > 1) / settings.training["per_device_train_batch_size"]
        with once(found, "FISM: a step", amount=STEPS, unit="ms"):
            train_collaborative(interactions, settings, Path(folder) / "fism", epochs=STEPS / epoch, start=model)
        found.append(Row(f"FISM: its {settings.most_steps:,} steps", found[-1].ours * settings.most_steps / 1000, "s"))
        for name in ("history_smoothing", "item_smoothing"):
            setattr(model.config, name, whole.collaborative.config[name])
        with once(found, "FISM: smoothing of the tables"):
            smooth_tables(model, interactions.users, interactions.items)
        store = EmbeddingStore(settings.config["embedding_dim"])
        with once(found, "vectors of users and items"):
            for kind, ids, vectors in (
                ("user", data.user_ids, model.user_embeddings()),
                ("item", data.item_ids, model.item_embeddings()),
            ):
                store.upsert(kind, ids, vectors)
        mqs = {}
        for kind in ("user", "item"):
            with once(found, f"codes of all {kind}s"):
                mqs[kind] = train_mq_tokenizer(store.vectors(kind), recipe.mq_tokenizer, Path(folder), kind=kind).model
        store.space_ids = {kind: mq.space_id for kind, mq in mqs.items()}
        tokenizer = build_tokenizer(
            user_mq=mqs["user"], item_mq=mqs["item"], store=store, model_max_length=recipe.prompts.max_length
        )
        t5 = build_retrieval_model(recipe.retrieval, tokenizer, mqs["user"], mqs["item"])
        t5.bind_items(store.vectors("item"), tokenizer.item_tokens(data.item_ids))
        with once(found, "T5: a step", amount=STEPS, unit="ms"):
            train_retrieval(t5, build_collator(tokenizer, data, recipe), recipe.retrieval, Path(folder) / "t5")
        most = whole.retrieval.most_steps
        found.append(Row(f"T5: its {most:,} steps", found[-1].ours * most / 1000, "s"))
    users = store.vectors("user")[torch.from_numpy(data.holdout.users)]
    with once(found, "full ranking of all users by vectors"):
        evaluate_vectors(users, store.vectors("item"), data)
    return [*found, Row("most memory", peak(), "GB", bar="≤ 12 GB")]
