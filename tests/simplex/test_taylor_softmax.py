"""What is true of Taylor softmax alone."""

import math

import pytest
import torch

from danlu.simplex import TaylorSoftmax, softmax, taylor_softmax
from danlu.simplex._taylor_softmax import _log_polynomial

X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=torch.float64)
# Where f_k is smallest, which is the real root of f_{k-1}, and its value there.
LOWEST = {2: (-1.0, 0.5), 4: (-1.59607, 0.27040), 6: (-2.18061, 0.14932), 8: (-2.75900, 0.08327)}


def polynomial(x: torch.Tensor, order: int) -> torch.Tensor:
    return sum(x**m / math.factorial(m) for m in range(order + 1))


@pytest.mark.parametrize(
    ("order", "golden"),
    [
        (2, [0.1969697, 0.3030303, 0.40969697, 0.09030303]),
        (4, [0.1812464, 0.29778239, 0.43951581, 0.0814554]),
    ],
)
def test_golden_values(order, golden):
    torch.testing.assert_close(
        taylor_softmax(X, order=order), torch.tensor(golden, dtype=torch.float64), rtol=0, atol=6e-9
    )
    f = polynomial(X, order)
    torch.testing.assert_close(taylor_softmax(X, order=order), f / f.sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [2, 4, 6, 8, 12])
def test_logarithm_of_the_polynomial(order):
    x = torch.cat([torch.linspace(-60, 60, 1201, dtype=torch.float64), torch.tensor([10.0, -10.0, 1e6, -1e6]).double()])
    torch.testing.assert_close(_log_polynomial(x, order), polynomial(x, order).log(), rtol=1e-12, atol=1e-12)
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(_log_polynomial(x, order).sum(), x)
    with torch.no_grad():
        # f_k' = f_{k-1}
        expected = polynomial(x, order - 1) / polynomial(x, order)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", LOWEST)
def test_order_is_kept_only_to_the_right_of_the_root(order):
    """The claim that Taylor softmax preserves order is wrong to the left of the lowest point."""
    root, value = LOWEST[order]
    at = torch.tensor(root, dtype=torch.float64)
    assert float(polynomial(at, order)) == pytest.approx(value, abs=5e-5)
    assert abs(float(polynomial(at, order - 1))) < 5e-5
    left = torch.linspace(root - 3, root - 1e-3, 50, dtype=torch.float64)
    right = torch.linspace(root + 1e-3, root + 5, 50, dtype=torch.float64)
    assert (taylor_softmax(left, order=order).diff() < 0).all()
    assert (taylor_softmax(right, order=order).diff() > 0).all()


def test_shift():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert (taylor_softmax(x + 3) - taylor_softmax(x)).abs().max() > 0.05
    for shift in ("mean", "max"):
        torch.testing.assert_close(taylor_softmax(x + 3, shift=shift), taylor_softmax(x, shift=shift))
    torch.testing.assert_close(taylor_softmax(x, shift="mean"), taylor_softmax(x - x.mean()))
    torch.testing.assert_close(taylor_softmax(x, shift="max"), taylor_softmax(x - 2.0))
    # Masked scores do not count for the mean.
    masked = torch.cat([x, torch.tensor([-math.inf]).double()])
    torch.testing.assert_close(taylor_softmax(masked, shift="mean")[:3], taylor_softmax(x, shift="mean"))
    full = taylor_softmax(torch.full((2, 3), -math.inf), shift="max")
    assert torch.equal(full, torch.zeros(2, 3))


def test_tends_to_softmax_and_is_safe_far_away():
    torch.testing.assert_close(taylor_softmax(X, order=24), softmax(X), rtol=0, atol=1e-14)
    for dtype in (torch.float32, torch.float16):
        x = torch.tensor([3e4, -3e4, 1.0, 0.0], dtype=dtype, requires_grad=True)
        p = taylor_softmax(x, order=8)
        torch.testing.assert_close(p, torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=dtype), rtol=2e-3, atol=1e-20)
        (p * torch.arange(4).to(dtype)).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"order": 3}, ValueError, "order must be even"),
        ({"order": 0}, ValueError, "order must be at least 2"),
        ({"order": 2.0}, TypeError, "order must be an int"),
        ({"shift": "median"}, ValueError, "shift must be one of 'mean', 'max', got 'median'"),
    ],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        taylor_softmax(X, **kwargs)
    with pytest.raises(error, match=match):
        TaylorSoftmax(**kwargs)
