"""Every T5 that people start from, in the layout of its published checkpoint: real configurations, one layer deep."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration, T5Tokenizer

from tokenrec_hf import EmbeddingStore, MQTokenizerConfig, MQTokenizerModel
from tokenrec_hf.repository.build import build_retrieval_model
from tokenrec_hf.training.initialization import build_tokenizer, load_backbone
from tokenrec_hf.training.recipe import Recipe

COMMON = {
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_layers": 1,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
# The first ones know neither `feed_forward_proj` nor `num_decoder_layers`.
ORIGINAL = {
    **COMMON,
    "architectures": ["T5ForConditionalGeneration"],
    "n_positions": 512,
    "output_past": True,
    "task_specific_params": {"summarization": {"early_stopping": True, "max_length": 200, "num_beams": 4}},
}
GATED = {
    **COMMON,
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 1,
    "num_heads": 6,
    "tie_word_embeddings": False,
}
# As in the config.json of the published checkpoints, but for the depth and, for mT5, the 250,112 rows of its vocabulary.
CONFIGS = {
    "t5-small": {**ORIGINAL, "d_ff": 2048, "d_kv": 64, "d_model": 512, "num_heads": 8},
    "t5-base": {**ORIGINAL, "d_ff": 3072, "d_kv": 64, "d_model": 768, "num_heads": 12},
    "t5-v1_1-small": GATED,
    "flan-t5-small": {**GATED, "n_positions": 512, "output_past": True, "tokenizer_class": "T5Tokenizer"},
    "mt5-small": {
        **GATED,
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "tokenizer_class": "T5Tokenizer",
        "vocab_size": 5112,
    },
}
TOKENS = {"mt5-small": 5100}  # of the tokenizer, always fewer than rows; of the others 32,100
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
NEVER_USED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
DIM, NUM_CODEBOOKS, CODEBOOK_SIZE = 6, 2, 40  # 160 code tokens, more than the rows that are free


@pytest.fixture(scope="module", params=CONFIGS)
def backbone(request, tmp_path_factory):
    """Name, folder and tensors of a checkpoint that `save_pretrained` of its own class wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param]
    is_mt5 = config["model_type"] == "mt5"
    config_class, model_class = (
        (MT5Config, MT5ForConditionalGeneration) if is_mt5 else (T5Config, T5ForConditionalGeneration)
    )
    torch.manual_seed(0)
    model = model_class(config_class(**config))
    # The published ones have an output layer of their own, or one that is the embedding.
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings") is False:
        state["lm_head.weight"] = torch.randn_like(state["shared.weight"])
    model.save_pretrained(folder)
    return request.param, folder, state


