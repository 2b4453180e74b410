"""SquarePlus: identities, the naive form's loss of digits, presets, a learned b, and the paths against each other."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.activations import SquarePlus, squareplus
from danlu.kernels import _cpp

INFINITY = float("inf")
impls = pytest.mark.parametrize("impl", ["reference", "cpp"])
amounts = pytest.mark.parametrize("b", [1.5238210, 4 * math.log(2) ** 2, 4.0, 0.01])


def naive(x, b):
    """The definition as it stands."""
    return (x + (x * x + b).sqrt()) / 2


def grid(limit=30.0, points=4001, dtype=torch.float64):
    return torch.linspace(-limit, limit, points, dtype=dtype)


@impls
@amounts
def test_identities(b, impl):
    x = grid()
    y, mirrored = squareplus(x, b, impl=impl), squareplus(-x, b, impl=impl)
    near = {"rtol": 1e-15, "atol": 1e-15}
    torch.testing.assert_close(y * mirrored, torch.full_like(x, b / 4), **near)
    torch.testing.assert_close(y - mirrored, x, rtol=1e-15, atol=4e-15)
    torch.testing.assert_close(y, naive(x, b), rtol=1e-12, atol=1e-14)
    far = x.abs() > 1  # the inverse subtracts, so its absolute error is that of the larger term
    torch.testing.assert_close(y - b / (4 * y), x, rtol=0, atol=2e-14)
    assert squareplus(torch.zeros(1, dtype=torch.float64), b, impl=impl).item() == pytest.approx(
        math.sqrt(b) / 2, rel=1e-15
    )
    gap = y - x.clamp(min=0)
    assert gap.max() <= math.sqrt(b) / 2 * (1 + 1e-15)
    assert (gap[~far] >= 0).all()
    assert gap.argmax() == 2000


@impls
@amounts
def test_derivatives_from_the_output(b, impl):
    x = grid().requires_grad_()
    y = squareplus(x, b, impl=impl)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    root = (x * x + b).sqrt()
    with torch.no_grad():
        expected = 0.5 * (1 + x / root)
        # The definition of the slope cancels for negative x; the output does not.
        torch.testing.assert_close(slope, expected, rtol=0, atol=4.5e-16)
        torch.testing.assert_close(slope, y * y / (y * y + b / 4), rtol=1e-15, atol=0)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    torch.testing.assert_close(curvature, b / (2 * root**3), rtol=1e-12, atol=1e-15)
    (third,) = torch.autograd.grad(curvature.sum(), x)
    torch.testing.assert_close(third, -1.5 * b * x.detach() / root.detach() ** 5, rtol=1e-10, atol=1e-12)


@impls
def test_derivative_in_b(impl):
    x = grid(5, 101)
    b = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, 101, dtype=torch.float64)
    (slope,) = torch.autograd.grad((squareplus(x, b, impl=impl) * weights).sum(), b)
    torch.testing.assert_close(slope, (weights / (4 * (x * x + 1.7).sqrt())).sum(), rtol=1e-14, atol=0)
    x.requires_grad_()
    few = x.detach()[::9].requires_grad_()
    call = lambda x, b: squareplus(x, b, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(call, (few, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (few, b), check_fwd_over_rev=True)
    changed = lambda x, b: squareplus(x * 1.0, b, impl=impl, inplace=True)  # noqa: E731
    assert torch.autograd.gradcheck(changed, (few, b))
    assert torch.autograd.gradgradcheck(changed, (few, b))


@impls
def test_correction_the_definition_loses_every_digit_where_x_is_negative(impl):
    """In float32 its relative error exceeds 4.4, from -5.8e3 on it is often 0; ours stays at rounding."""
    single = -torch.logspace(0, 4.2, 20_000)
    exact = 1 / naive(-single.double(), 4.0)  # y(x) y(-x) = b / 4
    wrong = naive(single, 4.0)
    assert (wrong.double() / exact - 1).abs().max() > 4.4
    assert single[wrong == 0].max() > -5.9e3
    assert (wrong[single < -1.19e4] == 0).all()
    assert (naive(torch.tensor([-22.75, -64.0], dtype=torch.bfloat16), 4.0) == 0).all()
    assert naive(torch.tensor([300.0], dtype=torch.float16), 4.0).isinf().all()
    ours = squareplus(single, impl=impl).double()
    assert (ours * naive(-single.double(), 4.0) - 1).abs().max() <= 2.4e-7
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.tensor([-5.9e3, -30.0, 300.0], dtype=dtype)
        expected = squareplus(half.double()).to(dtype)
        assert (expected > 0).all()
        assert torch.equal(squareplus(half, impl=impl), expected)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_values(dtype, impl):
    x = torch.tensor([1e4, -1e4, 1e20, -1e20, 3e38, -3e38, INFINITY, -INFINITY, float("nan")], dtype=dtype)
    x.requires_grad_()
    y = squareplus(x, impl=impl)
    near = naive(torch.tensor(1e4, dtype=torch.float64), 4.0).item()
    expected = torch.tensor([near, 1 / near, 1e20, 1e-20, 3e38, 1 / 3e38, INFINITY, 0, float("nan")], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=3e-7 if dtype == torch.float32 else 1e-15, atol=0, equal_nan=True)
    y.sum().backward()
    assert x.grad[-1].isnan()
    torch.testing.assert_close(x.grad[:-1], torch.tensor([1.0, 0] * 4, dtype=dtype), rtol=2e-8, atol=2e-8)
    if dtype == torch.float64:  # where squares are infinite in double as well
        assert squareplus(torch.tensor([1e300, -1e300], dtype=dtype), impl=impl).tolist() == [1e300, 1e-300]


@impls
def test_zero_is_relu(impl):
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0, INFINITY, -INFINITY, float("nan")], requires_grad=True)
    y = squareplus(x, 0.0, impl=impl)
    assert torch.equal(y[:-1], F.relu(x)[:-1])
    assert y[-1].isnan()
    y[:-1].sum().backward()
    assert x.grad[:-1].tolist() == [0, 0, 0, 1, 1, 0]
    b = torch.zeros((), requires_grad=True)
    squareplus(x[:4], b, impl=impl).sum().backward()
    assert b.grad.isfinite()
    for small in (1e-45, 1e-38, 1e-30):
        tiny = squareplus(torch.tensor([-1.0, 0.0, 1.0]), small, impl=impl)
        torch.testing.assert_close(tiny, torch.tensor([0.0, math.sqrt(small) / 2, 1.0]), rtol=0.5, atol=1e-30)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_numbers_and_small_b(dtype, impl):
    """Where squares vanish nothing is divided by 0: ReLU has slope 1 above 0 however small the input is."""
    tiny = torch.tensor([1e-15, 1e-20, 1e-25, 1e-40, 2.0**-126, 1.4e-45, 1e-310]).to(dtype)
    x = torch.cat((tiny, -tiny, torch.zeros(1, dtype=dtype))).requires_grad_()
    y = squareplus(x, 0.0, impl=impl)
    assert torch.equal(y, F.relu(x))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(slope, (x > 0).to(dtype))
    assert (torch.autograd.grad(slope.sum(), x)[0] == 0).all()
    for amount in (0.0, 1e-45, 1e-38, 1e-30):
        b = torch.tensor(amount, dtype=torch.float64).to(dtype).requires_grad_()
        for one in (amount, b):
            out = squareplus(x, one, impl=impl)
            by_x = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
            assert out.isfinite().all()
            assert ((by_x >= 0) & (by_x <= 1)).all()
            assert not torch.autograd.grad(by_x.sum(), x)[0].isnan().any()
        if dtype != torch.float64:
            assert torch.autograd.grad(squareplus(x, b, impl=impl).sum(), b)[0].isfinite()


@impls
def test_second_derivative_for_small_b(impl):
    """An inverse of the squares, whose square overflows, would make it NaN or infinite."""
    x = torch.tensor([0.0, 1e-10, -1e-10, 3e-10, 1e-5], requires_grad=True)
    (slope,) = torch.autograd.grad(squareplus(x, 1e-20, impl=impl).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    wide = x.detach().double()
    torch.testing.assert_close(curvature.double(), 1e-20 / (2 * (wide**2 + 1e-20) ** 1.5), rtol=1e-5, atol=1e3)


@impls
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number(dtype, impl):
    """All of them, within one unit in the last place of the float64 values."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    for b in (0.0, 1e-6, 1.5238210, 4.0, 1e4):
        wanted = squareplus(x.double(), b, impl="reference").to(dtype)
        found = squareplus(x, b, impl=impl)
        # Numbers of one sign are in the order of their bits.
        apart = (found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).sum() <= 5


