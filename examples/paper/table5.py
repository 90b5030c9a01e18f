"""Table V of TokenRec (arXiv 2406.10450): milliseconds per user of inference, TokenRec against P5 with beam search.

    python examples/paper/table5.py --dataset lastfm
    python examples/paper/table5.py --dataset beauty --backbones small

End to end from user ids and histories (the latest 100 items) to the ids of 20 unseen items, on the same T5 sizes, in one
process with one thread. The measure is CPU time, which on one thread of an idle machine is wall-clock time. The methods take
turns, so that a slow spell affects all of them; the median of the turns counts. All weights are random, which does not change
the time. Twenty minutes for `lastfm`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from baselines.beam_search import IdTrie
from baselines.item_ids import BASE, sequential_ids
from baselines.p5 import P5SID, T5_SIZES
from records import Job, Record, Recorded, Records
from report import table_lines
from transformers.modeling_outputs import BaseModelOutput

from tokenrec_hf import (
    EmbeddingStore,
    MQTokenizerModel,
    Recipe,
    Recommender,
    leave_one_out,
    load_interactions,
)
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import IndexedSplits, index_splits
from tokenrec_hf.repository.build import build_retrieval_model
from tokenrec_hf.training.initialization import build_tokenizer, prepare_mq_tokenizer, retrieval_store

TOP_K = BEAMS = 20
HISTORY = 100
BATCH_SIZES = (1, 16)
# Sizes of T5.
BACKBONES = {
    "small": T5_SIZES,
    "t5-small": {
        "d_model": 512,
        "d_kv": 64,
        "num_heads": 8,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": 6,
    },
}
USER_ONLY = ", user id only"
BEST = "TokenRec, recipe best"
Recommend = Callable[[Sequence[int]], list[list[str]]]


class WrittenOutP5(P5SID):
    """P5 with written-out ids, `item_1234`, of five tokens: `item`, `_`, two of digits and the end of the sequence."""

    def item_ids(self, train: InteractionMatrix) -> np.ndarray:
        """The digits in pairs as in P5-SID, with constant symbols around them."""
        numbers = sequential_ids(train, self.seed)
        item, underscore, end = (np.full((len(numbers), 1), BASE + i) for i in range(3))
        return np.concatenate([item, underscore, numbers, end], axis=1)

    def build(self, train: InteractionMatrix) -> None:
        """As in P5; an id in a prompt has no end token."""
        super().build(train)
        self.item_tokens = self.item_tokens[:, :-1]


def main() -> None:
    """Measures, adds a record for each size and batch size, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --dataset NAME [...]"
    )
    parser.add_argument("--dataset", required=True, help="a data set as in `tokenrec train`")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--users", type=int, default=16, help="random users of each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each method")
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the records")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = index_splits(leave_one_out(load_interactions(arguments.dataset)), "test")
    lengths = data.interactions.lengths
    users = np.random.default_rng(0).permutation(data.holdout.users)[: arguments.users].tolist()
    users.sort(key=lambda user: lengths[user])  # histories of like length together: little padding, for all methods
    records = []
    for backbone in arguments.backbones:
        methods = all_methods(data, backbone)
        for batch_size in arguments.batch_sizes:
            measured = job(arguments.dataset, backbone, batch_size, len(users), arguments.turns)
            record = {
                "job": asdict(measured),
                "milliseconds": measure(methods, users, batch_size, arguments.turns),
                "mean_history": float(np.minimum(lengths[users], HISTORY).mean()),
                "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
            }
            print(json.dumps(record), flush=True)
            records.append(record)
    Records(arguments.results).put(arguments.dataset, records)
    print("\n".join(table(records)))


def job(dataset: str, backbone: str, batch_size: int, users: int = 16, turns: int = 3) -> Job:
    """The job by which a measurement is found."""
    settings = {"backbone": backbone, "batch_size": batch_size, "users": users, "turns": turns}
    return Job(dataset, "speed", "test", settings=settings)


