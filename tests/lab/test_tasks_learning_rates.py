"""The sweep over learning rates: networks that learn as if alone, the shift, and metrics with known values."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.learning_rates import LearningRates, sweep_metrics
from danlu.lab.tasks.training import generator

TASK = LearningRates(rates=(0.001, 0.1))


def fitted(task=TASK, steps=4, seed=0, **changes):
    chosen = {**task.fit_options, "width": 16, **changes}
    fit = task.start(seed=seed, steps=steps, options=chosen)
    return fit, chosen, [fit.step(i) for i in range(steps)]


@pytest.mark.parametrize("optimizer", ["sgdm", "eg_sgdm", "adam", "eg_adam"])
def test_networks_learn_as_if_each_were_alone(optimizer):
    together, *_ = fitted(optimizer=optimizer)
    for i, rate in enumerate(TASK.rates):
        alone, *_ = fitted(LearningRates(rates=(rate,)), optimizer=optimizer)
        for a, b in zip(together.model.networks[i].parameters(), alone.model.networks[0].parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["sgdm", "eg_sgdm", "eg_adam"])
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(optimizer):
    whole, chosen, points = fitted(steps=6, optimizer=optimizer, shift=True)
    half = TASK.start(seed=0, steps=6, options=chosen)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest = TASK.start(seed=0, steps=6, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fitted(steps=1, seed=1, optimizer=optimizer)[2] != points[:1]


def test_shift_permutes_pixels_in_the_second_half_and_in_the_evaluation():
    still, chosen, points = fitted(steps=4)
    moved, shifted, changed = fitted(steps=4, shift=True)
    assert changed[:2] == points[:2]
    assert changed[2:] != points[2:]
    order = torch.randperm(64, generator=generator("pixels", 0))
    for network in moved.model.networks:
        # The same network, told of the permutation beforehand.
        network[0].weight.data = still.model.networks[0][0].weight.data[:, order]
        network[0].bias.data = still.model.networks[0][0].bias.data
        for layer in (2, 4):
            network[layer].load_state_dict(still.model.networks[0][layer].state_dict())
    plain = TASK.evaluate(still, seed=0, split="test", options=chosen)
    permuted = TASK.evaluate(moved, seed=0, split="test", options=shifted)
    assert permuted["train_loss@0.001"] == pytest.approx(plain["train_loss@0.001"], rel=1e-5)


def test_loss_by_hand():
    """At rates of 0 the sum of the losses is twice that of one network."""
    task = LearningRates(rates=(0.0, 0.0))
    fit, chosen, points = fitted(task, steps=1)
    from danlu.lab.data import digits

    data = digits(seed=0, train=task.train, validation=task.validation)
    rows = torch.randint(task.train, (64,), generator=generator("batch", 0, 0))
    images, labels = torch.from_numpy(data.train_inputs)[rows], torch.from_numpy(data.train_targets)[rows]
    with torch.no_grad():
        loss = F.cross_entropy(fit.model.networks[0](images), labels)
    assert points[0]["train_loss"] == pytest.approx(2 * float(loss), rel=1e-6)
    metrics = task.evaluate(fit, seed=0, split="test", options=chosen)
    assert 2.0 < metrics["train_loss@0"] < 2.6


def test_metrics_of_a_constructed_sweep():
    rates = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    found = sweep_metrics(
        rates, [0.2, 0.9, 0.95, 0.97, 0.1], [0.1, 0.9, 0.99, 0.98, 0.2], [2.0, 1.0, 0.3, 0.1, math.nan]
    )
    assert found["accuracy@low"] == pytest.approx((0.2 + 0.9 + 0.95) / 3)
    assert found["train_loss@low"] == pytest.approx(1.1)
    assert found["train_loss@1"] == pytest.approx(math.log(10))
    # Chosen by validation, judged on the split.
    assert (found["accuracy@best"], found["rate@best"]) == (0.95, 1e-2)
    assert found["usable_decades"] == pytest.approx(2.0)
    assert sweep_metrics(rates, [0.1] * 5, [0.1] * 5, [2.0] * 5)["usable_decades"] == 0.0


def test_cosine_decays_every_rate_to_zero():
    fit, *_ = fitted(steps=8, schedule="cosine")
    rates = [group["lr"] for group in fit.optimizer.param_groups]
    assert rates == pytest.approx([rate * 0.5 * (1 + math.cos(math.pi * 7 / 8)) for rate in TASK.rates])


@pytest.mark.parametrize("changes", [{"optimizer": "lion"}, {"schedule": "linear"}])
def test_unknown_choice(changes):
    with pytest.raises(TrialError, match="known: "):
        fitted(**changes)


@pytest.mark.trial
@pytest.mark.parametrize("name", ["step_size", "step_size_shift"])
def test_trials_run_at_ci_size(tmp_path, name):
    with Store(tmp_path) as store:
        outcome = run_trial(name, size="ci", store=store)
    for arm in outcome.arms:
        assert {"accuracy@low", "accuracy@best", "usable_decades", "accuracy@0.0001"} <= arm.metrics.keys()
