"""What is true of particle flows: Gaussian closed forms, stationary laws, dissipation, degenerate clouds, errors."""

import math

import pytest
import torch

from danlu.flows import (
    KL,
    Entropy,
    FDivergence,
    Interaction,
    Potential,
    WassersteinFlow,
    ornstein_uhlenbeck,
)

F64 = torch.float64
A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=F64)
MU, M0 = torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([-2.0, 2.0], dtype=F64)
S0 = torch.tensor([[0.3, 0.1], [0.1, 0.5]], dtype=F64)
DENSITIES = ["langevin", "kde", "blob", "svgd", "gaussian"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def log_prob(x):
    centered = x - MU.to(x.dtype)
    return -((centered @ A.to(x.dtype)) * centered).sum(-1) / 2


TARGET = KL(log_prob)


def square(x):
    return x.square().sum(-1) / 2


def matched(n=300):
    """Particles whose moments are exactly those of the start."""
    z = torch.randn(n, 2, dtype=F64, generator=seeded())
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / n), z.T, upper=False).T
    return M0 + z @ torch.linalg.cholesky(S0).T


def test_gaussian_density_is_exact_to_first_order():
    exact = ornstein_uhlenbeck(A, MU, M0, S0, 1.0)
    errors = {"mean": [], "cov": []}
    for h in (0.1, 0.05, 0.025):
        run = WassersteinFlow(TARGET, density="gaussian").run(matched(), 1.0, h, record=("mean", "cov", "energy"))
        assert len(run.times) == round(1 / h) + 1
        assert (run.energy.diff() < 0).all()
        errors["mean"].append(float((run.mean[-1] - exact.mean).norm()))
        errors["cov"].append(float((run.cov[-1] - exact.cov).norm()))
    assert errors["mean"] == pytest.approx([0.0651, 0.0321, 0.0159], abs=5e-5)
    for found in errors.values():
        assert found[0] / found[1] == pytest.approx(2.0, rel=0.06)
        assert found[1] / found[2] == pytest.approx(2.0, rel=0.03)


def test_gaussian_density_rests_at_the_moments_of_a_gaussian_target():
    """Whatever the particles, their number and the step: the fixed point has no error, also in an oblong target."""
    d, generator = 8, seeded(2)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator)).Q
    precision = basis @ torch.diag(torch.logspace(0, 1.6, d, dtype=F64)) @ basis.T
    flow = WassersteinFlow(KL(lambda x: -(((x - 3) @ precision) * (x - 3)).sum(-1) / 2), density="gaussian")
    # The second step is too long for the covariance of the stiffest direction, and is halved to the end.
    for n, h, close in ((20, 0.02, 1e-9), (300, 0.04, 1e-7)):
        x = torch.rand(n, d, dtype=F64, generator=generator) ** 3
        run = flow.run(x, 24.0, h, record=("mean", "cov", "energy"))
        torch.testing.assert_close(run.mean[-1], torch.full((d,), 3.0, dtype=F64), rtol=0, atol=close)
        torch.testing.assert_close(run.cov[-1], torch.linalg.inv(precision), rtol=0, atol=close)
        # At rest the energy of 0.02, a difference of parts near 10, rises by rounding: no reason to halve for ever.
        assert len(run.times) < 2 * 24.0 / h
        assert float(run.energy.diff().max()) < 1e-13


@pytest.mark.parametrize(("n", "h"), [(20, 0.05), (20, 0.02), (100, 0.05)])
def test_gaussian_density_rests_elsewhere_on_another_target(n, h):
    r"""For $p\propto e^{-x^4/4}$ the velocity is $x/s^2-x^3$: all particles end at $\pm1$, and the variance is 1."""
    x = torch.randn(n, 1, dtype=F64, generator=seeded())
    flow = WassersteinFlow(KL(lambda x: -x.pow(4).sum(-1) / 4), density="gaussian")
    run = flow.run(torch.cat([x, -x]), 30.0, h, record=("cov",))
    torch.testing.assert_close(run.x.abs(), torch.ones_like(run.x), rtol=0, atol=1e-9)
    truth = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert truth == pytest.approx(0.675978, abs=1e-6)
    assert float(run.cov[-1]) - truth == pytest.approx(1 - truth, abs=1e-9)


