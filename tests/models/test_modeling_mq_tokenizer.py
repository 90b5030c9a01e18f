"""The MQ-Tokenizer against NumPy: Eq. 2-3 (mask), 4 (encoders), 5-6 (codebooks), 9 (decoder), 10-14 (losses)."""

from functools import partial

import numpy as np
import pytest
import torch

from tokenrec_hf.models import modeling_mq_tokenizer
from tokenrec_hf.models.configuration_tokenrec import MQTokenizerConfig
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel, first_least
from tokenrec_hf.training.initialization import kmeans, prepare_mq_tokenizer

SMALL = {"embedding_dim": 6, "num_codebooks": 3, "codebook_size": 8, "codebook_dim": 5, "hidden_dim": 10}


def tiny(**settings):
    torch.manual_seed(0)
    return MQTokenizerModel(MQTokenizerConfig(**{**SMALL, **settings}))


def prepared(**settings):
    model = tiny(**settings)
    prepare_mq_tokenizer(model, vectors())
    return model


def vectors(count=40, d=6, seed=1):
    return 3.0 + 2.0 * torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def array(tensor):
    return tensor.detach().double().numpy()


def naive_mlp(layers, x):
    """Linear layers with ReLU between them, one vector at a time."""
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for number, layer in enumerate(linear):
        x = array(layer.weight) @ x + array(layer.bias)
        if number < len(linear) - 1:
            x = np.maximum(x, 0)
    return x


def naive(model, x):
    """Eq. 4, 5, 6 and 9 with loops: standardised `x` `[n, d]` to encoder outputs, codes, codewords and reconstruction."""
    outputs, codes, words, reconstructions = [], [], [], []
    for row in x:
        a = [naive_mlp(encoder, row) for encoder in model.encoders]
        w = [
            min(range(len(book)), key=lambda codeword: np.sum((a[k] - book[codeword]) ** 2))
            for k, book in enumerate(array(model.codebooks))
        ]
        c = [array(model.codebooks)[k, w[k]] for k in range(len(w))]
        outputs.append(a)
        codes.append(w)
        words.append(c)
        reconstructions.append(naive_mlp(model.decoder, np.mean(c, axis=0)))
    return np.array(outputs), np.array(codes), np.array(words), np.array(reconstructions)


def standardised(model, x):
    return (array(x) - array(model.mean)) / float(model.scale)


# ---- Eq. 2-3: the mask


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 1.0])
def test_the_mask_zeroes_the_configured_share_of_elements_and_no_other(ratio):
    """Eq. 2-3."""
    x = vectors(2000)
    masked = tiny(mask_ratio=ratio).mask(x)
    zero = masked == 0
    assert zero.float().mean().item() == pytest.approx(ratio, abs=0.02)
    assert torch.equal(masked[~zero], x[~zero])


def test_the_mask_is_drawn_anew_for_each_element_and_each_call():
    """Eq. 2-3: element-wise, not whole vectors or whole dimensions."""
    model, x = tiny(mask_ratio=0.5), torch.ones(500, 6)
    first, second = model.mask(x), model.mask(x)
    assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert len(first.unique(dim=0)) > 40 and len(first.T.unique(dim=0)) == 6


