"""Repositories that a stranger made: a table of what is wrong with each, and the sentence that refuses it.

Every entry changes one file of a copy of a good repository, and keeps sizes and checksums consistent, as an attacker would. Opening
must end in one sentence that names the file, in little time, with nothing changed outside the folder.
"""

import hashlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tokenrec_hf import EmbeddingStore, MQTokenizerModel, Recipe, Repository, TokenRecTokenizer
from tokenrec_hf.models.modeling_collaborative import load_collaborative
from tokenrec_hf.models.recommender import load_model

LONGEST = 10  # seconds


def store_arrays(kind, change):
    """Changes the arrays of a data file of the store, with a manifest that fits."""

    def make(folder):
        path = folder / "store" / "store.json"
        manifest = json.loads(path.read_text())
        entry = manifest["files"][kind]
        arrays = load_file(folder / "store" / entry["file"])
        arrays = change(dict(arrays)) or arrays
        (folder / "store" / entry["file"]).unlink()
        entry["file"] = f"{kind}-0123456789abcdef.safetensors"
        written = folder / "store" / entry["file"]
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, written)
        entry["bytes"], entry["sha256"] = written.stat().st_size, hashlib.sha256(written.read_bytes()).hexdigest()
        path.write_text(json.dumps(manifest))

    return make


def replaced(name, make):
    """A change of `store_arrays`: the array `name` becomes `make(array)`."""

    def change(arrays):
        return arrays | {name: make(arrays[name].copy())}

    return change


def at(place, value):
    """An array with one other value."""

    def make(array):
        array[place] = value
        return array

    return make


def json_file(name, change):
    """Changes a JSON file; a string replaces its text."""

    def make(folder):
        path = folder / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(changed if isinstance(changed, str) else json.dumps(content if changed is None else changed))

    return make


def setting(name, keys, value):
    """Sets one value deep in a JSON file."""

    def change(content):
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return json_file(name, change)


