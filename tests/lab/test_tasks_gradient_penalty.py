"""The task of the gradient penalties measures what it says and resumes exactly."""

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.gradient_penalty_digits import GradientPenaltyDigits, log_correlation

TASK = GradientPenaltyDigits()


def started(penalty: str, strength: float = 0.1, seed: int = 0, **changes):
    options = {**TASK.fit_options, "penalty": penalty, "strength": strength, "width": 16, **changes}
    return TASK.start(seed=seed, steps=12, options=options), options


def weights(fit) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in fit.model.parameters()])


PENALTIES = ["none", "input", "batch", "batch_finite_difference", "per_sample"]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(penalty):
    whole, _ = started(penalty)
    points = [whole.step(i) for i in range(6)]
    half, _ = started(penalty)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest, _ = started(penalty)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    assert torch.equal(weights(rest), weights(whole))
    other, _ = started(penalty, seed=1)
    assert other.step(0) != points[0]


def test_penalties_change_the_fit_and_finite_differences_are_close_to_exact():
    found = {}
    for penalty in PENALTIES:
        fit, _ = started(penalty)
        for i in range(6):
            fit.step(i)
        found[penalty] = weights(fit)
    none = found.pop("none")
    effect = {name: float((value - none).norm()) for name, value in found.items()}
    assert min(effect.values()) > 1e-2
    assert float((found["batch"] - found["batch_finite_difference"]).norm()) < 0.05 * effect["batch"]


def test_epochs_show_every_row_once_and_strength_zero_is_no_penalty():
    plain, _ = started("none")
    zero, _ = started("input", 0.0)
    assert [plain.step(i) for i in range(4)] == [zero.step(i) for i in range(4)]


def test_metrics_by_hand():
    fit, options = started("none")
    for i in range(3):
        fit.step(i)
    metrics = TASK.evaluate(fit, seed=0, split="test", options=options)
    images, labels = TASK._rows(0, "test", options)
    assert metrics["accuracy"] == pytest.approx(float((fit.model(images).argmax(-1) == labels).double().mean()))
    inputs, params, model = [], [], fit.model
    for i in range(200):
        x = images[i : i + 1].clone().requires_grad_()
        d_x, *grads = torch.autograd.grad(F.cross_entropy(model(x), labels[i : i + 1]), [x, *model.parameters()])
        inputs.append(d_x.square().sum())
        params.append(sum(grad.square().sum() for grad in grads))
    assert metrics["input_gradient"] == pytest.approx(float(torch.stack(inputs).mean()), rel=1e-4)
    assert metrics["parameter_gradient"] == pytest.approx(float(torch.stack(params).mean()), rel=1e-4)
    expected = log_correlation(torch.stack(inputs), torch.stack(params))
    assert metrics["log_correlation"] == pytest.approx(expected, abs=1e-4)
    assert 0 < metrics["bound_ratio"] < metrics["tight_ratio"] <= 1
    assert model[0].weight.dtype == torch.float32


def test_log_correlation_of_constructed_values():
    a = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert log_correlation(a, 3 * a**2) == pytest.approx(1.0)
    assert log_correlation(a, 1 / a) == pytest.approx(-1.0)
    assert log_correlation(a, torch.tensor([1.0, 2.0, 2.0, 1.0])) == pytest.approx(0.0, abs=1e-6)
    assert -1 <= log_correlation(torch.tensor([0.0, 1.0, 2.0]), a[:3]) <= 1


def test_unknown_penalty():
    with pytest.raises(TrialError, match="unknown penalty 'l2'; known: none, input"):
        started("l2")
