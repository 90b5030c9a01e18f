import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import tokenrec_hf
from tokenrec_hf import EmbeddingStore, Recipe, Recommender, Repository
from tokenrec_hf.cli.app import main
from tokenrec_hf.cli.output import show_train
from tokenrec_hf.evaluation.variants import COMPARED, LABELS, VARIANTS
from tokenrec_hf.repository.repository import STAGES

COMMANDS = (
    "quickstart",
    "train",
    "evaluate",
    "compare",
    "recommend",
    "similar",
    "add",
    "remove",
    "verify",
    "push",
    "info",
)


def run(capsys, *argv):
    """Exit status, stdout and stderr of a command, run in this process."""
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def document(capsys, *argv):
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0, err
    return json.loads(out)


def assert_fails(capsys, *argv, says, status=1):
    found, out, err = run(capsys, *argv)
    assert (found, out) == (status, "")
    last = err.splitlines()[-1]
    assert last.startswith("tokenrec: error: " if status == 1 else f"tokenrec {argv[0]}: error: ")
    assert says in last
    assert "Traceback" not in err
    if status == 1:
        notes = err.splitlines()[:-1]
        assert all("are kept" in line or line.startswith("as in training: ") for line in notes)


@pytest.fixture
def repository(trained_repository, tmp_path):
    """A copy of the trained repository, to be changed."""
    return shutil.copytree(trained_repository, tmp_path / "repository")


