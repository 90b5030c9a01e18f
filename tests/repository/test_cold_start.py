import datetime
import json
import math
import shutil
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from repository_checks import check_codes, contents, interactions

from tokenrec_hf import EmbeddingStore, NewVectors, Recommender
from tokenrec_hf.data.reading import read_items
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.modeling_collaborative import LightGCNModel
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel
from tokenrec_hf.models.recommender import load_history_encoder
from tokenrec_hf.repository import update as module
from tokenrec_hf.repository.hub import copy_shared
from tokenrec_hf.repository.repository import Repository
from tokenrec_hf.repository.update import read_vectors


@pytest.fixture
def repository(trained_repository, tmp_path):
    """A copy of the trained repository, to be changed."""
    return shutil.copytree(trained_repository, tmp_path / "repository")


def twin_of(folder, user):
    """The interactions of a user under another name."""
    return [("twin", item) for item in EmbeddingStore.open(folder).seen([user])[0]]


def test_a_folded_in_twin_is_recommended_what_its_original_is(repository):
    store = EmbeddingStore.open(repository)
    users = store.ids("user")[:8]
    pairs = [(f"twin-{user}", item) for user, items in zip(users, store.seen(users)) for item in items]
    report = Repository(repository).add(interactions=interactions(*pairs))
    assert report["users"] == 8 and report["items"] == 0 and report["interactions"] == len(pairs)
    store = EmbeddingStore.open(repository)
    twins = store.get("user", [f"twin-{user}" for user in users])
    assert torch.cosine_similarity(twins, store.get("user", users)).mean() > 0.8
    recommender = Recommender.from_pretrained(repository)
    for user in users[:3]:
        one, two = recommender.recommend([user, f"twin-{user}"], top_k=20)
        assert len({row["item"] for row in one} & {row["item"] for row in two}) >= 8
        assert not {row["item"] for row in two} & set(store.seen([user])[0])
    check_codes(repository)


