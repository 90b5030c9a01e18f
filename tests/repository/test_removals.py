import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from repository_checks import check_codes, contents, interactions
from tiny_repository import write_tiny_repository

from tokenrec_hf import EmbeddingStore, NewVectors, Recommender, Repository, TokenRecTokenizer
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.modeling_collaborative import LightGCNModel


@pytest.fixture
def repository(trained_repository, tmp_path):
    """A copy of the trained repository, to be changed."""
    return shutil.copytree(trained_repository, tmp_path / "repository")


def test_nothing_of_a_deleted_user_is_left_in_any_file(repository):
    store = EmbeddingStore.open(repository)
    name = "somebody-with-a-long-name"
    Repository(repository).add(
        interactions=interactions(*((name, item) for item in store.seen(store.ids("user")[:1])[0])),
        retrain=True,
    )
    table = pq.read_table(repository / "training" / "interactions" / "train.parquet")
    extra = pa.Table.from_pylist([{**table.slice(0, 1).to_pylist()[0], "user_id": name}], schema=table.schema)
    pq.write_table(pa.concat_tables([table, extra]), repository / "training" / "interactions" / "train.parquet")
    vector = EmbeddingStore.open(repository).get("user", [name])[0, :2].numpy().tobytes()
    model = LightGCNModel.from_pretrained(repository / "collaborative")
    row = int(load_indexes(repository / "collaborative" / "ids.safetensors")["user"].rows([name])[0])
    table_row = model.user_table.weight[row, :2].detach().numpy().tobytes()
    edges = int((model.edge_users == row).sum())

    def traces():
        data = contents(repository).values()
        return [any(trace in one for one in data) for trace in (name.encode(), vector, table_row)]

    assert traces() == [True, True, True]
    done = Repository(repository).remove(users=[name])
    assert done == {"users": 1, "items": 0, "not_found": {"user": [], "item": []}}
    assert traces() == [False, False, False]
    left = LightGCNModel.from_pretrained(repository / "collaborative")
    assert left.config.num_users == model.config.num_users - 1
    assert left.config.num_interactions == model.config.num_interactions - edges and edges > 0
    rows = np.delete(np.arange(model.config.num_users), row)
    assert torch.equal(left.user_table.weight, model.user_table.weight[rows])
    assert torch.equal(left.item_table.weight, model.item_table.weight)
    check_codes(repository)
    Recommender.from_pretrained(repository).recommend(EmbeddingStore.open(repository).ids("user")[:2])


def test_users_of_the_training_leave_its_records_too(repository):
    users = EmbeddingStore.open(repository).ids("user")[:2]
    Repository(repository).remove(users=users)
    for folder in (repository, repository / "training" / "selection"):
        assert not EmbeddingStore.open(folder).contains("user", users).any()
        assert not set(users) & set(TokenRecTokenizer.from_pretrained(folder).ids("user"))
    for path in (repository / "training" / "interactions").glob("*.parquet"):
        assert not set(users) & set(pq.read_table(path)["user_id"].to_pylist())


def test_a_withdrawn_item_stays_withdrawn(repository):
    store = EmbeddingStore.open(repository)
    user, other = store.ids("user")[:2]
    item = Recommender.from_pretrained(repository).recommend([user], top_k=1)[0][0]["item"]
    Repository(repository).remove(items=[item])
    Repository(repository).add(
        interactions=interactions((other, item)), items=NewVectors([item], store.get("item", [item]))
    )
    recommender = Recommender.from_pretrained(repository)
    assert item not in {row["item"] for row in recommender.recommend([user], top_k=1_000)[0]}
    # Histories may go on to name it.
    assert recommender.store.seen([other])[0][-1] == item
    recommender.recommend([other])


def test_removing_again_or_what_was_never_there_is_no_error(repository):
    users = EmbeddingStore.open(repository).ids("user")[:2]
    assert Repository(repository).remove(users=users[:1])["users"] == 1
    done = Repository(repository).remove(users=[*users, "nobody"], items=["nothing"])
    assert done == {"users": 1, "items": 0, "not_found": {"user": [users[0], "nobody"], "item": ["nothing"]}}
    check_codes(repository)


def test_ids_that_only_some_of_the_files_know_are_removed_from_these(repository):
    """As a removal by an earlier version may have left them, which was interrupted."""
    user = EmbeddingStore.open(repository).ids("user")[0]
    store = EmbeddingStore.open(repository)
    store.delete("user", [user])
    store.save_pretrained(repository / "store")
    assert Repository(repository).remove(users=[user])["users"] == 0
    assert user not in TokenRecTokenizer.from_pretrained(repository).ids("user")
    for path in (repository / "training" / "interactions").glob("*.parquet"):
        assert user not in pq.read_table(path)["user_id"].to_pylist()


def test_users_are_deleted_where_there_was_no_refit(tmp_path):
    write_tiny_repository(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "training" / "selection")
    assert Repository(tmp_path / "tiny").remove(users=["u0"])["users"] == 1
    assert all(check.passed for check in Repository(tmp_path / "tiny").verify())


@pytest.mark.parametrize("kind", [np.array, pd.Series])
def test_ids_may_be_an_array(repository, kind):
    store = EmbeddingStore.open(repository)
    users, items = store.ids("user")[:2], store.ids("item")[:1]
    done = Repository(repository).remove(users=kind(users), items=kind(items))
    assert (done["users"], done["items"]) == (2, 1) and not EmbeddingStore.open(repository).contains(
        "user", users
    ).any()


@pytest.mark.parametrize("arguments", [{"users": "u002"}, {"items": "f001"}, {"users": [3]}])
def test_what_is_no_list_of_ids_is_refused(repository, arguments):
    before = contents(repository)
    with pytest.raises(ValueError, match="must be a list of ids"):
        Repository(repository).remove(**arguments)
    assert contents(repository) == before
