import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import tokenrec_hf
from tokenrec_hf.models.codes import _ID
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.prompts import SEEN_TEMPLATES, UNSEEN_TEMPLATE, PromptTemplate, render
from tokenrec_hf.models.tokenization_tokenrec import TokenRecTokenizer
from tokenrec_hf.training.initialization import build_tokenizer, bundled_t5_tokenizer, load_t5_tokenizer

MODELS = Path(os.environ.get("TOKENREC_MODELS_DIR") or Path(__file__).parents[3] / "shared" / "models")
REAL = MODELS / "t5_tokenizer" / "spiece.model"
needs_t5 = pytest.mark.skipif(not REAL.exists(), reason=f"no T5 vocabulary at {REAL}; set TOKENREC_MODELS_DIR")
BASES = ["bundled", pytest.param("real", marks=[pytest.mark.data, needs_t5])]

DIM = 4
# The numbers of the paper's example, codewords counted from 1.
USERS = {"03": (128, 21, 35), "7": (1, 2, 3), "ünï": (4, 5, 6)}
ITEMS = {
    "08": (42, 12),
    "24": (42, 13),
    "63": (42, 53),
    "B004756YJA": (64, 64),
    "a.b-c_d'e(1)": (7, 8),
    "08.5": (9, 9),
    "x,y": (10, 11),
    "twin-1": (20, 20),
    "twin-2": (20, 20),
    "राम": (30, 31),
}


class FakeMQ:
    """An MQ-Tokenizer whose codes can be read off the vectors: the first K numbers, from 0."""

    def __init__(self, num_codebooks, codebook_size, space_id):
        self.config = SimpleNamespace(num_codebooks=num_codebooks, codebook_size=codebook_size, embedding_dim=DIM)
        self.space_id = space_id

    def encode(self, vectors):
        return vectors[:, : self.config.num_codebooks].long()


USER_MQ, ITEM_MQ = FakeMQ(3, 128, "space-u"), FakeMQ(2, 64, "space-i")


def vectors(codes_from_one):
    return torch.tensor([[c - 1 for c in codes] + [0] * (DIM - len(codes)) for codes in codes_from_one]).float()


def make(base=None, users=USERS, items=ITEMS, **kwargs):
    store = EmbeddingStore(DIM, {"user": "space-u", "item": "space-i"})
    for kind, codes in (("user", users), ("item", items)):
        if codes:
            store.upsert(kind, list(codes), vectors(codes.values()))
    return build_tokenizer(base, user_mq=USER_MQ, item_mq=ITEM_MQ, store=store, **kwargs)


def codes_of(kind, one, users=USERS, items=ITEMS):
    """The code tokens of an id, written without any of the tokenizer's code."""
    letter, codes = ("u", users[one]) if kind == "user" else ("v", items[one])
    return "".join(f"<{letter}{k}-{w}>" for k, w in enumerate(codes, 1))


def entity(kind, one):
    """The expansion of an id."""
    return f"{kind}_{codes_of(kind, one)}"


def reference(base):
    """A plain T5 tokenizer that knows the code tokens, to be given expanded text."""
    names = [f"<u{k}-{w}>" for k in (1, 2, 3) for w in range(1, 129)]
    names += [f"<v{k}-{w}>" for k in (1, 2) for w in range(1, 65)]
    t5 = load_t5_tokenizer(base)
    t5.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return t5


