import copy

import numpy as np
import pytest
import torch

from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models import modeling_collaborative
from tokenrec_hf.models.codes import IdIndex
from tokenrec_hf.models.configuration_tokenrec import (
    CollaborativeConfig,
    FISMConfig,
    LightGCNConfig,
    MatrixFactorizationConfig,
)
from tokenrec_hf.models.embedding_store import EmbeddingStore
from tokenrec_hf.models.modeling_collaborative import (
    COLLABORATIVE_MODELS,
    CollaborativeModel,
    FISMModel,
    HistoryEncoder,
    LightGCNModel,
    MatrixFactorizationModel,
    collaborative_class,
    load_collaborative,
    save_collaborative,
)
from tokenrec_hf.models.recommender import load_history_encoder
from tokenrec_hf.repository.update import without_users

NUM_USERS, NUM_ITEMS, DIM = 7, 9, 4


@pytest.fixture(scope="module")
def interactions():
    """User 6 and item 8 have no interaction at all."""
    known = np.random.default_rng(0).random((6, 8)) < 0.4
    known[np.arange(6), np.arange(6)] = True
    return InteractionMatrix(*np.nonzero(known), NUM_USERS, NUM_ITEMS)


def light_gcn(interactions, **settings):
    torch.manual_seed(0)
    return LightGCNModel.from_interactions(LightGCNConfig(embedding_dim=DIM, **settings), interactions)


def factorization(**settings):
    torch.manual_seed(0)
    return MatrixFactorizationModel(
        MatrixFactorizationConfig(num_users=NUM_USERS, num_items=NUM_ITEMS, embedding_dim=DIM, **settings)
    )


def dense_adjacency(interactions):
    """D^-1/2 A D^-1/2, entry by entry."""
    size = NUM_USERS + NUM_ITEMS
    adjacency = np.zeros((size, size))
    for user in range(NUM_USERS):
        for item in interactions.of(user):
            adjacency[user, NUM_USERS + item] += 1
            adjacency[NUM_USERS + item, user] += 1
    degree = adjacency.sum(axis=1)
    for i in range(size):
        for j in range(size):
            if adjacency[i, j]:
                adjacency[i, j] /= np.sqrt(degree[i] * degree[j])
    return adjacency


def tables(model):
    return np.concatenate([model.user_table.weight.detach().numpy(), model.item_table.weight.detach().numpy()])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_light_gcn_is_the_mean_over_layers_of_the_propagated_tables(interactions, num_layers):
    model = light_gcn(interactions, num_layers=num_layers)
    adjacency, layer = dense_adjacency(interactions), tables(model).astype(np.float64)
    layers = [layer]
    for _ in range(num_layers):
        layers.append(adjacency @ layers[-1])
    expected = np.mean(layers, axis=0)
    assert np.allclose(model.user_embeddings(), expected[:NUM_USERS], atol=1e-6)
    assert np.allclose(model.item_embeddings(), expected[NUM_USERS:], atol=1e-6)
    assert not np.allclose(model.user_embeddings(), layer[:NUM_USERS], atol=1e-3)


def test_who_has_no_interaction_keeps_a_share_of_the_own_embedding(interactions):
    model = light_gcn(interactions, num_layers=3)
    assert torch.allclose(model.user_embeddings()[6], model.user_table.weight[6] / 4)
    assert torch.allclose(model.item_embeddings()[8], model.item_table.weight[8] / 4)


def test_the_gradient_of_the_propagation_is_that_of_a_dense_product(interactions):
    model = light_gcn(interactions, num_layers=3)
    adjacency = torch.tensor(dense_adjacency(interactions), dtype=torch.float32)
    weight = torch.randn(NUM_USERS + NUM_ITEMS, DIM)

    (torch.cat(model.representations()) * weight).sum().backward()
    found = torch.cat([model.user_table.weight.grad, model.item_table.weight.grad])

    leaf = torch.tensor(tables(model), requires_grad=True)
    layers = [leaf]
    for _ in range(3):
        layers.append(adjacency @ layers[-1])
    (torch.stack(layers).mean(0) * weight).sum().backward()
    assert torch.allclose(found, leaf.grad, atol=1e-6)


