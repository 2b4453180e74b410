"""Choosing pixels: masks, filters, the change to the second part, and fits that go on bit for bit."""

import pytest
import torch

from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.pixel_selection import PixelSelection, PixelSelector, _filter, _iterated
from danlu.lab.trial import find_trial
from danlu.simplex import soft_topk

TASK = PixelSelection()


@pytest.mark.parametrize("method", ["exp", "laplace", "sigmoid", "clip", "grad", "straight_through", "iter"])
def test_masks_have_the_sum(method):
    model = PixelSelector(method, 6, 0)
    with torch.no_grad():
        model.scores.normal_()
    assert float(model.mask(0.5).detach().sum()) == pytest.approx(6, abs=1e-4)
    assert model.hard_mask().sum() == 6


def test_the_iterated_mask_is_that_of_the_package():
    x = torch.randn(64)
    with pytest.warns(UserWarning, match="may exceed 1"):
        assert torch.allclose(_iterated(x, 4), soft_topk(x, 4, method="iter"))


def test_filters_rank_pixels():
    anova = _filter("anova", 0)
    assert anova.shape == (64,)
    # The upper left corner is white in every digit.
    assert anova[0] == 0
    assert _filter("mutual_information", 0)[0] < 0.1
    assert not torch.equal(_filter("random", 0), _filter("random", 1))


def test_an_unknown_method_is_refused():
    with pytest.raises(TrialError, match="unknown method 'soft'"):
        PixelSelector("soft", 6, 0)


def test_the_second_part_starts_anew_on_the_chosen_pixels():
    options = {**TASK.fit_options, "k": 3}
    fit = TASK.start(seed=0, steps=20, options=options)
    for step in range(12):
        fit.step(step)
    scores = fit.model.scores.detach().clone()
    fit.step(12)
    assert torch.equal(fit.model.scores, scores)
    assert any(bool((p != 0).any()) for p in fit.model.searched.parameters())
    fresh = PixelSelector("laplace", 3, 1)
    moved = (fit.model.network[0].weight - fresh.network[0].weight).abs().max()
    assert 0 < moved <= 0.0031


@pytest.mark.parametrize("method", ["laplace", "anova"])
def test_a_fit_goes_on_bit_for_bit(method):
    options = {**TASK.fit_options, "method": method}
    whole, first = (TASK.start(seed=1, steps=10, options=options) for _ in range(2))
    for step in range(10):
        whole.step(step)
    for step in range(4):
        first.step(step)
    second = TASK.start(seed=1, steps=10, options=options)
    second.load(first.state())
    for step in range(4, 10):
        second.step(step)
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    scores = TASK.evaluate(whole, seed=1, split="test", options=options)
    assert ("searched_accuracy" in scores) == (method == "laplace")
    assert 0 <= scores["chosen_overlap"] <= 1


def test_the_trial_compares_smooth_masks_with_every_simple_one():
    trial = find_trial("soft_topk")[1]
    assert trial.task == TASK
    simple = {"random", "anova", "mutual_information", "straight_through", "scaled_softmax"}
    assert simple | {"iter", "exp", "sigmoid", "laplace", "grad"} <= trial.arms.keys()
    assert {arm.options["k"] for arm in trial.arms.values()} == {6, 12}
    assert len({len(arm.grid) for arm in trial.arms.values()}) == 1
    found = {(one.candidate, one.baseline, one.metric) for one in trial.decides}
    assert {("laplace", name, "accuracy") for name in simple - {"random"}} <= found
    assert ("laplace_12", "scaled_softmax_12", "searched_accuracy") in found


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("soft_topk", size="ci", store=store)
    assert len(outcome.arms) == 14
    for arm in outcome.arms:
        learned = not arm.name.startswith(("random", "anova", "mutual_information"))
        assert ("searched_accuracy" in arm.metrics) == learned
        assert {"accuracy", "chosen_overlap"} <= arm.metrics.keys()
