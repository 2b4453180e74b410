"""The minimizing movement scheme against its closed form between Gaussians, and as a descent of the energy."""

import math

import pytest
import torch

from danlu.flows import KL, Entropy, FDivergence, Interaction, Potential, WassersteinFlow, jko_step, ornstein_uhlenbeck
from danlu.flows._jko import solve_tridiagonal

F64 = torch.float64
NORMAL = KL(lambda x: -x.square().sum(-1) / 2)


def exact_step(mean, std, tau):
    return mean / (1 + tau), (std + math.sqrt(std * std + 4 * tau * (1 + tau))) / (2 * (1 + tau))


def quantiles(n=2000, mean=3.0, std=0.5):
    return mean + std * torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)


def test_closed_form_converges_to_the_flow():
    one = torch.ones(1, dtype=F64)
    flow = ornstein_uhlenbeck(one.diag(), 0 * one, 3 * one, 0.25 * one.diag(), 1.0)
    found = []
    for tau in (0.1, 0.05, 0.025):
        mean, std = 3.0, 0.5
        for _ in range(round(1 / tau)):
            mean, std = exact_step(mean, std, tau)
        found.append((mean - float(flow.mean), abs(std - float(flow.cov.sqrt()))))
    assert found[0] == pytest.approx((0.0530, 0.0137), abs=5e-5)
    assert found[1] == pytest.approx((0.0270, 0.0070), abs=5e-5)
    assert found[2] == pytest.approx((0.0137, 0.0035), abs=5e-5)


@pytest.mark.parametrize("tau", [0.1, 0.05, 0.025])
def test_sorted_particles_follow_the_closed_form(tau):
    x, mean, std = quantiles(), 3.0, 0.5
    for _ in range(round(1 / tau)):
        x, (mean, std) = jko_step(x, NORMAL, tau), exact_step(mean, std, tau)
    # The issue of the discretization allows 2 %; what is reached is 0.03 %.
    assert float(x.mean()) == pytest.approx(mean, rel=1e-9)
    assert float(x.std(unbiased=False)) == pytest.approx(std, rel=1e-3)


def test_closed_form_minimizes_the_objective():
    """By brute force over Gaussians: W2^2 = (m - m')^2 + (s - s')^2, and the divergence to N(0, 1)."""
    tau = 0.3
    mean, std = (torch.tensor(value, dtype=F64, requires_grad=True) for value in exact_step(3.0, 0.5, tau))
    objective = ((mean - 3) ** 2 + (std - 0.5) ** 2) / (2 * tau) + (mean**2 + std**2 - 1) / 2 - std.log()
    for slope in torch.autograd.grad(objective, (mean, std)):
        assert abs(float(slope)) < 1e-12


def test_stationary_point_of_the_discrete_objective():
    x = torch.tensor([0.0, 0.1, 1.0, 3.0], dtype=F64)
    w, tau, scale = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64), 0.2, 1.7
    energy = Potential(lambda x: x.pow(4).sum(-1) / 4) + Entropy(scale)
    y = jko_step(x, energy, tau, weights=w).requires_grad_()
    between = (w[1:] + w[:-1]) / 2
    objective = (w * ((y - x) ** 2 / (2 * tau) + y**4 / 4)).sum()
    objective = objective - scale * (between * (y.diff() / between).log()).sum()
    (slope,) = torch.autograd.grad(objective, y)
    assert slope.abs().max() < 1e-7


def test_order_shape_and_dtype_are_kept():
    x = torch.tensor([0.5, -1.0, 2.0, 0.4])
    y = jko_step(x, NORMAL, 0.1)
    assert y.dtype == torch.float32
    assert torch.equal(y.argsort(), x.argsort())
    column = jko_step(x.unsqueeze(-1), NORMAL, 0.1)
    assert torch.equal(column.squeeze(-1), y)
    permuted = jko_step(x.flip(0), NORMAL, 0.1)
    torch.testing.assert_close(permuted.flip(0), y)
    with torch.no_grad():
        assert torch.equal(jko_step(x.requires_grad_(), NORMAL, 0.1), y)


def test_one_particle_and_identical_particles():
    torch.testing.assert_close(jko_step(torch.tensor([3.0]), NORMAL, 0.5), torch.tensor([2.0]))
    apart = jko_step(torch.zeros(50, dtype=F64), Entropy(), 0.5).sort().values
    assert (apart.diff() > 0).all()
    torch.testing.assert_close(apart, -apart.flip(0))
    # From a point, one step of the heat flow has the standard deviation sqrt(tau) in the limit.
    many = jko_step(torch.zeros(2000, dtype=F64), Entropy(), 0.5)
    assert float(many.std(unbiased=False)) == pytest.approx(math.sqrt(0.5), rel=0.01)


@pytest.mark.parametrize("count", [1, 6])
def test_map_of_one_place_moves_it_as_the_potential_does(count):
    """A Jacobian at one place is free of charge, and would be noise of the first weights."""
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        y = jko_step(torch.ones(count, 2, dtype=F64), NORMAL, 0.1, method="map", generator=generator)
        torch.testing.assert_close(y, torch.full_like(y, 1 / 1.1), rtol=1e-4, atol=0.0)


