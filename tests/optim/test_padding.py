"""A padding row never moves, under any optimizer and any option, decay included."""

import math

import pytest
import torch
from torch import nn

from danlu.optim import (
    EGSGD,
    Amos,
    EGStepSize,
    ExponentiatedGradient,
    FoldedAdamW,
    HybridOptimizer,
    Lion,
    Tiger,
    UpdateNormalized,
    amos_strategy,
    parameter_groups,
)

ROW = 3
MAKERS = {
    "amos": lambda g: Amos(g, lr=0.1, scales=0.5, extra_l2=0.5),
    "amos_scalar": lambda g: Amos(g, lr=0.1, scales=0.5, extra_l2=0.5, reduce="scalar", momentum=0.9),
    "eg": lambda g: ExponentiatedGradient([{**o, "weight_decay": 0.0} for o in g], lr=0.1, mode="signed"),
    "eg_sgd": lambda g: EGSGD(g, lr=0.1, weight_decay=0.5),
    "folded_adamw": lambda g: FoldedAdamW(g, lr=0.1, weight_decay=0.5, grad_accum_steps=2),
    "hybrid": lambda g: HybridOptimizer(
        g,
        {
            "embedding": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5}),
            "default": (Lion, {"lr": 0.1, "weight_decay": 0.5}),
        },
    ),
    "lion": lambda g: Lion(g, lr=0.1, weight_decay=0.5),
    "lion_kahan": lambda g: Lion(g, lr=0.1, weight_decay=0.5, rounding="kahan"),
    "lion_lazy": lambda g: Lion(g, lr=0.1, weight_decay=0.5, lazy=("embedding",)),
    "lion_shrink": lambda g: Lion(g, lr=0.1, weight_decay=0.5, nonfinite="shrink"),
    "step_size_adam": lambda g: EGStepSize("adam", g, lr=0.1, weight_decay=0.5),
    "step_size_global": lambda g: EGStepSize("sgdm", g, lr=0.1, weight_decay=0.5, scale_scope="global"),
    "step_size_sgdm": lambda g: EGStepSize("sgdm", g, lr=0.1, weight_decay=0.5),
    "step_size_wrapped": lambda g: EGStepSize(torch.optim.AdamW(g, lr=0.1, weight_decay=0.5)),
    "tiger": lambda g: Tiger(g, lr=0.1, weight_decay=0.5),
    "update_normalized": lambda g: UpdateNormalized(torch.optim.Adam(g, lr=1.0, weight_decay=0.0), 0.1),
}
every = pytest.mark.parametrize("name", MAKERS)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4, padding_idx=ROW), nn.Linear(4, 6)).to(dtype)
    with torch.no_grad():
        # Rows of padding that are not zero come with pretrained models.
        net[0].weight[ROW] = 0.75
    return net


def train(net, optimizer, bad=None, steps=6):
    for step in range(steps):
        tokens = torch.randint(9, (12,), generator=torch.Generator().manual_seed(step))
        net(tokens).square().mean().backward()
        # A loss on the weights, or a tied output layer, gives the padding row a gradient as well.
        net[0].weight.grad += 0.1
        if step == bad:
            net[0].weight.grad[ROW, 0] = math.nan
        optimizer.step()
        optimizer.zero_grad()


def groups_of(net, name):
    return parameter_groups(net, weight_decay=0.0 if name == "update_normalized" or name.startswith("amos") else None)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, 3])
def test_the_row_stays(name, dtype, bad):
    net = model(dtype)
    start = net[0].weight.detach().clone()
    train(net, MAKERS[name](groups_of(net, name)), bad)
    moved = (net[0].weight.detach() != start).any(1)
    assert not moved[ROW]
    assert moved.sum() == 8


@every
def test_without_the_number_the_row_moves(name):
    net = model()
    groups = groups_of(net, name)
    for group in groups:
        group.pop("padding_idx", None)
    train(net, MAKERS[name](groups))
    assert not torch.equal(net[0].weight[ROW], torch.full((4,), 0.75))


@pytest.mark.parametrize("optimizer_cls", [Lion, Tiger, torch.optim.SGD])
def test_the_strategy_of_amos_keeps_the_row(optimizer_cls):
    net = model()
    optimizer, _ = amos_strategy(net, optimizer_cls, half_life=10, alpha0=0.1)
    train(net, optimizer)
    assert torch.equal(net[0].weight[ROW], torch.full((4,), 0.75))


def test_the_row_stays_when_a_step_fails():
    net = model()
    inner = torch.optim.SGD(groups_of(net, "update_normalized"), lr=1.0)
    optimizer = UpdateNormalized(inner, 0.1)

    def broken(closure=None):
        net[0].weight.data.add_(1)
        raise RuntimeError("broken")

    inner.step = broken
    with pytest.raises(RuntimeError, match="broken"):
        train(net, optimizer, steps=1)
    assert torch.equal(net[0].weight[ROW], torch.full((4,), 0.75))


@every
@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (-1, ValueError, "padding_idx must be at least 0, got -1"),
        (0.5, TypeError, "padding_idx must be an int"),
        (9, ValueError, r"padding_idx=9 is not a row of a parameter of shape \(9, 4\)"),
    ],
)
def test_bad_rows(name, row, error, match):
    groups = groups_of(model(), name)
    groups[0]["padding_idx"] = row
    with pytest.raises(error, match=match):
        MAKERS[name](groups)


def test_a_later_group_with_a_bad_row_is_not_kept():
    for name in ("lion", "step_size_wrapped", "update_normalized"):
        net = model()
        optimizer = MAKERS[name](groups_of(net, name))
        before = len(optimizer.param_groups)
        with pytest.raises(ValueError, match="padding_idx=5 is not a row"):
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))], "padding_idx": 5})
        assert len(optimizer.param_groups) == before
        assert sum(len(group["params"]) for group in getattr(optimizer, "inner", optimizer).param_groups) == 3
