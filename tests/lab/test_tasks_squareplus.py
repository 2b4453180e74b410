"""The digits with a chosen activation: exact resume, metrics with known values, and a trial that runs."""

import math

import pytest
import torch
from torch import nn

from danlu.activations import SquarePlus
from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.activation_digits import _ACTIVATIONS, ActivationDigits

TASK = ActivationDigits()


def options(**changes):
    return {**TASK.fit_options, "width": 16, **changes}


def start(chosen, steps=6, seed=0):
    return TASK.start(seed=seed, steps=steps, options=chosen)


@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_fit_resumes_bit_for_bit(activation):
    chosen = options(activation=activation)
    whole = start(chosen)
    points = [whole.step(i) for i in range(6)]
    half = start(chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = start(chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert len(rest.state()["memory"]["milliseconds"]) == 6


def test_the_arms_differ_in_the_activation_only():
    models = {name: start(options(activation=name)).model for name in _ACTIVATIONS}
    kinds = {name: [type(layer) for layer in model] for name, model in models.items()}
    assert kinds["squareplus"] == [nn.Linear, SquarePlus, nn.Linear, SquarePlus, nn.Linear]
    assert kinds["gelu"][1::2] == [nn.GELU, nn.GELU]
    for model in models.values():
        for mine, theirs in zip(model[::2], models["relu"][::2], strict=True):
            assert torch.equal(mine.weight, theirs.weight)
    assert start(options(activation="squareplus", b=0.5)).model[1].b == 0.5
    assert models["learned_squareplus"][1].raw.requires_grad


def test_the_convolutions():
    models = {name: start(options(activation=name, network="cnn", channels=3)).model for name in _ACTIVATIONS}
    kinds = [type(layer) for layer in models["squareplus"]]
    assert kinds == [nn.Unflatten, nn.Conv2d, SquarePlus, nn.Conv2d, SquarePlus, nn.Flatten, nn.Linear]
    assert models["relu"](torch.zeros(2, 64)).shape == (2, 10)
    for model in models.values():
        for place in (1, 3, 6):
            assert torch.equal(model[place].weight, models["relu"][place].weight)
    fit = start(options(network="cnn", channels=3))
    before = [p.detach().clone() for p in fit.model.parameters()]
    fit.step(0)
    assert not any(torch.equal(a, b) for a, b in zip(before, fit.model.parameters(), strict=True))


def test_metrics_of_a_constructed_model():
    chosen = options()
    fit = start(chosen)
    fit.step(0)
    with torch.no_grad():
        fit.model[-1].weight.zero_()
        fit.model[-1].bias.zero_()
        fit.model[-1].bias[3] = 50.0
    found = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    assert 0.08 < found["accuracy"] < 0.12  # always a 3
    assert found["negative_log_likelihood"] == pytest.approx(50 * (1 - found["accuracy"]), rel=1e-6)
    assert found["milliseconds_per_step"] > 0
    with torch.no_grad():
        fit.model[-1].bias.zero_()
    found = TASK.evaluate(fit, seed=0, split="validation", options=chosen)
    assert found["negative_log_likelihood"] == pytest.approx(math.log(10), rel=1e-6)


def test_bad_options():
    with pytest.raises(TrialError, match="unknown activation 'swish'; known: relu"):
        start(options(activation="swish"))
    with pytest.raises(TrialError, match="network must be 'mlp' or 'cnn', got 'rnn'"):
        start(options(network="rnn"))


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("squareplus", size="ci", store=store)
    assert len(outcome.arms) == 12
    for arm in outcome.arms:
        assert {"accuracy", "negative_log_likelihood", "milliseconds_per_step"} <= arm.metrics.keys()
