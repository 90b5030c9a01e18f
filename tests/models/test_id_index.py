import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models import codes as id_index
from tokenrec_hf.models.codes import IdIndex, check_ids, load_indexes, save_indexes

valid_ids = st.text(min_size=1, max_size=12).filter(lambda one: one.split() == [one] and "�" not in one)
id_lists = st.lists(valid_ids | st.sampled_from(["a", "b", "ab", "é", "日本", "'", "]", "\\", "x" * 256]), unique=True)


@given(ids=id_lists, asked=id_lists)
def test_rows_and_ids_agree_with_a_dictionary(ids, asked):
    index, reference = IdIndex(ids), {one: row for row, one in enumerate(ids)}
    assert len(index) == len(ids)
    assert index.ids() == ids
    assert [index[row] for row in range(len(ids))] == ids
    assert index.rows(asked).tolist() == [reference.get(one, -1) for one in asked]
    assert [one in index for one in asked] == [one in reference for one in asked]
    order = list(range(len(ids)))[::-1]
    assert index.ids(order) == ids[::-1]


@given(first=id_lists, second=id_lists, data=st.data())
def test_extending_and_keeping_agree_with_lists(first, second, data):
    added = [one for one in second if one not in first]
    keep = data.draw(st.lists(st.booleans(), min_size=len(first + added), max_size=len(first + added)))
    extended = IdIndex(first).extended(added)
    assert extended.ids() == first + added
    kept = extended.kept(np.array(keep, dtype=bool))
    expected = [one for one, stays in zip(first + added, keep) if stays]
    assert kept.ids() == expected
    assert kept.rows(first + added).tolist() == [
        expected.index(one) if stays else -1 for one, stays in zip(first + added, keep)
    ]


@given(ids=id_lists)
def test_an_index_survives_its_arrays(ids):
    again = IdIndex.from_arrays(IdIndex(ids).arrays())
    assert again.ids() == ids
    assert again.rows([*ids, "absent-id"]).tolist() == [*range(len(ids)), -1]


@settings(max_examples=30)
@given(ids=id_lists, asked=id_lists)
def test_ids_whose_hashes_collide_are_told_apart(ids, asked):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_index, "_hashes", lambda encoded: np.array([len(one) % 2 for one in encoded], dtype=np.uint64))
        index = IdIndex(ids)
        assert index.rows(asked).tolist() == [ids.index(one) if one in ids else -1 for one in asked]
        with pytest.raises(ValueError, match="more than once"):
            IdIndex([*ids, "twice", "twice"])


def test_a_repeated_id_is_named():
    with pytest.raises(ValueError, match="item '08' is given more than once"):
        IdIndex(["07", "08", "09", "08"], kind="item")


def test_extending_by_a_present_id_names_it():
    with pytest.raises(ValueError, match="item 'b' is already present"):
        IdIndex(["a", "b"]).extended(["c", "b"], kind="item")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("", "is empty"),
        ("a b", "white space"),
        ("a\n", "white space"),
        ("a\u3000b", "white space"),
        ("x" * 257, "257 characters"),
        ("a\ud800", "not Unicode"),
    ],
)
def test_an_invalid_id_is_named_with_the_reason(bad, why):
    with pytest.raises(ValueError, match=why):
        check_ids(["fine", bad])


def test_numbers_become_strings():
    assert check_ids([3, "4"]) == ["3", "4"]


def test_an_id_that_is_not_unicode_is_simply_not_found():
    assert IdIndex(["�", "a"]).rows(["\ud800", "a"]).tolist() == [-1, 1]


def test_a_row_outside_the_index_is_an_index_error():
    assert IdIndex(["a", "b"])[-1] == "b"
    with pytest.raises(IndexError):
        IdIndex(["a", "b"])[2]


def test_arrays_that_do_not_fit_together_are_refused():
    arrays = IdIndex(["a", "b"]).arrays()
    with pytest.raises(ValueError, match="damaged"):
        IdIndex.from_arrays({**arrays, "hashes": arrays["hashes"][:1]})
    with pytest.raises(ValueError, match="damaged"):
        IdIndex.from_arrays({**arrays, "blob": arrays["blob"][:1]})


def test_indexes_of_several_kinds_come_back_from_one_file(tmp_path):
    save_indexes({"user": IdIndex(["a", "日本"]), "item": IdIndex([])}, tmp_path / "ids.safetensors")
    found = load_indexes(tmp_path / "ids.safetensors")
    assert {kind: index.ids() for kind, index in found.items()} == {"user": ["a", "日本"], "item": []}
    assert found["user"].rows(["日本", "b"]).tolist() == [1, -1]
    (tmp_path / "ids.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="ids.safetensors is damaged"):
        load_indexes(tmp_path / "ids.safetensors")


@pytest.mark.parametrize("shared", [False, True])
def test_ids_of_equal_hashes_are_told_apart_after_any_change(monkeypatch, shared):
    if shared:
        monkeypatch.setattr(id_index, "_hashes", lambda encoded: np.full(len(encoded), 7, dtype=np.uint64))
    index = IdIndex(["a", "b"]).extended(["c", "d"]).kept(np.array([True, False, True, True])).extended(["b"])
    assert index.ids() == ["a", "c", "d", "b"]
    assert index.rows(["b", "d", "c", "a", "e"]).tolist() == [3, 2, 1, 0, -1]
