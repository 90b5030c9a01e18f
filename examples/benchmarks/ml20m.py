"""Twenty million interactions, in the shape of MovieLens-20M.

138,000 users and 27,000 items, made up. Trains only a part of each stage, and tells what all of it takes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, once, peak
from preparation import prepared

from tokenrec_hf.evaluation.ranking import evaluate_vectors
from tokenrec_hf.training.recipe import Recipe
from tokenrec_hf.training.stages import train_collaborative, train_mq_tokenizer

INTERACTIONS, STEPS, RANKED = 20_000_000, 100, 10_000


def rows() -> list[Row]:
    """Preparation, steps of the collaborative model, the items' codes, and the ranking of some users."""
    found, _, data = prepared(INTERACTIONS)
    recipe = Recipe.load("best", overrides={"collaborative.config.half_life": 8})
    batch = recipe.collaborative.training["per_device_train_batch_size"]
    epoch = np.count_nonzero(data.interactions.lengths > 1) / batch
    with tempfile.TemporaryDirectory() as folder:
        with once(found, "a step of the collaborative model (FISM)", amount=STEPS):
            result = train_collaborative(data.interactions, recipe.collaborative, Path(folder), epochs=STEPS / epoch)
        found.append(Row("an epoch of it", found[-1].ours * epoch / 60, "min"))
        with once(found, "vectors of all users and items"):
            users, items = (vectors.detach() for vectors in result.model.representations())
        with once(found, "codes of all items"):
            codes = train_mq_tokenizer(items, recipe.mq_tokenizer, Path(folder), kind="item").model.encode(items)
    assert len(codes) == len(data.item_ids)
    held_out = data.holdout
    held_out.users, held_out.targets = held_out.users[:RANKED], held_out.targets[:RANKED]
    with once(found, "full ranking, a user", amount=RANKED, unit="ms"):
        evaluate_vectors(users[torch.from_numpy(held_out.users)], items, data)
    return [*found, Row("most memory", peak(), "GB")]
