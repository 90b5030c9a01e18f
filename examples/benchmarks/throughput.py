"""Prompts, texts, searches, rankings and a layer of LightGCN, side by side with the usual ways, in one run of this machine.

    OMP_NUM_THREADS=1 python examples/benchmarks/throughput.py [--spiece-model path/to/spiece.model]

Everything has the size of LastFM (1,090 users, 3,646 items, 64 dimensions) and random content, unless a line says otherwise. Both
ways of each comparison are given the same work, and their results are compared before their CPU times are. About two minutes.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import T5Tokenizer

from tokenrec_hf import (
    EmbeddingStore,
    LightGCNConfig,
    LightGCNModel,
    MQTokenizerConfig,
    MQTokenizerModel,
    TokenRecTokenizer,
)
from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES
from tokenrec_hf.training.initialization import build_tokenizer, load_t5_tokenizer

NUM_USERS, NUM_ITEMS, DIM, HISTORY = 1090, 3646, 64, 100
NUM_CODEBOOKS, CODEBOOK_SIZE = 3, 256
BATCH_SIZE, PROMPTS = 64, 512
TOP_KS = (10, 20, 30)
TEMPLATE = HISTORY_TEMPLATES[0]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spiece-model", help="the vocabulary of a real T5 (default: the small one of the package)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed; the fastest counts")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    print(f"\nPrompts with {HISTORY} items of history, {PROMPTS} of them in batches of {BATCH_SIZE}")
    collate, tokenize = prompts(random, arguments.spiece_model)
    for ours, stock in zip(collate(), tokenize()):
        for name in ("input_ids", "attention_mask"):
            if not torch.equal(ours[name], stock[name]):
                raise SystemExit(f"the collator's {name} are not those of the stock tokenizer.")
    rates = measured(
        {"DataCollatorForGenerativeRetrieval": collate, "T5Tokenizer on the written-out text": tokenize},
        PROMPTS,
        "prompts/s",
        arguments.repeats,
    )
    print(f"  ratio {rates[0] / rates[1]:.1f} x")

    for texts in (BATCH_SIZE, 1):
        print(f"\nTexts that name a user and {HISTORY} items, {texts} at a time")
        ours, stock = texts_with_ids(random, arguments.spiece_model, texts)
        if not torch.equal(ours()["input_ids"], stock()["input_ids"]):
            raise SystemExit("the tokens are not those of the stock tokenizer.")
        ways = {"TokenRecTokenizer": ours, "T5Tokenizer on the written-out text": stock}
        rates = measured(ways, texts, "texts/s", 4 * arguments.repeats)
        print(f"  ratio {rates[0] / rates[1]:.1f} x")

    for items, queries in ((10_000, 1), (100_000, 1), (1_000_000, 1), (10_000, 256), (100_000, 256)):
        print(f"\nExact top 20 of {items:,} items, {queries} queries at a time")
        ours, faiss_flat = searches(random, items, queries)
        if ours()[0] != faiss_flat():
            raise SystemExit("the searches do not agree.")
        ways = {"EmbeddingStore": ours, "FAISS IndexFlatIP": faiss_flat}
        rates = measured(ways, queries, "queries/s", 4 * arguments.repeats)
        print(f"  ratio {rates[0] / rates[1]:.2f} x")

    print(f"\nFull ranking of {NUM_ITEMS} items for {NUM_USERS} users by {DIM} dimensions")
    batched, looped, sorting = evaluations(random)
    expected = batched()
    for results in (looped(), sorting()):
        if any(not math.isclose(expected[name], value, abs_tol=1e-9) for name, value in results.items()):
            raise SystemExit("the evaluations do not agree.")
    rates = measured({"evaluate_embeddings": batched}, NUM_USERS, "users/s", arguments.repeats)
    rates += measured(
        {
            "a loop over users with a dictionary and a heap": looped,
            "a loop over users with numpy.argsort": sorting,
        },
        NUM_USERS,
        "users/s",
        min(2, arguments.repeats),
    )
    print(f"  ratio {rates[0] / rates[1]:.0f} x to the first loop, {rates[0] / rates[2]:.1f} x to the second")

    print(f"\nA layer of LightGCN: {NUM_USERS} users with {HISTORY // 2} of {NUM_ITEMS} items each, {DIM} dimensions")
    ours, sparse = propagations(random)
    if not torch.allclose(ours(), sparse(), atol=1e-5):
        raise SystemExit("the propagations do not agree.")
    ways = {"LightGCNModel": ours, "the product with a sparse CSR tensor": sparse}
    rates = measured(ways, 1, "layers/s", 20 * arguments.repeats)
    print(f"  ratio {rates[0] / rates[1]:.1f} x")


def measured(ways: dict[str, Callable], amount: int, unit: str, repeats: int) -> list[float]:
    """The rate of each way, the fastest of `repeats` turns; turns alternate, so that a busy moment hits all ways."""
    seconds = [math.inf] * len(ways)
    for _ in range(repeats):
        for number, run in enumerate(ways.values()):
            started = time.process_time()
            run()
            seconds[number] = min(seconds[number], time.process_time() - started)
    for name, one in zip(ways, seconds):
        print(f"  {name:<50}{amount / one:>12,.0f} {unit}")
    return [amount / one for one in seconds]


def tokenizers(random: np.random.Generator, spiece_model: str | None) -> tuple[TokenRecTokenizer, T5Tokenizer]:
    """Ours, with random codes, and the stock tokenizer with the code tokens added."""
    store = EmbeddingStore(DIM)
    for kind, count in (("user", NUM_USERS), ("item", NUM_ITEMS)):
        ids = [f"{kind[0]}{row}" for row in range(count)]
        store.upsert(kind, ids, random.standard_normal((count, DIM), dtype=np.float32))
    # Untrained: which codes come out does not matter here.
    config = {"embedding_dim": DIM, "num_codebooks": NUM_CODEBOOKS, "codebook_size": CODEBOOK_SIZE}
    user_mq, item_mq = MQTokenizerModel(MQTokenizerConfig(**config)), MQTokenizerModel(MQTokenizerConfig(**config))
    tokenizer = build_tokenizer(spiece_model, user_mq=user_mq, item_mq=item_mq, store=store)
    stock: T5Tokenizer = load_t5_tokenizer(spiece_model)
    names = [f"<{a}{k}-{w}>" for a in "uv" for k in range(1, NUM_CODEBOOKS + 1) for w in range(1, CODEBOOK_SIZE + 1)]
    stock.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.model_max_length = stock.model_max_length = 2048
    return tokenizer, stock


def texts_with_ids(random: np.random.Generator, spiece_model: str | None, count: int) -> tuple[Callable, Callable]:
    """Two functions that make the same batch: from texts with ids, and from texts in which ids are written out as codes."""
    tokenizer, stock = tokenizers(random, spiece_model)
    users, items = written_out(tokenizer, "user", "u"), written_out(tokenizer, "item", "v")
    plain, written = [], []
    for user in random.permutation(NUM_USERS)[:count].tolist():
        history = random.permutation(NUM_ITEMS)[:HISTORY].tolist()
        plain.append(TEMPLATE.text.format(user=f"user_u{user}", history=" ".join(f"item_i{item}" for item in history)))
        written.append(TEMPLATE.text.format(user=users[user], history=" ".join(items[item] for item in history)))
    return (
        lambda: tokenizer(plain, padding=True, return_tensors="pt"),
        lambda: stock(written, padding=True, return_tensors="pt"),
    )


def searches(random: np.random.Generator, num_items: int, num_queries: int) -> tuple[Callable, Callable]:
    """Two functions that search the same items, each giving ids."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = random.standard_normal((num_items, DIM), dtype=np.float32)
    store, ids = EmbeddingStore(DIM), [f"i{row}" for row in range(num_items)]
    store.upsert("item", ids, vectors)
    queries = random.standard_normal((num_queries, DIM), dtype=np.float32)
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return (
        lambda: store.search(queries, 20),
        lambda: [[ids[row] for row in rows] for rows in index.search(unit, 20)[1].tolist()],
    )


