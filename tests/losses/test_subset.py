"""The likelihood of a set among all sets of its size."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.losses import topk_multilabel_loss
from danlu.simplex import log_esp, soft_topk


def problem(rows=5, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.rand(rows, classes, generator=generator) < 0.4


def test_one_label_is_cross_entropy():
    logits, _ = problem()
    target = torch.tensor([0, 3, 6, 1, 1])
    loss = topk_multilabel_loss(logits, F.one_hot(target, 7).bool())
    torch.testing.assert_close(loss, F.cross_entropy(logits, target), rtol=1e-12, atol=1e-12)


def test_probabilities_of_all_sets_sum_to_one():
    logits, _ = problem(rows=1, classes=5)
    sets = torch.combinations(torch.arange(5), 3)
    targets = torch.zeros(len(sets), 5, dtype=torch.bool).scatter_(1, sets, True)
    losses = topk_multilabel_loss(logits.expand(len(sets), 5), targets, reduction="none")
    assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-13)


def test_gradient():
    logits, target = problem()
    loss = topk_multilabel_loss(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    p = soft_topk(logits.detach(), target.sum(1, keepdim=True), method="grad")
    torch.testing.assert_close(grad, p - target.double(), rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: topk_multilabel_loss(x, target), logits)
    torch.testing.assert_close(topk_multilabel_loss(logits, target), loss.mean())
    torch.testing.assert_close(topk_multilabel_loss(logits, target, reduction="sum"), loss.sum())


def test_trivial_rows_and_half_inputs():
    target = torch.tensor([[False, False, False], [True, True, True], [True, False, False]])
    loss = topk_multilabel_loss(torch.zeros(3, 3, dtype=torch.bfloat16), target, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, math.log(3)]))
    hidden = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert topk_multilabel_loss(hidden, torch.tensor([[True, False, False]])) == math.inf
    bad = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert topk_multilabel_loss(bad, target[[2, 2]], reduction="none").isnan().tolist() == [True, False]


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_confident_rows_keep_their_digits(offset):
    """The sum over sets and that over the labels are alike to float32: their difference is taken before."""
    logits, target = torch.full((1, 1000), offset), torch.zeros(1, 1000, dtype=torch.bool)
    logits[0, :10], target[0, :10] = offset + 20, True
    # Sets that exchange one label: 10 times 990 of them, with the weight e^-20; those of two exchanges vanish.
    exact = math.log1p(9900 * math.exp(-20))
    loss = topk_multilabel_loss(logits, target)
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    in_float = log_esp(logits, 10) - logits[target].sum()
    assert abs(in_float.item() / exact - 1) > 0.2
    assert loss.dtype == torch.float32
    assert topk_multilabel_loss(logits.double(), target).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        (torch.zeros(2, 3), TypeError, "target must be a bool"),
        (torch.zeros(3, dtype=torch.bool), ValueError, "shape of input"),
        ([True], TypeError, "target must be a bool"),
    ],
)
def test_bad_input(target, error, match):
    with pytest.raises(error, match=match):
        topk_multilabel_loss(torch.zeros(2, 3), target)
    with pytest.raises(ValueError, match="reduction"):
        topk_multilabel_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), reduction="max")
