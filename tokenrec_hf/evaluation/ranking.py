"""Leave-one-out evaluation of a trained repository and of its baselines by full ranking (section III-A of TokenRec).

All items are ranked for every user, except the items of the user's training interactions. Equation 19 gives the scores.
"""

from __future__ import annotations

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
from .metrics import evaluate_embeddings
from .variants import BASELINES, VARIANTS


def evaluate_baselines(data: IndexedSplits, store: Store) -> dict[str, dict[str, float]]:
    """Metrics of popularity and of the collaborative vectors, by dot product and by cosine.

    Args:
        data: the interactions of the training and the held-out items.
        store: the collaborative vectors of all its users and items.
    """
    holdout, popularity = data.holdout, data.interactions.popularity()
    indptr, seen = data.interactions.of_users(holdout.users)
    users = store.get("user", [data.user_ids[row] for row in holdout.users])
    items = store.get("item", data.item_ids)
    # Popularity as a dot product: the vector of every user is [1].
    alike, counts = torch.ones(len(users), 1), torch.from_numpy(popularity).float()[:, None]
    found = [
        evaluate_embeddings(*vectors, holdout.targets, indptr, seen, cosine=cosine, popularity=popularity)
        for vectors, cosine in (((alike, counts), False), ((users, items), False), ((users, items), True))
    ]
    return dict(zip(BASELINES, found, strict=True))


def evaluate_retrieval(
    folder: str | os.PathLike,
    data: IndexedSplits,
    prompts: Mapping[str, Any],
    variant: str = "tokenrec",
    store: Store | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Metrics of a trained recommender on the held-out items, computed on a GPU where there is one.

    Args:
        folder: a trained repository.
        data: the interactions of its training and the held-out items.
        prompts: the arguments that its recipe gives to the collator.
        variant: a name of [`~variants.VARIANTS`]. Where prompts do not name the user and users are their histories (FISM),
            the user tokens are made of the history.
        store: the item vectors; by default the repository's own store.
        batch_size: prompts per forward pass.
    """
    parts, tokenizer = RepositoryFolder(folder), TokenRecTokenizer.from_pretrained(folder)
    store = store or EmbeddingStore.open(parts.store)
    chosen = VARIANTS[variant]
    templates = chosen.templates
    if not chosen.names_user and (encoder := load_history_encoder(folder)) is not None:
        # As the recommender does: the history is the only thing that is used of the user.
        templates = HISTORY_TEMPLATES
        tokenizer.add_users(_vectors_of_histories(encoder, data))
    collator = evaluation_collator(tokenizer, data, prompts, templates)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = T5ForGenerativeRetrieval.from_pretrained(folder).to(device or "cpu")
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
