"""What is true of the gradient flow alone: closed forms, orders of the methods, the balance of energy, errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.flows import gradient_flow
from danlu.flows._proximal import proximal_step

SCALE = torch.tensor([1.0, 10.0], dtype=torch.float64)
START = torch.ones(2, dtype=torch.float64)
A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)


def quadratic(x):
    return (SCALE.to(x.dtype) * x.square()).sum() / 2


def rosenbrock(x):
    return (1 - x[0]).square() + 20 * (x[1] - x[0].square()).square()


def last(method, **options):
    return gradient_flow(quadratic, START, 2.5, method=method, step=0.5, **options).x[-1]


def test_golden_values_of_the_quadratic():
    assert last("euler").tolist() == [0.03125, -1024.0]
    expected = torch.tensor([0.1316872428, 0.0001286008], dtype=torch.float64)
    torch.testing.assert_close(last("implicit"), expected, rtol=0, atol=5e-11)
    torch.testing.assert_close(last("implicit"), torch.tensor([1.5**-5, 6.0**-5], dtype=torch.float64))


@pytest.mark.parametrize(("method", "order", "steps"), [("euler", 1, 40), ("implicit", 1, 40), ("rk4", 4, 20)])
def test_order_of_the_error_and_of_the_residual(method, order, steps):
    exact = torch.linalg.matrix_exp(-A) @ START
    errors, residuals = [], []
    for count in (steps, 2 * steps, 4 * steps):
        path = gradient_flow(lambda x: x @ A @ x / 2, START, 1.0, method=method, step=1 / count)
        assert len(path.times) == count + 1
        errors.append(float((path.x[-1] - exact).norm()))
        residuals.append(float(path.residual[-1].abs()))
    for found in (errors, residuals):
        for coarse, fine in itertools.pairwise(found):
            assert coarse / fine == pytest.approx(2**order, rel=0.12)


def test_adaptive_method_reaches_its_tolerance():
    exact = torch.linalg.matrix_exp(-3 * A) @ START
    for tolerance in (1e-4, 1e-7, 1e-10):
        path = gradient_flow(lambda x: x @ A @ x / 2, START, 3.0, method="rk45", step=3.0, tolerance=tolerance)
        assert float(path.times[-1]) == 3.0
        assert float((path.x[-1] - exact).norm()) < 10 * tolerance
        assert float(path.residual.abs().max()) < 100 * tolerance
        assert (path.times.diff() > 0).all()
    stiff = gradient_flow(lambda x: 500 * (x * x).sum() + x.sum(), START, 1.0, method="rk45", step=1.0)
    torch.testing.assert_close(stiff.x[-1], torch.full_like(START, -1e-3), rtol=0, atol=1e-6)


@given(
    tau=st.floats(1e-3, 1e4),
    seed=st.integers(0, 99),
)
def test_implicit_decreases_for_every_step_also_without_convexity(tau, seed):
    start = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    path = gradient_flow(rosenbrock, start, 3 * tau, method="implicit", step=tau)
    assert path.largest_rise <= 0
    # More: what the proximal objective loses.
    moved = (path.x.diff(dim=0).square().sum(-1) / (2 * tau)) + path.f.diff()
    assert (moved <= 1e-12 * path.f[0]).all()


def test_implicit_solves_its_equation():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    y = proximal_step(rosenbrock, x, 0.3)
    slope = torch.func.grad(rosenbrock)(y)
    torch.testing.assert_close(y + 0.3 * slope, x, rtol=0, atol=1e-9)
    # A linear function has no graph in its gradient.
    torch.testing.assert_close(proximal_step(torch.sum, x, 0.3), x - 0.3)
    assert torch.equal(proximal_step(lambda x: torch.zeros(()), x, 0.3), x)


def test_proximal_step_of_many_dimensions_in_float32():
    g = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(80, 40, generator=g), torch.randint(2, (80,), generator=g).float()

    def loss(x):
        return torch.nn.functional.binary_cross_entropy_with_logits(rows @ x, labels) + x.square().sum() / 200

    for h in (0.1, 10.0, 1e4):
        y = proximal_step(loss, torch.zeros(40), h)
        exact = proximal_step(
            lambda x: (
                torch.nn.functional.binary_cross_entropy_with_logits(rows.double() @ x, labels.double())
                + x.square().sum() / 200
            ),
            torch.zeros(40, dtype=torch.float64),
            h,
        )
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.norm()))


def test_energy_identity_is_a_certificate():
    path = gradient_flow(rosenbrock, torch.tensor([-1.0, 1.0], dtype=torch.float64), 2.0, method="rk45", step=0.01)
    assert path.residual.abs().max() < 1e-6
    assert path.largest_rise < 0
    # A gradient that is not that of the function is caught: half of it goes through a detached copy.
    wrong = gradient_flow(lambda x: quadratic(x) / 2 + quadratic(x.detach()) / 2, START, 1.0, method="rk4", step=0.01)
    assert wrong.residual.abs().max() > 0.1


def test_without_a_certificate_nothing_is_evaluated_at_the_end():
    calls = []

    def counted(x):
        calls.append(1)
        return quadratic(x)

    for certificate, expected in ((True, 6), (False, 5)):
        calls.clear()
        path = gradient_flow(counted, START, 2.5, method="euler", step=0.5, certificate=certificate)
        assert len(calls) == expected
    assert path.f is None
    assert path.residual is None
    with pytest.raises(ValueError, match="certificate=True"):
        _ = path.largest_rise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "rk4", "rk45", "implicit"])
def test_shapes_and_dtypes(method, dtype):
    x0 = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        path = gradient_flow(lambda x: x.square().sum() / 2, x0, 1.0, method=method, step=0.1)
    assert path.x.shape[1:] == (2, 3)
    assert path.x.dtype == path.f.dtype == path.residual.dtype == dtype
    assert not path.x.requires_grad
    assert path.largest_rise < 0
    torch.testing.assert_close(path.x[-1], torch.full((2, 3), 0.3679, dtype=dtype), rtol=0, atol=0.03)
    empty = gradient_flow(lambda x: x.sum(), torch.zeros(0, dtype=dtype), 1.0, method=method, step=0.5)
    assert empty.x.shape[1] == 0
    still = gradient_flow(lambda x: torch.ones(1), x0, 1.0, method=method, step=0.5)
    assert (still.x == 1).all()


def test_number_of_steps_is_not_moved_by_rounding():
    for t, step, count in ((2.5, 0.1, 25), (0.3, 0.1, 3), (1.0, 0.3, 4), (0.1, 1.0, 1)):
        path = gradient_flow(quadratic, START, t, method="euler", step=step)
        assert len(path.times) == count + 1
        assert float(path.times[-1]) == t


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"x0": torch.ones(2, dtype=torch.int64)}, TypeError, "x0 must be a floating-point tensor"),
        ({"x0": torch.ones(2, dtype=torch.bfloat16)}, TypeError, "x0 must be float32 or float64"),
        ({"t": 0.0}, ValueError, "t must be in"),
        ({"t": float("inf")}, ValueError, "t must be in"),
        ({"step": -0.1}, ValueError, "step must be in"),
        ({"step": "0.1"}, TypeError, "step must be a real number"),
        ({"method": "heun"}, ValueError, "method must be one of 'euler', 'rk4', 'rk45', 'implicit'"),
        ({"tolerance": 1e-3}, ValueError, "tolerance is an option of method='rk45'"),
        ({"method": "rk45", "tolerance": 0.0}, ValueError, "tolerance must be in"),
        ({"f": lambda x: x}, ValueError, "f must return a scalar"),
        ({"f": lambda x: x, "method": "implicit"}, ValueError, "f must return a scalar"),
        ({"f": lambda x: 1.0}, ValueError, "f must return a scalar, got float"),
    ],
)
def test_bad_input(options, error, match):
    arguments = {"f": quadratic, "x0": START, "t": 1.0, "step": 0.1, **options}
    with pytest.raises(error, match=match):
        gradient_flow(arguments.pop("f"), arguments.pop("x0"), arguments.pop("t"), **arguments)


def test_a_path_that_blows_up_says_where():
    with pytest.raises(RuntimeError, match=r"not finite from step \d+ of 400 on .*smaller step"):
        gradient_flow(lambda x: 1e3 * quadratic(x), START, 40.0, method="euler", step=0.1)
    with pytest.raises(RuntimeError, match="not finite from step 0"):
        gradient_flow(lambda x: (x - 1).abs().sqrt().sum(), START, 1.0, method="euler", step=0.1)
    with pytest.raises(RuntimeError, match="not finite within a step"):
        gradient_flow(lambda x: (x - 1).abs().sqrt().sum(), START, 1.0, method="implicit", step=0.1)
    with pytest.raises(RuntimeError, match="underflows"):
        gradient_flow(lambda x: -x.abs().pow(1.5).sum() + 1 / (x - x), START[:1], 1.0, method="rk45", step=0.1)
    with pytest.raises(RuntimeError, match="twice differentiable"):
        gradient_flow(lambda x: (x - 0.5).abs().sum(), START, 3.0, method="implicit", step=1.0)
