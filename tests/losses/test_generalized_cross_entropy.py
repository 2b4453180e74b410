"""Generalized cross entropy and MixCE: limits, weights, and where they meet TaiLr."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from danlu.losses import GeneralizedCE, MixCE, generalized_cross_entropy, mixce_loss, tailr_loss


def batch():
    logits = 2 * torch.randn(12, 5, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(5, (12,))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (partial(generalized_cross_entropy, q=0.0), F.cross_entropy),
        (partial(generalized_cross_entropy, q=1.0), partial(tailr_loss, gamma=1.0)),
        (partial(generalized_cross_entropy, q=1e-9), F.cross_entropy),
        (partial(mixce_loss, eta=1.0), F.cross_entropy),
        (partial(mixce_loss, eta=0.0), partial(tailr_loss, gamma=1.0)),
        (
            partial(mixce_loss, eta=0.3),
            lambda z, y: 0.3 * F.cross_entropy(z, y) + 0.7 * tailr_loss(z, y, gamma=1.0),
        ),
    ],
)
def test_limits(loss, expected):
    logits, target = batch()
    mine, theirs = loss(logits, target), expected(logits, target)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    (first,), (second,) = torch.autograd.grad(mine, logits), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("q", [0.3, 0.7])
def test_weight_is_a_power_of_the_probability(q):
    logits, target = batch()
    (grad,) = torch.autograd.grad(generalized_cross_entropy(logits, target, q=q, reduction="sum"), logits)
    p = logits.softmax(-1).detach()
    weight = p.gather(1, target[:, None]) ** q
    torch.testing.assert_close(grad, weight * (p - F.one_hot(target, 5)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.2, 0.9])
def test_gradient_is_that_of_the_paper_of_mixce(eta):
    logits, target = batch()
    (grad,) = torch.autograd.grad(mixce_loss(logits, target, eta=eta, reduction="sum"), logits)
    nll = F.cross_entropy(logits, target, reduction="none")
    weight = (eta + (1 - eta) * (-nll).exp()).detach()
    (expected,) = torch.autograd.grad((weight * nll).sum(), logits)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", [GeneralizedCE(0.0), GeneralizedCE(0.6), MixCE(0.4), MixCE(0.0)])
def test_row_loss_agrees_with_autograd(row):
    nll = torch.linspace(0.0, 30.0, 50, dtype=torch.float64, requires_grad=True)
    value, slope = row.value_and_derivative(nll)
    (expected,) = torch.autograd.grad(value.sum(), nll)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)


def test_golden_values():
    logits, target = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    assert generalized_cross_entropy(logits, target, q=0.5).item() == pytest.approx(1.0)
    assert mixce_loss(logits, target, eta=0.5).item() == pytest.approx(0.5 * 1.3862943611 + 0.375)
    assert generalized_cross_entropy(logits, target).item() == pytest.approx((1 - 0.25**0.7) / 0.7)


def test_an_impossible_label_is_finite_where_the_loss_is_bounded():
    logits = torch.tensor([[0.0, -float("inf")]])
    assert generalized_cross_entropy(logits, torch.tensor([1]), q=0.5) == 2.0
    assert mixce_loss(logits, torch.tensor([1]), eta=0.0) == 1.0


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        (generalized_cross_entropy, {"q": -0.1}, "q must be in"),
        (generalized_cross_entropy, {"q": 1.1}, "q must be in"),
        (mixce_loss, {"eta": 2.0}, "eta must be in"),
        (mixce_loss, {"label_smoothing": -1.0}, "label_smoothing must be in"),
        (generalized_cross_entropy, {"label_smoothing": 2.0}, "label_smoothing must be in"),
    ],
)
def test_bad_options(loss, options, match):
    with pytest.raises(ValueError, match=match):
        loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options)


def test_compile():
    logits, target = batch()
    for loss in (generalized_cross_entropy, partial(mixce_loss, label_smoothing=0.1)):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), loss(logits, target))