def test_the_model_masks_while_training_only():
    model, x = prepared(mask_ratio=0.5, revive_dead=False), vectors()
    seen = []
    model.encoders[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model.train()(x)
    model.eval()(x)
    model.train().encode(x)
    model.eval().encode(x)
    assert (seen[0] == 0).float().mean() > 0.3
    for unmasked in seen[1:]:
        assert np.allclose(unmasked, standardised(model, x), atol=1e-5)


def test_the_input_tensor_is_never_changed():
    model, x = prepared(mask_ratio=0.5), vectors()
    kept = x.clone()
    model.train()(x)
    model.eval()(x)
    model.encode(x)
    model.statistics(x)
    prepare_mq_tokenizer(model, x)
    assert torch.equal(x, kept)


# ---- Eq. 4-6 and 9: encoders, codebooks, decoder


def test_each_encoder_is_an_own_mlp_with_three_hidden_layers():
    """Eq. 4."""
    model, x = tiny(), torch.randn(20, 6)
    for encoder in model.encoders:
        assert [layer.out_features for layer in encoder if hasattr(layer, "out_features")] == [10, 10, 10, 5]
    outputs, *_ = naive(model, array(x))
    assert np.allclose(model.quantise(x)[0].detach(), outputs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_distances_the_first_is_the_least(dtype):
    values = torch.randint(0, 4, (3, 50, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [[row.index(min(row)) for row in rows] for rows in values.tolist()]
    assert first_least(values.requires_grad_()).tolist() == expected


def test_codes_are_the_nearest_codewords_found_by_loops():
    """Eq. 5-6."""
    model = tiny(num_codebooks=2, codebook_size=16)
    outputs, codes = model.quantise(torch.randn(200, 6))
    books = array(model.codebooks)
    expected = [
        [int(np.argmin([np.sum((a - c) ** 2) for c in books[k]])) for k, a in enumerate(row)] for row in array(outputs)
    ]
    assert codes.dtype == torch.int64 and codes.tolist() == expected
    for row, found in zip(codes[:20], model.codewords(codes[:20])):
        assert torch.equal(found, torch.stack([model.codebooks[k, w] for k, w in enumerate(row)]))


def test_the_decoder_is_a_three_layer_mlp_of_the_mean_codeword():
    """Eq. 9."""
    model = prepared()
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.decoder) == 3
    codes = torch.randint(0, 8, (30, 3))
    expected = [
        array(model.mean)
        + float(model.scale)
        * naive_mlp(model.decoder, np.mean([array(model.codebooks)[k, w] for k, w in enumerate(row)], axis=0))
        for row in codes.tolist()
    ]
    assert np.allclose(model.decode(codes), expected, atol=1e-4)


def test_encode_and_forward_agree_with_the_naive_model():
    """Eq. 4-6 and 9 together."""
    model, x = prepared().eval(), vectors()
    _, codes, _, reconstruction = naive(model, standardised(model, x))
    output = model(x)
    assert model.encode(x).tolist() == output.codes.tolist() == codes.tolist()
    expected = array(model.mean) + float(model.scale) * reconstruction
    assert np.allclose(output.reconstruction.detach(), expected, atol=1e-4)
    assert np.allclose(model.decode(output.codes), expected, atol=1e-4)


# ---- Eq. 10-14: losses and their gradients


@pytest.mark.parametrize("beta", [0.25, 1.5])
def test_the_losses_are_those_of_the_paper(beta):
    """Eq. 10 (reconstruction), 11 (codebook), 12 (commitment) and their sum, 13 for items and 14 for users."""
    model, x = prepared(commitment_weight=beta).eval(), vectors()
    inputs = standardised(model, x)
    outputs, _, words, reconstruction = naive(model, inputs)
    recon = np.mean([np.sum((q - r) ** 2) for q, r in zip(inputs, reconstruction)])
    quantisation = np.mean([sum(np.sum((a - c) ** 2) for a, c in zip(row, word)) for row, word in zip(outputs, words)])
    output = model(x)
    assert output.reconstruction_loss.item() == pytest.approx(recon, rel=1e-4)
    assert output.codebook_loss.item() == pytest.approx(quantisation, rel=1e-4)
    assert output.commitment_loss.item() == pytest.approx(quantisation, rel=1e-4)
    assert output.loss.item() == pytest.approx(recon + quantisation + beta * quantisation, rel=1e-4)


def test_while_training_the_target_is_the_unmasked_input():
    """Eq. 10 compares with q, not with the masked q'."""
    model, x = prepared(mask_ratio=1.0, revive_dead=False).train(), vectors()
    output = model(x)
    _, _, _, reconstruction = naive(model, np.zeros((1, 6)))
    expected = np.mean(np.sum((standardised(model, x) - reconstruction) ** 2, axis=1))
    assert output.reconstruction_loss.item() == pytest.approx(expected, rel=1e-4)


def moved_by(model, loss):
    model.zero_grad()
    loss.backward()
    moved = [name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0]
    return {name.split(".")[0] for name in moved}


def test_each_loss_moves_its_own_parts():
    """The stop gradients of Eq. 11 and 12, and the straight-through estimator for Eq. 10."""
    model, x = prepared().eval(), vectors()
    assert moved_by(model, model(x).reconstruction_loss) == {"encoders", "decoder"}
    assert moved_by(model, model(x).codebook_loss) == {"codebooks"}
    assert moved_by(model, model(x).commitment_loss) == {"encoders"}
    assert moved_by(model, model(x).loss) == {"encoders", "codebooks", "decoder"}


def captured(model, x):
    """A forward pass that keeps the gradients of the encoder outputs and of the decoder input."""
    kept = {}

    def quantise(inputs):
        kept["outputs"], codes = MQTokenizerModel.quantise(model, inputs)
        kept["outputs"].retain_grad()
        return kept["outputs"], codes

    model.quantise = quantise

    def decoder_input(_, inputs):
        kept["z"] = inputs[0]
        inputs[0].retain_grad()

    hook = model.decoder.register_forward_pre_hook(decoder_input)
    output = model(x)
    hook.remove()
    del model.quantise
    return output, kept["outputs"], kept["z"]


def test_the_straight_through_gradient_of_an_encoder_is_that_of_the_decoder_input_shared_by_the_books():
    """dL_recon/da^k = dL_recon/dz / K for each k, z = mean_k c^k, the input of Eq. 9."""
    model = prepared().eval()
    output, outputs, decoder_input = captured(model, vectors())
    output.reconstruction_loss.backward()
    assert decoder_input.grad.abs().sum() > 0
    for k in range(3):
        assert torch.allclose(outputs.grad[:, k], decoder_input.grad / 3, atol=1e-7)


def test_the_straight_through_gradient_agrees_with_numerical_differentiation_of_the_decoder():
    """Eq. 9-10: the gradient at the quantised point, by central differences in NumPy."""
    model, x = prepared().eval(), vectors(3)
    output, outputs, _ = captured(model, x)
    output.reconstruction_loss.backward()
    target = standardised(model, x)
    _, _, words, _ = naive(model, target)

    def loss(words):
        return np.mean([np.sum((q - naive_mlp(model.decoder, w.mean(0))) ** 2) for q, w in zip(target, words)])

    expected, step = np.zeros_like(words), 1e-6
    for place in np.ndindex(words.shape):
        up, down = words.copy(), words.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (loss(up) - loss(down)) / (2 * step)
    assert np.allclose(outputs.grad, expected, rtol=1e-3, atol=1e-4)


def test_the_gradients_of_codebook_and_commitment_loss_are_twice_the_difference():
    """Eq. 11 and 12: 2 (c - a) for each use of a codeword, 2 (a - c) for each encoder output, over the batch size."""
    model, x = prepared().eval(), vectors()
    a, codes, words, _ = naive(model, standardised(model, x))
    output, outputs, _ = captured(model, x)
    output.commitment_loss.backward(retain_graph=True)
    assert np.allclose(outputs.grad, 2 * (a - words) / len(x), atol=1e-5)
    model.zero_grad()
    output.codebook_loss.backward()
    expected = np.zeros((3, 8, 5))
    for row in range(len(x)):
        for k in range(3):
            expected[k, codes[row, k]] += 2 * (words[row, k] - a[row, k]) / len(x)
    assert np.allclose(model.codebooks.grad, expected, atol=1e-5)


def test_users_and_items_share_the_architecture_but_not_the_weights():
    """Eq. 13 and 14 are the same loss of two models."""
    user, item = tiny(), MQTokenizerModel(MQTokenizerConfig(**SMALL))
    assert [p.shape for p in user.parameters()] == [p.shape for p in item.parameters()]
    assert user.space_id != item.space_id


# ---- codebooks that stay in use


def test_kmeans_finds_separated_clusters():
    truth = torch.tensor([[10.0, 0], [-10, 0], [0, 10], [0, -10]])
    points = truth.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    found = min(
        (kmeans(points, 4, seed=seed) for seed in range(5)), key=lambda c: torch.cdist(points, c).min(1)[0].sum()
    )
    assert torch.cdist(truth, found).min(dim=1)[0].max() < 0.1
    assert torch.cdist(found, truth).min(dim=1)[0].max() < 0.1


def test_kmeans_centres_are_the_means_of_their_points():
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    centres = kmeans(points, 5, num_iterations=100)
    nearest = np.array([np.argmin([np.sum((p - c) ** 2) for c in array(centres)]) for p in array(points)])
    for number, centre in enumerate(array(centres)):
        assert np.allclose(array(points)[nearest == number].mean(0), centre, atol=1e-4)


def test_kmeans_survives_empty_clusters():
    points = torch.cat([torch.zeros(100, 2), torch.ones(1, 2)])
    centres = kmeans(points, 10)
    assert centres.shape == (10, 2) and centres.isfinite().all()
    assert {tuple(c) for c in centres.tolist()} <= {(0.0, 0.0), (1.0, 1.0)}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_kmeans_takes_fewer_points_than_clusters(count):
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    centres = kmeans(points, 8)
    assert centres.shape == (8, 3) and centres.isfinite().all()
    assert len(centres.unique(dim=0)) == 8
    assert torch.cdist(points, centres).min(dim=1)[0].max() < 0.05


def test_kmeans_depends_on_its_seed_only():
    points = torch.randn(100, 3)
    assert torch.equal(kmeans(points, 6, seed=1), kmeans(points, 6, seed=1))
    assert not torch.equal(kmeans(points, 6, seed=1), kmeans(points, 6, seed=2))


def test_kmeans_initialisation_can_be_switched_off():
    x = vectors(300)
    plain, model = tiny(kmeans_init=False), tiny()
    before = plain.codebooks.clone()
    prepare_mq_tokenizer(plain, x)
    prepare_mq_tokenizer(model, x)
    assert torch.equal(plain.codebooks, before)
    outputs = model.quantise((x - model.mean) / model.scale)[0]
    for k in range(3):
        assert torch.allclose(model.codebooks[k], kmeans(outputs[:, k].detach(), 8, seed=k), atol=1e-6)
    assert model.statistics(x)["usage"] > plain.statistics(x)["usage"]


def test_the_last_residual_codebooks_are_fit_to_the_vectors_alone():
    x, others = vectors(60), vectors(500) * 1.5
    config = MQTokenizerConfig(embedding_dim=6, num_codebooks=4, codebook_size=16, residual=True)
    both, model = MQTokenizerModel(config), MQTokenizerModel(config)
    prepare_mq_tokenizer(both, torch.cat([x, others]))
    prepare_mq_tokenizer(model, x, others=others)
    assert torch.equal(model.mean, both.mean) and torch.equal(model.scale, both.scale)
    assert torch.equal(model.codebooks[:3], both.codebooks[:3])
    # The last one, from the definition: k-means of what the others leave of x.
    rest = (x - model.mean) / model.scale
    for book in model.codebooks[:3].detach():
        rest = rest - book[torch.cdist(rest, book).argmin(dim=1)]
    assert torch.allclose(model.codebooks[3], kmeans(rest, 16, seed=3), atol=1e-5)
    assert model.reconstruction_error(x) < both.reconstruction_error(x)
    # Encoders are started from all of them.
    plain, same = tiny(), tiny()
    prepare_mq_tokenizer(plain, torch.cat([x, others]))
    prepare_mq_tokenizer(same, x, others=others)
    assert torch.equal(plain.codebooks, same.codebooks)


def test_preparation_centres_the_vectors_and_gives_them_unit_scale():
    model = tiny()
    x = vectors(500) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    prepare_mq_tokenizer(model, x)
    z = standardised(model, x)
    assert np.allclose(z.mean(axis=0), 0, atol=1e-4)
    assert np.mean(z**2) == pytest.approx(1, rel=1e-4)
    # One scale for all dimensions: proportions are kept.
    assert z.std(axis=0)[5] / z.std(axis=0)[0] == pytest.approx((x[:, 5].std() / x[:, 0].std()).item(), rel=1e-4)


def test_constant_vectors_and_a_single_vector_can_be_encoded():
    for x in (torch.full((20, 6), 2.5), vectors(1)):
        model = tiny()
        prepare_mq_tokenizer(model, x)
        assert model.encode(x).shape == (len(x), 3)
        assert model.train()(x).loss.isfinite()


def test_revival_replaces_dead_codewords_only_and_by_encoder_outputs():
    model, x = prepared(mask_ratio=0.0).train(), vectors()
    model.codebooks.data[1, 3] = 1e6
    model.usage[1, 3] = 0.0
    model.usage[0, 0] = 0.001
    codes = model.encode(x)
    assert (codes[:, 0] == 0).any()
    before = model.codebooks.detach().clone()
    model(x)
    changed = (model.codebooks != before).any(dim=-1).nonzero().tolist()
    assert changed == [[1, 3]], "a codeword that the batch uses is not dead, whatever its record"
    outputs = model.quantise((x - model.mean) / model.scale)[0][:, 1]
    assert torch.cdist(model.codebooks[1, 3][None], outputs).min() < 1e-4
    assert model.usage[1, 3] == 1


def revive_in_one_of_two_processes(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = tiny(mask_ratio=0.0)
    prepare_mq_tokenizer(model, vectors())
    model.codebooks.data[1, 3] = 1e6
    model.usage[:, :4] = 0.0
    torch.manual_seed(rank)
    before = model.codebooks.detach().clone()
    codes = model.train()(vectors()[rank::2]).codes
    torch.save((before, model.codebooks.detach(), model.usage, codes), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_revive_the_same_codewords_with_the_same_vectors(tmp_path):
    torch.multiprocessing.spawn(revive_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    (before, first, usage, codes), (_, second, other_usage, other_codes) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(usage, other_usage)
    revived = (first != before).any(dim=-1).nonzero().tolist()
    assert revived
    used = {(book, word) for part in (codes, other_codes) for row in part.tolist() for book, word in enumerate(row)}
    assert not used & {tuple(one) for one in revived}, "a codeword that another process uses is not dead"


def test_the_codes_of_a_training_step_are_the_nearest_codewords_also_when_it_revives():
    model, x = prepared(mask_ratio=0.0).train(), vectors()
    model.usage.fill_(0.0)
    expected = model.encode(x)
    used = model.codewords(expected).clone()
    output = model(x)
    assert torch.equal(output.codes, expected)
    assert torch.equal(model.codewords(output.codes), used)


@pytest.mark.parametrize(
    "freeze", [lambda model: model.requires_grad_(False), lambda model: torch.set_grad_enabled(False)]
)
def test_a_frozen_codebook_does_not_move(freeze):
    model = prepared(codebook_size=32).train()
    before = model.space_id
    try:
        freeze(model)
        for _ in range(200):
            model(vectors()[:2])
    finally:
        torch.set_grad_enabled(True)
    assert model.space_id == before


@pytest.mark.parametrize("settings", [{}, {"residual": True, "codebook_dim": 6}])
def test_codes_and_decoded_vectors_do_not_depend_on_the_precision_around_them(settings):
    model, x = prepared(num_codebooks=6, codebook_size=32, **settings), vectors(200)
    codes, decoded = model.encode(x), model.decode(model.encode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x), codes)
        assert torch.equal(model.decode(codes), decoded)


def test_an_unused_codeword_is_not_revived_before_its_record_has_decayed():
    model, x = prepared(mask_ratio=0.0).train(), vectors()
    model.codebooks.data[2, 7] = 1e6
    steps = 0
    while model.codebooks[2, 7, 0] == 1e6:
        model(x)
        steps += 1
        assert steps < 200
    assert steps > 20


@pytest.mark.parametrize(("training", "revive_dead"), [(False, True), (True, False)])
def test_nothing_is_revived_at_inference_or_when_switched_off(training, revive_dead):
    model = prepared(revive_dead=revive_dead).train(training)
    model.usage.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(vectors())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def clustered(count=4000, clusters=300, d=32):
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(clusters, d, generator=generator)
    chosen = torch.randint(clusters, (count,), generator=generator)
    return centres[chosen] + 0.3 * torch.randn(count, d, generator=generator)


def trained(x, **settings):
    torch.manual_seed(0)
    config = MQTokenizerConfig(embedding_dim=32, codebook_size=64, codebook_dim=64, hidden_dim=128, **settings)
    model = MQTokenizerModel(config)
    prepare_mq_tokenizer(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(25):
        for batch in x[torch.randperm(len(x))].split(200):
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
    return model.eval()


def test_training_keeps_the_codewords_in_use_where_random_codebooks_collapse():
    x = clustered()
    collapsed = trained(x, kmeans_init=False, revive_dead=False).statistics(x)
    kept = trained(x).statistics(x)
    assert kept["usage"] >= 0.98 and kept["reconstruction_error"] < 0.5
    assert collapsed["usage"] < 0.1 and collapsed["reconstruction_error"] > 0.9


# ---- statistics


def test_the_statistics_are_those_of_plain_counting():
    model, x = prepared(), vectors(60)
    rows = [tuple(row) for row in model.encode(x).tolist()]
    used = {(k, w) for row in rows for k, w in enumerate(row)}
    perplexities = []
    for k in range(3):
        share = np.bincount([row[k] for row in rows], minlength=8) / len(rows)
        perplexities.append(np.exp(-sum(p * np.log(p) for p in share if p)))
    _, _, _, reconstruction = naive(model, standardised(model, x))
    r = array(model.mean) + float(model.scale) * reconstruction
    error = np.sum((array(x) - r) ** 2) / np.sum((array(x) - array(x).mean(0)) ** 2)
    expected = {
        "usage": len(used) / 24,
        "perplexity": np.mean(perplexities),
        "unique": sum(rows.count(row) == 1 for row in rows) / len(rows),
        "collision_rate": 1 - len(set(rows)) / len(rows),
        "reconstruction_error": error,
    }
    assert model.statistics(x) == pytest.approx(expected, rel=1e-4)


def test_vectors_that_are_all_alike_collide_all():
    found = prepared().statistics(torch.ones(10, 6))
    assert found["unique"] == 0 and found["collision_rate"] == pytest.approx(0.9)
    assert found["usage"] == pytest.approx(1 / 8) and found["perplexity"] == pytest.approx(1)


# ---- sizes, chunks, files, errors


def test_encoding_in_chunks_gives_the_codes_of_encoding_at_once(monkeypatch):
    model, x = prepared(), vectors(100)
    whole, statistics = model.encode(x), model.statistics(x)
    monkeypatch.setattr(modeling_mq_tokenizer, "ENCODE_CHUNK", 7)
    assert torch.equal(model.encode(x), whole)
    assert model.statistics(x) == pytest.approx(statistics, rel=1e-4)


def test_no_vectors_have_no_codes():
    assert tiny().encode(torch.empty(0, 6)).shape == (0, 3)
    assert tiny().decode(torch.empty(0, 3, dtype=torch.long)).shape == (0, 6)
    for measure in (tiny().statistics, tiny().reconstruction_error):
        with pytest.raises(ValueError, match="there are no vectors to measure the codes of"):
            measure(torch.empty(0, 6))


def test_arrays_are_encoded_whatever_their_order_in_memory():
    x = vectors().numpy()
    assert torch.equal(tiny().encode(x[::-1]), tiny().encode(torch.from_numpy(x).flip(0)))


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("codebook_size", [128, 256, 512, 1024])
def test_all_sizes_of_the_paper_run(num_codebooks, codebook_size):
    model, x = tiny(num_codebooks=num_codebooks, codebook_size=codebook_size), vectors(30)
    prepare_mq_tokenizer(model, x)
    output = model.train()(x)
    output.loss.backward()
    assert output.codes.shape == (30, num_codebooks) and 0 <= output.codes.min() <= output.codes.max() < codebook_size
    assert model.codebooks.grad.isfinite().all()
    assert model.decode(output.codes).shape == (30, 6)


def test_a_saved_model_gives_the_same_codes_bit_for_bit(tmp_path):
    model, x = prepared(), vectors(500)
    model.train()(x)
    model.save_pretrained(tmp_path)
    loaded = MQTokenizerModel.from_pretrained(tmp_path)
    assert loaded.space_id == model.space_id
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))


def test_the_space_id_changes_with_what_decides_codes_and_with_nothing_else():
    model = prepared()
    before = model.space_id
    assert len(before) == 16 and int(before, 16) >= 0
    model.decoder[0].weight.data += 1
    model.usage += 1
    assert model.eval().space_id == model.train().space_id == before
    for tensor in (model.encoders[2][0].weight, model.encoders[0][6].bias, model.codebooks, model.mean, model.scale):
        tensor.data.view(-1)[0] += 1
        assert model.space_id != before
        before = model.space_id


def test_a_training_step_runs_under_bfloat16_autocast():
    model, x = prepared().train(), vectors()
    model.usage.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    output.loss.backward()
    assert output.loss.isfinite() and model.codebooks.dtype == torch.float32


def test_a_model_in_bfloat16_encodes_and_trains():
    model, x = prepared().to(torch.bfloat16), vectors().to(torch.bfloat16)
    assert model.encode(x).shape == (40, 3)
    model.usage.zero_()
    output = model.train()(x)
    output.loss.backward()
    assert output.loss.isfinite()


def test_vectors_that_are_no_numbers_are_refused_with_their_row():
    x = vectors()
    x[7, 2] = float("nan")
    x[9, 0] = float("inf")
    for call in (tiny().encode, partial(prepare_mq_tokenizer, tiny()), tiny().statistics):
        with pytest.raises(ValueError, match="vector in row 7 has a value that is not finite"):
            call(x)


@pytest.mark.parametrize("shape", [(4, 5), (4, 7), (6,), (2, 3, 6)])
def test_vectors_of_another_size_are_refused(shape):
    for call in (tiny().encode, partial(prepare_mq_tokenizer, tiny()), tiny().statistics):
        with pytest.raises(ValueError, match=r"have shape .* expects \[n, 6\]; pass a matrix with a row of 6"):
            call(torch.zeros(shape))


def test_preparing_with_no_vectors_is_refused():
    with pytest.raises(ValueError, match="no vectors to train"):
        prepare_mq_tokenizer(tiny(), torch.empty(0, 6))


def test_codes_that_do_not_exist_are_refused():
    for code in (8, 9):
        with pytest.raises(ValueError, match=rf"codes must be in \[0, 8\) but range from 0 to {code}"):
            tiny().decode(torch.tensor([[0, 1, code]]))
    with pytest.raises(ValueError, match=r"range from -1 to 1"):
        tiny().decode(torch.tensor([[0, 1, -1]]))
    with pytest.raises(
        ValueError, match=r"shape \(1, 2\) and type torch.int64 but the MQ-Tokenizer expects integers \[n, 3\]"
    ):
        tiny().decode(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"type torch.float32 but the MQ-Tokenizer expects integers"):
        tiny().decode(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks is 0 but must be at least 1"),
        ({"codebook_size": 0}, "codebook_size is 0 but must be at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0 but must be at least 1"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5 but must be between 0 and 1"),
        ({"mask_ratio": -0.1}, "mask_ratio is -0.1 but must be between 0 and 1"),
        ({"commitment_weight": -1}, "commitment_weight is -1 but must be at least 0"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(Exception, match=message):
        MQTokenizerConfig(**settings)


def test_trainer_is_told_that_the_loss_is_already_a_mean():
    assert MQTokenizerModel.accepts_loss_kwargs is False


# ---- residual quantisation


def naive_residual(model, x):
    """Codes and reconstructions of standardised `x` `[n, d]`: each book takes the nearest to what is left, and they add up."""
    codes, reconstructions = [], []
    for row in x:
        rest, mine = row.copy(), []
        for book in array(model.codebooks):
            mine.append(min(range(len(book)), key=lambda codeword: np.sum((rest - book[codeword]) ** 2)))
            rest = rest - book[mine[-1]]
        codes.append(mine)
        reconstructions.append(row - rest)
    return np.array(codes), np.array(reconstructions)


def test_residual_books_quantise_what_those_before_them_left():
    model, x = prepared(residual=True).eval(), vectors()
    codes, reconstructions = naive_residual(model, standardised(model, x))
    assert model.encode(x).tolist() == codes.tolist()
    expected = array(model.mean) + array(model.scale) * reconstructions
    np.testing.assert_allclose(array(model.decode(model.encode(x))), expected, rtol=1e-5, atol=1e-5)
    output = model(x)
    assert output.codes.tolist() == codes.tolist()
    np.testing.assert_allclose(array(output.reconstruction), expected, rtol=1e-5, atol=1e-5)
    rest = standardised(model, x) - reconstructions
    assert output.reconstruction_loss.item() == pytest.approx((rest**2).sum(-1).mean(), rel=1e-4)


def test_each_residual_book_is_kmeans_of_what_is_left():
    model, x = prepared(residual=True), vectors()
    rest = torch.tensor(standardised(model, x)).float()
    for k, book in enumerate(model.codebooks.detach()):
        torch.testing.assert_close(book, kmeans(rest, 8, seed=k))
        rest = rest - book[model.encode(x)[:, k]]


def test_residual_books_lose_less_with_every_book():
    x = vectors(600, 16)
    settings = {"embedding_dim": 16, "codebook_size": 16}
    errors = []
    for count in (1, 2, 4, 8):
        model = tiny(**settings, residual=True, num_codebooks=count)
        prepare_mq_tokenizer(model, x)
        errors.append(model.statistics(x)["reconstruction_error"])
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_a_residual_model_has_codebooks_only_and_is_saved_as_such(tmp_path):
    model, x = prepared(residual=True), vectors()
    assert [name for name, _ in model.named_parameters()] == ["codebooks"]
    assert model.config.codebook_dim == model.config.embedding_dim
    model.save_pretrained(tmp_path)
    loaded = MQTokenizerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(x), model.encode(x)) and loaded.space_id == model.space_id


def test_the_summands_of_residual_codewords_add_up_to_what_is_decoded():
    model, x = prepared(residual=True).eval(), vectors()
    codes = model.encode(x)
    summands = model.summands()
    for row, decoded in zip(codes.tolist(), model.decode(codes)):
        total = sum(summands[book, code] for book, code in enumerate(row))
        np.testing.assert_allclose(total.numpy(), decoded.detach().numpy(), atol=1e-5)


def test_codewords_behind_a_decoder_have_no_summands():
    with pytest.raises(ValueError, match="only residual codebooks add up"):
        prepared().summands()


def test_the_reconstruction_error_is_a_share_of_the_training_variance():
    torch.manual_seed(0)
    config = MQTokenizerConfig(embedding_dim=4, num_codebooks=2, codebook_size=4, codebook_dim=4, hidden_dim=8)
    model, vectors = MQTokenizerModel(config).eval(), torch.randn(5, 4)
    model.scale.fill_(3.0)
    lost = (vectors - model.decode(model.encode(vectors))).square().sum()
    assert model.reconstruction_error(vectors) == pytest.approx(float(lost) / (5 * 4 * 9), rel=1e-5)
