import copy
import pickle
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tokenrec_hf.models.codes import COMMITTED
from tokenrec_hf.models.configuration_tokenrec import MQTokenizerConfig, T5GenerativeRetrievalConfig
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel
from tokenrec_hf.models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES, UNSEEN_TEMPLATE, USER_ONLY_TEMPLATES, render
from tokenrec_hf.models.recommender import Recommender, check_repository
from tokenrec_hf.training.initialization import build_tokenizer, prepare_mq_tokenizer

DIM, NUM_ITEMS = 8, 40
LONG = [f"i{n}" for n in range(30)]
SEEN = {"ann": ["i1", "i2", "i3"], "bob": [], "cid": LONG}


@pytest.fixture(scope="module")
def mqs():
    torch.manual_seed(1)
    config = MQTokenizerConfig(embedding_dim=DIM, codebook_size=8, codebook_dim=4)
    return {kind: MQTokenizerModel(config) for kind in ("user", "item")}


@pytest.fixture(scope="module")
def parts(mqs):
    """Model, tokenizer and store that fit together, untrained; a prompt takes at most 60 tokens."""
    torch.manual_seed(0)
    store = EmbeddingStore(DIM)
    store.upsert("user", list(SEEN), torch.randn(3, DIM))
    store.upsert("item", [f"i{n}" for n in range(NUM_ITEMS)], torch.randn(NUM_ITEMS, DIM))
    for kind, mq in mqs.items():
        prepare_mq_tokenizer(mq, store.vectors(kind))
        store.space_ids[kind] = mq.space_id
    store.set_seen(list(SEEN), list(SEEN.values()))
    tokenizer = build_tokenizer(user_mq=mqs["user"], item_mq=mqs["item"], store=store, model_max_length=60)
    config = T5GenerativeRetrievalConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        embedding_dim=DIM,
        decoder_start_token_id=0,
        space_ids=dict(store.space_ids),
    )
    return T5ForGenerativeRetrieval(config).eval(), tokenizer, store


@pytest.fixture(scope="module")
def recommender(parts):
    return Recommender(*parts)


@pytest.fixture(scope="module")
def repository(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    model, tokenizer, store = parts
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    store.save_pretrained(folder / "store")
    return folder


@pytest.fixture
def own_store(repository):
    """A copy of the store that a test may change."""
    return EmbeddingStore.open(repository)


def test_a_prompt_names_users_and_items_by_the_codes_of_their_vectors(parts, mqs):
    """Eq. 7 and 15: `user_<u1-w1><u2-w2><u3-w3>`, codewords counted from 1, as the MQ-Tokenizers encode the vectors."""
    _, tokenizer, store = parts
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Does user_bob like item_i7 or item_i2 ?")["input_ids"])
    expected = []
    for kind, letter, name in (("user", "u", "bob"), ("item", "v", "i7"), ("item", "v", "i2")):
        codes = mqs[kind].encode(store.get(kind, [name]))[0].tolist()
        expected += [f"<{letter}{k + 1}-{w + 1}>" for k, w in enumerate(codes)]
    assert [one for one in tokens if re.fullmatch(r"<[uv]\d+-\d+>", one)] == expected


def prompts(recommender, *request):
    """The tokens of each prompt, without padding."""
    inputs = recommender.tokenize(*request)
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]


def tokens(recommender, *texts):
    """The tokens of texts, which the tokenizer reads."""
    return [recommender.tokenizer(text)["input_ids"] for text in texts]


def test_a_short_history_is_written_out_whole_and_in_order(recommender):
    """Eq. 15: the words, the user and the items interacted with."""
    expected = tokens(recommender, render(HISTORY_TEMPLATES[0], "bob", ["i9", "i4"]))
    assert prompts(recommender, ["bob"], [["i9", "i4"]]) == expected


def test_no_history_given_means_what_the_store_knows(recommender):
    """Eq. 15, both families: by user id only where nothing is known."""
    texts = [render(HISTORY_TEMPLATES[0], "ann", SEEN["ann"]), render(USER_ONLY_TEMPLATES[0], "bob")]
    assert prompts(recommender, ["ann", "bob"]) == tokens(recommender, *texts)
    assert prompts(recommender, ["ann", "bob"], [None, None]) == tokens(recommender, *texts)
    assert recommender.recommend(["ann", "bob"]) == recommender.recommend(["ann", "bob"], [SEEN["ann"], []])