def prompts(random: np.random.Generator, spiece_model: str | None) -> tuple[Callable, Callable]:
    """Two functions that make the same batches: from rows, and from texts in which ids are written out as codes."""
    tokenizer, stock = tokenizers(random, spiece_model)
    user_ids, item_ids = tokenizer.ids("user"), tokenizer.ids("item")
    histories = np.stack([random.permutation(NUM_ITEMS)[:HISTORY] for _ in range(NUM_USERS)])
    interactions = InteractionMatrix(np.repeat(np.arange(NUM_USERS), HISTORY), histories.ravel(), NUM_USERS, NUM_ITEMS)
    # Room for all the items, so that both ways write out the same prompts.
    collator = DataCollatorForGenerativeRetrieval(
        tokenizer,
        interactions,
        user_ids,
        item_ids,
        evaluation_templates=(TEMPLATE,),
        max_length=2048,
        max_history=HISTORY,
        shuffle_history=False,
    )
    dataset = PromptDataset(np.arange(PROMPTS), np.zeros(PROMPTS, dtype=np.int64))
    batches = [[dataset[row] for row in range(at, at + BATCH_SIZE)] for at in range(0, PROMPTS, BATCH_SIZE)]

    users, items = written_out(tokenizer, "user", "u"), written_out(tokenizer, "item", "v")
    texts = [
        TEMPLATE.text.format(user=users[user], history=" ".join(items[item] for item in histories[user]))
        for user in range(PROMPTS)
    ]

    def collate():
        return [collator(batch) for batch in batches]

    def tokenize():
        return [
            stock(texts[at : at + BATCH_SIZE], padding=True, return_tensors="pt")
            for at in range(0, PROMPTS, BATCH_SIZE)
        ]

    return collate, tokenize


