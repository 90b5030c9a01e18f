import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from tokenrec_hf import (
    EmbeddingStore,
    LightGCNModel,
    MatrixFactorizationConfig,
    MatrixFactorizationModel,
    NewVectors,
    Repository,
    TokenRecTokenizer,
    temporal_split,
)
from tokenrec_hf.cli.app import main
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import index_splits
from tokenrec_hf.evaluation.variants import VARIANTS
from tokenrec_hf.models.codes import load_indexes
from tokenrec_hf.models.prompts import HISTORY_TEMPLATES, render
from tokenrec_hf.repository import audit as module
from tokenrec_hf.repository.audit import named_items

USER = "u007"
RUNS = {"selection": "training/selection", "refit": "."}
NAMES = {
    *(("data", name) for name in ("splits", "order", "fingerprint")),
    *((run, name) for run in RUNS for name in ("collaborative", "seen", "vectors", "codes", "prompts")),
}


@pytest.fixture
def repository(trained_repository, tmp_path):
    """A copy of the trained repository, to be doctored."""
    return shutil.copytree(trained_repository, tmp_path / "repository")


def outcomes(folder, passed):
    """The findings of the checks with this outcome."""
    return {(one.run, one.name): one.finding for one in Repository(folder).audit() if one.passed is passed}


def item_of(folder, split):
    """The item of `USER` in a split."""
    table = pq.read_table(folder / "training" / "interactions" / f"{split}.parquet").to_pylist()
    return next(row["item_id"] for row in table if row["user_id"] == USER)


def rewrite(folder, change):
    """Replaces the rows of the splits by what `change` makes of them, by name."""
    paths = {name: folder / "training" / "interactions" / f"{name}.parquet" for name in ("train", "validation", "test")}
    tables = {name: pq.read_table(path) for name, path in paths.items()}
    rows = {name: table.to_pylist() for name, table in tables.items()}
    change(rows)
    for name, path in paths.items():
        pq.write_table(pa.Table.from_pylist(rows[name]), path)


def with_edge(folder, item):
    """Replaces the last edge of the collaborative model by one from `USER` to `item`."""
    model = LightGCNModel.from_pretrained(folder / "collaborative")
    ids = load_indexes(folder / "collaborative" / "ids.safetensors")
    model.edge_users[-1], model.edge_items[-1] = int(ids["user"].rows([USER])[0]), int(ids["item"].rows([item])[0])
    model.save_pretrained(folder / "collaborative")


def change_store(folder, change):
    store = EmbeddingStore.open(folder / "store")
    change(store)
    store.save_pretrained(folder / "store")