@pytest.fixture
def csv(tmp_path):
    """Five users with six items each, and columns of no usual names."""
    rows = [f"p{user},m{item},{item % 5 + 1},{item}" for user in range(5) for item in range(6)]
    path = tmp_path / "private" / "table.csv"
    path.parent.mkdir()
    path.write_text("person,movie,stars,when\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def trained_with(monkeypatch, trained_repository):
    """The arguments of `train`, which writes the metrics of another repository and trains nothing."""
    calls = {}

    def train(splits, recipe, output_dir, **settings):
        calls.update(settings, splits=splits, recipe=recipe.to_dict(), output_dir=output_dir)
        print("a line of a library")
        os.makedirs(output_dir)
        shutil.copy(trained_repository / "metrics.json", output_dir)
        return Repository(output_dir)

    monkeypatch.setattr("tokenrec_hf.repository.build.train", train)
    return calls


# Usage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert "--json" in out
    assert "example" in out and f"tokenrec {command}" in out.split("example")[1]


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(command in out for command in COMMANDS)
    assert run(capsys, "--version")[:2] == (0, f"tokenrec {tokenrec_hf.__version__}\n")


def fresh(*commands):
    """Exit statuses of commands in one new process, the heavy modules that it imported, and its CPU seconds."""
    script = (
        "import json, sys, time\n"
        "from tokenrec_hf.cli.app import main\n"
        "statuses = [main(argv) for argv in json.loads(sys.argv[1])]\n"
        "imported = [name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules]\n"
        "print(json.dumps([statuses, imported, time.process_time()]), file=sys.stderr)"
    )
    argv = json.dumps([[str(argument) for argument in command] for command in commands])
    finished = subprocess.run([sys.executable, "-c", script, argv], capture_output=True, text=True)
    return json.loads(finished.stderr.splitlines()[-1])


def test_help_is_immediate():
    runs = [fresh(["--help"]) for _ in range(3)]
    assert all(run[:2] == [[0], []] for run in runs)
    assert min(seconds for _, _, seconds in runs) < 0.5


def test_help_and_usage_errors_import_nothing_heavy():
    helps = [[command, "--help"] for command in COMMANDS]
    wrong = [
        [],
        ["fly"],
        ["info"],
        ["train", "--dataset", "demo"],
        ["recommend", "out"],
        ["recommend", "out", "--user", "03", "--where", "genre"],
        ["similar", "out"],
        ["evaluate", "out", "--audit", "--store", "x"],
        ["evaluate", "out", "--split", "all"],
        ["compare"],
        ["add", "out"],
        ["remove", "out"],
        ["info", "out", "--learning_rate", "1"],
    ]
    statuses, imported, _ = fresh(*helps, *wrong)
    assert statuses == [0] * len(helps) + [2] * len(wrong)
    assert imported == []


def test_recommending_imports_no_datasets(trained_repository):
    statuses, imported, _ = fresh(["recommend", trained_repository, "--user", "u001"])
    assert statuses == [0] and "datasets" not in imported


def test_info_and_missing_files_import_no_torch(trained_repository, tmp_path):
    missing = tmp_path / "missing"
    statuses, imported, _ = fresh(
        ["info", trained_repository],
        ["info", trained_repository, "--json"],
        ["info", missing],
        ["recommend", missing, "--user", "03"],
        ["similar", missing, "--item", "08"],
        ["evaluate", missing],
        ["add", missing, "--retrain"],
        ["remove", missing, "--items", "08"],
        ["push", missing, "org/name"],
        ["train", "--dataset", "demo", "--output-dir", missing, "--config", missing],
        ["train", "--dataset", missing, "--output-dir", missing],
        ["train", "--dataset", "demo", "--output-dir", missing, "--item-vectors", missing],
        ["train", "--dataset", "demo", "--output-dir", missing, "--item-metadata", missing],
        ["compare", "--dataset", missing],
        ["add", trained_repository, "--interactions", missing],
        ["add", trained_repository, "--items", missing],
        ["add", trained_repository, "--users", missing],
    )
    assert statuses == [0, 0] + [1] * 15
    assert "torch" not in imported and "datasets" not in imported


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["train", "--dataset", "demo"], ["info"], ["recommend", "out"], ["train", "--recipe", "x"]]
)
def test_wrong_usage_exits_with_2(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    command = "tokenrec" if argv in ([], ["fly"]) else f"tokenrec {argv[0]}"
    assert err.startswith(f"{command}: error: ") and f"see `{command} --help`" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--lerning_rate", "--retrieval.config.los_type", "--retrieval.epochs", "--top-k"])
def test_an_unknown_argument_is_named_and_nothing_is_written(capsys, tmp_path, flag):
    argv = ("train", "--dataset", "demo", "--output-dir", tmp_path / "out", flag, "1")
    assert_fails(capsys, *argv, says=flag.lstrip("-").replace("-", "_"), status=2)
    assert not (tmp_path / "out").exists()


def test_only_train_takes_settings(capsys):
    assert_fails(capsys, "info", "out", "--learning_rate", "1", says="--learning-rate", status=2)


def test_a_value_without_a_name_is_refused(capsys, tmp_path):
    argv = ("train", "--dataset", "demo", "--output-dir", tmp_path / "out", "--fp16=true", "stray")
    assert_fails(capsys, *argv, says="stray", status=2)


def test_two_kinds_of_prompts_exclude_each_other(capsys):
    assert_fails(capsys, "evaluate", "out", "--unseen-prompt", "--user-id-only", says="not allowed", status=2)


def test_every_variant_of_an_evaluation_has_a_flag(capsys):
    _, out, _ = run(capsys, "evaluate", "--help")
    assert all(variant.flag in out for name, variant in VARIANTS.items() if name != "tokenrec")


@pytest.mark.parametrize(
    "argv",
    [
        "recommend NOWHERE --user=-ABC --history=-A",
        "recommend NOWHERE --user --4AjktZ",
        "recommend NOWHERE --user -5",
        "recommend NOWHERE --history -i1 --i2 --top_k 3",
        "remove NOWHERE --items -3 i1",
        "similar NOWHERE --item -3 --i1",
    ],
)
def test_ids_may_begin_with_hyphens(capsys, argv):
    assert_fails(capsys, *argv.split(), says="there is no folder NOWHERE")


# Train ----------------------------------------------------------------------------------------------------------------


def test_settings_reach_the_recipe_in_every_spelling(capsys, trained_with, tmp_path):
    argv = "--learning-rate 1e-3 --num_train_epochs=3 --recipe paper --retrieval.config.margin 0.2 --seed 7 --no_refit --retrieval.patience=2"
    argv += " --mq-tokenizer.config.codebook-size 32 --save_strategy no --log_on_each_node --output-dir"
    status, _, err = run(capsys, "train", "--dataset", "demo", *argv.split(), tmp_path / "out")
    assert status == 0, err
    recipe, training = trained_with["recipe"], trained_with["recipe"]["retrieval"]["training"]
    assert training["learning_rate"] == 0.001 and training["num_train_epochs"] == 3
    assert training["save_strategy"] == "no" and training["log_on_each_node"] is True
    assert recipe["retrieval"]["config"]["margin"] == 0.2
    assert recipe["collaborative"]["config"]["loss_type"] == "bpr"
    assert recipe["mq_tokenizer"]["config"]["codebook_size"] == 32
    assert (recipe["seed"], recipe["retrieval"]["patience"], recipe["recipe"]) == (7, 2, "paper")
    assert trained_with["refit"] is False
    assert trained_with["output_dir"] == str(tmp_path / "out")


def test_arguments_win_over_the_file_and_the_file_over_the_recipe(capsys, trained_with, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("seed: 3\nprompts: {max_history: 9, train_history: 8}\n")
    argv = ("--recipe", "quickstart", "--config", config, "--prompts.train_history", "4")
    assert run(capsys, "train", "--dataset", "demo", "--output-dir", tmp_path / "out", *argv)[0] == 0
    recipe = trained_with["recipe"]
    assert (recipe["recipe"], recipe["seed"]) == ("quickstart", 3)
    assert (recipe["prompts"]["max_history"], recipe["prompts"]["train_history"]) == (9, 4)


def test_the_table_is_read_by_the_columns_named_and_recorded_without_its_folder(capsys, trained_with, csv, tmp_path):
    argv = "--user-column person --item-column movie --rating-column stars --timestamp-column when --min-rating 2 --k-core 2"
    assert run(capsys, "train", "--dataset", csv, "--output-dir", tmp_path / "out", *argv.split())[0] == 0
    splits = trained_with["splits"]
    # Items 0 and 5 are rated 1.
    assert splits["train"]["item_id"][:] == ["m1", "m2"] * 5
    assert splits["test"]["item_id"][:] == ["m4"] * 5
    assert trained_with["dataset_name"] == "table.csv"
    assert trained_with["reading"] == {
        "user_column": "person",
        "item_column": "movie",
        "rating_column": "stars",
        "timestamp_column": "when",
        "min_rating": 2,
    }


def test_training_says_how_the_file_was_read(capsys, trained_with, tmp_path):
    path = tmp_path / "ratings.dat"
    path.write_text("".join(f"{user}::{item}::4::{978300000 + item}\n" for user in range(3) for item in range(5)))
    status, _, err = run(capsys, "train", "--dataset", path, "--output-dir", tmp_path / "out")
    assert status == 0
    assert "separated by '::', without a header; users from column '1' (by its place)" in err
    assert "15 rows; 3 users, 5 items and 15 interactions are kept, from 2000-12-31 22:00:00 to" in err
    assert "Split: 9 interactions for training, a validation and a test item of each of 3 users.\ncollaborative" in err
    assert "GB of memory\nT5: at most" in err


def test_a_dry_run_shows_what_would_be_trained_on_and_writes_nothing(capsys, csv, tmp_path):
    names = ("--user-column", "person", "--item-column", "movie", "--timestamp-column", "when")
    argv = (
        "train",
        "--dataset",
        csv,
        "--output-dir",
        tmp_path / "out",
        *names,
        "--rating-column",
        "stars",
        "--min-rating",
        "2",
    )
    found = document(capsys, *argv, "--dry-run", "--split", "temporal", "--at", "0.75")
    assert (found["dataset"], found["rows"], found["dropped"]) == ("table.csv", 30, {"rated below 2": 10})
    assert found["splits"] == {"train": 10, "validation": 5, "test": 5}
    assert found["format"]["columns"] == {"user": "person", "item": "movie", "rating": "stars", "timestamp": "when"}
    status, out, err = run(capsys, *argv, "--dry-run", "--split", "temporal", "--at", "0.75")
    assert (status, err) == (0, "") and found["summary"] in out
    assert "a validation and a test item of each of 5 users.\n\ncollaborative vectors (fism): at most" in out
    assert [line for line in out.splitlines() if line.endswith("GB of memory")] == [
        one["summary"] for one in found["stages"]
    ]
    assert len(found["stages"]) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [("--split", "temporal"), ("--at", "0.5"), ("--keep", "all"), ("--split", "random")])
def test_an_impossible_way_of_reading_is_a_usage_error(capsys, tmp_path, argv):
    assert_fails(capsys, "train", "--dataset", "demo", "--output-dir", tmp_path / "out", *argv, says=argv[0], status=2)


def test_few_users_are_said_to_tell_little(capsys, trained_with, trained_repository, tmp_path):
    said = "1000 users: HR@20 of TokenRec is "
    assert said in run(capsys, "train", "--dataset", "demo", "--output-dir", tmp_path / "out")[1]
    metrics = json.loads((trained_repository / "metrics.json").read_text())
    # As trained they may lie further apart on another processor.
    metrics["test"]["tokenrec"]["hr@20"] = metrics["test"]["itemknn"]["hr@20"] - 0.05
    text = "\n".join(map(str, show_train({"repository": "out", **metrics, "evaluated_users": 20})))
    assert "20 users: HR@20" in text
    assert "too few users to tell TokenRec from ItemKNN" in text


def test_items_get_titles_from_a_table(capsys, repository, tmp_path):
    """At `add` and at `train`; tables and JSON show the titles, `--where` filters by any column."""
    items = Repository(repository).recommender().store.ids("item")
    rows = [f"{item};Film {number};{number % 7};{'old' if number % 2 else ''}" for number, item in enumerate(items)]
    table = tmp_path / "films.csv"
    table.write_text("\n".join(["item_id;title;shelf no;kind", *rows, "not-there;Nothing;3;old"]) + "\n")
    added = document(capsys, "add", repository, "--item-metadata", table)
    assert added["described"] == len(items) and added["items"] == added["items_changed"] == 0
    found = document(capsys, "recommend", repository, "--user", "u001", "--where", "shelf_no=3", "kind=old")
    titles = dict(zip(items, (row.split(";")[1] for row in rows)))
    assert found["recommendations"]
    for row in found["recommendations"]:
        assert row["title"] == titles[row["item"]]
        number = items.index(row["item"])
        assert number % 7 == 3 and number % 2
    first = found["recommendations"][0]
    assert first["title"] in run(capsys, "recommend", repository, "--user", "u001", "--where", "shelf_no=3")[1]
    similar = document(capsys, "similar", repository, "--item", items[0])["items"][0]
    assert similar["title"] == "Film 0" and similar["similar"][0]["title"].startswith("Film ")


def test_a_table_of_other_items_is_noticed_and_so_is_an_id_that_stands_twice(capsys, repository, tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\nF001,Up\nF002,Alien\n")
    status, _, err = run(capsys, "add", repository, "--item-metadata", path)
    assert (
        status == 0 and "No id of" in err and "is that of a known item, such as 'F001'; are ids written alike?" in err
    )
    path.write_text("item_id,title\nf001,Up\nf001,Alien\n")
    status, _, err = run(capsys, "add", repository, "--item-metadata", path)
    assert status == 0 and "has more rows than ids (1); of each id the last row counts" in err and "No id of" not in err
    assert EmbeddingStore.open(repository).metadata(["f001"])[0]["title"] == "Alien"


def test_a_file_is_written_into_a_new_folder(capsys, fism_repository, tmp_path):
    for command, name in (("report", "new/page.html"), ("export", "other/encoder.onnx")):
        assert run(capsys, command, fism_repository, "--output", tmp_path / name)[0] == 0
        assert (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name,title\na,b\n", "has no column of item ids; its columns are 'name', 'title'. Call it id or item_id."),
        ("item_id,a b,a-b\n1,2,3\n", "has two columns of one name"),
        (None, "there is no file"),
    ],
)
def test_a_table_of_items_that_cannot_be_used_is_refused(capsys, repository, tmp_path, content, says):
    path = tmp_path / "items.csv"
    if content:
        path.write_text(content)
    assert_fails(capsys, "add", repository, "--item-metadata", path, says=says)


def test_interactions_are_added_by_the_columns_named(capsys, repository, csv):
    items = Repository(repository).recommender().store.ids("item")
    csv.write_text(re.sub(r",m(\d)", lambda match: f",{items[int(match[1])]}", csv.read_text()))
    columns = ("--user-column", "person", "--item-column", "movie")
    added = document(capsys, "add", repository, "--interactions", csv, *columns)
    assert added["users"] == 5


def test_further_interactions_are_read_as_the_training_data_were(capsys, repository, csv):
    metrics = json.loads((repository / "metrics.json").read_text())
    reading = {"user_column": "person", "item_column": "movie", "rating_column": "stars", "min_rating": 3}
    (repository / "metrics.json").write_text(json.dumps({**metrics, "reading": reading}))
    items = Repository(repository).recommender().store.ids("item")
    csv.write_text(re.sub(r",m(\d)", lambda match: f",{items[int(match[1])]}", csv.read_text()))
    status, _, err = run(capsys, "add", repository, "--interactions", csv)
    assert status == 0 and "as in training: user_column=person, item_column=movie" in err
    assert "30 rows; 15 rated below 3 are dropped; 5 users, 3 items" in err
    # What is given goes before.
    csv.write_text(csv.read_text().replace("person,", "who,"))
    assert_fails(capsys, "add", repository, "--interactions", csv, says="has no column 'person'")
    assert document(capsys, "add", repository, "--interactions", csv, "--user-column", "who")["interactions"] == 0


def test_a_folder_named_like_a_data_set_is_not_that_data_set(capsys, trained_with, tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "train.txt").write_text("u1 a b c d\nu2 a b c d\n")
    assert run(capsys, "train", "--dataset", folder, "--output-dir", tmp_path / "out")[0] == 0
    assert trained_with["dataset_name"] == "demo/"


def test_json_is_one_document_whatever_libraries_print(capsys, trained_with, tmp_path):
    found = document(capsys, "train", "--dataset", "demo", "--output-dir", tmp_path / "out")
    assert found["repository"] == str(tmp_path / "out")
    assert found["test"]["tokenrec"]["ndcg@20"] > found["test"]["popularity"]["ndcg@20"]


@pytest.mark.parametrize(
    ("setting", "says", "status"),
    [
        ("--mq_tokenizer.config.num_codebooks=0", "num_codebooks is 0", 2),
        ("--mq_tokenizer.config.codebook_size=0", "codebook_size is 0", 2),
        ("--retrieval.config.d_model=wide", "d_model is 'wide' but must be a number", 2),
        ("--learning_rate=fast", "learning_rate is 'fast' but must be a number", 2),
        ("--retrieval.config.pooling=max", "pooling is 'max'", 2),
        ("--seed=many", "--seed", 2),
        ("--recipe=none", "'none'", 2),
        ("--num_train_epochs=0", "num_train_epochs is 0 but must be positive", 2),
        ("--report_to=smoke", "report_to is 'smoke', which is not installed", 2),
        ("--dataset=", "'' is neither a file, a folder nor a known data set", 1),
        ("--dataset=hf://datasets/", "hf://datasets/ could not be read", 1),
        ("--dataset=nothing", "'nothing' is neither a file, a folder nor a known data set", 1),
        ("--config=nothing.yaml", "nothing.yaml", 1),
    ],
)
def test_impossible_settings_are_found_before_anything_is_written(capsys, tmp_path, setting, says, status):
    out = tmp_path / "out"
    assert_fails(capsys, "train", "--dataset", "demo", "--output-dir", out, setting, says=says, status=status)
    assert not out.exists()


def test_an_unknown_setting_in_a_file_is_named(capsys, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("retrieval: {config: {los_type: softmax}}\n")
    argv = ("train", "--dataset", "demo", "--output-dir", tmp_path / "out", "--config", config)
    assert_fails(capsys, *argv, says="retrieval.config.los_type")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("user_id,item_id\n", "holds no interactions"),
        ("user_id,plot\n1,2\n", "has no item column"),
        ("user_id,item_id\n1,a\n1,b\n2,a\n", "no user has 3 interactions"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(capsys, tmp_path, content, says):
    path = tmp_path / "table.csv"
    path.write_text(content)
    assert_fails(capsys, "train", "--dataset", path, "--output-dir", tmp_path / "out", says=says)


def test_a_missing_column_is_named(capsys, csv, tmp_path):
    argv = ("train", "--dataset", csv, "--output-dir", tmp_path / "out", "--user-column", "who")
    assert_fails(capsys, *argv, says="has no column 'who'")


def test_interruption_tells_how_to_go_on(capsys, monkeypatch, tmp_path):
    def train(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenrec_hf.repository.build.train", train)
    status, out, err = run(capsys, "train", "--dataset", "demo", "--output-dir", tmp_path / "out")
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "tokenrec: interrupted; the same command resumes the training."


def test_programming_errors_are_not_hidden(monkeypatch, tmp_path):
    def train(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("tokenrec_hf.repository.build.train", train)
    with pytest.raises(TypeError, match="a bug"):
        main(["train", "--dataset", "demo", "--output-dir", str(tmp_path / "out")])


def test_debugging_keeps_the_traceback_of_every_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENREC_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path / "nothing")])


# Quickstart -----------------------------------------------------------------------------------------------------------


def test_a_finished_quickstart_is_shown_again(capsys, monkeypatch, repository, tiny_recipe):
    load = Recipe.load
    monkeypatch.setattr(
        Recipe, "load", lambda *args, **named: tiny_recipe if args == ("quickstart",) else load(**named)
    )
    before = (repository / "model.safetensors").stat().st_mtime_ns
    status, out, err = run(capsys, "quickstart", "--output-dir", repository)
    assert (status, err) == (0, "")
    metrics = json.loads((repository / "metrics.json").read_text())
    for method in ("popularity", "itemknn", "collaborative_dot", "tokenrec"):
        row = next(line for line in out.splitlines() if line.startswith(LABELS[method]))
        for split in ("validation", "test"):
            for key in ("hr@10", "hr@20", "ndcg@20"):
                assert f"{metrics[split][method][key]:.4f}" in row
    assert "user_u001 = <u1-" in out and "<v1-" in out and "  The " in out
    assert f"tokenrec recommend {repository} --user u001" in out
    assert (repository / "model.safetensors").stat().st_mtime_ns == before


# Evaluate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_gives_the_numbers_that_training_recorded(capsys, trained_repository, split, variant):
    recorded = json.loads((trained_repository / "metrics.json").read_text())[split]
    found = document(
        capsys, "evaluate", trained_repository, "--split", split, *[VARIANTS[variant].flag] * (variant != "tokenrec")
    )
    names = ("popularity", "itemknn", "collaborative_dot", "collaborative_cosine", variant)
    assert found["metrics"] == {name: pytest.approx(recorded[name], abs=1e-6) for name in names}
    assert (found["split"], found["variant"], found["users"]) == (split, variant, 1000)
    for key in ("hr@20_by_history", "hr@20_by_popularity"):
        groups = found[key].values()
        assert sum(group["users"] for group in groups) == 1000
        for name in ("collaborative_cosine", variant):
            mean = sum(group["users"] * group[name] for group in groups) / 1000
            assert mean == pytest.approx(recorded[name]["hr@20"], abs=1e-6)


def test_evaluation_without_refit_takes_the_only_model(capsys, trained_repository, tmp_path):
    folder = shutil.copytree(trained_repository / "training" / "selection", tmp_path / "single")
    shutil.copytree(trained_repository / "training" / "interactions", folder / "training" / "interactions")
    settings = json.loads((trained_repository / "training" / "run.json").read_text())
    (folder / "training" / "run.json").write_text(json.dumps({**settings, "refit": False}))
    for name in ("metrics.json", "recipe.yaml"):
        shutil.copy(trained_repository / name, folder)
    recorded = json.loads((folder / "metrics.json").read_text())["validation"]["tokenrec"]
    found = document(capsys, "evaluate", folder, "--split", "validation")
    assert found["metrics"]["tokenrec"] == pytest.approx(recorded, abs=1e-6)


def test_evaluation_shows_every_metric(capsys, trained_repository):
    status, out, _ = run(capsys, "evaluate", trained_repository)
    assert status == 0 and "items of the history" in out and "users of the item" in out
    recorded = json.loads((trained_repository / "metrics.json").read_text())["test"]["tokenrec"]
    for name, value in recorded.items():
        assert next(line for line in out.splitlines() if line.startswith(name)).endswith(f"{value:.4f}")


def test_a_comparison_is_a_table_of_intervals(capsys, csv):
    names = ("--user-column", "person", "--item-column", "movie")
    found = document(capsys, "compare", "--dataset", csv, *names)
    assert found["repository"] is None and len(found["methods"]) == 6
    status, out, err = run(capsys, "compare", "--dataset", csv, *names)
    assert status == 0 and "30 rows; 5 users" in err
    assert f"interval of the difference to {COMPARED[found['reference']]}" in out
    shown = {line.split()[0] for line in out.splitlines() if line}
    assert {"popularity", "ItemKNN", "EASE", "iALS", "LightGCN", "SASRec"} <= shown


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "give either a repository"),
        (("out", "--dataset", "demo"), "give either a repository"),
        (("out", "--min-rating", "3"), "these options go with --dataset"),
        (("out", "--split", "temporal"), "these options go with --dataset"),
    ],
)
def test_a_comparison_has_one_source_of_data(capsys, argv, says):
    assert_fails(capsys, "compare", *argv, says=says, status=2)