def test_an_empty_history_asks_by_user_id_only(recommender):
    assert prompts(recommender, ["ann"], [[]]) == tokens(recommender, render(USER_ONLY_TEMPLATES[0], "ann"))


@pytest.mark.parametrize("template", [None, UNSEEN_TEMPLATE])
@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 12, 30])
def test_a_long_history_loses_its_oldest_items_whole(recommender, template, count):
    history = LONG[:count]

    def written(kept):
        return tokens(recommender, render(template or HISTORY_TEMPLATES[0], "ann", history[count - kept :]))[0]

    prompt, limit = prompts(recommender, ["ann"], [history], template)[0], recommender.tokenizer.model_max_length
    kept = next(kept for kept in range(count + 1) if len(written(kept)) == len(prompt))
    assert kept and prompt == written(kept) and len(prompt) <= limit
    assert kept == count or len(written(kept + 1)) > limit


def test_a_template_without_history_leaves_the_history_out(recommender):
    template = USER_ONLY_TEMPLATES[2]
    expected = tokens(recommender, render(template, "ann"))
    assert prompts(recommender, ["ann"], [["i5"]], template) == expected
    assert prompts(recommender, ["ann"], [["i5"]], template.text) == expected
    with pytest.raises(ValueError, match="prompt template 'nobody' must hold"):
        recommender.recommend(["ann"], template="nobody")


@pytest.mark.parametrize("template", [None, USER_ONLY_TEMPLATES[0], UNSEEN_TEMPLATE])
def test_seen_items_are_never_recommended(recommender, template):
    """What the store knows and what is given, also where the prompt has no room for it."""
    given = [["i30", "i31"], LONG, None]
    found = recommender.recommend(list(SEEN), given, top_k=NUM_ITEMS, template=template)
    for user, history, row in zip(SEEN, given, found):
        seen = {*SEEN[user], *(history or [])}
        assert {one["item"] for one in row} == {f"i{n}" for n in range(NUM_ITEMS)} - seen


def test_seen_items_come_back_where_they_are_asked_for(recommender):
    found = recommender.recommend(["ann", "cid"], top_k=NUM_ITEMS, exclude_seen=False)
    assert [len(row) for row in found] == [NUM_ITEMS, NUM_ITEMS]