def test_fism_gives_a_cold_start_user_the_vector_of_the_training(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    store = EmbeddingStore.open(folder)
    users = store.ids("user")[:8]
    pairs = [(f"twin-{user}", item) for user, items in zip(users, store.seen(users)) for item in items]
    report = Repository(folder).add(interactions=interactions(*pairs, ("twin-of-nobody", "nova"), (users[0], "nova")))
    assert (report["users"], report["items"], report["users_changed"]) == (9, 1, 1)
    store = EmbeddingStore.open(folder)
    twins = store.get("user", [f"twin-{user}" for user in users])
    torch.testing.assert_close(twins[1:], store.get("user", users[1:]), rtol=0, atol=1e-6)
    check_codes(folder)
    # A user with nothing but a cold-start item is folded in through the other users of that item.
    assert torch.isfinite(store.get("user", ["twin-of-nobody"])).all()


@pytest.mark.parametrize("retrain", [False, True])
def test_with_fism_users_are_what_they_have_had_by_now(fism_repository, tmp_path, retrain):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    before = EmbeddingStore.open(folder)
    one, other, given = before.ids("user")[:3]
    new = [item for item in before.ids("item") if item not in before.seen([one])[0]][:2]
    report = Repository(folder).add(
        users=NewVectors([given], before.get("user", [other])),
        interactions=interactions(*((one, item) for item in new), (given, before.seen([given])[0][0])),
        retrain=retrain,
    )
    store = EmbeddingStore.open(folder)
    assert store.seen([one])[0] == before.seen([one])[0] + new
    if retrain:
        # The collaborative model was turned into the old space with its vectors.
        assert report["users_changed"] == store.count("user")
        users = store.ids("user")
        assert torch.cosine_similarity(store.vectors("item"), before.vectors("item")).mean() > 0.8
    else:
        assert report["users_changed"] == 2
        assert not torch.allclose(store.get("user", [one]), before.get("user", [one]), atol=1e-2)
        assert torch.equal(store.get("user", [given]), before.get("user", [other]))
        users = [one]
    expected = load_history_encoder(folder).encode(store.seen(users))[0]
    torch.testing.assert_close(store.get("user", users)[:, :16], expected, rtol=0, atol=1e-5)
    check_codes(folder)


def test_a_whole_history_says_where_new_items_stand(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    before = EmbeddingStore.open(folder)
    one, other = before.ids("user")[:2]
    whole, part = [before.seen([user])[0] for user in (one, other)]
    log = [whole[0], "nova", *whole[1:], whole[0]]
    rows = [(one, item) for item in log] + [(other, item) for item in ("nova", part[1], part[0])]
    report = Repository(folder).add(interactions=interactions(*rows))
    assert report["interactions"] == 2
    store = EmbeddingStore.open(folder)
    assert store.seen([one, other]) == [log[:-1], [*part, "nova"]]
    expected = load_history_encoder(folder).encode(store.seen([one, other]))[0]
    torch.testing.assert_close(store.get("user", [one, other])[:, :16], expected, rtol=0, atol=1e-5)


def test_with_fism_an_item_that_nobody_has_had_is_no_part_of_histories(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    store = EmbeddingStore.open(folder)
    Repository(folder).add(
        items=NewVectors(["silent"], store.vectors("item")[:1]),
        interactions=interactions(("new", store.ids("item")[0])),
    )
    assert load_history_encoder(folder).encode([["silent"]])[1].tolist() == [False]
    check_codes(folder)


def test_with_fism_a_new_item_says_something_of_those_who_have_it(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    before = EmbeddingStore.open(folder)
    users = before.ids("user")
    items = [item for seen in before.seen(users) for item in seen]
    old = max(sorted(set(items)), key=items.count)
    audience = [user for user, seen in zip(users, before.seen(users)) if old in seen]
    assert not load_history_encoder(folder).encode([["nova"]])[1].any()
    Repository(folder).add(interactions=interactions(*((user, "nova") for user in audience[:-5])))
    encoder = load_history_encoder(folder)
    vectors, known = encoder.encode([["nova"], [old], *([item] for item in before.ids("item"))])
    assert known.all()
    # Of all items, those that the same people have had are who it speaks for.
    likeness = torch.cosine_similarity(vectors[0], vectors[1:])
    assert likeness[0] > likeness.quantile(0.9)
    assert encoder.model.config.num_folded_items == 1
    # What its users say of it is asked anew with each addition; items of the training stay as they are.
    Repository(folder).add(interactions=interactions(*((user, "nova") for user in audience[-5:])))
    again = load_history_encoder(folder)
    assert again.model.config.num_folded_items == 1
    trained = again.model.history_table.weight[:-1]
    assert torch.equal(trained, encoder.model.history_table.weight[:-1])
    assert not torch.equal(again.model.history_table.weight[-1], encoder.model.history_table.weight[-1])
    store = EmbeddingStore.open(folder)
    torch.testing.assert_close(
        store.get("user", audience[-5:])[:, :16], again.encode(store.seen(audience[-5:]))[0], rtol=0, atol=1e-5
    )
    # A stranger whose history is the new item alone is recommended something, here and where it was pushed to.
    copy_shared(folder, tmp_path / "pulled", include_users=False)
    here, there = (
        Recommender.from_pretrained(one).recommend([None], [["nova"]], top_k=5)[0]
        for one in (folder, tmp_path / "pulled")
    )
    assert [row["item"] for row in here] == [row["item"] for row in there]
    # Once it is trained on, it is an item like the others.
    Repository(folder).add(interactions=interactions((audience[0], "nova")), retrain=True)
    retrained = load_history_encoder(folder).model
    assert (retrained.config.num_items, retrained.config.num_folded_items) == (before.count("item") + 1, 0)
    assert (len(retrained.edge_items), retrained.config.num_items) == (
        sum(map(len, store.seen(users))),
        store.count("item"),
    )


def test_fism_serves_new_users_of_a_repository_that_was_shared_without_any(fism_repository, tmp_path):
    folder = tmp_path / "pulled"
    copy_shared(fism_repository, folder, include_users=False)
    original = EmbeddingStore.open(fism_repository)
    user = original.ids("user")[3]
    before = contents(folder)
    pairs = [("new", item) for item in original.seen([user])[0]]
    with pytest.raises(ValueError, match="has no interactions of users"):
        Repository(folder).add(interactions=interactions(*pairs, ("new", "nova")))
    with pytest.raises(ValueError, match="was pushed without users.*; add without retraining"):
        Repository(folder).add(interactions=interactions(*pairs), retrain=True)
    assert contents(folder) == before
    Repository(folder).add(interactions=interactions(*pairs))
    torch.testing.assert_close(
        EmbeddingStore.open(folder).get("user", ["new"]), original.get("user", [user]), rtol=0, atol=1e-6
    )
    known = Recommender.from_pretrained(fism_repository).recommend([user], top_k=5)
    assert [row["item"] for row in Recommender.from_pretrained(folder).recommend(["new"], top_k=5)[0]] == [
        row["item"] for row in known[0]
    ]


def test_a_folded_in_item_is_near_the_items_of_its_users(repository):
    store = EmbeddingStore.open(repository)
    users = [user for user in store.ids("user") if len(store.seen([user])[0]) > 3]
    likes = store.seen(users)[0][0]
    audience = [user for user, seen in zip(users, store.seen(users)) if likes in seen]
    Repository(repository).add(interactions=interactions(*((user, "nova") for user in audience)))
    store = EmbeddingStore.open(repository)
    nova, original = store.get("item", ["nova", likes])
    others = torch.cosine_similarity(nova[None], store.vectors("item"))
    assert torch.cosine_similarity(nova, original, dim=0) > others.quantile(0.9)
    assert all(seen[-1] == "nova" for seen in store.seen(audience))
    check_codes(repository)


def test_t5_and_the_mq_tokenizers_stay_as_they_are(repository):
    before = contents(repository)
    Repository(repository).add(
        interactions=interactions(*twin_of(repository, EmbeddingStore.open(repository).ids("user")[0]))
    )
    after = contents(repository)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert {path for path in changed if not path.startswith("store/")} == {
        "codes.safetensors", "additions.json"
    }  # fmt: skip
    # The files of the store are named by their content.
    assert {path for path in before if path.parts[0] != "store"} <= set(after)


def test_given_vectors_are_stored_with_their_metadata(repository):
    store = EmbeddingStore.open(repository)
    item, user = (store.get(kind, store.ids(kind)[:2]) for kind in ("item", "user"))
    report = Repository(repository).add(
        items=NewVectors(["first", "second"], item.flip(0), [{"genre": "jazz"}, {"genre": "folk"}]),
        users=NewVectors(["u-new", "u-other"], user),
    )
    assert (report["users"], report["items"]) == (2, 2)
    again = Repository(repository).add(items=NewVectors(["second"], item[1:]))
    assert (again["items"], again["items_changed"]) == (0, 1)
    store = EmbeddingStore.open(repository)
    assert torch.equal(store.get("item", ["first", "second"]), item[[1, 1]])
    assert torch.equal(store.get("user", ["u-new", "u-other"]), user)
    assert store.metadata(["second"]) == [{"genre": "folk"}]
    check_codes(repository)


def test_known_ids_keep_their_vectors_and_see_more(repository):
    store = EmbeddingStore.open(repository)
    user, item = store.ids("user")[0], store.ids("item")[-1]
    known = store.seen([user])[0]
    assert item not in known
    report = Repository(repository).add(interactions=interactions((user, known[0]), (user, item), (user, item)))
    assert report == {
        "users": 0, "items": 0, "users_changed": 0, "items_changed": 0, "interactions": 1, "described": 0,
        "reconstruction_error": {},
    }  # fmt: skip
    after = EmbeddingStore.open(repository)
    assert after.seen([user]) == [[*known, item]]
    assert torch.equal(after.vectors("user"), store.vectors("user"))


def test_retraining_keeps_the_space(repository):
    """Vectors of the model that was trained on, turned back, are near the old ones; without the rotation they need not be."""
    before = EmbeddingStore.open(repository)
    user = before.ids("user")[0]
    report = Repository(repository).add(
        interactions=interactions(*twin_of(repository, user), ("twin", "nova")), retrain=True
    )
    assert (report["users"], report["items"]) == (1, 1)
    assert report["users_changed"] == before.count("user") and report["items_changed"] == before.count("item")
    after = EmbeddingStore.open(repository)
    for kind in ("user", "item"):
        old, new = before.vectors(kind), after.get(kind, before.ids(kind))
        assert torch.cosine_similarity(old, new).mean() > 0.9
        assert not torch.equal(old, new)
    # No further rotation brings them nearer: the best one (Procrustes) is the identity.
    old, new = (
        torch.cat([store.get(kind, before.ids(kind)) for kind in ("user", "item")]).double()
        for store in (before, after)
    )
    left, _, right = torch.linalg.svd(new.T @ old)
    torch.testing.assert_close(left @ right, torch.eye(old.shape[1], dtype=torch.float64), rtol=0, atol=1e-4)
    check_codes(repository)
    model = LightGCNModel.from_pretrained(repository / "collaborative")
    ids = load_indexes(repository / "collaborative" / "ids.safetensors")
    assert ids["user"].ids() == after.ids("user") and ids["item"].ids() == after.ids("item")
    assert model.config.num_users == len(ids["user"]) and model.config.num_interactions == sum(
        map(len, after.seen(after.ids("user")))
    )
    # And once more, now that the model knows the cold-start users and items.
    Repository(repository).add(retrain=True)
    check_codes(repository)


@pytest.mark.parametrize("model", ["lightgcn", "fism"])
def test_retraining_leaves_vectors_that_no_interaction_belongs_to(request, tmp_path, model):
    folder = request.getfixturevalue({"lightgcn": "trained_repository", "fism": "fism_repository"}[model])
    folder = shutil.copytree(folder, tmp_path / "repository")
    given = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    Repository(folder).add(items=NewVectors(["silent"], given[:1]), users=NewVectors(["quiet"], given[1:]))
    report = Repository(folder).add(retrain=True)
    store = EmbeddingStore.open(folder)
    kept = torch.cat([store.get("item", ["silent"]), store.get("user", ["quiet"])])
    assert torch.equal(kept[:, :16], given)
    assert (report["users_changed"], report["items_changed"]) == (store.count("user") - 1, store.count("item") - 1)
    check_codes(folder)
    # The measured error is that of the two, not of what was trained.
    for kind, vectors in (("item", given[:1]), ("user", given[1:])):
        mq = MQTokenizerModel.from_pretrained(folder / f"mq_{kind}")
        noted = json.loads((folder / "additions.json").read_text())[kind]
        assert noted == {"count": 1, "reconstruction_error": pytest.approx(mq.reconstruction_error(vectors), rel=1e-5)}


def test_given_item_vectors_are_not_retrained(repository):
    metrics = json.loads((repository / "metrics.json").read_text())
    metrics["epochs"]["collaborative"] = 0
    (repository / "metrics.json").write_text(json.dumps(metrics))
    before = contents(repository)
    with pytest.raises(ValueError, match="were given and not trained, so they cannot be retrained"):
        Repository(repository).add(retrain=True)
    assert contents(repository) == before


def test_a_withdrawal_is_no_metadata(repository):
    item = EmbeddingStore.open(repository).ids("item")[0]
    for given in (
        {"metadata": {item: {"withdrawn": False}}},
        {"items": NewVectors([item], torch.ones(1, 16), [{"withdrawn": True}])},
    ):
        with pytest.raises(ValueError, match="'withdrawn' are not to be given; withdraw items with `remove`"):
            Repository(repository).add(**given)


def test_ids_that_are_numbers_become_text(repository):
    item = EmbeddingStore.open(repository).ids("item")[0]
    pairs = Dataset.from_dict({"user_id": ["10", "10", "10"], "item_id": pa.array([43, 44, 44]).to_pylist()})
    Repository(repository).add(items=NewVectors(np.array([43, 44]), torch.eye(2, 16)), interactions=pairs)
    Repository(repository).add(interactions=Dataset.from_dict({"user_id": [11, 11], "item_id": ["43", item]}))
    store = EmbeddingStore.open(repository)
    assert store.seen(["10", "11"]) == [["43", "44"], ["43", item]]
    assert all(check.passed is not False for check in Repository(repository).verify())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"items": NewVectors(["a"], torch.ones(1, 5))},
            "item vectors have shape \\[1, 5\\] but those of .* have 16 dimensions",
        ),
        ({"items": NewVectors(["a", "b\tc"], torch.ones(2, 16))}, "contains the character"),
        ({"items": NewVectors(["a"], torch.full((1, 16), torch.nan))}, "vector of item 'a' holds NaN"),
        (
            {"users": NewVectors(["a", "b"], torch.eye(2, 16).flip(0) * torch.tensor([[1.0], [0]]))},
            "user 'b' is all zeros",
        ),
        ({"items": NewVectors(["a", None], torch.ones(2, 16))}, "row 2 has no item id"),
        ({"interactions": Dataset.from_dict({"user_id": ["u", None], "item_id": ["a", "b"]})}, "row 2 has no user id"),
        ({"interactions": Dataset.from_dict({"user_id": ["u"], "item_id": [math.nan]})}, "row 1 has no item id"),
        ({"items": NewVectors(["a"], torch.ones(1, 16), [{"b c": 1}])}, "metadata name 'b c'"),
        ({"interactions": interactions(("lost", "nowhere"))}, "user 'lost' has no interaction that leads to a known"),
        ({"interactions": interactions(("u", "<v1-3>"))}, "begins like a code token|leads to a known"),
    ],
)
def test_an_error_is_named_and_changes_nothing(repository, arguments, message):
    before = contents(repository)
    with pytest.raises(ValueError, match=message):
        Repository(repository).add(**arguments)
    assert contents(repository) == before


