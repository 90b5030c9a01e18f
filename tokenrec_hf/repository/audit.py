"""The leak audit: whether any part of a trained repository has seen its held-out items.

The audit reads the content of the files, not the records of their making: the splits, the edges of the collaborative model,
the seen items and vectors of the store, the codes of the tokenizer, and the prompts of the evaluation. A check is undecided
where the files do not suffice. Section III-A of TokenRec (arXiv 2406.10450) is the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import DatasetDict

from ..data.collator import PromptDataset
from ..data.splits import SPLITS, fingerprint, index_splits
from ..evaluation.ranking import evaluation_collator
from ..evaluation.variants import VARIANTS
from ..models.codes import COLLABORATIVE, IdIndex, RepositoryFolder, check_repository, current, read_json
from ..models.embedding_store import KINDS, EmbeddingStore
from ..models.modeling_collaborative import load_collaborative
from ..models.modeling_mq_tokenizer import MQTokenizerModel
from ..models.recommender import load_model
from ..models.tokenization_tokenrec import TokenRecTokenizer
from ..training.recipe import Recipe
from .repository import REFIT, SELECTION, Repository

# Relative error of a vector by rounding.
TOLERANCE = 1e-3
# Prompts that are decoded at once.
BATCH = 1024
# Whether a check has passed, and its finding.
Result = tuple[bool | None, str]


@dataclass(frozen=True)
class Check:
    """The result of a check of [`audit`] or [`~verify.verify`].

    Args:
        run: the part that was checked, such as `data`, or a run of the training, `selection` or `refit`.
        name: what was checked.
        passed: None where the files do not suffice to decide.
        finding: one sentence with the compared parts, the number of rows and the result.
    """

    run: str
    name: str
    passed: bool | None
    finding: str


def audit(repository: Repository) -> list[Check]:
    """Checks that no part of a trained repository has seen its held-out items.

    After an addition, a repository may know more than the training interactions, but none of the held-out items. Comparisons
    that an addition or a removal has made impossible are undecided.

    Args:
        repository: a finished repository with its folder `training`, which repositories from the Hub do not have.

    Raises:
        FileNotFoundError: the repository is unfinished, or without the folder `training`.
        ValueError: a file is damaged.
    """
    check_repository(repository.folder)
    data, run = _Data(repository.splits()), read_json(repository.record("run"))
    users_removed = len(data.index["user"]) < repository.metrics["users"]
    checks = [
        Check("data", "splits", *_splits(data)),
        Check("data", "order", *_order(data, repository.metrics.get("split_at"))),
        Check("data", "fingerprint", *_fingerprint(data, run["data"], users_removed)),
    ]
    parts = [(SELECTION, repository, ["validation", "test"])]
    if run["refit"]:
        parts = [(SELECTION, Repository(repository.selection), ["validation"]), (REFIT, repository, ["test"])]
    for name, place, evaluated in parts:
        recorded = read_json(repository.record(name))[COLLABORATIVE].get("trained_on")
        # The recipe of the repository has no `auto` any more, that of the run may.
        files = _RunFiles(name, place, data, repository.recipe, users_removed)
        checks += [
            Check(name, COLLABORATIVE, *files.collaborative(recorded)),
            Check(name, "seen", *files.seen()),
            Check(name, "vectors", *files.vectors()),
            Check(name, "codes", *files.codes()),
            *(Check(name, "prompts", *files.prompts(split)) for split in evaluated),
        ]
    return checks


class _Data:
    """The splits in rows; a pair is one number, user row * number of items + item row."""

    def __init__(self, splits: DatasetDict):
        self.splits = splits
        names = {split: {kind: splits[split][f"{kind}_id"][:] for kind in KINDS} for split in SPLITS}
        self.index = {
            kind: IdIndex(dict.fromkeys(name for split in SPLITS for name in names[split][kind]), kind)
            for kind in KINDS
        }
        self.rows = {split: {kind: self.index[kind].rows(names[split][kind]) for kind in KINDS} for split in SPLITS}
        self.fingerprint = fingerprint(*(names[split][kind] for split in SPLITS for kind in KINDS))

    def pairs(self, *names: str) -> np.ndarray:
        """The pairs of splits, int64 `[n]`, in their order."""
        return np.concatenate([self.keys(*self.rows[name].values()) for name in names])

    def keys(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The pairs of rows; -1 where the user or item is unknown."""
        return np.where((users < 0) | (items < 0), -1, users * len(self.index["item"]) + items)

    def user(self, row: int) -> str:
        """The user, for messages."""
        return f"user {self.index['user'][int(row)]!r}"

    def named(self, pair: int) -> str:
        """A pair, for messages."""
        user, item = divmod(int(pair), len(self.index["item"]))
        return f"{self.user(user)} and item {self.index['item'][item]!r}"


