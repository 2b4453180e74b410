"""The families of trainings behind the scaling-law trials: exact resume, and metrics of known value."""

import math

import pytest
import torch
from torch import nn

from danlu.diagnostics import MultitaskSparseParity
from danlu.lab.errors import TrialError
from danlu.lab.tasks.family import FamilyFit, Member, record_steps
from danlu.lab.tasks.sparse_parity import (
    ParityNet,
    SparseParityScaling,
    SparseParitySteps,
    _data_set,
    _learning_law,
    _line,
    _slope,
)
from danlu.lab.tasks.text_scaling import TextScaling
from danlu.lab.trial import find_trial

TINY = {"tasks": 6, "bits": 8, "batch_size": 32, "samples_per_task": 8, "records": 5}
CASES = {
    "steps": (SparseParitySteps(), {**TINY, "width": 16}),
    "scaling": (SparseParityScaling(widths=(2, 4, 6, 8), samples=(20, 40, 60, 80)), TINY),
    "text": (TextScaling(widths=(4, 8, 12, 16, 20)), {"context": 8, "batch_size": 2, "layers": 1, "windows": 4}),
}


def options(task, **changes):
    return {**task.fit_options, **task.evaluate_options, **changes}


def train(fit, start, stop):
    return [fit.step(i) for i in range(start, stop)]


