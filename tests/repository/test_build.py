import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from tokenrec_hf.cli.app import main
from tokenrec_hf.data.demo import demo_interactions
from tokenrec_hf.data.splits import index_splits, leave_one_out
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.configuration_tokenrec import MQTokenizerConfig
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.modeling_collaborative import FISMModel, LightGCNModel
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel
from tokenrec_hf.models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from tokenrec_hf.models.recommender import Recommender
from tokenrec_hf.models.tokenization_tokenrec import TokenRecTokenizer
from tokenrec_hf.repository import build as training
from tokenrec_hf.repository.build import build_collator, build_retrieval_model, train
from tokenrec_hf.repository.repository import PUSHED, Repository
from tokenrec_hf.repository.update import NewVectors
from tokenrec_hf.training import stages
from tokenrec_hf.training.recipe import Recipe

TINY = {
    "collaborative.config": {"embedding_dim": 8, "num_layers": 2},
    "collaborative.evaluate_every": 1,
    "collaborative.patience": 2,
    "collaborative.training": {"num_train_epochs": 3, "per_device_train_batch_size": 128},
    "mq_tokenizer.config": {"codebook_size": 8, "codebook_dim": 8, "hidden_dim": 16},
    "mq_tokenizer.evaluate_every": 5,
    "mq_tokenizer.training": {"max_steps": 12, "per_device_train_batch_size": 16},
    "prompts": {"train_history": 8},
    "retrieval.backbone": None,
    "retrieval.num_negatives": 0,
    "retrieval.config": {
        "d_model": 16,
        "d_kv": 8,
        "num_heads": 2,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "projection_dim": 16,
        "loss_type": "softmax",
    },
    "retrieval.evaluate_every": 1,
    "retrieval.patience": 2,
    "retrieval.training": {"num_train_epochs": 3, "per_device_train_batch_size": 16, "warmup_steps": 2},
}
STAGES = ("train_collaborative", "train_mq_tokenizer", "train_retrieval")
EVALUATIONS = ("evaluate_baselines", "evaluate_retrieval")


def make_splits(seed=0):
    """Forty users and two who have too little to hold anything out."""
    few = {
        "user_id": ["one", "two", "two"],
        "item_id": ["f001", "f001", "f002"],
        "timestamp": np.arange(3, dtype=np.int64),
    }
    demo = demo_interactions(seed=seed, num_users=40, num_items=30)
    return leave_one_out(concatenate_datasets([demo, Dataset.from_dict(few, features=demo.features)]))


@pytest.fixture(scope="module")
def splits():
    return make_splits()


@pytest.fixture(scope="module")
def recipe():
    return Recipe.load("paper", overrides=TINY)


@pytest.fixture(scope="module")
def trained(splits, recipe, tmp_path_factory):
    """A repository from one uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    log = []
    metrics = train(splits, recipe, folder, dataset_name="small", log=log.append).metrics
    return SimpleNamespace(folder=folder, metrics=metrics, log=log)


class PowerCut(Exception):
    """Ends a run as a power cut would."""


def cut(*args, **kwargs):
    raise PowerCut


def weights(folder):
    """The content of all weight files of a repository."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert {"model.safetensors", "codes.safetensors", "collaborative/model.safetensors"} <= set(found)
    return found


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def pairs(users, items):
    return set(zip(users, items))


def pairs_of(splits, *names):
    return set().union(*(pairs(splits[name]["user_id"][:], splits[name]["item_id"][:]) for name in names))


def pairs_in(data, interactions):
    users = [data.user_ids[row] for row in interactions.users]
    return pairs(users, [data.item_ids[row] for row in interactions.items])


# Rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluate_on", "trained_on"), [("validation", ["train"]), ("test", ["train", "validation"])])
def test_rows_hold_what_is_trained_on_and_what_is_held_out(splits, evaluate_on, trained_on):
    data = index_splits(splits, evaluate_on)
    assert pairs_in(data, data.interactions) == pairs_of(splits, *trained_on)
    assert len(data.interactions) == sum(len(splits[name]) for name in trained_on)
    held_out = [
        (data.user_ids[user], data.item_ids[item]) for user, item in zip(data.holdout.users, data.holdout.targets)
    ]
    assert held_out == list(zip(splits[evaluate_on]["user_id"][:], splits[evaluate_on]["item_id"][:]))


