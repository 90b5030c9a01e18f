"""The package's face: its names, what importing it costs, the Auto classes, and which room may import which."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5Model

import tokenrec_hf
from tokenrec_hf import (
    EmbeddingStore,
    FISMConfig,
    FISMModel,
    LightGCNConfig,
    LightGCNModel,
    MatrixFactorizationConfig,
    MatrixFactorizationModel,
    MQTokenizerConfig,
    MQTokenizerModel,
    T5ForGenerativeRetrieval,
    T5GenerativeRetrievalConfig,
    build_tokenizer,
)

PACKAGE = Path(tokenrec_hf.__file__).parent
PUBLIC = [
    "load_interactions",
    "leave_one_out",
    "LightGCNConfig",
    "LightGCNModel",
    "MatrixFactorizationConfig",
    "MatrixFactorizationModel",
    "FISMConfig",
    "FISMModel",
    "EmbeddingStore",
    "MQTokenizerConfig",
    "MQTokenizerModel",
    "TokenRecTokenizer",
    "T5GenerativeRetrievalConfig",
    "T5ForGenerativeRetrieval",
    "Recommender",
    "Recipe",
    "train",
    "Repository",
]


def in_a_new_process(code, *arguments):
    """What `code` prints, run by an interpreter that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- Names and the cost of an import


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, tokenrec_hf; print(*sys.modules)"
    heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "tokenizers"}
    assert heavy & set(in_a_new_process(code)) == set()


def test_looking_at_the_names_imports_nothing_either():
    code = "import sys, tokenrec_hf; dir(tokenrec_hf); hasattr(tokenrec_hf, 'nothing'); print(*sys.modules)"
    assert {"torch", "transformers"} & set(in_a_new_process(code)) == set()


def test_importing_the_package_takes_less_than_a_fifth_of_a_second():
    code = "import time; start = time.process_time(); import tokenrec_hf; print(time.process_time() - start)"
    assert min(float(in_a_new_process(code)[0]) for _ in range(3)) < 0.2


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


# Names of a distribution that are not those of its modules.
DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
    "milvus_lite": "milvus-lite",
    "yaml": "pyyaml",
}
OPTIONAL = {
    *("evaluate", "faiss-cpu", "fastapi", "gradio", "implicit", "milvus-lite", "onnx", "onnxruntime"),
    *("onnxscript", "pymilvus", "threadpoolctl"),
    "uvicorn",
}


