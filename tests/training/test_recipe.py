import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.training.recipe import RECIPES, Recipe, SettingError

# What each kind of model has of its own in its `config`: the sizes of a T5 that is trained from scratch.
FROM_SCRATCH = {"d_model", "d_kv", "num_heads", "d_ff", "num_layers", "num_decoder_layers"}


def keys(recipe, path=()):
    """All settings by dotted name."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from keys(value, (*path, key))
        else:
            yield ".".join((*path, key))


def write(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_package_has_every_setting(name):
    recipe, reference = Recipe.load(name), Recipe.load("best")
    assert recipe.recipe == name
    own = {key for key in keys(recipe.to_dict()) if not key.startswith(("retrieval.config.", "retrieval.training."))}
    others = {
        key for key in keys(reference.to_dict()) if not key.startswith(("retrieval.config.", "retrieval.training."))
    }
    # Arguments of Trainer have defaults of their own, and a kind of model or quantiser has settings of its own.
    kinds = ("collaborative.config.", "mq_tokenizer.config.")
    free = {key for key in own | others if ".training." in key or key.startswith(kinds)}
    assert own - free == others - free
    config = set(recipe.retrieval.config)
    assert config >= {"dropout_rate", "pooling", "loss_type", "temperature"}
    assert (config >= FROM_SCRATCH) == (recipe.retrieval.backbone is None)


@pytest.mark.parametrize("name", RECIPES)
def test_the_models_and_the_trainer_accept_a_recipe_of_the_package(name):
    from transformers import TrainingArguments

    from tokenrec_hf.models.configuration_tokenrec import T5GenerativeRetrievalConfig

    recipe = Recipe.load(name)
    own = recipe.collaborative.model_configuration()
    assert all(hasattr(own, setting) for setting in recipe.collaborative.config)
    for kind in ("user", "item"):
        recipe.mq_tokenizer.model_configuration(kind, embedding_dim=64, num_vectors=100)
    T5GenerativeRetrievalConfig(**{name: value for name, value in recipe.retrieval.config.items() if value != "auto"})
    for stage in (recipe.collaborative, recipe.mq_tokenizer, recipe.retrieval):
        TrainingArguments(output_dir="unused", **stage.training)
        # Residual codebooks are not trained.
        if not stage.config.get("residual"):
            assert isinstance(stage.training["learning_rate"], float)


@pytest.mark.parametrize(("count", "size"), [(50, 256), (10_000, 256), (10_001, 512)])
def test_the_size_of_the_codebooks_is_chosen_by_the_number_of_vectors(count, size):
    settings = Recipe.load("best").mq_tokenizer
    config = settings.model_configuration("user", embedding_dim=3, num_vectors=count)
    assert (config.codebook_size, config.embedding_dim, config.num_codebooks) == (size, 3, settings.user_codebooks)
    assert settings.model_configuration("item", 3, count).num_codebooks == settings.config["num_codebooks"]


def test_items_are_sampled_where_there_are_many():
    recipe = Recipe.load("best")
    assert [stage.negatives(10_000) for stage in (recipe.collaborative, recipe.retrieval)] == [0, 0]
    for stage in (recipe.collaborative, recipe.retrieval):
        assert stage.negatives(10_001) * stage.training["per_device_train_batch_size"] == 2_048
    assert recipe.changed(**{"retrieval.num_negatives": 3}).retrieval.negatives(10_001) == 3


def test_recipes_share_no_mutable_values():
    first = Recipe.load("best")
    first.collaborative.config["embedding_dim"] = 1
    assert Recipe.load("best").collaborative.config["embedding_dim"] != 1
    second = Recipe.load("best")
    second.to_dict()["collaborative"]["config"]["embedding_dim"] = 1
    assert second.collaborative.config["embedding_dim"] != 1


def test_settings_are_changed_by_dotted_name():
    expected = Recipe.load("paper").to_dict()
    expected["retrieval"]["config"]["loss_type"] = "softmax"
    expected["seed"] = 7
    overrides = {"retrieval.config.loss_type": "softmax", "seed": 7}
    assert Recipe.load("paper", overrides=overrides).to_dict() == expected
    assert Recipe.load("paper").changed(**overrides).to_dict() == expected


def test_a_changed_recipe_leaves_the_original_alone_and_is_validated():
    recipe = Recipe.load("best")
    recipe.changed(**{"collaborative.config.embedding_dim": 5})
    assert recipe == Recipe.load("best")
    with pytest.raises(SettingError, match="collaborative.patience is 0 but must be greater than or equal to 1"):
        recipe.changed(**{"collaborative.patience": 0})
    for unknown in ("prompt.max_history", "seed.x", "collaborative.patienc"):
        with pytest.raises(SettingError, match=f"there is no setting '{unknown}'"):
            recipe.changed(**{unknown: 3})


def test_a_section_by_dotted_name_changes_only_its_own_settings():
    expected = Recipe.load("best").to_dict()
    expected["retrieval"]["training"]["learning_rate"] = 0.5
    assert Recipe.load("best", overrides={"retrieval.training": {"learning_rate": 0.5}}).to_dict() == expected


def test_arguments_of_trainer_and_of_configurations_may_be_added():
    # `bf16` without a GPU is refused by TrainingArguments, but a recipe of a GPU must be readable everywhere.
    recipe = Recipe.load(
        "paper", overrides={"retrieval.training.bf16": True, "collaborative.config.initializer_range": 0.2}
    )
    assert recipe.retrieval.training["bf16"] is True
    assert recipe.collaborative.config["initializer_range"] == 0.2


def test_settings_of_another_kind_of_model_may_stay():
    recipe = Recipe.load("paper", overrides={"collaborative.model": "matrix_factorization"})
    assert "num_layers" in recipe.collaborative.config
    assert not hasattr(recipe.collaborative.model_configuration(), "num_layers")


def test_a_file_needs_only_the_changes(tmp_path):
    path = write(tmp_path, "collaborative:\n  training: {num_train_epochs: 3}\n")
    expected = Recipe.load("best", overrides={"collaborative.training.num_train_epochs": 3})
    assert Recipe.load("best", config=path) == expected


def test_a_file_names_the_recipe_it_builds_on(tmp_path):
    path = write(tmp_path, "recipe: paper\nseed: 4\n")
    assert Recipe.load("best", config=path) == Recipe.load("paper", overrides={"seed": 4})


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "seed: 4\n")
    assert Recipe.load("best", config=path, overrides={"seed": 5}).seed == 5


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_number_may_be_written_in_powers_of_ten(tmp_path, text):
    path = write(tmp_path, f"collaborative:\n  training:\n    learning_rate: {text}\n")
    assert Recipe.load("best", config=path).collaborative.training["learning_rate"] == 0.001


numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), value=numbers | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_saved_recipe_is_read_back_as_it_was(tmp_path_factory, seed, value):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = Recipe.load("paper", overrides={"seed": seed, "retrieval.training.run_name": value})
    recipe.save(path)
    assert Recipe.load(config=path) == recipe
    assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(recipe.to_dict())


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="there is no recipe 'fast'; choose one of paper, best, quickstart"):
        Recipe.load("fast")


@pytest.mark.parametrize(
    ("dotted", "found"),
    [
        ("sed", "setting sed: there is no setting 'sed'; here there are recipe, seed, collaborative"),
        ("retrieval.patiense", "there is no setting 'retrieval.patiense'; here there are backbone, vocabulary"),
        ("prompts.max_lenght", "there is no setting 'prompts.max_lenght'; here there are max_length"),
        ("retrieval", "setting retrieval: retrieval is a section with settings of its own, not a value"),
        ("retrieval.training", "retrieval.training is a section"),
    ],
)
def test_an_unknown_setting_is_refused_with_those_there_are(dotted, found):
    with pytest.raises(ValueError, match=found):
        Recipe.load("best", overrides={dotted: 1})


def test_an_unknown_setting_of_a_file_is_refused_with_the_name_of_the_file(tmp_path):
    path = write(tmp_path, "retrieval: {patiense: 3}\n")
    with pytest.raises(ValueError, match=r"own\.yaml: there is no setting 'retrieval\.patiense'"):
        Recipe.load("best", config=path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"own\.yaml must hold settings as `name: value` lines"):
        Recipe.load(config=write(tmp_path, text))


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"own\.yaml is not valid YAML: ") as raised:
        Recipe.load(config=write(tmp_path, "seed: [1, 2\nretrieval: }"))
    assert "\n" not in str(raised.value)


def test_a_number_in_the_place_of_a_name_is_an_unknown_setting(tmp_path):
    with pytest.raises(ValueError, match="there is no setting '1'"):
        Recipe.load(config=write(tmp_path, "1: 2\n"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no recipe file .*absent\.yaml; check --config"):
        Recipe.load(config=tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("dotted", "value", "says"),
    [
        ("seed", "one", "seed is 'one' but must be a valid integer"),
        (
            "collaborative.model",
            "svd",
            "collaborative.model is 'svd' but must be 'lightgcn', 'matrix_factorization' or 'fism'",
        ),
        ("collaborative.evaluate_every", 0, "collaborative.evaluate_every is 0 but must be greater than 0"),
        ("mq_tokenizer.user_codebooks", 0, "mq_tokenizer.user_codebooks is 0 but must be greater than or equal to 1"),
        ("mq_tokenizer.user_codebooks", "many", "mq_tokenizer.user_codebooks is 'many' but must be a valid integer"),
        ("mq_tokenizer.user_codebooks", 2.5, "mq_tokenizer.user_codebooks is 2.5 but must be a valid integer"),
        ("mq_tokenizer.user_codebooks", True, "mq_tokenizer.user_codebooks is True but must be a valid integer"),
        ("prompts.max_history", "all", "prompts.max_history is 'all' but must be a valid integer"),
        ("mq_tokenizer.config.num_codebooks", 0, "mq_tokenizer.config: num_codebooks is 0"),
        ("retrieval.config.pooling", "max", "retrieval.config: .*pooling is 'max'"),
        ("retrieval.config.d_model", "wide", "retrieval.config.d_model is 'wide' but must be a number"),
        ("retrieval.training.learning_rate", "fast", "retrieval.training.learning_rate is 'fast' but must be a number"),
        ("retrieval.config.los_type", "softmax", "there is no setting 'retrieval.config.los_type'; T5Generative"),
        ("retrieval.training.epochs", 3, "there is no setting 'retrieval.training.epochs'; TrainingArguments has no"),
        (
            "collaborative.training.per_device_train_batch_size",
            0,
            "collaborative.training.per_device_train_batch_size is 0 but must be a whole number of at least 1",
        ),
        (
            "retrieval.training.gradient_accumulation_steps",
            2.5,
            "retrieval.training.gradient_accumulation_steps is 2.5 but must be a whole number of at least 1",
        ),
        ("retrieval.training.num_train_epochs", 0, "retrieval.training.num_train_epochs is 0 but must be positive"),
        ("retrieval.training.num_train_epochs", -1, "retrieval.training.num_train_epochs is -1 but must be positive"),
        (
            "retrieval.training.learning_rate",
            math.nan,
            "learning_rate is nan but must be a finite number of at least 0",
        ),
        (
            "mq_tokenizer.training.learning_rate",
            -0.1,
            "learning_rate is -0.1 but must be a finite number of at least 0",
        ),
        ("retrieval.training.report_to", "smoke", "report_to is 'smoke', which is not installed; install it, or take"),
        ("retrieval.training.report_to", ["none", "smoke"], "report_to is 'smoke', which is not installed"),
    ],
)
def test_an_impossible_setting_is_named(dotted, value, says):
    with pytest.raises(SettingError, match=says) as raised:
        Recipe.load("best", overrides={dotted: value})
    assert dotted.startswith(raised.value.setting)
    assert "\n" not in str(raised.value)


def test_reading_histories_needs_codewords_that_add_up():
    with pytest.raises(SettingError, match="pooling=history needs mq_tokenizer.config.residual=true"):
        Recipe.load("best", overrides={"mq_tokenizer.config.residual": False})


def test_incomplete_settings_are_refused_with_the_missing_one():
    settings = Recipe.load("best").to_dict()
    del settings["prompts"]["max_length"]
    with pytest.raises(SettingError, match="the setting prompts.max_length is missing"):
        Recipe.from_dict(settings)
    with pytest.raises(SettingError, match="there is no setting 'sed'"):
        Recipe.from_dict({**Recipe.load("best").to_dict(), "sed": 1})


def test_errors_of_structure_are_found_without_torch():
    script = (
        "import sys\n"
        "from tokenrec_hf.training.recipe import Recipe\n"
        "for name, value in (('retrieval.patiense', 1), ('seed', 'one'), ('prompts.max_length', 0)):\n"
        "    try: Recipe.load('best', overrides={name: value})\n"
        "    except ValueError: pass\n"
        "    else: sys.exit(2)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_saved_recipe_is_the_same_again(tmp_path):
    """Without entries of the named recipe that it does not have."""
    recipe = Recipe.load("best").changed(**{"collaborative.config": {"embedding_dim": 64}})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.open(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1 but must be greater than or equal to 0"),
        ({"seed": 2**32}, "seed is 4294967296 but must be less than"),
        ({"collaborative.model": "lightgcn"}, "collaborative.num_negatives is auto, but the loss of lightgcn needs 1"),
    ],
)
def test_what_would_fail_in_training_is_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        Recipe.load("best", overrides=changes)


@pytest.mark.parametrize(
    ("items", "size"), [(1, 256), (700, 256), (1_682, 1024), (3_646, 2048), (12_101, 4096), (10**6, 4096)]
)
def test_residual_codebooks_of_items_grow_with_their_number(items, size):
    settings = Recipe.load("best").mq_tokenizer
    assert settings.model_configuration("item", 128, items).codebook_size == size
    assert settings.model_configuration("user", 128, items).codebook_size == (256 if items <= 10_000 else 512)


def test_a_recipe_that_reports_to_what_is_not_installed_here_can_be_read(tmp_path):
    settings = Recipe.load("best").to_dict()
    settings["retrieval"]["training"]["report_to"] = "smoke"
    Recipe.from_dict(settings).save(tmp_path / "recipe.yaml")
    assert Recipe.open(tmp_path / "recipe.yaml").retrieval.training["report_to"] == "smoke"
