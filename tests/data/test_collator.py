import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenrec_hf.data.collator import IGNORED, DataCollatorForGenerativeRetrieval, PromptDataset
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.prompts import (
    HISTORY_TEMPLATES,
    SEEN_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    PromptTemplate,
    render,
)
from tokenrec_hf.training.initialization import build_tokenizer
from tokenrec_hf.training.recipe import Recipe

MODELS = Path(os.environ.get("TOKENREC_MODELS_DIR") or Path(__file__).parents[3] / "shared" / "models")
REAL = MODELS / "t5_tokenizer" / "spiece.model"
needs_t5 = pytest.mark.skipif(not REAL.exists(), reason=f"no T5 vocabulary at {REAL}; set TOKENREC_MODELS_DIR")
VOCABULARIES = ["bundled", pytest.param("real", marks=[pytest.mark.data, needs_t5])]

NUM_USERS, NUM_ITEMS = 24, 60
USER_IDS = [f"u-{row}" for row in range(NUM_USERS)]
ITEM_IDS = [f"B00{row}x" for row in range(NUM_ITEMS)]
EVERY_TEMPLATE = (*SEEN_TEMPLATES, UNSEEN_TEMPLATE)


class FakeMQ:
    """An MQ-Tokenizer that takes the vectors as codes."""

    def __init__(self, num_codebooks, codebook_size, space_id):
        self.config = SimpleNamespace(num_codebooks=num_codebooks, codebook_size=codebook_size, embedding_dim=3)
        self.space_id = space_id

    def encode(self, vectors):
        return vectors[:, : self.config.num_codebooks].long()


@pytest.fixture(scope="module")
def make_tokenizer():
    made = {}

    def make(vocabulary="bundled"):
        if vocabulary not in made:
            store, random = EmbeddingStore(3), np.random.default_rng(0)
            store.upsert("user", USER_IDS, random.integers(0, 16, (NUM_USERS, 3)).astype(np.float32))
            # Each item has codes of its own.
            codes = np.stack(np.divmod(random.permutation(16**2)[:NUM_ITEMS], 16), axis=1)
            store.upsert("item", ITEM_IDS, np.pad(codes, ((0, 0), (0, 1))).astype(np.float32))
            made[vocabulary] = build_tokenizer(
                None if vocabulary == "bundled" else REAL,
                user_mq=FakeMQ(3, 16, "users"),
                item_mq=FakeMQ(2, 16, "items"),
                store=store,
            )
        return made[vocabulary]

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


def matrix_of(histories):
    """An interaction matrix of the item rows that each user has, in time order."""
    users = [user for user, items in enumerate(histories) for _ in items]
    items = [item for items in histories for item in items]
    return InteractionMatrix(np.array(users, dtype=int), np.array(items, dtype=int), NUM_USERS, NUM_ITEMS)


def random_histories(seed=0):
    """Histories of every length: empty, one interaction, a few, many."""
    random = np.random.default_rng(seed)
    lengths = [0, 1, 1, 2, 2, 3, 40, NUM_ITEMS - 1, *random.integers(1, 30, NUM_USERS - 8)]
    return [random.permutation(NUM_ITEMS)[:length].tolist() for length in lengths]


HISTORIES = random_histories()
ACTIVE = [user for user in range(NUM_USERS) if HISTORIES[user]]


def make_collator(tokenizer, histories=HISTORIES, **settings):
    return DataCollatorForGenerativeRetrieval(tokenizer, matrix_of(histories), USER_IDS, ITEM_IDS, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_history": 0}, "max_history is 0; it must be at least 1"),
        ({"num_negatives": -1}, "num_negatives is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"templates": []}, "there are no templates to choose from"),
        ({"evaluation_templates": ()}, "there are no templates to choose from"),
    ],
)
def test_impossible_settings_are_named(tokenizer, settings, says):
    with pytest.raises(ValueError, match=says):
        make_collator(tokenizer, **settings)


def training_batch(collator, users=ACTIVE, epoch=0):
    dataset = PromptDataset(np.array(users))
    dataset.set_epoch(epoch)
    return collator([dataset[row] for row in range(len(users))])


