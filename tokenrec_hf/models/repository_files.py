"""A trained repository, in a folder or on the Hugging Face Hub: what it holds, and how it is found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Without these, a folder is no trained repository.
REQUIRED = ("config.json", "tokenizer.json", "codes.safetensors", "store/store.json", "model.safetensors")
# What a trained repository holds; whatever else lies in its folder (checkpoints, interactions) is nobody else's business.
CONTENT = ("*.json", "*.safetensors", "*.py", "README.md", "recipe.yaml", "mq_user/*", "mq_item/*", "store/*")
WITH_USERS = ("collaborative/*",)


def fetch_repository(name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a trained repository, downloaded from the Hub unless it is here.

    Args:
        name: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the Hub repository.
        token: Hub token; by default the one that is logged in.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository, or it has not been downloaded and the Hub is
            out of reach.
        OSError: the Hub refuses.
    """
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(str(name), revision):
        try:
            allowed = [*CONTENT, *WITH_USERS]
            return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=allowed))
        except HFValidationError:
            raise FileNotFoundError(
                f"there is no folder {name}, and no Hub repository can have that name; train one with `tokenrec train "
                f"--output_dir {name}` or check the path."
            ) from None


def check_repository(folder: str | os.PathLike) -> None:
    """Makes sure that a folder is a finished trained repository.

    Raises:
        FileNotFoundError: it is not; the message says what is missing and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; train one with `tokenrec train --output_dir {folder}`.")
    unfinished = (folder / "training").is_dir()
    # metrics.json is written last of all.
    missing = [name for name in (*REQUIRED, *["metrics.json"] * unfinished) if not (folder / name).is_file()]
    if missing:
        if unfinished:
            advice = "training has not finished; run the same `tokenrec train` again and it goes on where it stopped"
        else:
            advice = "it is no trained repository; give the --output_dir of `tokenrec train`"
        raise FileNotFoundError(f"{folder} has no {missing[0]}: {advice}.")


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What can go wrong between here and the Hub, each said in one sentence."""
    try:
        yield
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"the Hub repository {name} has no revision {revision!r}; see its branches and tags."
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, and on the Hub no repository of that name that your token may read; check the "
            "name, or log in with `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {name} here, it has not been downloaded before, and the Hub cannot be reached; connect, or "
            "unset HF_HUB_OFFLINE."
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name for a Hub repository ({error}); give it as organisation/name.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login` and a token that may write there" if status in (401, 403) else "try again"
        raise OSError(
            f"the Hub refused {name} with status {status} ({error.server_message or error}); {advice}."
        ) from None
    except (OfflineModeIsEnabled, HTTPError, RuntimeError) as error:
        # The last is how the client reports that an upload broke off.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(
            f"the Hub could not be reached for {name} ({reason}); connect, unset HF_HUB_OFFLINE, or try again."
        ) from error
