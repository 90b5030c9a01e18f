"""Leave-one-out evaluation of a trained repository and of its baselines by full ranking (section III-A of TokenRec).

All items are ranked for every user, except the items of the user's training interactions. Equation 19 gives the scores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from ..data.splits import IndexedSplits
from ..models.codes import RepositoryFolder
from ..models.embedding_store import EmbeddingStore, Store
from ..models.modeling_collaborative import HistoryEncoder
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from ..models.prompts import HISTORY_TEMPLATES, PromptTemplate
from ..models.recommender import load_history_encoder
from ..models.tokenization_tokenrec import TokenRecTokenizer
from .baselines import ItemKNN, Popularity, evaluate_baseline
from .metrics import embedding_ranks, evaluate_embeddings, hit_rate
from .variants import BASELINES, VARIANTS

# The longest histories of the groups of `hit_rates_by_history`.
HISTORY_LENGTHS = (1, 2, 5, 10, 20, 50)


def evaluate_baselines(data: IndexedSplits, store: Store) -> dict[str, dict[str, float]]:
    """Metrics of popularity, of ItemKNN, and of the collaborative vectors, by dot product and by cosine.

    Args:
        data: the interactions of the training and the held-out items.
        store: the collaborative vectors of all its users and items.
    """
    users = store.get("user", [data.user_ids[row] for row in data.holdout.users])
    items = store.get("item", data.item_ids)
    found = (
        evaluate_baseline(Popularity(data.interactions), data),
        evaluate_baseline(ItemKNN(data.interactions), data),
        evaluate_vectors(users, items, data, cosine=False),
        evaluate_vectors(users, items, data),
    )
    return dict(zip(BASELINES, found, strict=True))


def evaluate_retrieval(
    folder: str | os.PathLike,
    data: IndexedSplits,
    prompts: Mapping[str, Any],
    variants: Sequence[str] = ("tokenrec",),
    store: Store | None = None,
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """Metrics of a trained recommender on the held-out items, by variant, computed on a GPU where there is one.

    Args:
        folder: a trained repository.
        data: the interactions of its training and the held-out items.
        prompts: the arguments that its recipe gives to the collator.
        variants: names of [`~variants.VARIANTS`]. Where prompts do not name the user and users are their histories (FISM),
            the user tokens are made of the history.
        store: the item vectors; by default the repository's own store.
        batch_size: prompts per forward pass.
    """
    store = store or EmbeddingStore.open(RepositoryFolder(folder).store)
    items = store.get("item", data.item_ids)
    found = retrieval_queries(folder, data, prompts, variants, batch_size)
    return {variant: evaluate_vectors(queries, items, data) for variant, queries in found.items()}


def evaluate_vectors(
    queries: torch.Tensor, items: torch.Tensor, data: IndexedSplits, cosine: bool = True
) -> dict[str, float]:
    """Metrics of queries `[U, d]` of the held-out users and vectors of all items `[num_items, d]`."""
    return evaluate_embeddings(
        queries,
        items,
        data.holdout.targets,
        *data.interactions.of_users(data.holdout.users),
        cosine=cosine,
        popularity=data.interactions.popularity(),
    )


def retrieval_queries(
    folder: str | os.PathLike,
    data: IndexedSplits,
    prompts: Mapping[str, Any],
    variants: Sequence[str] = ("tokenrec",),
    batch_size: int = 64,
) -> dict[str, torch.Tensor]:
    """Queries of the held-out users by variant, float32 `[U, query_dim]`; arguments as in [`evaluate_retrieval`]."""
    tokenizer, encoder = TokenRecTokenizer.from_pretrained(folder), load_history_encoder(folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = T5ForGenerativeRetrieval.from_pretrained(folder).to(device or "cpu")
    queries = {}
    # Last those that replace the users' codes.
    for variant in sorted(variants, key=lambda name: not VARIANTS[name].names_user):
        templates = VARIANTS[variant].templates
        if not VARIANTS[variant].names_user and encoder is not None:
            # As the recommender does: the history is the only thing that is used of the user.
            templates = HISTORY_TEMPLATES
            tokenizer.add_users(_vectors_of_histories(encoder, data))
        collator = evaluation_collator(tokenizer, data, prompts, templates)
        queries[variant] = encode_prompts(model, collator, data.holdout.users, batch_size, variant)
    return queries


def hit_rates_by_history(
    queries: Mapping[str, torch.Tensor], items: torch.Tensor, data: IndexedSplits
) -> dict[str, dict[str, float]]:
    """HR@20 of users with histories of similar length, by cosine.

    Args:
        queries: of the held-out users, float `[U, d]`, by name.
        items: their vectors, float `[num_items, d]`.
        data: the interactions of the training and the held-out items.

    Returns:
        For each range of lengths that has users, such as `"3-5"`: the number of `users`, and HR@20 by name.
    """
    users = data.holdout.users
    lengths, seen = data.interactions.lengths[users], data.interactions.of_users(users)
    ranks = {
        name: embedding_ranks(own, items, data.holdout.targets, *seen, cosine=True).numpy()
        for name, own in queries.items()
    }
    found = {}
    for low, high in zip((1, *(length + 1 for length in HISTORY_LENGTHS)), (*HISTORY_LENGTHS, math.inf)):
        members = (lengths >= low) & (lengths <= high)
        if members.any():
            label = f"from {low}" if high == math.inf else str(low) if low == high else f"{low}-{high}"
            found[label] = {"users": int(members.sum())} | {
                name: hit_rate(own[members], 20) for name, own in ranks.items()
            }
    return found


def evaluation_collator(
    tokenizer: TokenRecTokenizer, data: IndexedSplits, prompts: Mapping[str, Any], templates: Sequence[PromptTemplate]
) -> DataCollatorForGenerativeRetrieval:
    """The collator of an evaluation: prompts with whole histories, in these wordings."""
    return DataCollatorForGenerativeRetrieval(
        tokenizer,
        data.interactions,
        data.user_ids,
        data.item_ids,
        evaluation_templates=templates,
        **prompts,
    )


def _vectors_of_histories(encoder: HistoryEncoder, data: IndexedSplits) -> dict[str, torch.Tensor]:
    """Vectors of the users' training histories, by user id; users without a known item are left out."""
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
    # Histories of similar length share a batch, so that batches carry little padding.
    order = np.argsort(collator.interactions.lengths[users], kind="stable")
    examples = PromptDataset(users[order], np.zeros(len(users), dtype=np.int64))
    queries = torch.empty(len(users), model.config.query_dim)
    for start in tqdm(range(0, len(users), batch_size), desc=name, unit="batch", leave=False):
        batch = collator([examples[row] for row in range(start, min(start + batch_size, len(users)))])
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        queries[torch.from_numpy(order[start : start + batch_size])] = model.encode_queries(**inputs).float().cpu()
    return queries