def test_a_repository_without_interactions_cannot_be_evaluated(capsys, repository):
    shutil.rmtree(repository / "training")
    assert_fails(capsys, "evaluate", repository, says="nothing to evaluate on")


# Recommend ------------------------------------------------------------------------------------------------------------


def test_recommendations_are_those_of_the_recommender(capsys, trained_repository):
    recommender = Recommender.from_pretrained(trained_repository)
    found = document(capsys, "recommend", trained_repository, "--user", "u007", "--top-k", "4")
    expected = recommender.recommend(["u007"], top_k=4)[0]
    assert [{"item": row["item"], "score": row["score"]} for row in found["recommendations"]] == expected
    assert [row["rank"] for row in found["recommendations"]] == [1, 2, 3, 4]
    assert found["history"] == recommender.store.seen(["u007"])[0]


def test_tokens_are_those_of_the_prompt(capsys, trained_repository):
    tokenizer = Recommender.from_pretrained(trained_repository).tokenizer
    found = document(capsys, "recommend", trained_repository, "--user", "u007", "--top-k", "2")
    for kind, one, tokens in [("user", "u007", found["tokens"])] + [
        ("item", row["item"], row["tokens"]) for row in found["recommendations"]
    ]:
        assert tokenizer.decode(tokenizer(f"{kind}_{one}").input_ids, resolve_ids=False) == f"{kind}_{tokens}</s>"


