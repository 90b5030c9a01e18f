import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.cli.app import app
from tokenrec_hf.cli.arguments import (
    UsageError,
    name_options,
    read_limits,
    read_lines,
    read_scalar,
    read_settings,
    read_where,
    repeat_options,
)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_are_read_as_numbers(value):
    read = read_scalar(str(value))
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("true", True),
        ("True", True),
        ("False", False),
        ("no", "no"),
        ("null", None),
        ("cosine_ranking", "cosine_ranking"),
        ("a: b: c", "a: b: c"),
        ("2026-11-30", "2026-11-30"),
        ('{"num_cycles": 2}', {"num_cycles": 2}),
        ("", ""),
    ],
)
def test_values_are_json_or_text(text, value):
    assert read_scalar(text) == value


def test_settings_are_read_in_every_spelling():
    arguments = (
        "--learning-rate 1e-3 --num_train_epochs=3 --retrieval.patience 2 --prompts.max-history=9 --fp16 --a.b --c.d"
    )
    assert read_settings(arguments.split()) == {
        "retrieval.training.learning_rate": 0.001,
        "retrieval.training.num_train_epochs": 3,
        "retrieval.patience": 2,
        "prompts.max_history": 9,
        "retrieval.training.fp16": True,
        "a.b": True,
        "c.d": True,
    }
    assert read_settings(["--a.b", "-1", "--c.d=x=y", "--e.f", "x-y"]) == {"a.b": -1, "c.d": "x=y", "e.f": "x-y"}
    assert read_settings(["--retrieval.backbone", "--x"]) == {"retrieval.backbone": True, "retrieval.training.x": True}


def test_a_filter_collects_the_values_of_each_name():
    assert read_where(["genre=jazz", "stock=true", "genre=a=b", "price=3"]) == {
        "genre": ["jazz", "a=b"],
        "stock": ["true"],
        "price": ["3"],
    }
    assert read_where(["price<30", "price>=1e1", "title~5", "title~a<b"]) == {
        "price<": ["30"],
        "price>=": ["1e1"],
        "title~": ["5", "a<b"],
    }
    assert read_where([]) == {}


def test_limits_are_positive_numbers_by_name():
    assert read_limits(["genre=3", "artist=1"]) == {"genre": 3, "artist": 1}
    for wrong in ("genre", "genre=0", "genre=-1", "genre=x", "=3", "genre=2.5"):
        with pytest.raises(UsageError, match=f"--max-per {wrong} is not NAME=K"):
            read_limits([wrong])


@pytest.mark.parametrize("pair", ["genre", "=jazz", "--topk=5", ""])
def test_a_filter_without_a_name_or_a_value_is_refused(pair):
    with pytest.raises(UsageError, match=f"--where {pair} is not NAME=VALUE"):
        read_where([pair])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("recommend out --history 08 24 --user 03", "recommend out --history=08 --history=24 --user 03"),
        ("recommend out --user 03 --history", "recommend out --user 03 --history="),
        ("recommend out --history --user 03", "recommend out --history= --user 03"),
        ("recommend out --history=-i1 --history=-i2", "recommend out --history=-i1 --history=-i2"),
        ("recommend out --history -i1 --i2 --top_k 3", "recommend out --history=-i1 --history=--i2 --top_k 3"),
        ("recommend out --user -ABC --top-k=3", "recommend out --user -ABC --top-k=3"),
        ("recommend --history 08 24 -- out", "recommend --history=08 --history=24 -- out"),
        ("recommend out --where a=1 b=2 --json", "recommend out --where=a=1 --where=b=2 --json"),
        ("remove out --users a b --items -3 i1", "remove out --users=a --users=b --items=-3 --items=i1"),
        ("similar out --item 08 24 --help", "similar out --item=08 --item=24 --help"),
        ("add --users file out", "add --users file out"),
    ],
)
def test_an_option_with_several_values_is_repeated(arguments, expected):
    commands = typer.main.get_command(app).commands
    arguments = arguments.split()
    assert repeat_options(arguments, commands[arguments[0]]) == expected.split()


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("recommend", "pass on_unknown='skip' or 'popular'.", "pass --on-unknown='skip' or 'popular'."),
        ("recommend", "top_k is 0; user u1 of top_k.csv", "--top-k is 0; user u1 of top_k.csv"),
        ("train", "name it by item_column, or", "name it by --item-column, or"),
        ("train", "a/item_column: 'item_column' and `item_column`", "a/item_column: 'item_column' and `item_column`"),
        ("similar", "name it by item_column, or", "name it by item_column, or"),
    ],
)
def test_messages_name_the_options_of_the_command(command, message, expected):
    assert name_options(message, typer.main.get_command(app).commands[command]) == expected


def test_a_file_that_is_no_text_has_no_ids(tmp_path):
    (tmp_path / "users").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(ValueError, match="users is not UTF-8 text; give a file with an id on each line"):
        read_lines(str(tmp_path / "users"))
