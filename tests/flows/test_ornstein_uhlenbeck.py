"""Closed forms of the Gaussian flow against golden values, an integrator, and brute force."""

import math

import pytest
import torch

from danlu.flows import ornstein_uhlenbeck

F64 = torch.float64
A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=F64)
MU, M0 = torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([-2.0, 2.0], dtype=F64)
S0 = torch.tensor([[0.3, 0.1], [0.1, 0.5]], dtype=F64)


def test_golden_values():
    found = ornstein_uhlenbeck(A, MU, M0, S0, torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64))
    # By hand: tr(A S0) = 1.22, det(A S0) = 0.2296, quadratic form 16.2. It is 8.445708307 and not 8.445708267.
    start = (1.22 - 2 - math.log(0.2296) + 16.2) / 2
    assert start == pytest.approx(8.445708307, abs=5e-10)
    golden = torch.tensor([start, 3.072697421, 1.391406039, 0.323144260], dtype=F64)
    torch.testing.assert_close(found.kl, golden, rtol=0, atol=6e-10)
    found = ornstein_uhlenbeck(A, MU, M0, S0, torch.tensor([0.1, 0.5, 1.0], dtype=F64))
    golden = torch.tensor([14.97724, 5.263060, 2.092140], dtype=F64)
    torch.testing.assert_close(found.dissipation, golden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_kl_falls_by_the_relative_fisher_information(t):
    h = 1e-3
    offsets = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=F64) * h
    kl = ornstein_uhlenbeck(A, MU, M0, S0, t + offsets).kl
    derivative = (kl @ torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=F64)) / (12 * h)
    assert float(-derivative) == pytest.approx(float(ornstein_uhlenbeck(A, MU, M0, S0, t).dissipation), abs=1e-8)


def test_moments_equal_the_matrix_exponential_and_the_divergence_torch_s():
    t = 0.7
    found = ornstein_uhlenbeck(A, MU, M0, S0, t)
    decay, inverse = torch.linalg.matrix_exp(-A * t), torch.linalg.inv(A)
    torch.testing.assert_close(found.mean, MU + decay @ (M0 - MU))
    torch.testing.assert_close(found.cov, inverse + decay @ (S0 - inverse) @ decay)
    q = torch.distributions.MultivariateNormal(found.mean, found.cov)
    p = torch.distributions.MultivariateNormal(MU, precision_matrix=A)
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(q, p))
    x = q.sample((20_000,)).requires_grad_()
    (score,) = torch.autograd.grad((q.log_prob(x) - p.log_prob(x)).sum(), x)
    assert float(score.square().sum(-1).mean()) == pytest.approx(float(found.dissipation), rel=0.03)


def test_semigroup_limits_and_shapes():
    half = ornstein_uhlenbeck(A, MU, M0, S0, 0.35)
    again = ornstein_uhlenbeck(A, MU, half.mean, half.cov, 0.35)
    whole = ornstein_uhlenbeck(A, MU, M0, S0, 0.7)
    torch.testing.assert_close(again.mean, whole.mean)
    torch.testing.assert_close(again.cov, whole.cov)
    late = ornstein_uhlenbeck(A, MU, M0, S0, 1e6)
    torch.testing.assert_close(late.mean, MU)
    torch.testing.assert_close(late.cov, torch.linalg.inv(A))
    assert abs(float(late.kl)) < 1e-12
    assert abs(float(late.dissipation)) < 1e-12
    many = ornstein_uhlenbeck(A, MU, M0, S0, torch.rand(2, 3))
    assert many.mean.shape == (2, 3, 2)
    assert many.cov.shape == (2, 3, 2, 2)
    assert many.kl.shape == many.dissipation.shape == (2, 3)
    point = ornstein_uhlenbeck(A, MU, M0, torch.zeros_like(S0), torch.tensor([0.0, 1.0]))
    assert point.kl[0] == point.dissipation[0] == float("inf")
    assert point.kl[1].isfinite()
    empty = ornstein_uhlenbeck(*(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 0)), 1.0)
    assert empty.kl == 0
    single = ornstein_uhlenbeck(*(z.float() for z in (A, MU, M0, S0)), 1.0)
    assert single.kl.dtype == torch.float32
    assert float(single.kl) == pytest.approx(1.391406039, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"A": A.int()}, TypeError, "A must be a floating-point tensor"),
        ({"mu": MU[:1]}, ValueError, r"mu must have shape \(2,\)"),
        ({"S0": S0[:1]}, ValueError, r"S0 must have shape \(2, 2\)"),
        ({"A": A.triu()}, ValueError, "A must be symmetric"),
        ({"A": A * float("nan")}, ValueError, "A must be symmetric and finite"),
        ({"A": A - 2 * torch.eye(2)}, ValueError, "A must be positive definite"),
        ({"S0": -S0}, ValueError, "S0 must be positive semidefinite"),
        ({"t": -1.0}, ValueError, "t must be in"),
        ({"t": torch.tensor([0.0, -1.0])}, ValueError, "t must be at least 0"),
        ({"t": "now"}, TypeError, "t must be a real number"),
    ],
)
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match):
        ornstein_uhlenbeck(**{"A": A, "mu": MU, "m0": M0, "S0": S0, "t": 1.0, **changes})
