"""Repositories with links to the outside, made by a stranger: no change of the repository reaches what they link to."""

import shutil

import pytest
import torch

from tokenrec_hf import NewVectors, Repository


@pytest.fixture
def repository(trained_repository, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(trained_repository, folder)
    return folder


@pytest.fixture
def outside(tmp_path):
    """A folder that must stay as it is."""
    folder = tmp_path / "outside"
    (folder / "store").mkdir(parents=True)
    for name in ("config.json", "secret.json", "store/items-0123456789abcdef.safetensors", "store/store.json"):
        (folder / name).write_text('{"mine": 1}')
    return folder


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def change(folder):
    return Repository(folder).add(items=NewVectors(["brand-new"], torch.randn(1, 16)))


def test_a_committed_change_that_is_a_link_moves_nothing(repository, outside):
    (repository / ".update-committed").symlink_to(outside)
    here, there = tree(repository), tree(outside)
    for call in (lambda: Repository(repository).info(), lambda: change(repository)):
        with pytest.raises(ValueError, match=r"\.update-committed is a link to .*outside"):
            call()
    assert tree(outside) == there and tree(repository) == here


def test_a_committed_change_with_a_link_in_it_moves_nothing(repository, outside):
    (repository / ".update-committed").mkdir()
    (repository / ".update-committed" / "store").symlink_to(outside / "store")
    there = tree(outside)
    with pytest.raises(ValueError, match="is a link"):
        Repository(repository)
    assert tree(outside) == there


@pytest.mark.parametrize("name", ["store", "collaborative", ".update", ".update.lock"])
def test_a_change_follows_no_link(repository, outside, name):
    target = outside / "store" if name in ("store", "collaborative", ".update") else outside / "secret.json"
    if (repository / name).is_dir():
        shutil.rmtree(repository / name)
    else:
        (repository / name).unlink(missing_ok=True)
    (repository / name).symlink_to(target)
    there = tree(outside)
    with pytest.raises((ValueError, FileNotFoundError)):
        change(repository)
    assert tree(outside) == there


def test_temporary_files_have_names_that_nobody_can_foresee(repository, outside):
    """A link of the name that a temporary file once had is left alone."""
    for name in ("recipe.yaml.tmp", "store.json.tmp", "codes.safetensors.tmp"):
        (repository / name).symlink_to(outside / "secret.json")
    there = tree(outside)
    change(repository)
    assert tree(outside) == there