def test_training_runs_under_bfloat16_autocast(interactions):
    for loss_type in ("bpr", "softmax"):
        for model in both(interactions, loss_type=loss_type):
            inputs = {"user_ids": USERS, "labels": POSITIVES, "negative_ids": NEGATIVES}
            exact = model(**inputs).loss.item()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            assert loss.item() == pytest.approx(exact, rel=0.05)
            assert model.user_table.weight.grad.isfinite().all()


def test_without_layers_light_gcn_is_matrix_factorisation(interactions):
    model = light_gcn(interactions, num_layers=0)
    assert torch.equal(model.user_embeddings(), model.user_table.weight)
    assert torch.equal(model.item_embeddings(), model.item_table.weight)


def test_embeddings_are_detached_copies():
    model = factorization()
    before = model.user_table.weight.clone()
    for given in (model.user_embeddings(), model.item_embeddings()):
        assert not given.requires_grad
        given.zero_()
    assert torch.equal(model.user_table.weight, before)
    assert (model.item_table.weight != 0).all()


USERS, POSITIVES = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 0, 8, 2])
NEGATIVES = torch.tensor([[2, 3, 4], [5, 5, 1], [7, 2, 0], [0, 1, 3]])


def both(interactions, **settings):
    return factorization(**settings), light_gcn(interactions, num_layers=2, **settings)


def test_the_bpr_loss_is_minus_log_sigmoid_of_the_difference_of_dot_products(interactions):
    for model in both(interactions, loss_type="bpr"):
        users, items = model.user_embeddings().double().numpy(), model.item_embeddings().double().numpy()
        terms = [
            -np.log(1 / (1 + np.exp(-(users[u] @ items[i] - users[u] @ items[j]))))
            for u, i, row in zip(USERS, POSITIVES, NEGATIVES)
            for j in row
        ]
        output = model.eval()(user_ids=USERS, labels=POSITIVES, negative_ids=NEGATIVES)
        assert output.loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
        assert np.allclose(output.user_embeds.detach(), users[USERS])


@pytest.mark.parametrize("sampled", [False, True])
def test_the_softmax_loss_is_cross_entropy_over_cosines(interactions, sampled):
    for model in both(interactions, loss_type="softmax", temperature=0.2):
        users, items = model.user_embeddings().double().numpy(), model.item_embeddings().double().numpy()
        terms = []
        for u, i, row in zip(USERS, POSITIVES, NEGATIVES):
            competitors = [i, *row] if sampled else range(NUM_ITEMS)
            cosines = {
                int(j): users[u] @ items[j] / np.linalg.norm(users[u]) / np.linalg.norm(items[j]) for j in competitors
            }
            weights = [np.exp(cosines[int(j)] / 0.2) for j in competitors]
            terms.append(-np.log(np.exp(cosines[int(i)] / 0.2) / np.sum(weights)))
        inputs = {"negative_ids": NEGATIVES} if sampled else {}
        loss = model.eval()(user_ids=USERS, labels=POSITIVES, **inputs).loss
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_while_training_the_squared_norm_of_the_tables_is_added(interactions):
    for model in both(interactions, l2_weight=0.5):
        inputs = {"user_ids": USERS, "labels": POSITIVES, "negative_ids": NEGATIVES}
        user, item = model.user_table.weight.detach().numpy(), model.item_table.weight.detach().numpy()
        squares = sum((user[u] ** 2).sum() for u in USERS) + sum((item[i] ** 2).sum() for i in POSITIVES)
        squares += sum((item[j] ** 2).sum() for j in NEGATIVES.flatten())
        added = model.train()(**inputs).loss - model.eval()(**inputs).loss
        assert added.item() == pytest.approx(0.5 * squares / 2 / len(USERS), rel=1e-4)


@pytest.mark.parametrize("kind", COLLABORATIVE_MODELS)
def test_no_item_of_a_fresh_model_was_added_later(interactions, kind):
    model = COLLABORATIVE_MODELS[kind]
    assert model.from_interactions(model.config_class(embedding_dim=DIM), interactions).config.num_folded_items == 0


