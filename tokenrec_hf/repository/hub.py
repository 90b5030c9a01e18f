"""Sharing a trained repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi

from ..models.codes import forget_ids
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import save_collaborative
from ..models.recommender import CONTENT, WITH_USERS, RepositoryFolder, check_repository, hub_errors
from .card import write_model_card


def push_repository(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    include_users: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload TokenRec recommender",
) -> str:
    """Uploads a trained repository as one commit, in which files that it no longer has are removed.

    Nothing can be seen of a push before that commit, so an interrupted one leaves the Hub repository as it was.

    Args:
        folder: a trained repository; `training/` in it stays here.
        repo_id: `name` or `organisation/name`; made if absent.
        private: whether a repository that is made here is private; by default what the organisation prescribes.
        revision: the branch, made if absent; by default the main one.
        include_users: also upload what is known of users: ids, vectors, seen items, codes, and what the collaborative model
            has of each of them. They are personal data, so by default they are left out. Of FISM the item side goes up all
            the same, because it makes user tokens of anybody's history.
        token: Hub token; by default the one that is logged in.
        commit_message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: `folder` is no trained repository, or training in it has not finished.
        ValueError: `repo_id` is not a name that a repository can have.
        OSError: the Hub refuses, or cannot be reached.
    """
    check_repository(folder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary, hub_errors(repo_id, revision):
        prepared = Path(temporary)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _copy(Path(folder), prepared, include_users)
        write_model_card(prepared, repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=prepared,
            revision=revision,
            commit_message=commit_message,
            delete_patterns="*",
        )
    return str(commit.commit_url)


def _copy(folder: Path, target: Path, include_users: bool) -> None:
    """The content of a trained repository, without what is known of users unless asked for."""
    for pattern in (*CONTENT, *WITH_USERS * include_users):
        for path in folder.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    if not include_users:
        shutil.rmtree(target / "store")
        EmbeddingStore.open(folder).save_pretrained(target / "store", include_users=False)
        forget_ids(target / "codes.safetensors", "user")
        parts = RepositoryFolder(folder)
        if parts.has_histories:
            # The item side makes user tokens of anybody's history.
            model, ids = parts.load_collaborative()
            items_only = model.without_users(np.zeros(len(ids["user"]), dtype=bool))
            save_collaborative(
                items_only, {"user": [], "item": ids["item"].ids()}, RepositoryFolder(target).collaborative
            )