# The data -------------------------------------------------------------------------------------------------------------


def _splits(data: _Data) -> Result:
    """Whether each user has one validation and one test item, and no pair is in two splits."""
    pairs, (train, validation, test) = data.pairs(*SPLITS), (data.rows[name]["user"] for name in SPLITS)
    unique, counts = np.unique(pairs, return_counts=True)
    if len(repeated := unique[counts > 1]):
        return False, (
            f"of the {len(unique)} pairs of the three splits, {len(repeated)} are there more than once, such as "
            f"{data.named(repeated[0])}."
        )
    held_out = np.union1d(validation, test)
    if not all(np.array_equal(np.sort(users), held_out) for users in (validation, test)):
        return False, (
            f"not every user has one validation item and one test item: there are {len(validation)} and {len(test)} of them."
        )
    if len(untrained := np.setdiff1d(test, train)):
        return (
            False,
            f"{len(untrained)} of {len(test)} users, such as {data.user(untrained[0])}, have only held-out items.",
        )
    return True, (
        f"of {len(test)} users one item each is held out for validation and one for test, and none of the {len(pairs)} "
        "(user, item) pairs is in two splits."
    )


def _order(data: _Data, split_at: str | None) -> Result:
    """Whether the test item is a user's last, the validation item the last but one, and the rest in order.

    After a temporal split, whether all that is trained on is earlier than all test items.
    """
    users = np.concatenate([data.rows[name]["user"] for name in SPLITS])
    if "timestamp" not in data.splits["train"].column_names:
        return None, (
            f"the {len(users)} interactions have no timestamps: they were taken to be in time order, which the files cannot "
            "confirm."
        )
    times = np.concatenate([np.asarray(data.splits[name]["timestamp"][:]) for name in SPLITS])
    if split_at is not None:
        tested = len(data.rows["test"]["user"])
        latest, earliest = times[:-tested].max(), times[-tested:].min()
        if latest >= earliest:
            return False, (
                f"the data were split at {split_at}, but the last training or validation interaction, of time {latest}, is not "
                f"earlier than the first test item, of time {earliest}."
            )
    order = np.argsort(users, kind="stable")
    users, times = users[order], times[order]
    back = np.flatnonzero((users[1:] == users[:-1]) & (times[1:] < times[:-1]))
    if len(back):
        return False, (
            f"the timestamps of {len(users)} interactions, in the order train, validation, test of each user, go back "
            f"{len(back)} times, first for {data.user(users[back[0]])}."
        )
    return True, (
        f"by the timestamps of {len(users)} interactions, every user's test item is the last, the validation item the last but "
        "one, and the training interactions are in order."
        + f" All that is trained on is earlier than the first test item (split at {split_at})."
        * (split_at is not None)
    )


def _fingerprint(data: _Data, expected: str, users_removed: bool) -> Result:
    """Whether the splits are those of the training."""
    interactions = f"the {len(data.pairs(*SPLITS))} interactions of the three splits"
    if data.fingerprint == expected:
        return True, f"{interactions} have the fingerprint that was taken before the training."
    if users_removed:
        return None, f"{interactions} cannot be compared with those of the training, because users have been removed."
    return False, f"{interactions} have another fingerprint than those of the training."


def codes_and_vectors(parts: RepositoryFolder, tokenizer: TokenRecTokenizer, store: EmbeddingStore) -> Result:
    """Whether the codes of a tokenizer, and T5's part of item vectors, are those of the vectors of a store."""
    t5_spaces = read_json(parts.path / "config.json")["space_ids"]
    compared, wrong = 0, []
    for kind in KINDS:
        mq, ids = MQTokenizerModel.from_pretrained(parts.mq(kind)), store.ids(kind)
        if {tokenizer.space_ids[kind], store.space_ids[kind], t5_spaces[kind]} != {mq.space_id}:
            return (
                False,
                f"tokenizer, store and T5 do not all have the space_id {mq.space_id} of the {kind} MQ-Tokenizer.",
            )
        if other := set(ids) ^ set(tokenizer.ids(kind)):
            return False, f"{len(other)} {kind}s, such as {min(other)!r}, are in one of tokenizer and store only."
        codes = torch.from_numpy(tokenizer.codes(kind, ids))
        vectors = store.vectors(kind)[:, : mq.config.embedding_dim]
        differs = (codes != mq.encode(vectors)).any(dim=1)
        if kind == "item" and vectors.shape[1] < store.embedding_dim:
            learned = load_model(parts.path).item_vectors(vectors, tokenizer.item_tokens(ids))
            differs |= (store.vectors(kind) - learned).norm(dim=1) > TOLERANCE * learned.norm(dim=1)
        unlike = differs.nonzero()[:, 0]
        wrong += [f"{kind} {ids[row]!r}" for row in unlike.tolist()]
        compared += len(ids)
    subject = (
        f"{len(wrong)} of {compared} users and items, such as {wrong[0]}, are not"
        if wrong
        else (f"{compared} users and items are")
    )
    return not wrong, (
        f"the codes of {subject} those of the vectors by the MQ-Tokenizers, which have the space_id of tokenizer, store and T5."
    )


