"""The arms of the trial of Amos: what they build, their schedules, exact resume."""

import pytest
import torch

from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.tasks.optimizers import make_optimizer, set_learning_rate
from danlu.lab.trial import find_trial
from danlu.optim import Amos, Lion

SMALL = {"context": 16, "batch_size": 4, "width": 16, "layers": 1, "heads": 2, "windows": 4}
ARMS = ("amos", "amos_momentum", "lion_derived")


def options(**changes):
    task = ByteLM()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


def rates(name, lr, steps=100):
    chosen = {"optimizer": name, "lr": lr, "weight_decay": 0.0, "warmup": 0.1}
    optimizer = make_optimizer(torch.nn.Linear(4, 3), chosen)
    found = []
    for step in range(steps):
        set_learning_rate(optimizer, chosen, step, steps)
        found.append([group["lr"] for group in optimizer.param_groups])
    return optimizer, found


def test_amos_has_no_schedule_but_the_warmup():
    for name, momentum in (("amos", 0.0), ("amos_momentum", 0.9)):
        optimizer, found = rates(name, 0.5)
        assert isinstance(optimizer, Amos)
        assert {group["momentum"] for group in optimizer.param_groups} == {momentum}
        assert found[0][0] == pytest.approx(0.05)
        assert found[4][0] == pytest.approx(0.25)
        assert {rate for step in found[9:] for rate in step} == {0.5}


def test_derived_lion_has_rates_by_tensor_and_inverse_time():
    optimizer, found = rates("lion_derived", 0.5)
    assert isinstance(optimizer, Lion)
    sigmas = [group["sigma"] for group in optimizer.param_groups]
    assert 0.5 in sigmas
    assert len(sigmas) == 2
    for group, sigma in enumerate(sigmas):
        assert found[0][group] == pytest.approx(0.1 * 0.5 * sigma)
        assert found[50][group] == pytest.approx(0.5 * 0.5 * sigma)
        assert optimizer.param_groups[group]["weight_decay"] == pytest.approx(0.5 / (2 * sigma))


@pytest.mark.parametrize("name", ARMS)
def test_resume_is_exact(name):
    task, chosen = ByteLM(), options(optimizer=name, lr=0.02)

    def start():
        return task.start(seed=0, steps=6, options=chosen)

    whole, half, rest = start(), start(), start()
    points = [whole.step(i) for i in range(6)]
    for i in range(3):
        assert half.step(i) == points[i]
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for (key, first), second in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), key


def test_state_is_what_the_claim_says():
    found = {}
    for name in ("adamw", *ARMS):
        task, chosen = ByteLM(), options(optimizer=name, lr=0.01, width=32)
        fit = task.start(seed=0, steps=1, options=chosen)
        fit.step(0)
        metrics = task.evaluate(fit, seed=0, split="validation", options=chosen)
        found[name] = metrics["optimizer_bytes_per_parameter"]
    assert found["adamw"] == 8.0
    assert found["lion_derived"] == 4.0
    # Two float32 numbers per row of a matrix.
    rows, count = 256 + 3 * 32 + 32 + 4 * 32 + 32 + 256, sum(p.numel() for p in fit.model.parameters())
    assert found["amos"] == pytest.approx(8 * rows / count)
    assert found["amos_momentum"] == pytest.approx(4 + 8 * rows / count)


def test_arms_are_tuned_alike():
    _, trial = find_trial("optim/amos")
    assert {len(trial.tuning_fits(arm, size)) for arm in trial.arms for size in ("demo", "report")} == {4}
    for arm in ARMS:
        grid = [point["lr"] for point in trial.arms[arm].grid]
        assert grid == sorted(grid)
        assert len(grid) == 4
