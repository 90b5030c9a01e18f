"""The leak audit: whether anything of a trained repository has seen the items that it is measured on.

Looks at what is in the files, not at how they are said to have come about: the splits, the edges of the collaborative model,
the seen items and vectors of the store, the codes of the tokenizer, and the prompts that evaluation asks with. What cannot be
told from the files is said to be so. Section III-A of TokenRec (arXiv 2406.10450) is the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict

from ..data.collator import PromptDataset
from ..data.splits import SPLITS, fingerprint, index_splits
from ..evaluation.ranking import TEMPLATES, evaluation_collator
from ..models.codes import IdIndex, read_json
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import augment_norm, load_collaborative
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.recommender import check_repository
from ..models.tokenization_tokenrec import TokenRecTokenizer
from ..training.recipe import load_recipe
from .build import load_splits
from .update import ADDITIONS

KINDS = ("user", "item")
# Relative error of a vector: what the square root of `augment_norm` makes of rounding stays under it.
TOLERANCE = 1e-3
BATCH = 1024


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        run: `data`, or the run whose files were looked at, `selection` or `refit`.
        name: `splits`, `order`, `fingerprint`, `collaborative`, `seen`, `vectors`, `codes` or `prompts`.
        passed: `None` where the files cannot tell.
        finding: one sentence: what was compared, how many rows, and what was found.
    """

    run: str
    name: str
    passed: bool | None
    finding: str


def audit(folder: str | os.PathLike) -> list[Check]:
    """Checks that nothing in a trained repository has seen its held-out items.

    After `tokenrec add`, a repository may know more than the training did, but still none of the held-out items; after
    `tokenrec remove`, what cannot be compared any more is said to be so.

    Args:
        folder: what `tokenrec train` wrote.

    Raises:
        FileNotFoundError: it is no finished repository, or without the folder `training`, such as one from the Hub.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    check_repository(folder)
    splits = load_splits(folder)
    run = read_json(folder / "training" / "run.json")
    data = _Data(splits)
    # Not that of run.json, which may leave settings to be chosen on validation.
    recipe = load_recipe(config=folder / "recipe.yaml")
    users_removed = len(data.index["user"]) < read_json(folder / "metrics.json")["users"]
    checks = [_splits(data), _order(data), _fingerprint(data, run["data"], users_removed)]
    parts = [("selection", folder, ["validation", "test"])]
    if run["refit"]:
        parts = [("selection", folder / "training" / "selection", ["validation"]), ("refit", folder, ["test"])]
    for name, place, evaluated in parts:
        record = read_json(folder / "training" / f"{name}.json")["collaborative"]
        checks += _Run(name, place, recipe, data, record, users_removed).checks(evaluated)
    return checks


class _Data:
    """The splits in rows; a pair is one number, user row * number of items + item row.

    Args:
        splits: as [`load_splits`] gives them.
    """

    def __init__(self, splits: DatasetDict):
        self.splits = splits
        self.names = {name: {kind: splits[name][f"{kind}_id"][:] for kind in KINDS} for name in SPLITS}
        self.index = {
            kind: IdIndex(dict.fromkeys(one for name in SPLITS for one in self.names[name][kind]), kind)
            for kind in KINDS
        }
        self.rows = {
            name: {kind: self.index[kind].rows(columns[kind]) for kind in KINDS} for name, columns in self.names.items()
        }

    def pairs(self, *names: str) -> np.ndarray:
        """The pairs of splits, int64 `[n]`, in their order."""
        return np.concatenate([self.keys(*self.rows[name].values()) for name in names])

    def keys(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The pairs of rows; -1 where the data know the user or the item not."""
        return np.where((users < 0) | (items < 0), -1, users * len(self.index["item"]) + items)

    def user(self, row: int) -> str:
        """The user as a message names it."""
        return f"user {self.index['user'][int(row)]!r}"

    def named(self, pair: int) -> str:
        """A pair as a message names it."""
        user, item = divmod(int(pair), len(self.index["item"]))
        return f"{self.user(user)} and item {self.index['item'][item]!r}"


# The data -------------------------------------------------------------------------------------------------------------