def test_without_labels_there_is_no_loss(interactions):
    model = light_gcn(interactions)
    output = model(user_ids=USERS)
    assert output.loss is None
    assert torch.equal(output.user_embeds, model.user_embeddings()[USERS])


def test_the_bpr_loss_without_negatives_says_how_to_draw_them():
    with pytest.raises(ValueError, match="BPR loss needs negative_ids .* InteractionMatrix.sample_negatives"):
        factorization()(user_ids=USERS, labels=POSITIVES)


def test_a_few_steps_of_training_rank_known_items_first(interactions):
    for model in both(interactions, l2_weight=0.0):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(150):
            negatives = interactions.sample_negatives(
                interactions.users, 2, seed=0, epoch=step, examples=np.arange(len(interactions))
            )
            users, items = torch.from_numpy(interactions.users), torch.from_numpy(interactions.items)
            loss = model(user_ids=users, labels=items, negative_ids=torch.from_numpy(negatives)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = model.user_embeddings() @ model.item_embeddings().T
        for user in range(6):
            known = interactions.of(user)
            best = scores[user].topk(len(known)).indices.tolist()
            assert len(set(best) & set(known.tolist())) >= 0.75 * len(known)


def test_initial_embeddings_have_the_configured_spread():
    config = MatrixFactorizationConfig(num_users=500, num_items=500, embedding_dim=64, initializer_range=0.03)
    model = MatrixFactorizationModel(config)
    for table in (model.user_table.weight, model.item_table.weight):
        assert table.std().item() == pytest.approx(0.03, rel=0.05)


def test_a_saved_light_gcn_propagates_the_same_without_the_data(interactions, tmp_path):
    model = light_gcn(interactions, num_layers=2)
    model.save_pretrained(tmp_path)
    loaded = LightGCNModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.edge_users, model.edge_users) and torch.equal(loaded.edge_items, model.edge_items)
    assert torch.equal(loaded.user_embeddings(), model.user_embeddings())
    assert torch.equal(loaded.item_embeddings(), model.item_embeddings())
    assert len(loaded.edge_users) == len(interactions)


