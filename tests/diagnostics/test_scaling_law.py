"""The quantization model: exact tails, exponents, finite numbers of quanta, emergence."""

import math

import pytest
import torch
from scipy.special import zeta

from danlu.diagnostics import QuantaModel
from danlu.diagnostics._scaling_law import _zeta


def slope(curve, x, step=1e-4):
    """- d log y / d log x."""
    return -(math.log(float(curve(x * (1 + step)))) - math.log(float(curve(x)))) / math.log1p(step)


@pytest.mark.parametrize("s", [1.001, 1.1, 1.4, 2.0, 3.5, 11.0, 41.0])
def test_hurwitz_zeta_equals_scipy(s):
    q = torch.tensor([0.3, 1.0, 1.5, 2.0, 7.25, 11.0, 101.0, 1e4, 1e9], dtype=torch.float64)
    torch.testing.assert_close(_zeta(s, q), torch.from_numpy(zeta(s, q.numpy())), rtol=4e-15, atol=0.0)
    assert float(_zeta(s, q.new_tensor(math.inf))) == 0.0


def test_loss_is_the_sum_over_the_quanta_not_learned():
    model = QuantaModel(0.7, a=0.25, b=2.0, K=50)
    p = torch.arange(1, 51, dtype=torch.float64).pow(-1.7)
    p /= p.sum()
    n = torch.arange(51)
    brute = torch.stack([0.25 + 1.75 * p[k:].sum() for k in range(51)])
    torch.testing.assert_close(model.loss(n), brute, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(model.frequency(n[1:]), p, rtol=1e-13, atol=0.0)
    assert float(model.loss(0)) == 2.0
    assert float(model.loss(50)) == float(model.loss(1e9)) == 0.25
    assert float(model.frequency(51)) == 0.0


@pytest.mark.parametrize("gamma", [0.3, 0.4, 1.0, 2.5])
def test_infinite_tail_equals_scipy(gamma):
    n = torch.tensor([0.0, 1.0, 2.5, 10.0, 1e3, 1e6], dtype=torch.float64)
    exact = torch.from_numpy(zeta(gamma + 1, n.numpy() + 1)) / float(zeta(gamma + 1, 1))
    torch.testing.assert_close(QuantaModel(gamma).loss(n), exact, rtol=1e-14, atol=0.0)
    assert float(QuantaModel(gamma).frequency(1)) == pytest.approx(1 / float(zeta(gamma + 1, 1)), rel=1e-14)


@pytest.mark.parametrize(("gamma", "asymptotic", "midpoint"), [(1.0, 0.05, 8e-4), (0.4, 0.02, 2e-4)])
def test_errors_of_the_approximate_tails(gamma, asymptotic, midpoint):
    model = QuantaModel(gamma)

    def error(tail, n):
        return float(model.loss(n, tail=tail) / model.loss(n) - 1)

    assert error("asymptotic", 10) == pytest.approx(asymptotic, rel=0.06)
    assert abs(error("midpoint", 10)) == pytest.approx(midpoint, rel=0.1)
    assert abs(error("midpoint", 100)) < 1e-5
    assert error("asymptotic", 0) == math.inf


@pytest.mark.parametrize("gamma", [0.3, 0.6, 1.0, 2.0])
def test_exponents_by_formula_and_on_the_curves(gamma):
    model, q = QuantaModel(gamma), 0.73
    found = model.exponents(q)
    assert (found.params, found.data) == (gamma, gamma / (gamma + 1))
    assert found.steps == pytest.approx(gamma / (q * (gamma + 1)), rel=1e-15)
    assert model.exponents().steps == model.exponents().data == found.params / (1 + found.params) < found.params
    # The exact curves tend to these slopes; at the place of about a hundred thousand quanta they are there.
    assert slope(lambda N: model.loss_params(N, C=7.0), 7e5) == pytest.approx(gamma, rel=1e-3)
    samples = 50 * 1e5 ** (gamma + 1)
    assert slope(lambda D: model.loss_data(D, tau=50.0), samples) == pytest.approx(found.data, rel=1e-3)
    steps = 1e5 ** (q * (gamma + 1))
    assert slope(lambda S: model.loss_steps(S, B=64.0, tau=64.0, q=q), steps) == pytest.approx(found.steps, rel=1e-3)


def test_resources_agree_on_the_quanta():
    model = QuantaModel(0.5, K=1000)
    p = model.frequency(20)
    wanted = model.loss(20)
    torch.testing.assert_close(model.loss_params(20 * 3.0, C=3.0), wanted)
    torch.testing.assert_close(model.loss_data(5.0 / p, tau=5.0), wanted)
    torch.testing.assert_close(model.loss_steps(5.0 / (32 * p), B=32.0, tau=5.0), wanted)
    torch.testing.assert_close(model.loss_steps(5.0 / (32 * p**0.7), B=32.0, tau=5.0, q=0.7), wanted)
    assert float(model.loss_data(0.0)) == 1.0
    assert float(model.loss_params(1e9)) == 0.0


def test_slope_steepens_toward_a_finite_number_of_quanta():
    model = QuantaModel(0.6, K=200)
    slopes = [slope(model.loss, n) for n in (5.0, 20.0, 80.0, 160.0, 195.0)]
    assert slopes == sorted(slopes)
    assert slopes[0] > 0.6
    assert slopes[-1] > 10 * 0.6
    closed = [float(model.loss(n, tail="midpoint") / model.loss(n) - 1) for n in (10, 100, 199)]
    assert max(map(abs, closed)) < 5e-3


def test_emergence():
    model = QuantaModel(1.0, a=0.5, b=2.5, K=400)
    one = model.emergence(9, C=4.0, B=10.0, tau=6.0, q=0.5)
    p = float(model.frequency(9))
    assert (one.quantum, one.frequency, one.drop, one.params) == (9, p, 2.0 * p, 36.0)
    assert (one.samples, one.steps) == (pytest.approx(6 / p), pytest.approx(0.6 / p**0.5))
    # The drop is the step of the staircase, and the resources are where the curves reach it.
    assert float(model.loss(8) - model.loss(9)) == pytest.approx(one.drop, rel=1e-12)
    assert float(model.loss_data(one.samples, tau=6.0)) == pytest.approx(float(model.loss(9)), rel=1e-12)
    assert float(model.loss_steps(one.steps, B=10.0, tau=6.0, q=0.5)) == pytest.approx(float(model.loss(9)), rel=1e-12)
    times = [model.emergence(k).samples for k in (1, 2, 4)]
    assert times == pytest.approx([times[0], 4 * times[0], 16 * times[0]])


def test_tensors_keep_their_shape_and_carry_no_gradient():
    n = torch.ones(2, 3, requires_grad=True)
    found = QuantaModel(1.0).loss(n)
    assert (found.shape, found.dtype, found.requires_grad) == ((2, 3), torch.float64, False)
    assert float(QuantaModel(300.0).loss(1)) == pytest.approx(2.0**-301)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gamma": 0.0}, ValueError, "gamma must be in"),
        ({"gamma": math.nan}, ValueError, "gamma must be in"),
        ({"gamma": "1"}, TypeError, "gamma must be a real number"),
        ({"a": 1.0}, ValueError, r"b must be in \(1, inf\)"),
        ({"K": 0}, ValueError, "K must be at least 1"),
        ({"K": 10.5}, TypeError, "K must be an int"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        QuantaModel(**{"gamma": 1.0, **options})


def test_bad_arguments():
    model = QuantaModel(1.0, K=5)
    for call, error, match in [
        (lambda: model.loss(-1), ValueError, r"n must be in \[0, inf\), got -1"),
        (lambda: model.loss(torch.tensor([1.0, -2.0])), ValueError, "n must be at least 0, got -2"),
        (lambda: model.loss(torch.tensor([math.nan])), ValueError, "n must be at least 0, got nan"),
        (lambda: model.loss(torch.tensor([True])), TypeError, "n must be real numbers"),
        (lambda: model.loss(1, tail="fast"), ValueError, "tail must be one of 'exact', 'midpoint', 'asymptotic'"),
        (lambda: model.frequency(0), ValueError, "k must be in"),
        (lambda: model.loss_params(-1.0), ValueError, "N must be in"),
        (lambda: model.loss_params(1.0, C=0.0), ValueError, "C must be in"),
        (lambda: model.loss_data(1.0, tau=-1.0), ValueError, "tau must be in"),
        (lambda: model.loss_steps(1.0, B=0.0), ValueError, "B must be in"),
        (lambda: model.loss_steps(1.0, q=0.0), ValueError, "q must be in"),
        (lambda: model.exponents(q=-1.0), ValueError, "q must be in"),
        (lambda: model.emergence(6), ValueError, "k must be at most K=5, got 6"),
        (lambda: model.emergence(0), ValueError, "k must be at least 1"),
        (lambda: model.emergence(1, q=0.0), ValueError, "q must be in"),
    ]:
        with pytest.raises(error, match=match):
            call()
