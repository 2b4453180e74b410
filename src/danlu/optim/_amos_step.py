"""One step of Amos on lists of tensors: with plain operations, in cache-sized blocks, in buckets, and compiled."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import is_low_precision
from danlu.kernels.amos import amos_cpu, dtypes_supported
from danlu.kernels.sign_update import LowPrecision
from danlu.optim._rounding import Rounding, Writer, read, resolve_rounding, write
from danlu.optim._traversal import BLOCK, compute_dtype, kernel_test, rounded_blocks, scratch

__all__ = ["Numbers", "amos_kernel_test", "blocked_amos", "fused_amos", "multi_tensor_amos", "single_tensor_amos"]


@dataclass(frozen=True)
class Numbers:
    """The numbers of one step; `sign` is -1 to climb, `guard` says whether bad gradients are looked for."""

    lr: float
    beta: float
    momentum: float
    clip_value: float | None
    extra_l2: float
    c_coef: float
    d_coef: float
    eps: float
    sign: float
    guard: bool

    def advance(
        self, square: Tensor, exp_avg_sq: Tensor, decay: Tensor, step: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""New $v$ and $b$, and the factors of $\theta$ and of $g$ in $-\Delta$; everything has the shape of `square`.

        `step` is $t$; it and `scale` broadcast to `square`.
        """
        dtype = square.dtype
        exp_avg_sq = torch.lerp(exp_avg_sq, square, 1 - self.beta)
        correction = -torch.expm1(step.to(dtype) * (math.log(self.beta) if self.beta else -math.inf))
        # Below the smallest normal number the inverse could be infinite, and infinity times a zero gradient NaN.
        inverse = correction / exp_avg_sq.clamp(min=max(self.eps, torch.finfo(dtype).tiny))
        gamma = torch.rsqrt(1 + self.c_coef * math.sqrt(self.lr) * decay) * (self.lr**2 * (inverse * square))
        rate = scale * self.lr
        fading = 1 / (1 + decay * (rate**0.5 * self.d_coef))
        # A rate of 0 moves nothing: tools make an optimizer create its state by such a step.
        pull = fading * (0.5 * gamma + (self.extra_l2 if self.lr > 0 else 0.0))
        push = fading * inverse.sqrt() * (rate * self.sign)
        return exp_avg_sq, decay + gamma * (1 + decay), pull, push


def _whole(scalar: Tensor) -> Tensor:
    """A scalar of a DTensor as an ordinary tensor, as which checkpoints keep scalars; nothing waits for its value."""
    return scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar


def _mean_square(grad: Tensor, exp_avg_sq: Tensor) -> Tensor:
    """Mean of the squares over the axes in which the state is shorter; it has the shape of the state."""
    squares = grad.square()
    if exp_avg_sq.ndim == 0:
        return _whole(squares.sum()) / grad.numel()
    axes = [axis for axis in range(grad.ndim) if exp_avg_sq.shape[axis] < grad.shape[axis]]
    # A sum and a count: the mean of means over shards of unequal size would be wrong.
    return squares.sum(axes, keepdim=True) / math.prod(grad.shape[axis] for axis in axes) if axes else squares


def single_tensor_amos(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    counts: Sequence[Tensor] | None,
    writers: Sequence[Writer | None],
    scales: Sequence[float],
    numbers: Numbers,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other two paths."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        theta, raw = read(param, writers[i]), grads[i].to(dtype)
        grad = raw if numbers.clip_value is None else raw.clamp(-numbers.clip_value, numbers.clip_value)
        square = _mean_square(grad, exp_avg_sqs[i])
        step = steps[i] + 1
        exp_avg_sq, decay, pull, push = numbers.advance(square, exp_avg_sqs[i], decays[i], step, scales[i])
        change = -(pull * theta + push * grad)
        state, new = [exp_avg_sqs[i], decays[i], steps[i]], [exp_avg_sq, decay, step]
        if exp_avgs is not None:
            change = torch.lerp(exp_avgs[i], change, 1 - numbers.momentum)
            state.append(exp_avgs[i])
            new.append(change)
        moved = theta + change
        if numbers.guard:
            finite = _whole(torch.isfinite(square).all())
            if numbers.clip_value is not None:
                # Clipping hides an infinity.
                finite = finite & _whole(torch.isfinite(raw).all())
            moved = torch.where(finite, moved, theta)
            new = [torch.where(finite, after, before) for after, before in zip(new, state, strict=True)]
            if counts is not None:
                counts[i].add_(~finite)
        write(param, moved, writers[i])
        for target, value in zip(state, new, strict=True):
            target.copy_(value)


def _rows(*tensors: Tensor) -> list[Tensor] | None:
    """Two-dimensional views, one row per slice of axis 0; None where the memory of a slice is not in one piece.

    The order within a row is that of the memory, the same for all tensors, so channels_last ones need no copy.
    """
    first = tensors[0]
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    if order[0] != 0:
        return None
    ordered = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in ordered):
        return None
    return [tensor.view(tensor.shape[0], -1) for tensor in ordered]


