"""Exponentiated gradient descent alone: the oracle, closed forms, least squares, zeros, cut-offs, bad parameters."""

import math
import warnings
from decimal import Decimal

import numpy as np
import pytest
import torch
from eg_oracle import eg_oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danlu.optim import ExponentiatedGradient

OPTIONS = [
    {},
    {"floor": 0.05},
    {"maximize": True},
    {"nonfinite": "off"},
    {"nonfinite": "raise"},
    {"lr": torch.tensor(0.02)},
    {"mode": "signed"},
    {"mode": "signed", "beta": 0.01},
    {"mode": "signed", "beta": 100.0, "maximize": True},
    {"mode": "simplex"},
    {"mode": "simplex", "dim": 0},
    {"mode": "simplex", "dim": -2, "floor": 0.01},
    {"mode": "simplex", "maximize": True, "floor": 0.02},
]


def start_of(options, random, shape):
    theta = random.normal(size=shape)
    if options.get("mode") == "signed":
        return theta
    theta = np.abs(theta)
    return theta / theta.sum(axis=options.get("dim", -1), keepdims=True) if options.get("mode") == "simplex" else theta


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [None, False])
def test_oracle_over_fifty_steps(options, foreach):
    random = np.random.default_rng(0)
    starts = [start_of(options, random, shape) for shape in [(5, 7), (3, 4)]]
    params = [nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    settings = {"lr": 0.1, **options}
    optimizer = ExponentiatedGradient(params, **settings, foreach=foreach)
    oracle = {key: float(value) if key == "lr" else value for key, value in settings.items() if key != "nonfinite"}
    for _ in range(50):
        grads = [random.normal(size=start.shape) for start in starts]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        starts = [eg_oracle(theta, grad, **oracle) for theta, grad in zip(starts, grads, strict=True)]
    for param, theta in zip(params, starts, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-12, atol=1e-12)
    assert optimizer.clamp_events == {}


def test_signed_is_the_difference_of_two_nonnegative_ones():
    """EGU+-: w = u - v, whose product stays beta^2 / 4."""
    beta, lr = 0.3, 0.05
    w = torch.linspace(-2, 2, 41, dtype=torch.float64)
    root = (w**2 + beta**2).sqrt()
    u, v = (root + w) / 2, (root - w) / 2
    p = nn.Parameter(w.clone())
    optimizer = ExponentiatedGradient([p], lr=lr, mode="signed", beta=beta)
    for step in range(30):
        p.grad = torch.randn(41, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        u, v = u * (-lr * p.grad).exp(), v * (lr * p.grad).exp()
        optimizer.step()
    torch.testing.assert_close(p.detach(), u - v, rtol=0, atol=2e-15)
    torch.testing.assert_close(u * v, torch.full_like(u, beta**2 / 4), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signed_does_not_cancel(dtype):
    """Against the definition in 28 decimal digits: small elements, large ones, small and large steps."""
    w = torch.tensor([1e-6, -1e-6, 1.0, 1e4, -1e4, 0.0], dtype=dtype)
    for x in (1e-7, 1e-3, 0.3, 3.0, -3.0, 12.0):
        p = nn.Parameter(w.clone())
        optimizer = ExponentiatedGradient([p], lr=1.0, mode="signed")
        p.grad = torch.full_like(w, -x)
        optimizer.step()
        factor, exact = Decimal(float(-p.grad[0])).exp(), []
        for value in map(Decimal, w.double().tolist()):
            root = (value * value + 1).sqrt()
            exact.append(float((root + value) / 2 * factor - (root - value) / 2 / factor))
        exact = torch.tensor(exact, dtype=torch.float64)
        error = (p.detach().double() - exact).abs()
        assert (error <= 6 * torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(dtype).eps).all(), (x, error)


def test_simplex_with_constant_cost_is_the_softmax_of_the_summed_costs():
    cost = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    p = nn.Parameter(torch.full((4,), 0.25, dtype=torch.float64))
    optimizer = ExponentiatedGradient([p], lr=0.07, mode="simplex")
    for t in range(1, 61):
        p.grad = cost.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.softmax(-0.07 * t * cost, 0), rtol=1e-13, atol=0)


def test_simplex_stays_a_distribution_for_ten_thousand_steps():
    p = nn.Parameter(torch.full((3, 8), 1 / 8))
    optimizer = ExponentiatedGradient([p], lr=0.5, mode="simplex")
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(100, 3, 8, generator=generator)
    for step in range(10_000):
        p.grad = grads[step % 100]
        optimizer.step()
    assert (p.sum(-1) - 1).abs().max() < 1e-6
    assert (p >= 0).all()


def test_simplex_ignores_what_is_common_to_a_distribution():
    """Only differences of costs count, also where the common part is far beyond the cut-off."""
    found = []
    for offset in (0.0, 1e6):
        p = nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64))
        p.grad = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) + offset
        optimizer = ExponentiatedGradient([p], lr=1.0, mode="simplex")
        optimizer.step()
        found.append(p.detach())
        assert optimizer.clamp_events == {}
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_simplex_floor_is_a_floor_and_sums_to_one():
    p = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    optimizer = ExponentiatedGradient([p], lr=1.0, mode="simplex", floor=0.01)
    for _ in range(50):
        p.grad = torch.tensor([[1.0, 0.0, 0.5], [0.0, 3.0, 9.0]])
        optimizer.step()
    assert (p >= 0.01).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    assert p[0].argmax() == 1  # lifted from exactly 0 by the floor