def test_presets_are_what_they_say():
    x = grid(60, 240_001)
    softplus = F.softplus(x)
    error = squareplus(x, "softplus") - softplus
    assert error.abs().max() == pytest.approx(0.0759314, abs=1e-6)
    assert x[error.argmax()].abs() == pytest.approx(3.565, abs=5e-3)  # the difference is even
    assert x[error.argmin()] == pytest.approx(0, abs=1e-9)
    assert -error.min() == pytest.approx(error.max().item(), abs=1e-6)
    for other in (1.50, 1.55):  # a minimax fit: both sides are worse
        assert (squareplus(x, other) - softplus).abs().max() > error.abs().max()
    upper = squareplus(x, "softplus_upper") - softplus
    assert upper.min() >= -1e-15
    assert upper.max() == pytest.approx(0.10387, abs=1e-5)
    assert upper[120_000].abs() < 1e-15
    assert (squareplus(x, 1.9218) - softplus).min() < 0  # no smaller b will do
    assert SquarePlus("softplus_upper").b == pytest.approx(1.9218121, abs=5e-8)
    # b = 4: the curvature of softplus at 0.
    at = torch.zeros((), dtype=torch.float64)
    curvature = torch.func.grad(torch.func.grad(squareplus))(at)
    torch.testing.assert_close(curvature, torch.func.grad(torch.func.grad(F.softplus))(at))


