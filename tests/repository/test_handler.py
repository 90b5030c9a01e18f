"""The handler of a pushed repository, as an Inference Endpoint calls it."""

import runpy
import shutil

import pytest

from tokenrec_hf import Recommender, Repository
from tokenrec_hf.models.codes import fetch_repository

NAME = "tester/served"


@pytest.fixture
def handler(hub, trained_repository, tmp_path):
    Repository(shutil.copytree(trained_repository, tmp_path / "own")).push_to_hub(NAME, include_users=True)
    folder = fetch_repository(NAME)
    return runpy.run_path(str(folder / "handler.py"))["EndpointHandler"](str(folder))


def test_an_endpoint_answers_as_the_recommender(handler, trained_repository):
    recommender = Recommender.from_pretrained(trained_repository)
    asked = [{"user": "u001"}, {"user": "u002", "history": ["f001"]}]
    expected = recommender.recommend(["u001", "u002"], [None, ["f001"]], top_k=3)
    answers = handler({"inputs": asked, "parameters": {"top_k": 3}})
    assert [[row["item"] for row in rows] for rows in answers] == [[row["item"] for row in rows] for rows in expected]
    assert handler({"inputs": asked[0]}) == recommender.recommend(["u001"])[0]


def test_a_bad_request_is_answered_with_a_sentence(handler):
    assert "user 'nobody' is unknown" in handler({"inputs": {"user": "nobody"}})["error"]
    assert "no argument 'k'" in handler({"inputs": {"user": "u001"}, "parameters": {"k": 3}})["error"]
    assert "inputs" in handler({})["error"]
