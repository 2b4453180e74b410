"""Run by test_entmax_triton.py with Triton's interpreter, on CPU tensors; prints JSON: check -> result."""

import json
import math
import traceback

import torch

from danlu.kernels import _entmax_triton as kernel
from danlu.simplex import _entmax_rows as rows

ALPHAS = (1.05, 1.25, 1.5, 1.7, 2.0)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(x, v, alpha):
    p = kernel.forward(x, alpha)
    assert p.dtype == x.dtype
    torch.testing.assert_close(p, rows._reference(x, alpha), rtol=0, atol=TOLERANCE[x.dtype], equal_nan=True)
    found, exact = kernel.vjp(p, v, alpha), rows._vjp(p.double(), v.double(), alpha)
    scale = max(1.0, float(exact.nan_to_num().abs().max()))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[x.dtype] * scale, equal_nan=True)


def check_odd_sizes():
    for n in (1, 2, 63, 100, 1000):
        for alpha in ALPHAS:
            compare(draw(3, n).float(), draw(3, n, seed=1).float(), alpha)


def check_dtypes():
    for dtype in TOLERANCE:
        for alpha in ALPHAS:
            compare(draw(2, 77).to(dtype), draw(2, 77, seed=1).to(dtype), alpha)


def check_rows_without_an_answer():
    x = draw(6, 33).float()
    x[0] = -math.inf
    x[1, 5] = math.nan
    x[2, 7] = math.inf
    x[3, ::2] = -math.inf
    x[4] = 7.0
    for alpha in ALPHAS:
        compare(x, torch.ones_like(x), alpha)
        p = kernel.forward(x, alpha)
        assert (p[0] == 0).all()
        assert p[1].isnan().all()
        assert p[2, 7] == 1


def check_everything_in_the_support():
    for alpha in ALPHAS:
        x = 1e-3 * draw(2, 513).float()
        p = kernel.forward(x, alpha)
        assert (p.double().sum(-1) - 1).abs().max() < 1e-6
        compare(x, draw(2, 513, seed=1).float(), alpha)
        # Relative to the largest, although all are small and the threshold is next to them.
        x = 1e-4 * draw(1, 2000).float()
        exact = rows._reference(x.double(), alpha)
        assert (kernel.forward(x, alpha).double() - exact).abs().max() < 3e-6 * exact.max()


def check_shapes():
    assert kernel.forward(torch.zeros(0, 3), 1.5).shape == (0, 3)
    x = draw(2, 3, 5).float()
    assert torch.equal(kernel.forward(x, 1.5)[1], kernel.forward(x[1].contiguous(), 1.5))


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