def test_nothing_is_added_to_a_store_of_another_mq_tokenizer(repository):
    store = EmbeddingStore.open(repository)
    store.space_ids["item"] = "0123456789abcdef"
    store.save_pretrained(repository / "store")
    before = contents(repository)
    with pytest.raises(ValueError, match="0123456789abcdef"):
        Repository(repository).add(items=NewVectors(["a"], torch.ones(1, 16)))
    assert contents(repository) == before


def test_an_error_after_the_store_has_changed_changes_nothing(repository, monkeypatch):
    before = contents(repository)

    def failing(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "_update_codes", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        Repository(repository).add(items=NewVectors(["a"], torch.ones(1, 16)))
    assert contents(repository) == before


def test_a_repository_without_users_takes_vectors_only(repository, tmp_path):
    EmbeddingStore.open(repository).save_pretrained(repository / "store", include_users=False)
    item = EmbeddingStore.open(repository).ids("item")[0]
    with pytest.raises(ValueError, match="has no interactions of users .* supply vectors instead"):
        Repository(repository).add(interactions=interactions(("u", item)))


def test_the_error_of_additions_is_their_mean(repository):
    mq, dim = MQTokenizerModel.from_pretrained(repository / "mq_item"), EmbeddingStore.open(repository).embedding_dim
    vectors = torch.randn(4, dim, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[9.0], [1.0], [1.0], [1.0]]
    )
    for ids, part in ((["one"], vectors[:1]), (["two", "three", "four"], vectors[1:])):
        Repository(repository).add(items=NewVectors(ids, part))
    found = json.loads((repository / "additions.json").read_text())["item"]
    assert found == {"count": 4, "reconstruction_error": pytest.approx(mq.reconstruction_error(vectors), rel=1e-5)}