def _splits(data: _Data) -> Check:
    """Whether each user has one validation and one test item, and no pair is in two splits."""
    pairs, users = data.pairs(*SPLITS), {name: data.rows[name]["user"] for name in SPLITS}
    unique, counts = np.unique(pairs, return_counts=True)
    untrained = np.setdiff1d(users["test"], users["train"])
    one_of_each = all(
        np.array_equal(np.sort(users[name]), np.union1d(users["validation"], users["test"]))
        for name in ("validation", "test")
    )
    if (counts > 1).any():
        finding = (
            f"of the {len(unique)} pairs of the three splits, {(counts > 1).sum()} are there more than once, such as "
            f"{data.named(unique[counts > 1][0])}."
        )
    elif not one_of_each:
        finding = (
            f"not every user has one validation item and one test item: there are {len(users['validation'])} and "
            f"{len(users['test'])} of them."
        )
    elif len(untrained):
        finding = f"{len(untrained)} of {len(users['test'])} users, such as {data.user(untrained[0])}, have only held-out items."
    else:
        finding = (
            f"of {len(users['test'])} users one item each is held out for validation and one for test, and none of the "
            f"{len(pairs)} (user, item) pairs is in two splits."
        )
        return Check("data", "splits", True, finding)
    return Check("data", "splits", False, finding)


def _order(data: _Data) -> Check:
    """Whether the test item is a user's last one, the validation item the one before, and the rest in order."""
    users = np.concatenate([data.rows[name]["user"] for name in SPLITS])
    if "timestamp" not in data.splits["train"].column_names:
        finding = (
            f"the {len(users)} interactions have no timestamps: the order in which they were read was taken for that of time, and "
            "whether it is cannot be told from the files."
        )
        return Check("data", "order", None, finding)
    times = np.concatenate([np.asarray(data.splits[name]["timestamp"][:]) for name in SPLITS])
    order = np.argsort(users, kind="stable")
    users, times = users[order], times[order]
    back = np.flatnonzero((users[1:] == users[:-1]) & (times[1:] < times[:-1]))
    if len(back):
        finding = (
            f"the timestamps of {len(users)} interactions, in the order train, validation, test of each user, go back "
            f"{len(back)} times, first for {data.user(users[back[0]])}."
        )
    else:
        finding = (
            f"by the timestamps of {len(users)} interactions, every user's test item is the last one, the validation item the "
            "one before, and what is trained on is in order."
        )
    return Check("data", "order", not len(back), finding)


def _fingerprint(data: _Data, expected: str, users_removed: bool) -> Check:
    """Whether the splits are those that the training was given."""
    rows = sum(len(data.names[name]["user"]) for name in SPLITS)
    if fingerprint(*(data.names[name][kind] for name in SPLITS for kind in KINDS)) == expected:
        passed, finding = True, "have the fingerprint that was taken before the training"
    elif users_removed:
        passed, finding = None, "cannot be compared with those of the training, because users were removed since"
    else:
        passed, finding = False, "are not those of the training, whose fingerprint is another one"
    return Check("data", "fingerprint", passed, f"the {rows} interactions of the three splits {finding}.")


# The files of a run ---------------------------------------------------------------------------------------------------


