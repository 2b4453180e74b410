"""The Triton side of `linear_rows`: one program per row of logits, which is read twice and overwritten once.

This module is imported only where Triton is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_gradient", "launch_statistics"]

BLOCK = 4096


@triton.jit
def _tanh(x):
    """Tanh by exp, which every backend has; of small numbers the first terms, which exp would lose."""
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    large = (1.0 - decay) / (1.0 + decay)
    square = x * x
    small = size * (1.0 - square * (0.3333333333333333 - square * (0.13333333333333333 - square * 0.05396825396825397)))
    value = tl.where(size < 0.05, small, large)
    return tl.where(x < 0, -value, tl.where(x == x, value, x))


@triton.jit
def _capped(raw, cap, CAPPED: tl.constexpr):
    if CAPPED:
        return cap * _tanh(raw / cap)
    return raw


@triton.jit
def _statistics(
    logits,
    costs,
    target,
    log_total,
    chosen,
    sums,
    expected,
    best,
    stride,
    cost_stride,
    classes,
    cap,
    F: tl.constexpr,
    CAPPED: tl.constexpr,
    COSTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per row: log of the sum of exponentials, the target's logit, the sum of logits, the expected cost, the argmax."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    c = costs + row * cost_stride
    label = tl.load(target + row)
    top = tl.full((), float("-inf"), F)
    total = tl.zeros((), F)
    summed = tl.zeros((), F)
    cost = tl.zeros((), F)
    where = tl.zeros((), tl.int64)
    for start in range(0, classes, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < classes
        x = _capped(tl.load(z + index, mask=inside, other=0.0).to(F), cap, CAPPED)
        summed += tl.sum(tl.where(inside, x, 0.0), axis=0)
        x = tl.where(inside, x, float("-inf"))
        peak = tl.max(x, axis=0)
        where = tl.where(peak > top, (start + tl.argmax(x, axis=0)).to(tl.int64), where)
        new = tl.maximum(top, peak)
        # Of a row that is all -inf so far, exponentials are 0 and not NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp(top - base)
        weight = tl.exp(x - base)
        total = total * keep + tl.sum(weight, axis=0)
        if COSTS:
            price = tl.load(c + index, mask=inside & (index != label), other=0.0).to(F)
            cost = cost * keep + tl.sum(tl.where(weight > 0, weight * price, 0.0), axis=0)
        top = new
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(log_total + row, base + tl.log(total))
    tl.store(chosen + row, _capped(tl.load(z + label).to(F), cap, CAPPED))
    tl.store(sums + row, summed)
    tl.store(best + row, where)
    if COSTS:
        tl.store(expected + row, cost / total)


@triton.jit
def _gradient(
    logits,
    costs,
    out,
    target,
    keep,
    log_total,
    per_probability,
    toward_target,
    uniform,
    per_cost,
    expected,
    stride,
    cost_stride,
    out_stride,
    classes,
    cap,
    F: tl.constexpr,
    CAPPED: tl.constexpr,
    COSTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a row by the gradient of its weighted loss; an ignored row by zeros."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < classes
    target_of = out + row * out_stride + index
    if tl.load(keep + row) == 0:
        tl.store(target_of, tl.zeros((BLOCK,), F).to(out.dtype.element_ty), mask=inside)
    else:
        label = tl.load(target + row)
        raw = tl.load(logits + row * stride + index, mask=inside, other=0.0).to(F)
        x = _capped(raw, cap, CAPPED)
        p = tl.exp(x - tl.load(log_total + row))
        g = tl.load(per_probability + row) * p - tl.load(uniform + row)
        g -= tl.where(index == label, tl.load(toward_target + row), 0.0)
        if COSTS:
            price = tl.load(costs + row * cost_stride + index, mask=inside & (index != label), other=0.0).to(F)
            g += tl.where(p > 0, tl.load(per_cost + row) * p * (price - tl.load(expected + row)), 0.0)
        if CAPPED:
            ratio = x / cap
            g *= 1.0 - ratio * ratio
        tl.store(target_of, g.to(out.dtype.element_ty), mask=inside)


def _block(classes: int) -> int:
    return min(BLOCK, max(16, triton.next_power_of_2(classes)))


def _language_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch_statistics(
    logits: Tensor, target: Tensor, costs: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `row_statistics` returns; the expected cost is 0 without costs."""
    rows, classes = logits.shape
    made = logits.new_zeros(4, rows, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _statistics[(rows,)](
            logits,
            logits if costs is None else costs,
            target,
            *made.unbind(),
            best,
            logits.stride(0),
            0 if costs is None else costs.stride(0),
            classes,
            1.0 if softcap is None else softcap,
            F=_language_type(logits.dtype),
            CAPPED=softcap is not None,
            COSTS=costs is not None,
            BLOCK=_block(classes),
            num_warps=8,
        )
    log_total, chosen, sums, expected = made.unbind()
    return log_total, chosen, sums, expected, best


def launch_gradient(
    logits: Tensor,
    target: Tensor,
    keep: Tensor,
    log_total: Tensor,
    per_probability: Tensor,
    toward_target: Tensor,
    uniform: Tensor,
    costs: Tensor | None,
    per_cost: Tensor,
    expected: Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """What `write_row_gradients` does."""
    rows, classes = logits.shape
    if not rows:
        return
    block = _block(classes)
    _gradient[(rows, triton.cdiv(classes, block))](
        logits,
        logits if costs is None else costs,
        out,
        target,
        keep.view(torch.uint8),
        log_total,
        per_probability,
        toward_target,
        uniform,
        per_cost,
        expected,
        logits.stride(0),
        0 if costs is None else costs.stride(0),
        out.stride(0),
        classes,
        1.0 if softcap is None else softcap,
        F=_language_type(logits.dtype),
        CAPPED=softcap is not None,
        COSTS=costs is not None,
        BLOCK=block,
        num_warps=8,
    )
