"""The service, by its application in this process, and once as the command that a user starts and stops."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason='the service needs the extra: pip install "tokenrec-hf[serve]"')
pytest.importorskip("fastapi", reason='the service needs the extra: pip install "tokenrec-hf[serve]"')

from fastapi.testclient import TestClient

import tokenrec_hf
from tokenrec_hf import Recommender, Repository
from tokenrec_hf.cli import serve
from tokenrec_hf.cli.app import main
from tokenrec_hf.models.embedding_store import EmbeddingStore

TITLES = {"f001": "The Silent Harbor"}


@pytest.fixture(scope="module")
def recommender(trained_repository):
    return Recommender.from_pretrained(trained_repository)


@pytest.fixture(scope="module")
def client(trained_repository):
    with TestClient(serve.create_app(serve.Service(Repository(trained_repository), TITLES))) as client:
        yield client


@pytest.fixture
def repository(trained_repository, tmp_path):
    """A copy of the trained repository, to be changed."""
    return Repository(shutil.copytree(trained_repository, tmp_path / "repository"))


def results(response):
    assert response.status_code == 200, response.text
    return found(serve.Answer(**response.json()).model_dump()["results"])


def found(rows):
    return [[(one["item"], one["score"]) for one in row] for row in rows]


def test_a_batch_is_answered_as_the_recommender_answers_it(client, recommender):
    requests = [{"user": "u001"}, {"user": "u002", "history": ["f001", "f002"]}, {"user": "u003", "history": []}]
    response = client.post("/recommend", json={"requests": requests, "top_k": 7})
    expected = recommender.recommend(["u001", "u002", "u003"], [None, ["f001", "f002"], []], top_k=7)
    assert results(response) == found(expected)


def test_an_anonymous_user_and_the_options_of_a_search(client, recommender):
    body = {"requests": [{"history": ["f001", "f002"]}], "top_k": 3, "exclude_seen": False}
    expected = recommender.recommend([None], [["f001", "f002"]], top_k=3, exclude_seen=False)
    assert results(client.post("/recommend", json=body)) == found(expected)
    response = client.post("/recommend", json={**body, "where": {"genre": ["jazz", "folk"]}})
    assert response.status_code == 422 and "no item has the metadata 'genre'" in response.json()["detail"]


def test_similar_items_are_those_of_the_recommender(client, recommender):
    response = client.post("/similar", json={"items": ["f001", "f002"], "top_k": 300})
    assert results(response) == found(recommender.similar_items(["f001", "f002"], top_k=300))
    titles = {one["item"]: one["title"] for one in response.json()["results"][1]}
    assert titles["f001"] == TITLES["f001"] and titles["f003"] is None


def test_health_tells_what_is_served(client, recommender):
    health = client.get("/health").json()
    assert re.fullmatch("[0-9a-f]{16}", health.pop("generation"))
    assert health == {
        "status": "ok",
        "version": tokenrec_hf.__version__,
        "users": 1000,
        "items": 300,
        "space_ids": recommender.tokenizer.space_ids,
    }


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/recommend", {"requests": [{"user": "u001"}, {"user": "nobody"}]}, "nobody"),
        ("/recommend", {"requests": [{"user": "u001", "history": ["nothing"]}]}, "nothing"),
        ("/recommend", {"requests": [{"user": "u001"}, {}]}, "neither a user nor a history is named (request 1)"),
        ("/recommend", {"requests": [{"user": 7}]}, "body.requests.0.user: input should be a valid string."),
        ("/recommend", {"requests": [{"user": "u001", "name": "Ann"}]}, "body.requests.0.name: extra inputs"),
        ("/recommend", {"requests": {"user": "u001"}}, "body.requests: input should be a valid list."),
        ("/recommend", {"requests": []}, "body.requests: list should have at least 1 item"),
        ("/recommend", {"requests": [{"user": "u001"}] * 257}, "at most 256 items"),
        ("/recommend", {"requests": [{"history": ["f001"] * 10_001}]}, "at most 10000 items"),
        ("/recommend", {"requests": [{"user": "u001"}], "top_k": 0}, "body.top_k: input should be greater than"),
        ("/recommend", {"requests": [{"user": "u001"}], "top_k": 1001}, "less than or equal to 1000"),
        ("/recommend", {"requests": [{"user": "u001"}], "top_k": True}, "body.top_k: input should be a valid integer"),
        ("/recommend", {"requests": [{"user": "u001"}], "where": {"a b": 1}}, "not made of letters"),
        ("/recommend", {"requests": [{"user": "u001"}], "where": {"a": None}}, "body.where.a"),
        ("/similar", {"items": ["f001"], "where": {"title~": ["a"] * 257}}, "at most 256 items"),
        ("/similar", {"items": ["f001"], "where": {f"a{n}": 1 for n in range(257)}}, "at most 256 items"),
        ("/similar", {"items": ["nothing"]}, "item 'nothing' is not in the store"),
        ("/similar", {"items": "f001"}, "body.items: input should be a valid list."),
        ("/similar", {}, "body.items: field required."),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(client, path, body, says):
    response = client.post(path, json=body)
    assert response.status_code == 422
    detail = serve.Problem(**response.json()).detail
    assert says in detail and "\n" not in detail and detail.endswith((".", ")"))


def test_one_bad_request_need_not_lose_the_others(client):
    requests = [{"user": "u001"}, {"user": "nobody"}]
    known, unknown = client.post("/recommend", json={"requests": requests, "on_unknown": "skip"}).json()["results"]
    assert known == client.post("/recommend", json={"requests": requests[:1]}).json()["results"][0] and unknown == []
    popular = client.post("/recommend", json={"requests": requests, "on_unknown": "popular"}).json()["results"][1]
    assert len(popular) == 10 and all(serve.Item(**item).score is None for item in popular)
    assert popular[0]["note"].startswith("user 'nobody' is unknown")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"requests": [{"user": "\xe9"}]}',
        b"[" * 100_000,
        b'{"requests": [{"user": "\\ud800"}]}',
        b'{"requests": [{"user": "u001"}], "top_k": NaN}',
    ],
)
def test_a_body_that_is_no_request_is_refused(client, content):
    response = client.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert isinstance(response.json()["detail"], str)


def test_the_requests_of_the_docs_are_answered(client):
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    curls = re.findall(r"^curl (?:--json '(.+)' )?localhost:8000(/\w+)$", page, re.M)
    assert [path for _, path in curls] == ["/recommend", "/similar", "/health"]
    for body, path in curls:
        response = client.post(path, json=json.loads(body)) if body else client.get(path)
        assert response.status_code == 200
    refused = client.post("/recommend", json={"requests": [{"user": "nobody"}]})
    assert json.loads(re.search(r"^```json\n(.+)\n```", page, re.M)[1]) == refused.json()


def test_the_examples_of_the_api_are_requests_that_it_takes(client):
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/recommend", "/similar", "/health"}
    schemas = document["components"]["schemas"]

    def example(schema):
        if "$ref" in schema:
            own = schemas[schema["$ref"].split("/")[-1]]
            return {name: example(one) for name, one in own["properties"].items()}
        if "examples" in schema:
            return schema["examples"][0]
        return [example(schema["items"])] if schema.get("type") == "array" else schema["default"]

    for path in ("/recommend", "/similar"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert client.post(path, json=example(body)).status_code == 200


def test_a_changed_repository_is_opened_again(repository):
    service = serve.Service(repository)
    former = service.health()
    asked = serve.RecommendRequest(requests=[{"user": "u001"}])
    best = service.recommend(asked)["results"][0][0]["item"]
    assert not service.refresh()

    repository.remove(items=[best])
    assert service.recommend(asked)["results"][0][0]["item"] == best, "nothing changes before the refresh"
    assert service.refresh() and not service.refresh()
    assert best not in [one["item"] for one in service.recommend(asked)["results"][0]]
    assert service.health()["generation"] != former["generation"]


def test_a_repository_that_cannot_be_opened_leaves_the_former_one_to_answer(repository):
    service = serve.Service(repository)
    asked = serve.RecommendRequest(requests=[{"user": "u001"}])
    former = service.recommend(asked)
    manifest = repository.parts.store / "store.json"
    kept = manifest.read_bytes()
    manifest.write_text("{")
    with pytest.raises(ValueError, match="store.json"):
        service.refresh()
    assert service.recommend(asked) == former
    manifest.write_bytes(kept)
    assert not service.refresh()


def test_another_store_answers_in_place_of_the_repositorys(repository, recommender):
    store = EmbeddingStore.open(repository.folder)
    store.withdraw(["f001"])
    service = serve.Service(repository, store=store)
    rows = service.similar(serve.SimilarRequest(items=["f002"], top_k=300))["results"][0]
    assert "f001" not in [row["item"] for row in rows] and len(rows) == 298


def test_the_service_follows_changes_and_stops_when_it_is_told(repository):
    """The command in a process of its own: served, changed while requests come in, and stopped with one of them open."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tokenrec_hf.cli.app", "serve", str(repository.folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = next(line for line in process.stderr if line.startswith("serving "))
        port = int(re.search(r"http://127.0.0.1:(\d+);", line)[1])

        def ask(path, body=None):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request("POST" if body else "GET", path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.status == 200
            return json.loads(answer.read())

        body = {"requests": [{"user": "u001"}], "top_k": 5}
        best = ask("/recommend", body)["results"][0][0]["item"]
        repository.remove(items=[best])
        end = time.monotonic() + 60
        while best in [one["item"] for one in ask("/recommend", body)["results"][0]]:
            assert time.monotonic() < end, "the change is not noticed"

        many = {"requests": [{"user": f"u{number:03d}"} for number in range(1, 257)], "top_k": 200}
        answers = []
        last = threading.Thread(target=lambda: answers.append(ask("/recommend", many)))
        last.start()
        ask("/health")
        process.send_signal(signal.SIGINT)
        last.join()
        assert len(answers[0]["results"]) == 256
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("command", ["demo", "serve"])
def test_help_shows_an_example(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"tokenrec {command} out" in out.split("example")[1] and "--port" in out


def test_a_port_that_is_taken_is_named(capsys, trained_repository):
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(trained_repository), "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} cannot be served" in capsys.readouterr().err


def test_without_the_extra_a_sentence_tells_how_to_get_it(capsys, monkeypatch, trained_repository):
    monkeypatch.delitem(sys.modules, "tokenrec_hf.cli.serve")
    monkeypatch.delattr("tokenrec_hf.cli.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(trained_repository)]) == 1
    assert capsys.readouterr().err == (
        'tokenrec: error: the service needs FastAPI and uvicorn: pip install "tokenrec-hf[serve]".\n'
    )