def blocked_amos(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    counts: Sequence[Tensor] | None,
    writers: Sequence[Writer | None],
    scales: Sequence[float],
    numbers: Numbers,
) -> None:
    """On the CPU: one pass for the statistics, then passes over blocks, all but the first of which find the cache."""
    memory: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(params):
        writer = writers[i]
        compensation = None if writer is None else writer.compensation
        own = [t for t in (param, grads[i], exp_avgs and exp_avgs[i], compensation) if isinstance(t, Tensor)]
        state = exp_avg_sqs[i]
        per_row = state.ndim > 1 and state.numel() == state.shape[0] == param.shape[0]
        views = _rows(*own) if per_row else own
        if views is None or (state.ndim > 0 and not per_row):
            one = slice(i, i + 1)
            single_tensor_amos(
                params[one],
                grads[one],
                exp_avg_sqs[one],
                decays[one],
                steps[one],
                None if exp_avgs is None else exp_avgs[one],
                None if counts is None else counts[one],
                writers[one],
                scales[one],
                numbers,
            )
            continue
        dtype = compute_dtype(param.dtype)
        grad = (
            views[1]
            if numbers.clip_value is None
            else views[1].to(dtype).clamp(-numbers.clip_value, numbers.clip_value)
        )
        if per_row:
            norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=dtype)
            square = norm.square_().div_(grad.shape[1])
        else:
            square = torch.linalg.vector_norm(grad, dtype=dtype).square_().div_(grad.numel())
        if numbers.guard and not _all_finite(square, views[1], clipped=numbers.clip_value is not None):
            if counts is not None:
                counts[i].add_(1)
            continue
        steps[i].add_(1)
        shape = square.shape
        exp_avg_sq, decay, pull, push = numbers.advance(
            square, state.reshape(shape), decays[i].reshape(shape), steps[i], scales[i]
        )
        state.copy_(exp_avg_sq.view(state.shape))
        decays[i].copy_(decay.view(state.shape))
        mu = None if exp_avgs is None else views[2]
        tensors = (views[0], grad) if mu is None else (views[0], grad, mu)
        for block, part, pulling, pushing in _blocks(tensors, views[-1], writer, pull, push):
            theta, gradient = read(block[0], part), block[1].to(dtype)
            change = torch.mul(gradient, -pushing, out=scratch(memory, theta)).addcmul_(theta, -pulling)
            if mu is not None:
                change = block[2].lerp_(change, 1 - numbers.momentum)
            write(block[0], theta.add_(change), part)


def _all_finite(square: Tensor, raw: Tensor, *, clipped: bool) -> bool:
    return bool(torch.isfinite(square).all()) and not (clipped and not bool(torch.isfinite(raw).all()))