def test_energy_of_the_gaussian_flow_is_the_divergence():
    flow, x = WassersteinFlow(TARGET, density="gaussian"), matched()
    # log_prob lacks the constant of its normalization.
    constant = math.log(2 * math.pi) - float(torch.linalg.slogdet(A)[1]) / 2
    assert float(flow.energy(x)) + constant == pytest.approx(float(ornstein_uhlenbeck(A, MU, M0, S0, 0.0).kl), abs=1e-9)
    # Dissipation: dF/dt = -mean |v|^2, the relative Fisher information.
    speed = flow.velocity(x).square().sum(-1).mean()
    assert float(speed) == pytest.approx(float(ornstein_uhlenbeck(A, MU, M0, S0, 0.0).dissipation), rel=1e-9)


@pytest.mark.parametrize(
    ("density", "bandwidth", "error"),
    [("gaussian", None, 0.0005), ("blob", 0.3, 0.05), ("blob", 0.2, 0.08), ("blob", 0.5, 0.1), ("kde", 0.3, 0.25)],
)
def test_energy_decreases_and_the_covariance_comes_close(density, bandwidth, error):
    flow = WassersteinFlow(TARGET, density=density, bandwidth=bandwidth)
    run = flow.run(matched(), 4.0, 0.02, record=("cov", "energy"))
    assert (run.energy.diff() <= 0).all()
    assert float((run.cov[-1] - ornstein_uhlenbeck(A, MU, M0, S0, 4.0).cov).norm()) < error


def test_stein_flow_decreases_the_energy_too_slowly():
    run = WassersteinFlow(TARGET, density="svgd").run(matched(), 4.0, 0.02, record=("cov", "energy"))
    assert (run.energy.diff() <= 0).all()
    assert 0.3 < float((run.cov[-1] - torch.linalg.inv(A)).norm()) < 0.6


def test_langevin_moments_are_those_of_the_discrete_recursion():
    h, steps, n = 0.01, 100, 200_000
    x = 3 + 0.5 * torch.randn(n, 1, dtype=F64, generator=seeded())
    flow = WassersteinFlow(Potential(square) + Entropy(), density="langevin")
    run = flow.run(x, 1.0, h, record=("mean", "cov"), generator=seeded(1))
    # x' = (1 - h) x + sqrt(2 h) z.
    mean, variance = 3 * (1 - h) ** steps, 0.25
    for _ in range(steps):
        variance = (1 - h) ** 2 * variance + 2 * h
    assert (mean, variance) == pytest.approx((1.0981, 0.9039), abs=1e-4)
    assert float(run.mean[-1]) == pytest.approx(mean, abs=0.005)
    assert float(run.cov[-1]) == pytest.approx(variance, abs=0.01)


def test_langevin_stationary_variance():
    h = 0.1
    # The fixed point of the recursion is 1 / (1 - h/2).
    x = torch.randn(200_000, 1, dtype=F64, generator=seeded()) * math.sqrt(1 / (1 - h / 2))
    run = WassersteinFlow(Potential(square) + Entropy()).run(x, 3.0, h, record=("cov",), generator=seeded(1))
    assert float(run.cov[1:].mean()) == pytest.approx(1.052632, abs=0.005)


def test_temperature_scales_the_noise_and_the_scores():
    x = torch.zeros(100_000, 1, dtype=F64)
    run = WassersteinFlow(Entropy(0.5) + Entropy(1.5)).run(x, 1.0, 0.5, record=("cov",), generator=seeded())
    assert float(run.cov[-1]) == pytest.approx(4.0, rel=0.02)
    y = matched(50)
    for density in ("kde", "blob", "svgd", "gaussian"):
        one, two = (WassersteinFlow(Entropy(scale), density=density).velocity(y) for scale in (1.0, 2.0))
        torch.testing.assert_close(two, 2 * one)