def by_hand(text, users=USERS, items=ITEMS, on_unknown="error"):
    """The words of a text and the entities between them, `(kind, id)`, found letter by letter as the class documents it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("not Unicode")
    parts, place = [""], 0
    while place < len(text):
        starts = text.startswith(("user_", "item_"), place) and not re.search(
            r"\w-?\Z", text[max(0, place - 2) : place]
        )
        run = re.split(r"\s", text[place + 5 :])[0] if starts else ""
        if run and not re.match(r"<[uv]\d+-\d+>", run):
            kind = text[place : place + 4]
            known = users if kind == "user" else items
            ends = [end for end in range(1, min(len(run), 256) + 1) if run[:end] in known and a_word_ends(run, end)]
            if ends:
                parts += [f"{parts.pop()}{kind}_", (kind, run[: ends[-1]]), ""]
                place += 5 + ends[-1]
                continue
            if on_unknown == "error" and any(unicodedata.category(letter)[0] not in "PS" for letter in run):
                raise KeyError(run)
        parts[-1] += text[place]
        place += 1
    return parts


def a_word_ends(run, end):
    return end == len(run) or (unicodedata.category(run[end])[0] in "PS" and run[end] != "_")


def path_of(base):
    return REAL if base == "real" else None


@pytest.fixture(scope="module")
def shared():
    """A tokenizer that no test changes."""
    return make()


@pytest.fixture(scope="module")
def plain():
    return reference(None)


@pytest.fixture
def tokenizer():
    return make()


def expanded(tokenizer, text):
    """What the tokenizer makes of a text, as text again (without the end token)."""
    return tokenizer.decode(tokenizer(text).input_ids[:-1], resolve_ids=False)


# ---------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("base", BASES)
def test_the_vocabulary_grows_by_the_code_tokens_and_nothing_else(base):
    t5 = load_t5_tokenizer(path_of(base))
    size = len(t5)
    assert len(make(t5)) == size + 3 * 128 + 2 * 64
    assert len(t5) == size, "the T5 tokenizer that was given is not to be changed"


@pytest.mark.parametrize("base", BASES)
def test_the_example_of_the_paper_has_the_stock_pieces_with_the_codes_in_the_place_of_the_id(base):
    tokenizer, t5 = make(path_of(base)), load_t5_tokenizer(path_of(base))
    before, after = t5.tokenize("I wonder what the user_"), t5.tokenize("will like. Can you help me decide?")
    text = "I wonder what the user_03 will like. Can you help me decide?"
    assert tokenizer.tokenize(text) == [*before, "<u1-128>", "<u2-21>", "<u3-35>", *after]


@pytest.mark.data
@needs_t5
def test_text_without_ids_has_the_published_ids_of_t5():
    text = "Studies have shown that owning a dog is good for you"
    assert make(REAL)(text).input_ids == [6536, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]


def test_code_token_ids_are_those_of_the_names_counted_from_one(shared):
    table = shared.code_token_ids("user")
    assert table.shape == (3, 128)
    assert shared.code_token_ids("item").shape == (2, 64)
    assert shared.convert_ids_to_tokens(table[1]) == [f"<u2-{w}>" for w in range(1, 129)]


def test_a_t5_tokenizer_that_already_has_code_tokens_is_refused(shared):
    with pytest.raises(ValueError, match="already has the code token <u1-1>; pass a plain T5 tokenizer"):
        make(shared)


def test_a_t5_tokenizer_that_has_padded_and_cut_before_is_taken_all_the_same():
    t5 = bundled_t5_tokenizer()
    t5(["music", "my music"], padding="max_length", max_length=3, truncation=True)
    assert make(t5).entity_token_ids("item", ["08"]).tolist() == make().entity_token_ids("item", ["08"]).tolist()


def test_long_text_is_cut_at_the_512_tokens_of_t5_or_at_what_is_asked():
    text = "music " * 600
    assert len(make()(text, truncation=True).input_ids) == 512
    assert len(make(model_max_length=100)(text, truncation=True).input_ids) == 100


# ------------------------------------------------------------------------------------------------------ codes and ids


def test_codes_are_those_of_the_mq_tokenizer_counted_from_zero(shared):
    assert shared.codes("user", ["7", "03"]).tolist() == [[0, 1, 2], [127, 20, 34]]
    assert shared.codes("item").tolist() == [[w - 1 for w in codes] for codes in ITEMS.values()]


def test_ids_are_those_of_the_store(shared):
    assert shared.ids("user") == list(USERS)
    assert shared.ids("item") == list(ITEMS)
    assert shared.space_ids == {"user": "space-u", "item": "space-i"}


def test_codes_of_an_unknown_id_are_an_error_that_names_it(shared):
    with pytest.raises(
        KeyError,
        match="item '99' is unknown to this tokenizer; add it with `tokenrec add`, or give it codes with add_items",
    ):
        shared.codes("item", ["08", "99"])


def test_another_kind_is_refused(shared):
    for call in (shared.ids, shared.codes, shared.code_token_ids):
        with pytest.raises(ValueError, match="kind is 'movie'; it must be 'user' or 'item'"):
            call("movie")


def test_a_store_without_users_gives_a_tokenizer_without_users():
    tokenizer = make(users={}, on_unknown="keep")
    assert tokenizer.ids("user") == []
    assert expanded(tokenizer, "user_03 had item_08") == f"user_03 had {entity('item', '08')}"


# ------------------------------------------------------------------------------------------------ ids in running text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("the user_03 will", {"user_03": ("user", "03")}),
        ("user_03", {"user_03": ("user", "03")}),
        ("Ask user_03, now", {"user_03": ("user", "03")}),
        ("Ask user_03. Now", {"user_03": ("user", "03")}),
        ("the user_03's taste", {"user_03": ("user", "03")}),
        ("a (user_03) b", {"user_03": ("user", "03")}),
        ('a "item_08" b', {"item_08": ("item", "08")}),
        ("a item_08? b", {"item_08": ("item", "08")}),
        ("item_B004756YJA sold", {"item_B004756YJA": ("item", "B004756YJA")}),
        ("see user_ünï there", {"user_ünï": ("user", "ünï")}),
        ("see item_a.b-c_d'e(1) there", {"item_a.b-c_d'e(1)": ("item", "a.b-c_d'e(1)")}),
        ("see item_a.b-c_d'e(1). There", {"item_a.b-c_d'e(1)": ("item", "a.b-c_d'e(1)")}),
        ("item_08,item_24;item_63 all", {f"item_{i}": ("item", i) for i in ("08", "24", "63")}),
        ("item_08/item_24 both", {f"item_{i}": ("item", i) for i in ("08", "24")}),
        ("likes:item_08 -item_24", {f"item_{i}": ("item", i) for i in ("08", "24")}),
        ("item_08-based", {"item_08": ("item", "08")}),
        ("a\titem_08\nb", {"item_08": ("item", "08")}),
    ],
)
def test_ids_are_found_in_running_text(shared, plain, text, names):
    by_hand = text
    for name, (kind, one) in names.items():
        by_hand = by_hand.replace(name, entity(kind, one))
    assert by_hand != text
    assert shared(text).input_ids == plain(by_hand).input_ids


@pytest.mark.parametrize(
    ("text", "one"),
    [("item_08.5 here", "08.5"), ("item_08.5, here", "08.5"), ("item_x,y here", "x,y"), ("item_x,y, here", "x,y")],
)
def test_the_longest_known_id_wins(shared, plain, text, one):
    assert shared(text).input_ids == plain(text.replace(f"item_{one}", entity("item", one))).input_ids


def test_a_name_within_a_longer_id_is_part_of_it():
    tokenizer = make(items={"08": (1, 1), "a,item_08": (2, 2)})
    assert tokenizer("item_a,item_08 item_08", return_entities=True)["item_ids"] == ["a,item_08", "08"]
    assert expanded(tokenizer, "item_a,item_08") == "item_<v1-2><v2-2>"


@pytest.mark.parametrize(
    "text",
    [
        "superuser_03 and _user_03",
        "a multi-item_08 list",
        "User_03 ITEM_08 user03 users_03",
        "user_ 03 and item_, or item_...",
    ],
)
def test_what_names_nobody_passes_untouched(shared, plain, text):
    assert shared(text).input_ids == plain(text).input_ids


CODED = "user_<u1-128><u2-21><u3-35> liked item_<v1-20><v2-20>, <v1-42> and item_08<v2-12>."


@pytest.mark.parametrize("base", BASES)
def test_code_tokens_that_a_text_writes_out_are_plain_text(base):
    """Nobody is meant who is not named: neither are the tokens of a user made, nor is one left unnamed."""
    tokenizer, t5 = make(path_of(base)), load_t5_tokenizer(path_of(base))
    before, after = CODED.split("08")
    codes = tokenizer.entity_token_ids("item", ["08"])[0, -2:].tolist()
    expected = [*t5.encode(before, add_special_tokens=False), *codes, *t5.encode(after)]
    encoded = tokenizer(CODED, return_entities=True, return_offsets_mapping=True)
    assert tokenizer(CODED).input_ids == encoded.input_ids == expected
    assert (encoded["user_ids"], encoded["item_ids"]) == ([], ["08"])
    template = PromptTemplate("For {user} as <u1-128> .")
    assert tokenizer.split_prompt(template)[1].tolist() == t5.encode(" as <u1-128> .")


def test_code_tokens_that_a_text_writes_out_name_all_that_have_them_where_that_is_allowed(plain, tmp_path):
    make(allow_code_text=True).save_pretrained(tmp_path)
    tokenizer = TokenRecTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(CODED, return_entities=True)
    assert encoded.input_ids == plain(CODED.replace("item_08", entity("item", "08"))).input_ids
    assert (encoded["user_ids"], encoded["item_ids"]) == (["03"], ["08", "twin-1", "twin-2"])
    assert tokenizer("user_<u1-1><u2-1><u3-1> <v1-20><v2-20>", return_entities=True)["user_ids"] == []
    # The text of a decoding is read as what was decoded.
    tokens = tokenizer("item_twin-1 item_08").input_ids
    assert tokenizer(tokenizer.decode(tokens[:-1])).input_ids == tokens


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("the user_99 will", "user '99'"),
        ("the user_99.", "user '99'"),
        ("a user_friendly shop", "user 'friendly'"),
        ("item_08_b", "item '08_b'"),
        ("item_0", "item '0'"),
        ("item_03 is a user", "item '03'"),
        ("item_08 item_" + "9" * 300, "item '999"),
    ],
)
def test_an_unknown_id_is_an_error_that_names_it_and_says_what_to_do(shared, text, name):
    with pytest.raises(KeyError, match=rf"the text names {name}.*give it codes with add_.*s, or set on_unknown='keep'"):
        shared(["fine", text])


def test_unknown_ids_stay_in_the_text_where_that_is_asked_for(plain):
    tokenizer = make(on_unknown="keep")
    text = "A user_friendly user_99 saw item_99,item_08."
    by_hand = text.replace("item_08", entity("item", "08"))
    assert tokenizer(text).input_ids == plain(by_hand).input_ids


def test_another_behaviour_for_unknown_ids_is_refused():
    with pytest.raises(ValueError, match="on_unknown is 'drop'; it must be 'error' or 'keep'"):
        make(on_unknown="drop")


def test_no_word_ends_before_a_vowel_sign(shared):
    # "रा" is one letter and its sign; the id that is known is longer, and a shorter one must not be read into it.
    tokenizer = make(items={"र": (1, 1)})
    with pytest.raises(KeyError, match="'रा'"):
        tokenizer("item_रा")
    assert expanded(shared, "item_राम") == entity("item", "राम")


@given(
    st.lists(st.sampled_from(["the", "music", "user_03", "user_ünï", *(f"item_{one}" for one in ITEMS)]), max_size=12)
)
def test_a_text_of_words_is_expanded_word_by_word(shared, plain, words):
    names = {f"user_{one}": entity("user", one) for one in USERS} | {
        f"item_{one}": entity("item", one) for one in ITEMS
    }
    assert shared(" ".join(words)).input_ids == plain(" ".join(names.get(word, word) for word in words)).input_ids


# ------------------------------------------------------------------------------------- as any Hugging Face tokenizer

TEXTS = ["What would user_03 like?", "user_7 liked item_08 item_24", "music"]
BY_HAND = [
    f"What would {entity('user', '03')} like?",
    f"{entity('user', '7')} liked {entity('item', '08')} {entity('item', '24')}",
    "music",
]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding": True},
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"padding": True, "return_tensors": "np"},
        {"add_special_tokens": False},
        {"max_length": 6, "truncation": True, "return_overflowing_tokens": True, "stride": 1},
        {"return_offsets_mapping": True, "return_length": True, "return_special_tokens_mask": True},
        {"padding": True, "pad_to_multiple_of": 8, "return_tensors": "np"},
        {"padding": True, "padding_side": "left", "return_attention_mask": False},
        {"padding": "max_length", "max_length": 7},
        {"padding": "max_length", "max_length": 9, "truncation": "only_first", "padding_side": "left"},
        {"padding": True, "max_length": 8, "truncation": True, "pad_to_multiple_of": 4, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 5, "truncation": True, "add_special_tokens": False},
        {"max_length": 1, "truncation": True},
        {"split_special_tokens": True},
    ],
)
def test_a_batch_is_what_t5_makes_of_the_expanded_text(shared, plain, kwargs):
    ours, theirs = shared(TEXTS, **kwargs), plain(BY_HAND, **kwargs)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_equal(ours[key], theirs[key])


PIECES = [
    "the",
    "music",
    "user_03",
    "(user_7)",
    "item_08",
    "item_24,",
    "x_y",
    "</s>",
    "<extra_id_0>",
    "  ",
    "\n",
    "\u00a0ﬁ",
    "é",
    "▁",
]


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join), min_size=1, max_size=3), st.data())
def test_what_is_remembered_of_texts_is_what_the_backend_makes_of_them(shared, plain, texts, data):
    """Any texts, cut and padded in any way, against a tokenizer that is given the code tokens."""
    written = ["".join(part if isinstance(part, str) else codes_of(*part) for part in by_hand(text)) for text in texts]
    several = {
        "padding": st.sampled_from([False, True, "max_length"]),
        "padding_side": st.sampled_from(["left", "right"]),
        "truncation": st.booleans(),
        "max_length": st.integers(1, 30),
        "add_special_tokens": st.booleans(),
    }
    kwargs = data.draw(st.fixed_dictionaries(several))
    if data.draw(st.booleans()):
        texts, written = texts[0], written[0]
    assert shared(texts, **kwargs).data == plain(written, **kwargs).data


# Ids that begin others, or look like punctuation, codes, other mentions or words.
STRANGE_IDS = ["0", "08", "08.5", "08.5.", "w", "w?", "w?!", "a,item_08", "user_03", "item_", "x<u1-3>y", "a-b", "a_b", "é", "e\u0301"]  # fmt: skip
STRANGE_IDS += [
    "राम",
    "र",
    "🙂",
    "…",
    ".",
    "(1)",
    "</s>",
    "<extra_id_0>",
    "ﬁ",
    "i" * 256,
    "ß",
    "<",
    "<u1-",
    "９",
    "\u2581",
]
STRANGE_TEXT = ["user_", "item_", "user_", "item_", " ", " ", " ", "\n", "\u3000", "_", "-", "--", ",", ".", "?!", "(", ")", "'s", "<u1-35>", "<v1-1><v2-1>"]  # fmt: skip
STRANGE_TEXT += [
    "<u",
    "1-35>",
    "<\x01u1-35>",
    "＜u1-35＞",
    "music",
    "The",
    "x",
    "9",
    "\u0301",
    "\u200b",
    "\u0903",
    "🙂",
    "\ud800",
]


def test_texts_of_strange_pieces_are_read_as_by_hand():
    """Any texts, against a reading letter by letter; their number is in `TOKENREC_TEXTS`."""
    random, t5 = Random(int(os.environ.get("TOKENREC_SEED", "0"))), bundled_t5_tokenizer()
    number, size, outcomes = int(os.environ.get("TOKENREC_TEXTS", "20000")), 5000, Counter()
    for _ in range(0, number, size):
        # A mention is seldom of an id that is unknown.
        names = [random.sample(STRANGE_IDS, len(STRANGE_IDS) // 2) for _ in range(2)]
        users, items = ({one: (1 + row, 2, 3)[:K] for row, one in enumerate(ids)} for K, ids in zip((3, 2), names))
        mentions = [f"{kind}_{one}" for kind, ids in zip(("user", "item"), names) for one in ids]
        pieces = 4 * STRANGE_TEXT + 2 * mentions + STRANGE_IDS
        on_unknown = random.choice(["error", "keep"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = make(users=users, items=items, on_unknown=on_unknown, model_max_length=10_000)
        codes = tokenizer.get_added_vocab()
        readings = {}
        for _ in range(size):
            text = "".join(random.choices(pieces, k=random.randint(1, 12)))
            try:
                readings[text] = by_hand(text, users, items, on_unknown)
                outcomes[min(3, len(readings[text]) // 2)] += 1
            except (KeyError, ValueError) as error:
                outcomes[type(error)] += 1
                with pytest.raises(type(error)):
                    tokenizer(text)
        encoded = tokenizer(list(readings), return_entities=True)
        for row, (text, parts) in enumerate(readings.items()):
            words = iter(t5.backend_tokenizer.encode_batch(parts[::2], add_special_tokens=False))
            tokens = [*next(words).ids]
            for one in parts[1::2]:
                tokens += [codes[token] for token in re.findall("<.*?>", codes_of(*one, users, items))]
                tokens += next(words).ids
            assert encoded.input_ids[row] == [*tokens, t5.eos_token_id], ascii(text)
            found = (
                [("user", one) for one in encoded["user_ids"][row]],
                [("item", one) for one in encoded["item_ids"][row]],
            )
            assert found == tuple([one for one in parts[1::2] if one[0] == kind] for kind in ("user", "item")), ascii(
                text
            )
    assert min(outcomes[kind] for kind in (KeyError, ValueError, 0, 1, 2, 3)) > number // 200
    print(outcomes)


def test_tokens_words_and_offsets_are_there_when_they_are_asked_for(shared, plain):
    ours, theirs = shared(TEXTS, padding=True), plain(BY_HAND, padding=True)
    assert ours.is_fast and ours.tokens(1) == theirs.tokens(1) and ours.word_ids(1) == theirs.word_ids(1)
    assert ours.char_to_token(0, 5) == theirs.char_to_token(0, 5) and ours[2].ids == theirs[2].ids
    again = pickle.loads(pickle.dumps(ours))
    assert again.data == ours.data and again.tokens(0) == theirs.tokens(0)


def test_a_new_token_counts_at_once(tokenizer):
    before = tokenizer("some music please").input_ids
    tokenizer.add_tokens(["music"])
    after = tokenizer("some music please")
    assert after.input_ids != before and "music" in after.tokens()


def test_one_text_has_no_batch_dimension_until_tensors_are_asked_for(shared, plain):
    assert shared(TEXTS[1]).data == plain(BY_HAND[1]).data
    tensors = shared(TEXTS[1], return_tensors="pt")
    assert tensors.input_ids.tolist() == [plain(BY_HAND[1]).input_ids]


def test_pairs_targets_encode_and_tokenize_expand_too(shared, plain):
    assert shared(TEXTS, TEXTS).data == plain(BY_HAND, BY_HAND).data
    assert shared(TEXTS[0], TEXTS[1]).data == plain(BY_HAND[0], BY_HAND[1]).data
    assert shared(text_target=TEXTS).data == plain(text_target=BY_HAND).data
    assert shared("music", text_target=TEXTS[1]).labels == plain(BY_HAND[1]).input_ids
    assert shared.encode(TEXTS[1]) == plain.encode(BY_HAND[1])
    assert shared.tokenize(TEXTS[1]) == plain.tokenize(BY_HAND[1])


def test_words_may_be_ids_and_keep_their_numbers(shared, plain):
    words, by_hand = [text.split() for text in TEXTS], [text.split() for text in BY_HAND]
    ours = shared(words, is_split_into_words=True)
    theirs = plain(by_hand, is_split_into_words=True)
    assert ours.data == theirs.data
    assert ours.word_ids(1) == theirs.word_ids(1)
    assert shared(words[1], is_split_into_words=True).data == plain(by_hand[1], is_split_into_words=True).data


def test_padding_of_encoded_prompts_works_as_in_a_collator(shared):
    batch = shared.pad([shared(text) for text in TEXTS], return_tensors="pt")
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.attention_mask.sum(dim=1).tolist() == [len(shared(text).input_ids) for text in TEXTS]


def test_threads_that_pad_and_cut_differently_do_not_disturb_each_other(shared):
    settings = [{"max_length": length, "truncation": True, "padding": "max_length"} for length in (5, 9, 20)] + [{}]
    expected = [shared(TEXTS, **one).input_ids for one in settings]

    def check(i):
        return shared(TEXTS, **settings[i % 4]).input_ids == expected[i % 4]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(400)))


def test_a_dataset_is_mapped_by_two_processes(shared):
    rows = datasets.Dataset.from_dict({"text": TEXTS * 4})
    mapped = rows.map(lambda row: shared(row["text"], return_entities=True), num_proc=2)
    assert mapped["input_ids"] == [shared(text).input_ids for text in TEXTS] * 4
    assert mapped["item_ids"][1] == ["08", "24"]


def test_the_fingerprint_of_datasets_does_not_depend_on_what_was_called(tokenizer):
    before = Hasher.hash(tokenizer)
    tokenizer.decode(tokenizer(TEXTS[1]).input_ids)
    assert Hasher.hash(tokenizer) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_work_on_their_own(tokenizer, copied):
    twin = copied(tokenizer)
    tokenizer.add_items({"new": vectors([(3, 3)])[0]})
    assert twin(TEXTS, padding=True).data == tokenizer(TEXTS, padding=True).data
    assert twin.ids("item") == list(ITEMS)


def test_mq_tokenizers_are_not_pickled_with_it(tokenizer):
    mq = FakeMQ(2, 64, "space-i")
    mq.cannot_be_pickled = threading.Lock()
    tokenizer.attach(item_mq=mq)
    assert pickle.loads(pickle.dumps(tokenizer))(TEXTS).data == tokenizer(TEXTS).data


# --------------------------------------------------------------------------------------------------- entities of a text


def test_the_ids_of_a_batch_are_given_in_the_order_of_the_text(shared):
    batch = shared(
        ["user_03 had item_63, item_08 and item_63", "nothing", "(item_24) user_7's user_03"],
        padding=True,
        return_tensors="pt",
        return_entities=True,
    )
    assert batch["user_ids"] == [["03"], [], ["7", "03"]]
    assert batch["item_ids"] == [["63", "08", "63"], [], ["24"]]
    assert batch.to("cpu")["item_ids"][0] == ["63", "08", "63"]


def test_the_ids_of_one_text_are_flat_without_tensors_and_a_batch_of_one_with(shared):
    assert shared("user_03 had item_08", return_entities=True)["item_ids"] == ["08"]
    batch = shared("user_03 had item_08", return_entities=True, return_tensors="np")
    assert (batch["user_ids"], batch["item_ids"]) == ([["03"]], [["08"]])


def test_the_ids_of_pairs_and_of_words_belong_to_their_example(shared):
    pairs = shared(["user_03", "user_7"], ["item_08", "item_24"], return_entities=True)
    assert (pairs["user_ids"], pairs["item_ids"]) == ([["03"], ["7"]], [["08"], ["24"]])
    assert shared("user_03", "item_08", return_entities=True)["item_ids"] == ["08"]
    words = shared([["user_03", "item_08"], ["item_24"]], is_split_into_words=True, return_entities=True)
    assert words["item_ids"] == [["08"], ["24"]]
    assert shared(["a", "item_08", "item_24"], is_split_into_words=True, return_entities=True)["item_ids"] == [
        "08",
        "24",
    ]


def test_the_ids_of_a_text_stay_with_each_part_when_it_overflows(shared):
    batch = shared(
        ["item_08 " + "music " * 8, "item_24"],
        max_length=6,
        truncation=True,
        return_overflowing_tokens=True,
        return_entities=True,
    )
    assert len(batch["item_ids"]) == len(batch.input_ids) > 2
    assert batch["item_ids"] == [["08"]] * (len(batch.input_ids) - 1) + [["24"]]


def test_without_asking_there_are_no_ids_in_the_batch(shared):
    assert set(shared(TEXTS)) == {"input_ids", "attention_mask"}


# -------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "text",
    [
        "What would user_03 like?",
        "user_03, item_08; item_24: item_63! Is it (item_08)?",
        "user_03's item_B004756YJA.",
        "item_a.b-c_d'e(1) for user_ünï",
        "item_08 (new) and item_24 - old",
        "nothing to see",
    ],
)
def test_decoding_gives_the_text_back(text, shared):
    shown = shared.decode(shared(text).input_ids, skip_special_tokens=True)
    assert shown.replace("( item_08", "(item_08").replace("ünï", "ünï") == text


def test_codes_that_two_items_share_stay_codes(shared):
    assert shared.decode(shared("item_twin-1 item_08").input_ids[:-1]) == f"{entity('item', 'twin-1')} item_08"


def test_codes_that_no_id_has_or_that_are_not_whole_stay_codes(shared):
    for text in ("item_<v1-1><v2-1>", "item_<v1-42>", "user_<v1-42><v2-12>", "item_<v2-12><v1-42>"):
        assert shared.decode(shared(text).input_ids[:-1]) == text


def test_decoding_skips_special_tokens_but_no_codes(shared):
    batch = shared(TEXTS, padding=True).input_ids
    assert shared.batch_decode(batch, skip_special_tokens=True) == TEXTS
    assert shared.decode(batch[1]).startswith("user_7 liked item_08 item_24</s>")
    assert shared.batch_decode(batch, skip_special_tokens=True, resolve_ids=False) == BY_HAND


def test_numbers_too_long_for_a_code_are_just_text(shared):
    text = "item_<v1-99999999999999999999><v2-1>"
    assert "99999999999999999999" in shared.decode(shared(text).input_ids)


# ------------------------------------------------------------------------------------------------ prompts from arrays


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("template", [*SEEN_TEMPLATES, UNSEEN_TEMPLATE], ids=lambda template: template.text)
def test_prompts_put_together_from_arrays_are_those_of_the_text(base, template, cache={}):  # noqa: B006
    tokenizer = cache.setdefault(base, make(path_of(base)))
    for history in ([], ["08"], ["63", "08", "a.b-c_d'e(1)", "x,y", "63"], list(ITEMS) * 3):
        parts = tokenizer.split_prompt(template)
        built = [parts[0], tokenizer.entity_token_ids("user", ["03"])[0]]
        if template.uses_history:
            built += [parts[1], tokenizer.entity_token_ids("item", history).ravel()]
        built.append(parts[-1])
        assert np.concatenate(built).tolist() == tokenizer(render(template, "03", history)).input_ids


one_id = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf"]), min_size=1, max_size=256).filter(
    lambda text: _ID.fullmatch(text) and not re.match(r"<[uv]\d+-\d+>", text)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(one_id, min_size=1, max_size=4, unique=True), st.data())
def test_any_id_is_found_in_its_prompt(shared, ids, data):
    tokenizer = copy.copy(shared)
    tokenizer.attach(item_mq=ITEM_MQ)
    tokenizer.add_items({one: np.array([5, i, 0, 0]) for i, one in enumerate(ids)})
    history = data.draw(st.lists(st.sampled_from(ids), max_size=5))
    template = PromptTemplate("Ask {user} about {history} now.")
    before, between, after = tokenizer.split_prompt(template)
    entities = tokenizer.entity_token_ids("item", history).ravel()
    built = np.concatenate([before, tokenizer.entity_token_ids("user", ["03"])[0], between, entities, after])
    encoding = tokenizer(render(template, "03", history), return_entities=True)
    assert encoding.input_ids == built.tolist()
    assert encoding["item_ids"] == history


def test_entity_tokens_are_the_same_by_id_and_by_row(shared):
    ids = ["63", "08", "63"]
    rows = [list(ITEMS).index(one) for one in ids]
    by_id = shared.entity_token_ids("item", ids)
    assert by_id.tolist() == [shared.encode(f"item_{one}", add_special_tokens=False) for one in ids]
    assert shared.entity_token_ids("item", np.array(rows)).tolist() == by_id.tolist()
    assert shared.entity_token_ids("item", rows).tolist() == by_id.tolist()
    assert shared.entity_token_ids("item", []).shape == (0, by_id.shape[1])


@pytest.mark.parametrize("rows", [[0, -1], [len(ITEMS)]])
def test_rows_out_of_range_are_refused(shared, rows):
    with pytest.raises(IndexError, match=rf"are not all in \[0, {len(ITEMS)}\)"):
        shared.entity_token_ids("item", rows)


def test_entity_tokens_of_an_unknown_id_are_an_error(shared):
    with pytest.raises(KeyError, match="user '99' is unknown"):
        shared.entity_token_ids("user", ["03", "99"])


# ------------------------------------------------------------------------------------------------------------- cold start


def test_new_users_and_items_get_the_codes_of_the_mq_tokenizer_and_the_others_keep_theirs(tokenizer):
    before = tokenizer.codes("item")
    size = len(tokenizer)
    tokenizer.add_items(
        {"new.1": [1.0, 2.0, 0.0, 0.0], "new-2": np.array([3, 4, 0, 0]), "3": torch.tensor([5.0, 6, 0, 0])}
    )
    assert tokenizer.codes("item", ["new.1", "new-2", "3"]).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert tokenizer.codes("item")[: len(before)].tolist() == before.tolist()
    assert tokenizer.ids("item") == [*ITEMS, "new.1", "new-2", "3"]
    assert len(tokenizer) == size
    assert expanded(tokenizer, "see item_new.1. Now") == "see item_<v1-2><v2-3>. Now"
    assert tokenizer.decode(tokenizer("item_new-2").input_ids[:-1]) == "item_new-2"


def test_a_user_who_is_known_gets_new_codes_and_keeps_the_row(tokenizer):
    tokenizer.add_users({"7": [9, 9, 9, 0], "new": [8, 8, 8, 0]})
    assert tokenizer.ids("user") == [*USERS, "new"]
    assert tokenizer.codes("user", ["7", "new", "03"]).tolist() == [[9, 9, 9], [8, 8, 8], [127, 20, 34]]
    assert tokenizer.decode(tokenizer("user_7").input_ids[:-1]) == "user_7"


def test_adding_nobody_changes_nothing(tokenizer):
    tokenizer.add_items({})
    assert tokenizer.ids("item") == list(ITEMS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"b": [1, 1, 1]}, r"the vector of item 'b' has shape \[3\] but the MQ-Tokenizer expects \[4\]"),
        ({"b": [[1, 1, 1, 1]]}, r"the vector of item 'b' has shape \[1, 4\]"),
        ({"b": [1, float("nan"), 0, 0]}, "the embedding of item 'b' holds NaN or infinity"),
        ({"b ": [1, 1, 1, 1]}, "item 'b ' begins or ends with a space"),
        ({"": [1, 1, 1, 1]}, "item '' is empty"),
        ({"b" * 257: [1, 1, 1, 1]}, "257 characters"),
        ({"<v1-1>": [1, 1, 1, 1]}, "item '<v1-1>' begins like a code token"),
        ({1: [1, 1, 1, 1], "1": [1, 1, 1, 1]}, "item '1' is given more than once"),
        ({"b": [64, 1, 1, 1]}, r"item codes go from 1 to 64 but should be in \[0, 64\)"),
    ],
)
def test_new_users_and_items_are_added_all_or_not_at_all(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.add_items({"good": [1, 1, 1, 1], "08": [2, 2, 2, 2], **bad})
    assert tokenizer.ids("item") == list(ITEMS)
    assert tokenizer.codes("item", ["08"]).tolist() == [[41, 11]]


def test_a_store_with_vectors_of_another_size_is_refused():
    store = EmbeddingStore(3)
    store.upsert("user", ["a"], torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match="user embeddings have 3 dimensions but the MQ-Tokenizer expects 4; train it with"
    ):
        build_tokenizer(user_mq=USER_MQ, item_mq=ITEM_MQ, store=store)


def test_a_store_tied_to_another_mq_tokenizer_is_refused():
    store = EmbeddingStore(DIM, {"user": "space-u", "item": "another"})
    with pytest.raises(ValueError, match="another but the tokenizer was made with space-i"):
        build_tokenizer(user_mq=USER_MQ, item_mq=ITEM_MQ, store=store)


def test_an_mq_tokenizer_of_another_space_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="item codes of this tokenizer were made by MQ-Tokenizer space-i but the one given is x"
    ):
        tokenizer.attach(item_mq=FakeMQ(2, 64, "x"))


def test_a_loaded_tokenizer_without_its_mq_tokenizer_says_where_it_looked_and_takes_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = TokenRecTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"there is none in mq_item of .*{tmp_path.name}.*attach\(item_mq=...\)"):
        loaded.add_items({"new": [1, 2, 0, 0]})
    loaded.attach(item_mq=ITEM_MQ)
    loaded.add_items({"new": [1, 2, 0, 0]})
    assert loaded.codes("item", ["new"]).tolist() == [[1, 2]]


def test_a_loaded_tokenizer_finds_the_mq_tokenizers_beside_it(tmp_path):
    from tokenrec_hf.models.configuration_tokenrec import MQTokenizerConfig
    from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel

    torch.manual_seed(0)
    config = MQTokenizerConfig(embedding_dim=DIM, num_codebooks=2, codebook_size=8, codebook_dim=4, hidden_dim=8)
    user_mq, item_mq = MQTokenizerModel(config).eval(), MQTokenizerModel(config).eval()
    store = EmbeddingStore(DIM)
    store.upsert("item", ["08", "24"], torch.randn(2, DIM))
    made = build_tokenizer(user_mq=user_mq, item_mq=item_mq, store=store)
    assert made.codes("item").tolist() == item_mq.encode(store.vectors("item")).tolist()

    made.save_pretrained(tmp_path)
    user_mq.save_pretrained(tmp_path / "mq_user")
    item_mq.save_pretrained(tmp_path / "mq_item")
    loaded = TokenRecTokenizer.from_pretrained(tmp_path)
    new = torch.randn(3, DIM)
    loaded.add_items(dict(zip("abc", new)))
    assert loaded.codes("item", ["a", "b", "c"]).tolist() == item_mq.encode(new).tolist()

    shutil.rmtree(tmp_path / "mq_item")
    user_mq.save_pretrained(tmp_path / "mq_item")
    with pytest.raises(
        ValueError, match=f"made by MQ-Tokenizer {item_mq.space_id} but the one given is {user_mq.space_id}"
    ):
        TokenRecTokenizer.from_pretrained(tmp_path).add_items({"a": new[0]})


# -------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("base", BASES)
def test_a_saved_tokenizer_comes_back_the_same(base, tmp_path):
    tokenizer = make(path_of(base), on_unknown="keep", model_max_length=77)
    tokenizer.add_items({"new": [1, 2, 0, 0]})
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = TokenRecTokenizer.from_pretrained(tmp_path / "first")
    texts = [*TEXTS, "item_new item_99 Héllo  “world” ½"]
    assert loaded(texts, padding=True).data == tokenizer(texts, padding=True).data
    assert (loaded.on_unknown, loaded.model_max_length) == ("keep", 77)
    assert (loaded.codebooks, loaded.space_ids) == (tokenizer.codebooks, tokenizer.space_ids)
    assert len(loaded) == len(tokenizer)

    # Padding and truncation of the calls so far must not show in what is saved.
    loaded(texts, padding=True, truncation=True, max_length=5)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("codes.safetensors", "tokenizer.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_saving_leaves_only_files_to_load_and_tells_which(tokenizer, tmp_path):
    names = {Path(one).name for one in tokenizer.save_pretrained(tmp_path)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "codes.safetensors"}
    assert names <= {one.name for one in tmp_path.iterdir()}
    assert {one.suffix for one in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}
    config = (tmp_path / "tokenizer_config.json").read_text()
    assert "B004756YJA" not in config and len(config) < 10_000


def test_codes_come_from_the_repository_and_not_from_a_path_in_its_config(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert "codes_file" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


AUTO = """
import sys
if {alone}:
    sys.modules["tokenrec_hf"] = None
