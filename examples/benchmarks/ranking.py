"""Full ranking, beside a loop over users and by prompts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measure import Row, compare
from tokens import HISTORY, NUM_ITEMS, NUM_USERS, histories, tokenizers

from tokenrec_hf import MQTokenizerConfig, MQTokenizerModel
from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.evaluation.ranking import encode_prompts
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES, USER_ONLY_TEMPLATES, PromptTemplate
from tokenrec_hf.training.initialization import build_retrieval_model
from tokenrec_hf.training.recipe import Recipe

DIM, TOP_KS = 64, (10, 20, 30)


def rows() -> list[Row]:
    """Metrics of vectors, and queries of prompts with and without a history of 100 items."""
    batched, looped, sorting = evaluations()
    expected = batched()
    for results in (looped(), sorting()):
        if any(not math.isclose(expected[name], value, abs_tol=1e-9) for name, value in results.items()):
            raise SystemExit("the evaluations do not agree.")
    what = f"metrics of a user by vectors, {NUM_ITEMS:,} items"
    options: dict[str, Any] = {"amount": NUM_USERS, "turns": 3}
    return [
        compare(what, batched, "loop with a dictionary and a heap", looped, **options),
        compare(what, batched, "loop with numpy.argsort", sorting, **options),
        compare(f"query of a user with {HISTORY} items", encoder(HISTORY_TEMPLATES), bar="≤ 4 ms", **options),
        compare("query of a user by user id", encoder(USER_ONLY_TEMPLATES), bar="≤ 0.7 ms", **options),
    ]


def encoder(templates: Sequence[PromptTemplate], history: int = HISTORY) -> Callable[[], torch.Tensor]:
    """A function that makes the queries of all users, by the model of recipe `best`, untrained."""
    tokenizer, _ = tokenizers()
    config = MQTokenizerConfig(embedding_dim=DIM, num_codebooks=3, codebook_size=256, residual=True)
    mqs = [MQTokenizerModel(config) for _ in range(2)]
    model = build_retrieval_model(Recipe.load("best").retrieval, tokenizer, *mqs)
    users, items = np.repeat(np.arange(NUM_USERS), history), histories()[:, :history].ravel()
    collator = DataCollatorForGenerativeRetrieval(
        tokenizer,
        InteractionMatrix(users, items, NUM_USERS, NUM_ITEMS),
        tokenizer.ids("user"),
        tokenizer.ids("item"),
        evaluation_templates=templates,
        max_length=768,
        shuffle_history=False,
    )
    return lambda: encode_prompts(model, collator, np.arange(NUM_USERS))


def evaluations() -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Three functions with the same result: batched, and user by user in two styles common in research code."""
    random = np.random.default_rng(0)
    users = random.standard_normal((NUM_USERS, DIM), dtype=np.float32)
    items = random.standard_normal((NUM_ITEMS, DIM), dtype=np.float32)
    targets, seen = histories()[:, 0], histories()[:, 1 : HISTORY // 2 + 1]
    indptr = np.arange(NUM_USERS + 1) * seen.shape[1]
    query_tensor, item_tensor = torch.from_numpy(users), torch.from_numpy(items)

    def batched() -> dict[str, float]:
        return evaluate_embeddings(
            query_tensor, item_tensor, targets, indptr, seen.ravel(), cosine=False, top_ks=TOP_KS
        )

    def best_by_heap(user: int) -> list[int]:
        rating = items @ users[user]
        candidates = set(range(NUM_ITEMS)) - set(seen[user].tolist())
        score = {item: rating[item] for item in candidates}
        return heapq.nlargest(max(TOP_KS), score, key=score.__getitem__)

    def best_by_sorting(user: int) -> list[int]:
        rating = items @ users[user]
        rating[seen[user]] = -np.inf
        return np.argsort(-rating)[: max(TOP_KS)].tolist()

    def user_by_user(best: Callable[[int], list[int]]) -> dict[str, float]:
        totals = {f"{name}@{k}": 0.0 for name in ("hr", "ndcg") for k in TOP_KS}
        for user in range(NUM_USERS):
            ranked = best(user)
            for k in TOP_KS:
                hits = [int(item == targets[user]) for item in ranked[:k]]
                totals[f"hr@{k}"] += sum(hits)
                totals[f"ndcg@{k}"] += sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))
        return {name: total / NUM_USERS for name, total in totals.items()}

    return batched, lambda: user_by_user(best_by_heap), lambda: user_by_user(best_by_sorting)
