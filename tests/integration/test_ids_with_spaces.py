"""Ids with spaces inside, such as names of artists and games, from the file to every answer."""

import csv
import json

import pytest
import tiny_repository
from transformers import pipeline

from tokenrec_hf import Recommender, load_interactions
from tokenrec_hf.cli.app import main

USERS = [f"New  York {n}" for n in range(6)]
# One of them looks like two mentions in a prompt.
ITEMS = ["i0", *(f"The Who {n}" for n in range(1, 11)), "i0 item_The Who 1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_repository, "USERS", USERS)
    monkeypatch.setattr(tiny_repository, "ITEMS", ITEMS)
    tiny_repository.write_tiny_repository(tmp_path / "out")
    return tmp_path / "out"


def test_ids_keep_the_spaces_inside_and_lose_those_around(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n New  York 0 , The Who 1\nNew  York 0,i0\n", encoding="utf-8")
    interactions = load_interactions(tmp_path / "a.csv")
    assert interactions["user_id"][:] == ["New  York 0"] * 2 and interactions["item_id"][:] == ["The Who 1", "i0"]


def test_commands_take_and_show_them(folder, capsys):
    assert main(["recommend", str(folder), "--user", USERS[0], "--history", ITEMS[11], ITEMS[2], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["user"], document["history"]) == (USERS[0], [ITEMS[11], ITEMS[2]])
    shown = {row["item"] for row in document["recommendations"]}
    assert shown <= set(ITEMS) - {ITEMS[11], ITEMS[2]}
    assert main(["similar", str(folder), "--item", ITEMS[11]]) == 0
    assert f"item_{ITEMS[11]} = " in capsys.readouterr().out


def test_a_file_for_all_users_has_them(folder, tmp_path):
    assert main(["recommend", str(folder), "--all-users", "--output", str(tmp_path / "all.csv")]) == 0
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["user_id"] for row in rows} == set(USERS) and {row["item_id"] for row in rows} <= set(ITEMS)


def test_the_pipeline_reads_them_in_requests_and_in_texts(folder):
    recommend = pipeline("generative-retrieval", model=str(folder))
    text = "What should user_New␣␣York␣1 try after item_i0␣item_The␣Who␣1 item_The␣Who␣3 then?"
    template = "What should {user} try after {history} then?"
    assert recommend(text) == recommend({"user": USERS[1], "history": [ITEMS[11], ITEMS[3]]}, prompt=template)
    encoded = recommend.tokenizer(text, return_entities=True)
    assert (encoded["user_ids"], encoded["item_ids"]) == ([USERS[1]], [ITEMS[11], ITEMS[3]])


def test_an_id_that_names_a_user_and_an_item_is_neither(folder):
    with pytest.raises(KeyError, match="is unknown"):
        Recommender.from_pretrained(folder).recommend([f"{USERS[0]} item_i0"])


def test_a_decoded_text_is_read_as_it_was(folder):
    tokenizer = Recommender.from_pretrained(folder).tokenizer
    tokens = tokenizer.entity_token_ids("item", [ITEMS[4]])[0].tolist()
    text = tokenizer.decode(tokens)
    assert text == "item_The␣Who␣4" or "<v" in text  # its codes may be those of another item
    assert tokenizer(text, add_special_tokens=False).input_ids == tokens
