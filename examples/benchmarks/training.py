"""Training and codes, beside FAISS and plain PyTorch."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from measure import Row, compare
from recommending import untrained
from tokens import histories, tokenizers

from tokenrec_hf import LightGCNConfig, LightGCNModel, MQTokenizerConfig, MQTokenizerModel, Recipe
from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout, IndexedSplits
from tokenrec_hf.repository.build import build_collator
from tokenrec_hf.training.datasets import LengthGroupedSampler
from tokenrec_hf.training.initialization import kmeans
from tokenrec_hf.training.stages import train_retrieval

NUM_USERS, NUM_ITEMS, DIM, BOOKS, CODEWORDS, VECTORS = 1090, 3646, 128, 8, 256, 10_000
# Items of a user, and how often the time of T5's stage is taken.
HISTORY, VALIDATION_TURNS = 31, 3


def rows() -> list[Row]:
    """K-means, encoding, propagation, and the share of a batch that is not padding."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = torch.randn(VECTORS, DIM, generator=torch.Generator().manual_seed(0))
    what = f"k-means of {VECTORS:,} x {DIM}, {CODEWORDS} centres, 20 iterations"
    found = [compare(what, lambda: kmeans(vectors, CODEWORDS), "faiss.Kmeans", lambda: faiss_kmeans(vectors))]
    for count, bar in ((1, "≤ 0.3 ms"), (VECTORS, "≥ 1")):
        ours, theirs = encoders(vectors[:count])
        what = f"codes of {f'{count:,} vectors' if count > 1 else 'a vector'}, {BOOKS} residual codebooks"
        found.append(compare(what, ours, "FAISS ResidualQuantizer, beam 1", theirs, bar=bar))
    ours, sparse = propagations()
    if not torch.allclose(ours(), sparse(), atol=1e-5):
        raise SystemExit("the propagations do not agree.")
    found.append(compare("a layer of LightGCN, size of LastFM", ours, "sparse CSR tensor", sparse))
    return [*found, *token_shares(), validation_share()]


def faiss_kmeans(vectors: torch.Tensor) -> None:
    """The same k-means by FAISS, without taking a sample."""
    faiss.Kmeans(DIM, CODEWORDS, niter=20, max_points_per_centroid=VECTORS, min_points_per_centroid=1).train(
        vectors.numpy()
    )


def encoders(vectors: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two residual quantisers of the same size: an MQ-Tokenizer with random codewords, and one of FAISS."""
    config = MQTokenizerConfig(embedding_dim=DIM, num_codebooks=BOOKS, codebook_size=CODEWORDS, residual=True)
    model, quantiser = MQTokenizerModel(config).eval(), faiss.ResidualQuantizer(DIM, BOOKS, 8)
    quantiser.max_beam_size = 1
    quantiser.train(torch.randn(40 * CODEWORDS, DIM).numpy())
    return lambda: model.encode(vectors), lambda: quantiser.compute_codes(vectors.numpy())


def propagations() -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Two functions with the same result: the normalised adjacency matrix times a matrix of embeddings."""
    items = np.sort(histories()[:, :50])
    users = np.repeat(np.arange(NUM_USERS), items.shape[1])
    interactions = InteractionMatrix(users, items.ravel(), NUM_USERS, NUM_ITEMS)
    adjacency = LightGCNModel.from_interactions(LightGCNConfig(embedding_dim=64), interactions).adjacency()
    size = NUM_USERS + NUM_ITEMS
    embeddings = torch.randn(size, 64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = torch.sparse_csr_tensor(
            adjacency.offsets, adjacency.columns, adjacency.values, (size, size), check_invariants=True
        )
    return lambda: adjacency @ embeddings, lambda: csr @ embeddings


def token_shares() -> list[Row]:
    """The share of the positions of T5's training batches that are tokens, in the shape of LastFM."""
    random, (tokenizer, _) = np.random.default_rng(0), tokenizers()
    lengths = random.geometric(1 / 48, NUM_USERS) + 2
    items = np.concatenate([random.permutation(NUM_ITEMS)[:length] for length in lengths])
    interactions = InteractionMatrix(np.repeat(np.arange(NUM_USERS), lengths), items, NUM_USERS, NUM_ITEMS)
    users, ids = np.arange(NUM_USERS), [tokenizer.ids(kind) for kind in ("user", "item")]
    found = []
    for recipe, size, settings in (
        ("best", 32, {"max_length": 768, "next_items": True, "shuffle_history": False}),
        ("paper", 64, {"max_length": 512}),
    ):
        collator = DataCollatorForGenerativeRetrieval(tokenizer, interactions, *ids, **settings)
        order = list(LengthGroupedSampler(partial(collator.prompt_lengths, users), NUM_USERS, size, seed=0))
        examples = [{"user": row, "epoch": 0} for row in order]
        masks = [collator(examples[at : at + size])["attention_mask"] for at in range(0, NUM_USERS, size)]
        share = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        found.append(Row(f"tokens of T5's batches, recipe {recipe}", 100 * share, "%", bar="≥ 90 %"))
    return found


def validation_share() -> Row:
    """The share of T5's stage that its validation takes: the same epochs with and without, sizes of recipe `best`."""
    shares = []
    for _ in range(VALIDATION_TURNS):
        validated, plain = seconds_of_t5(validates=True), seconds_of_t5(validates=False)
        shares.append(100 * (1 - plain / validated))
    return Row("T5's stage, recipe best: validation", float(np.median(shares)), "%", bar="≤ 10 %")


def seconds_of_t5(validates: bool) -> float:
    """The CPU time of T5's stage up to its first validation, with or without it."""
    recipe, random = Recipe.load("best").changed(**{"prompts.shuffle_history": False}), np.random.default_rng(0)
    recommender = untrained(HISTORY)
    model, tokenizer, store = recommender.model, recommender.tokenizer, recommender.store
    users, items = store.ids("user"), store.ids("item")
    seen = store.rows("item", [item for items in store.seen(users) for item in items])
    interactions = InteractionMatrix(np.repeat(np.arange(len(users)), HISTORY), seen, len(users), len(items))
    holdout = Holdout(np.arange(len(users)), random.integers(len(items), size=len(users)))
    collator = build_collator(tokenizer, IndexedSplits(users, items, interactions, holdout), recipe)
    model.bind_items(store.vectors("item"), tokenizer.item_tokens(items))
    settings = recipe.retrieval
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train_retrieval(
            model.train(),
            collator,
            settings,
            Path(folder),
            holdout=holdout if validates else None,
            epochs=settings.evaluate_every,
        )
    return time.process_time() - started
