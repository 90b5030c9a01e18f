import subprocess
import sys

import pytest
import torch
from transformers import T5Config, T5Model

import tokenrec_hf
from tokenrec_hf import (
    EmbeddingStore,
    LightGCNConfig,
    LightGCNModel,
    MatrixFactorizationConfig,
    MatrixFactorizationModel,
    MQTokenizerConfig,
    MQTokenizerModel,
    T5ForGenerativeRetrieval,
    T5GenerativeRetrievalConfig,
    TokenRecTokenizer,
)

PUBLIC = [
    "load_interactions",
    "leave_one_out",
    "LightGCNConfig",
    "LightGCNModel",
    "MatrixFactorizationConfig",
    "MatrixFactorizationModel",
    "EmbeddingStore",
    "MQTokenizerConfig",
    "MQTokenizerModel",
    "TokenRecTokenizer",
    "T5GenerativeRetrievalConfig",
    "T5ForGenerativeRetrieval",
]


def in_a_new_process(code, *arguments):
    """What `code` prints, run by an interpreter that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, tokenrec_hf; print(*sys.modules)"
    heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "tokenizers"}
    assert heavy & set(in_a_new_process(code)) == set()


def test_looking_at_the_names_imports_nothing_either():
    code = "import sys, tokenrec_hf; dir(tokenrec_hf); hasattr(tokenrec_hf, 'nothing'); print(*sys.modules)"
    assert {"torch", "transformers"} & set(in_a_new_process(code)) == set()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(tokenrec_hf, name).__name__ == name
    assert name in dir(tokenrec_hf) and name in tokenrec_hf.__all__


def test_every_listed_name_resolves():
    for name in tokenrec_hf.__all__:
        assert getattr(tokenrec_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tokenrec_hf.nothing


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert tokenrec_hf.__version__ == version("tokenrec_hf")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with each of the four models, and the tokenizer beside T5."""
    folder = tmp_path_factory.mktemp("saved")
    store = EmbeddingStore(4)
    store.upsert("user", ["03"], torch.randn(1, 4))
    store.upsert("item", ["08"], torch.randn(1, 4))
    mq = MQTokenizerModel(MQTokenizerConfig(embedding_dim=4, codebook_size=4, codebook_dim=4, hidden_dim=4))
    tokenizer = TokenRecTokenizer.from_components(user_mq=mq, item_mq=mq, store=store)
    config = T5GenerativeRetrievalConfig(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, embedding_dim=4
    )
    models = {
        "T5ForGenerativeRetrieval": T5ForGenerativeRetrieval(config),
        "MQTokenizerModel": mq,
        "LightGCNModel": LightGCNModel(LightGCNConfig(num_users=2, num_items=3, embedding_dim=4)),
        "MatrixFactorizationModel": MatrixFactorizationModel(
            MatrixFactorizationConfig(num_users=2, num_items=3, embedding_dim=4)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "T5ForGenerativeRetrieval")
    return folder


@pytest.fixture(scope="module")
def plain_t5(tmp_path_factory):
    """A model of transformers itself."""
    folder = tmp_path_factory.mktemp("t5")
    T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(folder)
    return folder


ORDERS = {
    "tokenrec_hf first": "import tokenrec_hf; from transformers import AutoConfig, AutoModel, AutoTokenizer",
    "transformers first": "import transformers; import tokenrec_hf; from transformers import AutoConfig, AutoModel, AutoTokenizer",
    "Auto classes first": "from transformers import AutoConfig, AutoModel, AutoTokenizer; import tokenrec_hf",
}
LOAD = """
import sys
from pathlib import Path
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config, model = AutoConfig.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert isinstance(model, getattr(tokenrec_hf, folder.name)), type(model)
    assert type(model.config) is type(config) is getattr(tokenrec_hf, folder.name).config_class, type(config)
    assert type(AutoModel.from_config(config)) is type(model)
    print(folder.name)
tokenizer = AutoTokenizer.from_pretrained(Path(sys.argv[1]) / "T5ForGenerativeRetrieval")
assert type(tokenizer) is tokenrec_hf.TokenRecTokenizer, type(tokenizer)
assert tokenizer.decode(tokenizer("user_03 likes item_08").input_ids, skip_special_tokens=True) == "user_03 likes item_08"
print(type(tokenizer).__name__)
print(type(AutoModel.from_pretrained(sys.argv[2])).__name__)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_our_models_and_their_own_whatever_is_imported_first(saved, plain_t5, order):
    found = in_a_new_process(ORDERS[order] + "\n" + LOAD, saved, plain_t5)
    assert found == [
        "LightGCNModel",
        "MQTokenizerModel",
        "MatrixFactorizationModel",
        "T5ForGenerativeRetrieval",
        "TokenRecTokenizer",
        "T5Model",
    ]


def test_the_tokenizer_alone_can_be_the_first_auto_class_used(saved):
    code = """
import sys, tokenrec_hf
from transformers import AutoTokenizer
print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__name__, "torch" in sys.modules)
"""
    assert in_a_new_process(code, saved / "T5ForGenerativeRetrieval")[0] == "TokenRecTokenizer"
