"""The compiled rows of entmax against the reference: odd sizes, strides, dtypes, threads, rows without an answer."""

import math

import pytest
import torch
from torch import Tensor

from danlu.kernels import entmax as kernel
from danlu.simplex import _entmax_rows as rows
from danlu.simplex import entmax

SIZES = [1, 2, 3, 63, 64, 65, 100, 1000]
ALPHAS = [1.0, 1.001, 1.25, 4 / 3, 1.5, 1.7, 2.0, 2.5]
# In the dtype's spacing at 1. The reference computes in float32 at least and the kernel in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_and_product(n, dtype):
    for alpha in ALPHAS:
        x, v = draw(5, n, seed=n).to(dtype), draw(5, n, seed=1).to(dtype)
        tolerance = TOLERANCE[dtype] if alpha <= 2 else max(TOLERANCE[dtype], 1e-3 if dtype != torch.float64 else 1e-7)
        p = kernel.entmax_cpu(x, alpha)
        assert p.dtype == dtype
        torch.testing.assert_close(p, rows._reference(x, alpha), rtol=0, atol=tolerance)
        per_row = torch.full((5, 1), alpha, dtype=torch.float64)
        torch.testing.assert_close(kernel.entmax_cpu(x, per_row), p, rtol=0, atol=tolerance)
        found = kernel.entmax_vjp_cpu(p, v, alpha)
        # Both from the same probabilities.
        exact = rows._vjp(p.double(), v.double(), alpha)
        assert found.dtype == dtype
        scale = max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_halves_are_within_an_ulp_of_float64():
    for dtype in (torch.bfloat16, torch.float16):
        x = draw(20, 300).to(dtype)
        for alpha in (1.25, 1.5, 2.0):
            exact = entmax(x.double(), alpha)
            spacing = torch.finfo(dtype).eps * exact.clamp(min=torch.finfo(dtype).smallest_normal)
            assert ((entmax(x, alpha, impl="cpp").double() - exact).abs() <= 0.501 * spacing).all()
            assert ((entmax(x, alpha, impl="reference").double() - exact).abs() <= 2 * spacing).all()


def test_strides_shapes_and_dims():
    x = draw(4, 6, 5)
    for dim in (0, 1, 2, -1):
        moved = entmax(x.movedim(dim, -1).contiguous(), 1.3, impl="cpp").movedim(-1, dim)
        assert torch.equal(entmax(x, 1.3, dim=dim, impl="cpp"), moved)
    assert torch.equal(entmax(x[:, ::2, ::2], 1.3), entmax(x[:, ::2, ::2].contiguous(), 1.3))
    assert torch.equal(entmax(x[:1, :1].expand(7, 3, 5), 1.3)[3, 2], entmax(x[0, 0], 1.3))
    assert entmax(x[:0], 1.3, impl="cpp").shape == (0, 6, 5)
    # A cotangent that is an expanded scalar.
    leaf = x.clone().requires_grad_()
    entmax(leaf, 1.3, impl="cpp").sum().backward()
    assert leaf.grad.abs().max() < 1e-12


