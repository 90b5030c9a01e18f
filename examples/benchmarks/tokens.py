"""Prompts and texts to tokens, beside the stock T5 tokenizer on the written-out text.

All have the size of LastFM and random content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from measure import Row, compare
from tokenizers import AddedToken
from transformers import T5Tokenizer

from tokenrec_hf import EmbeddingStore, MQTokenizerConfig, MQTokenizerModel, TokenRecTokenizer
from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES
from tokenrec_hf.training.initialization import build_tokenizer, load_t5_tokenizer

NUM_USERS, NUM_ITEMS, DIM, HISTORY = 1090, 3646, 64, 100
NUM_CODEBOOKS, CODEBOOK_SIZE = 3, 256
BATCH_SIZE = 64
TEMPLATE = HISTORY_TEMPLATES[0]
PEER = "stock T5 tokenizer"


def rows() -> list[Row]:
    """A batch from rows, and texts that name a user and 100 items."""
    tokenizer, stock = tokenizers()
    collate, tokenize = prompts(tokenizer, stock)
    _check(collate(), tokenize())
    what = f"collator: a prompt of {HISTORY} items, {BATCH_SIZE} at a time"
    found = [compare(what, collate, PEER, tokenize, amount=BATCH_SIZE, bar="≥ 5")]
    for count in (BATCH_SIZE, 1):
        ours, theirs = texts(tokenizer, stock, count)
        _check(ours(), theirs())
        what = f"TokenRecTokenizer: a text with {HISTORY} ids, {count} at a time"
        found.append(compare(what, ours, PEER, theirs, amount=count, bar="≥ 5"))
    return found


def tokenizers() -> tuple[TokenRecTokenizer, T5Tokenizer]:
    """Ours, with the codes of untrained MQ-Tokenizers, and the stock tokenizer with the code tokens added."""
    random, store = np.random.default_rng(0), EmbeddingStore(DIM)
    for kind, count in (("user", NUM_USERS), ("item", NUM_ITEMS)):
        ids = [f"{kind[0]}{row}" for row in range(count)]
        store.upsert(kind, ids, random.standard_normal((count, DIM), dtype=np.float32))
    config = {"embedding_dim": DIM, "num_codebooks": NUM_CODEBOOKS, "codebook_size": CODEBOOK_SIZE}
    user_mq, item_mq = MQTokenizerModel(MQTokenizerConfig(**config)), MQTokenizerModel(MQTokenizerConfig(**config))
    tokenizer = build_tokenizer(user_mq=user_mq, item_mq=item_mq, store=store)
    stock: T5Tokenizer = load_t5_tokenizer()
    names = [f"<{a}{k}-{w}>" for a in "uv" for k in range(1, NUM_CODEBOOKS + 1) for w in range(1, CODEBOOK_SIZE + 1)]
    stock.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.model_max_length = stock.model_max_length = 2048
    return tokenizer, stock


def histories() -> np.ndarray:
    """The item rows of each user, `[NUM_USERS, HISTORY]`."""
    random = np.random.default_rng(0)
    return np.stack([random.permutation(NUM_ITEMS)[:HISTORY] for _ in range(NUM_USERS)])


def prompts(tokenizer: TokenRecTokenizer, stock: T5Tokenizer) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions that make the same batch: from rows, and from texts in which ids are written out as codes."""
    items = histories()
    interactions = InteractionMatrix(np.repeat(np.arange(NUM_USERS), HISTORY), items.ravel(), NUM_USERS, NUM_ITEMS)
    # Room for all the items, so that both ways write out the same prompts.
    collator = DataCollatorForGenerativeRetrieval(
        tokenizer,
        interactions,
        tokenizer.ids("user"),
        tokenizer.ids("item"),
        evaluation_templates=(TEMPLATE,),
        max_length=2048,
        max_history=HISTORY,
        shuffle_history=False,
    )
    dataset = PromptDataset(np.arange(BATCH_SIZE), np.zeros(BATCH_SIZE, dtype=np.int64))
    batch, written = [dataset[row] for row in range(BATCH_SIZE)], written_out(tokenizer, BATCH_SIZE)
    return lambda: collator(batch), lambda: stock(written, padding=True, return_tensors="pt")


def texts(tokenizer: TokenRecTokenizer, stock: T5Tokenizer, count: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions that make the same batch: from texts with ids, and from texts in which ids are written out as codes."""
    plain = [
        TEMPLATE.text.format(user=f"user_u{user}", history=" ".join(f"item_i{item}" for item in items))
        for user, items in enumerate(histories()[:count].tolist())
    ]
    written = written_out(tokenizer, count)
    return (
        lambda: tokenizer(plain, padding=True, return_tensors="pt"),
        lambda: stock(written, padding=True, return_tensors="pt"),
    )


def written_out(tokenizer: TokenRecTokenizer, count: int) -> list[str]:
    """The prompts of the first users, with ids like `item_<v1-42><v2-12><v3-98>`."""
    users, items = (
        [f"{kind}_" + "".join(f"<{letter}{k}-{w}>" for k, w in enumerate(row, start=1)) for row in codes]
        for kind, letter, codes in (
            (kind, letter, (tokenizer.codes(kind) + 1).tolist()) for kind, letter in (("user", "u"), ("item", "v"))
        )
    )
    return [
        TEMPLATE.text.format(user=users[user], history=" ".join(items[item] for item in history))
        for user, history in enumerate(histories()[:count].tolist())
    ]


def _check(ours: Any, theirs: Any) -> None:
    for name in ("input_ids", "attention_mask"):
        if not ours[name].equal(theirs[name]):
            raise SystemExit(f"the {name} are not those of the stock tokenizer.")