def test_a_given_history_replaces_the_known_one(capsys, trained_repository):
    argv = ("recommend", trained_repository, "--user", "u007")
    history = document(capsys, *argv, "--history", "f001", "f002")
    alone = document(capsys, *argv, "--history")
    assert (history["history"], alone["history"]) == (["f001", "f002"], [])
    assert history["recommendations"] != alone["recommendations"]


def test_a_history_alone_is_recommended_to(capsys, fism_repository):
    recommender = Recommender.from_pretrained(fism_repository)
    argv = ("recommend", fism_repository, "--history", "f001", "f002", "--top-k", "3")
    found = document(capsys, *argv)
    assert (found["user"], found["tokens"], found["history"]) == (None, None, ["f001", "f002"])
    expected = recommender.recommend([None], [["f001", "f002"]], top_k=3)[0]
    assert [{"item": row["item"], "score": row["score"]} for row in found["recommendations"]] == expected
    assert run(capsys, *argv)[1].startswith("a history of 2 items\n")
    assert_fails(capsys, "recommend", fism_repository, says="no user to recommend to; give --user, --history", status=2)


def test_seen_items_come_back_when_asked_for(capsys, trained_repository):
    seen = set(EmbeddingStore.open(trained_repository).seen(["u007"])[0])
    argv = ("recommend", trained_repository, "--user", "u007", "--top-k", "300")
    without, all_items = document(capsys, *argv), document(capsys, *argv, "--include-seen")
    assert {row["item"] for row in all_items["recommendations"]} - {
        row["item"] for row in without["recommendations"]
    } == seen


