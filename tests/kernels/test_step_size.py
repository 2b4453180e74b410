"""The compiled step of EGStepSize equals the plain one: sizes, layouts, dtypes, options, threads, bad gradients."""

import copy
import math

import pytest
import torch
from torch import nn

from danlu import kernels
from danlu.kernels.step_size import dtypes_supported
from danlu.optim import EGStepSize

pytestmark = pytest.mark.skipif(
    kernels.explain("step_size", torch.zeros(1)) is not None, reason="no compiler, no compiled step"
)

TENSORS = {
    "scalar": torch.randn(()),
    "empty": torch.randn(0),
    "one": torch.randn(1),
    "odd": torch.randn(1023),
    "matrix": torch.randn(33, 65),
    "transposed": torch.randn(65, 33).t(),
    "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "pieces": torch.randn(2**16 + 3, 3),
}
OPTIONS = [
    {},
    {"scale_lr": 0.3},
    {"gain_lr": 0.3, "momentum_beta": 0.3},
    {"sign_gain": False, "gain_lr": 0.1},
    {"normalize_scale": False, "scale_lr": 1e-3},
    {"scale_scope": "global", "scale_lr": 0.3},
    {"per_coordinate": False, "scale_lr": 0.3},
    {"scale_lr": 0.0},
    {"weight_decay": 0.3, "maximize": True},
    {"nonfinite": "off"},
    {"gain_lr": 0.7, "gain_range": (0.0, math.inf), "scale_lr": 2.0, "scale_range": (0.5, 2.0)},
]


def stepped(dtype, options, steps=4, bad=None, **path):
    torch.manual_seed(0)
    params = [nn.Parameter(tensor.to(dtype, copy=True)) for tensor in TENSORS.values()]
    optimizer = EGStepSize("sgdm", params, lr=0.05, **options, **path)
    for step in range(steps):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + i)
            grad = torch.empty_like(p).normal_(generator=generator)
            # Of the layout of the parameter, and with elements that are exactly 0.
            p.grad = torch.where(grad.abs() < 0.1, torch.zeros_like(grad), grad)
            if bad == (step, i):
                p.grad.flatten()[-1:].fill_(math.nan)
                p.grad[-1, 0] = math.inf
        optimizer.step()
    return params, optimizer


def compare(first, second, dtype):
    rtol, atol = (1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)
    for a, b in zip(first[0], second[0], strict=True):
        low = dtype in (torch.bfloat16, torch.float16)
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps if low else rtol, atol=1e-3 if low else atol)
        for name, value in first[1].state[a].items():
            torch.testing.assert_close(value, second[1].state[b][name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_loop(options, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            compare(stepped(dtype, options, fused=True), stepped(dtype, options, fused=False, foreach=False), dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_state(dtype):
    """One step, before a rounding that differs in the last place can turn the sign of anything."""
    options = {"rounding": "nearest"}
    fast, slow = stepped(dtype, options, 1, fused=True), stepped(dtype, options, 1, fused=False, foreach=False)
    compare(fast, slow, dtype)
    assert all(value.dtype == torch.float32 for state in fast[1].state.values() for value in state.values())
    assert dtypes_supported(dtype, torch.float32)
    assert not dtypes_supported(dtype, dtype)


@pytest.mark.parametrize("options", [{}, {"scale_lr": 0.0}, {"scale_scope": "global"}], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_gradients_skip_their_tensor_alone(options, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = stepped(torch.float64, options, bad=(2, 4), fused=True)
        slow = stepped(torch.float64, options, bad=(2, 4), fused=False, foreach=False)
    finally:
        torch.set_num_threads(before)
    compare(fast, slow, torch.float64)
    assert fast[1].nonfinite_events == slow[1].nonfinite_events == {"param_groups[0]['params'][4]": 1}
    assert fast[1].state[fast[0][4]]["step"].item() == 3


def test_exponential_is_good_to_two_units_in_the_last_place():
    """Read back from one step: with a buffer of 0 and a gradient of 1 the momentum is the gain."""
    for dtype, limit in ((torch.float32, 80.0), (torch.float64, 80.0)):
        logs = torch.cat([torch.linspace(-limit, limit, 4001, dtype=dtype), torch.zeros(1, dtype=dtype)])
        p = nn.Parameter(torch.zeros(len(logs), dtype=dtype))
        optimizer = EGStepSize("sgdm", [p], lr=1.0, fused=True, gain_range=(0.0, math.inf))
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = optimizer.state[p]
        state["log_gain"].copy_(logs)
        state["momentum_buffer"].zero_()
        state["exp_avg"].zero_()
        optimizer.step()
        exact = logs.double().exp()
        # float64's own reference is exact to half a unit only.
        error = ((state["momentum_buffer"].double() - exact) / exact).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps
        assert state["momentum_buffer"][-1] == 1.0


def test_fused_true_says_why_it_cannot():
    p = nn.Parameter(torch.randn(6, 10)[:, ::2])
    optimizer = EGStepSize("sgdm", [p], fused=True)
    p.grad = torch.ones(6, 5)
    with pytest.raises(RuntimeError, match="fused=True, but"):
        optimizer.step()


def test_other_layouts_and_missing_gradients_take_another_path():
    params = [nn.Parameter(torch.randn(6, 10)[:, ::2]), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3))]
    twins = copy.deepcopy(params)
    first, second = EGStepSize("sgdm", params), EGStepSize("sgdm", twins, foreach=False)
    for step in range(3):
        for a, b in zip(params[:2], twins[:2], strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autograd_sees_that_parameters_changed():
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    EGStepSize("sgdm", [p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
