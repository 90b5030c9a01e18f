"""ONNX graphs: the same queries and recommendations as PyTorch's, and files that do not fit."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason='graphs need the extra: pip install "tokenrec-hf[onnx]"')
pytest.importorskip("onnxscript", reason='graphs need the extra: pip install "tokenrec-hf[onnx]"')

from tokenrec_hf import Recommender, Repository, export_onnx, use_onnx
from tokenrec_hf.cli.app import main
from tokenrec_hf.models import modeling_t5_retrieval


@pytest.fixture(scope="module")
def folder(fism_repository):
    """A repository whose T5 has a part in all queries."""
    assert Recommender.from_pretrained(fism_repository).model.config.history_weight > 0
    return fism_repository


@pytest.fixture(scope="module")
def graph(folder, tmp_path_factory):
    """A graph as `tokenrec export` writes it."""
    path = tmp_path_factory.mktemp("graph") / "encoder.onnx"
    assert main(["export", str(folder), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def plain(folder):
    return Recommender.from_pretrained(folder)


@pytest.fixture(scope="module")
def faster(folder, graph):
    return use_onnx(Recommender.from_pretrained(folder), graph)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_queries_are_those_of_pytorch(plain, faster, data):
    """Prompts of any number and length, with and without users and histories, in all wordings."""
    users, items = plain.store.ids("user"), plain.store.ids("item")
    count = data.draw(st.integers(1, 9))
    histories = [data.draw(st.lists(st.sampled_from(items), max_size=40)) for _ in range(count)]
    asked = [data.draw(st.sampled_from(users) if not own else st.sampled_from([None, *users])) for own in histories]
    inputs = plain.tokenize(asked, histories)
    with torch.inference_mode():
        expected, found = (
            one.model.encode_queries(inputs["input_ids"], inputs["attention_mask"]) for one in (plain, faster)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_recommendations_are_those_of_pytorch(plain, faster):
    users = plain.store.ids("user")
    for user in users[:20]:
        (expected,), (found,) = (one.recommend([user], top_k=20) for one in (plain, faster))
        assert [row["item"] for row in found] == [row["item"] for row in expected]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_the_graph_answers_small_batches_without_gradient_only(faster, monkeypatch):
    calls, model = [], faster.model
    inputs = faster.tokenize(faster.store.ids("user")[:4])
    prompts = inputs["input_ids"], inputs["attention_mask"]
    graph = model.runtime
    monkeypatch.setattr(model, "runtime", lambda prompts: calls.append(1) or graph(prompts))
    model.encode_queries(*prompts)  # with gradient
    assert not calls
    with torch.no_grad():
        model.encode_queries(*prompts)
        assert len(calls) == 1
        model.train()
        model.encode_queries(*prompts)
        model.eval()
        monkeypatch.setattr(modeling_t5_retrieval, "RUNTIME_POSITIONS", 3)
        model.encode_queries(*prompts)
    assert len(calls) == 1


def test_the_command_names_the_file_and_the_next_command(folder, graph, capsys):
    path = graph.parent / "again.onnx"
    assert main(["export", str(folder), "--output", str(path)]) == 0
    said = capsys.readouterr()
    assert f"tokenrec serve {folder} --onnx {path}" in said.out
    assert "torchvision" not in said.err and "Warning" not in said.err
    assert [one.name for one in sorted(graph.parent.iterdir())] == ["again.onnx", "encoder.onnx"]


@pytest.mark.parametrize("flaw", ["missing", "cut", "text", "other weights", "another history_weight"])
def test_a_file_that_does_not_fit_is_refused(folder, graph, tmp_path, flaw):
    recommender, path = Recommender.from_pretrained(folder), tmp_path / "encoder.onnx"
    message = {
        "missing": "there is no ONNX graph .*encoder.onnx; make it with `tokenrec export`",
        "cut": "is no ONNX graph that can be read",
        "text": "is no ONNX graph that can be read",
        "other weights": "was not made from this model",
        "another history_weight": "was not made from this model",
    }[flaw]
    if flaw == "cut":
        path.write_bytes(graph.read_bytes()[:1000])
    elif flaw == "text":
        path.write_text("nothing")
    elif flaw != "missing":
        shutil.copy(graph, path)
    if flaw == "other weights":
        with torch.no_grad():
            next(recommender.model.transformer.parameters())[0, 0] += 1e-3
    elif flaw == "another history_weight":
        recommender.model.config.history_weight += 0.5
    with pytest.raises(FileNotFoundError if flaw == "missing" else ValueError, match=message):
        use_onnx(recommender, path)
    assert recommender.model.runtime is None


def test_a_model_of_another_pooling_has_no_graph(trained_repository, graph, tmp_path):
    other = Recommender.from_pretrained(trained_repository)
    for call in (lambda: export_onnx(other.model, tmp_path / "encoder.onnx"), lambda: use_onnx(other, graph)):
        with pytest.raises(ValueError, match="only a model with history pooling has an ONNX graph"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_service_with_a_graph_answers_as_one_without(folder, graph):
    serve = pytest.importorskip("tokenrec_hf.cli.serve")
    asked = serve.RecommendRequest(requests=[{"user": "u001"}, {"history": ["f001", "f002"]}])
    services = [serve.Service(Repository(folder), onnx=onnx) for onnx in (None, str(graph))]
    assert services[1]._opened[0].model.runtime is not None
    expected, found = (service.recommend(asked)["results"] for service in services)
    assert [[one["item"] for one in row] for row in found] == [[one["item"] for one in row] for row in expected]


def test_a_failed_export_leaves_the_former_file_and_the_mode_of_the_model(plain, graph, tmp_path, monkeypatch):
    path = tmp_path / "encoder.onnx"
    shutil.copy(graph, path)

    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    plain.model.train()
    with pytest.raises(RuntimeError, match="no"):
        export_onnx(plain.model, path)
    assert plain.model.training and path.read_bytes() == graph.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["encoder.onnx"]
    plain.model.eval()