def test_recommendations_are_shown_with_tokens_and_titles(capsys, trained_repository):
    found = document(capsys, "recommend", trained_repository, "--user", "u007", "--top-k", "1")
    best = found["recommendations"][0]
    _, out, _ = run(capsys, "recommend", trained_repository, "--user", "u007", "--top-k", "1")
    assert out.splitlines()[0] == f"user_u007 = {found['tokens']}"
    cells = [1, best["item"], f"{best['score']:.4f}", best["tokens"], ", ".join(best["because"]), best["title"]]
    assert out.splitlines()[2].split() == " ".join(map(str, cells)).split()
    assert best["title"].startswith("The ") and set(best["because"]) <= set(found["history"])


def test_items_of_other_data_have_no_titles(capsys, repository):
    metrics = json.loads((repository / "metrics.json").read_text())
    (repository / "metrics.json").write_text(json.dumps({**metrics, "dataset": "table.csv"}))
    assert document(capsys, "recommend", repository, "--user", "u007")["recommendations"][0]["title"] is None
    assert "title" not in run(capsys, "recommend", repository, "--user", "u007")[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--user", "nobody"], "'nobody'"),
        (["--user", "u007", "--history", "f001", "zz"], "'zz'"),
        (["--user", "u007", "--top-k", "0"], "--top-k is 0"),
        (["--history", "zz"], "'zz'"),
    ],
)
def test_unknown_ids_and_impossible_numbers_are_named(capsys, trained_repository, argv, says):
    assert_fails(capsys, "recommend", trained_repository, *argv, says=says)


