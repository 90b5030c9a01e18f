"""T5 retrieval against NumPy: Eq. 17 (LLM), 18 (projection), 19 (cosine), 20 (ranking loss).

Eq. 16, token-by-token generation, is what Eq. 17 replaces: one pass over the prompt of Eq. 15 and no generated token.
"""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration, T5Model, Trainer, TrainingArguments

from tokenrec_hf.models.configuration_tokenrec import T5GenerativeRetrievalConfig
from tokenrec_hf.models.modeling_t5_retrieval import KNOWN_WORDINGS, T5ForGenerativeRetrieval, find_entities
from tokenrec_hf.training.initialization import initialize_code_tokens, load_backbone

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
DIM, NUM_ITEMS = 6, 9
LOSSES = ["cosine_ranking", "softmax"]


def tiny(**settings):
    torch.manual_seed(0)
    model = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(**{**SIZES, "embedding_dim": DIM, **settings})).eval()
    model.bind_items(items())
    return model


def items():
    return 2.0 * torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def prompts():
    """Four prompts of 7, 5, 3 and 1 tokens, padded to 7."""
    ids = torch.randint(2, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [1]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def array(tensor):
    return tensor.detach().double().numpy()


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (np.sqrt(sum(x * x for x in a)) * np.sqrt(sum(y * y for y in b)))


# ---- Eq. 17 and 18: the query


def backbone(model):
    """The same weights in transformers' own class."""
    plain = T5Model(T5Config(**SIZES)).eval()
    plain.load_state_dict(model.transformer.state_dict())
    return plain


def naive_hidden(model, ids):
    """h of one unpadded prompt `[T]`."""
    plain = backbone(model)
    with torch.no_grad():
        return plain(input_ids=ids[None], decoder_input_ids=torch.tensor([[0]])).last_hidden_state[0, 0].numpy()


def naive_projection(model, h):
    linear = [layer for layer in model.projection if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 3
    for number, layer in enumerate(linear):
        h = array(layer.weight) @ h + array(layer.bias)
        if number < 2:
            h = np.maximum(h, 0)
    return h


def test_the_query_is_the_projected_first_decoder_state(prompts):
    """Eq. 17-18, each prompt on its own, unpadded."""
    model = tiny()
    queries = array(model.encode_queries(**prompts))
    for ids, mask, query in zip(prompts["input_ids"], prompts["attention_mask"], queries):
        expected = naive_projection(model, naive_hidden(model, ids[mask.bool()]))
        assert np.allclose(query, expected, atol=1e-5)


def test_a_prompt_takes_one_encoder_pass_and_one_decoder_step(prompts):
    """Eq. 17 instead of the generation of Eq. 16."""
    model = tiny()
    calls = []
    model.transformer.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.transformer.decoder.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(tuple(out.last_hidden_state.shape[:2])), with_kwargs=True
    )
    model(**prompts)
    assert calls == ["encoder", (4, 1)]


def test_a_configuration_from_scratch_starts_the_decoder_with_the_padding_token(prompts):
    sizes = {name: value for name, value in SIZES.items() if name != "decoder_start_token_id"}
    torch.manual_seed(0)
    model = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(**sizes, embedding_dim=DIM)).eval()
    assert torch.equal(model.encode_queries(**prompts), tiny().encode_queries(**prompts))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_padding_changes_neither_query_nor_loss(loss_type, prompts):
    model = tiny(loss_type=loss_type)
    labels, negatives = torch.tensor([1, 2, 3, 4]), torch.tensor([[5], [6], [7], [8]])
    inputs = {"labels": labels, "negative_ids": negatives if loss_type == "cosine_ranking" else None}
    before = model(**prompts, **inputs)
    padded = {name: torch.nn.functional.pad(one, (0, 6)) for name, one in prompts.items()}
    after = model(**padded, **inputs)
    assert torch.allclose(before.query_embeds, after.query_embeds, atol=1e-5)
    assert before.loss.item() == pytest.approx(after.loss.item(), rel=1e-5)


def test_the_attention_mask_is_derived_from_the_padding_id(prompts):
    model = tiny()
    assert torch.equal(model.encode_queries(prompts["input_ids"]), model.encode_queries(**prompts))


def test_embeddings_can_take_the_place_of_token_ids(prompts):
    model = tiny()
    embedded = model.get_input_embeddings()(prompts["input_ids"])
    found = model(inputs_embeds=embedded, attention_mask=prompts["attention_mask"]).query_embeds
    assert torch.allclose(found, model.encode_queries(**prompts), atol=1e-6)


# ---- Eq. 20 and the softmax losses