def test_rows_are_the_same_for_selection_and_refit_and_in_time_order(splits):
    selection, refit = index_splits(splits, "validation"), index_splits(splits, "test")
    assert selection.user_ids == refit.user_ids
    assert selection.item_ids == refit.item_ids
    assert len(selection.user_ids) == 42
    for user in range(42):
        assert refit.interactions.of(user)[: selection.interactions.lengths[user]].tolist() == (
            selection.interactions.of(user).tolist()
        )
    last = [refit.interactions.of(user)[-1] for user in selection.holdout.users]
    assert last == selection.holdout.targets.tolist()


# A whole run -----------------------------------------------------------------------------------------------------------


def test_training_writes_a_repository(trained, splits):
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "codes.safetensors"),
        *("mq_user", "mq_item", "store", "collaborative", "metrics.json", "recipe.yaml", "training"),
    }
    assert not [
        path for path in trained.folder.rglob("*") if "tmp" in path.suffix or path.name.startswith("checkpoint-")
    ]
    tokenizer = TokenRecTokenizer.from_pretrained(trained.folder)
    store = EmbeddingStore.open(trained.folder / "store")
    model = T5ForGenerativeRetrieval.from_pretrained(trained.folder)
    mqs = {kind: MQTokenizerModel.from_pretrained(trained.folder / f"mq_{kind}") for kind in ("user", "item")}
    collaborative = LightGCNModel.from_pretrained(trained.folder / "collaborative")
    data = index_splits(splits, "test")
    for kind, ids in (("user", data.user_ids), ("item", data.item_ids)):
        assert tokenizer.ids(kind) == store.ids(kind) == ids
        assert mqs[kind].space_id == tokenizer.space_ids[kind] == store.space_ids[kind] == model.config.space_ids[kind]
        assert tokenizer.codes(kind).tolist() == mqs[kind].encode(store.vectors(kind)).tolist()
    assert torch.equal(store.vectors("user"), collaborative.user_embeddings())
    assert torch.equal(store.vectors("item"), collaborative.item_embeddings())
    found = Recommender(model, tokenizer, store).recommend(["two"], [[]], top_k=30)[0]
    assert len(found) == 28
    assert not {"f001", "f002"} & {one["item"] for one in found}


def test_metrics_say_what_was_measured(trained, splits, recipe):
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert metrics == trained.metrics
    assert {name: metrics[name] for name in ("dataset", "recipe", "seed", "refit")} == {
        "dataset": "small",
        "recipe": "paper",
        "seed": 0,
        "refit": True,
    }
    assert (metrics["users"], metrics["items"]) == (42, len(index_splits(splits, "test").item_ids))
    assert metrics["interactions"] == sum(len(splits[name]) for name in splits)
    for split in ("validation", "test"):
        assert set(metrics[split]) == {
            *("popularity", "itemknn", "collaborative_dot", "collaborative_cosine"),
            *("tokenrec", "tokenrec_user_id_only", "tokenrec_unseen_prompt", "tokenrec_history_only"),
        }
        for values in metrics[split].values():
            assert {f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (10, 20, 30)} <= set(values)
            assert all(0 <= value <= 1 for value in values.values())
    assert metrics["validation"] != metrics["test"]
    assert set(metrics["epochs"]) == {"collaborative", "retrieval"}
    assert all(epochs in (1, 2, 3) for epochs in metrics["epochs"].values())
    assert set(metrics["codes"]) == {"user", "item"}
    assert set(metrics["codes"]["item"]) >= {"usage", "perplexity", "collision_rate", "reconstruction_error"}
    stages_run = {"collaborative", "mq_user", "mq_item", "retrieval", "evaluation"}
    assert {run: set(seconds) for run, seconds in metrics["seconds"].items()} == {
        "selection": stages_run,
        "refit": stages_run,
    }


def test_the_recipe_that_is_written_is_the_one_that_was_used(trained, recipe):
    assert Repository(trained.folder).recipe == recipe


def test_the_interactions_can_be_read_back(trained, splits):
    loaded = Repository(trained.folder).splits()
    for name in splits:
        assert loaded[name].to_dict() == splits[name].to_dict()


def test_a_repository_without_interactions_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no train\.parquet, so there is nothing to evaluate on"):
        Repository(tmp_path).splits()


def test_vectors_of_the_refit_are_not_evaluated_on_validation_items(trained_repository):
    store = EmbeddingStore.open(trained_repository)
    with pytest.raises(ValueError, match="holds the vectors of the refit; evaluate it on the test split"):
        Repository(trained_repository).evaluate("validation", store=store)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("train",), "split is 'train'"), (("test", "all"), "variant is 'all'")]
)
def test_what_cannot_be_evaluated_is_named(trained_repository, arguments, message):
    with pytest.raises(ValueError, match=f"{message}; it must be one of"):
        Repository(trained_repository).evaluate(*arguments)