def interactions(*pairs):
    return Dataset.from_dict({"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]})


# A clean repository ----------------------------------------------------------------------------------------------------


def test_a_clean_repository_passes_every_check(trained_repository, demo_splits):
    passed = outcomes(trained_repository, True)
    assert set(passed) == NAMES
    sizes = {name: len(split) for name, split in demo_splits.items()}
    assert f"the {sizes['train']} pairs of train, no more" in passed["selection", "collaborative"]
    assert f"none of the {sizes['validation'] + sizes['test']} of validation and test" in passed["selection", "seen"]
    assert f"the {sizes['train'] + 1000} pairs of train + validation, no more" in passed["refit", "collaborative"]
    assert "1300 users and items" in passed["refit", "vectors"] and "1300 users and items" in passed["refit", "codes"]
    assert f"timestamps of {sum(sizes.values())} interactions" in passed["data", "order"]


def test_a_repository_without_refit_passes(repository):
    shutil.copytree(repository / "training" / "selection", repository, dirs_exist_ok=True)
    shutil.rmtree(repository / "training" / "selection")
    settings = json.loads((repository / "training" / "run.json").read_text())
    (repository / "training" / "run.json").write_text(json.dumps({**settings, "refit": False}))
    checks = Repository(repository).audit()
    assert all(check.passed for check in checks)
    # The one model is asked for validation and for test items.
    assert [check.name for check in checks if check.run == "selection"].count("prompts") == 2


# Leaks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "split"), [("selection", "validation"), ("selection", "test"), ("refit", "test")])
def test_an_edge_to_a_held_out_item_is_found(repository, run, split):
    item = item_of(repository, split)
    with_edge(repository / RUNS[run], item)
    failed = outcomes(repository, False)
    # The vectors that the store holds are then not those of this graph either.
    assert set(failed) == {(run, "collaborative"), (run, "vectors")}
    assert f"user '{USER}' and item '{item}'" in failed[run, "collaborative"]


def test_an_edge_from_nowhere_is_found(repository):
    seen = EmbeddingStore.open(repository).seen([USER])[0]
    other = next(item for item in EmbeddingStore.open(repository).ids("item") if item not in seen)
    assert other != item_of(repository, "test")
    with_edge(repository, other)
    assert "lack 1 of the" in outcomes(repository, False)["refit", "collaborative"]


@pytest.mark.parametrize("run", RUNS)
def test_a_target_among_the_seen_items_is_found(repository, run):
    item = item_of(repository, "test")
    change_store(repository / RUNS[run], lambda store: store.add_seen([USER], [[item]]))
    failed = outcomes(repository, False)
    assert set(failed) == {(run, "seen")}
    assert f"user '{USER}' and item '{item}'" in failed[run, "seen"]


@pytest.mark.parametrize(("cut", "says"), [(1, "lack 1 of the"), (None, "1 more than the")])
def test_seen_items_that_are_too_few_or_too_many_are_found(repository, cut, says):
    store = EmbeddingStore.open(repository)
    seen = store.seen([USER])[0]
    others = (item for item in store.ids("item") if item not in {*seen, item_of(repository, "test")})
    changed = seen[cut:] if cut else [*seen, next(others)]
    change_store(repository, lambda store: store.set_seen([USER], [changed]))
    failed = outcomes(repository, False)
    assert set(failed) == {("refit", "seen")} and says in failed["refit", "seen"]


def swap_targets(rows):
    at = {
        name: next(i for i, row in enumerate(rows[name]) if row["user_id"] == USER) for name in ("validation", "test")
    }
    one, two = rows["validation"], rows["test"]
    one[at["validation"]], two[at["test"]] = two[at["test"]], one[at["validation"]]


def test_a_test_item_that_is_not_the_last_one_is_found(repository):
    rewrite(repository, swap_targets)
    failed = outcomes(repository, False)
    assert set(failed) == {
        ("data", "order"), ("data", "fingerprint"), ("refit", "collaborative"), ("refit", "seen")
    }  # fmt: skip
    assert f"go back 1 times, first for user '{USER}'" in failed["data", "order"]


def test_a_split_in_time_is_checked_to_be_one(demo_splits):
    """Of leave-one-out splits, some training interactions are later than the test items of others."""
    assert "go back" not in module._order(module._Data(demo_splits), None)[1]
    passed, finding = module._order(module._Data(demo_splits), "0.8")
    assert passed is False and "split at 0.8, but the last training or validation interaction" in finding
    interactions = Dataset(pa.concat_tables([split.with_format("arrow")[:] for split in demo_splits.values()]))
    passed, finding = module._order(module._Data(temporal_split(interactions, 0.8)), "0.8")
    assert passed and finding.endswith("All that is trained on is earlier than the first test item (split at 0.8).")


def test_without_timestamps_a_swapped_target_is_found_by_the_fingerprint(repository):
    def forget(rows):
        for split in rows.values():
            for row in split:
                del row["timestamp"]

    rewrite(repository, forget)
    assert set(outcomes(repository, None)) == {("data", "order")}
    assert not outcomes(repository, False)
    rewrite(repository, swap_targets)
    assert ("data", "fingerprint") in outcomes(repository, False)


def test_a_test_item_that_is_trained_on_too_is_found_in_splits_and_prompts(repository):
    item = item_of(repository, "test")
    rewrite(repository, lambda rows: rows["train"].append({**rows["train"][-1], "user_id": USER, "item_id": item}))
    failed = outcomes(repository, False)
    assert f"user '{USER}' and item '{item}'" in failed["data", "splits"]
    assert f"name the test items of 1 of them, such as user '{USER}'" in failed["refit", "prompts"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows["test"].pop(), "there are 1000 and 999 of them"),
        (lambda rows: rows["test"].append({**rows["test"][0], "item_id": "other"}), "there are 1000 and 1001 of them"),
        (lambda rows: rows.update(train=[row for row in rows["train"] if row["user_id"] != USER]), "only held-out items"),
    ],
)  # fmt: skip
def test_splits_that_are_not_leave_one_out_are_found(demo_splits, change, says):
    rows = {name: split.to_list() for name, split in demo_splits.items()}
    change(rows)
    passed, finding = module._splits(module._Data({name: Dataset.from_list(split) for name, split in rows.items()}))
    assert passed is False and says in finding


