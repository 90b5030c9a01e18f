"""CoLLM: collaborative vectors as tokens of the language model (Zhang et al., TKDE 2025, arXiv 2310.19488).

The user and each item of the history are one soft token each: their LightGCN vector, mapped by an MLP into T5's input space.
The original predicts whether a user will like an item, with one run of the language model for each user and item. As in
TokenRec's comparison, the model here writes the sequential id of the next item, as in P5. LightGCN has the settings of recipe
`paper` and is trained on the same interactions for a fixed number of epochs; its vectors are frozen.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from tokenrec_hf import Recipe
from tokenrec_hf.training.stages import train_collaborative

from .p5 import P5SID, IdGenerator

LIGHTGCN_EPOCHS = 60


class SoftIdGenerator(IdGenerator):
    """An [`IdGenerator`] with vectors as tokens: their ids follow the vocabulary.

    Args:
        vectors: vectors of users, then of items, `[n, d]`.
    """

    def __init__(self, config, num_symbols, max_words, vectors: torch.Tensor):
        super().__init__(config, num_symbols, max_words)
        self.register_buffer("vectors", vectors, persistent=False)
        self.mapping = nn.Sequential(
            nn.Linear(vectors.shape[1], 2 * config.d_model), nn.ReLU(), nn.Linear(2 * config.d_model, config.d_model)
        )

    def embed(self, ids, words):
        """See [`IdGenerator.embed`]."""
        size = self.t5.config.vocab_size
        soft = ids >= size
        embeds = super().embed(ids.masked_fill(soft, 0), words)
        mapped = self.mapping(self.vectors[ids[soft] - size])
        return embeds.masked_scatter(soft[..., None], mapped.to(embeds))


class CoLLM(P5SID):
    """CoLLM that writes sequential ids."""

    name, title = "collm", "CoLLM"

    def build(self, train):
        """See [`P5.build`]; trains LightGCN first."""
        with TemporaryDirectory() as folder:
            settings = Recipe.load("paper").collaborative
            model = train_collaborative(train, settings, Path(folder), epochs=LIGHTGCN_EPOCHS, seed=self.seed).model
        kinds = model.user_embeddings(), model.item_embeddings()
        self.vectors = torch.cat([(rows - rows.mean(dim=0)) / rows.std() for rows in kinds])
        super().build(train)
        first = self.network.t5.config.vocab_size
        self.user_tokens = first + np.arange(train.num_users)[:, None]
        self.item_tokens = first + train.num_users + np.arange(train.num_items)[:, None]

    def make_network(self, config, num_symbols, max_words):  # noqa: D102
        return SoftIdGenerator(config, num_symbols, max_words, self.vectors)
