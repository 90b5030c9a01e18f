"""ItemKNN: cosine similarity of items by their users (Sarwar et al., 2001), with shrinkage."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix

from tokenrec_hf.models.embedding_store import stable_topk

from .base import Baseline
from .sparse import binary_matrix

_ROWS = 1024


class ItemKNN(Baseline):
    """An item's score is the sum of its similarities to the user's items among its nearest neighbours.

    The similarity of items with n_i and n_j users and n_ij common users is n_ij / (sqrt(n_i n_j) + shrinkage).
    """

    name, title = "itemknn", "ItemKNN"
    grid = (
        {"neighbours": 100, "shrinkage": 10},
        {"neighbours": 100, "shrinkage": 0},
        {"neighbours": 100, "shrinkage": 100},
        {"neighbours": 30, "shrinkage": 10},
        {"neighbours": 500, "shrinkage": 0},
        {"neighbours": 500, "shrinkage": 10},
    )
    deterministic = True

    def fit(self, train, validation, epochs=None):  # noqa: D102
        self.matrix = binary_matrix(train)
        by_item = self.matrix.T.tocsr()  # [num_items, num_users]
        lengths = np.sqrt(np.asarray(self.matrix.sum(axis=0)).ravel())  # sqrt(n_i)
        parts = []
        for start in range(0, train.num_items, _ROWS):
            common = (by_item[start : start + _ROWS] @ self.matrix).toarray()  # n_ij, [rows, num_items]
            rows = np.arange(len(common))
            common[rows, rows + start] = 0
            # Items without users have similarity 0; the maximum avoids 0 / 0.
            norms = np.maximum(np.outer(lengths[start : start + _ROWS], lengths) + self.settings["shrinkage"], 1e-9)
            similarity = torch.from_numpy(common / norms)
            parts.append(stable_topk(similarity, self.settings["neighbours"]))
        items, values = (torch.cat(part).numpy() for part in zip(*parts))  # [num_items, neighbours]
        rows = np.repeat(np.arange(train.num_items), items.shape[1])
        size = (train.num_items, train.num_items)
        self.similarity = csr_matrix((values.ravel(), (items.ravel(), rows)), shape=size)  # column j: neighbours of j
        self.similarity.eliminate_zeros()

    def scores(self, users):  # noqa: D102
        return torch.from_numpy((self.matrix[users] @ self.similarity).toarray()).float()
