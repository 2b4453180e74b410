"""What is true of alpha-entmax alone."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.kernels import _cpp
from danlu.simplex import Entmax, entmax, entmax15, softmax, sparsemax
from danlu.simplex import _entmax_rows as rows

INF = math.inf
DOUBLE = torch.float64
X = torch.tensor([0.5, 1.0, 1.4, -0.3], dtype=DOUBLE)
GOLDEN = {
    1.0: [0.17993206, 0.29665781, 0.44256145, 0.08084868],
    1.25: [0.14834354, 0.3090591, 0.51129991, 0.03129744],
    1.5: [0.09852181, 0.31796273, 0.58351546, 0.0],
    1.75: [0.0203992, 0.32352824, 0.65607256, 0.0],
    2.0: [0.0, 0.3, 0.7, 0.0],
    3.0: [0.0, 0.1, 0.9, 0.0],
}
ALPHAS = [1.05, 1.25, 1.5, 1.75, 1.9, 2.0, 2.5]
IMPLS = ["reference", "cpp"]


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def bisected(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """The definition, by halving the interval of the threshold until nothing changes."""
    z = (alpha - 1) * (x - x.amax(-1, keepdim=True))
    low, high = torch.full_like(z[..., :1], -1.0), torch.zeros_like(z[..., :1])
    for _ in range(80):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = (z - low).clamp(min=0).pow(1 / (alpha - 1))
    return p / p.sum(-1, keepdim=True)


def sorted_entmax(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Alpha 1.5 and 2 from all supports of the sorted scores, in closed form."""
    z = (alpha - 1) * (x - x.amax(-1, keepdim=True))
    ranked = z.sort(-1, descending=True).values
    size = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean = ranked.cumsum(-1) / size
    if alpha == 2.0:
        threshold = mean - 1 / size
    else:
        spread = ranked.square().cumsum(-1) - size * mean.square()
        threshold = mean - ((1 - spread) / size).clamp(min=0).sqrt()
    support = (threshold <= ranked).sum(-1, keepdim=True)
    return (z - threshold.gather(-1, support - 1)).clamp(min=0).pow(1 / (alpha - 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", GOLDEN)
def test_golden_values(alpha, impl):
    found = entmax(X, alpha, impl=impl)
    torch.testing.assert_close(found, torch.tensor(GOLDEN[alpha], dtype=DOUBLE), rtol=0, atol=5e-9)
    as_tensor = entmax(X, torch.tensor([alpha], dtype=DOUBLE), impl=impl)
    torch.testing.assert_close(as_tensor, found, rtol=0, atol=1e-14)


def test_relatives():
    x = draw(5, 40)
    assert torch.equal(entmax(x, 1), softmax(x))
    assert torch.equal(entmax(x, 1.5), entmax15(x))
    assert torch.equal(entmax(x, 2), sparsemax(x))
    assert "alpha=1.5, dim=-1" in repr(Entmax())
    assert "tensor of shape (3, 1)" in repr(Entmax(torch.ones(3, 1)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1.0, 10.0])
def test_equals_a_bisection(alpha, scale, impl):
    for n in (1, 2, 7, 100, 3000):
        x = draw(4, n, seed=n, scale=scale)
        found = entmax(x, alpha, impl=impl)
        # Beyond 2 the threshold's rounding shows as its square root at the edge of the support.
        tolerance = 1e-13 if alpha <= 2 else 1e-9
        torch.testing.assert_close(found, bisected(x, alpha), rtol=1e-9, atol=tolerance)
        if alpha in (1.5, 2.0):
            torch.testing.assert_close(found, sorted_entmax(x, alpha), rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**16), base=st.floats(0.3, 0.999), n=st.integers(2, 200), alpha=st.sampled_from(ALPHAS))
def test_rows_that_are_hard_for_newton(seed, base, n, alpha):
    """Geometric gaps, in clusters: many steps, each of which drops a part of the support."""
    x = -(1 - base ** torch.arange(n, dtype=DOUBLE)) / (alpha - 1)
    x = x.repeat_interleave(1 + seed % 7) + 1e-9 * draw(n * (1 + seed % 7), seed=seed)
    for impl in IMPLS:
        torch.testing.assert_close(entmax(x, alpha, impl=impl), bisected(x, alpha), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_tends_to_softmax(dtype, impl):
    # The distance itself grows with the spread of log p, see the first-order term below: this is for a short row.
    assert (entmax(X.to(dtype), 1.001, impl=impl) - softmax(X.to(dtype))).abs().max() <= 1e-3
    x = draw(8, 50).to(dtype)
    for epsilon in (1e-3, 1e-5, 1e-6):
        found = entmax(x, 1 + epsilon, impl=impl).double()
        p = softmax(x.double())
        square = p.log().square()
        first_order = p - epsilon * p * (square - (p * square).sum(-1, keepdim=True)) / 2
        bound = 50 * epsilon**2 + (1e-6 if dtype == torch.float32 else 1e-9)
        assert (found - first_order).abs().max() <= bound


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_long_rows_sum_to_one(alpha, impl):
    n = 32_000
    spread = torch.cat([torch.zeros(1), torch.full((n - 1,), -0.9 / (alpha - 1))])
    for row in (draw(n).float(), torch.zeros(n), 1e-4 * draw(n).float(), spread, 1e4 * draw(n).float()):
        p = entmax(row, alpha, impl=impl)
        assert abs(float(p.double().sum()) - 1) <= 2e-6
        assert (p >= 0).all()
    torch.testing.assert_close(entmax(torch.zeros(n), alpha, impl=impl), torch.full((n,), 1 / n), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_temperature_is_one_hot(impl):
    x = torch.tensor([0.1, 0.3, -2.0], dtype=DOUBLE)
    for alpha in (1.25, 1.5, 2.0):
        assert torch.equal(entmax(x * 1e4, alpha, impl=impl), torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_derivatives(alpha, impl):
    x = draw(3, 6, scale=1.5).requires_grad_()
    exponents = torch.full((3, 1), alpha, dtype=DOUBLE).requires_grad_()

    def of_both(x, alpha):
        return entmax(x, alpha, impl=impl)

    assert torch.autograd.gradcheck(lambda x: of_both(x, alpha), x)
    assert torch.autograd.gradgradcheck(lambda x: of_both(x, alpha), x)
    assert torch.autograd.gradcheck(of_both, (x, exponents))
    assert torch.autograd.gradgradcheck(of_both, (x, exponents))


def test_hessian():
    x = draw(4, scale=1.0)

    def f(x):
        return (entmax(x, 1.3) * torch.arange(4.0, dtype=DOUBLE)).sum().square()

    hessian = torch.func.jacrev(torch.func.grad(f))(x)
    torch.testing.assert_close(hessian, hessian.T)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(f, x))


def written_form(p: torch.Tensor, alpha: float) -> torch.Tensor:
    """The derivative by alpha as papers write it."""
    s = torch.where(p > 0, p.pow(2 - alpha), 0)
    s = s / s.sum(-1, keepdim=True)
    eta = torch.where(p > 0, p * p.clamp(min=1e-300 if p.dtype == DOUBLE else 1e-38).log(), 0)
    epsilon = alpha - 1
    return (p - s) / epsilon**2 - (eta - s * eta.sum(-1, keepdim=True)) / epsilon


def test_derivative_by_alpha_is_the_written_one_and_does_not_cancel():
    x = draw(3, 9, scale=1.0)
    for alpha in (1.2, 1.5, 2.0):
        p = entmax(x, alpha)
        mine = rows._alpha_derivative(p, torch.tensor(alpha, dtype=DOUBLE))
        torch.testing.assert_close(mine, written_form(p, alpha), rtol=1e-9, atol=1e-12)
    p = softmax(x)
    square = p.log().square()
    limit = -p * (square - (p * square).sum(-1, keepdim=True)) / 2
    torch.testing.assert_close(rows._alpha_derivative(p, torch.tensor(1.0, dtype=DOUBLE)), limit, rtol=1e-12, atol=0)
    single = entmax(x, 1.001).float()
    exact = rows._alpha_derivative(entmax(x, 1.001), torch.tensor(1.001, dtype=DOUBLE))
    mine = rows._alpha_derivative(single, torch.tensor(1.001))
    assert (mine.double() - exact).abs().max() < 1e-5
    assert (written_form(single, 1.001).double() - exact).abs().max() > 1e-2


def test_gradient_by_alpha_close_to_one():
    x = draw(2, 7)
    v = draw(2, 7, seed=1)
    for alpha in (1.0, 1 + 1e-9, 1.0001, 1.01):
        exponent = torch.tensor(alpha, dtype=DOUBLE, requires_grad=True)
        (grad,) = torch.autograd.grad((entmax(x, exponent) * v).sum(), exponent)
        high, low = (float((entmax(x, max(1.0, alpha + h)) * v).sum()) for h in (1e-5, -1e-5))
        step = 1e-5 + min(1e-5, alpha - 1)
        assert float(grad) == pytest.approx((high - low) / step, rel=2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_alpha_per_head_and_per_row(impl):
    x = draw(2, 3, 4, 5)
    heads = torch.tensor([1.0, 1.3, 2.0], dtype=DOUBLE)[:, None, None].requires_grad_()
    found = entmax(x, heads, impl=impl)
    for i, alpha in enumerate((1.0, 1.3, 2.0)):
        torch.testing.assert_close(found[:, i], entmax(x[:, i], alpha, impl=impl), rtol=1e-12, atol=1e-14)
    found.square().sum().backward()
    assert heads.grad.shape == heads.shape
    assert (heads.grad != 0).all()
    by_dim = entmax(x.movedim(-1, 1), heads[None, None, :, :, 0].detach(), dim=1, impl=impl)
    torch.testing.assert_close(by_dim.movedim(1, -1), found.detach(), rtol=1e-12, atol=1e-14)
    # float32 scores with a float64 alpha, and the other way around.
    assert entmax(x.float(), heads, impl=impl).dtype == torch.float32
    mapped = torch.vmap(lambda x, a: entmax(x, a, impl=impl))(x.movedim(1, 0), heads)
    torch.testing.assert_close(mapped.movedim(0, 1), found.detach(), rtol=1e-12, atol=1e-14)
    module = Entmax(torch.nn.Parameter(torch.tensor(1.4)))
    assert [name for name, _ in module.named_parameters()] == ["alpha"]
    module(x.float()).square().sum().backward()
    assert module.alpha.grad is not None
    # A constant moves with its module and is saved with it.
    module = Entmax(torch.tensor([1.4])).double()
    assert module.alpha.dtype == DOUBLE
    assert list(module.state_dict()) == ["alpha"]
    assert not list(module.parameters())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients(dtype, impl):
    x = draw(4, 60).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    v = draw(4, 60, seed=1).to(dtype)
    for alpha in (1.25, 1.5, 2.0):
        (mine,) = torch.autograd.grad((entmax(x, alpha, impl=impl) * v).sum(), x)
        (theirs,) = torch.autograd.grad((entmax(exact, alpha) * v.double()).sum(), exact)
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_several_infinite_scores_share(impl):
    x = torch.tensor([INF, 0.0, INF, -INF])
    for alpha in (1.5, 2.0, 1.3):
        assert torch.equal(entmax(x, alpha, impl=impl), torch.tensor([0.5, 0.0, 0.5, 0.0]))


def test_agrees_with_the_package():
    entmax_package = pytest.importorskip("entmax")
    for shape, scale in (((64, 500), 3.0), ((8, 32_000), 1.0), ((16, 512), 1e-3)):
        x = draw(*shape, scale=scale).float().requires_grad_()
        v = draw(*shape, seed=1).float()
        for mine, theirs in ((entmax15, entmax_package.entmax15), (sparsemax, entmax_package.sparsemax)):
            first, second = mine(x), theirs(x, dim=-1)
            torch.testing.assert_close(first, second, rtol=0, atol=5e-7)
            grads = [torch.autograd.grad((p * v).sum(), x)[0] for p in (first, second)]
            torch.testing.assert_close(*grads, rtol=0, atol=3e-6)


def test_where_the_package_goes_wrong():
    entmax_package = pytest.importorskip("entmax")
    x = draw(3, 6).float()
    uniform = entmax_package.entmax_bisect(x, alpha=1.0)
    torch.testing.assert_close(uniform, torch.full_like(x, 1 / 6))
    assert (entmax(x, 1.0) - uniform).abs().max() > 0.1
    half = draw(64, 1000, scale=0.1).to(torch.bfloat16)
    assert (entmax_package.entmax15(half, dim=-1).float().sum(-1) - 1).abs().max() > 0.05
    assert (entmax15(half).float().sum(-1) - 1).abs().max() < 4e-3
    with pytest.raises((RuntimeError, IndexError)):
        entmax_package.entmax15(torch.full((1, 4), -INF))
    assert torch.equal(entmax15(torch.full((1, 4), -INF)), torch.zeros(1, 4))


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one."""
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    _cpp._library.cache_clear()
    yield
    _cpp._library.cache_clear()


def test_without_a_compiler_the_reference_runs(no_compiler):
    x = draw(3, 100).requires_grad_()
    assert torch.equal(entmax15(x), entmax15(x, impl="reference"))
    entmax15(x).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"impl='cpp', but the kernel cannot run here: no C\+\+ compiler"):
        entmax15(x, impl="cpp")


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"alpha": 0.5}, ValueError, r"alpha must be in \[1, inf\), got 0\.5"),
        ({"alpha": 0.0}, ValueError, "alpha must be in"),
        ({"alpha": -1.0}, ValueError, "alpha must be in"),
        ({"alpha": math.nan}, ValueError, "alpha must be in"),
        ({"alpha": "1.5"}, TypeError, "alpha must be a real number, got str"),
        ({"alpha": torch.tensor([0.5])}, ValueError, r"alpha must be at least 1, got 0\.5"),
        ({"alpha": torch.tensor([math.nan])}, ValueError, "alpha must be at least 1, got nan"),
        ({"alpha": torch.tensor([2])}, TypeError, "alpha must be a floating-point tensor"),
        ({"alpha": torch.ones(2)}, ValueError, r"broadcast to shape \(2, 1\) for input \(2, 3\), got \(2,\)"),
        ({"alpha": torch.ones(2, 1, device="meta")}, ValueError, "one device"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'reference', 'cpp', 'triton', got 'fast'"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' runs on 'cuda' tensors, got one on 'cpu'"),
    ],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        entmax(torch.zeros(2, 3), **kwargs)


def test_error_of_the_module():
    with pytest.raises(ValueError, match="alpha must be in"):
        Entmax(0.9)


@pytest.mark.parametrize("function", [entmax15, partial(entmax, alpha=1.3), partial(entmax, alpha=torch.tensor(1.3))])
def test_forward_mode_raises_and_names_the_way_out(function):
    """The Jacobian is symmetric, so the other product is the same."""
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative; take reverse mode: torch\.func\.vjp"):
        torch.func.jvp(function, (X,), (X,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(torch.func.grad(lambda x: function(x).square().sum()), (X,), (X,))
    v = torch.ones_like(X).cumsum(-1)
    torch.testing.assert_close(torch.func.vjp(function, X)[1](v)[0], torch.func.jacrev(function)(X) @ v)