def test_kl_is_potential_and_entropy():
    x = matched(40)
    parts = Potential(lambda x: -log_prob(x)) + Entropy()
    for density in ("kde", "blob", "svgd", "gaussian"):
        first, second = (WassersteinFlow(energy, density=density) for energy in (TARGET, parts))
        torch.testing.assert_close(first.velocity(x), second.velocity(x))
        torch.testing.assert_close(first.energy(x), second.energy(x))
    scored = WassersteinFlow(KL(score=lambda x: -(x - MU) @ A), density="blob")
    torch.testing.assert_close(scored.velocity(x), WassersteinFlow(TARGET, density="blob").velocity(x))


def test_gaussian_density_equals_a_callable_and_reverse_kl():
    x = matched(60)
    score = WassersteinFlow(Entropy(), density="gaussian").velocity(x)
    given = WassersteinFlow(TARGET, density=lambda y: -score)
    expected = WassersteinFlow(TARGET, density="gaussian").velocity(x)
    torch.testing.assert_close(given.velocity(x), expected)

    def log_ratio(y):
        q = torch.distributions.MultivariateNormal(y.detach().mean(0), y.detach().T.cov(correction=0))
        return log_prob(y) - q.log_prob(y)

    flow = WassersteinFlow(FDivergence("reverse_kl", log_ratio))
    torch.testing.assert_close(flow.velocity(x), expected)


def test_interaction_contracts_to_the_mean_and_keeps_it():
    x = matched(30)
    run = WassersteinFlow(Interaction(square)).run(x, 2.0, 0.01, record=("mean", "cov", "energy"))
    torch.testing.assert_close(run.mean[-1], run.mean[0])
    # W = |z|^2/2: dx/dt = m - x.
    torch.testing.assert_close(run.cov[-1], run.cov[0] * 0.99**400)
    assert (run.energy.diff() < 0).all()


def test_step_is_halved_where_the_energy_would_rise():
    stiff = WassersteinFlow(Potential(lambda x: 50 * square(x)))
    x = torch.ones(3, 1, dtype=F64)
    run = stiff.run(x, 1.0, 0.5, record=("energy",))
    assert (run.energy.diff() <= 0).all()
    assert float(run.times[-1]) == 1.0
    assert float(run.times.diff().min()) < 0.05
    plain = stiff.run(x, 1.0, 0.5, record=("energy",), adaptive=False)
    assert len(plain.times) == 3
    assert plain.energy[-1] > plain.energy[0]

    def barrier(x):
        return -x.squeeze(-1).log()

    inside = WassersteinFlow(Potential(lambda x: barrier(x) + barrier(2 - x))).run(
        torch.tensor([[0.01]], dtype=F64), 1.0, 1.0, record=("energy", "particles")
    )
    assert ((inside.particles > 0) & (inside.particles < 2)).all()
    assert (inside.energy.diff() <= 0).all()
    with pytest.raises(RuntimeError, match="the energy rises at time 0 for every step"):
        WassersteinFlow(Potential(square, lambda x: -x)).run(x, 1.0, 0.1)


def test_reproducible_with_a_generator():
    flow, x = WassersteinFlow(TARGET), matched(20)
    first, again, other = (flow.run(x, 0.5, 0.1, generator=seeded(seed)).x for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stepped, generator = x, seeded(1)
    for _ in range(5):
        stepped = flow.step(stepped, 0.1, generator=generator)
    assert torch.equal(stepped, first)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2), (1, 0), (4, 0), (5, 1), (3, 7)])
def test_degenerate_clouds(density, dtype, shape):
    flow = WassersteinFlow(KL(lambda x: -square(x - 1)), density=density)
    x = torch.arange(math.prod(shape), dtype=dtype).reshape(shape)
    generator = {"generator": seeded()} if density == "langevin" else {}
    run = flow.run(x, 0.5, 0.1, record=("mean", "cov", "particles"), **generator)
    assert run.x.shape == shape
    assert run.x.dtype == run.mean.dtype == run.cov.dtype == dtype
    assert run.x.isfinite().all()
    assert run.particles.shape == (6, *shape)
    if shape == (1, 2) and density != "langevin":
        # One particle has no neighbors to flee from.
        torch.testing.assert_close(flow.velocity(x), 1 - x)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_particles_move_as_one(density, dtype):
    flow = WassersteinFlow(KL(lambda x: -square(x)), density=density)
    x = torch.tensor([[1.1, -0.3]], dtype=dtype).expand(50, 2)
    torch.testing.assert_close(flow.velocity(x), -x, rtol=1e-5, atol=1e-5)
    pair = torch.cat([x, x + 1])
    assert flow.velocity(pair).isfinite().all()