def test_one_seed_gives_one_result(trained, splits, recipe, tmp_path):
    again = train(splits, recipe, tmp_path, dataset_name="small").metrics
    assert without_seconds(again) == without_seconds(trained.metrics)
    assert weights(tmp_path) == weights(trained.folder)


def test_another_seed_gives_another_result(trained, splits, tmp_path):
    train(splits, Recipe.load("paper", overrides={**TINY, "seed": 1}), tmp_path)
    changed, before = weights(tmp_path), weights(trained.folder)
    for name in ("model.safetensors", "collaborative/model.safetensors", "mq_user/model.safetensors"):
        assert changed[name] != before[name]


def test_users_and_items_get_mq_tokenizers_of_different_random_numbers(trained):
    mqs = [MQTokenizerModel.from_pretrained(trained.folder / f"mq_{kind}") for kind in ("user", "item")]
    assert not torch.equal(mqs[0].encoders[0][0].weight, mqs[1].encoders[0][0].weight)


def test_without_refit_the_selection_is_the_result(trained, splits, recipe, tmp_path):
    metrics = train(splits, recipe, tmp_path, dataset_name="small", refit=False).metrics
    assert "test" not in metrics
    assert metrics["refit"] is False
    assert metrics["validation"] == trained.metrics["validation"]
    selection = trained.folder / "training" / "selection"
    for name in ("model.safetensors", "collaborative/model.safetensors", "mq_item/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (selection / name).read_bytes()
    assert not (tmp_path / "training" / "selection").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        {"retrieval.config.loss_type": "cosine_ranking"},
        {"retrieval.num_negatives": 6},
        {"collaborative.model": "matrix_factorization"},
    ],
    ids=["cosine ranking", "sampled softmax", "matrix factorization"],
)
def test_the_alternatives_of_a_recipe_train(splits, tmp_path, overrides):
    metrics = train(splits, Recipe.load("paper", overrides=TINY | overrides), tmp_path, refit=False).metrics
    assert 0 <= metrics["validation"]["tokenrec"]["ndcg@20"] <= 1


# Going on --------------------------------------------------------------------------------------------------------------


def test_a_second_call_repeats_nothing(splits, recipe, tmp_path, monkeypatch):
    first = train(splits, recipe, tmp_path).metrics
    before = weights(tmp_path)
    for name in (*STAGES, *EVALUATIONS):
        monkeypatch.setattr(training, name, cut)
    log = []
    assert train(splits, recipe, tmp_path, log=log.append).metrics == first
    assert weights(tmp_path) == before
    assert log == ["selection is finished already", "refit is finished already"]