def test_every_module_that_is_imported_is_a_requirement():
    """What only another requirement brings along may be gone with its next version."""
    imported = set()
    for path in Path(tokenrec_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    needed = {DISTRIBUTIONS.get(name, name) for name in imported - sys.stdlib_module_names - {"tokenrec_hf"}}
    required = {
        re.split(r"[^\w-]", one)[0].lower(): "extra ==" in one
        for one in importlib.metadata.requires("tokenrec_hf") or ()
    }
    assert needed - set(required) == set()
    assert {name for name in needed if required[name]} == OPTIONAL


# ---- Auto classes, whatever is imported first


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with each of the models, and the tokenizer beside T5."""
    folder = tmp_path_factory.mktemp("saved")
    store = EmbeddingStore(4)
    store.upsert("user", ["03"], torch.randn(1, 4))
    store.upsert("item", ["08"], torch.randn(1, 4))
    mq = MQTokenizerModel(MQTokenizerConfig(embedding_dim=4, codebook_size=4, codebook_dim=4, hidden_dim=4))
    tokenizer = build_tokenizer(user_mq=mq, item_mq=mq, store=store)
    config = T5GenerativeRetrievalConfig(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, embedding_dim=4
    )
    counts = {"num_users": 2, "num_items": 3, "embedding_dim": 4}
    models = {
        "T5ForGenerativeRetrieval": T5ForGenerativeRetrieval(config),
        "MQTokenizerModel": mq,
        "FISMModel": FISMModel(FISMConfig(**counts)),
        "LightGCNModel": LightGCNModel(LightGCNConfig(**counts)),
        "MatrixFactorizationModel": MatrixFactorizationModel(MatrixFactorizationConfig(**counts)),
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


# transformers imports its Auto classes in the middle of some of these modules, and ours import transformers.
ORDERS = [
    "import tokenrec_hf",
    "import transformers; import tokenrec_hf",
    "from transformers import AutoConfig, AutoModel, AutoTokenizer; import tokenrec_hf",
    "from transformers import pipeline; import tokenrec_hf",
    "import tokenrec_hf; from transformers import pipeline",
    "import tokenrec_hf; from transformers import T5Config",
    "import tokenrec_hf; from transformers import T5Model",
    "import tokenrec_hf; import peft",
    "from tokenrec_hf import LightGCNConfig",
    "from tokenrec_hf import TokenRecTokenizer",
    "from tokenrec_hf import Recommender",
    "from tokenrec_hf import GenerativeRetrievalPipeline",
]
LOAD = """
import sys
from pathlib import Path
import tokenrec_hf
from transformers import AutoConfig, AutoModel, AutoTokenizer
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
from transformers.pipelines import PIPELINE_REGISTRY
print(PIPELINE_REGISTRY.check_task("generative-retrieval")[1]["impl"].__name__)
"""


ALONE = {
    "AutoConfig": "T5GenerativeRetrievalConfig",
    "AutoModel": "T5ForGenerativeRetrieval",
    "AutoTokenizer": "TokenRecTokenizer",
}
LOAD_ALONE = """
import sys, tokenrec_hf
from transformers import {name}
print(type({name}.from_pretrained(sys.argv[1] + "/T5ForGenerativeRetrieval")).__name__)
"""
# Torch and what it takes long to import, which is most of the time that transformers takes, is imported once. Each code then runs
# in a fork of its own.
FORKS = """
import json, os, sys, traceback
import scipy.optimize, sympy, torch, torch._dynamo, torch.distributed.tensor
assert not {"transformers", "tokenrec_hf"} & set(sys.modules)
for number, code in enumerate(json.load(sys.stdin)):
    if not os.fork():
        sys.stdout = open(f"{sys.argv.pop()}/{number}.txt", "w")
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def printed(saved, plain_t5, tmp_path_factory):
    """What each code prints in a process that has imported neither transformers nor the package before."""
    codes = {order: f"{order}\n{LOAD}" for order in ORDERS}
    codes |= {name: LOAD_ALONE.replace("{name}", name) for name in ALONE}
    folder = tmp_path_factory.mktemp("printed")
    arguments = [sys.executable, "-c", FORKS, saved, plain_t5, folder]
    subprocess.run(arguments, input=json.dumps(list(codes.values())), text=True, check=True)
    return {name: (folder / f"{number}.txt").read_text() for number, name in enumerate(codes)}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_our_models_and_their_own_whatever_is_imported_first(printed, order):
    assert printed[order].split() == [
        "FISMModel",
        "LightGCNModel",
        "MQTokenizerModel",
        "MatrixFactorizationModel",
        "T5ForGenerativeRetrieval",
        "TokenRecTokenizer",
        "T5Model",
        "GenerativeRetrievalPipeline",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_each_auto_class_alone_can_be_the_first_thing_used(printed, name):
    assert printed[name].split() == [ALONE[name]]


def test_recommending_does_not_import_the_pipelines():
    code = "import sys; from tokenrec_hf import Recommender; print('transformers.pipelines' in sys.modules)"
    assert in_a_new_process(code) == ["False"]


def test_nothing_of_transformers_is_patched():
    words = ("meta_path", "_mapping._", "sys.modules[")
    found = [path for path in PACKAGE.rglob("*.py") if any(word in path.read_text() for word in words)]
    assert found == []


# ---- The rooms


ROOMS = {
    "models": set(),
    "data": {"models"},
    "store": {"models"},
    "evaluation": {"models", "data", "store"},
    "training": {"models", "data", "store", "evaluation"},
    "repository": {"models", "data", "store", "evaluation", "training"},
    "cli": {"models", "data", "store", "evaluation", "training", "repository"},
}


def imported_modules(path):
    """Dotted names of the modules of the package that a file imports, at module level or anywhere in it."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (f"{name.name}." for name in node.names if name.name.startswith("tokenrec_hf"))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source.startswith("tokenrec_hf"):
                # `from ..models import x` imports the module x.
                yield from (f"{source}.{name.name}" for name in node.names)


def test_all_modules_lie_in_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[:1] for path in PACKAGE.rglob("*.py")}
    assert {parts[0] for parts in folders if parts} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_below_it(room):
    allowed = ROOMS[room] | {room}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in (PACKAGE / room).rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[1] not in allowed | {"__version__"}
    ]
    assert wrong == []


BROUGHT = {"filelock", "torch", "transformers", "safetensors", "numpy", "huggingface_hub", "tokenizers"}


def test_the_models_import_siblings_in_the_only_form_that_the_hub_loader_copies():
    """`from .x import y` and no other relative import; otherwise only what comes with transformers and torch."""
    files = sorted((PACKAGE / "models").glob("*.py"))
    siblings = {path.stem for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings - {"__init__"}, f"{path.name}:{node.lineno}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names - BROUGHT
                # Reading a SentencePiece file, which a shared tokenizer is not made from.
                assert roots <= {"google"}, f"{path.name}:{node.lineno} imports {roots}"


def test_no_sub_folder_lies_among_the_models():
    assert [path for path in (PACKAGE / "models").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("name", ["collaborative", "store", "mq_user", "mq_item"])
def test_one_module_knows_the_name_of_a_part_of_a_repository(name):
    def writes(path):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return any(isinstance(node, ast.Constant) and node.value == name for node in nodes)

    assert [path.name for path in PACKAGE.rglob("*.py") if writes(path)] == ["codes.py"]