def test_a_vector_from_elsewhere_is_found(repository):
    vector = torch.randn(1, EmbeddingStore.open(repository).embedding_dim)
    change_store(repository, lambda store: store.upsert("item", ["f010"], vector))
    failed = outcomes(repository, False)
    assert "item 'f010'" in failed["refit", "vectors"]
    # Its codes are still those of the vector before.
    assert set(failed) <= {("refit", "vectors"), ("refit", "codes")}


def test_vectors_may_be_stored_in_another_order_than_the_model_has(repository):
    def move_to_the_end(store):
        vector = store.get("item", ["f010"])
        store.delete("item", ["f010"])
        store.upsert("item", ["f010"], vector)

    change_store(repository, move_to_the_end)
    assert "1300 users and items" in outcomes(repository, True)["refit", "vectors"]


def test_a_vector_that_training_went_on_with_is_found(repository):
    store = EmbeddingStore.open(repository)
    vectors = store.vectors("user") * 1.01
    change_store(repository, lambda store: store.upsert("user", store.ids("user"), vectors))
    assert "1000 of 1300" in outcomes(repository, False)["refit", "vectors"]


@pytest.mark.parametrize("kind", ["user", "item"])
def test_a_wrong_code_is_found(repository, kind):
    tables = load_file(repository / "codes.safetensors")
    tables[f"{kind}.codes"][5, 1] ^= 1
    save_file(tables, repository / "codes.safetensors")
    failed = outcomes(repository, False)
    assert set(failed) == {("refit", "codes")}
    named = TokenRecTokenizer.from_pretrained(repository).ids(kind)[5]
    assert f"1 of 1300 users and items, such as {kind} '{named}'," in failed["refit", "codes"]


def test_a_wrong_learned_part_of_an_item_is_found(fism_repository, tmp_path):
    folder = shutil.copytree(fism_repository, tmp_path / "repository")
    assert not outcomes(folder, False)

    def change(store):
        vectors = store.get("item", store.ids("item")[7:8])
        vectors[:, -1] += 0.5
        store.upsert("item", store.ids("item")[7:8], vectors)

    change_store(folder, change)
    failed = outcomes(folder, False)
    named = TokenRecTokenizer.from_pretrained(folder).ids("item")[7]
    assert set(failed) == {("selection", "codes")} and f"such as item '{named}'," in failed["selection", "codes"]


def test_an_mq_tokenizer_of_another_run_is_found(repository):
    shutil.copytree(repository / "training" / "selection" / "mq_item", repository / "mq_item", dirs_exist_ok=True)
    failed = outcomes(repository, False)
    assert set(failed) == {("refit", "codes")} and "the item MQ-Tokenizer" in failed["refit", "codes"]


def test_prompts_that_show_the_target_are_found(trained_repository, monkeypatch):
    honest = module.index_splits

    def leaking(splits, evaluate_on):
        """As if a history went to the very end."""
        data = honest(splits, evaluate_on)
        later = honest({**splits, "validation": splits["test"], "test": splits["validation"]}, "test")
        assert data.user_ids == later.user_ids
        data.interactions = later.interactions if evaluate_on == "test" else data.interactions
        return data

    monkeypatch.setattr(module, "index_splits", leaking)
    failed = outcomes(trained_repository, False)
    assert set(failed) == {("refit", "prompts")}
    assert re.search(r"the test items of [1-9]\d\d of them", failed["refit", "prompts"])