def test_a_model_that_has_propagated_saves_and_copies_like_any_other(interactions, tmp_path):
    model = light_gcn(interactions)
    before = model.user_embeddings()
    assert torch.equal(copy.deepcopy(model).user_embeddings(), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(LightGCNModel.from_pretrained(tmp_path).user_embeddings(), before)


def test_a_light_gcn_propagates_over_the_edges_that_it_was_last_given(interactions):
    model = light_gcn(interactions)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["edge_items"] = state["edge_items"].flip(0)
    model.user_embeddings()
    model.load_state_dict(state)
    other = light_gcn(interactions)
    other.load_state_dict(state)
    assert torch.equal(model.user_embeddings(), other.user_embeddings())


def test_a_saved_matrix_factorisation_loads_bit_for_bit(tmp_path):
    model = factorization()
    model.save_pretrained(tmp_path)
    loaded = MatrixFactorizationModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.user_embeddings(), model.user_embeddings())
    assert torch.equal(loaded.item_embeddings(), model.item_embeddings())


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (MatrixFactorizationConfig, {"embedding_dim": 0}, "embedding_dim is 0 but must be at least 1"),
        (MatrixFactorizationConfig, {"loss_type": "hinge"}, "loss_type is 'hinge' but must be 'bpr' or 'softmax'"),
        (MatrixFactorizationConfig, {"temperature": 0}, "temperature is 0 but must be above 0"),
        (LightGCNConfig, {"num_layers": -1}, "num_layers is -1 but must be at least 0"),
        (LightGCNConfig, {"loss_type": ""}, "loss_type is '' but must be"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(config, settings, message):
    with pytest.raises(Exception, match=message):
        config(**settings)


def test_trainer_is_told_that_the_loss_is_already_a_mean():
    assert MatrixFactorizationModel.accepts_loss_kwargs is False
    assert LightGCNModel.accepts_loss_kwargs is False


def fism(interactions, **settings):
    torch.manual_seed(0)
    return FISMModel.from_interactions(FISMConfig(embedding_dim=DIM, **settings), interactions).eval()


def unit(vector):
    return vector / max(np.linalg.norm(vector), 1e-12)


def fism_user(model, history):
    """p_u of a history in time order, item by item."""
    table, half_life = model.history_table.weight.detach().double().numpy(), model.config.half_life
    total = np.zeros(DIM)
    for age, item in enumerate(reversed(list(history))):
        total += table[item] * (1 if half_life is None else 0.5 ** (age / half_life))
        if half_life is not None and model.config.recent_half_life is not None:
            recent = model.recent_table.weight.detach().double().numpy()
            total += recent[item] * 0.5 ** (age / model.config.recent_half_life)
    return unit(total)


@pytest.mark.parametrize("recent_half_life", [None, 0.4])
@pytest.mark.parametrize("half_life", [None, 2, 0.5])
def test_a_fism_user_is_the_sum_of_the_own_items_of_which_older_ones_count_less(half_life, recent_half_life):
    shuffled = InteractionMatrix(np.array([0, 0, 0, 1, 1]), np.array([5, 2, 7, 7, 0]), NUM_USERS, NUM_ITEMS)
    model = fism(shuffled, half_life=half_life, recent_half_life=recent_half_life)
    assert len(model.tables()) == (3 if half_life and recent_half_life else 2)
    expected = [fism_user(model, shuffled.of(user)) for user in range(NUM_USERS)]
    assert np.allclose(model.user_embeddings(), expected, atol=1e-6)
    assert np.allclose(model.item_embeddings(), [unit(q) for q in model.item_table.weight.detach().numpy()], atol=1e-6)


@pytest.mark.parametrize("half_life", [None, 1])
def test_the_fism_loss_is_a_softmax_over_cosines_without_what_is_known(interactions, half_life):
    model = fism(interactions, half_life=half_life, recent_half_life=half_life and 0.5, temperature=0.2)
    histories, wanted = [[4, 1], [3]], [[2, 6, 0], [7]]
    items = model.item_embeddings().double().numpy()
    terms, weights = 0.0, 0.0
    for history, targets in zip(histories, wanted):
        scores = items @ fism_user(model, history) / 0.2
        rivals = [np.exp(scores[item]) for item in range(NUM_ITEMS) if item not in history]
        losses = [np.log(sum(rivals)) - scores[target] for target in targets]
        terms += sum(losses) / np.sqrt(len(targets))
        weights += np.sqrt(len(targets))
    output = model(
        user_ids=torch.tensor([0, 1]),
        labels=torch.tensor([[2, 6, 0], [7, -100, -100]]),
        history_rows=torch.tensor([0, 0, 1]),
        history_items=torch.tensor([4, 1, 3]),
        history_ages=torch.tensor([1, 0, 0]),
    )
    assert output.loss.item() == pytest.approx(terms / weights, rel=1e-5)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_sampled_fism_loss_is_that_over_all_items_where_the_sample_has_them_all(interactions):
    model = fism(interactions, temperature=0.2)
    history = [torch.tensor(column) for column in zip((0, 3, 0), (0, 5, 1), (1, 4, 0))]
    inputs = dict(zip(("history_rows", "history_items", "history_ages"), history))
    inputs |= {"user_ids": torch.tensor([2, 6]), "labels": torch.tensor([[0, 1], [2, -100]])}
    every = torch.arange(NUM_ITEMS).repeat(2, 1)
    assert model(**inputs, negative_ids=every).loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    assert model(**inputs, negative_ids=every[:, :4]).loss.item() != pytest.approx(
        model(**inputs).loss.item(), rel=1e-3
    )


def test_fism_drops_parts_of_history_vectors_in_training_only(interactions):
    model = fism(interactions, dropout_rate=0.5)
    one = torch.tensor([0])
    batch = {"user_ids": one, "labels": one, "history_rows": one, "history_items": one + 4, "history_ages": one}
    kept = model(**batch).user_embeds
    assert torch.equal(model(**batch).user_embeds, kept) and (kept != 0).all()
    torch.manual_seed(0)
    drawn = torch.cat([model.train()(**batch).user_embeds for _ in range(100)])
    assert 0.4 < (drawn == 0).float().mean() < 0.6


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_users_of_fism_do_not_depend_on_how_many_are_made_at_once(interactions, chunk, monkeypatch):
    model = fism(interactions, half_life=3, recent_half_life=1)
    expected = model.user_embeddings()
    monkeypatch.setattr(modeling_collaborative, "USER_CHUNK", chunk)
    assert torch.equal(model.user_embeddings(), expected)


def test_a_saved_fism_loads_bit_for_bit_with_its_histories(interactions, tmp_path):
    model = fism(interactions, half_life=3, recent_half_life=1)
    model.save_pretrained(tmp_path)
    loaded = FISMModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.user_embeddings(), model.user_embeddings())
    assert torch.equal(loaded.item_embeddings(), model.item_embeddings())


