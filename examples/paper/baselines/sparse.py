"""Interactions as a sparse matrix, for iALS."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from tokenrec_hf.data.interaction_matrix import InteractionMatrix


def binary_matrix(interactions: InteractionMatrix) -> csr_matrix:
    """1 for each pair of a user and an item with any interaction, float32 `[num_users, num_items]`."""
    ones = np.ones(len(interactions), dtype=np.float32)
    shape = (interactions.num_users, interactions.num_items)
    matrix = csr_matrix((ones, (interactions.users, interactions.items)), shape=shape)
    matrix.data[:] = 1
    return matrix
