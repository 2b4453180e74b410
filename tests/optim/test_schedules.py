"""The piecewise linear schedule: golden numbers, checkpoints, errors."""

import pickle

import pytest
import torch
from torch import nn

from danlu.optim import Tiger, piecewise_linear

POINTS = {40: 1.0, 160: 0.5, 640: 0.1}


def make(lr=2.0):
    return Tiger(nn.Linear(2, 2), lr=lr)


def test_golden_values():
    factor = piecewise_linear(make(), POINTS).lr_lambdas[0]
    expected = {0: 0, 1: 0.025, 20: 0.5, 39: 0.975, 40: 1, 100: 0.75, 160: 0.5, 400: 0.3, 640: 0.1, 9999: 0.1}
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value, abs=1e-12)


def test_without_warmup_and_with_a_point_at_zero():
    assert piecewise_linear(make(), POINTS, from_zero=False).lr_lambdas[0](0) == 1.0
    assert piecewise_linear(make(), {0: 0.3, 10: 1.0}).lr_lambdas[0](0) == 0.3


def test_sets_the_rate_of_every_group_and_survives_a_checkpoint():
    optimizer = make()
    scheduler = piecewise_linear(optimizer, {4: 1.0, 8: 0.0})
    rates = []
    for step in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if step == 5:
            saved = pickle.loads(pickle.dumps((optimizer.state_dict(), scheduler.state_dict())))
    assert rates == pytest.approx([0, 0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0])
    resumed = make()
    again = piecewise_linear(resumed, {4: 1.0, 8: 0.0})
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert resumed.param_groups[0]["lr"] == pytest.approx(1.0)
    resumed.step()
    again.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.5)
    assert torch.is_tensor(resumed.param_groups[0]["params"][0])


@pytest.mark.parametrize(
    ("points", "error", "match"),
    [
        ({}, ValueError, "at least one step"),
        ({-1: 1.0}, ValueError, "a step of points must be at least 0"),
        ({1.5: 1.0}, TypeError, "a step of points must be an int"),
        ({3: -1.0}, ValueError, r"points\[3\] must be in"),
    ],
)
def test_bad_points(points, error, match):
    with pytest.raises(error, match=match):
        piecewise_linear(make(), points)
