"""Sharing a trained repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, HfApi, SpaceCardData

from .. import __version__, models
from ..models.codes import (
    COLLABORATIVE,
    COMMITTED,
    LOCK,
    MANIFEST,
    MQ_FOLDERS,
    STORE_FOLDER,
    RepositoryFolder,
    check_repository,
    current,
    hub_errors,
    read_json,
    read_whole,
)
from ..models.embedding_store import EmbeddingStore
from ..models.modeling_collaborative import save_collaborative
from ..models.recommender import load_history_encoder
from ..models.tokenization_tokenrec import TokenRecTokenizer
from .card import write_model_card
from .repository import PUSHED, Repository, exclusive, space_named
from .update import without_users

# Answers for an Inference Endpoint; only the Hub needs it.
HANDLER = Path(__file__).with_name("handler.py")
_CODE = {path.name for path in Path(models.__path__[0]).glob("[!_]*.py")}
_MODEL = {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"} | _CODE
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# A Space that shows the page of a repository on the Hub.
_APP = '''"""The page of the recommender {name}, see `tokenrec demo`."""

from tokenrec_hf.cli.app import main

main({arguments})
'''
# The files of each folder that are shared, besides parts of large weights and the data files of the store.
_SHARED = {
    "": _MODEL
    | {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "codes.safetensors"}
    | {"README.md", HANDLER.name, "metrics.json", "additions.json", "recipe.yaml"},
    STORE_FOLDER: {MANIFEST},
    COLLABORATIVE: _MODEL | {"ids.safetensors"},
    **dict.fromkeys(MQ_FOLDERS.values(), _MODEL),
}


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
        repository: a finished repository. Only its own files are uploaded, not its folder `training` and not the files that
            [`strays`] names.
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
    for path in repository.dead_copies():
        shutil.rmtree(path)
    # Beside the files, where the next push or change finds what a killed process leaves, because it may hold users.
    with (
        space_named(repository.folder, "nothing was uploaded"),
        tempfile.TemporaryDirectory(prefix=PUSHED, dir=repository.folder, ignore_cleanup_errors=True) as temporary,
        exclusive(Path(temporary)),
        hub_errors(repo_id, revision),
    ):
        prepared = Path(temporary) / "repository"
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        read_whole(repository.parts.store, lambda: copy_shared(repository.folder, prepared, include_users))
        write_model_card(Repository(prepared), repo_id)
        shutil.copyfile(HANDLER, prepared / HANDLER.name)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=prepared,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=f"*{LOCK}",
            delete_patterns="*",
        )
    return str(commit.commit_url)


def push_space(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Uploads a Space that shows the page of `tokenrec demo` for the Hub repository of the same name, and returns its address.

    Args:
        repo_id: of the repository, `organisation/name`.
        private: whether a created Space is private. The Space of a private repository needs a secret `HF_TOKEN` to read it.
        revision: of the repository; by default the main branch.
        token: Hub token; by default the stored one.

    Raises:
        OSError: the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id, None):
        made = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        name = made.repo_id
        arguments = [
            "demo",
            name,
            "--host",
            "0.0.0.0",
            "--port",
            "7860",
            *(["--revision", revision] if revision else []),
        ]
        card = SpaceCardData(
            title=name.split("/")[-1], sdk="gradio", app_file="app.py", models=[name], tags=["tokenrec"]
        )
        files = {
            "app.py": _APP.format(name=name, arguments=arguments),
            "requirements.txt": f"tokenrec-hf[demo]=={__version__}\n",
            "README.md": f"---\n{card.to_yaml()}\n---\n\nThe page of the recommender [{name}]({api.endpoint}/{name}).\n",
        }
        changes = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
        api.create_commit(name, changes, commit_message="Upload the page of a TokenRec recommender", repo_type="space")
    return str(made)


def strays(folder: Path) -> list[str]:
    """The files beside those of a trained repository, in the same folders; they are not uploaded."""
    shared = _shared_files(folder)
    found = (path.relative_to(folder) for part in _SHARED for path in (folder / part).glob("[!.]*") if path.is_file())
    return sorted(name.as_posix() for name in found if name not in shared)


def _shared_files(folder: Path) -> dict[Path, Path]:
    """The files of a trained repository that may be uploaded, by their names in it.

    Raises:
        ValueError: one of them is a link to a file elsewhere, which an upload would take along.
    """
    data = {entry["file"] for entry in read_json(current(folder / STORE_FOLDER) / MANIFEST)["files"].values()}
    names = _SHARED | {STORE_FOLDER: {MANIFEST} | data}
    # Those of a committed change replace the others.
    paths = {
        path.relative_to(place): path
        for place in (folder, folder / COMMITTED)
        for part, known in names.items()
        for path in sorted((place / part).glob("*"))
        if path.is_file() and (path.name in known or (_SHARD.fullmatch(path.name) and part != STORE_FOLDER))
    }
    allowed = [folder.resolve()]
    # In the cache of the Hub's client, the files of a snapshot are links into the folder `blobs` of its repository.
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    for path in paths.values():
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside the repository; replace it by a file of its own."
            )
    return paths


def copy_shared(folder: Path, target: Path, include_users: bool) -> None:
    """Copies the shared files of a trained repository, without its users unless asked for, to a folder of their own."""
    source, copied = RepositoryFolder(folder), RepositoryFolder(target)
    shutil.rmtree(target, ignore_errors=True)
    for name, path in _shared_files(folder).items():
        copy = target / name
        if include_users or copy.parent != copied.collaborative:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if not include_users:
        shutil.rmtree(copied.store)
        EmbeddingStore.open(source.store).save_pretrained(copied.store, include_users=False)
        tokenizer = TokenRecTokenizer.from_pretrained(target)
        tokenizer.remove("user", tokenizer.ids("user"))
        tokenizer.save_codes(target)
        if (encoder := load_history_encoder(folder)) is not None:
            model = without_users(encoder.model, np.zeros(encoder.model.config.num_users, dtype=bool))
            save_collaborative(model, {"user": [], "item": encoder.items.ids()}, copied.collaborative)
