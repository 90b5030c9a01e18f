"""Training in the shape of MovieLens-20M, with a tenth of its interactions.

14,000 users and 2,700 items, made up. FISM holds a vector of each interaction in memory when it makes the users' vectors, so
all twenty million would need about 30 GB. Costs are given for an interaction or a step where they grow with their number.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, once, peak
from preparation import ratings

from tokenrec_hf import leave_one_out, load_interactions
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation.ranking import evaluate_vectors
from tokenrec_hf.training.closed_forms import smooth_tables
from tokenrec_hf.training.recipe import Recipe
from tokenrec_hf.training.stages import train_collaborative, train_mq_tokenizer

INTERACTIONS, STEPS = 2_000_000, 100
# The smoothing that follows the training is measured on its own.
RECIPE = {"half_life": 8, "history_smoothing": 0.0, "item_smoothing": 0.0}


def rows() -> list[Row]:
    """Steps of the collaborative model, its vectors, the items' codes, and the ranking of all users."""
    data = index_splits(leave_one_out(load_interactions(ratings(INTERACTIONS))), "test")
    recipe = Recipe.load("best", overrides={f"collaborative.config.{name}": value for name, value in RECIPE.items()})
    batch_size = recipe.collaborative.training["per_device_train_batch_size"]
    epoch = np.count_nonzero(data.interactions.lengths > 1) / batch_size
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        with once(found, "a step of FISM", amount=STEPS, unit="ms"):
            result = train_collaborative(data.interactions, recipe.collaborative, Path(folder), epochs=STEPS / epoch)
        found.append(Row("an epoch", found[0].ours * epoch / 1000, "s"))
        model = result.model
        model.config.history_smoothing = 0.5
        with once(found, "smoothing of the tables, an interaction", amount=INTERACTIONS, unit="µs"):
            smooth_tables(model, data.interactions.users, data.interactions.items)
        with once(found, "vectors of users and items, an interaction", amount=INTERACTIONS, unit="µs"), torch.no_grad():
            users, items = model.representations()
        with once(found, "codes of all items"):
            train_mq_tokenizer(items, recipe.mq_tokenizer, Path(folder), kind="item")
    with once(found, "full ranking, a user", amount=len(data.holdout.users), unit="ms"):
        evaluate_vectors(users[torch.from_numpy(data.holdout.users)], items, data)
    return [*found, Row("most memory", peak(), "GB")]