@pytest.mark.parametrize("density", ["kde", "blob", "svgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_particles_do_not_divide_by_zero(density, dtype):
    x = torch.tensor([[0.0], [1.0], [1e6], [1e6 + 1]], dtype=dtype)
    flow = WassersteinFlow(Entropy(), density=density, bandwidth=0.5)
    velocity = flow.velocity(x)
    assert velocity.isfinite().all()
    torch.testing.assert_close(velocity[:2], velocity[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity[0], -velocity[1], rtol=1e-4, atol=1e-4)
    assert velocity[0] < 0


@pytest.mark.parametrize("density", ["kde", "blob", "svgd", "gaussian"])
def test_weights_count_particles(density):
    x = torch.randn(4, 2, dtype=F64, generator=seeded())
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=F64)
    copies = x.repeat_interleave(torch.tensor([4, 2, 1, 1]), 0)
    bandwidth = {} if density == "gaussian" else {"bandwidth": 0.7}
    weighted = WassersteinFlow(TARGET, density=density, weights=weights, **bandwidth)
    repeated = WassersteinFlow(TARGET, density=density, **bandwidth)
    torch.testing.assert_close(weighted.velocity(x), repeated.velocity(copies)[[0, 4, 6, 7]])
    torch.testing.assert_close(weighted.energy(x), repeated.energy(copies))
    kept = weighted.run(x, 0.1, 0.1, record=("mean", "cov"))
    torch.testing.assert_close(kept.mean[0], copies.mean(0))
    torch.testing.assert_close(kept.cov[0], copies.T.cov(correction=0))


def test_caller_without_gradients_and_with_graphs():
    x = matched(10).requires_grad_()
    flow = WassersteinFlow(TARGET + Interaction(square), density="blob")
    with torch.no_grad():
        quiet = flow.velocity(x)
    assert torch.equal(flow.velocity(x), quiet)
    assert not flow.step(x, 0.1).requires_grad
    assert x.grad is None
    assert "blob" in repr(flow)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"energy": log_prob}, TypeError, "energy must be Potential, Interaction"),
        ({"density": "parzen"}, ValueError, "density must be one of 'langevin', 'kde', 'blob', 'svgd', 'gaussian'"),
        ({"density": 3.0}, TypeError, "density must be a name or callable"),
        ({"energy": Potential(square), "density": "kde"}, ValueError, "density has no meaning"),
        ({"bandwidth": 0.3}, ValueError, "bandwidth has no meaning with density='langevin'"),
        ({"density": "kde", "bandwidth": 0.0}, ValueError, "bandwidth must be in"),
        ({"density": "kde", "bandwidth": "mean"}, ValueError, "bandwidth must be one of 'median'"),
        ({"density": "kde", "bandwidth": [1.0]}, TypeError, "bandwidth must be a real number"),
        ({"weights": [0.5, 0.5]}, TypeError, "weights must be a floating-point tensor"),
        ({"weights": torch.full((2, 1), 0.5)}, ValueError, r"weights must have shape \(N,\)"),
        ({"weights": torch.tensor([0.5, 0.4])}, ValueError, "weights must sum to 1, got 0.9"),
        ({"weights": torch.tensor([1.5, -0.5])}, ValueError, "weights must be positive"),
        ({"weights": torch.tensor([1.0, 0.0])}, ValueError, "drop particles of weight 0"),
        ({"weights": torch.tensor([1.0, float("nan")])}, ValueError, "weights must be positive"),
    ],
)
def test_bad_options(options, error, match):
    arguments = {"energy": TARGET, **options}
    with pytest.raises(error, match=match):
        WassersteinFlow(arguments.pop("energy"), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f: f.velocity(torch.zeros(2)), ValueError, r"x must have shape \(N, D\)"),
        (lambda f: f.velocity(torch.zeros(0, 2)), ValueError, "at least one particle"),
        (lambda f: f.velocity(torch.zeros(2, 2, dtype=torch.float16)), TypeError, "x must be float32 or float64"),
        (lambda f: f.velocity(torch.zeros(2, 2, dtype=torch.int64)), TypeError, "x must be a floating-point"),
        (lambda f: f.step(torch.zeros(2, 2), 0.0), ValueError, "dt must be in"),
        (lambda f: f.run(torch.zeros(2, 2), 0.0, 0.1), ValueError, "t must be in"),
        (lambda f: f.run(torch.zeros(2, 2), 1.0, -0.1), ValueError, "dt must be in"),
        (lambda f: f.run(torch.zeros(2, 2), 1.0, 0.1, record=("kl",)), ValueError, "record must be one of 'mean'"),
        (lambda f: f.run(torch.zeros(2, 2), 1.0, 0.1, record=("energy",)), ValueError, "no estimate of the entropy"),
        (lambda f: f.run(torch.zeros(2, 2), 1.0, 0.1, adaptive=True), ValueError, "adaptive=True needs an energy"),
        (lambda f: f.energy(torch.zeros(2, 2)), ValueError, "density=langevin has no estimate"),
    ],
)
def test_bad_particles_and_runs(call, error, match):
    with pytest.raises(error, match=match):
        call(WassersteinFlow(TARGET))


