import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from repository_checks import check_codes, contents, interactions

from tokenrec_hf import EmbeddingStore, NewVectors, Recommender, Repository, TokenRecTokenizer
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.modeling_collaborative import LightGCNModel
from tokenrec_hf.repository import update as module


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
    assert Repository(repository).remove(users=[name]) == {"users": 1, "items": 0}
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


def test_an_interrupted_deletion_is_completed_by_the_next_call(repository, monkeypatch):
    """A process that stops after the records of the training have changed leaves users that can be removed again."""
    users = EmbeddingStore.open(repository).ids("user")[:2]
    forget = module._forget_interactions

    def stopping(changed, staged, users):
        if changed.folder == repository:
            raise KeyboardInterrupt
        forget(changed, staged, users)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_forget_interactions", stopping)
        Repository(repository).remove(users=users)
    selection = EmbeddingStore.open(repository / "training" / "selection")
    assert not selection.contains("user", users).any() and EmbeddingStore.open(repository).contains("user", users).all()
    Repository(repository).remove(users=users)
    assert not EmbeddingStore.open(repository).contains("user", users).any()
    check_codes(repository)


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


def test_removing_an_unknown_user_changes_nothing(repository):
    before = contents(repository)
    with pytest.raises(ValueError, match="user 'nobody' is not in the store of .*; nothing was removed"):
        Repository(repository).remove(users=[EmbeddingStore.open(repository).ids("user")[0], "nobody"])
    after = contents(repository)
    after.pop(next(path for path in after if path.name == ".update.lock"))
    assert after == before