def test_least_squares_reach_the_solution_of_scipy():
    """scikit-learn's diabetes, centered target, nonnegative weights: from 10 on every coordinate, lr 0.001."""
    datasets = pytest.importorskip("sklearn.datasets")
    nnls = pytest.importorskip("scipy.optimize").nnls
    data = datasets.load_diabetes()
    target = data.target - data.target.mean()
    weights, norm = nnls(data.data, target)
    assert norm == pytest.approx(1165.670183388650, abs=1e-9)
    x, y = torch.from_numpy(data.data), torch.from_numpy(target)
    p = nn.Parameter(torch.full((10,), 10.0, dtype=torch.float64))
    optimizer = ExponentiatedGradient([p], lr=1e-3)
    for _ in range(5000):
        p.grad = x.T @ (x @ p.detach() - y)
        optimizer.step()
    assert (x @ p.detach() - y).norm().item() == pytest.approx(norm, rel=2e-13)
    zero = torch.from_numpy(weights) == 0
    assert zero.any()
    assert (p.detach()[zero] < 1e-6).all()


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 1e-3]),
)
def test_nonnegative_and_finite_under_any_finite_gradients(values, dtype, floor):
    p = nn.Parameter(torch.tensor([0.0, 1e-4, 1.0, 6e4]).to(dtype))
    optimizer = ExponentiatedGradient([p], lr=1.0, floor=floor, nonfinite="off")
    largest = torch.finfo(dtype).max
    for value in values:
        p.grad = torch.full_like(p, max(min(value, largest), -largest))
        optimizer.step()
        assert (p >= floor * 0.99).all()
        assert p.isfinite().all()


def test_zero_stays_zero_and_floor_lifts_it():
    for floor, expected in ((0.0, 0.0), (0.5, 0.5)):
        p = nn.Parameter(torch.tensor([0.0, 1.0]))
        optimizer = ExponentiatedGradient([p], lr=0.1, floor=floor)
        p.grad = torch.tensor([-1.0, 0.0])
        optimizer.step()
        assert p[0].item() == expected
        assert p[1].item() == 1.0


@pytest.mark.parametrize("foreach", [None, False])
def test_cut_off_steps_are_counted(foreach):
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = ExponentiatedGradient([("w", p)], lr=1.0, foreach=foreach)
    for _ in range(2):
        p.grad = torch.tensor([60.0, -51.0, 50.0, 0.0], dtype=torch.float64)
        optimizer.step()
    assert optimizer.clamp_events == {"w": 4}
    expected = torch.tensor([math.exp(-100), math.exp(100), math.exp(-100), 1.0], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)


def test_no_step_changes_nothing_bit_for_bit():
    for mode in ("nonnegative", "signed"):
        for lr, value in ((0.0, 1.0), (1.0, 0.0)):
            start = torch.randn(100).abs() if mode == "nonnegative" else torch.randn(100)
            p = nn.Parameter(start.clone())
            p.grad = torch.full((100,), value)
            ExponentiatedGradient([p], lr=lr, mode=mode).step()
            assert torch.equal(p.detach(), start)


def test_blocks_equal_the_loop_beyond_one_block():
    start, grad = torch.rand(2**19 + 5), torch.randn(2**19 + 5)
    found = []
    for foreach in (True, False):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        ExponentiatedGradient([p], lr=0.3, foreach=foreach).step()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=3e-7, atol=0)