def raw(name, content):
    """Replaces a file by bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def codes(change):
    """Changes the arrays of the code table."""

    def make(folder):
        path = folder / "codes.safetensors"
        arrays = dict(load_file(path))
        path.unlink()
        save_file({name: np.ascontiguousarray(array) for name, array in change(arrays).items()}, path)

    return make


def cut(name, tenths):
    """Cuts a file."""

    def make(folder):
        path = next(folder.glob(name))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * tenths // 10])

    return make


def ids(kind, names):
    """Gives a store other ids."""

    def change(arrays):
        encoded = [name if isinstance(name, bytes) else name.encode() for name in names]
        lengths = [0, *np.cumsum([len(one) for one in encoded])]
        count = len(arrays["offsets"]) - 1
        rest = [f"x{row}".encode() for row in range(count - len(encoded))]
        lengths = np.cumsum([0, *map(len, [*encoded, *rest])]).astype(np.int64)
        return arrays | {"blob": np.frombuffer(b"".join([*encoded, *rest]), dtype=np.uint8), "offsets": lengths}

    return store_arrays(kind, change)


def metadata(text):
    """Gives items other metadata."""
    content = np.frombuffer(text if isinstance(text, bytes) else text.encode(), dtype=np.uint8)
    return store_arrays("items", lambda arrays: arrays | {"metadata": content})


DEEP = "[" * 5000
open_store = EmbeddingStore.open
open_tokenizer = TokenRecTokenizer.from_pretrained
STORE, TOKENIZER = ("store", open_store), ("tokenizer", open_tokenizer)
HUGE = 10**12
# What opens the folder, what is wrong with it, how it is made, and words of the sentence.
TABLE = [
    (
        open_store,
        "an item vector with NaN",
        store_arrays("items", replaced("vectors", at((3, 2), np.nan))),
        "NaN or an infinity",
    ),
    (
        open_store,
        "a user vector with infinity",
        store_arrays("users", replaced("vectors", at((0, 0), np.inf))),
        "NaN or an infinity",
    ),
    (
        open_store,
        "half-precision vectors",
        store_arrays("items", replaced("vectors", lambda v: v.astype(np.float16))),
        "float32 item vectors",
    ),
    (
        open_store,
        "integer vectors",
        store_arrays("items", replaced("vectors", lambda v: v.astype(np.int64))),
        "float32 item vectors",
    ),
    (
        open_store,
        "vectors of another size",
        store_arrays("items", replaced("vectors", lambda v: v[:, :-1])),
        "float32 item vectors",
    ),
    (
        open_store,
        "flat vectors",
        store_arrays("items", replaced("vectors", lambda v: v.ravel())),
        "float32 item vectors",
    ),
    (
        open_store,
        "a vector too few",
        store_arrays("items", replaced("vectors", lambda v: v[1:])),
        "float32 item vectors",
    ),
    (
        open_store,
        "no vectors",
        store_arrays("items", lambda a: {n: v for n, v in a.items() if n != "vectors"}),
        "vectors",
    ),
    (
        open_store,
        "a negative seen item",
        store_arrays("users", replaced("seen_items", at(0, -5))),
        "seen items do not fit",
    ),
    (
        open_store,
        "a very negative seen item",
        store_arrays("users", replaced("seen_items", at(0, -(2**31)))),
        "seen items do not fit",
    ),
    (
        open_store,
        "a seen item that is not there",
        store_arrays("users", replaced("seen_items", at(0, 10**6))),
        "seen items do not fit",
    ),
    (
        open_store,
        "long seen items",
        store_arrays("users", replaced("seen_items", lambda s: s.astype(np.int64))),
        "seen items do not fit",
    ),
    (
        open_store,
        "seen items as fractions",
        store_arrays("users", replaced("seen_items", lambda s: s.astype(np.float32))),
        "seen items do not fit",
    ),
    (
        open_store,
        "seen items in a table",
        store_arrays("users", replaced("seen_items", lambda s: s[: len(s) // 2 * 2].reshape(-1, 2))),
        "damaged",
    ),
    (
        open_store,
        "seen lists that begin before the first",
        store_arrays("users", replaced("seen_indptr", at(0, -5))),
        "seen items do not fit",
    ),
    (
        open_store,
        "seen lists that begin late",
        store_arrays("users", replaced("seen_indptr", at(0, 5))),
        "seen items do not fit",
    ),
    (
        open_store,
        "seen lists that end too late",
        store_arrays("users", replaced("seen_indptr", at(-1, 10**9))),
        "seen items do not fit",
    ),
    (
        open_store,
        "seen lists that go back",
        store_arrays("users", replaced("seen_indptr", at(2, 10**6))),
        "seen items do not fit",
    ),
    (
        open_store,
        "a seen list too few",
        store_arrays("users", replaced("seen_indptr", lambda i: np.delete(i, 3))),
        "seen items do not fit",
    ),
    (
        open_store,
        "fractional bounds of seen lists",
        store_arrays("users", replaced("seen_indptr", lambda i: i.astype(np.float64))),
        "damaged",
    ),
    (open_store, "no bounds of seen lists", store_arrays("users", replaced("seen_indptr", lambda i: i[:0])), "damaged"),
    (
        open_store,
        "offsets of ids that go back",
        store_arrays("items", replaced("offsets", at(2, 10**6))),
        "offsets do not fit",
    ),
    (
        open_store,
        "offsets of ids beyond the text",
        store_arrays("items", replaced("offsets", at(-1, 10**9))),
        "offsets do not fit",
    ),
    (
        open_store,
        "negative offsets of ids",
        store_arrays("items", replaced("offsets", at(0, -1))),
        "offsets do not fit",
    ),
    (
        open_store,
        "fractional offsets of ids",
        store_arrays("items", replaced("offsets", lambda o: o.astype(np.float64))),
        "damaged",
    ),
    (open_store, "no offsets of ids", store_arrays("items", replaced("offsets", lambda o: o[:0])), "damaged"),
    (
        open_store,
        "offsets in a table",
        store_arrays("items", replaced("offsets", lambda o: o.reshape(1, -1))),
        "damaged",
    ),
    (open_store, "an id that is not UTF-8", ids("items", [b"\xff\xfe"]), "damaged"),
    (open_store, "an id twice", ids("items", ["same", "same"]), "given more than once"),
    (open_store, "an id with a line break", ids("items", ["a\nb"]), "contains the character"),
    (open_store, "an id that ends with a space", ids("users", ["u001 "]), "ends with a space"),
    (open_store, "an id of a kilobyte", ids("items", ["x" * 1000]), "characters"),
    (open_store, "metadata that is no JSON", metadata("{"), "damaged"),
    (open_store, "metadata that is a list", metadata("[1, 2]"), "damaged"),
    (open_store, "deep metadata", metadata(DEEP), "damaged"),
    (open_store, "metadata that is not UTF-8", metadata(b"\xff\xfe{}"), "damaged"),
    (open_store, "metadata of an item that is not there", metadata('{"999999": {"a": 1}}'), "damaged"),
    (open_store, "metadata of a row before the first", metadata('{"-1": {"a": 1}}'), "damaged"),
    (open_store, "metadata in metadata", metadata('{"0": {"a": {"b": 1}}}'), "give a string"),
    (open_store, "metadata with NaN", metadata('{"0": {"a": NaN}}'), "finite number"),
    (open_store, "metadata with an odd name", metadata('{"0": {"a b": 1}}'), "letters, digits"),
    (open_store, "metadata that is text", metadata('{"0": "jazz"}'), "damaged"),
    (
        open_store,
        "a data file outside",
        setting("store/store.json", ["files", "items", "file"], "../../secret.safetensors"),
        "not the name",
    ),
    (
        open_store,
        "a data file by its whole path",
        setting("store/store.json", ["files", "items", "file"], "/etc/passwd"),
        "not the name",
    ),
    (open_store, "a data file that is a number", setting("store/store.json", ["files", "items", "file"], 7), "damaged"),
    (
        open_store,
        "a data file with a break in its name",
        setting("store/store.json", ["files", "items", "file"], "items-0123456789abcdef.safetensors\n"),
        "not the name",
    ),
    (
        open_store,
        "another size of a data file",
        setting("store/store.json", ["files", "items", "bytes"], 12),
        "bytes instead of",
    ),
    (
        open_store,
        "another checksum",
        setting("store/store.json", ["files", "items", "sha256"], "0" * 64),
        "not the saved one",
    ),
    (open_store, "more about a data file", setting("store/store.json", ["files", "items", "mode"], "w"), "damaged"),
    (open_store, "no data files", setting("store/store.json", ["files"], {}), "damaged"),
    (open_store, "data files in a list", setting("store/store.json", ["files"], [1]), "damaged"),
    (open_store, "a third kind", setting("store/store.json", ["counts", "robot"], 3), "damaged"),
    (open_store, "another number of items", setting("store/store.json", ["counts", "item"], 7), "there are no 7 items"),
    (open_store, "no dimensions", setting("store/store.json", ["embedding_dim"], 0), "at least 1"),
    (open_store, "negative dimensions", setting("store/store.json", ["embedding_dim"], -4), "at least 1"),
    (open_store, "very many dimensions", setting("store/store.json", ["embedding_dim"], HUGE), "float32"),
    (open_store, "dimensions as text", setting("store/store.json", ["embedding_dim"], "64"), "damaged"),
    (open_store, "a format of the future", setting("store/store.json", ["format_version"], 99), "format version 99"),
    (open_store, "spaces in a list", setting("store/store.json", ["space_ids"], ["a"]), "damaged"),
    (open_store, "a space of a third kind", setting("store/store.json", ["space_ids"], {"robot": "a"}), "damaged"),
    (open_store, "a manifest that is a list", json_file("store/store.json", lambda _: "[]"), "no JSON object"),
    (open_store, "a manifest that is deep", json_file("store/store.json", lambda _: DEEP), "damaged"),
    (open_store, "a manifest that is empty", raw("store/store.json", b""), "damaged"),
    (open_store, "a manifest that is not UTF-8", raw("store/store.json", b"\xff\xfe\x00"), "damaged"),
    (
        open_tokenizer,
        "a code that is out of range",
        codes(lambda a: a | {"item.codes": at((0, 0), 60_000)(a["item.codes"].copy())}),
        "should be in",
    ),
    (
        open_tokenizer,
        "codes as fractions",
        codes(lambda a: a | {"item.codes": a["item.codes"].astype(np.float32)}),
        "should be integers",
    ),
    (
        open_tokenizer,
        "negative codes",
        codes(lambda a: a | {"item.codes": -1 - a["item.codes"].astype(np.int64)}),
        "should be in",
    ),
    (
        open_tokenizer,
        "codes of too few items",
        codes(lambda a: a | {"item.codes": a["item.codes"][1:]}),
        "should be integers",
    ),
    (
        open_tokenizer,
        "a code too few of each item",
        codes(lambda a: a | {"item.codes": a["item.codes"][:, 1:]}),
        "codes but there are",
    ),
    (open_tokenizer, "flat codes", codes(lambda a: a | {"item.codes": a["item.codes"].ravel()}), "should be integers"),
    (open_tokenizer, "no items", codes(lambda a: {n: v for n, v in a.items() if not n.startswith("item")}), "damaged"),
    (open_tokenizer, "no codes", codes(lambda a: {n: v for n, v in a.items() if n != "item.codes"}), "damaged"),
    (
        open_tokenizer,
        "offsets that go back",
        codes(lambda a: a | {"item.offsets": at(2, 10**6)(a["item.offsets"].copy())}),
        "offsets do not fit",
    ),
    (
        open_tokenizer,
        "ids that are not UTF-8",
        codes(lambda a: a | {"item.blob": np.full_like(a["item.blob"], 255)}),
        "damaged",
    ),
    (
        open_tokenizer,
        "ids that repeat",
        codes(lambda a: a | {"item.blob": np.full_like(a["item.blob"], 97)}),
        "more than once",
    ),
    (
        open_tokenizer,
        "very many codewords",
        setting("tokenizer_config.json", ["codebooks"], {"user": [3, HUGE], "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "very many codebooks",
        setting("tokenizer_config.json", ["codebooks"], {"user": [HUGE, 32], "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "a negative number of codebooks",
        setting("tokenizer_config.json", ["codebooks"], {"user": [-1, 64], "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "no codewords",
        setting("tokenizer_config.json", ["codebooks"], {"user": [3, 0], "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "codebooks as text",
        setting("tokenizer_config.json", ["codebooks"], {"user": "33", "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "codebooks of one kind",
        setting("tokenizer_config.json", ["codebooks"], {"user": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "three numbers of codebooks",
        setting("tokenizer_config.json", ["codebooks"], {"user": [3, 32, 1], "item": [3, 32]}),
        "code",
    ),
    (
        open_tokenizer,
        "an unknown treatment of the unknown",
        setting("tokenizer_config.json", ["on_unknown"], "run"),
        "on_unknown",
    ),
    (
        open_tokenizer,
        "a vocabulary without code tokens",
        setting("tokenizer.json", ["added_tokens"], []),
        "code tokens",
    ),
    (load_model, "a T5 without layers of positive size", setting("config.json", ["d_model"], -1), "config.json"),
    (
        load_model,
        "a T5 of half a dimension",
        setting("config.json", ["d_model"], 2.5),
        "'d_model' expected int, got float",
    ),
    (
        load_model,
        "a text for a number",
        setting("config.json", ["embedding_dim"], "64"),
        "'embedding_dim' expected int",
    ),
    (load_model, "a T5 that fills the memory", setting("config.json", ["vocab_size"], HUGE), "config.json"),
    (load_model, "a T5 of very many layers", setting("config.json", ["num_layers"], 10**7), "config.json"),
    (load_model, "very many vectors", setting("config.json", ["embedding_dim"], HUGE), "config.json"),
    (load_model, "an unknown pooling", setting("config.json", ["pooling"], "eval"), "pooling"),
    (load_model, "a T5 configuration that is deep", raw("config.json", DEEP.encode()), "config.json"),
    (load_model, "a T5 configuration that is a list", raw("config.json", b"[]"), "config.json"),
]
TABLE += [
    (load_model, f"weights cut at {tenths} tenths", cut("model.safetensors", tenths), "model.safetensors")
    for tenths in range(10)
]
TABLE += [
    (open_store, f"item vectors cut at {tenths} tenths", cut("store/items-*.safetensors", tenths), "bytes instead of")
    for tenths in range(10)
]
TABLE += [
    (open_tokenizer, f"codes cut at {tenths} tenths", cut("codes.safetensors", tenths), "codes.safetensors")
    for tenths in range(10)
]
TABLE += [
    (open_tokenizer, f"a tokenizer cut at {tenths} tenths", cut("tokenizer.json", tenths), "tokenizer.json")
    for tenths in range(10)
]
TABLE += [
    (
        lambda folder: MQTokenizerModel.from_pretrained(folder / "mq_item"),
        "an MQ-Tokenizer that fills the memory",
        setting("mq_item/config.json", ["codebook_size"], HUGE),
        "codebook_size",
    ),
    (
        lambda folder: MQTokenizerModel.from_pretrained(folder / "mq_item"),
        "an MQ-Tokenizer of no codebooks",
        setting("mq_item/config.json", ["num_codebooks"], 0),
        "num_codebooks",
    ),
    (
        lambda folder: MQTokenizerModel.from_pretrained(folder / "mq_item"),
        "an MQ-Tokenizer of a fraction of a codebook",
        setting("mq_item/config.json", ["num_codebooks"], 2.5),
        "num_codebooks",
    ),
    (
        lambda folder: load_collaborative(folder / "collaborative"),
        "a collaborative model of a size in words",
        setting("collaborative/config.json", ["embedding_dim"], "eight"),
        "embedding_dim",
    ),
    (
        lambda folder: load_collaborative(folder / "collaborative"),
        "a collaborative model of an unknown kind",
        setting("collaborative/config.json", ["model_type"], "os"),
        "model_type",
    ),
    (
        lambda folder: Recipe.load(config=folder / "recipe.yaml"),
        "a deep recipe",
        raw("recipe.yaml", DEEP.encode()),
        "recipe.yaml",
    ),
    (
        lambda folder: Recipe.load(config=folder / "recipe.yaml"),
        "a recipe that runs code",
        raw("recipe.yaml", b"a: !!python/object/apply:os.system ['true']"),
        "recipe.yaml",
    ),
    (
        lambda folder: Recipe.load(config=folder / "recipe.yaml"),
        "a recipe that is not UTF-8",
        raw("recipe.yaml", b"\xff\xfe\xff"),
        "recipe.yaml",
    ),
    (
        lambda folder: Recipe.load(config=folder / "recipe.yaml"),
        "a recipe that doubles again and again",
        raw(
            "recipe.yaml",
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(8)),
        ),
        "recipe.yaml",
    ),
    (lambda folder: Repository(folder).info(), "metrics that are a list", raw("metrics.json", b"[]"), "metrics.json"),
    (lambda folder: Repository(folder).info(), "deep metrics", raw("metrics.json", DEEP.encode()), "metrics.json"),
]


@pytest.fixture(scope="module")
def good(trained_repository, tmp_path_factory):
    """A copy of the files of a repository that are read when it is opened."""
    folder = tmp_path_factory.mktemp("good") / "repository"
    shutil.copytree(trained_repository, folder, ignore=shutil.ignore_patterns("training"))
    return folder


def too_long(*_):
    raise AssertionError(f"not refused within {LONGEST} seconds")


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("opens", "make", "says"), [pytest.param(o, m, s, id=name) for o, name, m, s in TABLE])
def test_a_hostile_repository_is_refused_in_a_sentence(good, tmp_path, opens, make, says):
    folder = tmp_path / "around" / "repository"
    shutil.copytree(good, folder)
    (tmp_path / "around" / "secret.json").write_text('{"token": 1}')
    make(folder)
    before = tree(tmp_path)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            opens(folder)
    finally:
        signal.alarm(0)
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert tree(tmp_path) == before


def test_the_good_repository_opens(good):
    for opens in dict.fromkeys(opens for opens, *_ in TABLE):
        opens(good)
    assert len(TABLE) >= 120
    assert torch.isfinite(EmbeddingStore.open(good).vectors("item")).all()
