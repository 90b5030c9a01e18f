"""Vectors of people of whom nothing but a history is known, as FISM makes those of its users.

FISM has no rows of users: its p_u is a function of the items that u has had. So whoever comes tomorrow with a history has a
vector as good as that of a user of the training, without any training, and the users' MQ-Tokenizer gives it tokens. Needs the
item side of `collaborative/` only, which holds nothing personal. Other collaborative models have no such function.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import torch

from .configuration_collaborative import FISMConfig
from .id_index import IdIndex, load_indexes, save_indexes
from .modeling_collaborative import FISMModel

FOLDER, IDS = "collaborative", "ids.safetensors"


class HistoryEncoder:
    """A [`FISMModel`] that knows its items by their ids.

    Args:
        model: gives the vectors.
        items: the ids of its items, in row order.

    Raises:
        ValueError: there are more ids than items, or fewer.
    """

    def __init__(self, model: FISMModel, items: IdIndex):
        if len(items) != model.config.num_items:
            raise ValueError(
                f"there are {len(items)} ids for {model.config.num_items} items of the collaborative model."
            )
        self.model, self.items = model, items

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> HistoryEncoder | None:
        """That of a trained repository, or None where its collaborative model is another one, or was left out.

        Args:
            name: its folder, or its name on the Hub.
            revision: branch, tag or commit of the Hub repository.
            token: Hub token; by default the one that is logged in.
        """
        if not Path(name).is_dir():
            name = huggingface_hub.snapshot_download(
                str(name), revision=revision, token=token, allow_patterns=f"{FOLDER}/*"
            )
        source = Path(name) / FOLDER
        config, ids = source / "config.json", source / IDS
        if not (config.is_file() and ids.is_file()):
            return None
        if json.loads(config.read_text(encoding="utf-8"))["model_type"] != FISMModel.config_class.model_type:
            return None
        return cls(FISMModel.from_pretrained(source).eval(), load_indexes(ids)["item"])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes it as the `collaborative/` of a repository that has no users: items only, no history of anybody."""
        config = FISMConfig.from_dict({**self.model.config.to_dict(), "num_users": 0, "num_interactions": 0})
        model = FISMModel(config)
        with torch.no_grad():
            for (_, table), (_, mine) in zip(model.tables(), self.model.tables()):
                table.weight.copy_(mine.weight)
        model.save_pretrained(folder)
        save_indexes({"user": IdIndex([], "user"), "item": self.items}, Path(folder) / IDS)

    def encode(self, histories: Sequence[Sequence[str]]) -> tuple[torch.Tensor, np.ndarray]:
        """Vectors p of histories, oldest item first.

        Items that the model does not know (vectors without interactions) say nothing, but those before them are the older
        for it.

        Args:
            histories: item ids of each.

        Returns:
            `[n, d]`, of length 1, and bool `[n]`: whether any item of the history is known; if not, the vector is zero.
        """
        sizes = np.array([len(one) for one in histories], dtype=np.int64)
        rows = np.repeat(np.arange(len(sizes)), sizes)
        ages = np.repeat(np.cumsum(sizes), sizes) - 1 - np.arange(len(rows))
        items = self.items.rows([item for one in histories for item in one])
        inside = items >= 0
        row, item, age = (torch.from_numpy(one[inside]) for one in (rows, items, ages))
        with torch.no_grad():
            vectors = self.model.pool(row, item, age, len(sizes))
        return vectors, np.bincount(rows[inside], minlength=len(sizes)) > 0