class _Run:
    """What one run of the training has left.

    Args:
        run: `selection` or `refit`.
        folder: of its model, tokenizer and store.
        recipe: its recipe.
        data: all interactions.
        record: what the training noted of the collaborative model.
        users_removed: whether users were removed since.
    """

    def __init__(self, run: str, folder: Path, recipe, data: _Data, record: Mapping[str, Any], users_removed: bool):
        self.run, self.folder, self.recipe, self.data, self.record = run, folder, recipe, data, record
        self.users_removed, self.added = users_removed, (folder / ADDITIONS).is_file()
        self.trained = ("train",) if run == "selection" else ("train", "validation")
        self.held_out = tuple(split for split in SPLITS if split not in self.trained)
        self.store, self.tokenizer = EmbeddingStore.open(folder / "store"), TokenRecTokenizer.from_pretrained(folder)
        self.model, self.ids = load_collaborative(folder / "collaborative")

    def checks(self, evaluated: Sequence[str]) -> list[Check]:
        """All of them; `evaluated` are the splits that this model is evaluated on."""
        files = [self._collaborative(), self._seen(), self._vectors(), self._codes()]
        return files + [self._prompts(split) for split in evaluated]

    def _check(self, name: str, passed: bool | None, finding: str) -> Check:
        return Check(self.run, name, passed, finding)

    def _collaborative(self) -> Check:
        """Whether the collaborative model was trained on exactly the interactions it may know."""
        if (edges := self.model.interactions()) is not None:
            rows = {kind: self.data.index[kind].rows(self.ids[kind].ids()) for kind in KINDS}
            edges = rows["user"][edges[0]], rows["item"][edges[1]]
            return self._same_pairs("collaborative", "the edges of the model", self.data.keys(*edges))
        # Sorted by user as the training has them, each user's in time order.
        users, items = (np.concatenate([self.data.rows[split][kind] for split in self.trained]) for kind in KINDS)
        order = np.argsort(users, kind="stable")
        mine = fingerprint(self.data.index["user"].ids(users[order]), self.data.index["item"].ids(items[order]))
        known = f"matrix factorisation keeps no edges; that it was trained on the {len(users)} pairs of {' + '.join(self.trained)}"
        recorded = self.record.get("trained_on")
        if recorded == mine:
            return self._check("collaborative", True, f"{known} is what the record of the training says.")
        if recorded is None or self.users_removed:
            return self._check("collaborative", None, f"{known} cannot be told, because there is no record of these.")
        return self._check("collaborative", False, f"{known} is not what the record of the training says.")

    def _seen(self) -> Check:
        """Whether the seen items, which are never recommended, are exactly those of the training."""
        users = self.store.ids("user")
        lists = self.store.seen(users)
        rows = np.repeat(self.data.index["user"].rows(users), [len(one) for one in lists])
        items = self.data.index["item"].rows([item for one in lists for item in one])
        return self._same_pairs("seen", "the seen items of the store", self.data.keys(rows, items))

    def _same_pairs(self, name: str, what: str, found: np.ndarray) -> Check:
        """Whether `found` `[n]` are the pairs of the training, each once, and more only where something was added since."""
        expected, held_out = self.data.pairs(*self.trained), self.data.pairs(*self.held_out)
        trained, never = " + ".join(self.trained), " and ".join(self.held_out)
        leaked, missing = np.intersect1d(found, held_out), np.setdiff1d(expected, found)
        more = len(found) - len(np.intersect1d(found, expected))
        if len(leaked):
            finding = (
                f"{what} hold {len(leaked)} of the {len(held_out)} pairs of {never}, such as {self.data.named(leaked[0])}"
                f"{', perhaps added after the training: then what was measured before still holds' * self.added}."
            )
        elif len(missing):
            finding = f"{what} lack {len(missing)} of the {len(expected)} pairs of {trained}, such as {self.data.named(missing[0])}."
        elif more and not self.added:
            finding = f"{what} are {len(found)} pairs, {more} more than the {len(expected)} of {trained}, and nothing was added since."
        else:
            others = f" and {more} that were added after the training" if more else ", no more and no fewer"
            finding = f"{what} are the {len(expected)} pairs of {trained}{others}, and none of the {len(held_out)} of {never}."
            return self._check(name, True, finding)
        return self._check(name, False, finding)

    def _vectors(self) -> Check:
        """Whether the vectors of the store are those that the collaborative model gives."""
        vectors = self.model.user_embeddings(), self.model.item_embeddings()
        if self.recipe["collaborative"]["augment_norm"]:
            vectors = augment_norm(*vectors)
        compared, wrong, foreign = 0, [], []
        for kind, expected in zip(KINDS, vectors):
            ids = self.store.ids(kind)
            rows = self.ids[kind].rows(ids)
            foreign += [f"{kind} {ids[row]!r}" for row in np.flatnonzero(rows < 0)]
            known = np.flatnonzero(rows >= 0)
            expected = expected[torch.from_numpy(rows[known])]
            error = (self.store.vectors(kind)[torch.from_numpy(known)] - expected).norm(dim=1)
            far = error > TOLERANCE * expected.norm(dim=1)
            wrong += [f"{kind} {ids[row]!r}" for row in known[far.numpy()]]
            compared += len(expected)
        if wrong:
            finding = (
                f"the vectors of {len(wrong)} of {compared} users and items, such as {wrong[0]}, are not those that the "
                "collaborative model gives"
            )
        elif foreign and not self.added:
            finding = f"{len(foreign)} users and items of the store, such as {foreign[0]}, are unknown to the collaborative model"
        else:
            newcomers = f"; {len(foreign)} were added after the training" if foreign else ""
            finding = (
                f"the vectors of {compared} users and items are those that the collaborative model gives{newcomers}."
            )
            return self._check("vectors", True, finding)
        if self.added:
            return self._check("vectors", None, f"{finding}; vectors were added after the training.")
        if self.users_removed:
            return self._check("vectors", None, f"{finding}; users were removed after the training, with their edges.")
        return self._check("vectors", False, f"{finding}, and nothing was added since.")

    def _codes(self) -> Check:
        """Whether the codes of the tokenizer are those that the MQ-Tokenizers give for the vectors of the store."""
        t5_spaces = read_json(self.folder / "config.json")["space_ids"]
        compared, wrong = 0, []
        for kind in KINDS:
            mq = MQTokenizerModel.from_pretrained(self.folder / f"mq_{kind}")
            spaces = {self.tokenizer.space_ids[kind], self.store.space_ids[kind], t5_spaces[kind]}
            ids = self.store.ids(kind)
            if spaces != {mq.space_id}:
                finding = (
                    f"tokenizer, store and T5 do not all have the space_id {mq.space_id} of the {kind} MQ-Tokenizer."
                )
                return self._check("codes", False, finding)
            if different := set(ids) ^ set(self.tokenizer.ids(kind)):
                finding = (
                    f"{len(different)} {kind}s, such as {min(different)!r}, are in one of tokenizer and store only."
                )
                return self._check("codes", False, finding)
            codes = torch.from_numpy(self.tokenizer.codes(kind, ids))
            unlike = (codes != mq.encode(self.store.vectors(kind))).any(dim=1).nonzero()[:, 0]
            wrong += [f"{kind} {ids[row]!r}" for row in unlike.tolist()]
            compared += len(ids)
        gives = "those that the MQ-Tokenizers, which have the space_id of tokenizer, store and T5, give for the vectors"
        if wrong:
            finding = f"the codes of {len(wrong)} of {compared} users and items, such as {wrong[0]}, are not {gives}."
        else:
            finding = f"the codes of {compared} users and items are {gives}."
        return self._check("codes", not wrong, finding)

    def _prompts(self, split: str) -> Check:
        """Whether each item that a prompt of evaluation names is one that the user had before the one asked for."""
        asked, before = self.data.rows[split], SPLITS[: SPLITS.index(split)]
        prompts, users, codes = self._prompted(split)
        own = self.tokenizer.codes("item", self.data.index["item"].ids())
        # A prompt names codes, which several items may share: it may name them as often as the history has such items.
        _, group = np.unique(np.concatenate([own, codes]), axis=0, return_inverse=True)
        group, groups = group.reshape(-1), group.max() + 1
        of_item, of_named = group[: len(own)], group[len(own) :]
        history = np.divmod(np.setdiff1d(self.data.pairs(*before), self.data.pairs(split)), len(own))
        allowed, most = np.unique(history[0] * groups + of_item[history[1]], return_counts=True)
        _, first, times = np.unique(prompts * groups + of_named, return_index=True, return_counts=True)
        named = users[first] * groups + of_named[first]
        at = np.minimum(np.searchsorted(allowed, named), len(allowed) - 1)
        foreign = np.unique(named[times > np.where(allowed[at] == named, most[at], 0)])
        leaked = np.intersect1d(foreign, asked["user"] * groups + of_item[asked["item"]])
        asks = (
            f"{len(TEMPLATES)} kinds of prompts for {len(asked['user'])} users, made by the collator and decoded, name"
        )
        if len(leaked):
            finding = (
                f"{asks} the {split} items of {len(leaked)} of them, such as {self.data.user(leaked[0] // groups)}."
            )
        elif len(foreign):
            finding = (
                f"{asks} {len(foreign)} items that were not in the history before the {split} item, such as for "
                f"{self.data.user(foreign[0] // groups)}."
            )
        else:
            finding = f"{asks} {len(codes)} items, all from the user's history before the {split} item, and never that."
        return self._check("prompts", not len(foreign), finding)

    def _prompted(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The items that the prompts of all variants of evaluation name: prompt, user row, int64 `[n]`, and codes `[n, K]`."""
        given = index_splits(self.data.splits, split)
        holdout, token_ids = given.holdout, self.tokenizer.code_token_ids("item")
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number, templates in enumerate(TEMPLATES.values()):
            collator = evaluation_collator(self.tokenizer, given, self.recipe, templates)
            examples = PromptDataset(holdout.users, holdout.targets)
            for start in range(0, len(examples), BATCH):
                rows = range(start, min(start + BATCH, len(examples)))
                row, codes = named_items(collator([examples[row] for row in rows])["input_ids"].numpy(), token_ids)
                found.append((number * len(examples) + start + row, codes))
        prompts, codes = (np.concatenate(parts) for parts in zip(*found))
        users = self.data.index["user"].rows(given.user_ids)[holdout.users[prompts % len(holdout.users)]]
        return prompts, users, codes


def named_items(prompts: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items that prompts name, read back from their tokens.

    Args:
        prompts: int64 `[B, T]`.
        token_ids: the vocabulary id of each code token of items, int64 `[K, L]`.

    Returns:
        The prompt of each item, int64 `[n]`, and its codes, int64 `[n, K]`; -1 where the tokens of an item are not whole.
    """
    books, size = token_ids.shape
    book = np.full(max(prompts.max(), token_ids.max()) + 1, -1)
    word = book.copy()
    book[token_ids], word[token_ids] = np.arange(books)[:, None], np.arange(size)
    row, column = np.nonzero(book[prompts] == 0)
    columns = np.minimum(column[:, None] + np.arange(books), prompts.shape[1] - 1)
    tokens = prompts[row[:, None], columns]
    return row, np.where(book[tokens] == np.arange(books), word[tokens], -1)
