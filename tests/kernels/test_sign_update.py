"""The compiled steps of Lion and Tiger equal the references, on odd sizes, layouts, dtypes and threads."""

import math

import pytest
import torch

from danlu.kernels.sign_update import dtypes_supported, find_rows
from danlu.optim import Rounding, lion, tiger

LAYOUTS = {
    "one": lambda: torch.randn(1),
    "odd": lambda: torch.randn(63),
    "hundred": lambda: torch.randn(100),
    "thousand": lambda: torch.randn(1000),
    "matrix": lambda: torch.randn(33, 65),
    "beyond a piece": lambda: torch.randn(300, 301),
    "scalar": lambda: torch.randn(()),
    "transposed": lambda: torch.randn(65, 33).t(),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
}
# Parameter, momentum.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
# Of the update's arithmetic; a low-precision result may differ by one unit in the last place where float32 ties.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def keep(tensor):
    return tensor.clone(memory_format=torch.preserve_format)


def tensors(layout, param_dtype, state_dtype, count=3):
    torch.manual_seed(0)
    lists = [[LAYOUTS[layout]().to(param_dtype) for _ in range(count)] for _ in range(2)]
    return *lists, [keep(0.1 * LAYOUTS[layout]()).to(state_dtype) for _ in range(count)]


def compare(run, layout, dtypes, rounding):
    params, grads, momenta = tensors(layout, *dtypes)
    results = {}
    for fused in (True, False):
        p, m = [keep(t) for t in params], [keep(t) for t in momenta]
        compensations = [torch.zeros_like(t) for t in p]
        if rounding is not None:
            how = Rounding(rounding, seed=3, step=7, compensations=compensations if rounding == "kahan" else ())
        else:
            how = Rounding("nearest")
        taken = run(p, grads, m, rounding=how, fused=fused, foreach=None if fused else False)
        assert taken == ([0, 1, 2] if fused else [])
        results[fused] = p, m, compensations
    for name, fast, slow in zip(("param", "exp_avg"), results[True], results[False], strict=False):
        for a, b, p in zip(fast, slow, params, strict=True):
            assert (a.double() - b.double()).abs().max() <= TOLERANCE[a.dtype] * max(1.0, float(b.abs().max())), name
            assert a.stride() == p.stride()
    if rounding == "kahan":
        # Where float32 ties, parameter and compensation differ, but not their sum.
        sums = [[p.double() + c.double() for p, c in zip(r[0], r[2], strict=True)] for r in results.values()]
        for a, b in zip(*sums, strict=True):
            assert (a - b).abs().max() <= 2 * TOLERANCE[dtypes[0]] ** 2 * max(1.0, float(b.abs().max()))
    return results


ROUNDINGS = [None, "stochastic", "kahan"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).split(".")[1] for d in pair))
def test_lion_equals_the_reference(layout, dtypes):
    for rounding in ROUNDINGS if dtypes[0].itemsize == 2 else [None]:
        for weight_decay in (0.0, 0.3):

            def run(p, g, m, weight_decay=weight_decay, **how):
                return lion(p, g, m, lr=0.01, betas=(0.9, 0.98), weight_decay=weight_decay, **how)

            compare(run, layout, dtypes, rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).split(".")[1] for d in pair))
@pytest.mark.parametrize("update", [True, False])
def test_tiger_equals_the_reference(layout, dtypes, update):
    kinds = ["matrix", "vector", "matrix" if layout in ("transposed", "channels_last") else "embedding"]
    for rounding in ROUNDINGS if dtypes[0].itemsize == 2 else [None]:
        for folded in (False, True):

            def run(p, g, m, folded=folded, **how):
                options = {"folded": [folded] * 3, "share": 0.25 if folded else 1.0, "update": update}
                return tiger(p, g, m, kinds=kinds, lr=0.01, weight_decay=0.3, **options, **how)

            compare(run, layout, dtypes, rounding)


def test_stochastic_bits_are_those_of_the_reference():
    """Not only close: where float32 arithmetic agrees, the same elements are rounded up."""
    results = compare(lambda *a, **k: lion(*a, lr=0.001, **k), "thousand", DTYPES[2], "stochastic")
    for a, b in zip(results[True][0], results[False][0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("bad", [None, 50_000])
def test_threads_change_nothing(threads, bad):
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            params, grads, momenta = tensors("beyond a piece", torch.float32, torch.float32)
            if bad is not None:
                grads[1].view(-1)[bad] = math.nan
            lion(params, grads, momenta, lr=0.01, weight_decay=0.1)
            tiger(params, grads, momenta, kinds=["matrix", "matrix", "embedding"], lr=0.01, nonfinite="skip")
            results.append(params + momenta)
        finally:
            torch.set_num_threads(before)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i == 0:
            # The sum of squares of a whole matrix is added up in another order.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a, b) or i == 1
    if bad is not None:
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 62, 63, 64, 999])
def test_every_bad_gradient_is_seen(value, place):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        grad = torch.randn(1000).to(dtype)
        grad[place] = value
        p, m = torch.ones(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
        counts = [torch.zeros((), dtype=torch.int64)]
        assert lion([p], [grad], [m], lr=0.1, nonfinite_counts=counts, fused=True) == [0]
        assert torch.equal(p, torch.ones_like(p))
        assert torch.equal(m, torch.zeros_like(m))
        assert counts[0] == 1


def test_large_finite_gradients_are_not_bad():
    grad = torch.full((5000,), torch.finfo(torch.float32).max)
    p, m = torch.ones(5000), torch.zeros(5000)
    lion([p], [grad], [m], lr=0.1, fused=True)
    assert torch.equal(p, torch.full((5000,), 0.9))


def test_versions_tell_autograd_of_the_change():
    p, m = torch.ones(3), torch.zeros(3)
    before = p._version, m._version
    lion([p], [torch.ones(3)], [m], lr=0.1, fused=True)
    assert p._version > before[0]
    assert m._version > before[1]


def test_what_the_kernel_does_not_take_is_said():
    gaps = torch.randn(6, 10)[:, ::2]
    with pytest.raises(RuntimeError, match=r"fused=True.*shape \(6, 5\).*different strides"):
        lion([gaps], [torch.ones(6, 5)], [torch.zeros(6, 5)], lr=0.1, fused=True)
    with pytest.raises(RuntimeError, match="has gaps"):
        lion([gaps], [torch.ones(6, 10)[:, ::2]], [torch.zeros(6, 10)[:, ::2]], lr=0.1, fused=True)
    assert not dtypes_supported(torch.float32, torch.bfloat16)
    assert not dtypes_supported(torch.complex64, torch.complex64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (9,), (70, 33), (3, 2, 5), (3, 70_000), (700, 300)], ids=str)
def test_rows_with_an_element_are_found(dtype, shape):
    """Small elements, zeros of both signs, and elements that are not finite, which count as something."""
    table = torch.zeros(shape, dtype=dtype)
    table.view(-1)[::2] = -0.0
    found, finite = find_rows(table)
    assert not found.any()
    assert finite
    random = torch.Generator().manual_seed(0)
    wanted = torch.rand(shape[0], generator=random) < 0.4
    wanted[-1] = True
    smallest = torch.finfo(dtype).smallest_normal
    for value in (smallest, -torch.finfo(dtype).max, math.inf, -math.inf, math.nan):
        filled = table.clone().view(shape[0], -1)
        filled[wanted, torch.randint(filled.shape[1], (1,), generator=random)] = value
        found, finite = find_rows(filled.view(shape))
        assert torch.equal(found, wanted)
        assert finite == math.isfinite(value)
