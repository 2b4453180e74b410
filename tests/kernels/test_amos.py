"""The compiled step of Amos equals the reference, on odd sizes, layouts, dtypes, roundings and threads."""

import math

import pytest
import torch

from danlu.kernels.amos import dtypes_supported
from danlu.optim import Rounding, amos

LAYOUTS = {
    "one": lambda: torch.randn(1),
    "odd": lambda: torch.randn(63),
    "beyond a block of sums": lambda: torch.randn(5003),
    "matrix": lambda: torch.randn(33, 65),
    "column": lambda: torch.randn(100, 1),
    "beyond a piece": lambda: torch.randn(300, 301),
    "scalar": lambda: torch.randn(()),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the update's arithmetic; a low-precision result may differ by one unit in the last place where float32 ties.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"clip_value": 0.5, "extra_l2": 0.01},
    {"momentum": 0.9, "clip_value": 0.5, "maximize": True},
    {"beta": 0.0, "nonfinite": "off"},
]


def keep(tensor):
    return tensor.clone(memory_format=torch.preserve_format)


def run(layout, dtype, *, steps=4, reduce="auto", rounding="nearest", bad=None, **options):
    """Parameter, v, b, mu and compensation after some steps on two tensors, the second of which may be spoilt."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = [LAYOUTS[layout]().to(dtype) for _ in range(2)]
    shape = (params[0].shape[0], *[1] * (params[0].ndim - 1)) if reduce == "auto" and params[0].ndim > 1 else ()
    v, b = ([torch.zeros(shape, dtype=wide) for _ in params] for _ in range(2))
    t = [torch.zeros(()) for _ in params]
    mu = [torch.zeros_like(p, dtype=wide) for p in params] if options.get("momentum") else None
    lacking = [torch.zeros_like(p) for p in params]
    counts = [torch.zeros((), dtype=torch.int64) for _ in params]
    for step in range(steps):
        grads = [keep(LAYOUTS[layout]()).to(dtype) for _ in params]
        if bad is not None and step == 2:
            grads[1].view(-1)[grads[1].numel() // 2] = bad
        how = Rounding(rounding, seed=3, step=step, compensations=lacking if rounding == "kahan" else ())
        amos(
            params, grads, v, b, t, mu, scales=[0.5, 0.2], lr=0.1, nonfinite_counts=counts, rounding=how, **options
        )  # fmt: skip
    return {"theta": params, "v": v, "b": b, "t": t, "mu": mu or [], "count": counts}, lacking


def compare(layout, dtype, **options):
    (fast, fast_lacking), (slow, slow_lacking) = (
        run(layout, dtype, fused=True, **options),
        run(layout, dtype, foreach=False, **options),
    )
    for name, values in fast.items():
        for a, b in zip(values, slow[name], strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            bound = TOLERANCE.get(a.dtype, 0) * max(1.0, float(b.abs().max()))
            assert (a.double() - b.double()).abs().max() <= bound, name
    for a, x, b, y in zip(fast["theta"], fast_lacking, slow["theta"], slow_lacking, strict=True):
        difference = (a.double() + x.double() - b.double() - y.double()).abs().max()
        if options.get("rounding") == "kahan":
            assert difference <= 4 * TOLERANCE[dtype] ** 2 * max(1.0, float(b.abs().max()))
    return fast


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["auto", "scalar"])
def test_equals_the_reference(layout, dtype, reduce):
    for options in OPTIONS:
        for rounding in ("nearest", "kahan") if dtype.itemsize == 2 else ("nearest",):
            compare(layout, dtype, reduce=reduce, rounding=rounding, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["odd", "matrix", "channels_last"])
def test_stochastic_bits_are_those_of_the_reference(layout, dtype):
    """After one step the arithmetic agrees so closely that hardly an element is rounded the other way."""
    fast, slow = (
        run(layout, dtype, steps=1, rounding="stochastic", **path)[0] for path in ({"fused": True}, {"foreach": False})
    )
    for a, b in zip(fast["theta"], slow["theta"], strict=True):
        assert (a != b).float().mean() < 0.02
    other = run(layout, dtype, steps=1, rounding="nearest", fused=True)[0]
    assert (fast["theta"][0] != other["theta"][0]).float().mean() > 0.1


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("layout", ["beyond a piece", "beyond a block of sums", "matrix"])
@pytest.mark.parametrize("reduce", ["auto", "scalar"])
def test_threads_change_nothing(threads, layout, reduce):
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            results.append(run(layout, torch.float32, reduce=reduce, momentum=0.9, bad=math.nan, fused=True)[0])
        finally:
            torch.set_num_threads(before)
    for name, values in results[0].items():
        for a, b in zip(values, results[1][name], strict=True):
            # The sum of squares of a whole tensor is added up in another order.
            close = {"rtol": 1e-6, "atol": 1e-7} if reduce == "scalar" or layout != "matrix" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(a, b, **close)
    assert results[0]["count"][1] == results[1]["count"][1] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_bad_gradients_are_skipped(bad, dtype, clip_value):
    for layout in ("matrix", "odd"):
        fast = compare(layout, dtype, bad=bad, clip_value=clip_value, momentum=0.9)
        assert [int(count) for count in fast["count"]] == [0, 1]
        assert [float(count) for count in fast["t"]] == [4.0, 3.0]
        assert all(value.isfinite().all() for values in fast.values() for value in values)


def test_what_the_kernel_does_not_take_is_said():
    def call(param, grad, v, **options):
        amos([param], [grad], [v], [torch.zeros_like(v)], [torch.zeros(())], scales=[1.0], lr=0.1, **options)

    ones = torch.ones(6, 5)
    with pytest.raises(RuntimeError, match=r"fused=True.*shape \(6, 5\).*different strides"):
        call(ones.clone(), torch.ones(5, 6).t(), torch.zeros(6, 1), fused=True)
    with pytest.raises(RuntimeError, match=r"shape \(6, 5\) and strides \(1, 6\) with statistics of shape \(6, 1\)"):
        call(torch.ones(5, 6).t(), torch.ones(5, 6).t(), torch.zeros(6, 1), fused=True)
    with pytest.raises(RuntimeError, match="with statistics of shape"):
        call(ones.clone(), ones, torch.zeros(1, 5), fused=True)
    with pytest.raises(RuntimeError, match="with statistics of shape"):
        call(ones.clone(), ones, torch.zeros(6, 1, dtype=torch.float64), fused=True)
    # One number per element, and per slice of another axis, go by blocks and by the loop.
    for shape in [(6, 5), (1, 5)]:
        param = ones.clone()
        call(param, ones, torch.zeros(shape))
        assert (param < 1).all()
    assert not dtypes_supported(torch.bfloat16, torch.bfloat16)
    assert not dtypes_supported(torch.complex64, torch.float32)


def test_versions_tell_autograd_of_the_change():
    p, v, b, t = torch.ones(3), torch.zeros(()), torch.zeros(()), torch.zeros(())
    before = [tensor._version for tensor in (p, v, b, t)]
    amos([p], [torch.ones(3)], [v], [b], [t], scales=[1.0], lr=0.1, fused=True)
    assert all(tensor._version > old for tensor, old in zip((p, v, b, t), before, strict=True))