LABELS = torch.tensor([[1, 4, -100], [0, -100, -100], [8, 2, 3], [7, -100, -100]])
NEGATIVES = torch.tensor([[5, 6, 7], [2, 3, 1], [0, 1, 4], [2, 8, 5]])


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.2, -0.5])
def test_the_ranking_loss_is_that_of_the_paper(margin, prompts):
    """Eq. 20: the mean over positives of 1 - cos(z, q+) + max(0, cos(z, q-) - gamma); -100 counts for nothing."""
    model, q = tiny(margin=margin), array(items())
    output = model(**prompts, labels=LABELS, negative_ids=NEGATIVES)
    z = array(output.query_embeds)
    terms = [
        1 - cosine(z[i], q[LABELS[i, j]]) + max(0.0, cosine(z[i], q[NEGATIVES[i, j]]) - margin)
        for i in range(4)
        for j in range(3)
        if LABELS[i, j] >= 0
    ]
    assert len(terms) == 7
    assert output.loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_negative_below_the_margin_has_no_gradient():
    """Eq. 20 of one pair, with hand-made vectors: cos = 0.6 for the positive and 0.8 for the negative."""
    unit = torch.tensor([[0.6, 0.8]], requires_grad=True)
    for margin, expected in ((0.9, [-1.0, 0.0]), (0.5, [-1.0, 1.0])):
        model = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(**SIZES, embedding_dim=2, margin=margin))
        model.bind_items(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        loss = model._cosine_ranking_loss(unit, torch.tensor([0]), torch.tensor([1]))
        assert loss.item() == pytest.approx(1 - 0.6 + max(0, 0.8 - margin))
        assert torch.autograd.grad(loss, unit)[0][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_all_items_or_the_negatives_of_the_batch_compete_in_the_softmax(sampled, prompts):
    model, q = tiny(loss_type="softmax", temperature=0.2), array(items())
    negatives = torch.tensor([[5, 6], [2, 3], [5, 0], [2, 2]])
    output = model(**prompts, labels=LABELS, negative_ids=negatives if sampled else None)
    z, terms = array(output.query_embeds), []
    for i in range(4):
        for j in LABELS[i].tolist():
            if j < 0:
                continue
            others = [one for one in (negatives.flatten().tolist() if sampled else range(NUM_ITEMS)) if one != j]
            weights = [np.exp(cosine(z[i], q[other]) / 0.2) for other in [j, *others]]
            # A drawn item stands for all that are not drawn, too.
            weights[1:] = [weight * (NUM_ITEMS / negatives.numel() if sampled else 1) for weight in weights[1:]]
            terms.append(-np.log(weights[0] / sum(weights)))
    assert output.loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_parts_of_a_batch_add_up_to_its_loss_when_told_the_number_of_all_positives(loss_type, prompts):
    model = tiny(loss_type=loss_type)
    negatives = NEGATIVES if loss_type == "cosine_ranking" else None
    whole = model(**prompts, labels=LABELS, negative_ids=negatives).loss
    parts = [
        model(
            **{name: one[part] for name, one in prompts.items()},
            labels=LABELS[part],
            negative_ids=None if negatives is None else negatives[part],
            num_items_in_batch=torch.tensor(7),
        ).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.allclose(whole, sum(parts), rtol=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_label_may_be_given_without_a_second_dimension(loss_type, prompts):
    model = tiny(loss_type=loss_type)
    labels, negatives = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    if loss_type == "softmax":
        flat, square = model(**prompts, labels=labels), model(**prompts, labels=labels[:, None])
    else:
        flat = model(**prompts, labels=labels, negative_ids=negatives)
        square = model(**prompts, labels=labels[:, None], negative_ids=negatives[:, None])
    assert torch.equal(flat.loss, square.loss)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_batch_without_any_label_costs_nothing_and_is_finite(loss_type, prompts):
    model = tiny(loss_type=loss_type)
    loss = model(**prompts, labels=torch.full((4, 2), -100), negative_ids=torch.zeros(4, 2, dtype=torch.long)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_few_steps_of_training_bring_the_positives_to_the_top(loss_type, prompts):
    model = tiny(loss_type=loss_type, dropout_rate=0.0).train()
    labels = torch.tensor([1, 2, 3, 4])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        negatives = (labels[:, None] + 1 + torch.tensor([[step % 8]])) % 9
        loss = model(**prompts, labels=labels, negative_ids=negatives if loss_type == "cosine_ranking" else None).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = model.eval().encode_queries(**prompts) @ model.item_embeddings.T
    assert scores.argmax(dim=1).tolist() == labels.tolist()


def test_labels_without_items_say_what_to_call(prompts):
    model = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(**SIZES, embedding_dim=DIM))
    with pytest.raises(ValueError, match=r"call model.bind_items\(store.vectors\('item'\)\) first"):
        model(**prompts, labels=torch.zeros(4, dtype=torch.long))
    assert model(**prompts).loss is None


def test_the_ranking_loss_without_negatives_says_what_is_missing(prompts):
    with pytest.raises(ValueError, match="cosine_ranking loss needs negative_ids"):
        tiny()(**prompts, labels=torch.tensor([1, 2, 3, 4]))


# ---- weights


@pytest.fixture(scope="module", params=["t5", "t5-v1.1"])
def checkpoint(request, tmp_path_factory):
    """A saved T5, in the layout of T5 (tied output) or of T5 v1.1 (gated, untied)."""
    folder = tmp_path_factory.mktemp(request.param)
    extra = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if "v1" in request.param else {}
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(T5Config(**SIZES, dropout_rate=0.05, **extra))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model


def test_the_backbone_of_a_checkpoint_is_loaded_bit_for_bit(checkpoint, prompts):
    folder, original = checkpoint
    model = load_backbone(str(folder), embedding_dim=DIM).eval()
    expected = original.state_dict()
    loaded = {name.removeprefix("transformer."): one for name, one in model.state_dict().items() if "proj" not in name}
    for name, value in loaded.items():
        assert torch.equal(value, expected[name]), name
    assert set(loaded) == {name for name in expected if name != "lm_head.weight"}
    assert model.config.feed_forward_proj == original.config.feed_forward_proj
    assert model.config.dropout_rate == 0.05

    original = original.eval()
    with torch.no_grad():
        states = original.encoder(**prompts).last_hidden_state
        hidden = original.decoder(
            input_ids=torch.zeros(4, 1, dtype=torch.long),
            encoder_hidden_states=states,
            encoder_attention_mask=prompts["attention_mask"],
        ).last_hidden_state[:, 0]
        assert torch.allclose(model.projection(hidden), model.encode_queries(**prompts), atol=1e-5)


def test_a_retrieval_model_saves_and_loads_bit_for_bit(checkpoint, prompts, tmp_path):
    model = load_backbone(str(checkpoint[0]), embedding_dim=DIM).eval()
    model.save_pretrained(tmp_path)
    loaded = T5ForGenerativeRetrieval.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.encode_queries(**prompts), model.encode_queries(**prompts))
    assert loaded.config.embedding_dim == DIM


def test_settings_replace_those_of_the_backbone_but_not_its_sizes(checkpoint):
    model = load_backbone(
        str(checkpoint[0]), embedding_dim=DIM, dropout_rate=0.3, loss_type="softmax", d_model=99, num_layers=7
    )
    assert model.config.dropout_rate == 0.3 and model.config.loss_type == "softmax"
    assert model.config.d_model == 16 and model.config.num_layers == 2
    assert model.config.projection_dim == 32


def test_a_missing_backbone_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        load_backbone(str(tmp_path / "nothing-here"))


def projection_gain(model):
    """Spread of the output of the projection for inputs of unit spread."""
    torch.manual_seed(1)
    return model.eval().projection(torch.randn(500, model.config.d_model)).std().item()


def test_a_fresh_projection_keeps_the_size_of_its_input(tmp_path):
    sizes = {**SIZES, "d_model": 64}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    fresh = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(**sizes, embedding_dim=32))
    tuned = load_backbone(str(tmp_path), embedding_dim=32)
    for model in (fresh, tuned):
        for layer in (layer for layer in model.projection if isinstance(layer, torch.nn.Linear)):
            assert layer.weight.std().item() == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.1)
            assert (layer.bias == 0).all()
        assert 0.5 < projection_gain(model) < 3


def test_item_vectors_are_no_part_of_the_checkpoint(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "item" in name]
    assert len(T5ForGenerativeRetrieval.from_pretrained(tmp_path).item_embeddings) == 0
    assert "item_embeddings" not in model.state_dict()
    assert "item_embeddings" not in json.loads((tmp_path / "config.json").read_text())


def test_bound_items_are_normalised_copies():
    model, given = tiny(), items()
    model.bind_items(given)
    assert torch.allclose(model.item_embeddings.norm(dim=1), torch.ones(NUM_ITEMS))
    assert torch.equal(given, items())


def test_item_vectors_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"shape \[5, 7\] but the model expects \[n, 6\].*embedding_dim=7"):
        tiny().bind_items(torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"shape \[6\] but the model expects"):
        tiny().bind_items(torch.zeros(6))