else:
    import tokenrec_hf.models.tokenization_tokenrec
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
assert type(tokenizer).__name__ == "TokenRecTokenizer", type(tokenizer)
print(tokenizer("I wonder what the user_03 will like.").input_ids)
tokenizer.save_pretrained({folder!r} + "/again")
print(AutoTokenizer.from_pretrained({folder!r} + "/again", trust_remote_code=True)("item_08").input_ids)
"""


@pytest.mark.parametrize("alone", [True, False], ids=["without the package", "with the package"])
def test_auto_tokenizer_of_a_fresh_process_loads_it_from_its_folder(shared, tmp_path, alone):
    folder = tmp_path / "repository"
    shared.save_pretrained(folder)
    run = subprocess.run(
        [sys.executable, "-c", AUTO.format(folder=str(folder), alone=alone)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()[-2:]]
    assert lines == [shared("I wonder what the user_03 will like.").input_ids, shared("item_08").input_ids]


def test_importing_the_module_does_not_import_torch(tmp_path):
    """As the code of a shared repository: in the package, transformers brings all models along, to register them."""
    for name in ("tokenization_tokenrec", "codes", "prompts"):
        shutil.copy(Path(tokenrec_hf.__file__).parent / "models" / f"{name}.py", tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path.parent)!r}); import {tmp_path.name}.tokenization_tokenrec"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_damaged_code_file_is_named(shared, tmp_path, content):
    shared.save_pretrained(tmp_path)
    path = tmp_path / "codes.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    with pytest.raises(ValueError, match=r"codes.safetensors is damaged .*copy it again"):
        TokenRecTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_codes_is_refused(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    (tmp_path / "codes.safetensors").unlink()
    with pytest.raises(
        ValueError, match="has no codes.safetensors or was not saved by TokenRecTokenizer; make one with"
    ):
        TokenRecTokenizer.from_pretrained(tmp_path)


def test_a_plain_t5_tokenizer_is_refused(tmp_path):
    bundled_t5_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved by TokenRecTokenizer; make one with"):
        TokenRecTokenizer.from_pretrained(tmp_path)


def test_the_vocabulary_of_another_save_is_refused(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["codebooks"]["item"] = [2, 65]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer.json does not have the item code tokens <v1-1> to <v2-65>"):
        TokenRecTokenizer.from_pretrained(tmp_path)


def test_codes_beyond_the_codebooks_are_refused(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["codebooks"]["item"] = [2, 63]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"item codes go from 6 to 63 but should be in \[0, 63\)"):
        TokenRecTokenizer.from_pretrained(tmp_path)


def test_what_is_removed_is_unknown_and_codes_are_saved_alone(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    others = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "codes.safetensors"}
    tokenizer = copy.deepcopy(shared)
    tokenizer.remove("item", ["08", "never there"])
    tokenizer.remove("user", ["7"])
    tokenizer.save_codes(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "codes.safetensors"} == others
    for one in (tokenizer, TokenRecTokenizer.from_pretrained(tmp_path)):
        assert one.ids("item") == [item for item in ITEMS if item != "08"] and one.ids("user") == ["03", "ünï"]
        with pytest.raises(KeyError, match="item '08' is unknown"):
            one.codes("item", ["08"])
        assert one.codes("item", ["24"]).tolist() == shared.codes("item", ["24"]).tolist()
    assert "08" in shared.ids("item")


def test_a_text_that_is_not_unicode_or_too_long_is_refused_by_its_row():
    tokenizer = make()
    for text in ("What next for user_03 \ud800?", "\udfff"):
        with pytest.raises(ValueError, match="text 1 holds half of a surrogate pair, so it is not Unicode text"):
            tokenizer(["fine", text])
    with pytest.raises(ValueError, match="text 0 has 1000001 characters, more than 1000000"):
        tokenizer("x" * 1_000_001)


def test_memory_grows_no_faster_than_the_text():
    """Names without white space between them, any beginning of which could be an id of up to 256 characters."""
    tokenizer = make(users={"0": (1, 2, 3), "1": (4, 5, 6), "x" * 256: (7, 8, 9)})

    def peak(count):
        tracemalloc.start()
        assert len(tokenizer(".user_0!.user_1!" * count, return_entities=True)["user_ids"]) == 2 * count
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    peak(1)
    small, large = peak(100), peak(800)
    assert large < 12 * small and large < 5_000 * 800 * 16


def test_an_id_that_is_another_with_punctuation_warns_once():
    items = {"w": (1, 1), "w?": (2, 2), "w?!": (3, 3), "x!": (4, 4)}
    with pytest.warns(
        UserWarning, match=r"item 'w\?' is item 'w' with punctuation, so a sentence .* names 'w\?'"
    ) as caught:
        tokenizer = make(items=items)
    assert len(caught) == 1
    assert tokenizer("Is it item_w?", return_entities=True)["item_ids"] == ["w?"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(items={"w": (1, 1), "x!": (4, 4), "w-1": (2, 2)})
