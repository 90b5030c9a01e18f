import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.cli.settings import UsageError, read_where, scalar


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_are_read_as_numbers(value):
    read = scalar(str(value))
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("true", True),
        ("no", "no"),
        ("null", None),
        ("cosine_ranking", "cosine_ranking"),
        ("a: b: c", "a: b: c"),
    ],
)
def test_values_are_yaml_scalars(text, value):
    assert scalar(text) == value


def test_a_filter_collects_the_values_of_each_name():
    assert read_where(["genre=jazz", "stock=true", "genre=a=b", "price=3"]) == {
        "genre": ["jazz", "a=b"],
        "stock": [True],
        "price": [3],
    }
    assert read_where(None) == {}
    with pytest.raises(UsageError, match="genre is not NAME=VALUE"):
        read_where(["genre"])