def recorded(dataset: str, results: Path) -> list[Record]:
    """The records of a run with the default arguments."""
    found = Recorded(results)
    return [found(job(dataset, backbone, size)) for backbone in BACKBONES for size in BATCH_SIZES]


def all_methods(data: IndexedSplits, backbone: str) -> dict[str, Recommend]:
    """The methods of TokenRec and P5: each takes user rows and returns 20 unseen items for each."""
    best = tokenrec_methods(data, backbone, "best")
    return {
        **tokenrec_methods(data, backbone, "paper"),
        **{name.replace("TokenRec", BEST): method for name, method in best.items()},
        **p5_methods(data, backbone),
    }


def tokenrec_methods(data: IndexedSplits, backbone: str, name: str) -> dict[str, Recommend]:
    """TokenRec on random vectors: `Recommender`'s prompts, tokenizer, T5, projection, and the store's exact search.

    Args:
        data: users, items and histories.
        backbone: sizes of T5, of `BACKBONES`.
        name: recipe of the vectors, tokens and pooling.
    """
    recipe = Recipe.load(name)
    recipe = recipe.changed(
        **{"retrieval.backbone": None, "retrieval.config": {**recipe.retrieval.config, **BACKBONES[backbone]}}
    )
    torch.manual_seed(0)
    width = recipe.collaborative.config["embedding_dim"]
    store = EmbeddingStore(width)
    mqs = {}
    for kind, ids in (("user", data.user_ids), ("item", data.item_ids)):
        vectors = torch.randn(len(ids), width)
        store.upsert(kind, ids, vectors)
        mqs[kind] = MQTokenizerModel(recipe.mq_tokenizer.model_configuration(kind, width, len(ids)))
        prepare_mq_tokenizer(mqs[kind], vectors)
    store.space_ids = {kind: mq.space_id for kind, mq in mqs.items()}
    length = recipe.prompts.max_length
    tokenizer = build_tokenizer(None, user_mq=mqs["user"], item_mq=mqs["item"], store=store, model_max_length=length)
    model = build_retrieval_model(recipe.retrieval, tokenizer, mqs["user"], mqs["item"]).eval()
    store = retrieval_store(store, model, tokenizer)
    names = np.array(data.item_ids, dtype=object)
    seen = [names[data.interactions.of(user)].tolist() for user in range(len(data.user_ids))]
    store.set_seen(data.user_ids, seen)
    recommender = Recommender(model, tokenizer, store)

    def recommend(users: Sequence[int], histories: list[list[str]]) -> list[list[str]]:
        found = recommender.recommend([data.user_ids[user] for user in users], histories, top_k=TOP_K)
        return [[row["item"] for row in own] for own in found]

    return {
        "TokenRec": lambda users: recommend(users, [seen[user][-HISTORY:] for user in users]),
        "TokenRec" + USER_ONLY: lambda users: recommend(users, [[] for _ in users]),
    }


def p5_methods(data: IndexedSplits, backbone: str) -> dict[str, Recommend]:
    """P5 with `generate` of transformers and with this repository's beam search."""
    names = np.array([*data.item_ids, ""], dtype=object)  # -1 stands for no item
    written, short = (random_p5(kind, data, backbone) for kind in (WrittenOutP5, P5SID))
    user_only = random_p5(WrittenOutP5, data, backbone, max_history=0)

    def by_generate(p5: P5SID) -> Recommend:
        return lambda users: names[generate(p5, np.array(users))].tolist()

    return {
        "P5, written-out ids, generate": by_generate(written),
        "P5, written-out ids, generate" + USER_ONLY: by_generate(user_only),
        "P5-SID, generate": by_generate(short),
        "P5-SID, vectorised beam search": lambda users: names[short.recommend(np.array(users))[0].numpy()].tolist(),
    }


def random_p5(kind: type[P5SID], data: IndexedSplits, backbone: str, max_history: int = HISTORY) -> P5SID:
    """An untrained P5."""
    torch.manual_seed(0)
    p5 = kind(max_history=max_history, beams=BEAMS, t5=BACKBONES[backbone])
    p5.train = data.interactions
    p5.build(data.interactions)
    p5.network.eval()
    return p5


