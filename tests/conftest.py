"""Fixtures that several test files share: the demo data, a recipe of seconds, and a repository trained with it."""

import os
from pathlib import Path

# Before anything imports the Hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Commands and scripts that tests start: sums are only the same to the last bit with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests say themselves what the terminal is like.
os.environ.pop("COLUMNS", None)
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("NO_COLOR", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ.pop("TTY_INTERACTIVE", None)

import numpy as np
import pytest
import torch
from filelock import FileLock

from tokenrec_hf import InteractionMatrix, Recipe, leave_one_out, load_interactions, train

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))

SHARED = Path(__file__).parents[2] / "shared"

# As settings by dotted name, so that a command line can take them too.
TINY = {
    "collaborative.config": {"embedding_dim": 16, "num_layers": 2},
    "collaborative.evaluate_every": 10,
    "collaborative.training.num_train_epochs": 20,
    "mq_tokenizer.config": {"num_codebooks": 3, "codebook_size": 32, "codebook_dim": 16, "hidden_dim": 32},
    "mq_tokenizer.evaluate_every": 300,
    "mq_tokenizer.training.max_steps": 300,
    "prompts.train_history": 10,
    "retrieval.backbone": None,
    "retrieval.config": {
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 64,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "projection_dim": 32,
        "dropout_rate": 0.0,
        "loss_type": "softmax",
        "temperature": 0.05,
    },
    "retrieval.num_negatives": 0,
    "retrieval.evaluate_every": 2,
    "retrieval.training": {"num_train_epochs": 6, "learning_rate": 0.01, "warmup_steps": 20},
}


@pytest.fixture(scope="session")
def demo_splits():
    """The demo data set (1,000 users, 300 items), split leave-one-out."""
    return leave_one_out(load_interactions("demo"))


@pytest.fixture(scope="session")
def tiny_recipe():
    """The paper's recipe in seconds: d = 16, K = 3, L = 32, a T5 of one layer from scratch, softmax over all items."""
    return Recipe.load("paper", overrides=TINY)


def made_once(tmp_path_factory, name, make):
    """The folder that `make` fills, which all workers of pytest-xdist share; the first one makes it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").is_file():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def trained_repository(tmp_path_factory, demo_splits, tiny_recipe):
    """The folder of a repository trained on the demo data, with refit. Shared: copy it before changing anything in it."""
    return made_once(
        tmp_path_factory, "trained", lambda folder: train(demo_splits, tiny_recipe, folder, dataset_name="demo")
    )


@pytest.fixture(scope="session")
def fism_repository(tmp_path_factory, demo_splits):
    """As `trained_repository`, of recipe `best` with ordered histories and without refit. Shared too."""
    small = {
        "collaborative.config": {"embedding_dim": 16, "half_life": 8},
        "collaborative.training.num_train_epochs": 20,
        "mq_tokenizer.config": {"num_codebooks": 3, "codebook_size": 32},
        "mq_tokenizer.user_codebooks": 6,
        "retrieval.config": {
            "d_model": 32,
            "d_kv": 8,
            "num_heads": 2,
            "d_ff": 64,
            "num_layers": 1,
            "projection_dim": 32,
            "history_weight": 0.5,
        },
        "retrieval.training": {"num_train_epochs": 4, "warmup_steps": 2},
    }
    recipe = Recipe.load("best", overrides=small)
    return made_once(
        tmp_path_factory, "fism", lambda folder: train(demo_splits, recipe, folder, dataset_name="demo", refit=False)
    )


@pytest.fixture(scope="session")
def lastfm_dir():
    """The folder with LastFM's train.txt and test.txt."""
    folder = Path(os.environ.get("TOKENREC_DATA_DIR") or SHARED / "data") / "lastfm"
    if not (folder / "train.txt").is_file():
        pytest.skip(f"no LastFM at {folder}; set TOKENREC_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def t5_spiece_model():
    """The SentencePiece file of the original T5 vocabulary."""
    path = Path(os.environ.get("TOKENREC_MODELS_DIR") or SHARED / "models") / "t5_tokenizer" / "spiece.model"
    if not path.is_file():
        pytest.skip(f"no T5 vocabulary at {path}; set TOKENREC_MODELS_DIR")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A [`HubDouble`] that this process takes for the Hub; other processes do with `hub.environment(cache)`."""
    import huggingface_hub
    from hub_double import TOKEN, HubDouble
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    double = HubDouble()
    double.start()
    cache = str(tmp_path / "hub-cache")
    changes = {
        "ENDPOINT": double.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": double.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": cache,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", double.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    # The client is kept between calls, and was made for a process that is offline.
    _http.close_session()
    yield double
    _http.close_session()
    double.stop()


@pytest.fixture(scope="module")
def small():
    """60 users, 25 items, of which the last one has no user; some pairs occur twice."""
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(60), random.integers(2, 9, 60))
    return InteractionMatrix(users, random.integers(0, 24, len(users)), 60, 25)


@pytest.fixture(scope="module")
def dense(small):
    """The same as a binary matrix, float64 `[60, 25]`."""
    matrix = np.zeros((60, 25))
    matrix[small.users, small.items] = 1
    assert len(small) > matrix.sum()
    return matrix