def test_info_counts_additions_and_tells_when_to_retrain(repository):
    assert Repository(repository).info()["retraining_due"] == []
    store = EmbeddingStore.open(repository)
    spread = store.vectors("user")[:, :16].std() * 30
    far = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * spread
    Repository(repository).add(users=NewVectors(["far-1", "far-2", "far-3"], far))
    told = Repository(repository).info()
    assert told["additions"]["user"]["count"] == 3
    [reason] = told["retraining_due"]
    assert reason.startswith("the codes of new users lose") and "in training" in reason
    near = store.get("item", store.ids("item")[:100])
    Repository(repository).add(items=NewVectors([f"copy-{i}" for i in range(100)], near))
    assert "100 items were added to 300" in Repository(repository).info()["retraining_due"]


def test_a_repository_without_measurements_takes_additions_but_cannot_be_retrained(repository):
    (repository / "metrics.json").unlink()
    shutil.rmtree(repository / "training")
    Repository(repository).add(items=NewVectors(["a"], torch.ones(1, 16)))
    told = Repository(repository).info()
    assert told["additions"]["item"]["count"] == 1 and told["retraining_due"] == []
    with pytest.raises(ValueError, match="has no metrics.json.*; add without retraining"):
        Repository(repository).add(retrain=True)


def test_additions_of_another_type_are_named(repository):
    before = contents(repository)
    ones = [[1.0] * 16]
    for given, error, message in (
        ({"items": {"a": ones[0]}}, TypeError, "items must be NewVectors"),
        (
            {"interactions": [{"user_id": "u", "item_id": "i"}]},
            TypeError,
            "interactions must be a Dataset .*not a list",
        ),
        (
            {"items": NewVectors(["a"], torch.ones(16))},
            ValueError,
            r"item vectors have shape \[16\] but .* 16 dimensions",
        ),
        ({"items": NewVectors(["a"], np.ones((1, 3)))}, ValueError, r"item vectors have shape \[1, 3\] but"),
    ):
        with pytest.raises(error, match=message):
            Repository(repository).add(**given)
    assert contents(repository) == before
    Repository(repository).add(items=NewVectors(["a"], np.array(ones)), users=NewVectors(["b"], ones))
    assert EmbeddingStore.open(repository).get("item", ["a"]).tolist() == ones


