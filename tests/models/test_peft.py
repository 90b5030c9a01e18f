"""LoRA on the retrieval model as `examples/lora.py` sets it up: what PEFT reports as trainable is trained, saved and merged."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenrec_hf import (
    EmbeddingStore,
    Recommender,
    T5ForGenerativeRetrieval,
    TokenRecTokenizer,
)

peft = pytest.importorskip("peft")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lora.py"
PROMPTS = ["What should user_u001 try after item_f256 item_f056 then?", "I wonder what the user_u002 will like."]
BOTH = pytest.mark.parametrize("whole_rows", [False, True], ids=["low rank", "whole rows"])


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("lora", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["lora"] = module  # where dataclasses look it up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["lora"]


@pytest.fixture(params=["trained_repository", "fism_repository"], ids=["decoder", "history"])
def folder(request):
    """A repository of the paper's model, or of one that reads histories."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def parts(folder):
    return TokenRecTokenizer.from_pretrained(folder), EmbeddingStore.from_pretrained(folder)


@pytest.fixture
def codes(parts):
    ids = [torch.from_numpy(parts[0].code_token_ids(kind)).flatten() for kind in ("user", "item")]
    return torch.cat(ids)


def batch(tokenizer):
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def queries(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**batch(tokenizer)).query_embeds


def tuned(example, folder, parts, whole_rows):
    """A model with an adapter, after three steps with a large learning rate, and the gradients of the last one."""
    tokenizer, store = parts
    torch.manual_seed(0)
    base = T5ForGenerativeRetrieval.from_pretrained(folder)
    base.bind_items(store.vectors("item"), tokenizer.item_tokens(store.ids("item")))
    reads_history = base.config.pooling == "history"
    model = peft.get_peft_model(base, example.lora_config(tokenizer, 4, whole_rows, not reads_history))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    # The item after each of the two items of the first prompt; the second prompt has none.
    labels = torch.tensor([[-100, 4, 3], [5, -100, -100]]) if reads_history else torch.tensor([[3], [5]])
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**batch(tokenizer), labels=labels).loss.backward()
        optimizer.step()
    return model


def words_and_codes(model, codes):
    """The rows of a plain model's embedding: those of words, those of code tokens."""
    table = model.get_input_embeddings().weight.detach()
    return table[: codes.min()], table[codes]


@BOTH
def test_a_gradient_arrives_at_everything_that_is_called_trainable(example, folder, parts, whole_rows):
    model = tuned(example, folder, parts, whole_rows)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    # One token attends to itself alone, whatever its query is.
    silent = {name for name in trained if "decoder.block.0.layer.0.SelfAttention.q" in name}
    for name, gradient in trained.items():
        assert gradient is not None, name
        assert name in silent or gradient.abs().sum() > 0, name
    for part in ("SelfAttention.q.lora_", "SelfAttention.v.lora_", "projection", "embed_tokens"):
        has_part = part != "projection" or hasattr(model, "projection")
        assert any(part in name for name in trained) == has_part, part
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert any("SelfAttention.k" in name for name in frozen) and any("DenseReluDense" in name for name in frozen)


@BOTH
def test_code_tokens_and_projection_change_and_words_do_not(example, folder, parts, codes, whole_rows):
    tokenizer, store = parts
    before = T5ForGenerativeRetrieval.from_pretrained(folder)
    reads_history = before.config.pooling == "history"
    merged = tuned(example, folder, parts, whole_rows).merge_and_unload()
    # With history pooling, all items compete by their codes, and the codes of users do not go through T5.
    read = tokenizer.item_tokens(store.ids("item")) if reads_history else batch(tokenizer)["input_ids"]
    used = torch.isin(codes, torch.as_tensor(read))
    (words, rows), (new_words, new_rows) = words_and_codes(before, codes), words_and_codes(merged, codes)
    assert (new_rows[used] != rows[used]).any(dim=1).all()
    assert torch.equal(new_rows[~used], rows[~used])
    read = torch.isin(torch.arange(len(words)), batch(tokenizer)["input_ids"])
    # In low rank the words of the prompts move with the codes, as in full tuning; no others do.
    assert torch.equal(new_words[~read], words[~read])
    assert torch.equal(new_words[read], words[read]) == whole_rows
    for number in () if reads_history else (0, 3, 6):
        assert not torch.equal(merged.projection[number].weight, before.projection[number].weight)


