"""Run by test_sign_update_triton.py with Triton's interpreter, on CPU tensors; prints JSON: check -> result."""

import json
import math
import traceback
import warnings

import torch
from torch import nn

from danlu.kernels import sign_update
from danlu.optim import Lion, Rounding, Tiger, lion, tiger

# The calls of CUDA tensors, on those of the CPU.
sign_update._Cpu = sign_update._Cuda
warnings.simplefilter("ignore")

SHAPES = [(1,), (63,), (100,), (1025,), (33, 65)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = ["vector", "matrix", "vector", "matrix", "embedding"]


def lists(param_dtype, state_dtype):
    torch.manual_seed(0)
    params, grads = ([torch.randn(shape).to(param_dtype) for shape in SHAPES] for _ in range(2))
    return params, grads, [(0.1 * torch.randn(shape)).to(state_dtype) for shape in SHAPES]


def compare(run, dtypes, mode="nearest", bad=None):
    params, grads, momenta = lists(*dtypes)
    if bad is not None:
        grads[bad].view(-1)[-1] = math.nan
    results = []
    for fused in (True, False):
        p, m = [t.clone() for t in params], [t.clone() for t in momenta]
        lacks = [torch.zeros_like(t) for t in p]
        counts = [torch.zeros((), dtype=torch.int64) for _ in p]
        rounding = Rounding(mode, seed=2, step=9, compensations=lacks if mode == "kahan" else ())
        path = {"fused": True} if fused else {"foreach": False}
        run(p, grads, m, rounding=rounding, nonfinite_counts=counts, **path)
        if mode == "kahan":
            p = [a.double() + b.double() for a, b in zip(p, lacks, strict=True)]
        results.append((p, m, [int(c) for c in counts]))
    (fast, fast_m, fast_counts), (slow, slow_m, slow_counts) = results
    assert fast_counts == slow_counts == [int(i == bad) for i in range(len(SHAPES))]
    for a, b in zip(fast + fast_m, slow + slow_m, strict=True):
        tolerance = TOLERANCE[a.dtype]
        if a.dtype == torch.float64 != dtypes[0]:
            # Parameter and compensation; the interpreter cuts bfloat16 off where a GPU rounds it.
            tolerance = 8 * TOLERANCE[dtypes[0]] ** 2
        beyond = (a.double() - b.double()).abs() > tolerance * max(1.0, float(b.abs().max()))
        # With coarse numbers an interpolated momentum can be 0 in one arithmetic and not in the other.
        assert beyond.sum() <= (2 if dtypes[0].itemsize == 2 else 0), (a.dtype, mode)
    return results


def modes(dtype):
    return ["nearest", "stochastic", "kahan"] if dtype.itemsize == 2 else ["nearest"]


def check_lion():
    for dtypes in DTYPES:
        for mode in modes(dtypes[0]):
            for bad in (None, 3):
                compare(lambda *a, **k: lion(*a, lr=0.01, weight_decay=0.3, **k), dtypes, mode, bad)


def check_tiger():
    for dtypes in DTYPES:
        for mode in modes(dtypes[0]):
            for bad, update, folded in ((None, True, False), (4, True, True), (1, False, False)):
                options = {"kinds": KINDS, "lr": 0.01, "weight_decay": 0.3, "update": update, "center": 0.25}
                options |= {"folded": [folded] * 5, "share": 0.5, "shrink": 0.9}
                compare(lambda *a, options=options, **k: tiger(*a, **options, **k), dtypes, mode, bad)


def check_skip_and_off():
    for nonfinite in ("skip", "off"):
        compare(lambda *a, n=nonfinite, **k: tiger(*a, kinds=KINDS, lr=0.1, nonfinite=n, **k), DTYPES[0])
        compare(lambda *a, n=nonfinite, **k: lion(*a, lr=0.1, nonfinite=n, **k), DTYPES[0])
    compare(lambda *a, **k: tiger(*a, kinds=KINDS, lr=0.1, nonfinite="skip", **k), DTYPES[0], bad=0)


def check_the_same_elements_are_rounded_up():
    for dtype in (torch.bfloat16, torch.float16):
        results = compare(lambda *a, **k: lion(*a, lr=0.001, **k), (dtype, dtype), "stochastic")
        # All but those whose interpolated momentum is 0 in one arithmetic and not in the other.
        different = sum((a != b).sum().item() for a, b in zip(results[0][0], results[1][0], strict=True))
        assert different <= 2


def check_tensors_without_gradients():
    params, grads, momenta = lists(torch.float32, torch.float32)
    grads = [None if i in (0, 4) else grad for i, grad in enumerate(grads)]
    results = []
    for path in ({"fused": True}, {"foreach": False}):
        p, m = [t.clone() for t in params], [t.clone() for t in momenta]
        tiger(p, grads, m, kinds=KINDS, lr=0.1, folded=[True] * 5, **path)
        results.append(p + m)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def check_optimizers_with_tensors_on_the_device():
    """Learning rate and step number as tensors, prepared calls, gradients that move, options that change."""
    for make in (Lion, Tiger):
        results = []
        for path in ({"capturable": True}, {"foreach": False}):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(20, 60), nn.Linear(60, 3)).to(torch.bfloat16)
            lr = torch.tensor(0.01) if "capturable" in path else 0.01
            params = net if make is Tiger else net.parameters()
            optimizer = make(params, lr=lr, weight_decay=0.1, rounding="stochastic", seed=4, **path)
            for step in range(6):
                for i, p in enumerate(net.parameters()):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(p.dtype)
                if step == 2:
                    net[0].bias.grad[1] = math.inf
                if step == 4:
                    for group in optimizer.param_groups:
                        group["weight_decay"] = 0.2
                        if "capturable" in path:
                            group["lr"].fill_(0.005)
                        else:
                            group["lr"] = 0.005
                optimizer.step()
            results.append(net)
            assert sum(optimizer.nonfinite_events.values()) == 1
        same = [(a == b).double().mean().item() for a, b in zip(*(n.parameters() for n in results), strict=True)]
        # Momenta in bfloat16 are cut off by the interpreter, so a few signs differ.
        assert min(same) > 0.98, same


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main():
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()[-2000:]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
