import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_repository import DIM, write_tiny_repository

from tokenrec_hf import EmbeddingStore, NewVectors, Recommender, Repository, TokenRecTokenizer
from tokenrec_hf.cli.app import main
from tokenrec_hf.models.codes import IdIndex, load_indexes, save_indexes
from tokenrec_hf.repository.repository import PUSHED, exclusive


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "repository"
    write_tiny_repository(folder)
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy without the selection run."""
    return shutil.copytree(tiny, tmp_path / "repository", ignore=shutil.ignore_patterns("selection", "*.py"))


def failed(folder):
    """Run, name and finding of the checks that have not passed."""
    return [(check.run, check.name, check.finding) for check in Repository(folder).verify() if check.passed is not True]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_a_user(folder):
    tokenizer = TokenRecTokenizer.from_pretrained(folder)
    tokenizer.remove("user", ["u0"])
    tokenizer.save_codes(folder)


def replace_a_vector(folder):
    store = EmbeddingStore.open(folder)
    store.upsert("item", ["i0"], torch.full((1, DIM), 9.0))
    store.save_pretrained(folder / "store")


def forget_a_user(folder):
    store = EmbeddingStore.open(folder)
    store.delete("user", ["u0"])
    store.save_pretrained(folder / "store")


def change_item_ids(folder, change):
    path = folder / "collaborative" / "ids.safetensors"
    ids = load_indexes(path)
    save_indexes({**ids, "item": IdIndex(change(ids["item"].ids()), "item")}, path)


DAMAGE = [
    ("store", lambda f: flip(next((f / "store").glob("users-*"))), "the content of users-.* is not the saved one"),
    ("mq_user", lambda f: (f / "mq_user" / "config.json").write_text("{"), r"mq_user/config.json is damaged"),
    ("model", lambda f: weights(f, lambda tensors: tensors.popitem()), "do not fit config.json"),
    (
        "collaborative",
        lambda f: (f / "collaborative" / "ids.safetensors").write_bytes(b""),
        "ids.safetensors is damaged",
    ),
    ("collaborative", lambda f: change_item_ids(f, lambda ids: [*ids, "more"]), r"has (\d+) item ids for (?!\1)"),
    ("collaborative", lambda f: change_item_ids(f, lambda ids: ids[1:]), r"has (\d+) item ids for (?!\1)"),
    ("settings", lambda f: (f / "metrics.json").write_text("["), "metrics.json is damaged"),
    ("settings", lambda f: (f / "recipe.yaml").write_text("seed: many"), "recipe.yaml.*setting recipe is missing"),
    ("codes", lambda f: flip(f / "codes.safetensors"), "codes.safetensors is damaged|are not those of the vectors"),
    ("codes", drop_a_user, "1 users, such as 'u0', are in one of tokenizer and store only"),
    (
        "codes",
        replace_a_vector,
        "the codes of 1 of 18 users and items, such as item 'i0', are not those of the vectors",
    ),
    ("codes", lambda f: weights(f / "mq_item", lambda t: t.update({k: v + 1 for k, v in t.items()})), "space_id"),
    ("interactions", forget_a_user, "1 users of train.parquet, such as 'u0', are not in the store"),
    ("interactions", lambda f: flip(f / "training" / "interactions" / "test.parquet"), "test.parquet|[Pp]arquet"),
    (
        "changes",
        lambda f: (f / ".update").mkdir(),
        r"1 files or folders are left of interrupted work, such as .*\.update",
    ),
    ("changes", lambda f: (f / "collaborative" / ".tmpVsodXC").touch(), r"such as .*\.tmpVsodXC"),
    ("changes", lambda f: (f / ".codes.safetensors-0123abcd.tmp").touch(), r"such as .*0123abcd\.tmp"),
]


def test_an_undamaged_repository_passes_all_checks(tiny):
    parts = ["model", "mq_user", "mq_item", "collaborative", "store", "codes"]
    checks = [(check.run, check.name) for check in Repository(tiny).verify() if check.passed]
    assert checks == [
        *(("repository", name) for name in ("changes", "settings", *parts, "interactions")),
        *(("selection", name) for name in parts),
    ]


@pytest.mark.parametrize(("name", "damage", "finding"), DAMAGE)
def test_damage_is_found_where_it_is(folder, name, damage, finding):
    damage(folder)
    found = {check: sentence for _, check, sentence in failed(folder)}
    assert name in found
    assert re.search(finding, found[name])
    assert all("\n" not in sentence for sentence in found.values())


def test_what_is_no_repository_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="it is no trained repository"):
        Repository(tmp_path).verify()


def test_a_repository_without_users_and_training_passes(folder):
    for part in ("training", "collaborative"):
        shutil.rmtree(folder / part)
    store = EmbeddingStore.open(folder)
    store.save_pretrained(folder / "store", include_users=False)
    tokenizer = TokenRecTokenizer.from_pretrained(folder)
    tokenizer.remove("user", tokenizer.ids("user"))
    tokenizer.save_codes(folder)
    assert failed(folder) == []


def test_repair_completes_a_change_sweeps_and_makes_codes_again(folder, capsys):
    item = NewVectors(["fresh"], torch.ones(1, DIM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repository, "_finish", lambda repository: None)
        Repository(folder).add(items=item)
    assert (folder / ".update-committed").is_dir() and "fresh" in Recommender.from_pretrained(folder).store.ids("item")
    (folder / ".recipe.yaml-0123abcd.tmp").write_text("half")
    (folder / f"{PUSHED}dead" / "repository").mkdir(parents=True)
    (folder / f"{PUSHED}live").mkdir()
    with exclusive(folder / f"{PUSHED}live"):
        assert main(["verify", str(folder)]) == 1
        assert (
            "a change is committed and readers see it, but not all of its files are in place" in capsys.readouterr().out
        )
        assert main(["verify", str(folder), "--repair", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and {check["passed"] for check in document["checks"]} == {True}
    assert sorted(path.name for path in folder.glob(".*")) == [f"{PUSHED}live", ".update.lock"]
    assert "fresh" in EmbeddingStore.open(folder).ids("item")
    for damage in (replace_a_vector, lambda folder: os.unlink(folder / "codes.safetensors")):
        damage(folder)
        Repository(folder).repair()
        assert failed(folder) == []


def test_repair_of_what_cannot_be_made_again_is_refused(folder):
    flip(next((folder / "store").glob("items-*")))
    with pytest.raises(ValueError, match="store.json is damaged"):
        Repository(folder).repair()