def test_unknown_users_and_items_are_left_out_when_asked(capsys, trained_repository):
    argv = ("recommend", trained_repository, "--top-k", "3", "--on-unknown")
    found = document(capsys, *argv, "skip", "--user", "nobody", "--history", "f001", "zz")
    assert found["note"] == "user 'nobody' is unknown, item 'zz' is unknown"
    assert (found["user"], found["tokens"], found["history"], len(found["recommendations"])) == (
        "nobody",
        None,
        ["f001"],
        3,
    )
    found = document(capsys, *argv, "skip", "--user", "nobody")
    assert (found["note"], found["recommendations"]) == ("user 'nobody' is unknown", [])
    _, out, _ = run(capsys, *argv, "popular", "--user", "nobody")
    assert out.startswith("user_nobody (user 'nobody' is unknown; these are the most popular items)\n")
    best = next(iter(EmbeddingStore.open(trained_repository).popular(1)))
    assert out.splitlines()[2].split()[:2] == ["1", best]


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_damaged_weights_are_refused(capsys, repository, command):
    weights = repository / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    argv = ["--user", "u007"] if command == "recommend" else []
    assert_fails(capsys, command, repository, *argv, says="model.safetensors")


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_store_of_other_mq_tokenizers_is_refused(capsys, repository, command):
    store = EmbeddingStore.open(repository)
    store.space_ids["item"] = "0123456789abcdef"
    store.save_pretrained(repository / "store")
    argv = ["--user", "u007"] if command == "recommend" else []
    assert_fails(capsys, command, repository, *argv, says="0123456789abcdef")


# Similar items --------------------------------------------------------------------------------------------------------


def test_similar_items_are_those_of_the_recommender(capsys, trained_repository):
    recommender = Recommender.from_pretrained(trained_repository)
    found = document(capsys, "similar", trained_repository, "--item", "f001", "f002", "--top-k", "4")["items"]
    assert [row["item"] for row in found] == ["f001", "f002"]
    expected = recommender.similar_items(["f001", "f002"], top_k=4)
    for row, similar in zip(found, expected):
        assert [{"item": one["item"], "score": one["score"]} for one in row["similar"]] == similar
        assert [one["rank"] for one in row["similar"]] == [1, 2, 3, 4]
    assert found[0]["title"].startswith("The ") and found[0]["similar"][0]["title"].startswith("The ")


def test_similar_items_are_shown_with_tokens_and_titles(capsys, trained_repository):
    found = document(capsys, "similar", trained_repository, "--item", "f001", "--top-k", "1")["items"][0]
    _, out, _ = run(capsys, "similar", trained_repository, "--item", "f001", "--top-k", "1")
    first, _, row = out.splitlines()
    best = found["similar"][0]
    assert first == f"item_f001 = {found['tokens']} ({found['title']})"
    assert row.split(maxsplit=4) == ["1", best["item"], f"{best['score']:.4f}", best["tokens"], best["title"]]


def test_similar_items_can_be_filtered_by_metadata(capsys, repository):
    store = EmbeddingStore.open(repository)
    items = store.ids("item")[:5]
    store.set_metadata(items, [{"genre": "jazz"}] * 3 + [{"genre": "folk"}] * 2)
    store.save_pretrained(repository / "store")
    found = document(capsys, "similar", repository, "--item", items[0], "--where", "genre=jazz")["items"][0]
    assert sorted(row["item"] for row in found["similar"]) == sorted(items[1:3])


def test_similar_items_of_unknown_items_are_refused(capsys, trained_repository):
    assert_fails(capsys, "similar", trained_repository, "--item", "f001", "zz", says="'zz'")
    assert_fails(capsys, "similar", trained_repository, "--item", "f001", "--top-k", "0", says="--top-k is 0")


# Info -----------------------------------------------------------------------------------------------------------------