def test_what_does_not_apply_is_refused():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="generator has no meaning with density='gaussian'"):
        WassersteinFlow(TARGET, density="gaussian").step(x, 0.1, generator=seeded())
    with pytest.raises(ValueError, match="generator has no meaning"):
        WassersteinFlow(TARGET, density="kde").run(x, 1.0, 0.1, generator=seeded())
    with pytest.raises(ValueError, match="weights are for 3 particles, x has 2"):
        WassersteinFlow(TARGET, weights=torch.full((3,), 1 / 3)).velocity(x)
    with pytest.raises(ValueError, match="shape of the particles"):
        WassersteinFlow(TARGET, density=lambda x: x[:1]).velocity(x)
    with pytest.raises(ValueError, match="give log_prob or function"):
        WassersteinFlow(KL(score=torch.neg), density="kde").energy(x)
    with pytest.raises(ValueError, match="density=a callable has no estimate"):
        WassersteinFlow(TARGET, density=torch.neg).energy(x)
    with pytest.raises(ValueError, match="adaptive=True needs"):
        WassersteinFlow(TARGET, density="blob").run(x, 1.0, 0.1, adaptive=True)


def test_gradients_that_are_not_finite_name_the_particles():
    x = torch.ones(12, 2, dtype=F64)
    x[[3, 7]] = 0.0
    with pytest.raises(RuntimeError, match=r"the gradient of KL is not finite at 2 of 12 particles: 3, 7$"):
        WassersteinFlow(KL(lambda x: -x.abs().sqrt().sum(-1)), density="gaussian").velocity(x)
    with pytest.raises(RuntimeError, match=r"Potential is not finite at 12 of 12 particles: 0, 1, 2, 3, 4, \.\.\.$"):
        WassersteinFlow(Potential(gradient=lambda x: x / 0)).velocity(x * 0)
    with pytest.raises(RuntimeError, match="Interaction is not finite at 12"):
        WassersteinFlow(Interaction(lambda z: -z.square().sum(-1).log())).velocity(x)
    with pytest.raises(RuntimeError, match="velocity is not finite at 1 of 12 particles: 3"):
        WassersteinFlow(TARGET, density=lambda y: y / (torch.arange(12.0) - 3).unsqueeze(-1)).velocity(x + 1)
    with pytest.raises(RuntimeError, match="FDivergence is not finite at 12"):
        WassersteinFlow(FDivergence("chi2", lambda x: 800 * x.sum(-1))).velocity(x + 1)
