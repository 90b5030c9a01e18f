"""Changes of an embedding store as arrays: the calls that made them, to be made again on what was saved before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

METHODS = ("upsert", "delete", "set_seen", "add_seen", "set_metadata")


def pack_changes(changes: Sequence[tuple[str, list[Any], torch.Tensor | None]]) -> dict[str, np.ndarray]:
    """Changes as arrays: the calls as JSON, and their vectors."""
    calls = json.dumps([[method, arguments] for method, arguments, _ in changes]).encode()
    arrays = {f"vectors.{at}": vectors.numpy() for at, (_, _, vectors) in enumerate(changes) if vectors is not None}
    return {"calls": np.frombuffer(calls, dtype=np.uint8), **arrays}


def unpack_changes(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, list[Any], np.ndarray | None]]:
    """The changes that `pack_changes` was given."""
    calls = json.loads(arrays["calls"].tobytes())
    unknown = {method for method, _ in calls} - set(METHODS)
    if unknown:
        raise ValueError(f"there is no change of the name {unknown.pop()!r}.")
    return [(method, arguments, arrays.get(f"vectors.{at}")) for at, (method, arguments) in enumerate(calls)]
