"""What is true of the loss of sparse softmax."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from danlu.losses import SparseSoftmaxLoss, sparse_softmax_loss
from danlu.simplex import sparse_softmax

X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden_values():
    assert float(sparse_softmax_loss(X, torch.tensor(2), k=2)) == pytest.approx(0.51301525, abs=5e-9)
    assert float(sparse_softmax_loss(X, torch.tensor(0), k=2)) == pytest.approx(1.41301525, abs=5e-9)


@given(seed=st.integers(0, 2**16), n=st.integers(2, 20), k=st.integers(1, 20))
def test_gradient_and_bounds(seed, n, k):
    k = min(k, n)
    x = draw(n, seed=seed).requires_grad_()
    target = torch.tensor(seed % n)
    loss = sparse_softmax_loss(x, target, k=k)
    (grad,) = torch.autograd.grad(loss, x)
    p = sparse_softmax(x.detach(), k=k)
    torch.testing.assert_close(grad, p - F.one_hot(target, n))
    if p[target] == 0:
        assert float(loss.detach()) >= math.log(k)
        assert grad[target] == -1
    else:
        torch.testing.assert_close(loss.detach(), -p[target].log())
    full = F.cross_entropy(x[None], target[None])
    assert float(loss.detach()) <= float(full.detach()) + 1e-12
    torch.testing.assert_close(sparse_softmax_loss(x, target, k=n), full)


def test_second_derivative_ties_and_masks():
    x = draw(3, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: sparse_softmax_loss(z, torch.arange(3), k=3), x)
    tied = torch.tensor([2.0, 1.0, 1.0, 0.0], requires_grad=True)
    sparse_softmax_loss(tied, torch.tensor(3), k=2).backward()
    torch.testing.assert_close(tied.grad, sparse_softmax(tied.detach(), k=2) - F.one_hot(torch.tensor(3), 4))
    masked = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf] * 3])
    rows = sparse_softmax_loss(masked, torch.tensor([1, 0]), k=3, reduction="none")
    torch.testing.assert_close(rows[0], F.cross_entropy(masked[:1, :2], torch.tensor([1])))
    assert rows[1].isnan()


def test_token_weight_and_module():
    x, target = draw(4, 12), torch.tensor([0, 1, -100, 3])
    weight = torch.tensor([1.0, 0.0, 5.0, 2.0])
    rows = sparse_softmax_loss(x, target, reduction="none")
    torch.testing.assert_close(
        sparse_softmax_loss(x, target, token_weight=weight, reduction="sum"), (rows * weight).sum()
    )
    module = SparseSoftmaxLoss(k=5, ignore_index=3, reduction="sum")
    assert torch.equal(module(x[:2], target[:2]), sparse_softmax_loss(x[:2], target[:2], k=5, reduction="sum"))
    assert "k=5, ignore_index=3, reduction='sum'" in repr(module)


def test_errors():
    with pytest.raises(ValueError, match="k must be at most the number of classes, got 10 for 4"):
        sparse_softmax_loss(X, torch.tensor(0))
    with pytest.raises(ValueError, match="k must be at least 1"):
        sparse_softmax_loss(X, torch.tensor(0), k=0)
    with pytest.raises(TypeError, match="k must be an int"):
        SparseSoftmaxLoss(k=1.5)
    with pytest.raises(ValueError, match="token_weight must have the shape"):
        sparse_softmax_loss(X, torch.tensor(0), k=2, token_weight=torch.ones(2))
