"""What is said before a training: the most steps of each stage, and memory that grows with what is trained on."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets

from tokenrec_hf import Recipe, leave_one_out
from tokenrec_hf.repository.forecast import forecast
from tokenrec_hf.repository.update import NewVectors


def made_up(num_users, num_items, length):
    """Users with as many random items each."""
    random = np.random.default_rng(0)
    users = [f"u{user}" for user in range(num_users) for _ in range(length)]
    items = [f"i{item}" for item in random.permutation(len(users)) % num_items]
    return leave_one_out(Dataset.from_dict({"user_id": users, "item_id": items}))


def test_the_most_steps_of_each_stage_are_counted(demo_splits, tiny_recipe):
    # 1,000 users, of whom each has several interactions; batches of 2,048 interactions, and of 64 users for T5.
    steps = -(-len(demo_splits["train"]) // 2048) * 20
    vectors, codes, t5, evaluation = forecast(demo_splits, tiny_recipe)
    assert str(vectors).startswith(f"collaborative vectors (lightgcn): at most {steps} steps, about 0.")
    assert (codes.length, t5.length, evaluation.length) == ("300 steps each", "at most 96 steps", "")
    settings = tiny_recipe.changed(**{"retrieval.most_steps": 40, "mq_tokenizer.config.residual": True})
    assert [stage.length for stage in forecast(demo_splits, settings)[1:3]] == ["k-means", "at most 32 steps"]
    best = forecast(demo_splits, Recipe.load("best"))
    assert best[0].length == "at most 640 steps for each of 2 half-lives"
    # Of histories, a single interaction is nothing to learn from.
    single = Dataset.from_dict({"user_id": [f"n{n}" for n in range(5_000)], "item_id": ["f001"] * 5_000})
    train = concatenate_datasets([demo_splits["train"].select_columns(single.column_names), single])
    more = DatasetDict({**demo_splits, "train": train})
    assert forecast(more, Recipe.load("best"))[0].length == best[0].length
    given = NewVectors(["i0"], torch.zeros(1, 8))
    assert forecast(demo_splits, Recipe.load("best"), given)[0].stage == "collaborative vectors (given)"


def test_memory_grows_with_items_and_histories():
    recipe = Recipe.load("best")
    small, items, long = (forecast(made_up(*sizes), recipe) for sizes in ((50, 100, 4), (50, 200, 4), (50, 100, 40)))
    assert all(one.memory <= more.memory for one, more in zip(small, items))
    # Three tables of 128 dimensions, with gradients and the two moments of Adam, and the scores of a batch of 128 users.
    assert items[0].memory - small[0].memory >= 100 * 4 * (3 * 128 * 4 + 128)
    assert long[2].memory > small[2].memory


def test_the_memory_of_a_checkpoint_is_not_foretold(demo_splits):
    t5, evaluation = forecast(demo_splits, Recipe.load("paper"))[2:]
    assert t5.memory is None and str(t5) == "T5: at most 8,000 steps"
    assert evaluation.memory is None and str(evaluation) == "evaluation"
