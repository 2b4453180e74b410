"""One bad gradient, wherever and whenever: 300 clean steps later the run is where it would have been."""

import math
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from danlu.optim import (
    EGSGD,
    Amos,
    EGStepSize,
    ExponentiatedGradient,
    FoldedAdamW,
    Lion,
    Tiger,
    parameter_groups,
    piecewise_linear,
)
from danlu.optim._nonfinite import Counts, all_finite, event_counts, finite_flags, is_finite, raise_if_nonfinite

IMAGES, LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES = (IMAGES / 16).float()
WARM = 30
CLEAN = 300

OPTIMIZERS = {
    "Lion": (Lion, {"lr": 3e-3}),
    "Tiger": (Tiger, {"lr": 1e-2}),
    "Amos": (lambda groups, **options: Amos(groups, scales=0.2, momentum=0.9, **options), {"lr": 0.05}),
    "EGStepSize": (lambda groups, **options: EGStepSize("sgdm", groups, **options), {"lr": 0.03}),
    "EGSGD": (EGSGD, {"lr": 0.1}),
    "ExponentiatedGradient": (partial(ExponentiatedGradient, mode="signed", beta=0.2), {"lr": 0.3}),
    "FoldedAdamW": (FoldedAdamW, {"lr": 3e-3}),
    "Tiger (skip)": (Tiger, {"lr": 1e-2, "nonfinite": "skip"}),
    "Lion (shrink)": (Lion, {"lr": 3e-3, "nonfinite": "shrink"}),
}
WHERE = {
    "one coordinate": lambda grads, bad: grads[0].view(-1)[3].fill_(bad),
    "one tensor": lambda grads, bad: grads[0].fill_(bad),
    "all": lambda grads, bad: [grad.fill_(bad) for grad in grads],
}
_CLEAN_LOSS: dict[str, float] = {}


def final_loss(name, when=None, where=None, bad=math.nan):
    """Mean loss over all digits after a warm phase with the bad gradient and 300 clean steps."""
    cls, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = cls(parameter_groups(net), **options)
    scheduler = piecewise_linear(optimizer, {0: 1.0, WARM + CLEAN: 0.02})
    for step in range(WARM + CLEAN):
        rows = torch.randint(len(LABELS), (256,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(net(IMAGES[rows]), LABELS[rows]).backward()
        if step == when:
            WHERE[where]([p.grad for p in net.parameters()], bad)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(net(IMAGES), LABELS).item(), optimizer.nonfinite_events


# All 27 cases for the first two; the others share their look for bad gradients, so NaN stands for all values there.
CASES = [
    (name, bad, when, where)
    for name in OPTIMIZERS
    for bad in ((math.nan, math.inf, -math.inf) if name in ("Lion", "Tiger") else (math.nan,))
    for when in (0, WARM // 2, WARM - 1)
    for where in WHERE
]


@pytest.mark.parametrize(("name", "bad", "when", "where"), CASES)
def test_the_healthy_trajectory_comes_back(name, bad, when, where):
    if name not in _CLEAN_LOSS:
        _CLEAN_LOSS[name], events = final_loss(name)
        assert events == {}
    loss, events = final_loss(name, when, where, bad)
    assert loss <= _CLEAN_LOSS[name] * 1.05
    assert events == (
        dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 1) if where == "all" else {"0.weight": 1}
    )


def test_there_are_enough_cases():
    assert len(CASES) >= 36


def test_without_the_guard_the_run_is_lost():
    """So the test above can fail: the same gradient, not looked for."""
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    optimizer = Lion(net.parameters(), lr=0.01, nonfinite="off")
    for step in range(20):
        net(torch.ones(4)).sum().backward()
        if step == 5:
            net.weight.grad[0, 0] = math.nan
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[net.weight]["exp_avg"][0, 0].isnan()


def test_helpers():
    assert is_finite(torch.tensor([3e38, 3e38]))  # a sum that overflows
    assert not is_finite(torch.tensor([1.0, math.inf]))
    assert not is_finite(torch.tensor([complex(1, math.nan)]))
    assert is_finite(torch.full((3,), complex(3e38, 3e38)))
    assert finite_flags([torch.ones(2), torch.tensor([math.nan])]).tolist() == [True, False]
    assert not all_finite(torch.tensor([math.inf]))
    with pytest.raises(RuntimeError, match=r"parameters: a, .* and 2 more"):
        raise_if_nonfinite({name: torch.tensor([math.nan]) for name in "abcdefghijkl"})
    p, q, kept = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), {}
    counts = Counts(kept, [p, q])
    assert len(counts) == 2
    counts[1].add_(3)
    assert event_counts([{"params": [p, q]}], kept) == {"param_groups[0]['params'][1]": 3}