@pytest.fixture(scope="module", params=["as saved today", "as converted from .bin"])
def checkpoint(request, backbone, tmp_path_factory):
    """Name, folder and tensors of a checkpoint, and whether it holds copies of the embedding and of what was never used."""
    name, folder, state = backbone
    if request.param == "as saved today":
        return name, folder, state
    folder = tmp_path_factory.mktemp("converted")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    stored = dict(state) | {copy: state["shared.weight"].clone() for copy in COPIES}
    if name in ("t5-small", "t5-base"):
        stored[NEVER_USED] = torch.randn(32, CONFIGS[name]["num_heads"])
    save_file(
        {key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return name, folder, state


@pytest.fixture
def log(caplog):
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.logging.disable_propagation()


def test_every_tensor_of_the_backbone_is_loaded_bit_for_bit(checkpoint, log):
    name, folder, state = checkpoint
    model = load_backbone(str(folder), embedding_dim=DIM)
    loaded = model.transformer.state_dict()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state["shared.weight" if key in COPIES else key]), key
    assert {key for key in state if key != "lm_head.weight"} <= set(loaded)
    # Nothing is said about what a retrieval model has no use for, and nothing of T5's own is missing.
    assert "UNEXPECTED" not in log.text and "lm_head" not in log.text
    assert "transformer." not in log.text
    assert "to instantiate a model of type" not in log.text
    assert model.config.model_type == "t5_generative_retrieval"
    wanted = CONFIGS[name].get("feed_forward_proj", "relu")
    assert (model.config.feed_forward_proj, model.config.dense_act_fn) == (
        wanted,
        "relu" if wanted == "relu" else "gelu_new",
    )


def test_the_states_are_those_of_the_original_class(backbone):
    name, folder, _ = backbone
    model_class = MT5ForConditionalGeneration if name == "mt5-small" else T5ForConditionalGeneration
    original = model_class.from_pretrained(folder).eval()
    model = load_backbone(str(folder), embedding_dim=DIM).eval()
    model.projection = torch.nn.Identity()
    inputs = {"input_ids": torch.tensor([[5, 9, 4711, 1], [8, 1, 0, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    with torch.no_grad():
        states = original.encoder(**inputs).last_hidden_state
        start = torch.zeros(2, 1, dtype=torch.long)
        decoded = original.decoder(start, encoder_hidden_states=states, encoder_attention_mask=inputs["attention_mask"])
        expected = decoded.last_hidden_state[:, 0]
        assert torch.allclose(model.encode_queries(**inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def parts():
    """MQ-Tokenizers and a store for them."""
    torch.manual_seed(0)
    config = MQTokenizerConfig(
        embedding_dim=DIM, num_codebooks=NUM_CODEBOOKS, codebook_size=CODEBOOK_SIZE, codebook_dim=5, hidden_dim=8
    )
    user_mq, item_mq = MQTokenizerModel(config), MQTokenizerModel(config)
    store = EmbeddingStore(DIM)
    for kind in ("user", "item"):
        store.upsert(kind, [str(number) for number in range(20)], torch.randn(20, DIM))
    return user_mq, item_mq, store


def plain_tokenizer(size):
    """A T5 vocabulary of `size` tokens, 100 of them T5's extra ids."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{number}", -10.0) for number in range(size - 103))]
    return T5Tokenizer(vocab=words + [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))])


def test_code_tokens_take_the_free_rows_first_and_are_all_set_anew(checkpoint, parts):
    name, folder, state = checkpoint
    user_mq, item_mq, store = parts
    words, tokens = state["shared.weight"], TOKENS.get(name, 32100)
    assert len(words) > tokens
    tokenizer = build_tokenizer(plain_tokenizer(tokens), user_mq=user_mq, item_mq=item_mq, store=store)
    settings = Recipe.load("paper").retrieval
    settings = settings.model_copy(update={"backbone": str(folder), "config": {}})
    model = build_retrieval_model(settings, tokenizer, user_mq, item_mq)

    ids = torch.from_numpy(tokenizer.code_token_ids("user")), torch.from_numpy(tokenizer.code_token_ids("item"))
    codes = torch.cat([one.flatten() for one in ids])
    assert codes.tolist() == list(range(tokens, tokens + 160)) == list(range(tokens, len(tokenizer)))
    table = model.get_input_embeddings().weight.detach()
    assert len(table) == model.config.vocab_size == tokens + 160
    assert table is model.transformer.encoder.embed_tokens.weight.detach() or torch.equal(
        table, model.transformer.encoder.embed_tokens.weight
    )
    assert torch.equal(table[:tokens], words[:tokens])
    # The rows that the checkpoint has beyond its tokenizer would else be the code tokens' embeddings.
    free = slice(tokens, len(words))
    assert (table[free] != words[free]).any(dim=1).all()
    # As large as words, and no two alike.
    spread = words[:tokens].std().item()
    for rows in (table[book] for kind in ids for book in kind):
        assert rows.std().item() == pytest.approx(spread, rel=0.01)
        assert len(torch.unique(rows, dim=0)) == CODEBOOK_SIZE
    assert torch.isfinite(model(torch.tensor([[5, tokens, len(tokenizer) - 1, 1]])).query_embeds).all()


def test_a_vocabulary_smaller_than_the_rows_is_not_cut(backbone, parts, tmp_path):
    """As few code tokens as rows are free: nothing is resized, and the rows that remain are left alone."""
    name, folder, state = backbone
    user_mq, item_mq, store = parts
    size = len(state["shared.weight"]) - 200
    tokenizer = build_tokenizer(plain_tokenizer(size), user_mq=user_mq, item_mq=item_mq, store=store)
    settings = Recipe.load("paper").retrieval
    settings = settings.model_copy(update={"backbone": str(folder), "config": {}})
    table = build_retrieval_model(settings, tokenizer, user_mq, item_mq).get_input_embeddings().weight
    assert len(table) == len(state["shared.weight"])
    assert torch.equal(table[len(tokenizer) :], state["shared.weight"][len(tokenizer) :])