def test_no_fit_to_functions_that_are_not_monotone():
    """The best b for GELU and SiLU is 0: their own dips are the error."""
    x = grid(20, 40_001)
    for function, dip in ((F.gelu, 0.170), (F.silu, 0.278)):
        errors = {b: (squareplus(x, b) - function(x)).abs().max().item() for b in (0.0, 1e-6, 1e-3, 0.1, 1.0)}
        assert min(errors, key=errors.get) == 0.0
        assert errors[0.0] == pytest.approx(dip, abs=1e-3)


@impls
def test_in_place(impl):
    x = torch.randn(4, 6, dtype=torch.float64)
    for given in (x.clone(), x.clone().t(), x.repeat(1, 2)[:, ::2]):
        expected, place = squareplus(given, impl=impl), given.data_ptr()
        out = squareplus(given, impl=impl, inplace=True)
        assert out is given or out.data_ptr() == place
        assert torch.equal(given, expected)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        squareplus(torch.ones(3, requires_grad=True), impl=impl, inplace=True)
    leaf = x.clone().requires_grad_()
    needed = leaf.exp()  # whose backward needs what is overwritten
    squareplus(needed, impl=impl, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()
    layers = nn.Sequential(nn.Linear(6, 5), SquarePlus(inplace=True, impl=impl), nn.Linear(5, 1)).double()
    plain = nn.Sequential(layers[0], SquarePlus(), layers[2])
    for network in (layers, plain):
        network.zero_grad()
        network(x).sum().backward()
        network.grads = [p.grad.clone() for p in network.parameters()]
    for mine, theirs in zip(layers.grads, plain.grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-15)


def test_only_the_output_is_saved():
    saved = []
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = squareplus(x * 2)
        saved.remove(next(place for place in saved if place != y.data_ptr())) if len(saved) > 1 else None
    assert saved == [y.data_ptr()]


def test_learned_b():
    for start in (1e-6, 0.3, 4.0, 1e4):
        module = SquarePlus(start, learnable=True)
        assert float(module.b.detach()) == pytest.approx(start, rel=1e-6)
    module = SquarePlus(4.0, learnable=True)
    assert set(module.state_dict()) == {"raw"}
    assert "learnable=True" in repr(module)
    x, target = torch.randn(200), None
    target = squareplus(x, 0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(module(x), target).backward()
        optimizer.step()
    assert float(module.b.detach()) == pytest.approx(0.5, rel=1e-2)
    half = SquarePlus(4.0, learnable=True).bfloat16()
    half(torch.randn(8).bfloat16()).sum().backward()
    assert half.raw.grad.dtype == torch.bfloat16
    assert half.raw.grad > 0
    copied = SquarePlus(1.0, learnable=True)
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied(x), module(x))


def test_options_survive_repr():
    assert repr(SquarePlus()) == "SquarePlus(b=4)"
    assert repr(SquarePlus(1.5, inplace=True, impl="reference")) == "SquarePlus(b=1.5, inplace=True, impl='reference')"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"b": -1.0}, ValueError, r"b must be in \[0, 1e\+20\], got -1.0"),
        ({"b": 1e21}, ValueError, "b must be in"),
        ({"b": float("nan")}, ValueError, "b must be in"),
        ({"b": "soft"}, ValueError, "b must be one of 'softplus', 'softplus_upper', got 'soft'"),
        ({"b": None}, TypeError, "b must be a real number"),
        ({"b": torch.tensor(-0.5)}, ValueError, "b must be in"),
        ({"b": torch.ones(2)}, ValueError, r"b must be a number or a tensor with one element, got shape \(2,\)"),
        ({"b": torch.tensor(1)}, TypeError, "b must be a floating-point tensor"),
        ({"b": torch.empty((), device="meta")}, ValueError, "all tensors must be on one device"),
        ({"impl": "triton"}, ValueError, "impl must be one of 'auto', 'reference', 'cpp', got 'triton'"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        squareplus(torch.ones(3), **options)
    if not isinstance(options.get("b"), torch.Tensor):
        with pytest.raises(error, match=match):
            SquarePlus(**options)


def test_bad_options_of_the_module():
    with pytest.raises(ValueError, match="b must be positive to be learned"):
        SquarePlus(0.0, learnable=True)
    with pytest.raises(TypeError, match="a learned b is learnable=True"):
        SquarePlus(torch.ones(()))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    _cpp._library.cache_clear()
    try:
        x = torch.randn(9, requires_grad=True)
        y = squareplus(x)
        assert torch.equal(y, squareplus(x, impl="reference"))
        y.sum().backward()
        with pytest.raises(RuntimeError, match=r"impl='cpp', but the kernel cannot run: no C\+\+ compiler"):
            squareplus(x, impl="cpp")
    finally:
        _cpp._library.cache_clear()


def test_the_kernel_is_refused_where_there_is_no_memory():
    with pytest.raises(RuntimeError, match="there is no memory behind the tensors"):
        torch.func.vmap(lambda x: squareplus(x, impl="cpp"))(torch.ones(3))


@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_one_graph(impl, inplace):
    x = torch.randn(33, requires_grad=True)
    b = torch.tensor(1.3, requires_grad=True)
    call = lambda x, b: squareplus(x * 1.0, b, impl=impl, inplace=inplace)  # noqa: E731
    found = []
    torch._dynamo.reset()
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        x.grad = b.grad = None
        y = function(x, b)
        (y * torch.linspace(-1, 1, 33)).sum().backward()
        found.append((y.detach(), x.grad, b.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_on_a_gpu():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    y = squareplus(x.cuda())
    torch.testing.assert_close(y.cpu(), squareplus(x), rtol=1e-15, atol=0)
    y.sum().backward()
    expected = torch.autograd.grad(squareplus(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-14, atol=0)
