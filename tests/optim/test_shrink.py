"""`nonfinite="shrink"` on every optimizer: a tensor with a bad gradient is pulled to its center, and nothing else."""

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
    Lion,
    Tiger,
    UpdateNormalized,
)

MAKERS = {
    "amos": lambda groups, **options: Amos(groups, lr=0.05, scales=0.5, momentum=0.9, **options),
    "eg": lambda groups, **options: ExponentiatedGradient(groups, lr=0.05, mode="signed", **options),
    "eg_sgd": lambda groups, **options: EGSGD(groups, lr=0.05, **options),
    "folded_adamw": lambda groups, **options: FoldedAdamW(groups, lr=0.05, **options),
    "lion": lambda groups, **options: Lion(groups, lr=0.05, **options),
    "lion_lazy": lambda groups, **options: Lion(groups, lr=0.05, lazy=True, **options),
    "step_size_adam": lambda groups, **options: EGStepSize("adam", groups, lr=0.05, **options),
    "step_size_global": lambda groups, **options: EGStepSize("adam", groups, lr=0.05, scale_scope="global", **options),
    "step_size_sgdm": lambda groups, **options: EGStepSize("sgdm", groups, lr=0.05, **options),
    "step_size_wrapped": lambda groups, **options: EGStepSize(torch.optim.AdamW(groups, lr=0.05), **options),
    "tiger": lambda groups, **options: Tiger(groups, lr=0.05, **options),
    "update_normalized": lambda groups, **options: UpdateNormalized(torch.optim.SGD(groups, lr=1.0), 0.1, **options),
}
every = pytest.mark.parametrize("name", MAKERS)


def two(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.rand(3, 4, generator=generator) + 0.5).to(dtype)) for _ in range(2)]


def give_gradients(params, step):
    for i, param in enumerate(params):
        param.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + i)).to(param.dtype)


def run(name, params, steps, bad=None, **options):
    groups = [{"params": [params[0]], "kind": "matrix", "center": 0.25}, {"params": [params[1]], "kind": "matrix"}]
    optimizer = MAKERS[name](groups, **options)
    for step in range(steps):
        give_gradients(params, step)
        if step == bad:
            params[0].grad[1, 2] = math.nan
        optimizer.step()
    return optimizer


def entries(optimizer, param):
    return {key: value.clone() for key, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("foreach", [None, False])
def test_only_the_bad_tensor_is_pulled_to_its_center(name, bad, foreach):
    options = {} if name in ("step_size_wrapped", "update_normalized") else {"foreach": foreach}
    params = two()
    optimizer = run(name, params, 3, nonfinite="shrink", shrink=0.5, **options)
    others = two()
    skipping = run(name, others, 3, nonfinite="skip", **options)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    give_gradients(params, 3)
    params[0].grad[1, 2] = bad
    give_gradients(others, 3)
    others[0].grad[1, 2] = bad
    start, state = params[0].detach().clone(), entries(optimizer, params[0])
    gradient = params[0].grad.clone()
    optimizer.step()
    skipping.step()
    assert torch.allclose(params[0].detach(), 0.25 + (start - 0.25) * 0.5, rtol=1e-15, atol=0)
    assert torch.equal(params[0].grad.isfinite(), gradient.isfinite())
    assert torch.equal(params[1], others[1])
    assert sum(optimizer.nonfinite_events.values()) == sum(skipping.nonfinite_events.values()) == 1
    kept = entries(optimizer, params[0])
    # One scale for all tensors goes on with the others.
    assert all(torch.equal(kept[key], state[key]) for key in state if (name, key) != ("step_size_global", "log_scale"))


@every
def test_a_factor_of_one_is_a_skip(name):
    first, second = two(), two()
    run(name, first, 6, bad=3, nonfinite="shrink", shrink=1.0)
    run(name, second, 6, bad=3, nonfinite="skip")
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-15, atol=1e-16)


@every
def test_good_gradients_shrink_nothing(name):
    first, second = two(), two()
    run(name, first, 6, nonfinite="shrink", shrink=0.5)
    run(name, second, 6, nonfinite="skip")
    # The compiled step of Lion is prepared on addresses in one run and not in the other.
    assert all(torch.allclose(a, b, rtol=1e-15, atol=1e-16) for a, b in zip(first, second, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_low_precision(name, dtype, rounding):
    if name in ("step_size_wrapped", "update_normalized") and rounding != "nearest":
        pytest.skip("it rounds to nearest only")
    options = {} if name in ("step_size_wrapped", "update_normalized") else {"rounding": rounding}
    params = two(dtype)
    optimizer = run(name, params, 3, nonfinite="shrink", shrink=0.75, **options)
    start = params[0].detach().float().clone()
    give_gradients(params, 3)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    expected = 0.25 + (start - 0.25) * 0.75
    # One unit in the last place, of which Kahan's compensation may carry half.
    assert (params[0].float() - expected).abs().max() <= 2 * torch.finfo(dtype).eps


def test_the_default_center_is_zero_and_the_default_factor_is_that_of_tiger():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([param], nonfinite="shrink")
    param.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert torch.allclose(param.detach(), torch.tensor([0.99, -1.98]))
    assert optimizer.nonfinite_events == {"param_groups[0]['params'][0]": 1}


def test_distributions_shrink_towards_the_uniform_one():
    start = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    param = nn.Parameter(start.clone())
    optimizer = ExponentiatedGradient([param], lr=0.1, mode="simplex", nonfinite="shrink", shrink=0.5)
    param.grad = torch.full_like(param, math.inf)
    optimizer.step()
    assert torch.allclose(param.detach(), (start + 1 / 3) / 2)
    assert torch.allclose(param.detach().sum(-1), torch.ones(2))


def test_nothing_falls_below_the_floor():
    param = nn.Parameter(torch.tensor([0.5, 0.011]))
    optimizer = ExponentiatedGradient([param], lr=0.1, floor=0.01, nonfinite="shrink", shrink=0.5)
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert torch.allclose(param.detach(), torch.tensor([0.25, 0.01]))


def test_in_the_middle_of_a_cycle_it_shrinks_at_once():
    param = nn.Parameter(torch.ones(2))
    optimizer = FoldedAdamW([param], lr=0.1, grad_accum_steps=2, nonfinite="shrink", shrink=0.5)
    param.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((2,), 0.5))


def test_amos_shrinks_where_the_squares_overflow():
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = Amos([param], lr=0.1, scales=1.0, nonfinite="shrink", shrink=0.5)
    param.grad = torch.full((2, 2), 1e30)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((2, 2), 0.5))


def test_an_error_shrinks_nothing():
    param = nn.Parameter(torch.ones(2))
    optimizer = Lion([param], nonfinite="shrink")
    param.grad = torch.full((2,), math.nan)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be in"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))
    assert optimizer.nonfinite_events == {}


@every
@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, math.nan])
def test_bad_factors(name, value):
    with pytest.raises(ValueError, match="shrink must be"):
        run(name, two(), 0, nonfinite="shrink", shrink=value)


def test_bad_center():
    with pytest.raises(TypeError, match="center must be"):
        Lion([{"params": two(), "center": "mean"}])
