import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

from tokenrec_hf.data.collator import DataCollatorForGenerativeRetrieval, PromptDataset
from tokenrec_hf.data.demo import demo_interactions
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.data.splits import Holdout, index_splits, leave_one_out
from tokenrec_hf.evaluation.metrics import evaluate_embeddings
from tokenrec_hf.models.configuration_tokenrec import T5GenerativeRetrievalConfig
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.modeling_collaborative import FISMModel
from tokenrec_hf.models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from tokenrec_hf.training import stages
from tokenrec_hf.training.closed_forms import smooth_tables
from tokenrec_hf.training.initialization import build_tokenizer, entity_tokens, start_from_singular_vectors
from tokenrec_hf.training.recipe import CollaborativeSettings, MQTokenizerSettings, Recipe, RetrievalSettings
from tokenrec_hf.training.stages import (
    SetEpoch,
    StageResult,
    by_history_length,
    train_collaborative,
    train_mq_tokenizer,
    train_retrieval,
)

NUM_USERS, NUM_ITEMS, EACH = 32, 40, 8
USER_IDS, ITEM_IDS = [f"a{row}" for row in range(NUM_USERS)], [f"b{row}" for row in range(NUM_ITEMS)]
# Four steps an epoch, an evaluation and a checkpoint every two of them.
COLLABORATIVE = CollaborativeSettings(
    model="lightgcn",
    config={"embedding_dim": 8, "num_layers": 2, "loss_type": "bpr", "l2_weight": 0.001},
    num_negatives=2,
    evaluate_every=0.5,
    patience=100,
    most_steps=None,
    training={"num_train_epochs": 4, "per_device_train_batch_size": 56, "learning_rate": 0.02},
)
MQ_TOKENIZER = MQTokenizerSettings(
    config={"num_codebooks": 2, "codebook_size": 8, "codebook_dim": 4, "hidden_dim": 16, "mask_ratio": 0.2},
    user_codebooks=None,
    evaluate_every=3,
    training={
        "max_steps": 17,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 0.003,
        "lr_scheduler_type": "constant",
    },
)
RETRIEVAL = RetrievalSettings(
    backbone=None,
    vocabulary=None,
    config={},
    num_negatives=0,
    evaluate_every=0.5,
    patience=100,
    most_steps=None,
    training={
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 0.005,
    },
)


def changed(settings, **fields):
    return settings.model_copy(update=fields)


class FakeMQ:
    """An MQ-Tokenizer whose codes are the vectors themselves."""

    def __init__(self, space_id):
        self.config = SimpleNamespace(num_codebooks=2, codebook_size=8, embedding_dim=2)
        self.space_id = space_id

    def encode(self, vectors):
        return vectors.long()