def test_recommendations_are_those_of_the_model_for_the_prompts(recommender):
    for user, prompt, row in zip(SEEN, prompts(recommender, list(SEEN)), recommender.recommend(list(SEEN), top_k=5)):
        ids = torch.tensor([prompt])
        query = recommender.model.encode_queries(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        query = query.detach().double().numpy()
        vectors = recommender.store.vectors("item").double().numpy()
        cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        best = [n for n in np.argsort(-cosines) if f"i{n}" not in SEEN[user]][:5]
        assert [one["item"] for one in row] == [f"i{n}" for n in best]
        assert [one["score"] for one in row] == pytest.approx(cosines[best], abs=1e-5)


def test_recommending_leaves_the_model_in_the_mode_it_was_in(recommender):
    first = recommender.recommend(["ann"])
    recommender.model.train()
    try:
        assert recommender.recommend(["ann"]) == first
        assert recommender.model.training
    finally:
        recommender.model.eval()
    assert recommender.recommend(["ann"]) == first and not recommender.model.training


def test_new_items_of_the_store_are_recommended_without_touching_the_model(parts, own_store):
    model, tokenizer, store = parts[0], parts[1], own_store
    query = model.encode_queries(**tokenizer(render(USER_ONLY_TEMPLATES[0], "bob"), return_tensors="pt")).detach()
    store.upsert("item", ["brand-new"], 7 * query)
    best = Recommender(model, tokenizer, store).recommend(["bob"], top_k=1)[0][0]
    assert best["item"] == "brand-new" and best["score"] == pytest.approx(1, abs=1e-5)


def test_tokenised_prompts_are_answered_without_the_items_that_they_name(recommender):
    prompts = ["After item_i3 item_i4 user_ann liked what?", "What fits item_i9 best?"]
    inputs = recommender.tokenizer(prompts, padding=True, return_tensors="pt", return_entities=True)
    found = recommender.answer(inputs, top_k=NUM_ITEMS)
    for row, seen in zip(found, ({"i1", "i2", "i3", "i4"}, {"i9"})):
        assert {one["item"] for one in row} == {f"i{n}" for n in range(NUM_ITEMS)} - seen
    del inputs["user_ids"]
    assert len(recommender.answer(inputs, top_k=NUM_ITEMS, exclude_seen=False)[0]) == NUM_ITEMS
    with pytest.raises(
        ValueError, match="exclude_seen needs the ids that prompts name: tokenise with return_entities=True"
    ):
        recommender.answer(inputs)


def test_similar_items_are_the_nearest_others_by_cosine(recommender):
    vectors = recommender.store.vectors("item").double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = recommender.similar_items(["i7", "i2"], top_k=3)
    for number, row in zip((7, 2), found):
        cosines = unit @ unit[number]
        best = [n for n in np.argsort(-cosines) if n != number][:3]
        assert [one["item"] for one in row] == [f"i{n}" for n in best]
        assert [one["score"] for one in row] == pytest.approx(cosines[best], abs=1e-5)
    assert len(recommender.similar_items(["i7"], top_k=NUM_ITEMS)[0]) == NUM_ITEMS - 1
    assert recommender.similar_items([]) == []
    with pytest.raises(KeyError, match="i99"):
        recommender.similar_items(["i1", "i99"])


def test_reasons_are_the_nearest_items_of_the_history(recommender):
    vectors = recommender.store.vectors("item").double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    history, numbers = ["i5", "gone", "i9", "i2", "i5", "i7"], [5, 9, 2, 7]
    found = recommender.reasons(["i1", "i7"], history, most=3)
    for item, reasons in zip((1, 7), found):
        best = sorted((number for number in numbers if number != item), key=lambda number: -unit[number] @ unit[item])
        assert reasons == [f"i{number}" for number in best[:3]]
    assert recommender.reasons(["i1"], ["gone"]) == [[]] and recommender.reasons([], history) == []
    with pytest.raises(KeyError, match="i99"):
        recommender.reasons(["i99"], history)


def test_similar_items_can_be_filtered_by_metadata(parts, own_store):
    own_store.set_metadata(["i1", "i2", "i3"], [{"genre": "jazz"}] * 3)
    found = Recommender(*parts[:2], own_store).similar_items(["i1"], where={"genre": "jazz"})
    assert {one["item"] for one in found[0]} == {"i2", "i3"}


def test_no_users_have_no_recommendations_in_their_prompts(recommender):
    assert prompts(recommender, []) == [] == recommender.recommend([])


@pytest.mark.parametrize("strange", ["ann item_i3", "ann\nx", "i1 item_i2", "<u1-1><u2-2><u3-3>", "ann'", ""])
def test_an_id_is_never_read_as_text(recommender, strange):
    """A request names one user and its items: what an id holds cannot add others, or stand for the tokens of one."""
    with pytest.raises(KeyError, match="unknown"):
        recommender.recommend([strange])
    with pytest.raises(KeyError, match="unknown"):
        recommender.recommend(["ann"], [["i1", strange]])


@pytest.mark.parametrize(
    "users, histories, sentence",
    [
        ("ann", None, "users must be a list of ids, not 'ann'"),
        (None, None, "users must be a list of ids, not None"),
        ([7], None, "users must be a list of ids, which are strings, but one is 7"),
        (["ann"], "i3", "there are a single string for 1 users"),
        (["ann"], ["i3"], "the history of request 0 must be a list of ids, not 'i3'"),
        (["ann"], [[3]], "the history of request 0 must be a list of ids, which are strings, but one is 3"),
        (["ann"], [[["i3"]]], "one is ['i3']"),
        (["ann"], [["i3"], ["i4"]], "there are 2 histories for 1 users"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(recommender, users, histories, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        recommender.recommend(users, histories)


def test_reasons_want_a_list_too(recommender):
    with pytest.raises(ValueError, match="the history must be a list of ids, not 'i3'"):
        recommender.reasons(["i4"], "i3")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_recommender_answers_the_same_and_stands_apart(recommender, copied):
    twin = copied(recommender)
    assert twin.recommend(["ann"], [["i3"]], top_k=3) == recommender.recommend(["ann"], [["i3"]], top_k=3)
    twin.store.delete("item", ["i3"])
    assert recommender.store.contains("item", ["i3"]).all()


@pytest.mark.parametrize(
    "wrap", [np.array, lambda ids: np.array(ids, dtype=object), lambda ids: pd.Series(ids, index=[5, 6])]
)
def test_ids_may_come_in_arrays_and_series(recommender, wrap):
    users, history = ["ann", "cid"], ["i3", "i4"]
    assert recommender.recommend(wrap(users)) == recommender.recommend(users)
    assert recommender.recommend(users, [wrap(history)] * 2) == recommender.recommend(users, [history] * 2)
    assert torch.equal(recommender.store.get("item", wrap(history)), recommender.store.get("item", history))
    assert (
        recommender.tokenizer.codes("item", wrap(history)).tolist()
        == recommender.tokenizer.codes("item", history).tolist()
    )
    assert recommender.store.seen(wrap(users)) == recommender.store.seen(users)
    for unknown in (lambda ids: recommender.store.get("user", ids), recommender.recommend):
        with pytest.raises(KeyError, match="zoe"):
            unknown(wrap(["ann", "zoe"]))


def test_an_unknown_user_or_item_is_named(recommender):
    with pytest.raises(KeyError, match="zoe"):
        recommender.recommend(["zoe"])
    with pytest.raises(KeyError, match="i99"):
        recommender.recommend(["ann"], [["i99"]])


def test_a_history_too_few_is_refused_instead_of_a_user_lost(recommender):
    with pytest.raises(ValueError, match="there are 1 histories for 2 users"):
        recommender.recommend(["ann", "bob"], [["i1"]])


def test_a_saved_repository_opens_and_recommends_the_same(recommender, repository):
    opened = Recommender.from_pretrained(repository)
    before, after = (one.recommend(list(SEEN), top_k=7) for one in (recommender, opened))
    assert [[row["item"] for row in own] for own in after] == [[row["item"] for row in own] for own in before]
    # Weights that were read from a file lie elsewhere in memory, which can change the last bit of a product.
    scores = [[row["score"] for own in found for row in own] for found in (after, before)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_tokenizer_of_other_mq_tokenizers_is_refused(parts):
    model, tokenizer, store = parts
    for kind, match in (("user", "store belong to MQ-Tokenizer"), ("item", "store belong to MQ-Tokenizer")):
        other = EmbeddingStore(DIM, {**store.space_ids, kind: "another"})
        with pytest.raises(ValueError, match=f"{kind} vectors of the {match} another but the tokenizer"):
            Recommender(model, tokenizer, other)


def test_a_model_of_other_mq_tokenizers_is_refused(parts):
    model, tokenizer, store = parts
    right = model.config.space_ids
    model.config.space_ids = {**right, "item": "another"}
    try:
        with pytest.raises(
            ValueError, match="model was trained on item tokens of MQ-Tokenizer another .* same repository"
        ):
            Recommender(model, tokenizer, store)
    finally:
        model.config.space_ids = right


def test_a_finished_repository_passes_the_check(repository):
    check_repository(repository)
    check_repository(str(repository))


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*gone, .*train one with `tokenrec train --output-dir"
    ):
        Recommender.from_pretrained(tmp_path / "gone")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "codes.safetensors", "model.safetensors"])
def test_a_folder_without_a_file_is_no_repository(repository, tmp_path, name):
    folder = shutil.copytree(repository, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {re.escape(name)}: it is no trained repository"):
        check_repository(folder)


def test_a_folder_without_a_store_is_no_repository(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "copy")
    shutil.rmtree(folder / "store")
    with pytest.raises(FileNotFoundError, match="has no store/store.json"):
        check_repository(folder)


def test_an_unfinished_training_says_to_go_on(tmp_path):
    (tmp_path / "training").mkdir()
    with pytest.raises(FileNotFoundError, match="training has not finished; run the same `tokenrec train` again"):
        check_repository(tmp_path)


def test_a_change_that_is_committed_is_read_before_its_files_are_in_place(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "copy")
    store = EmbeddingStore.open(folder)
    store.withdraw(["i9"])
    store.save_pretrained(folder / COMMITTED / "store")
    before, after = (
        {row["item"] for row in Recommender.from_pretrained(one).recommend(["ann"], top_k=NUM_ITEMS)[0]}
        for one in (repository, folder)
    )
    assert before - after == {"i9"}


class Reader:
    """A history encoder whose vector of a history is that of the user `who`; items after i20 are new to it."""

    def __init__(self, store, who):
        self.vector = store.get("user", [who])

    def encode(self, histories):
        known = [any(int(item[1:]) <= 20 for item in one) for one in histories]
        return self.vector.repeat(len(histories), 1) * torch.tensor(known)[:, None], np.array(known)


def test_somebody_without_an_id_is_written_in_the_tokens_of_the_history(parts, mqs):
    model, tokenizer, store = parts
    tokenizer.attach(user_mq=mqs["user"])
    recommender = Recommender(model, tokenizer, store)
    recommender.history_encoder = Reader(store, "cid")
    anonymous = prompts(recommender, [None, "ann"], [["i3", "i4"], ["i3", "i4"]])
    assert anonymous == prompts(recommender, ["cid", "ann"], [["i3", "i4"], ["i3", "i4"]])
    # What a user is shown is that of the request, and is not recommended again.
    found = recommender.recommend([None], [["i3", "i4"]], top_k=NUM_ITEMS)[0]
    assert {row["item"] for row in found} == {f"i{n}" for n in range(NUM_ITEMS)} - {"i3", "i4"}


def test_without_a_history_encoder_a_history_is_shown_alone(recommender):
    for item in ("i3", "i30"):
        assert prompts(recommender, [None], [[item]]) == tokens(recommender, f"What fits item_{item} best?")
    with pytest.raises(ValueError, match="names a user, but request 0 has no user id"):
        recommender.tokenize([None], [["i30"]], UNSEEN_TEMPLATE)


def test_items_that_the_history_encoder_does_not_know_count_by_their_own_vectors(parts, mqs):
    model, tokenizer, store = parts
    tokenizer.attach(user_mq=mqs["user"])
    recommender = Recommender(model, tokenizer, store)
    recommender.history_encoder = Reader(store, "cid")
    mean = torch.nn.functional.normalize(store.get("item", ["i29", "i30"]), dim=1).mean(dim=0, keepdim=True)
    own = tokenizer.vector_token_ids("user", torch.nn.functional.normalize(mean, dim=1))[0].tolist()
    [prompt] = prompts(recommender, [None], [["i29", "i30"]])
    assert any(prompt[at : at + len(own)] == own for at in range(len(prompt)))


def test_a_history_of_which_another_store_has_nothing_is_shown_alone(parts, mqs, own_store):
    model, tokenizer, _ = parts
    tokenizer.attach(user_mq=mqs["user"])
    recommender = Recommender(model, tokenizer, own_store)
    recommender.history_encoder = Reader(own_store, "cid")
    own_store.delete("item", ["i29", "i30"])
    assert prompts(recommender, [None], [["i30"]]) == tokens(recommender, "What fits item_i30 best?")
    # Of two items the one that the store has counts.
    both, one = (prompts(recommender, [None], [history])[0] for history in (["i30", "i28"], ["i28"]))
    assert set(one) < set(both)


def test_an_item_counts_once_in_a_history(recommender):
    repeated, once = (recommender.recommend(["ann"], [items]) for items in (["i3", "i4", "i3"], ["i3", "i4"]))
    assert repeated == once


def test_neither_a_user_nor_a_history_is_refused(recommender):
    with pytest.raises(ValueError, match=r"^neither a user nor a history is named \(request 1\); "):
        recommender.tokenize(["ann", None], [["i3"], []])
    with pytest.raises(ValueError, match="^neither a user nor a history is named; "):
        recommender.recommend([None])


def test_all_bad_requests_are_named_at_once(recommender):
    users = ["zoe", "ann", "bob", None, *["gone"] * 9]
    histories = [None, ["i1", "x1", "x2", "x1", "x3", "x4"], ["i1"], [], *[["i2"]] * 9]
    with pytest.raises(KeyError) as caught:
        recommender.recommend(users, histories)
    assert caught.value.args[0] == (
        "user 'zoe' is unknown (request 0); item 'x1' is unknown, item 'x2' is unknown, item 'x3' is unknown and 1 more "
        "(request 1); neither a user nor a history is named (request 3); and 9 more requests; correct or add what is unknown, or "
        "pass on_unknown='skip' or 'popular'."
    )


BAD = (["zoe", "ann", "zoe", "bob", None], [None, ["i1", "x1"], ["i5", "i6"], ["x1"], ["x1"]])


def test_unknown_ids_are_skipped_where_it_is_asked_for(recommender):
    """An unknown user is answered by the history, or not at all; an unknown item is left out. All such answers say so."""
    nobody, known, by_history, alone, empty = recommender.recommend(*BAD, top_k=5, on_unknown="skip")
    expected = recommender.recommend(["ann", None, "bob"], [["i1"], ["i5", "i6"], []], top_k=5)
    notes = ["item 'x1' is unknown", "user 'zoe' is unknown", "item 'x1' is unknown"]
    for found, row, note in zip((known, by_history, alone), expected, notes):
        assert [{"item": one["item"], "score": pytest.approx(one["score"], abs=1e-6)} for one in found] == [
            {"item": one["item"], "score": one["score"]} for one in row
        ]
        assert {one["note"] for one in found} == {note}
    assert nobody == empty == []
    assert recommender.recommend(["zoe"], on_unknown="skip") == [[]]
    assert recommender.recommend(["ann"], on_unknown="skip") == recommender.recommend(["ann"])


def test_a_wording_that_names_the_unknown_user_is_replaced(recommender):
    found = recommender.recommend(["zoe", "ann"], [["i5"], ["i5"]], template=UNSEEN_TEMPLATE, on_unknown="skip")
    expected = recommender.recommend([None], [["i5"]])[0]
    assert [row["item"] for row in found[0]] == [row["item"] for row in expected] and "note" in found[0][0]
    assert all("note" not in row for row in found[1])


def test_those_without_a_history_get_what_is_popular(parts, own_store):
    """Items seen most often first, equal ones in the order of the store; withdrawn and filtered ones never."""
    own_store.set_seen(["ann", "bob", "cid"], [["i4", "i9", "i7"], ["i9", "i4", "i3"], ["i9", "i2"]])
    own_store.set_metadata(["i9", "i3", "i2"], [{"genre": "jazz"}] * 3)
    recommender = Recommender(*parts[:2], own_store)
    found = recommender.recommend(*BAD, top_k=4, on_unknown="popular")
    assert [row["item"] for row in found[0]] == ["i9", "i4", "i2", "i3"]
    assert {row["score"] for row in found[0]} == {None}
    assert {row["note"] for row in found[0]} == {"user 'zoe' is unknown; these are the most popular items"}
    assert {row["note"] for row in found[4]} == {"item 'x1' is unknown; these are the most popular items"}
    assert found[1:4] == recommender.recommend(*BAD, top_k=4, on_unknown="skip")[1:4]
    assert [row["item"] for row in recommender.recommend([None], on_unknown="popular", where={"genre": "jazz"})[0]] == [
        "i9",
        "i2",
        "i3",
    ]
    own_store.withdraw(["i9"])
    assert [row["item"] for row in recommender.recommend(["zoe"], top_k=1, on_unknown="popular")[0]] == ["i4"]


def test_nothing_is_popular_without_users(parts, own_store):
    own_store.delete("user", list(SEEN))
    with pytest.raises(ValueError, match="no item is popular: the store has no seen items of users; pass on_un"):
        Recommender(*parts[:2], own_store).recommend([None], on_unknown="popular")


def test_another_treatment_of_the_unknown_is_refused(recommender):
    with pytest.raises(ValueError, match="on_unknown is 'drop'; it must be one of 'error', 'skip', 'popular'"):
        recommender.recommend(["ann"], on_unknown="drop")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nothing; train one with `tokenrec train"):
        check_repository(tmp_path / "nothing")
