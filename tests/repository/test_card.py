"""Tests of the card of a trained repository."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tokenrec_hf import EmbeddingStore
from tokenrec_hf.repository.card import model_card, write_model_card
from tokenrec_hf.repository.repository import Repository


@pytest.fixture
def repository(trained_repository, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(trained_repository, copy)
    return copy


@pytest.fixture
def metrics(repository):
    return json.loads((repository / "metrics.json").read_text())


def numbers_in(document):
    """Every number of a JSON or YAML document."""
    if isinstance(document, dict):
        return [number for value in document.values() for number in numbers_in(value)]
    if isinstance(document, list):
        return [number for value in document for number in numbers_in(value)]
    return [document] if isinstance(document, int | float) and not isinstance(document, bool) else []


def test_training_leaves_a_card(trained_repository):
    assert (trained_repository / "README.md").read_text() == model_card(Repository(trained_repository))


def test_users_and_items_may_have_different_numbers_of_codes(repository):
    path = repository / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["codebooks"]["user"] = [8, 512]
    path.write_text(json.dumps(config))
    number, size = config["codebooks"]["item"]
    assert f"A user has codes of K=8, L=512, an item of K={number}, L={size} (" in model_card(Repository(repository))


def test_metadata_say_what_was_measured(repository, metrics):
    data = ModelCard(model_card(Repository(repository), "tester/demo")).data
    assert data.to_dict()["library_name"] == "transformers"
    assert data.pipeline_tag == "generative-retrieval"
    assert data.datasets == ["demo"]
    results = {result.metric_name: result for result in data.eval_results}
    assert set(results) == {"HR@10", "HR@20", "NDCG@20"}
    for name, result in results.items():
        assert result.metric_value == metrics["test"]["tokenrec"][name.lower()]
        assert result.dataset_split == "test"
    index = yaml.safe_load(model_card(Repository(repository), "tester/demo").split("---")[1])["model-index"]
    assert model_index_to_eval_results(index) == ("demo", data.eval_results)


def test_a_backbone_of_the_hub_is_the_base_model(repository):
    path = repository / "recipe.yaml"
    scratch = path.read_text()
    for backbone, base in ((None, None), ("google-t5/t5-small", "google-t5/t5-small"), (str(repository), None)):
        path.write_text(scratch.replace("backbone: null", f"backbone: {backbone or 'null'}"))
        assert ModelCard(model_card(Repository(repository))).data.base_model == base


def test_no_number_comes_from_nowhere(repository, metrics):
    body = model_card(Repository(repository), "tester/demo").split("---\n", 2)[2]
    body = re.sub(r"```.*?```|`[^`]*`|\(https?://[^)]*\)", "", body, flags=re.DOTALL)
    known = numbers_in(metrics) + numbers_in(yaml.safe_load((repository / "recipe.yaml").read_text()))
    text = re.sub(r"(HR|NDCG)@(10|20)|first 20|T5", "", body)
    found = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w])", text)
    assert len(found) > 40
    for number in found:
        decimals = len(number.partition(".")[2])
        assert any(float(number) == pytest.approx(one, abs=0.5 * 10**-decimals * (decimals > 0)) for one in known), (
            f"{number} was not measured"
        )


def test_a_changed_measurement_changes_the_card(repository, metrics):
    before = model_card(Repository(repository))
    metrics["test"]["tokenrec"]["hr@20"] = 0.98765
    (repository / "metrics.json").write_text(json.dumps(metrics))
    after = model_card(Repository(repository))
    assert "0.9877" in after
    assert "0.9877" not in before


def test_the_card_says_how_the_data_were_split(repository, metrics):
    assert "Leave-one-out: the last item of each user" in model_card(Repository(repository))
    (repository / "metrics.json").write_text(json.dumps({**metrics, "split_at": "2024-05-01"}))
    card = model_card(Repository(repository))
    assert "Temporal split at 2024-05-01" in card and "Leave-one-out" not in card


def test_no_user_is_named(repository):
    card = model_card(Repository(repository))
    assert not any(re.search(rf"\b{user}\b", card) for user in EmbeddingStore.open(repository).ids("user"))


def test_a_card_of_ones_own_stays(repository):
    (repository / "README.md").write_text("mine")
    assert write_model_card(Repository(repository)).read_text() == "mine"


def test_an_unfinished_repository_has_no_card(repository):
    (repository / "metrics.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"metrics\.json to make a model card from; finish `tokenrec train` first"
    ):
        model_card(Repository(repository))


def test_the_hub_finds_nothing_wrong_and_the_code_of_the_card_runs(hub, repository, tmp_path):
    Repository(repository).push_to_hub("tester/demo")
    card = ModelCard(hub.files("tester/demo")["README.md"].decode())
    card.validate()
    assert "validate" in hub.log
    assert 'model="tester/demo"' in card.content
    code = re.search(r"```python\n(.*?)```", card.content, re.DOTALL).group(1)
    import os

    environment = {**os.environ, **hub.environment(tmp_path / "elsewhere", token=None)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    items = EmbeddingStore.open(repository).ids("item")
    recommended = [line.split()[0] for line in ran.stdout.splitlines()]
    assert len(recommended) == 5
    assert set(recommended) <= set(items[2:])


def test_a_card_of_ones_own_is_pushed_as_it_is(hub, repository):
    (repository / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    Repository(repository).push_to_hub("tester/demo")
    assert hub.files("tester/demo")["README.md"] == (repository / "README.md").read_bytes()