def test_bucket_equals_the_loop():
    """The path of accelerators, run on the CPU."""
    for floor in (0.0, 0.3):
        ones = [nn.Parameter(torch.rand(shape, dtype=torch.float64)) for shape in [(5, 3), (7,)]]
        twos = [nn.Parameter(p.detach().clone()) for p in ones]
        first = ExponentiatedGradient(ones, lr=0.5, floor=floor, foreach=False)
        second = ExponentiatedGradient(twos, lr=0.5, floor=floor)
        for step in range(4):
            for a, b in zip(ones, twos, strict=True):
                a.grad = torch.randn(a.shape, dtype=torch.float64) * 80
                if step == 2 and a.ndim == 1:
                    a.grad[0] = math.inf
                b.grad = a.grad.clone()
            first.step()
            for counts in (second._nonfinite_counts, second._clamp_counts):
                counts |= {p: torch.zeros((), dtype=torch.int64) for p in twos if p not in counts}
            with torch.no_grad():
                second._bucket(twos, second.param_groups[0], 0.5, True, [None, None])
        for a, b in zip(ones, twos, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
        assert first.nonfinite_events == second.nonfinite_events == {"param_groups[0]['params'][1]": 1}
        assert first.clamp_events == second.clamp_events != {}


ROW = torch.tensor([0.5, 0.5])
BAD = [
    ([torch.tensor([1.0, -1e-9])], {}, ValueError, "params must be nonnegative"),
    ([torch.tensor([1.0, math.nan])], {}, ValueError, "params must be finite"),
    ([torch.tensor([1.0, math.inf])], {"mode": "signed"}, ValueError, "params must be finite"),
    ([torch.tensor([-0.5, 1.5])], {"mode": "simplex"}, ValueError, "params must be nonnegative"),
    ([torch.zeros(3)], {"mode": "simplex"}, ValueError, "params must have a positive sum"),
    ([torch.tensor(1.0)], {"mode": "simplex"}, ValueError, "dim=-1 is out of range"),
    ([ROW], {"mode": "simplex", "dim": 1}, ValueError, "dim=1 is out of range"),
    ([ROW], {"mode": "simplex", "dim": 0.5}, TypeError, "dim must be an int"),
    ([ROW], {"mode": "simplex", "floor": 0.5}, ValueError, "floor must be below 1 over the 2 elements"),
    ([ROW], {"dim": 0}, ValueError, "dim is an option of mode='simplex'"),
    ([ROW], {"beta": 1.0}, ValueError, "beta is an option of mode='signed'"),
    ([ROW], {"mode": "simplex", "beta": 1.0}, ValueError, "beta is an option of mode='signed'"),
    ([ROW], {"mode": "signed", "beta": 0.0}, ValueError, r"beta must be in \(0, inf\)"),
    ([ROW], {"mode": "signed", "beta": -1.0}, ValueError, r"beta must be in \(0, inf\)"),
    ([ROW], {"mode": "signed", "floor": 0.1}, ValueError, "floor has no meaning with mode='signed'"),
    ([ROW], {"floor": -0.1}, ValueError, r"floor must be in \[0, inf\)"),
    ([ROW], {"floor": math.inf}, ValueError, r"floor must be in \[0, inf\)"),
    ([ROW], {"mode": "positive"}, ValueError, "mode must be one of 'nonnegative', 'simplex', 'signed'"),
    ([ROW], {"lr": -0.1}, ValueError, r"lr must be in \[0, inf\)"),
    ([ROW], {"lr": math.nan}, ValueError, r"lr must be in \[0, inf\)"),
    ([ROW], {"nonfinite": "ignore"}, ValueError, "nonfinite must be one of"),
]


@pytest.mark.parametrize(("params", "options", "error", "match"), BAD)
def test_bad_input(params, options, error, match):
    with pytest.raises(error, match=match):
        ExponentiatedGradient([nn.Parameter(p) for p in params], **options)
    optimizer = ExponentiatedGradient([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [nn.Parameter(p) for p in params], **options})
    # Nothing of the refused group is left.
    assert len(optimizer.param_groups) == 1


def test_weight_decay_is_refused_in_a_group():
    with pytest.raises(ValueError, match="weight_decay has no meaning"):
        ExponentiatedGradient([{"params": [nn.Parameter(ROW.clone())], "weight_decay": 0.1}])


def test_distributions_are_rescaled_with_a_warning():
    p = nn.Parameter(torch.tensor([[1.0, 3.0], [0.5, 0.5]]))
    with pytest.warns(UserWarning, match=r"shape \(2, 2\) does not sum to 1 along dim=-1, and was rescaled"):
        ExponentiatedGradient([p], mode="simplex")
    assert torch.equal(p.detach(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    near = nn.Parameter(torch.tensor([0.5, 0.5009]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExponentiatedGradient([near], mode="simplex")


def test_the_warning_names_the_line_that_constructs():
    with pytest.warns(UserWarning, match="was rescaled") as caught:
        ExponentiatedGradient([nn.Parameter(torch.tensor([1.0, 3.0]))], mode="simplex")
    assert caught[0].filename == __file__


def test_complex_parameters_are_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = ExponentiatedGradient([p])
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        optimizer.step()
