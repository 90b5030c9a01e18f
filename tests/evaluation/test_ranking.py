import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval
from tokenrec_hf.data.demo import demo_interactions
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import index_splits, leave_one_out
from tokenrec_hf.evaluation import ranking as evaluation
from tokenrec_hf.evaluation.baselines import ItemKNN
from tokenrec_hf.evaluation.ranking import (
    calibration,
    encode_prompts,
    evaluate_baselines,
    evaluate_retrieval,
    hit_rates_by_size,
    retrieval_queries,
)
from tokenrec_hf.evaluation.variants import BASELINES, LABELS, VARIANTS
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from tokenrec_hf.models.prompts import (
    HISTORY_ONLY_TEMPLATE,
    HISTORY_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    render,
)
from tokenrec_hf.models.tokenization_tokenrec import TokenRecTokenizer
from tokenrec_hf.repository.build import train
from tokenrec_hf.repository.repository import Repository
from tokenrec_hf.training.recipe import Recipe

TINY = {
    "collaborative.config": {"embedding_dim": 8, "num_layers": 1},
    "collaborative.training.num_train_epochs": 10,
    "mq_tokenizer.config": {"codebook_size": 16, "codebook_dim": 8, "hidden_dim": 16},
    "mq_tokenizer.evaluate_every": 20,
    "mq_tokenizer.training": {"max_steps": 20, "per_device_train_batch_size": 32},
    "prompts": {"max_history": 12, "shuffle_history": False},
    "retrieval.backbone": None,
    "retrieval.num_negatives": 0,
    "retrieval.config": {
        "d_model": 16,
        "d_kv": 8,
        "num_heads": 2,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "projection_dim": 16,
        "loss_type": "softmax",
    },
    "retrieval.training": {"num_train_epochs": 4, "per_device_eval_batch_size": 7, "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small repository, the validation items that it has not seen, and its parts."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    splits = leave_one_out(demo_interactions(seed=3, num_users=48, num_items=60))
    recipe = Recipe.load("paper", overrides=TINY)
    metrics = train(splits, recipe, folder, refit=False).metrics
    return SimpleNamespace(
        folder=folder,
        recipe=recipe,
        metrics=metrics,
        data=index_splits(splits, "validation"),
        store=EmbeddingStore.open(folder / "store"),
        tokenizer=TokenRecTokenizer.from_pretrained(folder),
        model=T5ForGenerativeRetrieval.from_pretrained(folder).eval(),
    )


def naive_metrics(data, scores_of):
    """All metrics of a ranking, user by user, from their definitions; `scores_of(user)` is `[num_items]`."""
    popularity = np.bincount(data.interactions.items, minlength=len(data.item_ids))
    ranks, lists = [], []
    for user, target in zip(data.holdout.users.tolist(), data.holdout.targets.tolist()):
        scores = np.array(scores_of(user), dtype=np.float64)
        scores[data.interactions.of(user)] = -np.inf
        ranks.append(sum(score >= scores[target] for score in scores) - 1)
        lists.append([item for item in np.argsort(-scores, kind="stable").tolist() if scores[item] > -np.inf])
    results = {}
    for k in (10, 20, 30):
        results[f"hr@{k}"] = np.mean([rank < k for rank in ranks])
        results[f"ndcg@{k}"] = np.mean([1 / math.log2(rank + 2) if rank < k else 0 for rank in ranks])
        results[f"mrr@{k}"] = np.mean([1 / (rank + 1) if rank < k else 0 for rank in ranks])
        results[f"coverage@{k}"] = len({item for items in lists for item in items[:k]}) / len(data.item_ids)
        results[f"popularity@{k}"] = np.mean([popularity[items[:k]].mean() for items in lists]) / popularity.max()
    return results


def query(trained, template, user):
    """z of one user, through text, tokenizer and model."""
    history = [trained.data.item_ids[item] for item in trained.data.interactions.of(user)][-12:]
    inputs = trained.tokenizer(render(template, trained.data.user_ids[user], history), return_tensors="pt")
    with torch.no_grad():
        return trained.model.encode_queries(inputs["input_ids"], inputs["attention_mask"])[0]


@pytest.mark.parametrize(
    ("variant", "template"),
    [
        ("tokenrec", HISTORY_TEMPLATES[2]),
        ("tokenrec_user_id_only", USER_ONLY_TEMPLATES[1]),
        ("tokenrec_unseen_prompt", UNSEEN_TEMPLATE),
        ("tokenrec_history_only", HISTORY_ONLY_TEMPLATE),
    ],
)
def test_evaluation_agrees_with_a_loop_over_users_through_text(trained, monkeypatch, variant, template):
    monkeypatch.setitem(VARIANTS, variant, replace(VARIANTS[variant], templates=(template,)))
    items = trained.store.get("item", trained.data.item_ids)

    def cosines(user):
        return torch.cosine_similarity(query(trained, template, user)[None], items).tolist()

    results = evaluate_retrieval(trained.folder, trained.data, trained.recipe.collator_arguments, [variant])[variant]
    expected = naive_metrics(trained.data, cosines)
    assert results == pytest.approx(expected, abs=1e-6)
    assert 0 < results["hr@20"] < 1


def test_prompts_are_encoded_on_an_accelerator_where_there_is_one(trained, monkeypatch):
    # There is none here: a device that every machine has stands for it.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    devices = []

    def encode(model, collator, users, *others):
        devices.append(model.device.type)
        return torch.ones(len(users), model.config.embedding_dim)

    monkeypatch.setattr(evaluation, "encode_prompts", encode)
    evaluate_retrieval(trained.folder, trained.data, trained.recipe.collator_arguments)
    assert devices == ["meta"]


def test_the_baselines_agree_with_a_loop_over_users(trained):
    data = trained.data
    users, items = trained.store.get("user", data.user_ids), trained.store.get("item", data.item_ids)
    popularity = np.bincount(data.interactions.items, minlength=len(data.item_ids))
    results = evaluate_baselines(data, trained.store)
    assert list(results) == list(BASELINES) == ["popularity", "itemknn", "collaborative_dot", "collaborative_cosine"]
    knn = ItemKNN(data.interactions)
    for name, scores_of in {
        "popularity": lambda user: popularity,
        "itemknn": lambda user: knn.scores(np.array([user]))[0].tolist(),
        "collaborative_dot": lambda user: (items @ users[user]).tolist(),
        "collaborative_cosine": lambda user: torch.cosine_similarity(users[user][None], items).tolist(),
    }.items():
        assert results[name] == pytest.approx(naive_metrics(data, scores_of), abs=1e-6), name


def test_with_fism_a_history_alone_is_as_good_as_its_user(fism_repository, demo_splits):
    data = index_splits(demo_splits, "validation")
    prompts = Repository(fism_repository).recipe.collator_arguments
    # The users' codes are replaced for prompts without users, and only for these.
    both = evaluate_retrieval(fism_repository, data, prompts, ["tokenrec_history_only", "tokenrec"])
    known, found = both["tokenrec"], both["tokenrec_history_only"]
    assert found == pytest.approx(known, abs=1e-6)
    # Histories that end earlier make other users of the same people.
    kept = data.interactions.lengths[data.interactions.users] > 0
    kept[data.interactions.indptr[1:] - 1] = False
    shorter = InteractionMatrix(
        data.interactions.users[kept], data.interactions.items[kept], len(data.user_ids), len(data.item_ids)
    )
    cut = replace(data, interactions=shorter)
    other = evaluate_retrieval(fism_repository, cut, prompts, ["tokenrec_history_only", "tokenrec"])
    assert other["tokenrec_history_only"] != pytest.approx(known, abs=1e-3)
    # The user tokens are those of the shorter histories, not the stored ones of the whole histories.
    assert other["tokenrec_history_only"] != pytest.approx(other["tokenrec"], abs=1e-6)


def test_training_reports_what_evaluation_measures(trained):
    for variant in VARIANTS:
        results = evaluate_retrieval(trained.folder, trained.data, trained.recipe.collator_arguments, [variant])
        assert results == {variant: trained.metrics["validation"][variant]}


def test_the_variants_differ_in_their_prompts(trained):
    assert VARIANTS["tokenrec_unseen_prompt"].templates == (UNSEEN_TEMPLATE,)
    assert all(template.uses_history for template in VARIANTS["tokenrec"].templates)
    assert not any(template.uses_history for template in VARIANTS["tokenrec_user_id_only"].templates)
    assert [name for name, variant in VARIANTS.items() if not variant.names_user] == ["tokenrec_history_only"]
    values = [trained.metrics["validation"][variant]["ndcg@30"] for variant in VARIANTS]
    assert len(set(values)) == len(values) == 4


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_queries_come_in_the_order_of_the_users_whatever_the_batch(trained, batch_size):
    collator = DataCollatorForGenerativeRetrieval(
        trained.tokenizer,
        trained.data.interactions,
        trained.data.user_ids,
        trained.data.item_ids,
        evaluation_templates=(UNSEEN_TEMPLATE,),
        max_history=12,
        shuffle_history=False,
    )
    users = np.random.default_rng(0).permutation(len(trained.data.user_ids))[:20]
    # As in the middle of a training: dropout must not reach the queries.
    trained.model.train()
    found = encode_prompts(trained.model, collator, users, batch_size)
    expected = torch.stack([query(trained, UNSEEN_TEMPLATE, user) for user in users.tolist()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_seed_of_the_prompts_draws_the_wordings_of_an_evaluation(trained):
    prompts = trained.recipe.collator_arguments
    first, same, other = (
        retrieval_queries(trained.folder, trained.data, {**prompts, "seed": seed})["tokenrec"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    expected = trained.metrics["validation"]["tokenrec"]
    prompts = trained.recipe.collator_arguments
    found = evaluate_retrieval(trained.folder, trained.data, prompts, batch_size=7)["tokenrec"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_every_row_of_an_evaluation_has_a_label_and_every_variant_but_the_default_a_flag(trained):
    assert list(LABELS) == list(trained.metrics["validation"])
    assert [name for name, variant in VARIANTS.items() if variant.flag is None] == ["tokenrec"]
    assert len({variant.flag for variant in VARIANTS.values()}) == len(VARIANTS)


def test_hit_rates_are_those_of_users_of_similar_size():
    random = np.random.default_rng(0)
    sizes, ranks = random.integers(0, 700, 3000), random.integers(0, 60, 3000)
    found = hit_rates_by_size({"vectors": ranks}, sizes)
    assert list(found) == ["0", "1", "2", "3-5", "6-10", "11-20", "21-50", "51-100", "101-200", "201-500", "from 501"]
    for label, own in found.items():
        first, _, last = label.removeprefix("from ").partition("-")
        longest = int(last or (first if "from" not in label else 10**6))
        members = (int(first) <= sizes) & (sizes <= longest)
        assert own == {"users": members.sum(), "vectors": pytest.approx((ranks[members] < 20).mean())}
    assert list(hit_rates_by_size({"vectors": ranks[:1]}, np.array([7]))) == ["6-10"]


def test_calibration_counts_the_hits_of_the_first_items_by_their_cosines(trained):
    data = trained.data
    users, items = (trained.store.get(kind, ids) for kind, ids in (("user", data.user_ids), ("item", data.item_ids)))
    pairs = []
    for user, target in zip(data.holdout.users, data.holdout.targets):
        scores = torch.cosine_similarity(users[user][None], items)
        scores[data.interactions.of(user)] = -torch.inf
        pairs += [(float(scores[item]), item == target) for item in scores.topk(20).indices]
    pairs.sort(key=lambda pair: pair[0])
    found = calibration(users[data.holdout.users], items, data)
    assert len(found) == 10
    for tenth, own in zip(np.array_split(np.array(pairs, dtype=float), 10), found):
        assert (own["low"], own["high"]) == pytest.approx((tenth[0, 0], tenth[-1, 0]), abs=1e-5)
        assert own["hit_rate"] == pytest.approx(tenth[:, 1].mean(), abs=2e-3)
