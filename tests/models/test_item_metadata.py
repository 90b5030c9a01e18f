import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models.embedding_store import ItemMetadata, check_metadata, check_where

NAMES = st.sampled_from(["genre", "price", "withdrawn"])
VALUES = st.sampled_from([True, False, 0, 1, 1.0, 2.5, "1", "", "it's"])


def same(a, b):
    return type(a) is bool and type(b) is bool and a == b or type(a) is not bool and type(b) is not bool and a == b


@settings(max_examples=200, deadline=None)
@given(data=st.data(), where=st.dictionaries(NAMES, VALUES | st.lists(VALUES, max_size=2), max_size=2))
def test_any_changes_and_filters_give_what_dictionaries_give(data, where):
    metadata, known = ItemMetadata(), []
    for _ in range(data.draw(st.integers(0, 8))):
        action = data.draw(st.sampled_from(["add", "set", "keep", "copy"]))
        if action == "add":
            count = data.draw(st.integers(0, 3))
            metadata.add_items(count)
            known += [{} for _ in range(count)]
        elif action == "set" and known:
            rows = data.draw(st.lists(st.integers(0, len(known) - 1), max_size=4))
            new = [data.draw(st.dictionaries(NAMES, st.none() | VALUES, max_size=2)) for _ in rows]
            metadata.set(np.array(rows, dtype=np.int64), check_metadata(new))
            for row, values in zip(rows, new):
                known[row] = {name: value for name, value in (known[row] | values).items() if value is not None}
        elif action == "keep":
            keep = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
            metadata.keep(np.array(keep, dtype=bool))
            known = [values for values, kept in zip(known, keep) if kept]
        else:
            metadata = ItemMetadata(metadata.num_items, metadata.columns, metadata.values)
    found = metadata.get(np.arange(len(known)))
    assert [set(one) for one in found] == [set(one) for one in known]
    assert all(same(one[name], values[name]) for one, values in zip(found, known) for name in values)
    checked = check_where(where)
    expected = [
        not same(values.get("withdrawn"), True)
        and all(name in values and any(same(values[name], one) for one in wanted) for name, wanted in checked.items())
        for values in known
    ]
    allowed = metadata.allowed(checked)
    assert expected == ([True] * len(known) if allowed is None else allowed.tolist())


def test_columns_that_do_not_fit_are_refused():
    for columns, values in (
        ({"a": np.array([0, 1], dtype=np.int32)}, {"a": ["x"]}),
        ({"a": np.array([0], dtype=np.int32)}, {"a": ["x"]}),
        ({"a": np.array([0, -1], dtype=np.int32)}, {}),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            ItemMetadata(2, columns, values)
