r"""Rows of smooth top-k by a threshold: $p = f(x - \lambda)$ with $\sum_i p_i = k$, and their derivatives.

And rows of hard top-k, which take the derivatives of smooth ones.

For all four functions $f$ the slope follows from the value, $f'(d) = s(f(d))$, so a backward needs $p$ alone, and
the second derivative is that of the expression for the first.

Shape letters: `R` rows (any axes); `N` the last axis.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from danlu import kernels
from danlu._common.vmap import batch_first
from danlu.kernels import soft_topk as fused

__all__ = ["Threshold", "Thresholded", "hard_rows", "threshold_rows"]

Threshold = Literal["exp", "laplace", "sigmoid", "clip"]

# A step of Newton's method at least halves the bracket or multiplies the digits; 100 is out of reach.
_STEPS = 100
# Repetitions of the last step, which is exact but for sigmoid, where it halves the error, or if a score changes sides.
_MENDS = 8


def threshold_rows(input: Tensor, k: Tensor, method: Threshold) -> tuple[Tensor, Tensor]:
    """The map along the last axis and its thresholds; `k` has shape `(R, 1)`, and rows may hold -inf and NaN."""
    return Thresholded.apply(input, k, method)


def hard_rows(input: Tensor, k: Tensor, smooth: Tensor | None = None) -> Tensor:
    """The indicator of the `k` largest entries of every row, of equal ones the first, with the gradient of `smooth`."""
    return _Hard.apply(input, k, smooth)


# ---------------------------------------------------------------------------------------------------- definition


def _value(distance: Tensor, method: str) -> Tensor:
    """$f(d)$."""
    if method == "exp":
        return distance.clamp(max=0).exp()
    if method == "laplace":
        half = 0.5 * (-distance.abs()).exp()
        return torch.where(distance < 0, half, 1 - half)
    return distance.sigmoid() if method == "sigmoid" else distance.clamp(0, 1)


def _slope(p: Tensor, method: str) -> Tensor:
    """$f'$ where $f$ is $p$."""
    if method == "exp":
        return torch.where(p < 1, p, 0)
    if method == "laplace":
        return torch.minimum(p, 1 - p)
    return p * (1 - p) if method == "sigmoid" else ((p > 0) & (p < 1)).to(p.dtype)


def _vjp(p: Tensor, v: Tensor, g: Tensor | None, method: str) -> Tensor:
    r"""$s \odot (v - (\langle s, v\rangle - g) / \sum s)$, with $g$ the gradient of the threshold."""
    slope = _slope(p, method)
    total = slope.sum(-1, keepdim=True)
    pull = (slope * v).sum(-1, keepdim=True)
    if g is not None:
        pull = pull - g
    # A row in which everything is saturated does not move.
    mean = torch.where(total > 0, pull / torch.where(total > 0, total, 1), 0)
    return slope * (v - mean)


