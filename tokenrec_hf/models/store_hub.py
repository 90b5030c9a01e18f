"""Embedding stores on the Hugging Face Hub: what every store can do, whatever holds it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from .store_files import MANIFEST


class StoreHubMixin:
    """Loads a store from a repository and uploads it; needs `open` and `save_pretrained` of the class it is mixed into."""

    open: Any
    save_pretrained: Any

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike,
        subfolder: str = "store",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Any:
        """Loads the store of a trained repository: a local folder or a Hub repository (only `subfolder` is downloaded).

        Args:
            repo_or_folder: a folder (of a repository, or of a store itself), or the id of a Hub repository.
            subfolder: the folder of the store in the repository.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
            cache_dir: where downloads are kept; by default the Hub's cache.

        Raises:
            FileNotFoundError: there is no such folder, or no store in it.
            ValueError: a file of the store is missing, damaged or of another format version.
        """
        if Path(repo_or_folder).is_dir():
            inside = Path(repo_or_folder) / subfolder
            return cls.open(inside if (inside / MANIFEST).is_file() else repo_or_folder)
        try:
            snapshot = huggingface_hub.snapshot_download(
                str(repo_or_folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=f"{subfolder}/*",
            )
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{repo_or_folder} is neither a folder nor the id of a Hub repository; check the path."
            ) from error
        if not (Path(snapshot) / subfolder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"the Hub repository {repo_or_folder} has no {subfolder}/{MANIFEST}; it holds no embedding store, or "
                "not in that subfolder."
            )
        return cls.open(Path(snapshot) / subfolder)

    def push_to_hub(
        self,
        repo_id: str,
        include_users: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload embedding store",
    ) -> huggingface_hub.CommitInfo:
        """Uploads the store to the `store/` folder of a Hub model repository, which is made if absent.

        Args:
            repo_id: `name` or `organisation/name`.
            include_users: whether users' ids, vectors and seen items go up too. They are personal data: left out unless
                asked for, and then those of an earlier upload are removed from the branch.
            private: whether a repository that is made here is private; by default what the organisation prescribes.
            token: Hub token; by default the one that is logged in.
            revision: the branch, made if absent; by default the main one.
            commit_message: the message of the commit.
        """
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_users=include_users)
            return huggingface_hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo="store",
                token=token,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=["users-*.safetensors", "items-*.safetensors", "changes-*.safetensors"],
            )
