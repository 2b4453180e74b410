"""The factorization: three methods from one start, resume, and errors with known values."""

import pytest
import torch

from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.factorization import Factorization, Factors

TASK = Factorization(images=40)
METHODS = ["egu", "projected", "softplus"]


def fitted(steps=6, seed=0, **changes):
    chosen = {**TASK.fit_options, "rank": 4, "lr": 0.3, **changes}
    fit = TASK.start(seed=seed, steps=steps, options=chosen)
    return fit, chosen, [fit.step(i) for i in range(steps)]


def test_all_methods_start_alike_and_stay_nonnegative():
    products = []
    for method in METHODS:
        start, *_ = fitted(0, method=method)
        products.append(start.model().detach())
        fit, _, points = fitted(30, method=method)
        assert all((factor >= 0).all() for factor in fit.model.factors())
        assert points[-1]["train_loss"] < 0.9 * points[0]["train_loss"], method
    for product in products[1:]:
        torch.testing.assert_close(product, products[0])


@pytest.mark.parametrize("method", METHODS)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(method):
    whole, chosen, points = fitted(method=method)
    half = TASK.start(seed=0, steps=6, options=chosen)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest = TASK.start(seed=0, steps=6, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fitted(1, seed=1, method=method)[2] != points[:1]


def test_metrics_of_constructed_factors():
    fit, chosen, _ = fitted(0)
    with torch.no_grad():
        fit.model.left.zero_()
    nothing = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    assert nothing["relative_error@shown"] == nothing["relative_error@held_out"] == 1.0
    assert nothing["zeros"] == 0.0  # 0 is not below a thousandth of 0, and H is positive
    # Exact factors: W = X, H = 1.
    images, part = TASK._pixels(0)
    fit.model = Factors(images.clone(), torch.eye(64), softplus=False)
    exact = TASK.evaluate(fit, seed=0, split="validation", options=chosen)
    assert exact["relative_error@shown"] == exact["relative_error@held_out"] == 0.0
    zeros = int((images < 1e-3 * images.max()).sum()) + 64 * 63
    assert exact["zeros"] == pytest.approx(zeros / (images.numel() + 64 * 64))
    # Half of every pixel: the error is half, on every split.
    fit.model = Factors(images / 2, torch.eye(64), softplus=False)
    for split in ("validation", "test"):
        half = TASK.evaluate(fit, seed=0, split=split, options=chosen)
        assert half["relative_error@held_out"] == pytest.approx(0.5)
    counts = torch.bincount(part.flatten(), minlength=3) / part.numel()
    torch.testing.assert_close(counts, torch.tensor([0.8, 0.1, 0.1]), atol=0.03, rtol=0)


def test_loss_ignores_what_is_held_out():
    fit, _, points = fitted(1, lr=0.0)
    images, part = TASK._pixels(0)
    expected = ((images - fit.model().detach())[part == 0]).square().sum() / 80
    assert points[0]["train_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_unknown_method():
    with pytest.raises(TrialError, match="known: egu, projected, softplus"):
        fitted(1, method="multiplicative")


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("exponentiated_gradient", size="ci", store=store)
    for arm in outcome.arms:
        assert {"relative_error@shown", "relative_error@held_out", "zeros"} <= arm.metrics.keys()