@pytest.mark.parametrize("name", [name for name, one in VARIANTS.items() if one.templates[0].uses_history])
def test_all_wordings_of_each_kind_of_prompts_are_checked(trained_repository, monkeypatch, name):
    splits, honest = Repository(trained_repository).splits(), module.evaluation_collator
    later = index_splits({**splits, "validation": splits["test"], "test": splits["validation"]}, "test")

    def leaking(tokenizer, data, prompts, templates):
        """As if the histories of this kind of prompts went to the very end."""
        if templates == VARIANTS[name].templates and len(data.interactions) == len(later.interactions):
            data = replace(data, interactions=later.interactions)
        return honest(tokenizer, data, prompts, templates)

    monkeypatch.setattr(module, "evaluation_collator", leaking)
    failed = outcomes(trained_repository, False)
    assert set(failed) == {("refit", "prompts")} and "the test items of" in failed["refit", "prompts"]


def test_prompts_that_show_what_was_never_in_the_history_are_found(trained_repository, monkeypatch):
    honest = module.evaluation_collator

    def strange(tokenizer, data, prompts, templates):
        """As if one user had an item more."""
        known, user = data.interactions, 7
        other = np.setdiff1d(
            np.arange(known.num_items), [*known.of(user), *data.holdout.targets[data.holdout.users == user]]
        )
        users, items = np.append(known.users, user), np.append(known.items, other[0])
        return honest(
            tokenizer,
            replace(data, interactions=InteractionMatrix(users, items, known.num_users, known.num_items)),
            prompts,
            templates,
        )

    monkeypatch.setattr(module, "evaluation_collator", strange)
    failed = outcomes(trained_repository, False)
    assert "name 1 items that were not in the history before the test item, such as for" in failed["refit", "prompts"]
    assert failed["refit", "prompts"].endswith(f"user {EmbeddingStore.open(trained_repository).ids('user')[7]!r}.")


def test_items_are_read_back_from_prompts_as_the_tokenizer_wrote_them(trained_repository):
    tokenizer = TokenRecTokenizer.from_pretrained(trained_repository)
    histories = [["f010", "f002"], [], ["f100"], ["f003", "f004", "f005"]]
    prompts = [render(template, USER, history) for template, history in zip(HISTORY_TEMPLATES, histories)]
    ids = tokenizer(prompts, padding=True, return_tensors="np")["input_ids"]
    rows, codes = named_items(ids, tokenizer.code_token_ids("item"))
    assert rows.tolist() == [0, 0, 2, 3, 3, 3]
    assert codes.tolist() == tokenizer.codes("item", [item for history in histories for item in history]).tolist()
    # Half an item is no item.
    start = int(np.flatnonzero(ids[2] == tokenizer.code_token_ids("item")[0, codes[2, 0]])[0])
    ids[2, start + 1] = tokenizer.pad_token_id
    assert named_items(ids, tokenizer.code_token_ids("item"))[1][2].tolist() == [codes[2, 0], -1, codes[2, 2]]


# Matrix factorisation --------------------------------------------------------------------------------------------------


@pytest.fixture
def factorised(repository):
    """The repository with the same vectors from a model without edges."""
    model = LightGCNModel.from_pretrained(repository / "collaborative")
    vectors = model.user_embeddings(), model.item_embeddings()
    sizes = {"num_users": len(vectors[0]), "num_items": len(vectors[1]), "embedding_dim": vectors[0].shape[1]}
    without = MatrixFactorizationModel(MatrixFactorizationConfig(**sizes))
    without.user_table.weight.data, without.item_table.weight.data = vectors
    without.save_pretrained(repository / "collaborative")
    return repository