@pytest.mark.parametrize(("error", "is_due"), [(0.15, False), (0.25, True)])
def test_codes_that_lost_almost_nothing_in_training_may_lose_a_little(repository, error, is_due):
    metrics = json.loads((repository / "metrics.json").read_text())
    metrics["codes"]["item"]["reconstruction_error"] = 0.001
    (repository / "metrics.json").write_text(json.dumps(metrics))
    (repository / "additions.json").write_text(json.dumps({"item": {"count": 1, "reconstruction_error": error}}))
    assert bool(Repository(repository).info()["retraining_due"]) == is_due


def test_codes_of_cold_start_items_of_fism_are_no_reason_to_retrain(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    store = EmbeddingStore.open(folder)
    far = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * 30
    Repository(folder).add(items=NewVectors(["far-1", "far-2"], far))
    assert Repository(folder).info()["additions"]["item"]["reconstruction_error"] > 1
    assert Repository(folder).info()["retraining_due"] == []
    Repository(folder).add(users=NewVectors(["far"], 30 * store.vectors("user")[:1]))
    assert Repository(folder).info()["retraining_due"][0].startswith("the codes of new users lose")


def test_the_error_of_the_training_vectors_is_that_of_the_training(trained_repository):
    store = EmbeddingStore.open(trained_repository)
    codes = json.loads((trained_repository / "metrics.json").read_text())["codes"]
    for kind in ("user", "item"):
        mq = MQTokenizerModel.from_pretrained(trained_repository / f"mq_{kind}")
        error = mq.reconstruction_error(store.vectors(kind))
        assert error == pytest.approx(codes[kind]["reconstruction_error"], rel=1e-3)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 2)])
