import os
import pickle
import unicodedata

import httpx
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st

from tokenrec_hf.models import codes
from tokenrec_hf.models.codes import (
    MANIFEST,
    CodeTable,
    IdIndex,
    atomic_write,
    check_ids,
    flush_names,
    hub_errors,
    load_indexes,
    load_tables,
    read_json,
    read_whole,
    save_indexes,
    save_tables,
)

valid_ids = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf"]), min_size=1, max_size=12).filter(
    lambda one: codes._ID.fullmatch(one) and "�" not in one
)
id_lists = st.lists(valid_ids | st.sampled_from(["a", "b", "a b", "é", "日本", "'", "]", "\\", "x" * 256]), unique=True)


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
        ("a ", "begins or ends with a space"),
        ("a\n", r"contains the character '\\n'"),
        ("a\u3000b", r"contains the character '\\u3000'"),
        ("a␣b", r"contains the character '\\u2423'"),
        ("x" * 257, "257 characters"),
        ("a\ud800", r"contains the character '\\ud800'"),
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


def test_indexes_of_several_kinds_come_back_from_one_file(tmp_path):
    save_indexes({"user": IdIndex(["a", "日本"]), "item": IdIndex([])}, tmp_path / "ids.safetensors")
    found = load_indexes(tmp_path / "ids.safetensors")
    assert {kind: index.ids() for kind, index in found.items()} == {"user": ["a", "日本"], "item": []}
    assert found["user"].rows(["日本", "b"]).tolist() == [1, -1]
    (tmp_path / "ids.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="ids.safetensors is damaged"):
        load_indexes(tmp_path / "ids.safetensors")


@pytest.mark.parametrize("offsets", [[], [0, 1], [1, 2], [0, 2, 1, 2], [0, 0, 2]])
def test_arrays_that_do_not_fit_together_are_refused(offsets):
    arrays = IdIndex(["a", "b"]).arrays()
    with pytest.raises(ValueError, match="damaged"):
        IdIndex.from_arrays({**arrays, "offsets": np.array(offsets, dtype=np.int64)})


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    save_indexes({"item": IdIndex(["é"])}, tmp_path / "ids.safetensors")
    content = (tmp_path / "ids.safetensors").read_bytes()
    (tmp_path / "ids.safetensors").write_bytes(content.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match="ids.safetensors is damaged"):
        load_indexes(tmp_path / "ids.safetensors")


@pytest.mark.parametrize("text", ["ab ", " ab", "a\tb"])
def test_ids_that_are_read_have_spaces_between_only(text):
    arrays = {**IdIndex(["x", "a b"]).arrays(), "blob": np.frombuffer(b"x" + text.encode(), dtype=np.uint8)}
    with pytest.raises(ValueError, match="begins or ends with a space|contains the character"):
        IdIndex.from_arrays(arrays)


def test_looking_ids_up_does_not_change_what_is_pickled():
    index = IdIndex.from_arrays(IdIndex(["a", "日本"]).arrays())
    before = pickle.dumps(index)
    assert index.rows(["日本"]).tolist() == [1]
    assert pickle.dumps(index) == before
    assert pickle.loads(before).rows(["日本", "b"]).tolist() == [1, -1]


def test_an_index_stays_as_it_was_when_it_is_extended():
    index = IdIndex(["a"])
    assert index.extended(["b"]).rows(["a", "b"]).tolist() == [0, 1]
    assert index.rows(["a", "b"]).tolist() == [0, -1] and index.ids() == ["a"]


# ---- code tables


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


# ---- the Hub


@pytest.mark.parametrize(("status", "advice"), [(401, "hf auth login"), (403, "hf auth login"), (500, "try again")])
def test_a_refusal_of_the_hub_says_what_to_do(status, advice):
    response = httpx.Response(status, request=httpx.Request("POST", "https://hub.example"))
    says = f"the Hub refused own/demo with status {status} .*{advice}"
    with pytest.raises(OSError, match=says), hub_errors("own/demo", None):
        raise HfHubHTTPError("no", response=response)


# ---- files


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with atomic_write(tmp_path / "a.json") as path:
        path.write_text("new")
        assert (tmp_path / "a.json").read_text() == "old" and path.parent == tmp_path
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"


def test_an_error_while_writing_leaves_the_former_file_alone(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.json") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a)))
    with atomic_write(tmp_path / "a") as path:
        path.write_text("new")
    assert calls == ["fsync", "replace", "fsync"]


def test_flushing_a_folder_leaves_no_file_open(tmp_path):
    def next_free():
        handle = os.open(tmp_path, os.O_RDONLY)
        os.close(handle)
        return handle

    before = next_free()
    flush_names(tmp_path)
    assert next_free() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json is damaged .*; copy it again"):
        read_json(tmp_path / "a.json")


def test_json_comes_back(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ["日本"]}', encoding="utf-8")
    assert read_json(str(tmp_path / "a.json")) == {"a": ["日本"]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_ids_hold_no_character_that_cannot_be_seen():
    """All of Unicode. Versions of Python differ in the format characters (Cf) that they know."""
    formats = 0
    for number in range(0x110000):
        character = chr(number)
        kind, is_refused = unicodedata.category(character), codes._ID.fullmatch(f"a{character}b") is None
        if kind in ("Cc", "Cs") or (character.isspace() and character != " ") or character == "␣":
            assert is_refused, hex(number)
        elif is_refused:
            assert kind in ("Cf", "Cn"), hex(number)
        formats += is_refused and kind == "Cf"
    assert formats > 150
    for character in ("\0", "\u200b", "\u202e"):
        with pytest.raises(ValueError, match="contains the character"):
            check_ids([f"a{character}"])


@pytest.mark.parametrize("missing", [True, False])
def test_readers_of_several_files_read_again_if_a_change_came_between(tmp_path, missing):
    (tmp_path / MANIFEST).write_text("old")
    answers = []

    def read():
        before = (tmp_path / MANIFEST).read_text()
        if not answers:
            (tmp_path / MANIFEST).write_text("new")
        answers.append((before, (tmp_path / MANIFEST).read_text()))
        if missing and len(answers) == 1:
            raise FileNotFoundError
        return answers[-1]

    assert read_whole(tmp_path, read) == ("new", "new")
    assert answers == [("old", "new"), ("new", "new")]


def test_an_error_that_no_change_explains_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        read_whole(tmp_path, lambda: 1 / 0)


def test_a_new_file_has_the_permissions_that_files_have(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "a") as path:
        path.unlink()
        path.touch(mode=0o600)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"), atomic_write(tmp_path):
        pass
    assert list(tmp_path.parent.glob("*.tmp")) == []


def test_a_single_id_is_not_taken_for_the_list_of_its_characters():
    index = IdIndex(["1", "0001"])
    with pytest.raises(ValueError, match="ids are the single string '0001'; pass a list of ids"):
        index.rows("0001")
    assert index.rows(["0001"]).tolist() == [1]