@torch.inference_mode()
def generate(p5: P5SID, users: np.ndarray, memory: float = 3e8) -> np.ndarray:
    """Unseen items by the beam search of transformers, restricted to valid ids, `[B, BEAMS]`; -1 if no item is left.

    Args:
        p5: a model with ids of equal length.
        users: user rows.
        memory: bytes for the keys and values of all beams, which limits the batch.
    """
    config, trie, first = p5.network.t5.config, p5.trie, p5.network.first_symbol
    tokens, words, open_nodes = p5.inputs(users)
    per_token = BEAMS * config.num_decoder_layers * 2 * config.num_heads * config.d_kv * 4
    at_once = max(1, int(memory / (per_token * tokens.shape[1])))
    if at_once < len(users):
        return np.concatenate([generate(p5, users[i : i + at_once], memory) for i in range(0, len(users), at_once)])
    states, mask = p5.network.encode(tokens, words)
    children = children_of(trie)
    closed = [set(np.flatnonzero(~row)) for row in open_nodes.numpy()]

    def allowed(row: int, written: torch.Tensor) -> list[int]:
        node = 0
        for token in written[1:].tolist():
            node = children[node][token - first]
        return [symbol + first for symbol, child in children[node].items() if child not in closed[row]]

    found = p5.network.t5.generate(
        encoder_outputs=BaseModelOutput(states),
        attention_mask=mask,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        max_new_tokens=trie.depth,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        eos_token_id=None,
    )
    nodes = np.zeros(len(found), dtype=np.int64)
    for symbols in (found[:, 1:] - first).T.numpy():
        nodes = trie.children.numpy()[nodes, symbols]
    return trie.items.numpy()[nodes].reshape(len(users), BEAMS)


@lru_cache
def children_of(trie: IdTrie) -> list[dict[int, int]]:
    """For each node, its children by symbol, for `prefix_allowed_tokens_fn`."""
    children: list[dict[int, int]] = [{} for _ in trie.children]
    for node, symbol in (trie.children >= 0).nonzero().tolist():
        children[node][symbol] = int(trie.children[node, symbol])
    return children


def measure(methods: dict[str, Recommend], users: list[int], batch_size: int, turns: int) -> dict[str, float]:
    """Milliseconds of CPU time per user of each method, the median of its turns after one warm-up batch."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    batches = [users[start : start + batch_size] for start in range(0, len(users), batch_size)]
    for recommend in methods.values():
        recommend(batches[0])
    for _ in range(turns):
        for name, recommend in methods.items():
            started = time.process_time()
            for batch in batches:
                recommend(batch)
            times[name].append((time.process_time() - started) / len(users) * 1000)
    return {name: statistics.median(own) for name, own in times.items()}


def table(records: Sequence[Record]) -> list[str]:
    """The lines of the table and the note below; in brackets, the time relative to TokenRec with the same kind of prompt."""
    settings = [record["job"]["settings"] for record in records]
    body = []
    for name in records[0]["milliseconds"]:
        own = "TokenRec" + USER_ONLY * name.endswith(USER_ONLY)
        times = [(record["milliseconds"][name], record["milliseconds"][own]) for record in records]
        body.append([name, *(f"{time:.2f}" + f" ({time / base:.1f}x)" * (name != own) for time, base in times)])
    heads = [f"{one['backbone']}, {one['batch_size']} at once" for one in settings]
    return [
        *table_lines(["", *heads], body, numbers=True),
        "",
        f"{settings[0]['users']} random users, {records[0]['mean_history']:.1f} items of history on average (at most {HISTORY});",
        f"{TOP_K} unseen items each, {BEAMS} beams. CPU time, median of {settings[0]['turns']} turns. {records[0]['machine']}.",
    ]


if __name__ == "__main__":
    main()
