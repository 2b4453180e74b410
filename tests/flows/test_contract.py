"""What the signature `energy -> trajectory` promises: the energy falls, quadratics are solved, errors have an order."""

import inspect
import itertools

import pytest
import torch

import danlu.flows as family
from danlu.flows import (
    KL,
    Entropy,
    GaussianFlow,
    Interaction,
    Potential,
    WassersteinFlow,
    gradient_flow,
    jko_step,
    ornstein_uhlenbeck,
    steepest_direction,
)

F64 = torch.float64
SCALE = torch.tensor([0.5, 2.0], dtype=F64)
START = torch.tensor([3.0, -2.0], dtype=F64)
TIME = 1.0


def one_point(x):
    return (SCALE * x.square()).sum() / 2


def batch(x):
    return (SCALE.to(x.dtype) * x.square()).sum(-1) / 2


def cloud():
    z = torch.randn(120, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / 120), z.T, upper=False).T
    return START + 0.3 * z


def of_points(method):
    """Steps of the gradient flow: final point and energies."""

    def run(h):
        path = gradient_flow(one_point, START, TIME, method=method, step=h)
        return path.x[-1], path.f

    return run


def of_particles(energy, density, observe):
    """Steps of a particle flow: a moment and energies."""

    def run(h):
        path = WassersteinFlow(energy, density=density).run(
            cloud(), TIME, h, record=("mean", "cov", "energy"), adaptive=False
        )
        return observe(path), path.energy

    return run


def of_jko(h):
    """The affine map is exact between Gaussians."""
    x, energies, flow = cloud(), [], WassersteinFlow(KL(lambda x: -batch(x)), density="gaussian")
    for _ in range(round(TIME / h)):
        energies.append(flow.energy(x))
        x = jko_step(x, KL(lambda x: -batch(x)), h, method="map", hidden=0)
    return x.mean(0), torch.stack([*energies, flow.energy(x)])


def spread(path):
    return path.cov[-1].diagonal()


MEAN, VARIANCE = torch.exp(-SCALE * TIME) * START, 0.09 * torch.exp(-2 * SCALE * TIME)
OU = ornstein_uhlenbeck(SCALE.diag(), 0 * START, START, 0.09 * torch.eye(2, dtype=F64), TIME)

# Name of a flow of a quadratic energy: how to run it with step h, what it must reach, its order.
FLOWS = {
    "euler": (of_points("euler"), MEAN, 1),
    "implicit": (of_points("implicit"), MEAN, 1),
    "rk4": (of_points("rk4"), MEAN, 4),
    "potential": (of_particles(Potential(batch), None, lambda path: path.mean[-1]), MEAN, 1),
    "potential, spread": (of_particles(Potential(batch), None, spread), VARIANCE, 1),
    "interaction": (
        of_particles(Interaction(batch), None, lambda path: torch.cat([path.mean[-1], spread(path)])),
        torch.cat([START, VARIANCE]),
        1,
    ),
    "kl": (of_particles(KL(lambda x: -batch(x)), "gaussian", lambda path: path.mean[-1]), OU.mean, 1),
    "kl, spread": (of_particles(KL(lambda x: -batch(x)), "gaussian", spread), OU.cov.diagonal(), 1),
    "heat": (of_particles(Entropy(), "gaussian", spread), torch.full((2,), 0.09 + 2 * TIME, dtype=F64), 1),
    "jko": (of_jko, MEAN, 1),
}
flows = pytest.mark.parametrize("name", FLOWS)


def test_family_is_covered():
    functions = {name for name in family.__all__ if inspect.isfunction(getattr(family, name))}
    # The last two are no flows: a closed form, which stands in for the solution here, and a direction.
    assert functions == {"gradient_flow", "jko_step", "ornstein_uhlenbeck", "steepest_direction"}
    classes = set(family.__all__) - functions
    results = {"GaussianFlow", "GradientTrajectory", "ParticleTrajectory"}
    energies = {"Entropy", "FDivergence", "Interaction", "KL", "Potential"}
    assert classes == {"WassersteinFlow"} | results | energies
    assert isinstance(OU, GaussianFlow)


@flows
def test_energy_never_rises(name):
    for h in (0.1, 0.05):
        energies = FLOWS[name][0](h)[1]
        assert (energies.diff() <= 1e-12).all()


@flows
def test_quadratics_are_solved_with_the_order_of_the_method(name):
    run, exact, order = FLOWS[name]
    errors = [float((run(h)[0] - exact).norm()) for h in (0.1, 0.05, 0.025)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert errors[-1] < 0.05 * float(exact.norm())


@flows
def test_runs_are_repeatable(name):
    run = FLOWS[name][0]
    assert torch.equal(run(0.1)[0], run(0.1)[0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gradient_flow(one_point, START, 1.0, methd="euler", step=0.1), "methd"),
        (lambda: WassersteinFlow(Entropy(), bandwith=1.0), "bandwith"),
        (lambda: WassersteinFlow(Entropy()).run(cloud(), 1.0, 0.1, recrod=()), "recrod"),
        (lambda: jko_step(cloud(), Entropy(), 0.1, metod="map"), "metod"),
        (lambda: steepest_direction(START, "l2", metrc=None), "metrc"),
        (lambda: Potential(functin=batch), "functin"),
    ],
)
def test_misspelt_option(call, match):
    with pytest.raises(TypeError, match=match):
        call()
