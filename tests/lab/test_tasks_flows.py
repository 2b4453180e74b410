"""The posterior task: its data, its reference, its metrics, and fits that go on bit for bit."""

import math

import pytest
import torch

from danlu.lab.data import breast_cancer
from danlu.lab.errors import TrialError
from danlu.lab.tasks.posterior import LogisticPosterior, _Target, reference_posterior, step_lengths
from danlu.lab.trial import find_trial

TASK = LogisticPosterior()
SMALL = {**TASK.fit_options, "particles": 20}


def test_data_are_standardized_and_split():
    data = breast_cancer(seed=1)
    assert data.train_inputs.shape == (400, 30)
    assert len(data.validation_targets) + len(data.test_targets) == 169
    assert abs(data.train_inputs.mean(0)).max() < 1e-5
    assert abs(data.train_inputs.std(0) - 1).max() < 1e-4
    assert breast_cancer(seed=2).train_targets.tolist() != data.train_targets.tolist()
    with pytest.raises(ValueError, match="train must leave validation and test rows of 569, got 568"):
        breast_cancer(train=568)


def test_the_gradient_is_that_of_the_log_density():
    target = _Target(0, 400, torch.float64)
    theta = (0.1 * torch.randn(3, 31, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(target, (theta,))
    # By hand, for one row and one particle.
    row = target.rows["train"][:1]
    target.rows["train"] = row
    expected = -math.log(1 + math.exp(-float(theta[0].detach() @ row[0]))) - float(theta[0].detach().square().sum()) / 2
    assert target(theta)[0].item() == pytest.approx(expected)


def test_two_references_agree():
    mean, covariance = reference_posterior(0, 100)
    other_mean, other = reference_posterior(0, 100, 1)
    assert (mean - other_mean).norm() / covariance.trace().sqrt() < 0.05
    assert (covariance - other).norm() / covariance.norm() < 0.12
    assert torch.linalg.eigvalsh(covariance).min() > 0
    # Data can only narrow the prior, whose covariance is the identity, for a log-concave likelihood.
    assert torch.linalg.eigvalsh(covariance).max() < 1.1


@pytest.mark.parametrize("growth", [0.25, 1.0, 8.0, 2.0**24, 2.0**-24])
def test_steps_grow_geometrically_within_a_fixed_time(growth):
    lengths = step_lengths(50, 0.01, growth)
    assert sum(lengths) == pytest.approx(0.5)
    assert lengths[-1] / lengths[0] == pytest.approx(growth)
    assert lengths[1] / lengths[0] == pytest.approx(lengths[-1] / lengths[-2])
    assert step_lengths(1, 0.01, growth) == [0.01]


@pytest.mark.parametrize("density", ["langevin", "blob", "svgd", "gaussian"])
def test_a_fit_goes_on_bit_for_bit(density):
    options = {**SMALL, "density": density, "growth": 4.0}
    whole, half = (TASK.start(seed=0, steps=6, options=options) for _ in range(2))
    points = [whole.step(i) for i in range(6)]
    for i in range(3):
        half.step(i)
    rest = TASK.start(seed=0, steps=6, options=options)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    assert torch.equal(rest.model.x, whole.model.x)
    assert torch.equal(rest.covariances, whole.covariances)
    assert whole.covariances.isfinite().all()
    assert points[-1]["train_loss"] < points[0]["train_loss"]
    assert list(whole.optimizer_state()) == []


def test_metrics_of_particles_drawn_from_the_reference(monkeypatch):
    fit = TASK.start(seed=0, steps=1, options={**SMALL, "particles": 4000})
    mean, covariance = torch.linspace(-1, 1, 31).double(), torch.eye(31).double() * 0.25
    monkeypatch.setattr("danlu.lab.tasks.posterior.reference_posterior", lambda seed, train: (mean, covariance))
    with torch.no_grad():
        fit.model.x.copy_(mean + 0.5 * torch.randn(4000, 31))
    found = TASK.evaluate(fit, seed=0, split="test", options={})
    assert found["mean_error"] < 0.04
    assert found["covariance_error"] < 0.12
    assert found["variance_ratio"] == pytest.approx(1, abs=0.02)
    log_density = _Target(0, 400, torch.float64)(fit.model.x.detach().double())
    assert found["log_density_deviation"] == pytest.approx(float(log_density.std()), rel=1e-4)
    with torch.no_grad():
        fit.model.x.zero_()
    found = TASK.evaluate(fit, seed=0, split="test", options={})
    assert found["covariance_error"] == pytest.approx(1)
    assert found["negative_log_likelihood"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("growth", [1.0, 64.0])
def test_errors_along_the_run_are_those_at_the_flow_time(monkeypatch, growth):
    fit = TASK.start(seed=0, steps=200, options={**SMALL, "density": "gaussian", "dt": 0.004, "growth": growth})
    lengths = step_lengths(200, 0.004, growth)
    covariance = torch.eye(31, dtype=torch.float64)
    reference = (torch.zeros(31, dtype=torch.float64), covariance)
    monkeypatch.setattr("danlu.lab.tasks.posterior.reference_posterior", lambda seed, train: reference)
    times, errors = [], []
    for index in range(200):
        fit.step(index)
        times.append(sum(lengths[: index + 1]) / 0.8)
        errors.append(float((fit.x.detach().double().T.cov(correction=0) - covariance).norm() / covariance.norm()))
    found = TASK.evaluate(fit, seed=0, split="test", options={})
    # The first cloud at or after every hundredth of the time.
    course = [errors[next(k for k in range(200) if times[k] >= r / 100 - 1e-9)] for r in range(1, 101)]
    expected = {"": course[-1], "@half": course[49], "@late": sum(course[49:]) / 51, "@least": min(course)}
    for condition, value in expected.items():
        assert found[f"covariance_error{condition}"] == pytest.approx(value, rel=1e-4)
    assert found["covariance_error"] == pytest.approx(errors[-1], rel=1e-4)


def test_bandwidth_is_that_of_the_kernels():
    fits = {
        (density, bandwidth): TASK.start(seed=0, steps=1, options={**SMALL, "density": density, "bandwidth": bandwidth})
        for density in ("blob", "svgd", "langevin", "gaussian")
        for bandwidth in ("median", 2.0)
    }
    clouds = {key: (fit.step(0), fit.x.detach())[1] for key, fit in fits.items()}
    for density in ("blob", "svgd"):
        assert not torch.equal(clouds[density, "median"], clouds[density, 2.0])
    for density in ("langevin", "gaussian"):
        assert torch.equal(clouds[density, "median"], clouds[density, 2.0])


def test_a_step_that_is_too_long_is_a_diverged_fit():
    fit = TASK.start(seed=0, steps=50, options={**SMALL, "density": "gaussian", "dt": 1e6})
    assert not math.isfinite([fit.step(i)["train_loss"] for i in range(50)][-1])
    assert not math.isfinite(TASK.evaluate(fit, seed=0, split="test", options={})["covariance_error@late"])


def test_bad_options():
    with pytest.raises(TrialError, match="unknown density 'kde'"):
        TASK.start(seed=0, steps=1, options={**SMALL, "density": "kde"})


def test_the_arms_take_equal_gradients():
    _, trial = find_trial("wasserstein_flow")
    for size in trial.sizes:
        assert len({len(trial.points(arm, size)) for arm in trial.arms}) == 1


def test_the_arms_that_share_a_clock_flow_for_the_same_time_at_every_point():
    _, trial = find_trial("wasserstein_flow")
    for size in trial.sizes:
        steps = {point["dt"] for arm in ("langevin", "gaussian", "blob") for point in trial.points(arm, size)}
        assert len(steps) == 1
    # Ten relaxation times of the slowest direction, which has rate 1, and more.
    assert trial.sizes["report"].steps * steps.pop() >= 10