@pytest.fixture(scope="module")
def data():
    """Interactions with something to learn (each user keeps to a half of the items), and the last one of each held out."""
    random = np.random.default_rng(0)
    items = np.stack([2 * random.permutation(NUM_ITEMS // 2)[:EACH] + user % 2 for user in range(NUM_USERS)])
    users = np.repeat(np.arange(NUM_USERS), EACH - 1)
    interactions = InteractionMatrix(users, items[:, :-1].ravel(), NUM_USERS, NUM_ITEMS)
    return SimpleNamespace(interactions=interactions, holdout=Holdout(np.arange(NUM_USERS), items[:, -1]))


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(100, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    store, random = EmbeddingStore(2), np.random.default_rng(1)
    store.upsert("user", USER_IDS, random.integers(0, 8, (NUM_USERS, 2)).astype(np.float32))
    store.upsert("item", ITEM_IDS, random.integers(0, 8, (NUM_ITEMS, 2)).astype(np.float32))
    return build_tokenizer(user_mq=FakeMQ("users"), item_mq=FakeMQ("items"), store=store)


@pytest.fixture
def run_stage(data, vectors, tokenizer):
    """Runs a stage in a folder, everything made anew as a new process would."""

    def collaborative(folder, model="lightgcn", patience=100, **options):
        settings = changed(COLLABORATIVE, model=model, patience=patience)
        return train_collaborative(data.interactions, settings, folder, seed=1, **options)

    def retrieval(folder, patience=100, settings=RETRIEVAL, pooling="decoder", weight=1.0, **options):
        set_seed(3)
        config = T5GenerativeRetrievalConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            num_heads=2,
            d_ff=32,
            num_layers=1,
            num_decoder_layers=1,
            dropout_rate=0.2,
            embedding_dim=8,
            pooling=pooling,
            loss_type="softmax",
            temperature=0.1,
            history_weight=weight,
            pad_token_id=tokenizer.pad_token_id,
            entity_tokens=entity_tokens(tokenizer),
        )
        model = T5ForGenerativeRetrieval(config)
        if pooling == "history":
            torch.nn.init.normal_(model.user_codewords)
        vectors = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(2))
        model.bind_items(vectors, tokenizer.item_tokens(ITEM_IDS))
        collator = DataCollatorForGenerativeRetrieval(
            tokenizer, data.interactions, USER_IDS, ITEM_IDS, next_items=pooling == "history", seed=1
        )
        return train_retrieval(model, collator, changed(settings, patience=patience), folder, seed=1, **options)

    runs = {
        "lightgcn": collaborative,
        "matrix factorization": lambda folder, **options: collaborative(folder, "matrix_factorization", **options),
        "fism": lambda folder, **options: collaborative(folder, "fism", **options),
        "mq": lambda folder: train_mq_tokenizer(vectors, MQ_TOKENIZER, folder, kind="item", seed=1),
        "retrieval": retrieval,
        "history": lambda folder, **options: retrieval(folder, pooling="history", **options),
    }
    return lambda stage, folder, **options: runs[stage](folder, **options)


class PowerCut(Exception):
    """Stands for a power cut."""


@pytest.fixture
def interrupt_at(monkeypatch):
    """Runs something that is cut short at the end of a step, before anything of that step is saved."""

    def interrupt(step, run):
        with monkeypatch.context() as patch:

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise PowerCut

            patch.setattr(stages.Progress, "on_step_end", on_step_end)
            with pytest.raises(PowerCut):
                run()

    return interrupt


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("lightgcn", "collaborative model"),
        ("fism", "collaborative model"),
        ("mq", "item MQ-Tokenizer"),
        ("retrieval", "T5 retrieval"),
        ("history", "T5 retrieval"),
    ],
)
def test_a_learning_rate_that_breaks_a_model_is_named(run_stage, tmp_path, monkeypatch, stage, name):
    for settings in ("COLLABORATIVE", "MQ_TOKENIZER", "RETRIEVAL"):
        values = globals()[settings]
        broken = changed(values, training={**values.training, "learning_rate": 1e38})
        monkeypatch.setitem(globals(), settings, broken)
    options = {"settings": globals()["RETRIEVAL"]} if name == "T5 retrieval" else {}
    with pytest.raises(
        ValueError, match=rf"{name} are not finite after step \d+, with the learning rate 1e\+38; lower it"
    ):
        run_stage(stage, tmp_path, **options)


@pytest.fixture
def scripted_metrics(monkeypatch):
    """Validation results that are given, one for each state of the model in its order, also across resumptions."""

    def script(values):
        states, seen = [], []

        def evaluate(users, *args, **kwargs):
            state = users.numpy().tobytes()
            if state not in states:
                states.append(state)
                seen.append(values[len(seen)])
            return {"hr@20": 0.5, "ndcg@20": seen[states.index(state)]}

        monkeypatch.setattr(stages, "evaluate_embeddings", evaluate)
        return seen

    return script