def _reference(input: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """The map in float64 operations: Newton's method inside a bracket, then the closed form where there is one."""
    x = input.to(torch.float64)
    k = k.to(torch.float64).expand(*x.shape[:-1], 1)
    visible = x != -math.inf
    count = visible.sum(-1, keepdim=True)
    top = torch.where(visible, x, -math.inf).amax(-1, keepdim=True)
    # Differences to a finite number: a single +inf is far above all others.
    top = torch.where(top.isfinite(), top, torch.where(visible & x.isfinite(), x, -math.inf).amax(-1, keepdim=True))
    center = torch.where(top.isfinite(), top, 0)
    # Finite differences also of numbers at the ends of the range.
    least = torch.finfo(torch.float64).min / 2
    z = torch.where(visible, (x - center).clamp(min=least, max=1e6), -math.inf)
    full, none = count <= k, k <= 0
    inner = torch.where(full | none, 0.5 * count.clamp(min=1), k)
    shift = _threshold(z, torch.where(visible, z, math.inf), inner, method)
    p = _value(z - shift, method)
    p = torch.where(visible, p, 0)
    p = torch.where(full & visible, 1.0, torch.where(none, 0.0, p))
    p = torch.where(x.isnan().any(-1, keepdim=True), math.nan, p)
    shift = torch.where(full, -math.inf, torch.where(none, math.inf, shift + center))
    return p, shift


def _threshold(z: Tensor, raised: Tensor, k: Tensor, method: str) -> Tensor:
    """The threshold of finite rows; hidden entries are -inf in `z` and +inf in `raised`."""
    count = (raised != math.inf).sum(-1, keepdim=True)
    low = raised.amin(-1, keepdim=True)
    low = torch.where(low.isfinite(), low, 0)
    ends = {
        # f is at most e^d (half of it for laplace), and 1 - f as much on the other side.
        "exp": (low, z.logsumexp(-1, keepdim=True) - k.log()),
        "laplace": (
            (2 * (count - k)).log() - (-raised).logsumexp(-1, keepdim=True),
            z.logsumexp(-1, keepdim=True) - (2 * k).log(),
        ),
        "sigmoid": (
            (count - k).log() - (-raised).logsumexp(-1, keepdim=True),
            z.logsumexp(-1, keepdim=True) - k.log(),
        ),
        "clip": (low - 1, z.amax(-1, keepdim=True)),
    }
    left, right = ends[method]
    left, right = torch.minimum(left, right) - 1e-12, right + 1e-12
    at = right.clone()
    for _ in range(_STEPS):
        value = _value(z - at, method)
        excess = value.sum(-1, keepdim=True) - k
        slope = _slope(value, method).sum(-1, keepdim=True)
        left, right = torch.where(excess > 0, at, left), torch.where(excess > 0, right, at)
        step = at + excess / slope
        inside = (step > left) & (step < right) & (slope > 0)
        new = torch.where(inside, step, 0.5 * left + 0.5 * right)
        moved = torch.where(excess == 0, 0, (new - at).abs())
        at = torch.where(excess == 0, at, new)
        if bool((moved <= 1e-15 * (1 + at.abs())).all()):
            break
    for _ in range(_MENDS if method in ("sigmoid", "exp") else 1):
        at = _mended(z, at, k, method)
    return at


def _mended(z: Tensor, at: Tensor, k: Tensor, method: str) -> Tensor:
    r"""What is left of the threshold once the entries above `at` are known.

    The distances to 1 of those above are summed, not their values, so that nothing cancels: with these sums $A$ and
    $B$ of both sides $B e^{-s} - A e^{s} = k - m$ is solved for the step $s$. Of exponentials that is exact; of sigmoid
    the sums change with the step, and the error is less than halved, or vanishes where all are far from the threshold.
    """
    d = z - at
    above = d > 0
    m = above.sum(-1, keepdim=True)
    free = k - m
    if method == "clip":
        between = above & (d < 1)
        total = torch.where(between, z, 0).sum(-1, keepdim=True) + (d >= 1).sum(-1, keepdim=True) - k
        count = between.sum(-1, keepdim=True)
        return torch.where(count > 0, total / count, at)
    tail = -d.abs()
    if method == "sigmoid":
        tail = math.log(2) + torch.nn.functional.logsigmoid(tail)
    log_a = torch.where(above, tail, -math.inf).logsumexp(-1, keepdim=True)
    log_b = torch.where(above, -math.inf, tail).logsumexp(-1, keepdim=True)
    if method == "exp":
        # Between the k-th largest and the next everything is as good in sums; the answer is next to the k-th largest.
        lowest = torch.where(above, z, math.inf).amin(-1, keepdim=True)
        step = log_b - free.log()
        return torch.where(free > 0, at + torch.where(step.isfinite(), step, 0), lowest)
    root = (free.square() + (log_a + log_b).exp()).sqrt()
    few = log_b - (root + free).log()
    many = (root - free).log() - log_a
    step = torch.where(free > 0, few, torch.where(free < 0, many, 0.5 * (log_b - log_a)))
    return at + torch.where(step.isfinite(), step, 0)


def _indicator(input: Tensor, k: Tensor) -> Tensor:
    """The k largest visible entries of every row, of equal ones the first."""
    k = k.expand(*input.shape[:-1], 1)
    if input.numel() == 0:
        return torch.empty_like(input)
    # Of the largest that are needed, which is all where that can only be learned from the device.
    most = int(k.max()) if k.device.type == "cpu" else input.shape[-1]
    ordered = input.topk(max(1, min(most, input.shape[-1])), dim=-1).values
    least = ordered.gather(-1, (k.long() - 1).clamp(min=0))
    above, ties = input > least, input == least
    chosen = above | (ties & (ties.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    chosen = chosen & (input != -math.inf) & (k > 0)
    return torch.where(input.isnan().any(-1, keepdim=True), math.nan, chosen.to(input.dtype))


# ----------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("danlu::threshold_rows", mutates_args=())
def _rows(input: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor]:
    if kernels.explain("soft_topk", input) is None:
        return fused.soft_topk_cpu(input, k, method)
    p, threshold = _reference(input, k, method)
    return p.to(input.dtype).contiguous(), threshold.to(_wide(input.dtype)).contiguous()


@_rows.register_fake
def _(input: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor]:
    p = torch.empty_like(input, memory_format=torch.contiguous_format)
    return p, input.new_empty(*input.shape[:-1], 1, dtype=_wide(input.dtype))


@torch.library.custom_op("danlu::hard_topk_rows", mutates_args=())
def _hard(input: Tensor, k: Tensor) -> Tensor:
    if kernels.explain("soft_topk", input) is None:
        return fused.hard_topk_cpu(input, k)
    return _indicator(input, k).contiguous()


@_hard.register_fake
def _(input: Tensor, k: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.custom_op("danlu::threshold_rows_vjp", mutates_args=())
def _rows_vjp(p: Tensor, v: Tensor, method: str) -> Tensor:
    if kernels.explain("soft_topk", p) is None:
        return fused.soft_topk_vjp_cpu(p, v, method)
    wide = _wide(p.dtype)
    return _vjp(p.to(wide), v.to(wide), None, method).to(p.dtype).contiguous()


@_rows_vjp.register_fake
def _(p: Tensor, v: Tensor, method: str) -> Tensor:
    return torch.empty_like(p, memory_format=torch.contiguous_format)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Thresholded(torch.autograd.Function):
    """Values and thresholds of rows."""

    @staticmethod
    def forward(input: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        return _rows(input, k, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0], inputs[1])
        ctx.method = inputs[2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        p, k = ctx.saved_tensors
        v, g = grads
        wide = _wide(p.dtype)
        d_input = d_k = None
        if v is not None and g is None and not torch.is_grad_enabled():
            d_input = _rows_vjp(p, v, ctx.method)
        elif ctx.needs_input_grad[0]:
            of_value = torch.zeros_like(p, dtype=wide) if v is None else v.to(wide)
            d_input = _vjp(p.to(wide), of_value, None if g is None else g.to(wide), ctx.method).to(p.dtype)
        if ctx.needs_input_grad[1]:
            slope = _slope(p.to(wide), ctx.method)
            total = slope.sum(-1, keepdim=True)
            pull = 0 if v is None else (slope * v.to(wide)).sum(-1, keepdim=True)
            d_k = (torch.where(total > 0, (pull - (0 if g is None else g)) / total, 0)).to(k.dtype).expand_as(k)
        return d_input, d_k, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return Thresholded.apply(*batch_first(info, args[:2], in_dims[:2]), args[2]), (0, 0)


class _Hard(torch.autograd.Function):
    """A constant with the gradient of something else; no forward mode, which would be 0 without that."""

    @staticmethod
    def forward(input: Tensor, k: Tensor, smooth: Tensor | None) -> Tensor:  # pyrefly: ignore[bad-override]
        return _hard(input, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        return None, None, grads[0] if ctx.needs_input_grad[2] else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        given = 2 if args[2] is None else 3
        return _Hard.apply(*batch_first(info, args[:given], in_dims[:given]), *args[given:]), 0
