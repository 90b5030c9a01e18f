import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec_hf.models import functional
from tokenrec_hf.models.functional import Dropout, linear_cross_entropy, unit


def naive(x, y, targets, weights, excluded):
    """The loss row by row and target by target, in float64."""
    total = 0.0
    for row, (query, weight) in enumerate(zip(x.double(), weights.double())):
        competing = [item for item in range(len(y)) if (row, item) not in excluded]
        log_sum = torch.stack([query @ y[item].double() for item in competing]).logsumexp(0)
        terms = [log_sum - query @ y[item].double() for item in targets[row].tolist() if item >= 0]
        total += weight * sum(terms) / len(terms) if terms else 0
    return total


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_loss_and_its_gradients_are_the_naive_ones(data):
    rows, items, width, most = (data.draw(st.integers(1, 7), label) for label in ("n", "m", "w", "P"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x, y = (torch.randn(size, width, generator=generator).requires_grad_() for size in (rows, items))
    # Row 0 may be all padding.
    targets = torch.randint(-3, items, (rows, most), generator=generator)
    weights = torch.rand(rows, generator=generator)
    pairs = {(row, item) for row in range(rows) for item in range(items) if torch.rand((), generator=generator) < 0.3}
    pairs = sorted(
        pairs - {(row, item) for row in range(rows) for item in targets[row].tolist()} - {(r, 0) for r in range(rows)}
    )
    pairs = [pairs[place] for place in torch.randperm(len(pairs), generator=generator)]
    excluded = (torch.tensor([row for row, _ in pairs]).long(), torch.tensor([item for _, item in pairs]).long())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "LOGITS", data.draw(st.integers(1, 50), "logits at once"))
        found = linear_cross_entropy(x, y, targets, weights=weights, excluded=excluded)
        gradients = torch.autograd.grad(3 * found, (x, y))
    expected = naive(x, y, targets, weights, set(pairs))
    assert found.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-4, abs=1e-5)
    if isinstance(expected, torch.Tensor):
        for one, other in zip(gradients, torch.autograd.grad(3 * expected, (x, y), allow_unused=True)):
            assert torch.allclose(one, other.float(), atol=1e-4)


def test_one_target_a_row_is_pytorchs_cross_entropy_also_under_mixed_precision():
    torch.manual_seed(0)
    x, y, targets = torch.randn(300, 16), torch.randn(500, 16), torch.randint(0, 500, (300,))
    plain = F.cross_entropy(x @ y.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, y, targets)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)


def test_without_gradients_the_loss_is_the_same():
    torch.manual_seed(0)
    x, y, targets = torch.randn(9, 4).requires_grad_(), torch.randn(5, 4), torch.randint(0, 5, (9,))
    with torch.no_grad():
        found = linear_cross_entropy(x, y, targets)
    assert not found.requires_grad and found.equal(linear_cross_entropy(x, y, targets).detach())


def test_nothing_to_predict_is_a_loss_and_a_gradient_of_zero():
    x, y = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = linear_cross_entropy(x, y, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and not y.grad.any()


def test_unit_vectors_and_their_gradients_are_those_of_normalize():
    torch.manual_seed(0)
    x, weights = torch.randn(3, 5, 7, dtype=torch.float64).requires_grad_(), torch.randn(3, 5, 7, dtype=torch.float64)
    assert torch.allclose(unit(x), F.normalize(x, dim=-1), atol=1e-12)
    found, expected = (
        torch.autograd.grad((f(x) * weights).sum(), x)[0] for f in (unit, lambda x: F.normalize(x, dim=-1))
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_vector_of_zeros_stays_zero():
    assert unit(torch.zeros(2, 3)).equal(torch.zeros(2, 3))


def test_the_fast_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout = Dropout(0.25)
    dropped = dropout(torch.ones(1001, 301))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    dropout.eval()
    assert dropout(torch.ones(3)).equal(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.0, 0.001, 0.5, 1.0])
def test_dropped_tensors_keep_their_type_and_gradients_are_dropped_alike(dtype, probability):
    x = torch.ones(37, 3, dtype=dtype, requires_grad=True)
    dropped = Dropout(probability)(x)
    dropped.sum().backward()
    assert dropped.dtype == dtype
    assert x.grad.equal(dropped)
    assert probability < 1 or not dropped.any()