@BOTH
def test_an_adapter_is_saved_loaded_and_merged(example, folder, parts, codes, whole_rows, tmp_path):
    tokenizer, _ = parts
    model = tuned(example, folder, parts, whole_rows)
    expected = queries(model, tokenizer)
    assert not torch.allclose(expected, queries(T5ForGenerativeRetrieval.from_pretrained(folder), tokenizer), atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    # The adapter only: no table of the words, no frozen weight.
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )

    base = T5ForGenerativeRetrieval.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(queries(loaded, tokenizer), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is T5ForGenerativeRetrieval
    assert torch.allclose(queries(merged, tokenizer), expected, rtol=0, atol=1e-5)
    tables = {id(one.weight) for name, one in merged.named_modules() if name.endswith(("shared", "embed_tokens"))}
    assert len(tables) == 1, "the embedding is tied no more"
    merged.save_pretrained(tmp_path / "merged")
    again = T5ForGenerativeRetrieval.from_pretrained(tmp_path / "merged")
    assert torch.equal(queries(again, tokenizer), queries(merged, tokenizer))


@BOTH
def test_a_model_with_an_adapter_recommends(example, folder, parts, whole_rows):
    tokenizer, store = parts
    model = tuned(example, folder, parts, whole_rows)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_entities=True)
    found = Recommender(model, tokenizer, store).answer(inputs, top_k=5)
    plain = Recommender.from_pretrained(folder).answer(inputs, top_k=5)
    assert [len(row) for row in found] == [5, 5] and found != plain
    scores = [
        row["score"] for row in Recommender(model.merge_and_unload(), tokenizer, store).answer(inputs, top_k=5)[0]
    ]
    assert scores == pytest.approx([row["score"] for row in found[0]], abs=1e-5)


@pytest.mark.parametrize("option", ["--whole_rows", "--full", None])
def test_the_example_tunes_and_says_what_came_of_it(example, trained_repository, option, tmp_path, capsys):
    argv = ["--repository", trained_repository, "--dataset", "demo", "--output_dir", tmp_path, "--num_train_epochs", 1]
    argv += ["--per_device_train_batch_size", 64, "--use_cpu", "--disable_tqdm", "True", "--learning_rate", 0.01]
    results = example.main([*map(str, argv), *([option] if option else [])])
    assert results["after"]["eval_ndcg@20"] != results["before"]["eval_ndcg@20"]
    printed = capsys.readouterr().out
    assert f"after   HR@20 {results['after']['eval_hr@20']:.4f}" in printed
    if option == "--full":
        assert (tmp_path / "model.safetensors").is_file() and "adapter" not in printed
    else:
        assert not (tmp_path / "model.safetensors").exists()
        size = (tmp_path / "adapter_model.safetensors").stat().st_size
        assert f"adapter: {size:,} bytes" in printed


def test_an_adapter_that_is_switched_counts_at_once(example, folder, parts):
    tokenizer, _ = parts
    model = tuned(example, folder, parts, whole_rows=False)
    base = T5ForGenerativeRetrieval.from_pretrained(folder)
    inputs = {name: one[:1] for name, one in batch(tokenizer).items()}
    with torch.no_grad():
        adapted = model.eval().encode_queries(**inputs)
        with model.disable_adapter():
            found = model.encode_queries(**inputs)
            assert torch.allclose(found, base.eval().encode_queries(**inputs), atol=1e-5)
            assert not torch.allclose(found, adapted, atol=1e-3)
        assert torch.equal(model.encode_queries(**inputs), adapted)
