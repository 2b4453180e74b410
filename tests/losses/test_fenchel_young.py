"""What is true of the Fenchel-Young losses of entmax and sparsemax."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from danlu.losses import EntmaxLoss, SparsemaxLoss, entmax_loss, sparsemax_loss
from danlu.simplex import entmax, sparsemax

X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)
ALPHAS = [1.25, 1.5, 1.75, 2.0]


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden_values():
    target = torch.tensor(1)
    assert float(entmax_loss(X, target)) == pytest.approx(0.64287264, abs=5e-9)
    assert float(sparsemax_loss(X, target)) == pytest.approx(0.49, abs=1e-12)
    assert float(entmax_loss(X, target, alpha=2.0)) == float(sparsemax_loss(X, target))


@given(seed=st.integers(0, 2**16), n=st.integers(2, 20), alpha=st.sampled_from(ALPHAS))
def test_gradient_is_probability_less_one_hot(seed, n, alpha):
    x = draw(3, n, seed=seed).requires_grad_()
    target = torch.arange(3) % n
    rows = entmax_loss(x, target, alpha=alpha, reduction="none")
    (grad,) = torch.autograd.grad(rows.sum(), x)
    expected = entmax(x, alpha) - F.one_hot(target, n)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    # The definition, with a maximum over the simplex: no other point gives more.
    others = torch.distributions.Dirichlet(torch.ones(n, dtype=torch.float64)).sample((50,))
    entropy = (1 - others.pow(alpha).sum(-1)) / (alpha * (alpha - 1))
    below = others @ x.detach().T + entropy[:, None] - x.detach()[torch.arange(3), target]
    assert (rows >= 0).all()
    assert (rows + 1e-12 >= below).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_margin(alpha):
    """0 if and only if the target leads by 1/(alpha-1): 2 for 1.5, 1 for sparsemax."""
    margin = 1 / (alpha - 1)
    for lead, zero in ((margin + 1e-6, True), (margin, True), (margin - 0.1, False)):
        x = torch.tensor([[lead, 0.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
        loss = entmax_loss(x, torch.tensor([0]), alpha=alpha)
        loss.backward()
        # Just below the margin the loss vanishes with a high power of what lacks.
        assert (float(loss.detach()) <= 1e-15) == zero
        assert (float(x.grad.abs().max()) <= 1e-12) == zero


@given(seed=st.integers(0, 2**16), n=st.integers(2, 20))
def test_closed_form_of_sparsemax(seed, n):
    x = draw(n, seed=seed)
    target = torch.tensor(seed % n)
    p = sparsemax(x)
    support = p > 0
    threshold = (x - p)[support][0]
    expected = 0.5 - x[target] + 0.5 * (x[support].square() - threshold.square()).sum()
    torch.testing.assert_close(sparsemax_loss(x, target), expected, rtol=1e-10, atol=1e-12)


def test_the_surrogate_of_the_article_has_another_gradient():
    x = draw(5, 6).requires_grad_()
    target = torch.arange(5)
    p = entmax(x)
    error = p - F.one_hot(target, 6)
    (true,) = torch.autograd.grad(entmax_loss(x, target, reduction="sum"), x)
    (written,) = torch.autograd.grad((error * x.detach()).sum(), x, retain_graph=True)
    (corrected,) = torch.autograd.grad((error.detach() * x).sum(), x)
    torch.testing.assert_close(true, error.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(corrected, error.detach(), rtol=0, atol=1e-12)
    assert (written - error).abs().max() > 0.5


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_second_derivative_is_the_jacobian(alpha):
    x = draw(2, 5, scale=1.0).requires_grad_()
    target = torch.tensor([1, 4])
    assert torch.autograd.gradgradcheck(lambda x: entmax_loss(x, target, alpha=alpha), x)
    hessian = torch.autograd.functional.hessian(lambda z: entmax_loss(z, target[0], alpha=alpha), x[0].detach())
    torch.testing.assert_close(hessian, torch.func.jacrev(lambda z: entmax(z, alpha))(x[0].detach()))


def test_limits():
    x, target = draw(4, 9), torch.arange(4)
    torch.testing.assert_close(entmax_loss(x, target, alpha=1.0), F.cross_entropy(x, target))
    for epsilon in (1e-3, 1e-5, 1e-7):
        difference = entmax_loss(x, target, alpha=1 + epsilon) - F.cross_entropy(x, target)
        assert abs(float(difference)) <= 50 * epsilon + 1e-8


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_logits_axes_and_ignored_rows(alpha):
    x = draw(2, 3, 6)
    x[..., 4] = -math.inf
    x[1, 2] = -math.inf
    target = torch.tensor([[0, 1, 5], [-100, 3, -100]])
    x.requires_grad_()
    rows = entmax_loss(x, target, alpha=alpha, reduction="none")
    assert rows.isfinite().all()
    rows.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[..., 4] == 0).all()
    kept = [0, 1, 2, 3, 5]
    smaller = entmax_loss(x.detach()[0, 2, kept], torch.tensor(4), alpha=alpha)
    torch.testing.assert_close(rows[0, 2], smaller)
    assert entmax_loss(torch.full((1, 3), -math.inf), torch.tensor([0]), alpha=alpha).isnan()
    assert entmax_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), alpha=alpha) == math.inf


def test_token_weight():
    x, target = draw(4, 5).requires_grad_(), torch.tensor([0, 1, -100, 3])
    weight = torch.tensor([1.0, 0.0, 5.0, 2.0])
    rows = entmax_loss(x, target, reduction="none")
    weighted = entmax_loss(x, target, token_weight=weight, reduction="none")
    torch.testing.assert_close(weighted, rows * weight)
    torch.testing.assert_close(entmax_loss(x, target, token_weight=weight), weighted.sum() / 3)
    with pytest.raises(ValueError, match=r"token_weight must have the shape of target \(4,\), got \(3,\)"):
        entmax_loss(x, target, token_weight=weight[:3])
    with pytest.raises(ValueError, match="requires a gradient; detach it"):
        entmax_loss(x, target, token_weight=weight.clone().requires_grad_())


def test_large_logits_in_single_precision():
    """Differences to the target are summed: the value does not drown in a common offset."""
    x = draw(6, 50).float()
    target = torch.arange(6)
    exact = entmax_loss(x.double(), target, reduction="none")
    torch.testing.assert_close(entmax_loss(x, target, reduction="none").double(), exact, rtol=1e-5, atol=1e-6)
    shifted = entmax_loss((x + 4096.0), target, reduction="none")
    exact = entmax_loss((x + 4096.0).double(), target, reduction="none")
    torch.testing.assert_close(shifted.double(), exact, rtol=1e-5, atol=1e-5)
    written = (entmax(x + 4096.0) * (x + 4096.0)).sum(-1) - (x + 4096.0)[torch.arange(6), target]
    offset = (1 - entmax(x + 4096.0).pow(1.5).sum(-1)) / 0.75
    assert (written + offset - exact).abs().max() > 1e-4


def test_agrees_with_the_package_and_works_where_it_does_not():
    package = pytest.importorskip("entmax")
    x, target = draw(30, 40).float().requires_grad_(), torch.arange(30)
    for mine, theirs in (
        (entmax_loss, package.Entmax15Loss(reduction="sum")),
        (sparsemax_loss, package.SparsemaxLoss(reduction="sum")),
    ):
        values = [mine(x, target, reduction="sum"), theirs(x, target)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        torch.testing.assert_close(*grads, rtol=0, atol=3e-6)
    masked = x.detach().clone()
    masked[:, 39] = -math.inf
    assert package.Entmax15Loss()(masked, target).isnan()
    assert entmax_loss(masked, target).isfinite()


def test_vmap_and_func():
    x, target = draw(4, 3, 5), torch.randint(5, (4, 3))
    expected = torch.stack([entmax_loss(a, b) for a, b in zip(x, target, strict=True)])
    torch.testing.assert_close(torch.vmap(entmax_loss)(x, target), expected)
    per_sample = torch.vmap(torch.func.grad(entmax_loss))(x, target)
    torch.testing.assert_close(per_sample[2], torch.func.grad(entmax_loss)(x[2], target[2]))


def test_modules():
    x, target = draw(4, 5), torch.tensor([0, 1, 4, 3])
    module = EntmaxLoss(1.25, ignore_index=4, reduction="sum")
    assert torch.equal(module(x, target), entmax_loss(x, target, alpha=1.25, ignore_index=4, reduction="sum"))
    assert "alpha=1.25, ignore_index=4, reduction='sum'" in repr(module)
    assert torch.equal(SparsemaxLoss()(x, target, normalizer=3), sparsemax_loss(x, target, normalizer=3))
    assert "reduction='none'" in repr(SparsemaxLoss(reduction="none"))


@pytest.mark.parametrize("alpha", [0.5, 0.0, math.nan])
def test_errors(alpha):
    with pytest.raises(ValueError, match="alpha must be in"):
        entmax_loss(X, torch.tensor(0), alpha=alpha)
    with pytest.raises(ValueError, match="alpha must be in"):
        EntmaxLoss(alpha)
    with pytest.raises(ValueError, match="reduction must be one of"):
        SparsemaxLoss(reduction="avg")


@pytest.mark.parametrize("loss", [entmax_loss, sparsemax_loss])
def test_forward_mode_raises_and_names_the_way_out(loss):
    logits, target = torch.linspace(-1, 4, 12).sin().view(3, 4), torch.tensor([0, 2, -100])
    with pytest.raises(NotImplementedError, match=r"their losses have no forward-mode .* torch\.func\.grad of a loss"):
        torch.func.jvp(lambda x: loss(x, target), (logits,), (logits,))
    direction = torch.func.grad(lambda x: loss(x, target))(logits) * logits
    step = (loss(logits + 1e-2 * logits, target) - loss(logits - 1e-2 * logits, target)) / 2e-2
    torch.testing.assert_close(direction.sum(), step, rtol=1e-3, atol=1e-4)