@pytest.mark.parametrize(
    "settings",
    [{"half_life": 0}, {"dropout_rate": 1.0}, {"temperature": 0}, {"embedding_dim": 0}, {"item_smoothing": 1.5}],
)
def test_impossible_fism_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FISMConfig(**settings)


# ---- Histories of ids


@pytest.fixture(params=[{}, {"half_life": 3.0}, {"half_life": 3.0, "recent_half_life": 0.5}], ids=str)
def history_model(request):
    torch.manual_seed(0)
    return FISMModel(FISMConfig(embedding_dim=6, num_users=0, num_items=5, num_interactions=0, **request.param)).eval()


@pytest.fixture
def encoder(history_model):
    return HistoryEncoder(history_model, IdIndex(list("abcde")))


def naive(model, history):
    """p of item rows with their ages, from the equation in the docstring of FISMModel."""
    config, total = model.config, np.zeros(6)
    for row, age in history:
        weight = 1 if config.half_life is None else 2 ** (-age / config.half_life)
        total += weight * model.history_table.weight[row].detach().numpy()
        if model.recent_table is not None:
            total += 2 ** (-age / config.recent_half_life) * model.recent_table.weight[row].detach().numpy()
    return total / np.linalg.norm(total)


def test_a_vector_is_that_of_the_equation(history_model, encoder):
    vectors, known = encoder.encode([["a", "c", "e"], ["b"]])
    assert known.tolist() == [True, True]
    expected = [naive(history_model, [(0, 2), (2, 1), (4, 0)]), naive(history_model, [(1, 0)])]
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-6)


def test_items_that_it_does_not_know_make_the_others_older_and_say_nothing(history_model, encoder):
    vectors, known = encoder.encode([["a", "new", "c", "newer"], ["new"], []])
    assert known.tolist() == [True, False, False]
    np.testing.assert_allclose(vectors[0].numpy(), naive(history_model, [(0, 3), (2, 1)]), atol=1e-6)
    assert not vectors[1:].any()


def test_there_may_be_no_histories(encoder):
    vectors, known = encoder.encode([])
    assert vectors.shape == (0, 6) and known.shape == (0,)


def test_ids_and_items_must_be_as_many(history_model):
    with pytest.raises(ValueError, match="there are 4 ids for 5 items"):
        HistoryEncoder(history_model, IdIndex(list("abcd")))


def test_histories_of_training_give_the_vectors_of_training(fism_repository):
    store = EmbeddingStore.open(fism_repository)
    vectors, known = load_history_encoder(fism_repository).encode(store.seen(store.ids("user")))
    assert known.all()
    torch.testing.assert_close(vectors, store.vectors("user")[:, :16], rtol=0, atol=1e-5)


def test_other_models_and_folders_have_no_history_encoder(trained_repository, tmp_path):
    assert load_history_encoder(trained_repository) is None
    assert load_history_encoder(tmp_path) is None


# ---- All kinds of models


MATRIX = InteractionMatrix(np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 1, 0]), 3, 3)
IDS = {"user": ["u", "v", "w"], "item": ["a", "b", "c"]}


