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
from .metrics import embedding_hits, evaluate_embeddings, hit_rate
from .variants import BASELINES, VARIANTS

# The upper ends of the ranges of `hit_rates_by_size`.
SIZES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def evaluate_baselines(data: IndexedSplits, store: Store) -> dict[str, dict[str, float]]:
    """Metrics of popularity, of ItemKNN, and of the collaborative vectors, by dot product and by cosine.

    Args:
        data: the interactions of the training and the held-out items.
        store: the collaborative vectors of all its users and items.
    """
    users = store.get("user", [data.user_ids[row] for row in data.holdout.users])
    items = store.get("item", data.item_ids)
    found = (
        evaluate_baseline(Popularity(data.interactions), data.interactions, data.holdout),
        evaluate_baseline(ItemKNN(data.interactions), data.interactions, data.holdout),
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


def hit_rates_by_size(ranks: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, dict[str, float]]:
    """HR@20 of users with histories of similar length, or with held-out items of similar popularity.

    Args:
        ranks: of the held-out items, int `[U]` from 0, by name.
        sizes: a count for each of the users, int `[U]`.

    Returns:
        For each range of sizes that has users, such as `"3-5"`: the number of `users`, and HR@20 by name.
    """
    found = {}
    for low, high in zip((0, *(size + 1 for size in SIZES)), (*SIZES, math.inf)):
        members = (sizes >= low) & (sizes <= high)
        if members.any():
            label = f"from {low}" if high == math.inf else str(low) if low == high else f"{low}-{high}"
            found[label] = {"users": int(members.sum())} | {
                name: hit_rate(own[members], 20) for name, own in ranks.items()
            }
    return found


def calibration(queries: torch.Tensor, items: torch.Tensor, data: IndexedSplits) -> list[dict[str, float]]:
    """How often a recommended item is the held-out one, by its cosine: tenths of the first 20 items of all users.

    Args:
        queries: of the held-out users, float `[U, d]`.
        items: their vectors, float `[num_items, d]`.
        data: the interactions of the training and the held-out items.

    Returns:
        For each tenth, lowest cosines first: the `low` and the `high` end of its cosines, and the `hit_rate`.
    """
    seen = data.interactions.of_users(data.holdout.users)
    cosines, hits = embedding_hits(queries, items, data.holdout.targets, *seen, k=min(20, len(items)))
    order = cosines.flatten().argsort(stable=True)
    # A user with few unseen items has fewer than 20.
    order = order[cosines.flatten()[order].isfinite()]
    tenths = zip(*(one.flatten()[order].tensor_split(10) for one in (cosines, hits.float())))
    return [
        {"low": float(own[0]), "high": float(own[-1]), "hit_rate": float(hit.mean())} for own, hit in tenths if len(own)
    ]


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