def test_info_tells_what_the_repository_holds(capsys, trained_repository):
    found = document(capsys, "info", trained_repository)
    metrics = json.loads((trained_repository / "metrics.json").read_text())
    assert found["finished"] is True
    assert (found["counts"], found["embedding_dim"]) == ({"user": 1000, "item": 300}, 16)
    assert found["codebooks"] == {"user": [3, 32], "item": [3, 32]}
    assert found["space_ids"] == EmbeddingStore.open(trained_repository).space_ids
    for name in ("dataset", "recipe", "seed", "codes", "epochs", "validation", "test"):
        assert found[name] == metrics[name]
    total = sum(path.stat().st_size for path in trained_repository.rglob("*") if path.is_file())
    assert found["bytes"] + found["training_bytes"] == total
    _, out, _ = run(capsys, "info", trained_repository)
    assert "1000 users, 300 items, 19866 interactions in training, 16 dimensions" in out
    assert f"K = 3, L = 32, MQ-Tokenizer {found['space_ids']['user']}" in out


def test_info_of_a_repository_without_records_is_short(capsys, repository):
    shutil.rmtree(repository / "training")
    (repository / "metrics.json").unlink()
    found = document(capsys, "info", repository)
    assert found["finished"] is True and found["test"] is None
    assert run(capsys, "info", repository)[0] == 0


def test_info_of_an_unfinished_run_lists_the_stages_done(capsys, repository):
    for name in ("metrics.json", "config.json"):
        (repository / name).unlink()
    record = json.loads((repository / "training" / "refit.json").read_text())
    (repository / "training" / "refit.json").write_text(json.dumps({"collaborative": record["collaborative"]}))
    found = document(capsys, "info", repository)
    assert found["finished"] is False
    assert found["stages"] == {"selection": list(STAGES), "refit": ["collaborative"]}
    assert "resumes it" in run(capsys, "info", repository)[1]
    assert_fails(capsys, "recommend", repository, "--user", "u007", says="training has not finished")


