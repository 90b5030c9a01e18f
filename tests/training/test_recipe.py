import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.training.recipe import RECIPES, load_recipe, save_recipe

# What each kind of model has of its own in its `config`: the sizes of a T5 that is trained from scratch.
FROM_SCRATCH = {"d_model", "d_kv", "num_heads", "d_ff", "num_layers", "num_decoder_layers", "projection_dim"}


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
def test_a_recipe_that_ships_has_every_setting(name):
    recipe, reference = load_recipe(name), load_recipe("cpu")
    assert recipe["recipe"] == name
    assert isinstance(recipe["seed"], int)
    own = {key for key in keys(recipe) if not key.startswith(("retrieval.config.", "retrieval.training."))}
    others = {key for key in keys(reference) if not key.startswith(("retrieval.config.", "retrieval.training."))}
    # Arguments of Trainer have defaults of their own, and a kind of model or quantiser has settings of its own.
    kinds = ("collaborative.config.", "mq_tokenizer.config.")
    free = {key for key in own | others if ".training." in key or key.startswith(kinds)}
    assert own - free == others - free
    config = set(recipe["retrieval"]["config"])
    assert config >= {"dropout_rate", "pooling", "loss_type", "temperature", "margin"}
    assert (config >= FROM_SCRATCH) == (recipe["retrieval"]["backbone"] is None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_ships_is_one_that_the_models_and_the_trainer_accept(name):
    from tokenrec_hf.models.configuration_tokenrec import MQTokenizerConfig, T5GenerativeRetrievalConfig
    from tokenrec_hf.models.modeling_collaborative import COLLABORATIVE_MODELS
    from tokenrec_hf.repository.build import check_settings
    from tokenrec_hf.training.stages import _check_training_arguments

    recipe = load_recipe(name)
    check_settings(recipe)
    own = COLLABORATIVE_MODELS[recipe["collaborative"]["model"]].config_class()
    assert all(hasattr(own, setting) for setting in recipe["collaborative"]["config"])
    mq = recipe["mq_tokenizer"]["config"]
    MQTokenizerConfig(**{**mq, "codebook_size": 256 if mq["codebook_size"] == "auto" else mq["codebook_size"]})
    T5GenerativeRetrievalConfig(**recipe["retrieval"]["config"])
    for section in ("collaborative", "mq_tokenizer", "retrieval"):
        _check_training_arguments(recipe[section]["training"])
        # Residual codebooks are not trained.
        if section != "mq_tokenizer" or not mq.get("residual"):
            assert isinstance(recipe[section]["training"]["learning_rate"], float)


def test_a_recipe_is_made_anew_at_each_call():
    first = load_recipe("cpu")
    first["collaborative"]["config"]["embedding_dim"] = 1
    assert load_recipe("cpu")["collaborative"]["config"]["embedding_dim"] != 1


def test_settings_are_changed_by_dotted_name():
    before = load_recipe("cpu")
    after = load_recipe("cpu", overrides={"retrieval.config.loss_type": "cosine_ranking", "seed": 7})
    expected = copy.deepcopy(before)
    expected["retrieval"]["config"]["loss_type"] = "cosine_ranking"
    expected["seed"] = 7
    assert after == expected


def test_a_section_by_dotted_name_changes_only_what_it_holds():
    before = load_recipe("cpu")
    after = load_recipe("cpu", overrides={"retrieval.training": {"learning_rate": 0.5}})
    expected = copy.deepcopy(before)
    expected["retrieval"]["training"]["learning_rate"] = 0.5
    assert after == expected


def test_arguments_of_trainer_and_of_configurations_may_be_added():
    recipe = load_recipe(
        "cpu", overrides={"retrieval.training.bf16": True, "collaborative.config.initializer_range": 0.2}
    )
    assert recipe["retrieval"]["training"]["bf16"] is True
    assert recipe["collaborative"]["config"]["initializer_range"] == 0.2


def test_a_file_needs_only_what_differs(tmp_path):
    path = write(tmp_path, "collaborative:\n  training: {num_train_epochs: 3}\n")
    expected = load_recipe("cpu")
    expected["collaborative"]["training"]["num_train_epochs"] = 3
    assert load_recipe("cpu", config=path) == expected


def test_a_file_names_the_recipe_it_builds_on(tmp_path):
    path = write(tmp_path, "recipe: paper\nseed: 4\n")
    assert load_recipe("cpu", config=path) == {**load_recipe("paper"), "seed": 4}


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "seed: 4\n")
    assert load_recipe("cpu", config=path, overrides={"seed": 5})["seed"] == 5


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_number_may_be_written_in_powers_of_ten(tmp_path, text):
    path = write(tmp_path, f"collaborative:\n  training:\n    learning_rate: {text}\n")
    assert load_recipe("cpu", config=path)["collaborative"]["training"]["learning_rate"] == 0.001


numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()


@given(seed=st.integers(0, 2**31), value=numbers | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_saved_recipe_is_read_back_as_it_was(tmp_path_factory, seed, value):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = load_recipe("paper", overrides={"seed": seed, "retrieval.training.run_name": value})
    save_recipe(recipe, path)
    assert load_recipe(config=path) == recipe
    assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(recipe)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="there is no recipe 'fast'; choose one of paper, best, cpu, quickstart"):
        load_recipe("fast")


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
        load_recipe("cpu", overrides={dotted: 1})


def test_an_unknown_setting_of_a_file_is_refused_with_the_name_of_the_file(tmp_path):
    path = write(tmp_path, "retrieval: {patiense: 3}\n")
    with pytest.raises(ValueError, match=r"own\.yaml: there is no setting 'retrieval\.patiense'"):
        load_recipe("cpu", config=path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"own\.yaml must hold settings as `name: value` lines"):
        load_recipe(config=write(tmp_path, text))


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"own\.yaml is not valid YAML: ") as raised:
        load_recipe(config=write(tmp_path, "seed: [1, 2\nretrieval: }"))
    assert "\n" not in str(raised.value)


def test_a_number_in_the_place_of_a_name_is_an_unknown_setting(tmp_path):
    with pytest.raises(ValueError, match="there is no setting '1'"):
        load_recipe(config=write(tmp_path, "1: 2\n"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no recipe file .*absent\.yaml; check --config"):
        load_recipe(config=tmp_path / "absent.yaml")