def weights(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def checkpoints(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# One epoch of the collaborative models and of T5 has 4 steps; of the MQ-Tokenizer, 7. The first interruption falls into
# the middle of an epoch, the second to just behind a checkpoint at the end of one.
@pytest.mark.parametrize(
    ("stage", "selected"),
    [
        ("lightgcn", True),
        ("lightgcn", False),
        ("matrix factorization", True),
        ("mq", False),
        ("retrieval", True),
        ("retrieval", False),
        ("history", True),
        ("history", False),
    ],
)
def test_an_interrupted_stage_ends_as_if_it_had_not_been(run_stage, interrupt_at, data, tmp_path, stage, selected):
    if stage == "mq":
        options, steps = {}, (5, 10)
    else:
        options, steps = ({"holdout": data.holdout} if selected else {"epochs": 3.25}), (7, 9)
    straight = run_stage(stage, tmp_path / "straight", **options)
    for step in steps:
        interrupt_at(step, lambda: run_stage(stage, tmp_path / "interrupted", **options))
        latest = checkpoints(tmp_path / "interrupted")[-1]
        assert 0 < latest < step
    resumed = run_stage(stage, tmp_path / "interrupted", **options)
    assert_equal_weights(weights(straight), weights(resumed))
    assert resumed.epochs == straight.epochs
    assert resumed.metrics == straight.metrics


@pytest.mark.parametrize(
    ("stage", "options"), [("mq", {}), ("lightgcn", {"epochs": 1.5}), ("lightgcn", {}), ("fism", {})]
)
def test_a_stage_that_was_cut_off_after_its_last_step_does_not_train_on(run_stage, tmp_path, stage, options):
    first = run_stage(stage, tmp_path, **options)
    again = run_stage(stage, tmp_path, **options)
    assert again.epochs == first.epochs
    assert_equal_weights(weights(first), weights(again))


def test_a_fresh_fism_starts_from_singular_vectors_and_a_given_one_as_it_is(data, tmp_path):
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 64, "learning_rate": 0.0}
    config = {"embedding_dim": 8, "half_life": 4}
    settings = changed(COLLABORATIVE, model="fism", config=config, training=training)
    set_seed(1)
    expected = FISMModel.from_interactions(settings.model_configuration(), data.interactions)
    given = weights(StageResult(expected, 0, {}))
    start_from_singular_vectors(expected, data.interactions)
    fresh = train_collaborative(data.interactions, settings, tmp_path / "fresh", epochs=1, seed=1)
    assert_equal_weights(weights(fresh), weights(StageResult(expected, 0, {})))

    expected.load_state_dict(given)
    kept = train_collaborative(data.interactions, settings, tmp_path / "kept", epochs=1, seed=1, start=expected)
    assert_equal_weights(weights(kept), given)


def test_ndcg_of_each_held_out_user_has_the_mean_that_a_stage_reports(data, tmp_path):
    settings = changed(COLLABORATIVE, model="fism", config={"embedding_dim": 8, "half_life": 4})
    found = train_collaborative(data.interactions, settings, tmp_path, holdout=data.holdout, seed=1)
    each = stages.held_out_ndcg(found.model, data.interactions, data.holdout)
    assert each.shape == (len(data.holdout.users),) and float(each.mean()) == pytest.approx(found.metrics["ndcg@20"])
    user, target = data.holdout.users[0], data.holdout.targets[0]
    scores = found.model.user_embeddings()[user] @ found.model.item_embeddings().T
    scores[data.interactions.of(user)] = -torch.inf
    rank = int((scores > scores[target]).sum())
    assert float(each[0]) == pytest.approx(1 / np.log2(rank + 2) if rank < 20 else 0.0)


def test_fism_is_smoothed_after_its_training_and_measured_then(data, tmp_path):
    settings = changed(COLLABORATIVE, model="fism", config={"embedding_dim": 8, "half_life": 4})
    plain = train_collaborative(data.interactions, settings, tmp_path / "plain", holdout=data.holdout, seed=1)
    settings.config.update(history_smoothing=0.5, item_smoothing=0.25)
    found = train_collaborative(data.interactions, settings, tmp_path / "smooth", holdout=data.holdout, seed=1)
    plain.model.config.history_smoothing, plain.model.config.item_smoothing = 0.5, 0.25
    smooth_tables(plain.model, data.interactions.users, data.interactions.items)
    assert_equal_weights(weights(plain), weights(found))
    users, items = found.model.user_embeddings()[data.holdout.users], found.model.item_embeddings()
    seen = data.interactions.of_users(data.holdout.users)
    expected = evaluate_embeddings(users, items, data.holdout.targets, *seen, cosine=False)
    assert {name: found.metrics[name] for name in expected} == expected
    assert found.metrics["ndcg@20"] != plain.metrics["ndcg@20"]


def test_resumption_reads_the_checkpoint(run_stage, interrupt_at, tmp_path, monkeypatch):
    interrupt_at(7, lambda: run_stage("lightgcn", tmp_path, epochs=4))
    steps = []
    monkeypatch.setattr(
        stages.Progress, "on_step_end", lambda self, args, state, *_, **__: steps.append(state.global_step)
    )
    run_stage("lightgcn", tmp_path, epochs=4)
    assert steps[0] == 7
    assert steps[-1] == 16


@pytest.fixture
def weights_at(monkeypatch):
    """Runs something and copies the weights as they are at the end of a step."""

    def run_until(step, run):
        copied = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                copied.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

        with monkeypatch.context() as patch:
            patch.setattr(stages.Progress, "on_step_end", on_step_end)
            return run(), copied

    return run_until


@pytest.mark.parametrize("stage", ["lightgcn", "retrieval"])
def test_training_stops_early_and_keeps_the_best_by_ndcg(
    run_stage, data, scripted_metrics, weights_at, tmp_path, stage
):
    seen = scripted_metrics([0.1, 0.3, 0.2, 0.3, 0.25, 0.9])
    result, best = weights_at(4, lambda: run_stage(stage, tmp_path, patience=3, holdout=data.holdout))
    assert seen == [0.1, 0.3, 0.2, 0.3, 0.25]
    assert result.epochs == 1.0  # the second evaluation, of two an epoch
    assert result.metrics["ndcg@20"] == 0.3
    assert_equal_weights(weights(result), best)


def test_evaluations_are_counted_in_epochs_with_a_limit_of_steps_too(run_stage, data, scripted_metrics, tmp_path):
    seen = scripted_metrics([0.1] * 20)
    settings = changed(RETRIEVAL, training={**RETRIEVAL.training, "max_steps": 8}, evaluate_every=1)
    run_stage("retrieval", tmp_path, settings=settings, holdout=data.holdout)
    assert len(seen) == 2  # of four steps an epoch


def test_early_stopping_goes_on_counting_after_an_interruption(
    run_stage, data, scripted_metrics, interrupt_at, tmp_path
):
    seen = scripted_metrics([0.1, 0.3, 0.2, 0.29, 0.25, 0.9, 0.95, 0.99])
    interrupt_at(9, lambda: run_stage("lightgcn", tmp_path, patience=3, holdout=data.holdout))
    assert seen == [0.1, 0.3, 0.2, 0.29]
    result = run_stage("lightgcn", tmp_path, patience=3, holdout=data.holdout)
    assert seen == [0.1, 0.3, 0.2, 0.29, 0.25]
    assert result.epochs == 1.0


@pytest.mark.parametrize(
    ("patience", "script"),
    [(3, [0.1, 0.3, 0.2, 0.3, 0.25]), (100, [0.1, 0.3, 0.2, 0.3, 0.25, 0.25, 0.2, 0.2])],
    ids=["early", "in full"],
)
def test_a_training_that_was_cut_off_at_its_end_ends_the_same_in_another_folder(
    run_stage, data, scripted_metrics, tmp_path, monkeypatch, patience, script
):
    """It is cut off twice before the best checkpoint, which is not the last, is loaded, and moved each time."""
    seen = scripted_metrics([*script, 0.9])
    for name in ("first", "second"):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(stages._Trainer, "_load_best_model", lambda self: throw(PowerCut()))
            run_stage("lightgcn", tmp_path / name, patience=patience, holdout=data.holdout)
        (tmp_path / name).rename(tmp_path / ("second" if name == "first" else "third"))
    best = load_file(tmp_path / "third" / "checkpoint-4" / "model.safetensors")
    result = run_stage("lightgcn", tmp_path / "third", patience=patience, holdout=data.holdout)
    assert seen == script and result.epochs == 1.0
    assert_equal_weights(weights(result), best)


def throw(error):
    raise error


@pytest.mark.parametrize("stage", ["lightgcn", "retrieval"])
def test_a_shorter_run_is_the_beginning_of_a_longer_one(run_stage, weights_at, tmp_path, stage):
    # With the default schedule the learning rate falls with every step, towards the end of the whole length.
    _, early = weights_at(6, lambda: run_stage(stage, tmp_path / "long"))
    short = run_stage(stage, tmp_path / "short", epochs=1.5)
    assert short.epochs == 1.5
    assert_equal_weights(early, weights(short))


def test_an_epoch_is_an_epoch_with_accumulated_gradients_too(run_stage, weights_at, tmp_path):
    settings = changed(RETRIEVAL, training={**RETRIEVAL.training, "gradient_accumulation_steps": 2})
    _, after_one = weights_at(2, lambda: run_stage("retrieval", tmp_path / "long", settings=settings))
    assert_equal_weights(after_one, weights(run_stage("retrieval", tmp_path / "one", settings=settings, epochs=1)))


def test_selection_reports_the_ranking_of_the_held_out_items(run_stage, data, tmp_path):
    result = run_stage("matrix factorization", tmp_path, holdout=data.holdout)
    scores = result.model.user_embeddings() @ result.model.item_embeddings().T
    gains = []
    for user, target in zip(data.holdout.users, data.holdout.targets):
        scores[user, data.interactions.of(user)] = -torch.inf
        rank = int((scores[user] > scores[user, target]).sum())
        gains.append(1 / np.log2(rank + 2) if rank < 20 else 0.0)
    assert result.metrics["ndcg@20"] == pytest.approx(np.mean(gains))
    assert not any(name.startswith("eval_") or "runtime" in name for name in result.metrics)


def test_an_evaluation_scores_no_items_for_all_users_at_once(data, tmp_path, monkeypatch):
    given = {True: 0, False: 0}

    def forward(self, labels=None, _forward=FISMModel.forward, **inputs):
        assert self.training or labels is None, "the loss of an evaluation is that of all users and items"
        given[self.training] += 1
        return _forward(self, labels=labels, **inputs)

    monkeypatch.setattr(FISMModel, "forward", forward)
    settings = changed(COLLABORATIVE, model="fism", config={"embedding_dim": 8})
    result = train_collaborative(data.interactions, settings, tmp_path, holdout=data.holdout)
    assert all(given.values()) and "ndcg@20" in result.metrics


@pytest.mark.parametrize("users", [4096, 8])
@pytest.mark.parametrize("knows", [True, False])
def test_the_weight_of_what_t5_reads_is_the_best_or_0_if_that_is_not_clearly_better(data, monkeypatch, users, knows):
    monkeypatch.setattr(stages, "WEIGHING_USERS", users)
    monkeypatch.setattr(stages, "HISTORY_WEIGHTS", (0.5, 3.0, 30.0))
    generator = torch.Generator().manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, 2, 8, generator=generator), dim=-1).flatten(1)
    queries = torch.randn(NUM_USERS, 16, generator=generator)
    if knows:  # T5's part points at the target of every second user
        queries[::2, 8:] = items[torch.as_tensor(data.holdout.targets)[::2], 8:]
    some, gains = np.arange(0, NUM_USERS, max(NUM_USERS // users, 1)), {}
    for weight in (0.0, *stages.HISTORY_WEIGHTS):
        scores = queries[:, :8] @ items[:, :8].T + weight * (queries[:, 8:] @ items[:, 8:].T)
        gains[weight] = []
        for row in some:
            user, target = data.holdout.users[row], data.holdout.targets[row]
            scores[row, data.interactions.of(user)] = -torch.inf
            rank = int((scores[row] > scores[row, target]).sum())
            gains[weight].append(1 / np.log2(rank + 2) if rank < 20 else 0.0)
    best = max(stages.HISTORY_WEIGHTS, key=lambda weight: np.mean(gains[weight]))
    gain = np.subtract(gains[best], gains[0.0])
    clear = gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5
    assert clear == knows
    found = stages.choose_history_weight(queries, items, 8, data.holdout, data.interactions)
    assert found == (best if clear else 0.0)


def test_selection_reports_the_ranking_with_the_chosen_weight(run_stage, data, tokenizer, tmp_path):
    result = run_stage("history", tmp_path, holdout=data.holdout)
    model, seen = result.model, data.interactions.of_users(data.holdout.users)
    collator = DataCollatorForGenerativeRetrieval(tokenizer, data.interactions, USER_IDS, ITEM_IDS, seed=1)
    examples = PromptDataset(data.holdout.users, data.holdout.targets)
    batch = collator([examples[row] for row in range(NUM_USERS)])
    model.config.history_weight = result.metrics["history_weight"]
    queries = model.encode_queries(batch["input_ids"], batch["attention_mask"]).detach()
    found = evaluate_embeddings(queries, model.bound_vectors(), data.holdout.targets, *seen, cosine=True)
    assert result.metrics["ndcg@20"] == pytest.approx(found["ndcg@20"])


def test_selection_keeps_a_weight_that_the_recipe_gives(run_stage, data, tmp_path):
    given = changed(RETRIEVAL, config={"history_weight": 0.3})
    assert run_stage("history", tmp_path, holdout=data.holdout, settings=given).metrics["history_weight"] == 0.3


def test_without_selection_the_weight_stays_as_it_is(run_stage, tmp_path):
    assert run_stage("history", tmp_path, weight=0.5, epochs=1).model.config.history_weight == 0.5


def test_statistics_of_the_codes_are_logged_while_the_mq_tokenizer_trains(run_stage, vectors, tmp_path, capsys):
    result = run_stage("mq", tmp_path)
    assert not capsys.readouterr().out
    for name, value in result.model.statistics(vectors).items():
        assert result.metrics[name] == value
    [last] = checkpoints(tmp_path)
    log = json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())
    logged = [entry for entry in log["log_history"] if "eval_usage" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9, 12, 15]
    for entry in logged:
        assert {f"eval_{name}" for name in ("usage", "perplexity", "collision_rate", "reconstruction_error")} <= set(
            entry
        )


@pytest.mark.parametrize(("others", "size"), [(None, 256), (torch.randn(10_000, 3), 512)])
def test_the_size_of_the_codebooks_is_chosen_by_all_vectors_that_are_learned_from(tmp_path, others, size):
    config = {"num_codebooks": 1, "codebook_size": "auto", "codebook_dim": 2, "hidden_dim": 4, "kmeans_init": False}
    training = {"max_steps": 1, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 8192}
    settings = changed(MQ_TOKENIZER, config=config, training=training, evaluate_every=10)
    model = train_mq_tokenizer(torch.randn(50, 3), settings, tmp_path, kind="user", others=others).model
    assert model.config.codebook_size == size
    assert model.config.embedding_dim == 3


def test_a_stage_gives_the_same_twice_and_another_with_another_seed(data, tmp_path):
    def trained(folder, seed):
        return weights(train_collaborative(data.interactions, COLLABORATIVE, tmp_path / folder, epochs=1, seed=seed))

    first = trained("first", 1)
    assert_equal_weights(first, trained("second", 1))
    assert not torch.equal(first["user_table.weight"], trained("third", 2)["user_table.weight"])


def test_users_with_like_histories_come_together():
    interactions = InteractionMatrix(np.array([0, 0, 0, 1, 2, 2]), np.arange(6), 4, 6)
    ordered = by_history_length(Holdout(np.array([0, 1, 2, 3]), np.array([5, 6, 7, 8])), interactions)
    assert ordered.users.tolist() == [3, 1, 2, 0]
    assert ordered.targets.tolist() == [8, 6, 7, 5]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_one_seed_gives_one_collaborative_model_with_several_threads(tmp_path, num_threads):
    splits = leave_one_out(demo_interactions())
    data = index_splits(splits, "validation")
    settings = Recipe.load("paper", overrides={"collaborative.training.num_train_epochs": 2}).collaborative
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        once, again = (
            stages.train_collaborative(data.interactions, settings, tmp_path / name).model.item_embeddings()
            for name in ("once", "again")
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, again)


@pytest.mark.parametrize("most_steps, epochs", [(None, 3), (100, 3), (4, 2), (1, 1)])
def test_large_data_get_fewer_epochs(data, tmp_path, most_steps, epochs):
    training = {"num_train_epochs": 3, "per_device_train_batch_size": -(-len(data.interactions) // 2)}
    settings = changed(Recipe.load("paper").collaborative, training=training, most_steps=most_steps)
    assert stages.train_collaborative(data.interactions, settings, tmp_path).epochs == epochs


def test_workers_that_would_not_hear_of_new_epochs_are_refused(tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **workers)
    with pytest.raises(ValueError, match="dataloader_persistent_workers"):
        SetEpoch(PromptDataset(np.arange(3))).on_train_begin(arguments, TrainerState(), TrainerControl())
