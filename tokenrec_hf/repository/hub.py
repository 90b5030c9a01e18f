"""Sharing a trained repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi

from ..models.codes import CONTENT, WITH_USERS, RepositoryFolder, check_repository, forget_ids, hub_errors
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import save_collaborative
from ..models.recommender import load_history_encoder
from .card import write_model_card
from .repository import Repository


def push(
    repository: Repository,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    include_users: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload TokenRec recommender",
) -> str:
    """Uploads a trained repository as one commit, which also removes files that it no longer has.

    An interrupted push leaves the Hub repository as it was.

    Args:
        repository: a finished repository; its folder `training` is not uploaded.
        repo_id: `name` or `organisation/name`; created if absent.
        private: whether a created repository is private; by default the setting of the organisation.
        revision: the branch, created if absent; by default the main branch.
        include_users: also upload the users: ids, vectors, seen items, codes, and their part of the collaborative model. They
            are personal data, so by default they are left out. The item side of FISM is always uploaded, because it makes
            user tokens from histories.
        token: Hub token; by default the stored one.
        commit_message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the repository is unfinished.
        ValueError: `repo_id` is not a valid name.
        OSError: the Hub refuses, or cannot be reached.
    """
    check_repository(repository.folder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary, hub_errors(repo_id, revision):
        prepared = Path(temporary)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        copy_shared(repository.folder, prepared, include_users)
        write_model_card(Repository(prepared), repo_id)
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


def copy_shared(folder: Path, target: Path, include_users: bool) -> None:
    """Copies the shared files of a trained repository, without its users unless asked for."""
    source, copied = RepositoryFolder(folder), RepositoryFolder(target)
    for pattern in (*CONTENT, *WITH_USERS * include_users):
        for path in folder.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    if not include_users:
        shutil.rmtree(copied.store)
        EmbeddingStore.open(source.store).save_pretrained(copied.store, include_users=False)
        forget_ids(target / "codes.safetensors", "user")
        if (encoder := load_history_encoder(folder)) is not None:
            model = encoder.model.without_users(np.zeros(encoder.model.config.num_users, dtype=bool))
            save_collaborative(model, {"user": [], "item": encoder.items.ids()}, copied.collaborative)
