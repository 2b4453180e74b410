"""The Triton side of `entmax`: one program per row, which is read once and stays in registers.

This module is imported only where Triton is there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["forward", "vjp"]

# As many Newton steps as can be needed in float64; most rows take less than ten.
_STEPS = 60


@triton.jit
def _sums(d, BETA: tl.constexpr, KIND: tl.constexpr):
    """Sums of d^r and d^(r-1) over d > 0, with r = 1/beta."""
    inside = d > 0
    if KIND == 1:
        return tl.sum(tl.where(inside, d, 0.0), axis=0), tl.sum(tl.where(inside, d * 0.0 + 1.0, 0.0), axis=0)
    if KIND == 2:
        kept = tl.where(inside, d, 0.0)
        return tl.sum(kept * kept, axis=0), tl.sum(kept, axis=0)
    kept = tl.where(inside, d, 1.0)
    lower = tl.where(inside, tl.exp((1.0 / BETA - 1.0) * tl.log(kept)), 0.0)
    return tl.sum(lower * kept, axis=0), tl.sum(lower, axis=0)


@triton.jit
def _forward(
    x,
    p,
    n,
    BETA: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LARGEST: tl.constexpr,
    F: tl.constexpr,
    KIND: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < n
    value = tl.load(x + row * n + index, mask=inside, other=float("-inf")).to(F)
    bad = tl.sum((value != value).to(tl.int32), axis=0) > 0
    # One infinite score takes all, several share.
    value = tl.where(value > LARGEST, LARGEST, value)
    largest = tl.max(value, axis=0)
    masked = largest == float("-inf")
    z = BETA * (value - tl.where(masked, 0.0, largest))
    # The inverse of how far the largest is from the threshold, which has its digits also where that is little.
    v = tl.full((), 1.0, F)
    step = tl.full((), 1.0, F)
    count = 0
    while (count < STEPS) & (step > TOLERANCE * v):
        total, slope = _sums(1.0 + v * z, BETA, KIND)
        # Newton on the norm.
        norm = total if KIND == 1 else tl.exp(BETA * tl.log(total))
        step = (norm - v) / (1.0 + norm * (slope / total - 1.0) / v)
        # A masked row has no sum; NaN ends the loop.
        v += tl.where(step > 0, step, 0.0)
        count += 1
    d = 1.0 + v * z
    # What is nearer to the threshold than rounding is at it.
    kept = d > TOLERANCE
    if KIND == 1:
        power = tl.where(kept, d, 0.0)
    elif KIND == 2:
        power = tl.where(kept, d * d, 0.0)
    else:
        power = tl.where(kept, tl.exp(1.0 / BETA * tl.log(tl.where(kept, d, 1.0))), 0.0)
    total = tl.sum(power, axis=0)
    power = tl.where(masked, 0.0, power / tl.where(masked, 1.0, total))
    power = tl.where(bad, float("nan"), power)
    tl.store(p + row * n + index, power.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _vjp(p, v, out, n, EXPONENT: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < n
    prob = tl.load(p + row * n + index, mask=inside, other=0.0).to(F)
    cotangent = tl.load(v + row * n + index, mask=inside, other=0.0).to(F)
    outside = prob == 0.0
    if KIND == 1:
        # NaN stays.
        s = tl.where(outside, 0.0, prob * 0.0 + 1.0)
    elif KIND == 2:
        s = tl.sqrt(prob)
    else:
        s = tl.where(outside, 0.0, tl.exp(EXPONENT * tl.log(tl.where(outside, 1.0, prob))))
    total = tl.sum(s, axis=0)
    mean = tl.sum(tl.where(outside, 0.0, s * cotangent), axis=0) / tl.where(total == 0.0, 1.0, total)
    result = tl.where(outside, 0.0, s * (cotangent - mean))
    tl.store(out + row * n + index, result.to(out.dtype.element_ty), mask=inside)


def _settings(tensor: Tensor, alpha: float) -> tuple[int, int, dict[str, Any]]:
    n = tensor.shape[-1]
    block = triton.next_power_of_2(n)
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    wide = tl.float64 if tensor.dtype == torch.float64 else tl.float32
    kind = 1 if alpha == 2.0 else 2 if alpha == 1.5 else 0
    return tensor.numel() // n, n, {"F": wide, "KIND": kind, "BLOCK": block, "num_warps": warps}


def forward(scores: Tensor, alpha: float) -> Tensor:
    """The map along the last axis of a contiguous tensor, for alpha in [1.05, 2]."""
    out = torch.empty_like(scores)
    if scores.numel():
        rows, n, settings = _settings(scores, alpha)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        numbers = {"BETA": alpha - 1.0, "TOLERANCE": 4 * torch.finfo(wide).eps, "LARGEST": torch.finfo(wide).max}
        _forward[(rows,)](scores, out, n, **numbers, STEPS=_STEPS, **settings)
    return out


def vjp(probabilities: Tensor, cotangent: Tensor, alpha: float) -> Tensor:
    """The Jacobian at `probabilities` times `cotangent`, both contiguous and of one dtype."""
    out = torch.empty_like(probabilities)
    if probabilities.numel():
        rows, n, settings = _settings(probabilities, alpha)
        _vjp[(rows,)](probabilities, cotangent, out, n, EXPONENT=2.0 - alpha, **settings)
    return out