def test_vectors_and_metadata_are_read_from_parquet(tmp_path, kind):
    table = pa.table(
        {"item_id": ["a", "b"], "embedding": pa.array([[1.0, 2.0], [3.0, 4.0]], kind), "genre": ["x", None]}
    )
    pq.write_table(table, tmp_path / "items.parquet")
    found = read_vectors(tmp_path / "items.parquet", "item")
    assert found.ids == ["a", "b"] and found.vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.vectors.dtype == torch.float32 and found.metadata == [{"genre": "x"}, {}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"], "vector": [[1.0]]}, "columns name, vector, so it is not clear which holds the ids"),
        ({"id": ["a"], "item_id": ["a"], "vector": [[1.0]]}, "not clear which holds the ids"),
        ({"id": ["a"], "numbers": [[1.0]]}, "which holds the vectors; name exactly one vector or embedding"),
        ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, "does not hold one vector of the same length in each row"),
        ({"id": ["a", "b"], "vector": [[1.0], None]}, "does not hold one vector of the same length in each row"),
        ({"id": ["a"], "vector": ["x"]}, "'vector' holds string but must hold lists of numbers"),
        ({"id": ["a"], "vector": [["x"]]}, "'vector' holds list<.*string> but must hold lists of numbers"),
        ({"id": ["a", "b"], "vector": [[1.0], [1e300]]}, "vector of row 2 has a value that is missing or no float32"),
        ({"id": ["a", "b"], "vector": [[None], [1.0]]}, "vector of row 1 has a value that is missing or no float32"),
        ({"id": ["a"], "vector": [[1.0]], "withdrawn": [True]}, "has a column 'withdrawn'; drop it"),
    ],
)
def test_files_that_are_not_vectors_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "x.parquet", "item")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*x.parquet"):
        read_vectors(tmp_path / "x.parquet", "item")
    (tmp_path / "x.parquet").write_text("id,vector")
    with pytest.raises(ValueError, match="is no Parquet file"):
        read_vectors(tmp_path / "x.parquet", "item")
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]], "age": [3]}), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="has the column 'age' besides ids and vectors; only items have metadata"):
        read_vectors(tmp_path / "u.parquet", "user")