# The files of a run ---------------------------------------------------------------------------------------------------


class _RunFiles:
    """The files of one run of the training, `SELECTION` or `REFIT`, with the interactions that they are compared to."""

    def __init__(self, run: str, repository: Repository, data: _Data, recipe: Recipe, users_removed: bool):
        self.parts, self.data, self.recipe, self.users_removed = repository.parts, data, recipe, users_removed
        self.added = current(self.parts.additions).is_file()
        self.trained = SPLITS[: 1 if run == SELECTION else 2]
        self.held_out = SPLITS[len(self.trained) :]
        self.store = EmbeddingStore.open(self.parts.store)
        self.tokenizer = TokenRecTokenizer.from_pretrained(self.parts.path)
        self.model, self.ids = load_collaborative(self.parts.collaborative)

    def collaborative(self, recorded: str | None) -> Result:
        """Whether the model was trained on exactly the training interactions, by its edges or their `recorded` fingerprint."""
        if (edges := self.model.interactions()) is not None:
            users, items = (self.data.index[kind].rows(self.ids[kind].ids(rows)) for kind, rows in zip(KINDS, edges))
            return self._same_pairs("the edges of the model", self.data.keys(users, items))
        # By user as in the training, each user's in time order.
        users, items = (np.concatenate([self.data.rows[split][kind] for split in self.trained]) for kind in KINDS)
        order = np.argsort(users, kind="stable")
        mine = fingerprint(self.data.index["user"].ids(users[order]), self.data.index["item"].ids(items[order]))
        known = f"the model keeps no edges; its training on the {len(users)} pairs of {' + '.join(self.trained)}"
        if recorded == mine:
            return True, f"{known} is what the record of the training says."
        if recorded is None or self.users_removed:
            return None, f"{known} cannot be confirmed, because there is no record of these pairs."
        return False, f"{known} is not what the record of the training says."

    def seen(self) -> Result:
        """Whether the seen items, which are never recommended, are exactly the training interactions."""
        users = self.store.ids("user")
        lists = self.store.seen(users)
        rows = np.repeat(self.data.index["user"].rows(users), [len(items) for items in lists])
        items = self.data.index["item"].rows([item for items in lists for item in items])
        return self._same_pairs("the seen items of the store", self.data.keys(rows, items))

    def _same_pairs(self, source: str, found: np.ndarray) -> Result:
        """Whether `found` `[n]` are the training pairs, each once; further pairs are allowed after an addition."""
        expected, held_out = self.data.pairs(*self.trained), self.data.pairs(*self.held_out)
        trained, never = " + ".join(self.trained), " and ".join(self.held_out)
        if len(leaked := np.intersect1d(found, held_out)):
            since = ", perhaps added after the training: then earlier measurements still hold" * self.added
            return False, (
                f"{source} hold {len(leaked)} of the {len(held_out)} pairs of {never}, such as {self.data.named(leaked[0])}{since}."
            )
        if len(missing := np.setdiff1d(expected, found)):
            example = self.data.named(missing[0])
            return False, f"{source} lack {len(missing)} of the {len(expected)} pairs of {trained}, such as {example}."
        more = len(found) - len(np.intersect1d(found, expected))
        if more and not self.added:
            return (
                False,
                f"{source} are {len(found)} pairs, {more} more than the {len(expected)} of {trained}; nothing was added since.",
            )
        others = f" and {more} that were added after the training" if more else ", no more and no fewer"
        return (
            True,
            f"{source} are the {len(expected)} pairs of {trained}{others}, and none of the {len(held_out)} of {never}.",
        )

    def vectors(self) -> Result:
        """Whether the vectors of the store are those of the collaborative model."""
        vectors = self.model.user_embeddings(), self.model.item_embeddings()
        compared, wrong, foreign = 0, [], []
        for kind, expected in zip(KINDS, vectors):
            ids = self.store.ids(kind)
            rows = self.ids[kind].rows(ids)
            foreign += [f"{kind} {ids[row]!r}" for row in np.flatnonzero(rows < 0)]
            known = np.flatnonzero(rows >= 0)
            expected = expected[torch.from_numpy(rows[known])]
            stored = self.store.vectors(kind)[torch.from_numpy(known), : expected.shape[1]]
            error = (stored - expected).norm(dim=1)
            far = error > TOLERANCE * expected.norm(dim=1)
            wrong += [f"{kind} {ids[row]!r}" for row in known[far.numpy()]]
            compared += len(expected)
        if wrong:
            finding = f"the vectors of {len(wrong)} of {compared} users and items, such as {wrong[0]}, are not those of the model"
        elif foreign and not self.added:
            finding = f"{len(foreign)} users and items of the store, such as {foreign[0]}, are unknown to the model"
        else:
            others = f"; {len(foreign)} were added after the training" if foreign else ""
            return True, f"the vectors of {compared} users and items are those of the collaborative model{others}."
        if self.added:
            return None, f"{finding}; vectors were added after the training."
        if self.users_removed:
            return None, f"{finding}; users were removed after the training, with their edges."
        return False, f"{finding}, and nothing was added since."

    def codes(self) -> Result:
        """Whether the codes of the tokenizer, and T5's part of item vectors, are those of the vectors of the store."""
        return codes_and_vectors(self.parts, self.tokenizer, self.store)

    def prompts(self, split: str) -> Result:
        """Whether the evaluation prompts name only items of the user's history before the held-out item."""
        asked, before = self.data.rows[split], SPLITS[: SPLITS.index(split)]
        prompts, users, codes = self._prompted(split)
        own = self.tokenizer.codes("item", self.data.index["item"].ids())
        # A prompt names codes, which several items may share: as often as there are such items in the history.
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
            f"{len(VARIANTS)} kinds of prompts for {len(asked['user'])} users, made by the collator and decoded, name"
        )
        if len(leaked):
            user = self.data.user(leaked[0] // groups)
            return False, f"{asks} the {split} items of {len(leaked)} of them, such as {user}."
        if len(foreign):
            user = self.data.user(foreign[0] // groups)
            return (
                False,
                f"{asks} {len(foreign)} items that were not in the history before the {split} item, such as for {user}.",
            )
        return (
            True,
            f"{asks} {len(codes)} items, all from the user's history before the {split} item, and never this item.",
        )

    def _prompted(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The items in the prompts of all variants: number of the prompt, user row, int64 `[n]`, and codes `[n, K]`."""
        given = index_splits(self.data.splits, split)
        holdout, token_ids = given.holdout, self.tokenizer.code_token_ids("item")
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number, variant in enumerate(VARIANTS.values()):
            collator = evaluation_collator(self.tokenizer, given, self.recipe.collator_arguments, variant.templates)
            examples = PromptDataset(holdout.users, holdout.targets)
            for start in range(0, len(examples), BATCH):
                rows = range(start, min(start + BATCH, len(examples)))
                row, codes = named_items(collator([examples[row] for row in rows])["input_ids"].numpy(), token_ids)
                found.append((number * len(examples) + start + row, codes))
        prompts, codes = (np.concatenate(parts) for parts in zip(*found))
        users = self.data.index["user"].rows(given.user_ids)[holdout.users[prompts % len(holdout.users)]]
        return prompts, users, codes


def named_items(prompts: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items in prompts, decoded from their tokens.

    Args:
        prompts: int64 `[B, T]`.
        token_ids: the vocabulary id of each code token of items, int64 `[K, L]`.

    Returns:
        The prompt of each item, int64 `[n]`, and its codes, int64 `[n, K]`; -1 where tokens of an item are missing.
    """
    books, size = token_ids.shape
    book = np.full(max(prompts.max(), token_ids.max()) + 1, -1)
    word = book.copy()
    book[token_ids], word[token_ids] = np.arange(books)[:, None], np.arange(size)
    row, column = np.nonzero(book[prompts] == 0)
    columns = np.minimum(column[:, None] + np.arange(books), prompts.shape[1] - 1)
    tokens = prompts[row[:, None], columns]
    return row, np.where(book[tokens] == np.arange(books), word[tokens], -1)
