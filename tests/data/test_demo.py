import hashlib

import numpy as np
import pytest

from tokenrec_hf.data.demo import demo_interactions
from tokenrec_hf.data.interactions import load_interactions
from tokenrec_hf.data.named_datasets import load_item_titles
from tokenrec_hf.data.splits import leave_one_out

DEMO_SHA256 = "d8c852ff516bfd04dc34a886cabbd864a2c50e6c077b1d08697cae4863ef51c0"


def tuples(dataset):
    return list(zip(*dataset[:].values()))


def test_the_demo_set_is_the_same_every_time():
    found = demo_interactions()
    assert found.to_dict() == demo_interactions().to_dict() == load_interactions("demo").to_dict()
    assert found.to_dict() != demo_interactions(seed=1).to_dict()
    content = "\n".join(map(str, tuples(found)))
    assert hashlib.sha256(content.encode()).hexdigest() == DEMO_SHA256


def test_the_demo_set_has_the_promised_size_and_order():
    found = demo_interactions(seed=3, num_users=200, num_items=120)
    users, items, times = np.array(found["user_id"]), np.array(found["item_id"]), np.array(found["timestamp"])
    assert list(dict.fromkeys(users)) == [f"u{number:03d}" for number in range(1, 201)]
    assert set(items) == {f"f{number:03d}" for number in range(1, 121)}
    _, counts = np.unique(users, return_counts=True)
    assert (counts.min(), counts.max()) == (10, 30)
    assert len(set(zip(users, items))) == len(users)
    assert (np.diff(times)[users[1:] == users[:-1]] > 0).all()


def test_every_demo_item_has_a_title_of_its_own():
    titles = load_item_titles("demo")
    assert set(demo_interactions().unique("item_id")) == set(titles)
    assert len(set(titles.values())) == len(titles) == 300
    assert titles["f001"] == "The Silent Harbor"


def test_a_demo_set_too_small_is_refused():
    with pytest.raises(ValueError, match="needs 1 user and 30 items or more, not 5 and 29"):
        demo_interactions(num_users=5, num_items=29)


@pytest.mark.parametrize("seed", [0, 1])
def test_tastes_can_be_learned_from_the_demo_set(seed):
    splits = leave_one_out(demo_interactions(seed=seed))
    users = {one: row for row, one in enumerate(splits["train"].unique("user_id"))}
    items = {one: row for row, one in enumerate(sorted(set(demo_interactions(seed=seed)["item_id"])))}
    matrix = np.zeros((len(users), len(items)))
    matrix[[users[one] for one in splits["train"]["user_id"]], [items[one] for one in splits["train"]["item_id"]]] = 1

    def hit_rate(scores, k=20):
        scores = np.where(matrix > 0, -np.inf, scores)
        targets = np.array([items[one] for one in splits["test"]["item_id"]])
        return ((scores > scores[np.arange(len(targets)), targets][:, None]).sum(axis=1) < k).mean()

    # EASE in closed form: B = I - P / diag(P), P the inverse of the regularised Gram matrix.
    inverse = np.linalg.inv(matrix.T @ matrix + 20 * np.eye(len(items)))
    weights = np.eye(len(items)) - inverse / np.diag(inverse)
    popularity = hit_rate(np.broadcast_to(matrix.sum(axis=0), matrix.shape))
    assert 0.1 < popularity < 0.3
    assert hit_rate(matrix @ weights) > 2 * popularity