def test_without_entropy_it_is_the_proximal_step():
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=F64)
    y = jko_step(x, Potential(lambda x: x.cosh().sum(-1)), 0.3)
    torch.testing.assert_close(y + 0.3 * y.sinh(), x)
    # A linear potential has no curvature, and a double well has it of both signs.
    torch.testing.assert_close(jko_step(x, Potential(lambda x: x.sum(-1)), 0.3), x - 0.3)
    well = Potential(lambda x: (x.square() - 1).square().sum(-1))
    z = jko_step(x, well, 0.5)
    torch.testing.assert_close(z + 0.5 * 4 * z * (z.square() - 1), x)


def test_energy_and_distance_obey_the_inequality_of_the_scheme():
    x = quantiles(200, 2.0, 0.3)
    between = 1 / 200

    def energy(x):
        return float(x.square().mean() / 2 - (between * (x.diff() / between).log()).sum())

    for _ in range(10):
        y = jko_step(x, NORMAL, 0.2)
        assert energy(y) + float((y - x).square().mean()) / 0.4 <= energy(x) + 1e-12
        x = y


@pytest.mark.parametrize("hidden", [0, 8])
def test_map_follows_the_closed_form_in_several_dimensions(hidden):
    tau = 0.1
    z = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / 200), z.T, upper=False).T
    x = 3 + 0.5 * z
    generator = torch.Generator().manual_seed(1)
    y = jko_step(x, NORMAL, tau, method="map", hidden=hidden, iterations=60, generator=generator)
    mean, std = exact_step(3.0, 0.5, tau)
    # The hidden layer also fits the sampling noise of 200 points, so it is not the exact affine map.
    tolerance = 1e-5 if hidden == 0 else 0.02
    torch.testing.assert_close(y.mean(0), torch.full((2,), mean, dtype=F64), rtol=tolerance, atol=0)
    torch.testing.assert_close(
        y.T.cov(correction=0), std**2 * torch.eye(2, dtype=F64), rtol=3 * tolerance, atol=3 * tolerance
    )


def test_map_decreases_an_energy_with_interaction_and_is_reproducible():
    energy = NORMAL + Interaction(lambda z: z.square().sum(-1) / 4)
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * 0.4 + 1
    with torch.no_grad():
        first, again = (
            jko_step(x, energy, 0.2, method="map", iterations=20, generator=torch.Generator().manual_seed(2))
            for _ in range(2)
        )
    assert torch.equal(first, again)
    assert not first.requires_grad
    flow = WassersteinFlow(energy, density="gaussian")
    assert float(flow.energy(first)) < float(flow.energy(x))
    assert jko_step(torch.zeros(4, 0), NORMAL, 0.1, method="map").shape == (4, 0)
    assert jko_step(torch.ones(1, 2), Potential(lambda x: x.square().sum(-1) / 2), 1.0, method="map").isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_tridiagonal_solver(n):
    g = torch.Generator().manual_seed(n)
    lower, upper = (torch.rand(n - 1, dtype=F64, generator=g) for _ in range(2))
    diagonal, right = torch.rand(n, dtype=F64, generator=g) + 2, torch.randn(n, dtype=F64, generator=g)
    dense = diagonal.diag() + (lower.diag(-1) + upper.diag(1) if n > 1 else 0)
    torch.testing.assert_close(
        solve_tridiagonal(lower, diagonal, upper, right), torch.linalg.solve(dense, right), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"x": torch.zeros(3, dtype=torch.float16)}, TypeError, "x must be float32 or float64"),
        ({"energy": torch.sum}, TypeError, "energy must be Potential"),
        ({"tau": 0.0}, ValueError, "tau must be in"),
        ({"method": "2d"}, ValueError, "method must be one of '1d', 'map'"),
        ({"x": torch.zeros(3, 2)}, ValueError, r"method='1d' needs shape \(N,\) or \(N, 1\)"),
        ({"x": torch.zeros(0)}, ValueError, "at least one particle"),
        ({"x": torch.zeros(3), "method": "map"}, ValueError, "method='map' needs shape"),
        ({"x": torch.zeros(3, 11), "method": "map"}, ValueError, "D <= 10"),
        ({"hidden": 3}, ValueError, "hidden is an option of method='map'"),
        ({"iterations": 3}, ValueError, "iterations is an option of method='map'"),
        ({"generator": torch.Generator()}, ValueError, "generator is an option of method='map'"),
        ({"x": torch.zeros(3, 1), "method": "map", "hidden": -1}, ValueError, "hidden must be at least 0"),
        ({"x": torch.zeros(3, 1), "method": "map", "iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"energy": Interaction(torch.sum)}, ValueError, "does not support Interaction with method='1d'"),
        ({"energy": FDivergence("kl", torch.sum)}, ValueError, "does not support FDivergence"),
        ({"energy": KL(score=torch.neg)}, ValueError, "not only their gradients"),
        ({"weights": torch.tensor([0.5, 0.6, 0.1])}, ValueError, "weights must sum to 1"),
        ({"weights": torch.tensor([0.5, 0.5])}, ValueError, "weights are for 2 particles, x has 3"),
        ({"energy": Potential(lambda x: x.abs().sqrt().sum(-1))}, RuntimeError, "not finite at 1 of 3 particles: 0"),
        ({"energy": Potential(lambda x: -50 * x.square().sum(-1))}, RuntimeError, "not finite|converge"),
    ],
)
def test_bad_input(arguments, error, match):
    given = {"x": torch.tensor([0.0, 1.0, 2.0]), "energy": NORMAL, "tau": 0.1, **arguments}
    with pytest.raises(error, match=match):
        jko_step(given.pop("x"), given.pop("energy"), given.pop("tau"), **given)
