"""Threads that recommend and open repositories while another changes them: no call fails, answers stay, memory stays level."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_repository import DIM, ITEMS, USERS, write_tiny_repository
from transformers import AutoModel

from tokenrec_hf import EmbeddingStore, NewVectors, Recommender, Repository

THREADS = 8
# More than all items that the writer adds.
MANY = 100_000


@pytest.fixture
def folder(tmp_path):
    write_tiny_repository(tmp_path / "repository")
    return tmp_path / "repository"


def resident():
    """Bytes of memory that this process holds, where the system says so."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def readers(recommender, folder):
    """Calls that take a number, and fail unless they find what they found before."""
    tokenizer = recommender.tokenizer

    def prompt(user):
        return tokenizer([f"What would user_{user} like after item_i3?"], return_entities=True, return_tensors="pt")

    def known(recommendations):
        return [row["item"] for row in recommendations[0] if row["item"] in ITEMS]

    def ask(user):
        return known(recommender.recommend([user], top_k=MANY, exclude_seen=False))

    def near(item):
        return known(recommender.similar_items([item], top_k=MANY))

    asked = {user: (ask(user), prompt(user)["input_ids"].tolist()) for user in USERS}
    alike = {item: near(item) for item in ITEMS}

    def recommend(number):
        user = USERS[number % len(USERS)]
        assert ask(user) == asked[user][0]

    def encode(number):
        user = USERS[number % len(USERS)]
        encoded = prompt(user)
        assert encoded["input_ids"].tolist() == asked[user][1] and encoded["user_ids"] == [[user]]
        assert recommender.model.encode_queries(encoded["input_ids"], encoded["attention_mask"]).isfinite().all()

    def similar(number):
        item = ITEMS[number % len(ITEMS)]
        assert near(item) == alike[item]

    def open_repository(number):
        opened, user = Recommender.from_pretrained(folder), USERS[number % len(USERS)]
        assert set(opened.store.ids("item")) == set(opened.tokenizer.ids("item"))
        assert known(opened.recommend([user], top_k=MANY, exclude_seen=False)) == asked[user][0]

    def open_store(number):
        opened = EmbeddingStore.open(folder)
        assert opened.vectors("item").isfinite().all() and set(opened.ids("user")) >= set(USERS)

    def open_collaborative(number):
        assert AutoModel.from_pretrained(folder / "collaborative").item_embeddings().isfinite().all()

    return [*6 * (recommend, encode, similar), open_store, open_repository, open_collaborative]


def change(recommender, folder, item, user):
    """Adds and removes an item and a user, of what is served and of what lies on the disk."""
    recommender.tokenizer.add_items({item: np.ones(DIM)})
    recommender.store.upsert("item", [item], torch.ones(1, DIM))
    one = torch.ones(1, DIM)
    Repository(folder).add(items=NewVectors([item], one), users=NewVectors([user], one))
    recommender.store.delete("item", [item])
    recommender.tokenizer.remove("item", [item])
    Repository(folder).remove(users=[user])


def test_no_call_of_many_threads_fails_beside_a_writer(folder):
    """The number of calls is in `TOKENREC_CALLS`."""
    number, held, changes = int(os.environ.get("TOKENREC_CALLS", "300")), [], 0
    recommender, stopped = Recommender.from_pretrained(folder), threading.Event()
    calls = cycle(readers(recommender, folder))

    def write():
        nonlocal changes
        while not stopped.is_set():
            change(recommender, folder, f"fresh{changes}", f"new{changes}")
            changes += 1
            time.sleep(0.1)

    def call(place, read):
        try:
            read(place)
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {error}"
        if place % 1000 == 0:
            held.append(resident() >> 20)
        return None

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(THREADS) as pool:
        writing = writer.submit(write)
        said = list(pool.map(call, range(number), islice(calls, number)))
        stopped.set()
        writing.result()
    assert [error for error in said if error] == []
    assert changes > 0
    print(f"{number} calls of {THREADS} threads beside {changes} changes; MB held: {held}")
