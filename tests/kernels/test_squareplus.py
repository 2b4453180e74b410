"""The compiled SquarePlus equals the reference: sizes, layouts, dtypes, threads."""

import pytest
import torch

from danlu.activations import squareplus

# Two units in the last place of either computation; half results are rounded from float32.
LIMITS = {torch.float64: 5e-16, torch.float32: 4e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def both(x, b, cotangent):
    found = []
    for impl in ("cpp", "reference"):
        leaf, amount = x.clone().requires_grad_(), torch.tensor(b, dtype=torch.float64, requires_grad=True)
        y = squareplus(leaf, amount, impl=impl)
        y.backward(cotangent)
        found.append((y.detach(), leaf.grad, amount.grad))
    return found


@dtypes
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 63, 100, 1000, 70_001])
@pytest.mark.parametrize("b", [4.0, 1.52, 1e-35, 0.0, 1e10])
def test_equals_the_reference(size, b, dtype):
    generator = torch.Generator().manual_seed(size)
    x = (5 * torch.randn(size, generator=generator)).to(dtype)
    cotangent = torch.randn(size, generator=generator).to(dtype)
    mine, theirs = both(x, b, cotangent)
    limit = LIMITS[dtype]
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(mine[0], theirs[0], rtol=limit, atol=smallest)
    torch.testing.assert_close(mine[1], theirs[1], rtol=2 * limit, atol=max(smallest, limit * 1e-3))
    if b > 1e-20:
        scale = cotangent.double().abs().sum() / b**0.5
        assert (mine[2] - theirs[2]).abs() <= 1e-5 * scale


@dtypes
def test_every_magnitude(dtype):
    info = torch.finfo(dtype)
    low, high = (int(torch.tensor(v, dtype=torch.float64).log10()) for v in (info.tiny, info.max))
    magnitude = torch.logspace(low, high, 5001, dtype=torch.float64).clamp(max=info.max).to(dtype)
    x = torch.cat((magnitude, -magnitude))
    for b in (4.0, 1e-3):
        mine, theirs = squareplus(x, b, impl="cpp"), squareplus(x, b, impl="reference")
        torch.testing.assert_close(mine, theirs, rtol=LIMITS[dtype], atol=info.tiny)


@dtypes
def test_layouts(dtype):
    x = torch.randn(6, 10, dtype=torch.float64).to(dtype)
    cotangent = torch.randn(10, 6, dtype=torch.float64).to(dtype)
    for view, grad in ((x.t(), cotangent), (x[:, ::2], cotangent.t()[:, :5]), (x[:1].expand(4, 10), x[:4])):
        mine, theirs = both(view, 4.0, grad)
        for a, e in zip(mine[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a, e, rtol=2 * LIMITS[dtype], atol=1e-6)
    leaf = x.clone().requires_grad_()
    squareplus(leaf, impl="cpp").sum().backward()  # a cotangent with strides of 0
    again = x.clone().requires_grad_()
    squareplus(again, impl="cpp").backward(torch.ones_like(x))
    assert torch.equal(leaf.grad, again.grad)


def test_threads_change_no_bit():
    x, cotangent = torch.randn(300_001), torch.randn(300_001)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(both(x, 4.0, cotangent)[0])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_sum_over_many_elements_keeps_its_digits():
    x, cotangent = torch.randn(1_000_000), torch.ones(1_000_000)
    amount = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    squareplus(x, amount, impl="cpp").backward(cotangent)
    exact = (1 / (4 * (x.double().square() + 4).sqrt())).sum()
    assert amount.grad.item() == pytest.approx(exact.item(), rel=2e-7)


def test_nan_stays_in_its_place():
    for dtype in LIMITS:
        x = torch.zeros(70, dtype=dtype)
        x[33] = float("nan")
        for b in (4.0, 0.0):
            y = squareplus(x, b, impl="cpp")
            assert y.isnan().nonzero().tolist() == [[33]]