def test_a_second_call_leaves_a_repository_that_has_changed(splits, recipe, trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "out")
    store = EmbeddingStore.open(folder / "store")
    Repository(folder).add(
        items=NewVectors(["new"], store.vectors("item")[:1, : recipe.collaborative.config["embedding_dim"]])
    )
    Repository(folder).remove(users=store.ids("user")[:1])
    changed = EmbeddingStore.open(folder / "store")
    train(splits, recipe, folder, dataset_name="small")
    store = EmbeddingStore.open(folder / "store")
    assert store.ids("user") == changed.ids("user") and store.ids("item") == changed.ids("item")
    Repository(folder).verify()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(user, item) for user in "abcd" for item in "xyz"], "no user has two interactions to train on"),
        ([(user, item) for user in ("a", "<u1-2>") for item in "vwxyz"], "'<u1-2>' begins like a code token"),
    ],
)
def test_data_that_cannot_be_learned_from_are_refused_at_once(recipe, tmp_path, pairs, message):
    users, items = zip(*pairs)
    times = list(range(len(pairs)))
    splits = leave_one_out(Dataset.from_dict({"user_id": users, "item_id": items, "timestamp": times}))
    with pytest.raises(ValueError, match=message):
        train(splits, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_to_train_in(splits, recipe, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; give a folder to write"):
        train(splits, recipe, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_backbone_that_cannot_be_had_is_found_before_the_first_stage(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = Recipe.load("paper", overrides={**TINY, "retrieval.backbone": "nobody/no-such-t5"})
    with pytest.raises((ValueError, OSError), match="nobody/no-such-t5"):
        train(splits, missing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_half_life_is_trained_once(splits, tmp_path, monkeypatch):
    recipe = Recipe.load("best", overrides={"collaborative.model": "lightgcn", "collaborative.num_negatives": 1})
    assert not recipe.collaborative.chooses_half_life and Recipe.load("best").collaborative.chooses_half_life
    log = []
    monkeypatch.setattr(training, "train_mq_tokenizer", cut)
    small = recipe.changed(**{"collaborative.training": {"num_train_epochs": 1}})
    with pytest.raises(PowerCut):
        train(splits, small, tmp_path, log=log.append)
    assert [line.split(" took ")[0] for line in log] == ["selection: collaborative"]


def test_a_choice_of_the_half_life_that_was_cut_off_goes_on_to_the_same_vectors(splits, tmp_path, monkeypatch):
    changes = {
        "collaborative.config.embedding_dim": 8,
        "collaborative.training.num_train_epochs": 4,
        "collaborative.training.per_device_train_batch_size": 64,
    }
    recipe, measured = Recipe.load("best").changed(**changes), training.held_out_ndcg
    monkeypatch.setattr(training, "train_mq_tokenizer", cut)
    with pytest.raises(PowerCut):
        train(splits, recipe, tmp_path / "whole")
    calls = []

    def second_is_cut(model, *args):
        calls.append(model.config.half_life)
        return cut() if len(calls) == 2 else measured(model, *args)

    monkeypatch.setattr(training, "held_out_ndcg", second_is_cut)
    for _ in range(2):
        with pytest.raises(PowerCut):
            train(splits, recipe, tmp_path / "cut")
    assert calls == 2 * [*training.HALF_LIVES]
    whole, again = (
        {
            "record": json.loads((tmp_path / name / "training" / "selection.json").read_text())["collaborative"][
                "metrics"
            ]
        }
        | load_file(tmp_path / name / "training" / "selection" / "collaborative" / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert whole.pop("record") == again.pop("record")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_stops_before_each_of_its_stages_goes_on(trained, splits, recipe, tmp_path, monkeypatch):
    finished, called = [], []

    def interrupted(function, name):
        """The stage; each attempt runs the one that the last attempt stopped at, and stops at the next one."""

        def stage(*args, **kwargs):
            called.append(name)
            if len(called) == 1 + bool(finished):
                cut()
            return function(*args, **kwargs)

        return stage

    for name in (*STAGES, "evaluate_retrieval"):
        monkeypatch.setattr(training, name, interrupted(getattr(training, name), name))
    order = 2 * [
        "train_collaborative",
        "train_mq_tokenizer",
        "train_mq_tokenizer",
        "train_retrieval",
        "evaluate_retrieval",
    ]
    for stage in order:
        log = []
        called.clear()
        with pytest.raises(PowerCut):
            train(splits, recipe, tmp_path, dataset_name="small", log=log.append)
        assert called[-1] == stage and not (tmp_path / "metrics.json").exists()
        finished.append(sum("finished already" in line for line in log))
    # A finished selection is one line.
    assert finished == [0, 0, 1, 2, 3, 4, 1, 2, 3, 4]
    called.clear()
    metrics = train(splits, recipe, tmp_path, dataset_name="small").metrics
    assert called == ["evaluate_retrieval"]
    assert without_seconds(metrics) == without_seconds(trained.metrics)
    assert weights(tmp_path) == weights(trained.folder)


def test_a_run_that_stops_again_and_again_within_its_stages_ends_the_same(
    trained, splits, recipe, tmp_path, monkeypatch
):
    cuts = {("collaborative model", 7), ("item MQ-Tokenizer", 8), ("T5 retrieval", 5), ("T5 retrieval", 4)}
    remaining = cuts | {(name, step + 1) for name, step in cuts}

    def on_step_end(self, args, state, control, **kwargs):
        if (self.name, state.global_step) in remaining:
            remaining.remove((self.name, state.global_step))
            raise PowerCut

    monkeypatch.setattr(stages.Progress, "on_step_end", on_step_end)
    for _ in range(len(remaining) + 1):
        try:
            metrics = train(splits, recipe, tmp_path, dataset_name="small").metrics
            break
        except PowerCut:
            continue
    assert len(remaining) < len(cuts)
    assert without_seconds(metrics) == without_seconds(trained.metrics)
    assert weights(tmp_path) == weights(trained.folder)


def test_other_settings_are_refused_with_the_difference(trained, splits):
    other = Recipe.load("paper", overrides=TINY | {"retrieval.training.learning_rate": 0.125})
    found = r"holds a run with recipe\.retrieval\.training\.learning_rate = .* where this one has 0\.125; give another"
    before = weights(trained.folder)
    with pytest.raises(ValueError, match=found):
        train(splits, other, trained.folder)
    assert weights(trained.folder) == before


@pytest.mark.parametrize("name", ["codes.py", "metrics.json", "store/notes.txt", "model.safetensors"])
def test_files_of_others_are_not_taken_into_a_repository(splits, recipe, tmp_path, name):
    (tmp_path / "store").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which would be taken for a part of the repository"):
        train(splits, recipe, tmp_path)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "training").exists()


def test_several_processes_are_refused_before_anything_is_written(splits, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"the three stages run in one process.*train_with_trainer\.py"):
        train(splits, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_given_item_vectors_take_the_place_of_the_collaborative_model(splits, tmp_path):
    small = {
        "collaborative.config": {"half_life": None},
        "mq_tokenizer.config": {"num_codebooks": 2, "codebook_size": 8},
        "mq_tokenizer.user_codebooks": 2,
        "retrieval.config": {
            "d_model": 16,
            "d_kv": 8,
            "num_heads": 2,
            "d_ff": 16,
            "num_layers": 1,
            "projection_dim": 16,
        },
        "retrieval.training": {"num_train_epochs": 1, "warmup_steps": 1},
    }
    recipe, ids = Recipe.load("best", overrides=small), index_splits(splits, "test").item_ids
    random = torch.Generator().manual_seed(0)
    titles = [{"title": f"Title of {name}"} for name in (*ids, "cold")]
    given = NewVectors([*ids, "cold"], 5 * torch.randn(len(ids) + 1, 12, generator=random), titles)
    with pytest.raises(ValueError, match="the metadata 'title' is"):
        train(
            splits, recipe, tmp_path, item_vectors=NewVectors(given.ids, given.vectors, [{"title": []}] * len(titles))
        )
    with pytest.raises(ValueError, match=f"1 of {len(ids)} items have no vector, such as '{ids[0]}'"):
        train(splits, recipe, tmp_path, item_vectors=NewVectors(given.ids[1:], given.vectors[1:]))
    with pytest.raises(ValueError, match="item vectors replace FISM, but the recipe's model is lightgcn"):
        train(splits, Recipe.load("paper"), tmp_path, item_vectors=given)
    repository = train(splits, recipe, tmp_path, item_vectors=given, refit=False)
    store, unit = EmbeddingStore.open(repository.parts.store), torch.nn.functional.normalize(given.vectors, dim=1)
    torch.testing.assert_close(store.get("item", given.ids)[:, :12], unit)
    assert store.metadata(given.ids) == titles
    user = splits["test"]["user_id"][0]
    train_pairs = zip(splits["train"]["user_id"], splits["train"]["item_id"])
    history = [item for name, item in train_pairs if name == user]
    expected = sum(unit[given.ids.index(item)] for item in history)
    torch.testing.assert_close(store.get("user", [user])[0, :12], expected / expected.norm())
    assert [check.finding for check in repository.audit() if check.passed is False] == []
    # The same call repeats nothing, other vectors are another run.
    train(splits, recipe, tmp_path, item_vectors=given, refit=False)
    with pytest.raises(ValueError, match="holds a run with item_vectors = "):
        train(splits, recipe, tmp_path, item_vectors=NewVectors(given.ids, given.vectors + 1), refit=False)


def test_how_the_data_were_read_and_split_is_recorded(trained):
    repository = Repository(trained.folder)
    assert (repository.reading, repository.metrics["split_at"]) == ({}, None)
    assert repository.metrics["evaluated_users"] == 40


def test_other_data_are_refused(trained, recipe):
    with pytest.raises(ValueError, match="holds a run with data = "):
        train(make_splits(seed=1), recipe, trained.folder)


def test_a_run_without_refit_is_another_run(trained, splits, recipe):
    with pytest.raises(ValueError, match="refit = True where this one has False"):
        train(splits, recipe, trained.folder, refit=False)


# Leaks -----------------------------------------------------------------------------------------------------------------


def test_a_run_sees_nothing_of_what_it_is_evaluated_on(splits, recipe, tmp_path, monkeypatch):
    rows = {"validation": index_splits(splits, "validation"), "test": index_splits(splits, "test")}
    given = {name: [] for name in STAGES}

    def spy(name):
        original = getattr(training, name)

        def called(*args, **kwargs):
            given[name].append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(training, name, called)

    for name in STAGES:
        spy(name)
    train(splits, recipe, tmp_path)
    runs = {"validation": tmp_path / "training" / "selection", "test": tmp_path}
    for number, (evaluated, folder) in enumerate(runs.items()):
        data = rows[evaluated]
        allowed = pairs_of(splits, *(["train"] if evaluated == "validation" else ["train", "validation"]))
        assert not allowed & pairs_of(splits, "test")
        (interactions, *_), options = given["train_collaborative"][number]
        assert pairs_in(data, interactions) == allowed
        (_, collator, *_), retrieval_options = given["train_retrieval"][number]
        assert pairs_in(data, collator.interactions) == allowed
        graph = LightGCNModel.from_pretrained(folder / "collaborative")
        users = [data.user_ids[row] for row in graph.edge_users.tolist()]
        assert pairs(users, [data.item_ids[row] for row in graph.edge_items.tolist()]) == allowed
        seen = EmbeddingStore.open(folder / "store").seen(data.user_ids)
        assert {(user, item) for user, items in zip(data.user_ids, seen) for item in items} == allowed
        for stage_options in (options, retrieval_options):
            if evaluated == "validation":
                assert stage_options["holdout"].targets.tolist() == data.holdout.targets.tolist()
                assert stage_options["epochs"] is None
            else:
                # The refit has nothing to choose by, only the lengths that were chosen.
                assert stage_options["holdout"] is None
                assert stage_options["epochs"] > 0
    assert len(given["train_collaborative"]) == len(given["train_retrieval"]) == 2


# Models and collator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(trained):
    return SimpleNamespace(
        tokenizer=TokenRecTokenizer.from_pretrained(trained.folder),
        user_mq=MQTokenizerModel.from_pretrained(trained.folder / "mq_user"),
        item_mq=MQTokenizerModel.from_pretrained(trained.folder / "mq_item"),
    )


@pytest.mark.parametrize("spare", [-40, 25], ids=["smaller vocabulary", "larger vocabulary"])
def test_a_backbone_is_taken_over_exactly(parts, tmp_path, spare):
    torch.manual_seed(0)
    vocab_size = len(parts.tokenizer) + spare
    config = T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    backbone = T5ForConditionalGeneration(config)
    backbone.save_pretrained(tmp_path)
    changes = {"backbone": str(tmp_path), "config": {"pooling": "decoder", "dropout_rate": 0.3, "num_layers": 9}}
    settings = Recipe.load("paper").retrieval.model_copy(update=changes)
    model = build_retrieval_model(settings, parts.tokenizer, parts.user_mq, parts.item_mq)
    assert (model.config.num_layers, model.config.d_ff) == (2, 24)
    assert (model.config.dropout_rate, model.config.embedding_dim) == (0.3, 8)
    own = model.transformer.state_dict()
    for name, tensor in backbone.state_dict().items():
        if "embed_tokens" not in name and name not in ("shared.weight", "lm_head.weight"):
            assert torch.equal(own[name], tensor), name
    table, words = model.get_input_embeddings().weight, parts.tokenizer.code_token_ids("user").min()
    assert len(table) == max(vocab_size, len(parts.tokenizer))
    assert torch.equal(table[:words], backbone.shared.weight[:words])
    assert model.config.space_ids == parts.tokenizer.space_ids


def test_code_tokens_start_from_the_codewords(parts, recipe):
    model = build_retrieval_model(recipe.retrieval, parts.tokenizer, parts.user_mq, parts.item_mq, seed=3)
    assert model.config.vocab_size == len(parts.tokenizer)
    table = model.get_input_embeddings().weight.detach()
    words = table[: parts.tokenizer.code_token_ids("user").min()].std().item()
    for kind, mq in (("user", parts.user_mq), ("item", parts.item_mq)):
        for ids, codewords in zip(parts.tokenizer.code_token_ids(kind), mq.codebooks.detach()):
            assert table[ids].std().item() == pytest.approx(words, rel=1e-3)
            centred = codewords - codewords.mean(dim=0)
            # d_model = 16 random directions keep the geometry roughly.
            true, kept = torch.cdist(centred, centred).flatten(), torch.cdist(table[ids], table[ids]).flatten()
            assert np.corrcoef(true, kept)[0, 1] > 0.5
    again = build_retrieval_model(recipe.retrieval, parts.tokenizer, parts.user_mq, parts.item_mq, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_dimension_of_the_queries_is_that_of_the_item_vectors(parts, recipe):
    other = MQTokenizerModel(MQTokenizerConfig(embedding_dim=5, num_codebooks=3, codebook_size=8, codebook_dim=8))
    model = build_retrieval_model(recipe.retrieval, parts.tokenizer, parts.user_mq, other)
    assert model.config.embedding_dim == 5


def test_a_backbone_that_cannot_be_had_is_named(parts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = Recipe.load("paper", overrides={"retrieval.backbone": "nobody/no-such-t5"}).retrieval
    with pytest.raises(ValueError, match="'nobody/no-such-t5' is no folder here and could not be fetched") as raised:
        build_retrieval_model(settings, parts.tokenizer, parts.user_mq, parts.item_mq)
    assert "\n" not in str(raised.value)
    assert "retrieval.backbone" in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "num_negatives"),
    [
        ({"retrieval.config.loss_type": "softmax"}, 0),
        ({"retrieval.config.loss_type": "softmax", "retrieval.num_negatives": 7}, 7),
        ({"retrieval.config.loss_type": "cosine_ranking"}, 1),
    ],
)
def test_the_collator_draws_what_the_loss_needs(parts, splits, overrides, num_negatives):
    recipe = Recipe.load("paper", overrides=TINY | overrides)
    collator = build_collator(parts.tokenizer, index_splits(splits, "test"), recipe)
    batch = collator([{"user": row, "epoch": 0} for row in range(5)])
    assert ("negative_ids" in batch) == bool(num_negatives)
    if num_negatives:
        assert batch["negative_ids"].shape == (5, num_negatives)
    assert batch["labels"].shape == (5, 1)


def test_changes_of_the_collator_win_over_the_recipe(parts, splits, recipe):
    collator = build_collator(parts.tokenizer, index_splits(splits, "test"), recipe, num_negatives=2, seed=9)
    assert (collator.num_negatives, collator.seed) == (2, 9)


def test_the_collaborative_model_tells_whose_its_rows_are(trained_repository):
    ids = load_indexes(trained_repository / "collaborative" / "ids.safetensors")
    store = EmbeddingStore.open(trained_repository)
    assert {kind: index.ids() for kind, index in ids.items()} == {kind: store.ids(kind) for kind in ("user", "item")}


@pytest.mark.parametrize(("gain", "chosen"), [(0.009, None), (0.011, 8)])
def test_order_counts_only_where_that_is_better_by_a_standard_error(gain, chosen, demo_splits, tmp_path, monkeypatch):
    """The gains of 1,000 users have a standard deviation of about .316, so their mean has a standard error of .01."""

    def ndcg(model, interactions, holdout):
        noise = torch.tensor([0.1**0.5, -(0.1**0.5)]).repeat(len(holdout.users) // 2)
        return 0.2 + (gain + noise) * (model.config.half_life is not None)

    monkeypatch.setattr(training, "held_out_ndcg", ndcg)
    changes = {
        "collaborative": Recipe.load("best").to_dict()["collaborative"],
        "collaborative.config.embedding_dim": 8,
        "collaborative.training.num_train_epochs": 2,
        "mq_tokenizer.training.max_steps": 5,
        "retrieval.training.num_train_epochs": 1,
    }
    trained = train(demo_splits, Recipe.load("paper", overrides=TINY).changed(**changes), tmp_path, refit=False)
    assert trained.recipe.collaborative.config["half_life"] == chosen
    assert FISMModel.from_pretrained(tmp_path / "collaborative").config.half_life == chosen


def test_whether_order_counts_is_chosen_on_validation_and_cold_start_users_have_histories(
    tmp_path, monkeypatch, capsys
):
    """All users go round the same circle of items, so that the last item determines the next, and the set of them does not."""
    users, items = np.meshgrid(np.arange(60), np.arange(12), indexing="ij")
    ids = [f"i{(7 * user + step) % 40}" for user, step in zip(users.ravel(), items.ravel())]
    rows = {"user_id": [f"u{user}" for user in users.ravel()], "item_id": ids}
    best = Recipe.load("best").to_dict()
    changes = {
        "collaborative": best["collaborative"],
        "collaborative.config.embedding_dim": 16,
        "collaborative.training.num_train_epochs": 30,
        "mq_tokenizer": best["mq_tokenizer"],
        "mq_tokenizer.user_codebooks": 4,
        "mq_tokenizer.config.num_codebooks": 2,
        "mq_tokenizer.config.codebook_size": 16,
        "prompts.shuffle_history": "auto",
        "retrieval.training.num_train_epochs": 1,
        "retrieval.config.pooling": "history",
        "retrieval.config.history_weight": "auto",
    }
    recipe = Recipe.load("paper", overrides=TINY).changed(**changes)
    quantised, quantise = [], training.train_mq_tokenizer
    sizes = lambda vectors, others: (len(vectors), 0 if others is None else len(others))  # noqa: E731
    monkeypatch.setattr(
        training, "train_mq_tokenizer", lambda *a, **k: quantised.append(sizes(a[0], k["others"])) or quantise(*a, **k)
    )
    repository = train(leave_one_out(Dataset.from_dict(rows)), recipe, tmp_path)
    metrics, chosen = repository.metrics, repository.recipe
    assert chosen.collaborative.config["half_life"] == training.HALF_LIVES[1]
    assert chosen.prompts.shuffle_history is False
    assert metrics["test"]["collaborative_dot"]["hr@10"] > 0.9
    assert all(check.passed is not False for check in repository.audit())
    for split in ("validation", "test"):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path), "--split", split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["metrics"]["tokenrec"]
        assert found["ndcg@20"] == pytest.approx(metrics[split]["tokenrec"]["ndcg@20"], abs=1e-6)
    # 60 users are few: the codebooks of users are fit to 199 parts of each history too. No training prompt has final tokens.
    assert quantised == [(60, 199 * 60), (40, 0)] * 2
    configs = {kind: MQTokenizerModel.from_pretrained(tmp_path / f"mq_{kind}").config for kind in ("user", "item")}
    assert {kind: config.num_codebooks for kind, config in configs.items()} == {"user": 4, "item": 2}
    assert all(config.residual for config in configs.values())
    # The weight of T5's part is chosen on validation too.
    model = T5ForGenerativeRetrieval.from_pretrained(tmp_path).eval()
    recorded = json.loads((tmp_path / "training" / "selection.json").read_text())["retrieval"]["metrics"][
        "history_weight"
    ]
    assert model.config.history_weight == chosen.retrieval.config["history_weight"] == recorded
    # The codewords of a user's tokens add up to what its codes decode to; without a history, that is the query.
    tokenizer, mq = TokenRecTokenizer.from_pretrained(tmp_path), MQTokenizerModel.from_pretrained(tmp_path / "mq_user")
    prompts = torch.from_numpy(tokenizer.entity_token_ids("user", ["u7", "u1"]))
    with torch.no_grad():
        found = model.encode_queries(prompts) * model.config.temperature
    decoded = torch.nn.functional.normalize(mq.decode(torch.from_numpy(tokenizer.codes("user", ["u7", "u1"]))), dim=-1)
    assert torch.allclose(found, model.user_vectors(decoded), atol=1e-5)
    # Stored are the collaborative vectors and, for items, what T5 has learned of their codes.
    store, stored_items = EmbeddingStore.open(tmp_path), ["i3", "i4"]
    expected = model.item_vectors(store.get("item", stored_items)[:, :16], tokenizer.item_tokens(stored_items))
    assert torch.equal(store.get("item", stored_items), expected)
    assert not store.vectors("user")[:, 16:].any() and store.vectors("item")[:, 16:].any()

    weights = (tmp_path / "model.safetensors").read_bytes()
    fresh = {"user_id": ["new"] * 3 + ["u1", "u2"], "item_id": ["i3", "i4", "i5", "i-new", "i-new"]}
    report = repository.add(interactions=Dataset.from_dict(fresh), retrain=True)
    assert (report["users"], report["items"]) == (1, 1)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    # New items and new vectors get their learned parts from their codes.
    store, tokenizer = EmbeddingStore.open(tmp_path), TokenRecTokenizer.from_pretrained(tmp_path)
    items = store.ids("item")
    expected = model.item_vectors(store.vectors("item"), tokenizer.item_tokens(items))
    assert "i-new" in items and torch.allclose(store.vectors("item"), expected, atol=1e-6)
    model = FISMModel.from_pretrained(tmp_path / "collaborative")
    rows = load_indexes(tmp_path / "collaborative" / "ids.safetensors")
    of_new = model.edge_items[model.edge_users == int(rows["user"].rows(["new"])[0])].tolist()
    assert [rows["item"][row] for row in of_new] == fresh["item_id"][:3]
    repository.remove(users=["new", "u2"])
    left = FISMModel.from_pretrained(tmp_path / "collaborative")
    assert left.config.num_users == model.config.num_users - 2
    assert len(left.edge_users) == len(model.edge_users) - 3 - 12
    kept = load_indexes(tmp_path / "collaborative" / "ids.safetensors")["user"].ids()
    former = model.user_embeddings()[torch.from_numpy(rows["user"].rows(kept))]
    assert torch.allclose(left.user_embeddings(), former, atol=1e-6)


def test_a_training_removes_what_interrupted_work_has_left(trained_repository, demo_splits, tiny_recipe, tmp_path):
    folder = shutil.copytree(trained_repository, tmp_path / "repository")
    (folder / f"{PUSHED}dead" / "repository").mkdir(parents=True)
    repository = train(demo_splits, tiny_recipe, folder, dataset_name="demo")
    assert not repository.leftovers()
