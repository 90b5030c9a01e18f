import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.models.codes import CodeTable, IdIndex, load_tables, save_tables

CODEBOOKS = {"user": [2, 4], "item": [3, 300]}


def table(ids, codes, kind="item", codebook_size=300):
    return CodeTable(kind, IdIndex(ids), np.array(codes, dtype=np.int64).reshape(len(ids), -1), codebook_size)


@pytest.fixture
def tables():
    return {
        "user": table(["a", "b"], [[0, 3], [1, 1]], "user", 4),
        "item": table(["x", "y", "z"], [[0, 299, 1], [1, 2, 3], [0, 299, 1]]),
    }


def test_rows_follow_the_ids_asked_for(tables):
    assert tables["item"].rows(["z", "x", "z"]).tolist() == [2, 0, 2]


def test_an_unknown_id_is_named(tables):
    with pytest.raises(
        KeyError,
        match="item 'q' is unknown to this tokenizer; add it with `tokenrec add`, or give it codes with add_items",
    ):
        tables["item"].rows(["x", "q"])


def test_a_string_in_the_place_of_a_list_is_refused(tables):
    with pytest.raises(ValueError, match="pass a list of ids"):
        tables["item"].rows("xyz")


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 12))
def test_codes_have_an_owner_where_exactly_one_row_has_them(data, num_codebooks, codebook_size, count):
    code = st.tuples(*[st.integers(0, codebook_size - 1)] * num_codebooks)
    rows = data.draw(st.lists(code, min_size=count, max_size=count))
    asked = data.draw(st.lists(st.tuples(*[st.integers(-1, codebook_size + 1)] * num_codebooks), max_size=8))
    expected = [rows.index(one) if rows.count(one) == 1 else -1 for one in asked]
    codes = np.array(rows, dtype=np.int64).reshape(count, num_codebooks)
    made = CodeTable("item", IdIndex(str(i) for i in range(count)), codes, codebook_size)
    assert made.owners(np.array(asked, dtype=np.int64).reshape(-1, num_codebooks)).tolist() == expected


def test_different_codes_with_the_same_key_are_told_apart(tables, monkeypatch):
    monkeypatch.setattr("tokenrec_hf.models.codes._keys", lambda codes: np.zeros(len(codes), dtype=np.uint64))
    assert tables["user"].owners(np.array([[1, 1], [0, 3], [2, 2]])).tolist() == [1, 0, -1]


def test_an_update_replaces_known_ids_and_appends_the_others(tables):
    old = tables["item"]
    new = old.updated(["w", "y"], np.array([[7, 7, 7], [8, 8, 8]]))
    assert new.index.ids() == ["x", "y", "z", "w"]
    assert new.codes.tolist() == [[0, 299, 1], [8, 8, 8], [0, 299, 1], [7, 7, 7]]
    assert old.index.ids() == ["x", "y", "z"]
    assert old.codes[1].tolist() == [1, 2, 3]


def test_an_update_of_known_ids_only_adds_none(tables):
    assert tables["user"].updated(["b"], np.array([[2, 2]])).codes.tolist() == [[0, 3], [2, 2]]


@pytest.mark.parametrize("codes", [[[0, 1], [0, 4]], [[0, 1], [-1, 0]]])
def test_codes_out_of_range_are_refused(codes):
    with pytest.raises(ValueError, match=r"user codes go from .* but should be in \[0, 4\)"):
        table(["a", "b"], codes, "user", 4)


@pytest.mark.parametrize("codes", [np.zeros((2, 2)), np.zeros((3, 2), int), np.zeros(2, int)])
def test_codes_of_another_type_or_number_are_refused(codes):
    with pytest.raises(ValueError, match=r"but should be integers \[2, K\]"):
        CodeTable("user", IdIndex(["a", "b"]), codes, 4)


def test_finding_owners_does_not_change_what_is_pickled(tables):
    before = pickle.dumps(tables["item"])
    tables["item"].owners(np.array([[1, 2, 3]]))
    assert pickle.dumps(tables["item"]) == before


def test_tables_come_back_from_their_file(tables, tmp_path):
    path = str(tmp_path / "codes.safetensors")
    save_tables(tables, path)
    loaded = load_tables(path, CODEBOOKS)
    for kind in tables:
        assert loaded[kind].index.ids() == tables[kind].index.ids()
        np.testing.assert_array_equal(loaded[kind].codes, tables[kind].codes)
    assert [one.name for one in tmp_path.iterdir()] == ["codes.safetensors"]


def test_a_table_without_ids_comes_back(tmp_path):
    path = str(tmp_path / "codes.safetensors")
    save_tables({"item": CodeTable("item", IdIndex(), np.zeros((0, 3), int), 300)}, path)
    loaded = load_tables(path, {"item": [3, 300]})["item"]
    assert len(loaded) == 0
    assert loaded.owners(np.array([[0, 0, 0]])).tolist() == [-1]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-5], lambda data: b"\xff" * len(data)])
def test_a_damaged_file_is_named(tables, tmp_path, damage):
    path = tmp_path / "codes.safetensors"
    save_tables(tables, str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="codes.safetensors is damaged .*; copy it again"):
        load_tables(str(path), CODEBOOKS)


@pytest.mark.parametrize("codebooks", [{"item": [2, 300]}, {"item": [3, 299]}, {"other": [3, 300]}])
def test_a_file_that_does_not_fit_the_codebooks_is_refused(tables, tmp_path, codebooks):
    path = str(tmp_path / "codes.safetensors")
    save_tables(tables, path)
    with pytest.raises(ValueError, match="is damaged"):
        load_tables(path, codebooks)


def test_a_table_without_some_ids_keeps_the_others_and_their_codes(tables):
    left = tables["item"].without(["x", "never there"])
    assert left.index.ids() == ["y", "z"] and left.codes.tolist() == [[1, 2, 3], [0, 299, 1]]
    assert tables["item"].index.ids() == ["x", "y", "z"]
    # Once the other of two equal tuples has gone, the tuple names one id.
    assert left.owners(np.array([[0, 299, 1]])).tolist() == [1]
