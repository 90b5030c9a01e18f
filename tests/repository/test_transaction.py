import os
import threading

import pytest
import torch

from tokenrec_hf.models.codes import current
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.repository.repository import STAGED, Repository


@pytest.fixture
def repository(tmp_path):
    """A store of 100 items and two other files."""
    store = EmbeddingStore(4)
    store.upsert("item", [str(i) for i in range(100)], torch.randn(100, 4))
    store.save_pretrained(tmp_path / "store")
    (tmp_path / "codes").write_text("old")
    (tmp_path / "weights").write_text("untouched")
    return tmp_path


def change(staged):
    store = EmbeddingStore.open(staged.path.parent)
    store.upsert("item", ["new"], torch.ones(1, 4))
    store.save_pretrained(staged.store)
    (staged.path / "codes").write_text("new")
    (staged.path / "inner").mkdir()
    (staged.path / "inner" / "more").write_text("more")


def state(folder):
    """Whether the change has happened, as readers see it: yes, no, or in part."""
    parts = [
        EmbeddingStore.open(folder).contains("item", ["new"])[0],
        current(folder / "codes").read_text() == "new",
        current(folder / "inner" / "more").is_file(),
    ]
    return "yes" if all(parts) else "in part" if any(parts) else "no"


def test_a_change_happens_whole_and_leaves_nothing_behind(repository):
    with Repository(repository).change() as staged:
        change(staged)
        assert state(repository) == "no"
    assert state(repository) == "yes"
    assert len(list((repository / "store").glob("[!.]*"))) == 3
    assert sorted(path.name for path in repository.iterdir()) == [
        ".update.lock", "codes", "inner", "store", "weights"
    ]  # fmt: skip
    assert (repository / "weights").read_text() == "untouched"


def test_a_file_system_without_links_will_do(repository, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    with Repository(repository).change() as staged:
        change(staged)
    assert state(repository) == "yes" and (repository / "codes").read_text() == "new"


def test_an_error_changes_nothing(repository):
    with pytest.raises(ZeroDivisionError), Repository(repository).change() as staged:
        change(staged)
        raise ZeroDivisionError
    assert state(repository) == "no" and not (repository / STAGED).exists()


def test_two_changes_at_once_are_refused(repository):
    entered, leave, errors = threading.Event(), threading.Event(), []

    def first():
        with Repository(repository).change():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with (
        pytest.raises(ValueError, match="is being changed by another process; try again"),
        Repository(repository).change(),
    ):
        errors.append("entered")
    leave.set()
    thread.join()
    assert not errors
    with Repository(repository).change() as staged:
        change(staged)
    assert state(repository) == "yes"