def written_out(tokenizer: TokenRecTokenizer, kind: str, letter: str) -> list[str]:
    """`item_<v1-42><v2-12><v3-98>` for every row."""
    codes = (tokenizer.codes(kind) + 1).tolist()
    return [f"{kind}_" + "".join(f"<{letter}{k}-{w}>" for k, w in enumerate(row, start=1)) for row in codes]


def evaluations(random: np.random.Generator) -> tuple[Callable, Callable, Callable]:
    """Three functions with the same result: batched, and user by user in two styles common in research code."""
    users = random.standard_normal((NUM_USERS, DIM), dtype=np.float32)
    items = random.standard_normal((NUM_ITEMS, DIM), dtype=np.float32)
    drawn = np.stack([random.permutation(NUM_ITEMS)[: HISTORY // 2 + 1] for _ in range(NUM_USERS)])
    targets, seen = drawn[:, 0], drawn[:, 1:]
    indptr = np.arange(NUM_USERS + 1) * seen.shape[1]
    query_tensor, item_tensor = torch.from_numpy(users), torch.from_numpy(items)

    def batched():
        return evaluate_embeddings(
            query_tensor, item_tensor, targets, indptr, seen.ravel(), cosine=False, top_ks=TOP_KS
        )

    def looped():
        return user_by_user(best_by_heap)

    def sorting():
        return user_by_user(best_by_sorting)

    def best_by_heap(user):
        rating = items @ users[user]
        candidates = set(range(NUM_ITEMS)) - set(seen[user].tolist())
        score = {item: rating[item] for item in candidates}
        return heapq.nlargest(max(TOP_KS), score, key=score.get)

    def best_by_sorting(user):
        rating = items @ users[user]
        rating[seen[user]] = -np.inf
        return np.argsort(-rating)[: max(TOP_KS)].tolist()

    def user_by_user(best):
        totals = {f"{name}@{k}": 0.0 for name in ("hr", "ndcg") for k in TOP_KS}
        for user in range(NUM_USERS):
            ranked = best(user)
            for k in TOP_KS:
                hits = [1 if item == targets[user] else 0 for item in ranked[:k]]
                totals[f"hr@{k}"] += sum(hits)
                totals[f"ndcg@{k}"] += sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))
        return {name: total / NUM_USERS for name, total in totals.items()}

    return batched, looped, sorting


def propagations(random: np.random.Generator) -> tuple[Callable, Callable]:
    """Two functions with the same result: the normalised adjacency matrix times a matrix of embeddings."""
    items = np.concatenate([np.sort(random.permutation(NUM_ITEMS)[: HISTORY // 2]) for _ in range(NUM_USERS)])
    interactions = InteractionMatrix(np.repeat(np.arange(NUM_USERS), HISTORY // 2), items, NUM_USERS, NUM_ITEMS)
    adjacency = LightGCNModel.from_interactions(LightGCNConfig(embedding_dim=DIM), interactions).adjacency()
    size = NUM_USERS + NUM_ITEMS
    embeddings = torch.from_numpy(random.standard_normal((size, DIM), dtype=np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = torch.sparse_csr_tensor(
            adjacency.offsets, adjacency.columns, adjacency.values, (size, size), check_invariants=True
        )
    return lambda: adjacency @ embeddings, lambda: csr @ embeddings


if __name__ == "__main__":
    main()
