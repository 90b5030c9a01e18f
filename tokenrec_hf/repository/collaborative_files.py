"""The collaborative model of a repository on disk, with the ids of the users and items whose its rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..data.interaction_matrix import InteractionMatrix
from ..models.id_index import IdIndex, save_indexes
from ..models.modeling_collaborative import COLLABORATIVE_MODELS


def load_collaborative(folder: Path) -> Any:
    """The model in `folder`, of whatever kind it is."""
    kind = AutoConfig.from_pretrained(folder).model_type.removeprefix("tokenrec_")
    return COLLABORATIVE_MODELS[kind].from_pretrained(folder)


def save_collaborative(model: Any, ids: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Writes a model and the `"user"` and `"item"` ids of its rows."""
    model.save_pretrained(folder)
    save_indexes({kind: IdIndex(names, kind) for kind, names in ids.items()}, folder / "ids.safetensors")


def resized(model: Any, matrix: InteractionMatrix) -> Any:
    """A fresh model of the same kind for other users, items and interactions."""
    return type(model).from_interactions(type(model.config).from_dict(model.config.to_dict()), matrix)