@pytest.fixture(params=COLLABORATIVE_MODELS)
def any_model(request):
    torch.manual_seed(0)
    model_class = COLLABORATIVE_MODELS[request.param]
    return model_class.from_interactions(model_class.config_class(embedding_dim=4), MATRIX).eval()


def test_a_model_comes_back_as_what_it_was_with_the_ids_of_its_rows(any_model, tmp_path):
    save_collaborative(any_model, IDS, tmp_path)
    loaded, ids = load_collaborative(tmp_path)
    assert type(loaded) is type(any_model) is collaborative_class(tmp_path) and not loaded.training
    for name, tensor in any_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert {kind: index.ids() for kind, index in ids.items()} == IDS


def test_a_model_of_an_unknown_kind_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="config.json has the model_type 'bert', which is none of"):
        load_collaborative(tmp_path)


def test_a_resized_model_has_the_settings_and_other_users_and_items(any_model):
    larger = any_model.resized(InteractionMatrix(np.array([0, 3]), np.array([4, 1]), 4, 5))
    assert type(larger) is type(any_model) and larger.config.embedding_dim == 4
    assert larger.user_embeddings().shape == (4, 4) and larger.item_embeddings().shape == (5, 4)
    assert any_model.config.num_users == 3


def test_the_interactions_of_training_are_kept_unless_the_model_is_free_of_them(any_model):
    found = any_model.interactions()
    if isinstance(any_model, LightGCNModel | FISMModel):
        assert [one.tolist() for one in found] == [MATRIX.users.tolist(), MATRIX.items.tolist()]
        assert {one.dtype for one in found} == {np.dtype("int64")}
    else:
        assert found is None


def test_only_models_of_histories_make_vectors_of_them(any_model):
    history = torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1, 0]), 1
    if any_model.users_are_histories:
        assert torch.allclose(any_model.history_vectors(*history), any_model.user_embeddings()[:1], atol=1e-6)
    else:
        with pytest.raises(NotImplementedError, match="cannot make one from a history"):
            any_model.history_vectors(*history)


@pytest.mark.parametrize("keep", [[True, False, True], [False, False, False]])
def test_a_model_without_some_users_has_neither_their_rows_nor_their_interactions(any_model, keep):
    keep = np.array(keep)
    left = without_users(any_model, keep)
    rows = torch.from_numpy(keep)
    assert left.config.num_users == keep.sum() and left.config.num_items == 3
    for (kind, table), (_, former) in zip(left.tables(), any_model.tables()):
        assert torch.equal(table.weight, former.weight[rows] if kind == "user" else former.weight)
    if any_model.interactions() is not None:
        inside = keep[MATRIX.users]
        assert [one.tolist() for one in left.interactions()] == [
            (np.cumsum(keep) - 1)[MATRIX.users[inside]].tolist(),
            MATRIX.items[inside].tolist(),
        ]
    if any_model.users_are_histories:
        assert torch.equal(left.user_embeddings(), any_model.user_embeddings()[rows])
    # The original model is not changed.
    assert any_model.config.num_users == 3


def test_an_own_model_is_a_subclass_with_tables_and_vectors(tmp_path, monkeypatch):
    """The documented way to add a model: a subclass and an entry in the table."""

    class PopularConfig(CollaborativeConfig):
        model_type = "popular"

    class PopularModel(CollaborativeModel):
        config_class = PopularConfig

        def __init__(self, config):
            super().__init__(config)
            self.table = torch.nn.Embedding(config.num_items, config.embedding_dim)
            self.post_init()

        def tables(self):
            return [("item", self.table)]

    monkeypatch.setitem(COLLABORATIVE_MODELS, "popular", PopularModel)
    model = PopularModel.from_interactions(PopularConfig(embedding_dim=4), MATRIX)
    save_collaborative(model, IDS, tmp_path)
    loaded = load_collaborative(tmp_path)[0]
    assert type(loaded) is PopularModel and torch.equal(loaded.table.weight, model.table.weight)
    assert len(loaded.interactions()[0]) == len(MATRIX)
