import os
import shutil
import threading

import pytest
import torch

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
    """Whether the change has happened: yes, no, or in part."""
    parts = [
        EmbeddingStore.open(folder).contains("item", ["new"])[0],
        (folder / "codes").read_text() == "new",
        (folder / "inner" / "more").is_file(),
    ]
    return "yes" if all(parts) else "in part" if any(parts) else "no"


def test_a_change_happens_whole_and_leaves_nothing_behind(repository):
    with Repository(repository).change() as staged:
        change(staged)
        assert state(repository) == "no"
    assert state(repository) == "yes"
    assert len(list((repository / "store").iterdir())) == 3
    assert sorted(path.name for path in repository.iterdir()) == [
        ".update.lock", "codes", "inner", "store", "weights"
    ]  # fmt: skip
    assert (repository / "weights").read_text() == "untouched"


def test_an_error_changes_nothing(repository):
    with pytest.raises(ZeroDivisionError), Repository(repository).change() as staged:
        change(staged)
        raise ZeroDivisionError
    assert state(repository) == "no" and not (repository / STAGED).exists()


@pytest.mark.parametrize("crash_at", range(8))
def test_wherever_it_stops_the_change_has_happened_or_not(repository, monkeypatch, crash_at):
    """A process that is killed at the n-th renaming, the one that counts among them, cleans nothing up."""
    steps = []

    class Killed(BaseException):
        pass

    def killing(original):
        def step(*arguments, **options):
            if len(steps) == crash_at:
                raise Killed
            steps.append(arguments)
            return original(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        try:
            with Repository(repository).change() as staged:
                change(staged)
                for name in ("rename", "replace"):
                    patch.setattr(os, name, killing(getattr(os, name)))
                remove = shutil.rmtree
                patch.setattr(shutil, "rmtree", lambda *a, **o: remove(*a, **o) if len(steps) < crash_at else None)
        except Killed:
            pass
    Repository(repository)
    assert state(repository) == ("yes" if steps else "no")
    with Repository(repository).change():
        pass
    assert not (repository / STAGED).exists() and not Repository(repository).parts.committed.exists()
    assert state(repository) == ("yes" if steps else "no")


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
