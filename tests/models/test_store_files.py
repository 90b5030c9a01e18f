import json
import os
import shutil

import numpy as np
import pytest

from tokenrec_hf.models.embedding_store import MANIFEST, append_changes, is_current, load_files, save_files

OLD = {
    "items": {"numbers": np.arange(1_000, dtype=np.int64), "none": np.empty(0, dtype=np.uint8)},
    "users": {"a": np.ones(3)},
}
NEW = {"items": {"numbers": np.arange(5, dtype=np.int64)}}


def contents(folder):
    return {
        name: {key: array.tolist() for key, array in arrays.items()} for name, arrays in load_files(folder)[1].items()
    }


def as_lists(arrays):
    return {name: {key: array.tolist() for key, array in inner.items()} for name, inner in arrays.items()}


def data_file(folder, name="items"):
    return next(folder.glob(f"{name}-*.safetensors"))


def test_facts_and_arrays_come_back(tmp_path):
    save_files(tmp_path / "a" / "b", {"what": "ever"}, OLD)
    assert contents(tmp_path / "a" / "b") == as_lists(OLD)
    assert load_files(tmp_path / "a" / "b")[0]["what"] == "ever"


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("first", "second", "second"):
        save_files(tmp_path / folder, {}, OLD)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("first", "second")
    )
    assert first == second
    assert len(first) == 3


def test_a_new_save_leaves_nothing_of_the_old_one_but_other_files_alone(tmp_path):
    save_files(tmp_path, {}, OLD)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    (tmp_path / ".saving-killed").mkdir()
    (tmp_path / ".saving-killed" / "users").write_text("half")
    save_files(tmp_path, {}, NEW)
    assert {path.name for path in tmp_path.iterdir()} == {
        MANIFEST, "notes.txt", "model.safetensors", data_file(tmp_path).name
    }  # fmt: skip
    assert contents(tmp_path) == as_lists(NEW)


def test_changes_come_back_in_order_beside_the_store(tmp_path):
    manifest = save_files(tmp_path, {"what": "first"}, OLD)
    untouched = data_file(tmp_path).stat().st_mtime_ns
    for number in (3, 1, 3):
        manifest = append_changes(tmp_path, manifest, {"what": number}, {"a": np.array([number])})
    facts, arrays, changes = load_files(tmp_path)
    assert facts == manifest and facts["what"] == 3
    assert as_lists(arrays) == as_lists(OLD)
    assert [one["a"].tolist() for one in changes] == [[3], [1], [3]]
    assert data_file(tmp_path).stat().st_mtime_ns == untouched
    save_files(tmp_path, {}, NEW)
    assert len(list(tmp_path.iterdir())) == 2 and load_files(tmp_path)[2] == []


def test_a_crash_while_changes_are_added_leaves_them_out(tmp_path, monkeypatch):
    manifest = save_files(tmp_path, {}, OLD)

    def failing(source, target):
        raise OSError("no power")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no power"):
        append_changes(tmp_path, manifest, {}, {"a": np.array([1])})
    assert load_files(tmp_path)[2] == [] and is_current(tmp_path, manifest)


def test_a_manifest_is_current_until_somebody_writes_another(tmp_path):
    old = save_files(tmp_path, {}, OLD)
    assert is_current(tmp_path, old) and is_current(tmp_path, load_files(tmp_path)[0])
    new = save_files(tmp_path, {}, NEW)
    assert is_current(tmp_path, new) and not is_current(tmp_path, old)
    assert not is_current(tmp_path / "nowhere", new)


def test_what_was_read_can_be_changed_without_changing_the_file(tmp_path):
    save_files(tmp_path, {}, OLD)
    before = data_file(tmp_path).read_bytes()
    load_files(tmp_path)[1]["items"]["numbers"][:] = -1
    assert data_file(tmp_path).read_bytes() == before


@pytest.mark.parametrize("crash_at", [0, 1])
def test_a_crash_while_saving_leaves_the_former_store(tmp_path, monkeypatch, crash_at):
    save_files(tmp_path, {}, OLD)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(os.path.basename(target))
        if len(calls) == crash_at + 1:
            raise OSError("no power")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no power"):
        save_files(tmp_path, {}, NEW)
    assert calls[-1].startswith(["items-", MANIFEST][crash_at])
    monkeypatch.undo()
    assert contents(tmp_path) == as_lists(OLD)
    assert not list(tmp_path.glob(".saving-*"))
    save_files(tmp_path, {}, NEW)
    assert contents(tmp_path) == as_lists(NEW)
    assert len(list(tmp_path.iterdir())) == 2


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "why"),
    [(os.remove, "it is missing"), (cut_off, "bytes instead of"), (flip_a_bit, "not what was saved")],
)
def test_a_harmed_data_file_is_named(tmp_path, harm, why):
    save_files(tmp_path, {}, OLD)
    path = data_file(tmp_path)
    harm(path)
    with pytest.raises(
        ValueError, match=f"{path.name} is damaged .*{why}.*restore the store from a copy or rebuild it"
    ):
        load_files(tmp_path)


def test_a_file_that_was_never_safetensors_is_named(tmp_path):
    import hashlib

    save_files(tmp_path, {}, NEW)
    path = data_file(tmp_path)
    path.write_bytes(b"not tensors")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["files"]["items"] |= {"bytes": 11, "sha256": hashlib.sha256(b"not tensors").hexdigest()}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*not a safetensors file"):
        load_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"format_version": 1}', '{"format_version": 1, "files": {"a": {}}}']
)
def test_a_manifest_that_describes_nothing_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="store.json is damaged"):
        load_files(tmp_path)


def test_another_format_version_is_refused_by_number(tmp_path):
    (tmp_path / MANIFEST).write_text('{"format_version": 2, "anything": "new"}')
    with pytest.raises(ValueError, match="has format version 2 but this tokenrec_hf reads version 1"):
        load_files(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    save_files(tmp_path / "store", {}, NEW)
    shutil.copy(data_file(tmp_path / "store"), tmp_path)
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    manifest["files"]["items"]["file"] = "../" + manifest["files"]["items"]["file"]
    (tmp_path / "store" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not the name of a data file"):
        load_files(tmp_path / "store")
