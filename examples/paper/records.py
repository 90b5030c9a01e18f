"""Measurements as JSON lines: one file a data set, one record a line.

A record is found by its job: data set, model, phase, seed and settings. Records do not know the code that made them; delete
those of a model whose code has changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from tokenrec_hf.models.codes import atomic_write

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One fit and its evaluation, or one run of a study.

    Args:
        dataset: a data set as in `tokenrec train --dataset`.
        model: one of `harness.MODELS`, or the name of a study.
        phase: `validation`; `test`, the refit; or `both` for TokenRec, which does one after the other.
        seed: seed of the run.
        settings: an entry of the model's grid, or TokenRec's recipe.
        epochs: length of a refit, if the model has one to choose.
    """

    dataset: str
    model: str
    phase: str
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None


class Records:
    """The records in a folder.

    Args:
        folder: folder of the JSON-lines files, created by the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[tuple[int, int, int], list[Record]]] = {}

    def find(self, job: Job) -> Record | None:
        """The record of a job with the same settings, of any length; None if there is none."""
        wanted = _identity(asdict(job))
        return next((one for one in self._of(self.path(job.dataset)) if _identity(one["job"]) == wanted), None)

    def get(self, job: Job) -> Record | None:
        """The record of a job; None if there is none, or if its refit had another length."""
        record = self.find(job)
        return record if record and record["job"] == asdict(job) else None

    def put(self, dataset: str, records: Sequence[Record]) -> None:
        """Adds records of a data set; each replaces the record with the same settings.

        The file is written whole or not at all. Processes wait for each other.
        """
        path = self.path(dataset)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            new = [_identity(record["job"]) for record in records]
            kept = [record for record in self._of(path) if _identity(record["job"]) not in new]
            lines = sorted(map(_line, [*kept, *records]))
            with atomic_write(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def path(self, dataset: str) -> Path:
        """The file of a data set."""
        return self.folder / f"{Path(dataset).name}.jsonl"

    def _of(self, path: Path) -> list[Record]:
        if not path.is_file():
            return []
        found = path.stat()
        version = (found.st_ino, found.st_mtime_ns, found.st_size)
        if path not in self._read or self._read[path][0] != version:
            self._read[path] = version, _parse(path)
        return self._read[path][1]


class Recorded:
    """Answers jobs from the records and never fits.

    Args:
        results: folder of the records.
    """

    def __init__(self, results: Path) -> None:
        self.records = Records(results)

    def __call__(self, job: Job) -> Record:
        """The record of a job.

        Raises:
            LookupError: there is no such record.
        """
        record = self.records.get(job)
        if record is None:
            raise LookupError(
                f"{self.records.path(job.dataset)} has no record of {job.model}, {job.phase}, seed {job.seed}; run it first."
            )
        return record

    def count(self, jobs: Sequence[Job]) -> int:
        """How many of the first jobs have a record."""
        return next((number for number, job in enumerate(jobs) if self.records.find(job) is None), len(jobs))


def _parse(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); restore or delete the line.") from error
    return records


def _identity(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != "epochs"}


def _line(record: Record) -> str:
    """A record as a line. The job comes first, so that sorted lines are sorted by it."""
    job = asdict(Job(**record["job"]))
    measured = {name: value for name, value in record.items() if name != "job"}
    return json.dumps({"job": job, **measured}, separators=(",", ":"), ensure_ascii=False) + "\n"
