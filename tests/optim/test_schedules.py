"""The schedules: golden numbers, checkpoints, errors."""

import pickle

import pytest
import torch
from torch import nn

from danlu.optim import Tiger, inverse_square, inverse_time, piecewise_linear

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


INVERSE = [
    (inverse_time, lambda t, half: 1 / (1 + t / half)),
    (inverse_square, lambda t, half: (1 + (2**0.5 - 1) * t / half) ** -2),
]


@pytest.mark.parametrize(("schedule", "formula"), INVERSE)
@pytest.mark.parametrize("half_life", [1, 250, 12.5])
def test_inverse_decays(schedule, formula, half_life):
    factor = schedule(make(), half_life).lr_lambdas[0]
    assert factor(0) == 1.0
    assert factor(half_life) == pytest.approx(0.5, rel=1e-15)
    for step in (1, 7, 100, 10**6):
        assert factor(step) == pytest.approx(formula(step, half_life), rel=1e-14)


@pytest.mark.parametrize(("schedule", "formula"), INVERSE)
def test_warmup_of_inverse_decays(schedule, formula):
    factor = schedule(make(), 100, warmup=10).lr_lambdas[0]
    assert factor(0) == pytest.approx(0.1)
    assert factor(4) == pytest.approx(0.5 * formula(4, 100))
    assert factor(9) == pytest.approx(formula(9, 100))
    assert factor(100) == pytest.approx(0.5)


@pytest.mark.parametrize(("schedule", "_formula"), INVERSE)
def test_inverse_decays_set_the_rate_and_survive_a_checkpoint(schedule, _formula):
    optimizer = make()
    scheduler = schedule(optimizer, 4, warmup=2)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    saved = pickle.loads(pickle.dumps(scheduler.state_dict()))
    again = schedule(make(), 9.0)
    again.load_state_dict(saved)
    assert again.lr_lambdas[0](4) == pytest.approx(0.5)
    assert pickle.loads(pickle.dumps(scheduler.lr_lambdas[0]))(4) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [inverse_time, inverse_square])
@pytest.mark.parametrize(
    ("half_life", "options", "error", "match"),
    [
        (0, {}, ValueError, r"half_life must be in \(0, inf\)"),
        (-1.0, {}, ValueError, "half_life must be in"),
        ("long", {}, TypeError, "half_life must be a real number"),
        (10, {"warmup": -1}, ValueError, "warmup must be at least 0"),
        (10, {"warmup": 1.5}, TypeError, "warmup must be an int"),
    ],
)
def test_bad_inverse_decays(schedule, half_life, options, error, match):
    with pytest.raises(error, match=match):
        schedule(make(), half_life, **options)


def worst_error(schedule, alpha_p, next_error):
    """Largest relative distance of sqrt(D(t)) from the error by the difference equation, over 20000 steps."""
    half_life = 1 / (2 * alpha_p) if schedule is inverse_time else (2**0.5 - 1) / alpha_p
    closed = schedule(make(), half_life).lr_lambdas[0]
    error, worst = 1.0, 0.0
    for step in range(20_000):
        worst = max(worst, abs(closed(step) ** 0.5 / error - 1))
        error = next_error(error, alpha_p)
    return worst


@pytest.mark.parametrize(
    ("schedule", "next_error", "expected"),
    [
        # The squared error falls by 2 alpha u.e, which is 2 alpha_p times its power 4 (p falls with it) or 3.
        (inverse_time, lambda e, a: (e**2 - 2 * a * e**4) ** 0.5, 0.37),
        (inverse_square, lambda e, a: (e**2 - 2 * a * e**3) ** 0.5, 0.55),
        # The same to first order in the error itself.
        (inverse_square, lambda e, a: e - a * e**2, 0.37),
    ],
)
@pytest.mark.parametrize("alpha_p", [1e-4, 1e-3, 1e-2])
def test_closed_forms_track_the_difference_equations(schedule, next_error, expected, alpha_p):
    assert worst_error(schedule, alpha_p, next_error) == pytest.approx(expected * alpha_p, rel=0.03)
