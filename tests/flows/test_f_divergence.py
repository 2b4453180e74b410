"""f-divergences: the table of weights by autograd, values by quadrature, flows that decrease them."""

import math

import pytest
import torch

from danlu.flows import FDivergence, WassersteinFlow
from danlu.flows._f_divergence import divergence_value, divergence_weight

F64 = torch.float64
GENERATORS = {
    "reverse_kl": (lambda r: -r.log(), lambda r: torch.ones_like(r)),
    "kl": (lambda r: r * r.log(), lambda r: r),
    "chi2": (lambda r: (r - 1) ** 2, lambda r: 2 * r**2),
    "jensen_shannon": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (r + 1)),
    "hellinger": (lambda r: (r.sqrt() - 1) ** 2, lambda r: r.sqrt() / 2),
}
names = pytest.mark.parametrize("name", GENERATORS)


@names
def test_weights_table_by_autograd(name):
    r = torch.logspace(-3, 3, 25, dtype=F64).requires_grad_()
    f, weight = GENERATORS[name]
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(r.detach() ** 2 * second, weight(r.detach()), rtol=1e-8, atol=0)
    u = r.detach().log()
    torch.testing.assert_close(divergence_weight(name, u), weight(r.detach()))
    torch.testing.assert_close(divergence_value(name, u), f(r.detach()), rtol=1e-9, atol=1e-12)


@names
def test_velocity_is_minus_the_gradient_of_the_first_variation(name):
    x = torch.linspace(-2, 2, 9, dtype=F64).unsqueeze(-1)

    def log_ratio(x):
        return torch.sin(2 * x).sum(-1)

    leaf = x.clone().requires_grad_()
    r = log_ratio(leaf).exp()
    f = GENERATORS[name][0]
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (variation,) = torch.autograd.grad((f(r) - r * slope).sum(), leaf)
    torch.testing.assert_close(WassersteinFlow(FDivergence(name, log_ratio)).velocity(x), -variation)


@names
def test_value_by_quadrature(name):
    """Between N(0, 1) and N(1/2, 1), from 400 000 particles of q."""
    x = torch.randn(400_000, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    flow = WassersteinFlow(FDivergence(name, lambda x: (x - 0.25).squeeze(-1) / 2))
    grid = torch.linspace(-12, 12, 20_001, dtype=F64)
    q = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(q * GENERATORS[name][0](torch.exp((grid - 0.25) / 2)), grid)
    assert float(flow.energy(x)) == pytest.approx(float(exact), abs=0.004)


@names
def test_flow_between_gaussians_reaches_the_target(name):
    """q is estimated by the moments of the particles, as log_ratio sees all of them."""
    x = torch.randn(400, 1, dtype=F64, generator=torch.Generator().manual_seed(0)) * 1.2 + 0.5

    def log_ratio(x):
        mean, std = x.detach().mean(), x.detach().std(unbiased=False)
        return (-(x.square()) / 2 + ((x - mean) / std).square() / 2 + std.log()).squeeze(-1)

    run = WassersteinFlow(FDivergence(name, log_ratio)).run(x, 10.0, 0.02, record=("mean", "cov", "energy"))
    assert abs(float(run.mean[-1])) < 0.01
    assert float(run.cov[-1]) == pytest.approx(1.0, abs=0.02)
    assert run.energy[-1] < 0.02 * run.energy[0]


def test_extreme_ratios():
    u = torch.tensor([-150.0, 150.0])
    assert divergence_weight("jensen_shannon", u).tolist() == [0.0, 1.0]
    assert divergence_weight("hellinger", u).isfinite().all()
    assert divergence_value("jensen_shannon", u[:1]).item() == pytest.approx(math.log(2))
    assert divergence_weight("reverse_kl", u).tolist() == [1.0, 1.0]


def test_bad_input():
    with pytest.raises(ValueError, match="name must be one of 'reverse_kl', 'kl', 'chi2'"):
        FDivergence("total_variation", torch.sum)
    with pytest.raises(TypeError, match="log_ratio must be callable"):
        FDivergence("kl", 1.0)
    with pytest.raises(ValueError, match="the function of FDivergence must return one number per row"):
        WassersteinFlow(FDivergence("kl", lambda x: x)).velocity(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="adaptive=True needs"):
        WassersteinFlow(FDivergence("kl", lambda x: x.sum(-1))).run(torch.zeros(2, 1), 1.0, 0.1, adaptive=True)
