"""Evaluation of a trained repository and of the baselines beside it: leave-one-out, full ranking (section III-A of TokenRec).

Every item of the catalogue is ranked for every user; the items that the model was trained on for this user are left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import HistoryEncoder
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from ..models.prompts import (
    HISTORY_ONLY_TEMPLATE,
    HISTORY_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    PromptTemplate,
)
from ..models.recommender import RepositoryFolder
from ..models.tokenization_tokenrec import TokenRecTokenizer
from .metrics import RankingMetrics, evaluate_embeddings

TEMPLATES = {
    "tokenrec": HISTORY_TEMPLATES,
    "tokenrec_user_id_only": USER_ONLY_TEMPLATES,
    "tokenrec_unseen_prompt": (UNSEEN_TEMPLATE,),
    "tokenrec_history_only": (HISTORY_ONLY_TEMPLATE,),
}


def evaluate_baselines(data, store: EmbeddingStore) -> dict[str, dict[str, float]]:
    """Popularity and the collaborative model itself, by dot product and by cosine.

    Args:
        data: an [`IndexedSplits`].
        store: holds the collaborative vectors of all its users and items.
    """
    holdout, popularity = data.holdout, data.interactions.popularity()
    indptr, seen = data.interactions.of_users(holdout.users)
    counts = RankingMetrics(len(data.item_ids), popularity=popularity)
    for start in range(0, len(holdout.users), 512):
        end = min(start + 512, len(holdout.users))
        rows = np.repeat(np.arange(end - start), np.diff(indptr[start : end + 1]))
        scores = torch.from_numpy(popularity).float().repeat(end - start, 1)
        counts.update(scores, holdout.targets[start:end], (rows, seen[indptr[start] : indptr[end]]))
    users = store.get("user", [data.user_ids[row] for row in holdout.users])
    items = store.get("item", data.item_ids)
    return {"popularity": counts.compute()} | {
        name: evaluate_embeddings(users, items, holdout.targets, indptr, seen, cosine=cosine, popularity=popularity)
        for name, cosine in (("collaborative", False), ("collaborative_cosine", True))
    }


def evaluate_retrieval(
    folder: str | os.PathLike,
    data,
    recipe: Mapping[str, Any],
    variant: str = "tokenrec",
    store: EmbeddingStore | None = None,
) -> dict[str, float]:
    """The trained recommender of `folder` on held-out items, on a GPU where there is one.

    Args:
        folder: a trained repository.
        data: an [`IndexedSplits`] of the interactions it was trained on and of the items to look for.
        recipe: its recipe.
        variant: `tokenrec` (user id and history), `tokenrec_user_id_only`, `tokenrec_unseen_prompt` or
            `tokenrec_history_only` (nothing is known but the history: with FISM, user tokens are made of it, otherwise the
            prompt names no user).
        store: where the item vectors come from; by default the repository's own store.
    """
    folder = Path(folder)
    tokenizer = TokenRecTokenizer.from_pretrained(folder)
    store = store or EmbeddingStore.open(folder / "store")
    templates = TEMPLATES[variant]
    encoder = RepositoryFolder(folder).load_history_encoder() if variant == "tokenrec_history_only" else None
    if encoder is not None:
        # As the recommender does: nothing of the user is used but the history.
        templates = HISTORY_TEMPLATES
        tokenizer.add_users(_vectors_of_histories(encoder, data))
    collator = evaluation_collator(tokenizer, data, recipe, templates)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = T5ForGenerativeRetrieval.from_pretrained(folder).to(device or "cpu")
    batch_size = recipe["retrieval"]["training"]["per_device_eval_batch_size"]
    queries = encode_prompts(model, collator, data.holdout.users, batch_size, variant)
    return evaluate_embeddings(
        queries,
        store.get("item", data.item_ids),
        data.holdout.targets,
        *data.interactions.of_users(data.holdout.users),
        cosine=True,
        popularity=data.interactions.popularity(),
    )


def evaluation_collator(
    tokenizer: TokenRecTokenizer, data, recipe: Mapping[str, Any], templates: Sequence[PromptTemplate]
) -> DataCollatorForGenerativeRetrieval:
    """Makes the prompts that a repository is evaluated with: whole histories, in these wordings."""
    return DataCollatorForGenerativeRetrieval(
        tokenizer,
        data.interactions,
        data.user_ids,
        data.item_ids,
        evaluation_templates=templates,
        seed=recipe["seed"],
        **recipe["prompts"],
    )


def _vectors_of_histories(encoder: HistoryEncoder, data) -> dict[str, torch.Tensor]:
    """What the encoder makes of each user's interactions, by user id, where it knows any of the items."""
    indptr, items = data.interactions.indptr, np.array(data.item_ids, dtype=object)[data.interactions.items]
    vectors, known = encoder.encode([items[start:end].tolist() for start, end in zip(indptr, indptr[1:])])
    return {user: vector for user, vector, useful in zip(data.user_ids, vectors, known) if useful}


@torch.inference_mode()
def encode_prompts(
    model: T5ForGenerativeRetrieval,
    collator: DataCollatorForGenerativeRetrieval,
    users: np.ndarray,
    batch_size: int = 64,
    name: str = "evaluation",
) -> torch.Tensor:
    """Queries z of users with their whole histories, float32 `[n, d]` on the CPU, in the order of `users`."""
    model.eval()
    # Users with like histories together, so that batches carry little padding.
    order = np.argsort(collator.interactions.lengths[users], kind="stable")
    examples = PromptDataset(users[order], np.zeros(len(users), dtype=np.int64))
    queries = torch.empty(len(users), model.config.embedding_dim)
    for start in tqdm(range(0, len(users), batch_size), desc=name, unit="batch", leave=False):
        batch = collator([examples[row] for row in range(start, min(start + batch_size, len(users)))])
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        queries[torch.from_numpy(order[start : start + batch_size])] = model.encode_queries(**inputs).float().cpu()
    return queries