def _blocks(
    tensors: tuple[Tensor, ...], compensation: Tensor, writer: Writer | None, pull: Tensor, push: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], Writer | None, Tensor, Tensor]]:
    """Blocks with the writer of their part of the parameter and the factors of their rows."""
    if pull.ndim == 0:
        for block, part in rounded_blocks(tensors, writer):
            yield block, part, pull, push
        return
    size = max(1, BLOCK * torch.get_num_threads() // max(1, tensors[0].shape[1]))
    for start in range(0, len(pull), size):
        rows = slice(start, start + size)
        part = writer
        if writer is not None:
            lacking = None if writer.compensation is None else compensation[rows]
            part = writer.view(lacking, start * tensors[0].shape[1])
        yield tuple(tensor[rows] for tensor in tensors), part, pull[rows], push[rows]


def multi_tensor_amos(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    counts: Sequence[Tensor] | None,
    writers: Sequence[Writer | None],
    scales: Sequence[float],
    numbers: Numbers,
) -> None:
    """On accelerators: the statistics of all tensors of a bucket in one vector; what is finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    thetas = [read(param, writer) for param, writer in zip(params, writers, strict=True)]
    raw = [grad.to(dtype) for grad in grads]
    gradients = raw
    if numbers.clip_value is not None:
        gradients = list(torch._foreach_clamp_max(raw, numbers.clip_value))
        torch._foreach_clamp_min_(gradients, -numbers.clip_value)
    squares = [_mean_square(grad, state) for grad, state in zip(gradients, exp_avg_sqs, strict=True)]
    sizes = [square.numel() for square in squares]
    # To which tensor every entry belongs: sent to the device in one copy, without waiting for it.
    device = params[0].device
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device, non_blocking=True)
    scale = torch.tensor(scales, dtype=dtype).to(device, non_blocking=True)[owner]
    finite: Tensor | None = None
    if numbers.guard:
        looked = squares if numbers.clip_value is None else [*squares, *raw]
        flags = torch.stack(torch._foreach_norm(looked, ord=math.inf)).isfinite()
        finite = flags.view(-1, len(squares)).all(0)
    counted = torch.stack(list(steps)) + 1
    square, old_square, old_decay = (
        torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in (squares, exp_avg_sqs, decays)
    )
    exp_avg_sq, decay, pull, push = numbers.advance(square, old_square, old_decay, counted[owner], scale)
    if finite is not None:
        row_finite = finite[owner]
        exp_avg_sq = torch.where(row_finite, exp_avg_sq, old_square)
        decay = torch.where(row_finite, decay, old_decay)
        counted = counted - (~finite).to(counted.dtype)
        if counts is not None:
            torch._foreach_add_(list(counts), list((~finite).to(torch.int64).unbind()))

    def parts(flat: Tensor) -> list[Tensor]:
        return [part.view_as(state) for part, state in zip(flat.split(sizes), exp_avg_sqs, strict=True)]

    torch._foreach_copy_(list(exp_avg_sqs), parts(exp_avg_sq))
    torch._foreach_copy_(list(decays), parts(decay))
    torch._foreach_copy_(list(steps), list(counted.unbind()))
    changes = [
        torch.addcmul(gradient * -push, theta, pull, value=-1)
        for theta, gradient, pull, push in zip(thetas, gradients, parts(pull), parts(push), strict=True)
    ]
    if exp_avgs is not None:
        changes = list(torch._foreach_lerp(list(exp_avgs), changes, 1 - numbers.momentum))
    if finite is not None:
        flags = finite.unbind()
        if exp_avgs is not None:
            kept = [torch.where(f, change, old) for f, change, old in zip(flags, changes, exp_avgs, strict=True)]
            torch._foreach_copy_(list(exp_avgs), kept)
        changes = [torch.where(f, change, torch.zeros_like(change)) for f, change in zip(flags, changes, strict=True)]
    elif exp_avgs is not None:
        torch._foreach_copy_(list(exp_avgs), changes)
    if any(writers):
        for param, theta, change, writer in zip(params, thetas, changes, writers, strict=True):
            write(param, theta + change, writer)
    else:
        torch._foreach_add_(list(params), changes)


def amos_kernel_test(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    *,
    rounding: Rounding,
    fused: bool | None,
    foreach: bool | None,
) -> Callable[[int], bool] | None:
    """What tells by its index whether the compiled step takes a tensor; None if it is not wanted."""
    if fused is None and any(param.device.type != "cpu" for param in params):
        fused = False
    # Without momentum there is no state of the parameter's strides to look at.
    takes = kernel_test(
        "amos",
        params,
        grads,
        params if exp_avgs is None else exp_avgs,
        fused=fused,
        foreach=foreach,
        supported=lambda param, state: exp_avgs is None or dtypes_supported(param, state),
    )
    if takes is None:
        return None

    def takes_state(i: int) -> bool:
        param, v, b = params[i], exp_avg_sqs[i], decays[i]
        fits = all(s.is_contiguous() and dtypes_supported(param.dtype, s.dtype) for s in (v, b))
        if fits and v.numel() > 1:
            # One number per slice of axis 0, each slice in one piece of memory, one after the other.
            outermost = param.stride(0) * param.shape[0] == param.numel()
            fits = outermost and v.numel() == v.shape[0] == param.shape[0]
        if resolve_rounding(rounding.mode, param.dtype) == "kahan" and is_low_precision(param.dtype):
            # Its memory is read in the order of the parameter's, whose strides may have changed since it was made.
            lacking = rounding.compensation(i)
            fits = fits and lacking.dtype == param.dtype and lacking.stride() == param.stride()
        if not fits and fused:
            raise RuntimeError(
                f"fused=True, but the kernel cannot run on a tensor of shape {tuple(param.shape)} and strides "
                f"{param.stride()} with statistics of shape {tuple(v.shape)} or a compensation of other strides"
            )
        return fits

    return lambda i: takes(i) and takes_state(i)


def fused_amos(
    lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None],
    scales: list[float],
    numbers: Numbers,
    rounding: Rounding,
) -> list[int]:
    """The compiled step; returns the indices of the tensors that were skipped."""
    params = lists[0]
    mode, everything = resolve_rounding(rounding.mode, params[0].dtype), range(len(params))
    return amos_cpu(
        *lists,
        scales=scales,
        **vars(numbers),
        low=LowPrecision(mode, rounding.seed, int(rounding.step)),
        compensations=[rounding.compensation(i) for i in everything] if mode == "kahan" else (),
        numbers=[rounding.number(i) for i in everything] if mode == "stochastic" else (),
    )