def test_item_vectors_that_are_no_numbers_are_refused():
    bad = items()
    bad[2, 3] = float("nan")
    with pytest.raises(ValueError, match="item vector has a value that is not finite"):
        tiny().bind_items(bad)


def code_tokens(pooling="decoder"):
    model = tiny(vocab_size=400, d_model=64, pooling=pooling)
    model.get_input_embeddings().weight.data.mul_(3.0)
    token_ids = 200 + torch.randperm(3 * 20, generator=torch.Generator().manual_seed(0)).view(3, 20)
    codebooks = 5.0 + torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(2))
    codebooks[:, 1] = codebooks[:, 0] + 0.05 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return model, token_ids, codebooks


def test_code_tokens_alone_are_initialised_and_with_the_spread_of_the_words():
    """Eq. 8: a code token's embedding stands for its codeword."""
    model, token_ids, codebooks = code_tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize_code_tokens(model, token_ids, codebooks, num_words=200)
    table = model.get_input_embeddings().weight.detach()
    changed = (table != before["transformer.shared.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(token_ids.flatten().tolist())
    for ids in token_ids:
        assert table[ids].std().item() == pytest.approx(table[:200].std().item(), rel=0.05)
    others = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("shared" in name or "embed_tokens" in name for name in others)


def test_code_tokens_resemble_each_other_as_their_codewords_do():
    """Eq. 8."""
    model, token_ids, codebooks = code_tokens()
    initialize_code_tokens(model, token_ids, codebooks, num_words=200)
    table = array(model.get_input_embeddings().weight)
    for ids, words in zip(token_ids, array(codebooks)):
        centred, rows = words - words.mean(0), table[ids]
        assert cosine(rows[0], rows[1]) > 0.95
        upper = np.triu_indices(20, 1)
        before = [cosine(centred[i], centred[j]) for i, j in zip(*upper)]
        after = [cosine(rows[i], rows[j]) for i, j in zip(*upper)]
        assert np.corrcoef(before, after)[0, 1] > 0.6
    # Words of different books have projections of their own.
    across = [abs(cosine(table[a], table[b])) for a in token_ids[0] for b in token_ids[1]]
    assert np.mean(across) < 0.2


def test_the_tokens_of_residual_codewords_add_up_as_their_codewords_do():
    model, token_ids, codebooks = code_tokens()
    codebooks[1] *= 0.3
    initialize_code_tokens(model, token_ids, codebooks, num_words=200, residual=True)
    table, words = array(model.get_input_embeddings().weight), array(codebooks)
    # One linear map for all the books: from the differences of the first book follow those of a sum over all.
    random = np.random.default_rng(0)
    one, other = random.integers(0, 20, (2, 200, len(words)))
    books = np.arange(len(words))
    before = (words[books, one] - words[books, other]).sum(1)
    after = (table[token_ids.numpy()[books, one]] - table[token_ids.numpy()[books, other]]).sum(1)
    mapping = np.linalg.lstsq(before, after, rcond=None)[0]
    np.testing.assert_allclose(before @ mapping, after, atol=1e-4)
    assert table[token_ids.flatten()].std() == pytest.approx(table[:200].std(), rel=0.05)


def test_alike_codewords_still_get_tokens_that_differ():
    model, token_ids, _ = code_tokens()
    initialize_code_tokens(model, token_ids, torch.ones(3, 20, 32), num_words=200)
    rows = model.get_input_embeddings().weight[token_ids.flatten()]
    assert rows.isfinite().all() and len(rows.unique(dim=0)) == 60


def test_the_initialisation_of_code_tokens_depends_on_its_seed_only():
    tables = []
    for seed in (1, 1, 2):
        model, token_ids, codebooks = code_tokens()
        initialize_code_tokens(model, token_ids, codebooks, num_words=200, seed=seed)
        tables.append(model.get_input_embeddings().weight.detach())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


# ---- history pooling: T5 as a sequence model beside the collaborative vectors

# Tokens 20 to 25 are those of 2 codebooks of 3 user codewords, 26 to 34 those of 3 codebooks of 3 item codewords; a user's codes
# follow one token of a word, an item's two.
ENTITIES = {
    "user": {"first": 20, "num_codebooks": 2, "codebook_size": 3, "prefix": 1},
    "item": {"first": 26, "num_codebooks": 3, "codebook_size": 3, "prefix": 2},
}
HISTORIES = [[(0, 1, 2), (2, 2, 2), (1, 0, 1)], [(0, 0, 0)], [], [(1, 1, 0), (1, 1, 0)], []]
USERS = [(0, 2), None, (1, 1), (2, 0), None]


def reading_history(**settings):
    settings = {"pooling": "history", "loss_type": "softmax", "temperature": 0.2, "history_weight": 0.7, **settings}
    torch.manual_seed(0)
    config = T5GenerativeRetrievalConfig(**SIZES, embedding_dim=DIM, entity_tokens=ENTITIES, **settings)
    model = T5ForGenerativeRetrieval(config).eval()
    with torch.no_grad():
        model.user_codewords.copy_(torch.randn(6, DIM, generator=torch.Generator().manual_seed(4)))
    model.bind_items(items(), ITEM_TOKENS)
    return model


ITEM_TOKENS = (
    26 + torch.tensor([[0, 3, 6]]) + torch.randint(3, (NUM_ITEMS, 3), generator=torch.Generator().manual_seed(6))
)


def written(user, history):
    """The tokens of a prompt, and its words alone."""
    words = [5, 9]
    ids = [5, *([] if user is None else [3, 20 + user[0], 23 + user[1]]), 9]
    for codes in history:
        ids += [4, 6, *(26 + 3 * book + code for book, code in enumerate(codes))]
    return ids + [8, 1], words + [8, 1]


@pytest.fixture(scope="module")
def histories():
    rows = [written(*row)[0] for row in zip(USERS, HISTORIES)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def naive_outputs(model, words, history):
    """The decoder's outputs of one prompt, in transformers' own class: the words in the encoder, an item a position."""
    table = array(model.get_input_embeddings().weight)
    inputs = [table[0]] + [sum(table[26 + 3 * book + code] for book, code in enumerate(codes)) for codes in history]
    with torch.no_grad():
        return (
            backbone(model)(
                input_ids=torch.tensor([words]),
                decoder_inputs_embeds=torch.tensor(np.array([inputs]), dtype=torch.float32),
            )
            .last_hidden_state[0]
            .double()
            .numpy()
        )


def unit(vector):
    return vector / np.sqrt((vector * vector).sum())


def naive_user(model, user):
    words = array(model.user_codewords)
    return np.zeros(DIM) if user is None else unit(words[user[0]] + words[3 + user[1]])


def naive_learned(model, tokens):
    table = array(model.get_input_embeddings().weight)
    return unit(sum(table[token] for token in tokens.tolist()))


def test_a_query_joins_the_users_vector_and_what_follows_the_history(histories):
    model = reading_history()
    queries = array(model.encode_queries(**histories))
    for query, user, history in zip(queries, USERS, HISTORIES):
        last = naive_outputs(model, written(user, history)[1], history)[-1]
        weight = 0.7 if history or user is None else 0.0
        assert np.allclose(query, np.r_[naive_user(model, user) / 0.2, weight * last], atol=1e-5)


def test_the_score_of_an_item_is_one_product_of_query_and_stored_vector(histories):
    model = reading_history()
    stored = array(model.item_vectors(items(), ITEM_TOKENS))
    assert np.array_equal(stored[:, :DIM], array(items()))
    for query, user, history in zip(array(model.encode_queries(**histories)), USERS, HISTORIES):
        last = naive_outputs(model, written(user, history)[1], history)[-1] * (bool(history) or user is None)
        expected = [
            naive_user(model, user) @ unit(array(q)) / 0.2 + 0.7 * last @ naive_learned(model, tokens)
            for q, tokens in zip(items(), ITEM_TOKENS)
        ]
        # Stored vectors are longer than those of the formula, by the length of q and the square root of 2.
        found = [cosine(query, vector) * np.sqrt(query @ query) * np.sqrt(2) for vector in stored]
        assert np.allclose(found, expected, atol=1e-5)


def test_users_have_no_part_that_t5_has_learned():
    vectors = torch.randn(3, DIM)
    stored = reading_history().user_vectors(vectors)
    assert torch.equal(stored[:, :DIM], vectors) and stored.shape == (3, DIM + 16) and not stored[:, DIM:].any()


def test_every_position_learns_the_item_that_follows_it(histories):
    model = reading_history()
    labels = torch.tensor([[4, 2, 0, 7], [3, 1, -100, -100], [5, -100, -100, -100], [1, -100, 6, -100], [-100] * 4])
    learned = np.stack([naive_learned(model, tokens) for tokens in ITEM_TOKENS])
    terms = []
    for row, user, history in zip(labels.tolist(), USERS, HISTORIES):
        for label, output in zip(row, naive_outputs(model, written(user, history)[1], history)):
            scores = learned @ output
            if label >= 0:
                terms.append(np.log(np.exp(scores).sum()) - scores[label])
    assert model(**histories, labels=labels).loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert model(**histories, labels=labels, num_items_in_batch=3).loss.item() == pytest.approx(
        sum(terms) / 3, rel=1e-5
    )


@pytest.mark.parametrize("logits", [1, 30, 1000])
def test_gradients_are_those_of_the_plain_softmax_however_many_logits_are_computed_at_once(
    histories, logits, monkeypatch
):
    """The loss and the sums of code tokens compute their gradients themselves; here PyTorch computes them."""
    monkeypatch.setattr("tokenrec_hf.models.functional.LOGITS", logits)
    labels = torch.tensor([[4, 0, 7, -100], [3, 3, -100, -100], [-100] * 4, [1, 1, 2, -100], [0, -100, -100, -100]])
    model = reading_history()
    (3 * model(**histories, labels=labels).loss).backward()
    plain = reading_history()
    hidden = plain._read_history(plain.read_prompts(**histories))
    embedded = plain.get_input_embeddings()(ITEM_TOKENS).sum(dim=1)
    scores = hidden[:, : labels.shape[1]] @ torch.nn.functional.normalize(embedded, dim=-1).T
    (3 * torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())).backward()
    expected = dict(plain.named_parameters())
    for name, weights in model.named_parameters():
        assert torch.allclose(weights.grad, expected[name].grad, atol=1e-5), name


def test_sampled_items_of_the_batch_compete_in_place_of_all(histories):
    model, sampled = reading_history(), [2, 5, 5, 0, 8]
    labels = torch.tensor([[4], [3], [5], [1], [0]])
    terms = []
    for (label,), user, history in zip(labels.tolist(), USERS, HISTORIES):
        # One label is the item after the whole history.
        output = naive_outputs(model, written(user, history)[1], history)[-1]
        positive, *others = [
            output @ naive_learned(model, ITEM_TOKENS[row])
            for row in (label, *(one for one in sampled if one != label))
        ]
        total = np.exp(positive) + np.exp(others).sum() * len(ITEM_TOKENS) / len(sampled)
        terms.append(np.log(total) - positive)
    found = model(**histories, labels=labels, negative_ids=torch.tensor(sampled)[:, None]).loss.item()
    assert found == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("change", [8, -2])
def test_the_loss_and_its_gradient_survive_a_vocabulary_of_another_size(histories, change):
    model, labels = reading_history(), torch.tensor([[4], [3], [5], [1], [0]])
    before = model(**histories, labels=labels).loss.item()
    model.resize_token_embeddings(model.config.vocab_size + change)
    after = model(**histories, labels=labels).loss
    after.backward()
    assert after.item() == pytest.approx(before, rel=1e-6)
    assert len(model.get_input_embeddings().weight.grad) == model.config.vocab_size


def test_labels_that_are_neither_of_every_position_nor_of_the_last_are_refused(histories):
    length = 1 + max(map(len, HISTORIES))
    for wrong in (2, length + 1):
        with pytest.raises(
            ValueError, match=rf"labels have {wrong} columns .* needs 1 .* or {length}, .*next_items=True"
        ):
            reading_history()(**histories, labels=torch.zeros(5, wrong, dtype=torch.long))


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_company_change_no_query_of_a_history(histories, left):
    model = reading_history()
    queries = model.encode_queries(**histories)
    sides = (6, 0) if left else (0, 6)
    padded = {name: torch.nn.functional.pad(one, sides) for name, one in histories.items()}
    assert torch.allclose(model.encode_queries(**padded), queries, atol=1e-5)
    assert torch.allclose(model.encode_queries(histories["input_ids"]), queries, atol=1e-6)
    assert torch.allclose(model.encode_by_length(**histories), queries, atol=1e-5)
    for row, (ids, mask) in enumerate(zip(*histories.values())):
        assert torch.allclose(model.encode_queries(ids[mask.bool()][None])[0], queries[row], atol=1e-5)
    # A wording of fewer words than those beside it.
    ids, mask = histories["input_ids"], histories["attention_mask"].clone()
    mask[0, 0] = 0
    assert torch.allclose(model.encode_queries(ids, mask)[0], model.encode_queries(ids[:1], mask[:1])[0], atol=1e-5)


def test_a_history_costs_one_position_per_item(histories):
    model, read = reading_history(), []
    model.transformer.encoder.register_forward_hook(lambda *a: read.append(a[2].last_hidden_state.shape[1]))
    model.transformer.decoder.register_forward_hook(lambda *a: read.append(a[2].last_hidden_state.shape[1]))
    model.encode_queries(**histories)
    assert read == [4, 1 + 3]


def test_prompts_of_users_alone_do_not_go_through_t5(histories):
    model, calls = reading_history(), []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    alone = {
        name: one[2:4, :6] for name, one in histories.items()
    }  # a user without items, and one whose items are cut off
    assert not find_entities(alone["input_ids"], alone["attention_mask"].bool(), ENTITIES["item"]).present.any()
    query = model.encode_queries(**alone)
    assert not calls and not query[:, DIM:].any()
    assert torch.allclose(query[0], model.encode_queries(**histories)[2]) and len(calls) == 1


def test_a_wording_is_read_again_once_a_weight_has_changed(histories):
    model = reading_history()
    reads = []
    model.get_encoder().register_forward_hook(lambda *_: reads.append(1))

    def queries(ids, mask):
        """The queries that are answered with kept states, compared with those of a pass with gradients, which keeps none."""
        found = model.encode_by_length(ids, mask)
        seen = len(reads)
        assert torch.allclose(found, model.encode_queries(ids, mask), atol=1e-5)
        del reads[seen:]
        return found

    def one(row):
        return histories["input_ids"][row : row + 1], histories["attention_mask"][row : row + 1]

    queries(*one(0))
    queries(*one(3))
    assert len(reads) == 1, "the words of both are the same"
    words = torch.tensor([[5, 7, 4, 6, 26, 29, 32, 8, 1]])
    first = queries(words, None)
    assert len(reads) == 2 and queries(*one(0)).shape == first.shape and len(reads) == 2
    last = model.get_encoder().block[0].layer[1].DenseReluDense.wo
    with torch.no_grad():
        last.weight.mul_(3)
    assert not torch.allclose(queries(words, None), first, atol=1e-3)
    model.load_state_dict(reading_history().state_dict())
    assert queries(words, None).tolist() == first.tolist()
    last.weight.data = last.weight * 3
    assert not torch.allclose(queries(words, None), first, atol=1e-3)
    last.weight.data = last.weight / 3
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.encode_queries(words)
    assert torch.allclose(queries(words, None), first, atol=1e-5) and not torch.allclose(
        mixed.float(), first, atol=1e-5
    )


def test_the_states_of_many_wordings_are_not_kept_for_ever():
    model = reading_history()
    for word in range(10, 10 + 2 * KNOWN_WORDINGS):
        model.encode_by_length(torch.tensor([[5, word % 15 + 2, word // 15 + 2, 4, 6, 26, 29, 32, 8, 1]]))
    assert 0 < len(model._kept) <= KNOWN_WORDINGS


def test_a_step_of_a_fused_optimiser_counts_though_it_gives_no_new_version():
    model, twin = reading_history(), reading_history()
    words = torch.tensor([[5, 7, 4, 6, 26, 29, 32, 8, 1]])
    before = model.encode_by_length(words, None)
    for one in (model, twin):
        optimiser = torch.optim.AdamW(one.get_encoder().block.parameters(), lr=1e-4, fused=True)
        one.encode_queries(words).sum().backward()
        optimiser.step()
    after = model.encode_by_length(words, None)
    assert not torch.equal(after, before) and torch.equal(after, twin.encode_by_length(words, None))


@pytest.mark.parametrize("change", ["an element", "a word's embedding through .data", "half precision and back"])
def test_small_changes_of_the_weights_count(change):
    model, twin = reading_history(), reading_history()
    words = torch.tensor([[5, 7, 4, 6, 26, 29, 32, 8, 1]])
    before = model.encode_by_length(words, None)
    for one in (model, twin):
        layer = one.get_encoder().block[0].layer[1].DenseReluDense.wo
        with torch.no_grad():
            if change == "an element":
                layer.weight[1, 1] += 1
            elif change == "half precision and back":
                one.bfloat16().float()
            else:
                one.get_input_embeddings().weight.data[7, 1] += 1
    after = model.encode_by_length(words, None)
    assert not torch.equal(after, before) and torch.equal(after, twin.encode_by_length(words, None))


def test_t5_is_not_asked_where_its_weight_is_zero(histories, monkeypatch):
    model = reading_history(history_weight=0.0)
    prompts = model.read_prompts(**histories)
    with torch.no_grad():
        expected = model.history_query(prompts)
        monkeypatch.setattr(model, "_read_history", None)
        found = model.encode_queries(**histories)
    assert found.tolist() == expected.tolist() and found[:, :DIM].abs().sum() > 0


def test_later_items_do_not_change_what_is_predicted_before_them(histories):
    model = reading_history()
    hidden = model._read_history(model.read_prompts(**histories))
    changed = histories["input_ids"].clone()
    place = (changed[0] == 26 + 1).nonzero()[-1, 0]  # the first token of the last item
    changed[0, place] = 26
    after = model._read_history(model.read_prompts(changed, None))
    assert not torch.allclose(after[0, 3], hidden[0, 3], atol=1e-4)
    assert torch.allclose(after[0, :3], hidden[0, :3], atol=1e-6)


def test_a_model_that_reads_histories_is_saved_with_its_users_codewords(histories, tmp_path):
    model = reading_history()
    model.save_pretrained(tmp_path)
    loaded = T5ForGenerativeRetrieval.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_queries(**histories), model.encode_queries(**histories))
    assert loaded.config.query_dim == DIM + 16


def test_bound_items_follow_the_model_to_another_device_and_are_not_saved():
    model = reading_history()
    assert not {name for name in model.state_dict() if "item" in name or "offsets" in name}
    moved = model.to("meta")
    assert {one.device.type for one in (moved.item_embeddings, moved.item_tokens, *moved.buffers())} == {"meta"}


def test_training_leaves_the_codewords_of_users_as_they_are(histories):
    """DDP hangs on a weight without gradient."""
    model = reading_history().train()
    before = model.user_codewords.clone()
    model(**histories, labels=torch.tensor([[4, 2, 0, 7]] * 5)).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    assert torch.equal(model.user_codewords, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients_of_histories(histories):
    model = reading_history(dropout_rate=0.0).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    for one in (model, other):
        one(**histories, labels=torch.tensor([[4, 2, 0, 7]] * 5)).loss.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_a_model_that_reads_histories_runs_in_bfloat16(histories):
    labels = torch.tensor([[4, 2, 0, 7]] * 5)
    exact = reading_history()(**histories, labels=labels).loss.item()
    output = reading_history().to(torch.bfloat16)(**histories, labels=labels)
    output.loss.backward()
    assert output.query_embeds.dtype == torch.bfloat16 and output.loss.item() == pytest.approx(exact, rel=0.1)


def test_broken_code_tokens_in_a_text_do_no_harm():
    """Text may name tokens that are no whole user or item."""
    ids = torch.tensor([[22, 21, 34, 26, 5, 1], [26, 29, 32, 25, 20, 26]])
    assert reading_history().encode_queries(ids).isfinite().all()


def test_reading_histories_needs_tokens_of_users_and_items(histories):
    with pytest.raises(ValueError, match="history pooling needs entity_tokens; build_retrieval_model sets them"):
        tiny(pooling="history", loss_type="softmax")
    with pytest.raises(ValueError, match="pooling is 'history', which is trained with loss_type='softmax' only"):
        reading_history(loss_type="cosine_ranking")
    model = reading_history()
    for tokens in (None, torch.as_tensor(ITEM_TOKENS)[:, :2]):
        with pytest.raises(ValueError, match="needs the 3 code tokens of each item; give bind_items the token_ids"):
            model.bind_items(items(), tokens)
    with pytest.raises(ValueError, match="reads token ids; give input_ids"):
        model.encode_queries(inputs_embeds=model.get_input_embeddings()(histories["input_ids"]))


# ---- training


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(prompts):
    model = tiny(dropout_rate=0.0).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    passes = []
    for one in (model, other):
        layer = one.transformer.encoder.block[0].layer[0].SelfAttention.q
        layer.register_forward_hook(lambda *_, one=one: passes.append(one is other))
        one(**prompts, labels=LABELS, negative_ids=NEGATIVES).loss.backward()
    assert passes == [False, True, True]  # checkpointing computes a layer once more
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_every_weight_learns(prompts):
    """DDP hangs on a weight without gradient."""
    model = tiny().train()
    model(**prompts, labels=LABELS, negative_ids=NEGATIVES).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("bind_first", [True, False])
def test_the_model_runs_in_bfloat16(loss_type, bind_first, prompts):
    model = tiny(loss_type=loss_type).to(torch.bfloat16)
    if not bind_first:
        model.bind_items(items())
    negatives = NEGATIVES if loss_type == "cosine_ranking" else None
    exact = tiny(loss_type=loss_type)(**prompts, labels=LABELS, negative_ids=negatives).loss.item()
    output = model(**prompts, labels=LABELS, negative_ids=negatives)
    output.loss.backward()
    assert output.query_embeds.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(exact, rel=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tiny(loss_type=loss_type)(**prompts, labels=LABELS, negative_ids=negatives).loss.item()
    assert mixed == pytest.approx(exact, rel=0.1)


def test_gradient_accumulation_takes_the_same_steps_as_one_large_batch(prompts, tmp_path):
    # Prompts with different numbers of positives: it is the positives of all batches that count alike.
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": label, "negative_ids": n}
        for i, m, label, n in zip(*prompts.values(), LABELS, NEGATIVES)
    ]
    trained = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = tiny(dropout_rate=0.0)
        arguments = TrainingArguments(
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append(model.state_dict())
    start = tiny().state_dict()
    for name in start:
        assert torch.allclose(trained[0][name], trained[1][name], atol=1e-5), name
    assert any(not torch.equal(start[name], trained[0][name]) for name in start)


# ---- Queries of prompts of all lengths


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_short_prompt_is_not_padded_to_the_longest(left, with_mask, monkeypatch):
    model = tiny()
    lengths = np.random.default_rng(0).permutation(np.r_[3:33, 40, 61, 90, 200, 1])
    ids = torch.zeros(len(lengths), 200, dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[200 - length if left else 0 :][:length] = torch.randint(2, 40, (int(length),))
    alone = [model.encode_queries(row[row > 0][None])[0].tolist() for row in ids]
    read = []
    encode = model.encode_queries
    monkeypatch.setattr(model, "encode_queries", lambda ids, mask: read.append(ids.numel()) or encode(ids, mask))
    mask = (ids > 0).long() if with_mask else None
    np.testing.assert_allclose(array(model.encode_by_length(ids, mask)), alone, atol=1e-4)
    assert left or sum(read) < 2 * 32 * len(lengths) < ids.numel()


@pytest.mark.parametrize("training", [True, False])
def test_encoding_by_length_has_no_dropout_and_leaves_the_mode_as_it_was(prompts, training):
    model = tiny(dropout_rate=0.5).train(training)
    first = model.encode_by_length(**prompts)
    assert torch.equal(model.encode_by_length(**prompts), first)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max' but must be 'decoder' or 'history'"),
        ({"loss_type": "bpr"}, "loss_type is 'bpr' but must be 'cosine_ranking' or 'softmax'"),
        ({"temperature": 0}, "temperature is 0 but must be above 0"),
        ({"embedding_dim": 0}, "embedding_dim is 0 but must be from 1 to"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(Exception, match=message):
        T5GenerativeRetrievalConfig(**settings)


def test_a_saved_configuration_loads_with_all_its_settings(tmp_path):
    config = T5GenerativeRetrievalConfig(
        **SIZES,
        embedding_dim=5,
        pooling="history",
        loss_type="softmax",
        margin=0.2,
        temperature=0.05,
        space_ids={"user": "a"},
    )
    config.save_pretrained(tmp_path)
    loaded = T5GenerativeRetrievalConfig.from_pretrained(tmp_path)
    for name in (
        "embedding_dim",
        "pooling",
        "loss_type",
        "margin",
        "temperature",
        "space_ids",
        "projection_dim",
        *SIZES,
    ):
        assert getattr(loaded, name) == getattr(config, name), name