@pytest.mark.parametrize("case", CASES)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(case):
    task, changes = CASES[case]
    chosen = options(task, **changes)
    whole = task.start(seed=0, steps=6, options=chosen)
    points = train(whole, 0, 6)
    half = task.start(seed=0, steps=6, options=chosen)
    assert train(half, 0, 3) == points[:3]
    rest = task.start(seed=0, steps=6, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert train(rest, 3, 6) == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
    found = [task.evaluate(fit, seed=0, split="test", options=chosen) for fit in (whole, rest)]
    assert found[0] == found[1]
    assert all(math.isfinite(value) for value in found[0].values())
    assert train(task.start(seed=1, steps=6, options=chosen), 0, 1) != points[:1]
    assert sum(tensor.numel() for tensor in whole.optimizer_state()) == 2 * sum(
        p.numel() for p in whole.model.parameters()
    )


@pytest.mark.parametrize("case", CASES)
def test_unknown_law_is_refused(case):
    task, changes = CASES[case]
    chosen = options(task, **changes, law="guess")
    fit = task.start(seed=0, steps=2, options=chosen)
    train(fit, 0, 2)
    with pytest.raises(TrialError, match="unknown law 'guess'; known: "):
        task.evaluate(fit, seed=0, split="test", options=chosen)


def test_record_steps():
    assert record_steps(1000, 4) == [1, 10, 100, 1000]
    assert record_steps(1000, 3, first=10) == [10, 100, 1000]
    assert record_steps(3, 40) == [1, 2, 3]


def test_line_and_learning_law_by_hand():
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    assert _line(x, 5 * x**0.7) == pytest.approx((5.0, 0.7))
    y = torch.tensor([9.0, 9.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    steps = 2.0 ** torch.arange(6, dtype=torch.float64)
    assert _slope(steps, y, 4.0) == pytest.approx(1.0)
    p = MultitaskSparseParity(30, 12, 2, 0.6).probabilities
    times = 3 * p.pow(-0.8)
    assert _learning_law(p, times) == pytest.approx((3.0, 0.8))
    # Tasks after the first that is not learned do not count, and three are too few.
    times[10], times[11] = math.inf, 1.0
    assert _learning_law(p, times) == pytest.approx((3.0, 0.8))
    times[3] = math.inf
    scale, q = _learning_law(p, times)
    assert q == 1.0
    assert scale == pytest.approx(float(times[0] * p[0]))


def steps_fit(task, chosen, q):
    """A fit whose records are those of tasks that are learned at 100 p^-q, each at once; none has all of them."""
    frequencies = [_data_set(chosen, gamma, 0).probabilities for gamma in task.gammas]
    members = [Member(nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: None)] * 3
    fit = FamilyFit(members, records=record_steps(30_000, 400, first=10), record=lambda model, i: torch.empty(0))
    fit._kept = [[math.log(2) * (100 * p.pow(-q) > step).double() for p in frequencies] for step in fit.records]
    return fit


@pytest.mark.parametrize("q", [1.0, 0.7])
def test_metrics_of_a_staircase_that_is_known(q):
    task = SparseParitySteps()
    chosen = options(task, tasks=400, bits=32)
    fit = steps_fit(task, chosen, q)
    found = {
        law: task.evaluate(fit, seed=0, split="test", options={**chosen, "law": law})
        for law in ("measured", "quanta", "quanta_q", "staircase", "same_for_all")
    }
    for gamma in (0.3, 0.6, 1.0):
        key = f"{gamma:g}"
        assert found["quanta"][f"exponent@{key}"] == pytest.approx(gamma / (gamma + 1))
        assert found["measured"][f"q@{key}"] == pytest.approx(q, rel=0.03)
        assert found["quanta_q"][f"exponent@{key}"] == pytest.approx(gamma / (q * (gamma + 1)), rel=0.03)
        # The law that knows the number of tasks and the end of the run is right; the measured slope is its.
        assert found["staircase"][f"relative_error@{key}"] < 0.05
        assert found["measured"][f"relative_error@{key}"] == 0.0
    assert found["same_for_all"]["smallest_increase"] == 0.0
    slopes = [found["measured"][f"exponent@{key}"] for key in ("0.3", "0.6", "1")]
    rises = [slopes[1] - slopes[0], slopes[2] - slopes[1]]
    assert found["measured"]["smallest_increase"] == pytest.approx(min(rises))
    if q == 0.7:
        assert found["quanta"]["relative_error"] > 2 * found["quanta_q"]["relative_error"]


def test_scaling_metrics_of_known_losses():
    task = SparseParityScaling()
    chosen = options(task)
    widths, samples = task._sizes(chosen)
    members = [
        Member(ParityNet(200, 32, width), torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: None)
        for width in (*widths, *(256 for _ in samples))
    ]
    fit = FamilyFit(members, records=(1, 2, 3), record=lambda model, i: torch.empty(0))
    params = [sum(p.numel() for p in member.model.parameters()) for member in members[:7]]
    losses = [0.1 + 5 * n**-0.5 for n in params] + [0.1 + 2 * d ** (-1 / 3) for d in samples]
    # The step is chosen by the first column, the loss is the second: not the lowest of the second.
    fit._kept = [
        [torch.tensor([c, scale * loss], dtype=torch.float64) for loss in losses]
        for c, scale in ((0.3, 2.0), (0.1, 1.0), (0.2, 0.5))
    ]
    found = {
        law: task.evaluate(fit, seed=0, split="test", options={**chosen, "law": law})
        for law in ("measured", "quanta", "equal")
    }
    assert found["measured"]["alpha_params"] == pytest.approx(0.5, abs=1e-6)
    assert found["measured"]["alpha_data"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["quanta"]["error"] == pytest.approx(0.0, abs=1e-6)
    assert found["equal"]["error"] == pytest.approx(0.5 - 1 / 3, abs=1e-6)
    assert found["measured"]["consistent"] == found["measured"]["excludes_equality"] == 1.0
    assert found["measured"]["loss@samples_8000"] == pytest.approx(0.2)


def test_text_scaling_reads_losses_as_it_says(monkeypatch):
    task = TextScaling()
    chosen = options(task, context=8, windows=2)
    fit = task.start(seed=0, steps=1, options=chosen)
    params = {id(m.model): sum(p.numel() for p in m.model.parameters()) for m in fit.members}
    monkeypatch.setattr(
        "danlu.lab.tasks.text_scaling._bits", lambda model, split, options: 1.5 + 40 * params[id(model)] ** -0.4
    )
    found = {
        law: task.evaluate(fit, seed=0, split="test", options={**chosen, "law": law})
        for law in ("measured", "power_law", "power_law_with_floor")
    }
    floor = found["power_law_with_floor"]
    assert floor["exponent"] == pytest.approx(0.4, abs=1e-6)
    assert floor["floor"] == pytest.approx(1.5, abs=1e-6)
    assert floor["exponent_half_width"] < 1e-6
    assert floor["extrapolation_error"] < 1e-6
    assert found["power_law"]["exponent"] < 0.3
    assert found["power_law"]["extrapolation_error"] > 0.005
    assert found["measured"]["exponent_half_width"] == found["measured"]["extrapolation_error"] == 0.0


def test_untrained_text_models_know_nothing():
    task = TextScaling()
    chosen = options(task, context=16, windows=8)
    fit = task.start(seed=0, steps=1, options=chosen)
    found = task.evaluate(fit, seed=0, split="validation", options=chosen)
    sizes = [found[f"bits_per_byte@width_{width}"] for width in task.widths]
    assert all(7.5 < bits < 9.5 for bits in sizes)
    assert found["test_loss"] == pytest.approx(sum(sizes) / 7)


def test_trials_claim_nothing_of_an_exponent_that_is_not_determined():
    _, trial = find_trial("diagnostics/power_law")
    part = next(part for part in trial.decides if part.metric == "exponent_half_width")
    assert (part.candidate, part.baseline, part.margin) == ("power_law_with_floor", "measured", 0.3)
