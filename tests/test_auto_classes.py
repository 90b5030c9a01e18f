"""A trained repository through `AutoConfig`, `AutoModel`, `AutoTokenizer` and `pipeline`, with the package and without it."""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_imports

from tokenrec_hf import Recommender

# What somebody has who installed transformers, torch and safetensors.
BROUGHT = {"filelock", "torch", "transformers", "safetensors", "numpy", "huggingface_hub", "tokenizers", "tqdm"}
# An interpreter that has neither the package nor what only the package needs.
ABSENT = "import sys; sys.modules.update(dict.fromkeys(['tokenrec_hf', 'datasets', 'google', 'accelerate', 'pyarrow']))"
REFUSALS = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
loaders = {one.__name__: one.from_pretrained for one in (AutoConfig, AutoModel, AutoTokenizer)}
loaders["pipeline"] = lambda folder: pipeline("generative-retrieval", model=folder, device="cpu")
said = {}
for name, load in loaders.items():
    try:
        said[name] = f"loaded {type(load(sys.argv[1]))}"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(said))
"""
LOAD = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
folder, request, again = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
trust = {"trust_remote_code": True} if "trust" in sys.argv else {}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
recommend = pipeline("generative-retrieval", model=folder, device="cpu", **trust)
parts = [AutoModel.from_pretrained(folder, subfolder=name, **trust) for name in ("mq_user", "mq_item", "collaborative")]
recommend.save_pretrained(again)
copy = pipeline("generative-retrieval", model=again, device="cpu", **trust)
print(json.dumps({
    "classes": [type(one).__name__ for one in (config, model, tokenizer, recommend, *parts)],
    "modules": sorted({type(one).__module__.split(".")[0] for one in (config, model, tokenizer, recommend, *parts)}),
    "tokens": tokenizer(f"user_{request['user']}").input_ids,
    "found": recommend(request, top_k=7),
    "found_again": copy(request, top_k=7),
}))
"""
CLASSES = [
    "T5GenerativeRetrievalConfig",
    "T5ForGenerativeRetrieval",
    "TokenRecTokenizer",
    "GenerativeRetrievalPipeline",
    "MQTokenizerModel",
    "MQTokenizerModel",
    "LightGCNModel",
]


def run(home, *parts):
    """What a fresh interpreter prints as JSON that runs `parts[0]` with the rest as its arguments."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *map(str, parts)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(trained_repository):
    """A request, its tokens and its recommendations, made here."""
    here = Recommender.from_pretrained(trained_repository)
    user = here.store.ids("user")[0]
    history = here.store.seen([user])[0][:3]
    return {
        "request": json.dumps({"user": user, "history": history}),
        "tokens": here.tokenizer(f"user_{user}").input_ids,
        "found": here.recommend([user], [history], top_k=7)[0],
    }


def check(printed, expected, modules):
    assert printed["classes"] == CLASSES
    assert printed["modules"] == modules
    assert printed["tokens"] == expected["tokens"]
    assert printed["found"] == printed["found_again"] == expected["found"]


def test_a_repository_carries_little_code_and_all_that_it_imports(trained_repository):
    code = {path.name: path.read_text(encoding="utf-8") for path in trained_repository.glob("*.py")}
    assert len(code) <= 11
    # A ratchet: lower it when code goes.
    assert sum(len(text.splitlines()) for text in code.values()) <= 4_750
    imported = {name for text in code.values() for name in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)}
    assert {f"{name}.py" for name in imported} <= set(code)
    # The folders of the other models have copies of their own files.
    assert {path.name for path in trained_repository.rglob("*.py")} == set(code)


def test_the_code_in_a_repository_needs_nothing_but_what_transformers_brings(trained_repository):
    code = list(trained_repository.rglob("*.py"))
    assert trained_repository / "pipeline_generative_retrieval.py" in code
    needed = {name: set(get_imports(name)) - BROUGHT - sys.stdlib_module_names for name in code}
    assert {name: modules for name, modules in needed.items() if modules} == {}


@pytest.mark.parametrize("imports", ["import tokenrec_hf", "from transformers import pipeline; import tokenrec_hf"])
def test_with_the_package_nothing_needs_trust(trained_repository, expected, tmp_path, imports):
    printed = run(tmp_path, imports + LOAD, trained_repository, expected["request"], tmp_path / "again")
    check(printed, expected, ["tokenrec_hf"])


def test_with_the_package_trust_does_no_harm(trained_repository, expected, tmp_path):
    code = "import tokenrec_hf" + LOAD
    printed = run(tmp_path, code, trained_repository, expected["request"], tmp_path / "again", "trust")
    # `AutoTokenizer`, unlike the others, takes the code that it was told to trust.
    check(printed, expected, ["tokenrec_hf", "transformers_modules"])


def test_without_the_package_everything_loads_with_trust(trained_repository, expected, tmp_path):
    printed = run(tmp_path, ABSENT + LOAD, trained_repository, expected["request"], tmp_path / "again", "trust")
    check(printed, expected, ["transformers_modules"])


def test_without_package_and_trust_everything_is_refused(trained_repository, tmp_path):
    said = run(tmp_path, ABSENT + REFUSALS, trained_repository)
    assert set(said) == {"AutoConfig", "AutoModel", "AutoTokenizer", "pipeline"}
    for name, message in said.items():
        assert message.startswith("ValueError: ") and "trust_remote_code=True" in message, (name, message)