def test_any_column_that_describes_items_stands_beside_vectors_as_in_a_table_of_items(tmp_path):
    columns = {
        "id": ["a", "b"],
        "in stock": [True, None],
        "tags": [["x", "y"], []],
        "released": pa.array([datetime.datetime(2024, 5, 17), None], pa.timestamp("us")),
        "price": pa.array([Decimal("1.50"), None]),
        "isbn": ["007", "1"],
    }
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    pq.write_table(pa.table({**columns, "vector": [[1.0], [2.0]]}), tmp_path / "vectors.parquet")
    expected = [
        {"in_stock": True, "tags": "x, y", "released": "2024-05-17", "price": 1.5, "isbn": "007"},
        {"isbn": "1"},
    ]
    assert read_items(tmp_path / "items.parquet")[1] == expected
    assert read_vectors(tmp_path / "vectors.parquet", "item").metadata == expected


@pytest.mark.parametrize(
    "column", [pa.array([7.0, 8.0]), pa.array([7, 8]), pa.array(["7", "8"]), pa.array(["7.0", "8.0"])]
)
def test_ids_of_vectors_are_text_as_those_of_interactions(tmp_path, column):
    pq.write_table(pa.table({"id": column, "vector": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    assert read_vectors(tmp_path / "x.parquet", "item").ids == ["7", "8"]


def test_a_vector_without_an_id_is_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a", None], "vector": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: row 2 has no id"):
        read_vectors(tmp_path / "x.parquet", "item")