def evaluation_batch(collator, users, targets=None):
    dataset = PromptDataset(np.array(users), np.zeros(len(users), dtype=int) if targets is None else np.array(targets))
    return collator([dataset[row] for row in range(len(users))])


def prompt_tokens(batch, row):
    """The tokens of one prompt, without padding."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


def items_in(values):
    return [item for item in values.tolist() if item != IGNORED]


def history_of(collator, batch, row):
    """The items that a prompt shows, found by their tokens."""
    items = {tuple(tokens): item for item, tokens in enumerate(collator.item_tokens.tolist())}
    assert len(items) == NUM_ITEMS
    tokens, width = prompt_tokens(batch, row), collator.item_tokens.shape[1]
    spans = (tuple(tokens[start : start + width]) for start in range(len(tokens)))
    return [items[span] for span in spans if span in items]


def tokens_of(tokenizer, template, user, items):
    return tokenizer(render(template, USER_IDS[user], [ITEM_IDS[item] for item in items]))["input_ids"]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("template", EVERY_TEMPLATE, ids=lambda template: template.text)
def test_an_evaluation_prompt_is_the_tokenized_text_of_the_template(make_tokenizer, vocabulary, template):
    tokenizer = make_tokenizer(vocabulary)
    collator = make_collator(tokenizer, evaluation_templates=(template,), templates=(template,), shuffle_history=False)
    batch = evaluation_batch(collator, range(NUM_USERS), targets=range(NUM_USERS))
    expected = [tokens_of(tokenizer, template, user, HISTORIES[user]) for user in range(NUM_USERS)]
    assert [prompt_tokens(batch, user) for user in range(NUM_USERS)] == expected
    # Equal to the tokenized texts, padding included.
    texts = [render(template, USER_IDS[u], [ITEM_IDS[item] for item in HISTORIES[u]]) for u in range(NUM_USERS)]
    tokenized = tokenizer(texts, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], tokenized[name])
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [[user] for user in range(NUM_USERS)]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_training_prompt_is_the_tokenized_text_of_one_of_the_templates(make_tokenizer, vocabulary):
    tokenizer = make_tokenizer(vocabulary)
    collator = make_collator(tokenizer)
    used = set()
    for epoch in range(6):
        batch = training_batch(collator, epoch=epoch)
        for row, user in enumerate(ACTIVE):
            history = history_of(collator, batch, row)
            matching = [
                template
                for template in SEEN_TEMPLATES
                if template.uses_history == bool(history)
                and tokens_of(tokenizer, template, user, history) == prompt_tokens(batch, row)
            ]
            assert len(matching) == 1
            used.update(matching)
    assert used == set(SEEN_TEMPLATES)


def test_templates_are_drawn_evenly(tokenizer):
    collator = make_collator(tokenizer, [[0, 1, 2]] * NUM_USERS)
    batches = [training_batch(collator, range(NUM_USERS), epoch) for epoch in range(40)]
    with_history = sum(bool(history_of(collator, batch, row)) for batch in batches for row in range(NUM_USERS))
    # Half of the ten; four standard deviations of a binomial.
    assert abs(with_history / (40 * NUM_USERS) - 0.5) < 4 * 0.5 / (40 * NUM_USERS) ** 0.5


histories_of_all = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=12), min_size=NUM_USERS, max_size=NUM_USERS
).filter(any)


@settings(max_examples=40, deadline=None)
@given(
    histories=histories_of_all,
    epoch=st.integers(0, 50),
    max_history=st.integers(1, 8),
    train_history=st.none() | st.integers(1, 8),
    shuffle=st.booleans(),
)
def test_history_and_target_are_disjoint_parts_of_the_interactions(
    tokenizer, histories, epoch, max_history, train_history, shuffle
):
    collator = make_collator(
        tokenizer,
        histories,
        max_history=max_history,
        train_history=train_history,
        shuffle_history=shuffle,
    )
    users = PromptDataset.for_training(collator.interactions).users
    assert users.tolist() == [user for user in range(NUM_USERS) if histories[user]]
    batch = training_batch(collator, users, epoch)
    assert batch["labels"].shape == (len(users), 1)
    for row, user in enumerate(users):
        history, target = history_of(collator, batch, row), batch["labels"][row].item()
        assert target not in history and len(history) == len(set(history))
        assert {*history, target} <= set(histories[user])
        assert len(history) <= min(max_history, train_history or max_history)


def test_a_history_has_any_length_up_to_the_longest_allowed(tokenizer):
    collator = make_collator(tokenizer, [list(range(10))] * NUM_USERS, templates=HISTORY_TEMPLATES, train_history=6)
    batches = [training_batch(collator, range(NUM_USERS), epoch) for epoch in range(20)]
    lengths = {len(history_of(collator, batch, row)) for batch in batches for row in range(NUM_USERS)}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_every_item_of_a_user_comes_to_be_a_target(tokenizer):
    collator = make_collator(tokenizer, [list(range(8))] * NUM_USERS)
    labels = {
        label for epoch in range(10) for label in training_batch(collator, epoch=epoch)["labels"].flatten().tolist()
    }
    assert labels == set(range(8))


def test_a_user_with_one_interaction_gets_a_prompt_without_history(tokenizer):
    collator = make_collator(tokenizer, [[5]] * NUM_USERS)
    for epoch in range(3):
        batch = training_batch(collator, range(NUM_USERS), epoch)
        assert batch["labels"].tolist() == [[5]] * NUM_USERS
        for user in range(NUM_USERS):
            without = [tokens_of(tokenizer, template, user, ()) for template in USER_ONLY_TEMPLATES]
            assert prompt_tokens(batch, user) in without


def test_a_given_target_is_the_only_label(tokenizer):
    batch = evaluation_batch(make_collator(tokenizer), [6, 7], targets=[11, 12])
    assert batch["labels"].tolist() == [[11], [12]]


def test_a_user_without_history_is_evaluated_with_a_prompt_without_history(tokenizer):
    batch = evaluation_batch(make_collator(tokenizer), [0, 3])
    assert prompt_tokens(batch, 0) in [tokens_of(tokenizer, one, 0, ()) for one in USER_ONLY_TEMPLATES]


def test_the_shortest_history_is_shown(tokenizer):
    collator = make_collator(tokenizer, [[5]] * NUM_USERS)
    batch = evaluation_batch(collator, [0, 1])
    assert [history_of(collator, batch, row) for row in (0, 1)] == [[5], [5]]
    collator = make_collator(tokenizer, [[5, 6]] * NUM_USERS)
    batch = training_batch(collator, range(NUM_USERS))
    assert {len(history_of(collator, batch, row)) for row in range(NUM_USERS)} == {0, 1}


def test_without_a_template_for_it_an_empty_history_leaves_the_words_around_it(tokenizer):
    collator = make_collator(tokenizer, [[5]] * NUM_USERS, templates=HISTORY_TEMPLATES[:1])
    batch = training_batch(collator, range(NUM_USERS))
    for user in range(NUM_USERS):
        assert prompt_tokens(batch, user) in [tokens_of(tokenizer, one, user, ()) for one in HISTORY_TEMPLATES]
        assert batch["labels"][user].tolist() == [5]


@pytest.mark.parametrize(("max_length", "max_history"), [(40, 100), (61, 100), (512, 7), (64, 9), (512, 100)])
@pytest.mark.parametrize("template", [*HISTORY_TEMPLATES, UNSEEN_TEMPLATE], ids=lambda template: template.text)
def test_the_latest_items_that_fit_are_kept_and_never_a_part_of_one(tokenizer, template, max_length, max_history):
    collator = make_collator(
        tokenizer,
        templates=(template,),
        evaluation_templates=(template,),
        max_length=max_length,
        max_history=max_history,
        shuffle_history=False,
    )
    batch = evaluation_batch(collator, ACTIVE)
    assert batch["input_ids"].shape[1] <= max_length
    for row, user in enumerate(ACTIVE):
        kept = HISTORIES[user][-max_history:]
        while len(tokens_of(tokenizer, template, user, kept)) > max_length:
            kept = kept[1:]
        assert history_of(collator, batch, row) == kept
        assert prompt_tokens(batch, row) == tokens_of(tokenizer, template, user, kept)


def test_a_history_is_by_default_as_long_as_in_the_recipes(tokenizer):
    collator = make_collator(tokenizer, [[*range(NUM_ITEMS)] * 3] * NUM_USERS, max_length=2048)
    batch = evaluation_batch(collator, [0])
    assert len(history_of(collator, batch, 0)) == Recipe.load("paper").prompts.max_history < 3 * NUM_ITEMS


@pytest.mark.parametrize("max_length", [40, 61])
def test_training_prompts_are_no_longer_than_asked_for(tokenizer, max_length):
    collator = make_collator(tokenizer, templates=HISTORY_TEMPLATES, max_length=max_length)
    longest = 0
    for epoch in range(20):
        batch = training_batch(collator, epoch=epoch)
        longest = max(longest, batch["input_ids"].shape[1])
        for row, user in enumerate(ACTIVE):
            history = history_of(collator, batch, row)
            assert prompt_tokens(batch, row) in [tokens_of(tokenizer, one, user, history) for one in HISTORY_TEMPLATES]
    item_width = collator.item_tokens.shape[1]
    assert max_length - item_width < longest <= max_length


def test_a_length_without_room_for_an_item_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=12 leaves no room for a single history item"):
        make_collator(tokenizer, max_length=12)


def test_history_is_in_time_order_where_it_is_not_shuffled(tokenizer):
    collator = make_collator(tokenizer, templates=HISTORY_TEMPLATES, shuffle_history=False)
    for epoch in range(3):
        batch = training_batch(collator, epoch=epoch)
        for row, user in enumerate(ACTIVE):
            history = history_of(collator, batch, row)
            assert history == [item for item in HISTORIES[user] if item in set(history)]


def test_history_is_shuffled_by_default_with_the_same_items(tokenizer):
    longest = max(ACTIVE, key=lambda user: len(HISTORIES[user]))
    collator = make_collator(tokenizer)
    shuffled = history_of(collator, evaluation_batch(collator, [longest]), 0)
    assert shuffled != HISTORIES[longest]
    assert sorted(shuffled) == sorted(HISTORIES[longest])
    collator = make_collator(tokenizer, max_history=5)
    shorter = history_of(collator, evaluation_batch(collator, [longest]), 0)
    assert sorted(shorter) == sorted(HISTORIES[longest][-5:])


def test_negatives_are_items_that_the_user_never_had(tokenizer):
    collator = make_collator(tokenizer, num_negatives=20)
    drawn = set()
    for epoch in range(5):
        negatives = training_batch(collator, epoch=epoch)["negative_ids"]
        assert negatives.shape == (len(ACTIVE), 20)
        assert negatives.dtype == torch.int64
        for row, user in enumerate(ACTIVE):
            assert not set(negatives[row].tolist()) & set(HISTORIES[user])
            drawn.update(negatives[row].tolist())
    assert drawn == set(range(NUM_ITEMS))


def test_negatives_come_only_where_asked_for(tokenizer):
    batch = training_batch(make_collator(tokenizer))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def row_of(batch, row):
    """Everything that a batch says about one user, without padding."""
    return (
        prompt_tokens(batch, row),
        batch["labels"][row].tolist(),
        batch["negative_ids"][row].tolist(),
    )


@settings(max_examples=30, deadline=None)
@given(users=st.permutations(ACTIVE), size=st.integers(1, len(ACTIVE)), epoch=st.integers(0, 9), shuffle=st.booleans())
def test_the_prompt_of_a_user_does_not_depend_on_the_batch(tokenizer, users, size, epoch, shuffle):
    collator = make_collator(tokenizer, num_negatives=4, shuffle_history=shuffle)
    together = training_batch(collator, ACTIVE, epoch)
    some = users[:size]
    batch = training_batch(collator, some, epoch)
    assert [row_of(batch, row) for row in range(size)] == [row_of(together, ACTIVE.index(user)) for user in some]


def test_epochs_and_seeds_differ_and_repeat(tokenizer):
    def rows(seed, epoch):
        batch = training_batch(make_collator(tokenizer, seed=seed, num_negatives=4), epoch=epoch)
        return [row_of(batch, row) for row in range(len(ACTIVE))]

    first = rows(seed=0, epoch=0)
    assert rows(seed=0, epoch=0) == first
    for other in (rows(seed=0, epoch=1), rows(seed=1, epoch=0)):
        for part in range(3):
            assert [row[part] for row in other] != [row[part] for row in first]


def test_workers_make_the_same_batches(tokenizer):
    collator = make_collator(tokenizer, num_negatives=2)
    dataset = PromptDataset.for_training(collator.interactions)

    def rows(num_workers):
        found = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size=7, collate_fn=collator, num_workers=num_workers):
                found += [row_of(batch, row) for row in range(len(batch["labels"]))]
        return found

    assert rows(2) == rows(0)


def test_a_custom_template_is_used(tokenizer):
    own = PromptTemplate("For {user} with {history} please.")
    collator = make_collator(tokenizer, templates=(own,), shuffle_history=False)
    batch = training_batch(collator, [6])
    assert prompt_tokens(batch, 0) == tokens_of(tokenizer, own, 6, history_of(collator, batch, 0))


def test_in_time_order_the_latest_items_before_a_moment_are_shown_and_the_next_one_is_wanted(tokenizer):
    histories = [list(range(user % 7, user % 7 + 10)) for user in range(NUM_USERS)]
    (template,) = templates = HISTORY_TEMPLATES[:1]
    collator = make_collator(tokenizer, histories, templates=templates, train_history=4, shuffle_history=False)
    moments = set()
    for epoch in range(40):
        batch = training_batch(collator, range(NUM_USERS), epoch)
        for user in range(NUM_USERS):
            moment = histories[user].index(batch["labels"][user].item())
            moments.add((user, moment))
            shown = histories[user][max(moment - 4, 0) : moment]
            assert prompt_tokens(batch, user) == tokens_of(tokenizer, template, user, shown)
    assert {moment for user, moment in moments if user == 0} == set(range(1, 10))


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_lengths_of_training_prompts_are_known_beforehand(tokenizer, shuffle, chunk, monkeypatch):
    monkeypatch.setattr("tokenrec_hf.data.collator.LENGTHS_CHUNK", chunk)
    collator = make_collator(tokenizer, shuffle_history=shuffle, train_history=4)
    for epoch in range(3):
        lengths = training_batch(collator, epoch=epoch)["attention_mask"].sum(dim=1).tolist()
        assert collator.prompt_lengths(np.array(ACTIVE), epoch).tolist() == lengths
        assert len(set(lengths)) > 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_with_next_items_each_position_is_followed_by_the_next_item(tokenizer, shuffle):
    (template,) = templates = HISTORY_TEMPLATES[:1]
    options = {"templates": templates, "evaluation_templates": templates, "next_items": True, "train_history": 4}
    options["shuffle_history"] = shuffle
    collator, orders = make_collator(tokenizer, **options), set()
    for epoch in range(8):
        batch = training_batch(collator, range(NUM_USERS), epoch)
        for user, history in enumerate(HISTORIES):
            labels = items_in(batch["labels"][user])
            latest = history[-5:]  # four are shown, and the last is a target only
            assert sorted(labels) == sorted(latest) and (shuffle or labels == latest)
            assert prompt_tokens(batch, user) == tokens_of(tokenizer, template, user, labels[:-1])
            orders.add((user, *labels))
    assert (len(orders) > 8 * NUM_USERS / 2) == shuffle


def test_with_next_items_the_target_follows_the_whole_history_and_is_the_only_label(tokenizer):
    (template,) = templates = HISTORY_TEMPLATES[:1]
    options = {"templates": templates, "evaluation_templates": templates, "next_items": True, "shuffle_history": False}
    collator = make_collator(tokenizer, **options)
    batch = evaluation_batch(collator, range(NUM_USERS), targets=range(NUM_USERS))
    for user, history in enumerate(HISTORIES):
        assert batch["labels"][user].tolist()[: len(history) + 1] == [IGNORED] * len(history) + [user]
        assert items_in(batch["labels"][user]) == [user]
        assert prompt_tokens(batch, user) == tokens_of(tokenizer, template, user, history)


def test_columns_that_trainer_has_removed_are_named(tokenizer):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_collator(tokenizer)([{}, {}])
    with pytest.raises(ValueError, match="no 'epoch'"):
        make_collator(tokenizer)([{"user": 0}])