def test_threads_change_nothing():
    x = draw(300, 2000).float()
    v = draw(300, 2000, seed=1).float()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            p = kernel.entmax_cpu(x, 1.5)
            found.append((p, kernel.entmax_vjp_cpu(p, v, 1.5)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_without_an_answer(dtype):
    x = draw(6, 130).to(dtype)
    x[0] = -math.inf
    x[1, 100] = math.nan
    x[2, 5] = math.inf
    x[3, ::2] = -math.inf
    x[4] = 7.0
    v = torch.ones_like(x)
    for alpha in (1.0, 1.5, 1.7, 2.0):
        p = kernel.entmax_cpu(x, alpha)
        reference = rows._reference(x, alpha)
        torch.testing.assert_close(p, reference, rtol=0, atol=TOLERANCE[dtype], equal_nan=True)
        assert (p[0] == 0).all()
        assert p[1].isnan().all()
        assert p[2, 5] == 1
        assert (p[3, ::2] == 0).all()
        dx, dx_reference = kernel.entmax_vjp_cpu(p, v, alpha), rows._vjp(p.double(), v.double(), alpha)
        assert (dx[0] == 0).all()
        assert dx[1].isnan().all()
        assert dx_reference[1].isnan().all()
        assert (dx[3, ::2] == 0).all()
        assert dx[2:].isfinite().all()


def test_everything_in_the_support():
    """No compaction helps; the threshold of many nearly equal scores is where single precision would lose digits."""
    n = 4096
    for scale in (0.0, 1e-6, 1e-3, 1e-1):
        x = draw(2, n, scale=scale).float()
        for alpha in (1.25, 1.5, 2.0):
            p = kernel.entmax_cpu(x, alpha)
            exact = kernel.entmax_cpu(x.double(), alpha)
            assert abs(float(p.double().sum()) - 2) < 4e-7
            torch.testing.assert_close(p.double(), exact, rtol=1e-7, atol=1e-12)


def solved_in_logarithms(x: Tensor, alpha: float) -> Tensor:
    """By halving the interval of the logarithm of the largest score's distance from the threshold."""
    beta, z = alpha - 1, (alpha - 1) * (x - x.amax(-1, keepdim=True))
    low, high = torch.zeros_like(z[..., :1]), torch.full_like(z[..., :1], beta * math.log(x.shape[-1]))
    for _ in range(100):
        middle = (low + high) / 2
        total = (1 + middle.exp() * z).clamp(min=0).pow(1 / beta).sum(-1, keepdim=True)
        below = beta * total.log() >= middle
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    p = (1 + low.exp() * z).clamp(min=0).pow(1 / beta)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_nearly_equal_scores_keep_their_digits(impl, dtype):
    """Their distance from the threshold is n to the power 1 - alpha: next to 1 it would vanish."""
    for n, alpha in ((10, 6.0), (300, 4.0), (3000, 2.0), (3000, 2.5), (3000, 3.0), (32_000, 1.5), (32_000, 3.0)):
        for scale in (1e-8, 1e-3):
            x = draw(2, n, seed=n, scale=scale).to(dtype)
            exact = solved_in_logarithms(x.double(), alpha)
            error = (entmax(x, alpha, impl=impl).double() - exact).abs().max() / exact.max()
            assert error <= (3e-6 if dtype == torch.float32 else 1e-7)


def test_scores_at_the_threshold_are_outside():
    """Up to rounding, which must not add to the support: sums that come out even, on coarse grids."""
    for impl in ("cpp", "reference"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for size in range(1, 8):
                # `size` scores of 1 and one of 1 - 1/size, which is the threshold.
                x = torch.cat([torch.ones(size), torch.tensor([1.0 - 1.0 / size, -3.0])]).to(torch.float64)
                x = x.to(dtype)
                if float(x[size].double()) != 1.0 - 1.0 / size:
                    continue
                p = entmax(x, 2.0, impl=impl)
                assert ((p > 0).tolist()) == [True] * size + [False, False]


def test_the_last_candidates_are_not_cut_off():
    """Scores exactly at the edge, where the cut is rounded."""
    for dtype in (torch.float32, torch.bfloat16):
        big = torch.tensor([[1000.0, 999.5, 998.0, 997.9], [4096.0, 4095.0, 4094.0, 0.0]]).to(dtype)
        for alpha in (1.25, 1.5, 2.0):
            exact = rows._reference(big.double(), alpha)
            torch.testing.assert_close(kernel.entmax_cpu(big, alpha).double(), exact, rtol=0, atol=TOLERANCE[dtype])


def test_what_triton_refuses():
    assert kernel.refusal_of_cuda(1000, 1.5) is None
    assert "one alpha for all rows" in kernel.refusal_of_cuda(1000, torch.tensor(1.5))
    assert "at most 32768 scores, got 40000" in kernel.refusal_of_cuda(40_000, 1.5)
    for alpha in (1.0, 1.01, 2.5):
        assert "alpha in [1.05, 2]" in kernel.refusal_of_cuda(1000, alpha)


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_cpu_and_gpu_agree(alpha):
    for n in (1, 100, 5000, 40_000):
        x, v = draw(7, n).float(), draw(7, n, seed=1).float()
        results = []
        for device in ("cpu", "cuda"):
            leaf = x.to(device).requires_grad_()
            p = entmax(leaf, alpha)
            (p * v.to(device)).sum().backward()
            results.append((p.detach().cpu(), leaf.grad.cpu()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-6)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=2e-5)