def test_info_of_any_other_folder_fails(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert_fails(capsys, "info", tmp_path, says="is no trained repository")
    assert_fails(capsys, "info", tmp_path / "nothing", says="there is no folder")


def test_a_damaged_record_is_named(capsys, repository):
    (repository / "metrics.json").write_text("{")
    assert_fails(capsys, "info", repository, says="metrics.json is damaged")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_has_enough_gets_no_traceback(trained_repository):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tokenrec_hf.cli.app", "info", str(trained_repository)]
    finished = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (1, b"")


# Newcomers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def today(tmp_path, demo_splits):
    """Interactions of today: a new user with known items and a new item."""
    items = demo_splits["train"]["item_id"][:4]
    users = demo_splits["train"]["user_id"][:]
    rows = [f"newbie,{item}" for item in items] + ["newbie,nova", f"{users[0]},nova", f"{users[-1]},nova"]
    path = tmp_path / "today.csv"
    path.write_text("user_id,item_id\n" + "\n".join(rows) + "\n")
    return path


def test_new_users_and_items_are_added_shown_recommended_and_removed(capsys, repository, today):
    weights = (repository / "model.safetensors").read_bytes()
    added = document(capsys, "add", repository, "--interactions", today)
    assert (added["users"], added["items"], added["interactions"]) == (1, 1, 7)
    found = document(capsys, "recommend", repository, "--user", "newbie", "--top-k", "400")
    assert len(found["recommendations"]) == 301 - 5 and "nova" not in [row["item"] for row in found["recommendations"]]
    # The users of `nova` have seen it; somebody else may be recommended it.
    other = EmbeddingStore.open(repository).ids("user")[5]
    found = document(capsys, "recommend", repository, "--user", other, "--top-k", "400")
    assert "nova" in [row["item"] for row in found["recommendations"]]
    told = document(capsys, "info", repository)
    assert told["counts"] == {"user": 1001, "item": 301}
    assert told["additions"]["user"]["count"] == told["additions"]["item"]["count"] == 1
    assert document(capsys, "remove", repository, "--users", "newbie", "--items", "nova")["users"] == 1
    found = document(capsys, "recommend", repository, "--user", other, "--top-k", "400")
    assert "nova" not in [row["item"] for row in found["recommendations"]]
    assert_fails(capsys, "recommend", repository, "--user", "newbie", says="user 'newbie' is unknown")
    assert (repository / "model.safetensors").read_bytes() == weights


def test_what_was_added_and_removed_is_said_in_words(capsys, repository, today):
    _, out, _ = run(capsys, "add", repository, "--interactions", today)
    assert "1 users and 1 items are new" in out and "The codes of these items lose" in out
    _, out, _ = run(capsys, "info", repository)
    assert "added items  1, codes lose" in out
    _, out, _ = run(capsys, "remove", repository, "--users", "newbie")
    assert out.startswith("1 users were deleted and 0 items withdrawn")
    _, out, _ = run(capsys, "remove", repository, "--users", "newbie")
    assert out.startswith("0 users were deleted") and "Nothing was left to remove of user 'newbie'." in out


def test_recommendations_can_be_filtered_by_metadata(capsys, repository):
    store = EmbeddingStore.open(repository)
    items = store.ids("item")[:6]
    metadata = [{"genre": "jazz"}, {"genre": "folk"}, {"genre": "rock"}] * 2
    store.set_metadata(items, [{**one, "stock": at < 3} for at, one in enumerate(metadata)])
    store.save_pretrained(repository / "store")
    user = store.ids("user")[0]
    filters = ("--where", "genre=jazz", "genre=folk", "stock=true")
    found = document(capsys, "recommend", repository, "--user", user, "--include-seen", *filters)
    assert sorted(row["item"] for row in found["recommendations"]) == sorted(items[:2])
    assert_fails(capsys, "recommend", repository, "--user", user, "--where", "genre", says="NAME=VALUE", status=2)


def test_a_filter_means_numbers_and_text_that_looks_like_them(capsys, repository):
    store = EmbeddingStore.open(repository)
    items = store.ids("item")[:4]
    metadata = [{"size": "38", "stock": "true"}, {"size": 38, "stock": True}, {"size": "M"}, {"size": "Infinity"}]
    store.set_metadata(items, metadata)
    store.save_pretrained(repository / "store")
    argv = ("recommend", repository, "--user", store.ids("user")[0], "--include-seen", "--where")
    for where, expected in {
        "size=38": items[:2],
        "stock=true": items[:2],
        "size=M": items[2:3],
        "size=Infinity": items[3:],
    }.items():
        found = document(capsys, *argv, where)["recommendations"]
        assert {row["item"] for row in found} == set(expected), where


def test_filters_that_no_item_can_fit_say_what_there_is(capsys, repository, tmp_path):
    argv = ("recommend", repository, "--user", "u001")
    assert_fails(capsys, *argv, "--where", "genre=jazz", says="'genre'; `tokenrec add --item-metadata` adds some.")
    store = EmbeddingStore.open(repository)
    items = store.ids("item")[:40]
    metadata = [{"genre": ["jazz", "folk"][n % 2], "price": n, "title": f"No. {n}"} for n in range(40)]
    store.set_metadata(items, metadata)
    store.save_pretrained(repository / "store")
    for command in (argv, ("similar", repository, "--item", "f001")):
        assert_fails(capsys, *command, "--where", "gnre=jazz", says="'gnre'; there are 'genre', 'price', 'title'.")
        assert_fails(capsys, *command, "--where", "genre=jazz", "genre=jaz", says="genre=jaz; genre is 'jazz', 'folk'.")
        assert_fails(capsys, *command, "--where", "price<0", says="no item fits price<0; price is between 0 and 39.")
        assert_fails(capsys, *command, "--where", "title~blue", says="'No. 7' and 32 more.")
    assert_fails(capsys, *argv, "--max-per", "gnre=3", says="no item has the metadata 'gnre'; there are 'genre'")
    out = ("recommend", repository, "--all-users", "--output", tmp_path / "out.csv")
    assert_fails(capsys, *out, "--where", "genre=jaz", says="no item fits genre=jaz")
    assert not (tmp_path / "out.csv").exists()
    found = document(capsys, *argv, "--include-seen", "--where", "price<20", "price>=10", "title~NO. 1", "genre=folk")
    assert {row["item"] for row in found["recommendations"]} == {items[n] for n in range(11, 20, 2)}
    found = document(capsys, *argv, "--max-per", "genre=1", "--where", "price<30")["recommendations"]
    assert len({items.index(row["item"]) % 2 for row in found}) == len(found) == 2


def test_the_closest_known_ids_are_suggested(capsys, trained_repository, tmp_path):
    argv = ("recommend", trained_repository)
    assert_fails(capsys, *argv, "--user", "u0007", says="Did you mean 'u007'?")
    assert_fails(capsys, *argv, "--user", "u001", "--history", "f001", "ff012", says="Did you mean 'f012'?")
    assert_fails(capsys, "similar", trained_repository, "--item", "ff012", says="Did you mean 'f012'?")
    (tmp_path / "users.txt").write_text("u001\nuu123\n")
    output = ("--users-file", tmp_path / "users.txt", "--output", tmp_path / "out.csv")
    assert_fails(capsys, *argv, *output, says="user 'uu123' is unknown (request 1)")
    assert_fails(capsys, *argv, *output, says="Did you mean 'u123'?")
    assert "Did you mean" not in run(capsys, *argv, "--user", "nobody at all")[2]


@pytest.mark.parametrize(
    ("argv", "says", "status"),
    [
        (("add", "out"), "there is nothing to add", 2),
        (("remove", "out"), "there is nothing to remove", 2),
        (("add", "no/where", "--retrain"), "only a repository in a local folder can be changed", 1),
        (("remove", "no/where", "--items", "a"), "only a repository in a local folder can be changed", 1),
    ],
)
def test_additions_that_cannot_be_are_refused(capsys, argv, says, status):
    assert_fails(capsys, *argv, says=says, status=status)


def test_another_store_takes_the_place_of_the_repositorys(capsys, repository, tmp_path):
    pytest.importorskip("pymilvus")
    from tokenrec_hf.store.milvus import MilvusStore

    store = EmbeddingStore.open(repository)
    moved = MilvusStore.from_store(store, tmp_path / "moved.db")
    user = store.ids("user")[0]
    expected = document(capsys, "recommend", repository, "--user", user)["recommendations"]
    found = document(capsys, "recommend", repository, "--user", user, "--store", tmp_path / "moved.db")[
        "recommendations"
    ]
    assert [row["item"] for row in found] == [row["item"] for row in expected]
    own = document(capsys, "evaluate", repository)["metrics"]
    other = document(capsys, "evaluate", repository, "--store", tmp_path / "moved.db")["metrics"]
    assert own == {name: pytest.approx(values) for name, values in other.items()}
    moved.withdraw([expected[0]["item"]])
    found = document(capsys, "recommend", repository, "--user", user, "--store", tmp_path / "moved.db")[
        "recommendations"
    ]
    assert expected[0]["item"] not in [row["item"] for row in found]
    argv = ("recommend", repository, "--user", user, "--store", "http://127.0.0.1:1")
    assert_fails(capsys, *argv, says="Milvus at http://127.0.0.1:1 does not answer")
    argv = ("evaluate", repository, "--store", tmp_path / "moved.db", "--split", "validation")
    assert_fails(capsys, *argv, says="evaluate it on --split test", status=2)
