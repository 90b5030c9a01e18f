"""What the commands work on: data files, trained repositories and stores, opened with one sentence for each mistake.

Heavy modules are imported inside the functions, so that a missing file is reported before anything that takes seconds.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import UsageError
from .naming import known_titles
from .output import Document, note, working

if TYPE_CHECKING:
    from logging import LogRecord

    from datasets import Dataset, DatasetDict

    from ..data.interactions import ReadingReport
    from ..models.embedding_store import Store
    from ..models.recommender import Recommender
    from ..repository.repository import Repository


def read_data(source: str, options: Document) -> tuple[Dataset, ReadingReport]:
    """Interactions, and how they were read."""
    from ..data.interactions import ReadingOptions, read_interactions

    quiet()
    return read_interactions(source, ReadingOptions(**options))


def read_splits(source: str, options: Document, split: str, at: str | None) -> tuple[DatasetDict, Document]:
    """The splits of interactions, and a report of reading and splitting, with a `summary` in words."""
    if (split == "temporal") != (at is not None):
        raise UsageError("--split temporal and --at DATE or SHARE go together.")
    from ..data.files import counted
    from ..data.splits import leave_one_out, temporal_split

    interactions, report = read_data(source, options)
    splits = leave_one_out(interactions) if at is None else temporal_split(interactions, at)
    counts = {name: len(part) for name, part in splits.items()}
    later = report.interactions - sum(counts.values())
    moment = f" at {at}" if at else ""
    parts = [
        f"{counted(counts['train'], 'interaction')} for training",
        f"a validation and a test item of each of {counted(counts['test'], 'user')}",
        *[f"{counted(later, 'later interaction')} left out"] * bool(later),
    ]
    return splits, {**asdict(report), "splits": counts, "summary": f"{report} Split{moment}: {', '.join(parts)}."}


def read_metadata(path: str | None) -> dict[str, dict[str, Any]] | None:
    """The metadata of items in a file, by id."""
    if path is None:
        return None
    from ..data.reading import read_items

    ids, described = read_items(path)
    metadata = dict(zip(ids, described))
    if twice := len(ids) - len(metadata):
        note(f"{path} has more rows than ids ({twice}); of each id the last row counts.")
    return metadata


def none_described(path: str | None, metadata: Document) -> str:
    """The sentence about a table of items whose ids are those of other items."""
    return f"No id of {path} is that of a known item, such as {next(iter(metadata))!r}; are ids written alike?"


def check_files(**paths: str | None) -> None:
    """Reports a missing file before anything is imported that takes seconds."""
    for name, path in paths.items():
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; check --{name.replace('_', '-')}.")


def check_dataset(dataset: str) -> None:
    """Reports a data set that is neither known nor a file, likewise."""
    from ..data.named_datasets import DATA_SOURCES, HUB, existing

    if dataset not in ("demo", *DATA_SOURCES) and not dataset.startswith(HUB):
        existing(dataset)


def dataset_name(dataset: str) -> str:
    """The name to record: without the local path, and with a slash for a folder, which may be named like a data set."""
    from ..data.named_datasets import DATA_SOURCES, HUB

    if dataset in ("demo", *DATA_SOURCES) or dataset.startswith(HUB):
        return dataset.removeprefix(HUB)
    path = Path(dataset).expanduser().resolve()
    return path.name + "/" * path.is_dir()


def open_repository(name: str, revision: str | None = None) -> Repository:
    """A repository in a local folder or on the Hub."""
    from ..repository.repository import Repository

    return Repository.from_pretrained(name, revision=revision)


def open_local(name: str) -> Repository:
    """A repository to change, which must be a local folder."""
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no folder {name}; only a repository in a local folder can be changed: fetch one with `hf download {name} "
            "--local-dir out`, change that and push it."
        )
    return open_repository(name)


def open_recommender(name: str, revision: str | None, store: str | None) -> tuple[Recommender, dict[str, str]]:
    """The recommender of a repository, and the titles of its items."""
    repository = open_repository(name, revision)
    quiet()
    with working("opening the repository"):
        return repository.recommender(store=external_store(store)), known_titles(repository.info()["dataset"])


def external_store(uri: str | None) -> Store | None:
    """The store at `--store`, if it is given."""
    from ..store.engines import open_store

    return None if uri is None else open_store(uri, token=os.environ.get("MILVUS_TOKEN"))


def _is_news(record: LogRecord) -> bool:
    """Whether a record of `Trainer` says more than that the tied embeddings are missing."""
    return not re.search(r"missing keys .*embed_tokens", record.getMessage())


def quiet() -> None:
    """Turns off the progress bars of transformers and datasets, the logs of pymilvus and the ONNX exporter, and torch's beta warning."""
    import logging as std_logging
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    logging.disable_progress_bar()
    # pymilvus logs each error that it raises, with a traceback.
    std_logging.getLogger("pymilvus").setLevel(std_logging.CRITICAL)
    # The ONNX exporter warns that torchvision is not there.
    std_logging.getLogger("torch.onnx").setLevel(std_logging.ERROR)
    # Trainer misses the tied embeddings, which safetensors writes once, in the best checkpoint.
    std_logging.getLogger("transformers.trainer").addFilter(_is_news)
    # datasets takes a tenth of the time of a cold `recommend` to import, which does not need it; when imported, it reads this.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