@pytest.mark.parametrize(
    ("recorded", "passed", "says"),
    [("as it was", True, "is what the record"), (None, None, "no record"), ("0123456789abcdef", False, "is not what")],
)
def test_matrix_factorisation_is_judged_by_the_record_of_its_training(factorised, recorded, passed, says):
    path = factorised / "training" / "refit.json"
    record = json.loads(path.read_text())
    if recorded is None:
        del record["collaborative"]["trained_on"]
    elif recorded != "as it was":
        record["collaborative"]["trained_on"] = recorded
    path.write_text(json.dumps(record))
    assert says in outcomes(factorised, passed)["refit", "collaborative"]
    assert set(outcomes(factorised, True)) >= NAMES - {("refit", "collaborative")}


# After changes ---------------------------------------------------------------------------------------------------------


def test_cold_start_users_and_new_interactions_are_no_leak(repository):
    store = EmbeddingStore.open(repository)
    seen = store.seen([USER])[0]
    other = next(item for item in store.ids("item") if item not in {*seen, item_of(repository, "test")})
    Repository(repository).add(
        interactions=interactions(*(("twin", item) for item in seen), ("twin", "nova"), (USER, other))
    )
    assert set(outcomes(repository, True)) == NAMES
    assert f"and {len(seen) + 2} that were added after the training" in outcomes(repository, True)["refit", "seen"]
    assert "2 were added after the training" in outcomes(repository, True)["refit", "vectors"]


def test_a_test_item_that_was_added_is_one_that_cannot_be_evaluated_on(repository):
    Repository(repository).add(interactions=interactions((USER, item_of(repository, "test"))))
    failed = outcomes(repository, False)
    assert set(failed) == {("refit", "seen")} and "perhaps added after the training" in failed["refit", "seen"]


def test_vectors_that_were_given_cannot_be_told_and_retrained_ones_are_those_of_the_model(repository):
    vector = torch.randn(1, EmbeddingStore.open(repository).embedding_dim)
    Repository(repository).add(items=NewVectors(["f010"], vector))
    assert set(outcomes(repository, None)) == {("refit", "vectors")}
    Repository(repository).add(interactions=interactions(("twin", "f001"), ("twin", "f002")), retrain=True)
    assert not outcomes(repository, None) and not outcomes(repository, False)
    assert "and 2 that were added after the training" in outcomes(repository, True)["refit", "collaborative"]


def test_what_removed_users_took_along_is_no_leak(repository):
    Repository(repository).remove(users=[USER], items=["f010"])
    assert not outcomes(repository, False)
    # With a user's edges go a little of all vectors.
    assert set(outcomes(repository, None)) == {("data", "fingerprint"), ("selection", "vectors"), ("refit", "vectors")}


# The command -----------------------------------------------------------------------------------------------------------


def test_the_command_shows_every_check_and_exits_with_0_or_1(capsys, repository):
    assert main(["evaluate", str(repository), "--audit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("ok ")]) == len(NAMES)
    assert lines[-1] == "No leak was found: 13 ok."
    item = item_of(repository, "test")
    change_store(repository, lambda store: store.add_seen([USER], [[item]]))
    assert main(["evaluate", str(repository), "--audit"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The audit has FAILED: 12 ok, 1 FAILED."
    assert [line.split()[1:3] for line in lines if line.startswith("FAILED")] == [["refit", "seen"]]
    assert main(["evaluate", str(repository), "--audit", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False and len(document["checks"]) == len(NAMES)
    assert [one["name"] for one in document["checks"] if not one["passed"]] == ["seen"]


def test_the_audit_takes_no_prompt_and_no_other_store(capsys):
    for other in (["--unseen-prompt"], ["--store", "elsewhere"]):
        assert main(["evaluate", "out", "--audit", *other]) == 2
    capsys.readouterr()


def test_without_the_interactions_there_is_nothing_to_audit(capsys, repository):
    shutil.rmtree(repository / "training")
    assert main(["evaluate", str(repository), "--audit"]) == 1
    assert "has no train.parquet" in capsys.readouterr().err
