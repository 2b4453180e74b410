r"""Attention in bands: near keys with one rotation, far keys with another, and no matrix of scores.

A softmax row over near and far keys is the mean of the two bands' softmaxes, weighted by their sums of exponentials.
The near band is sliding-window attention; the far band, keys at a distance of at least the window, is square causal
attention of queries shifted by the window. No pair is scored twice and no matrix of scores is held. Without a causal
mask there are far keys on either side. Where more is hidden, tiles of rows look at the masks.

The backward does not go through that mean: a flash backward recomputes the weights as $e^{S - \ell}$ from the
log-sum-exp that it is given. Given the merged $\ell$ and output it returns the band's share of all gradients.

Shape letters: as in `danlu.attention._rerope`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from danlu._common.checks import is_low_precision
from danlu.attention._band_calls import Call, Job, Masks, band_calls, call_bias, call_mask, jobs, tile_calls, tile_mask
from danlu.attention._band_kernels import Kernel, Plan, additive, backward, forward, kernel_of
from danlu.attention._masks import without_padding

__all__ = ["banded_attention"]


def banded_attention(
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor | None, Tensor] | None,
    value: Tensor,
    *,
    window: int,
    scale: float,
    is_causal: bool,
    masks: Masks,
    kernel: Kernel | None = None,
) -> Tensor:
    r"""Attention with scores $s\,q^{(1)}_i k^{(1)}_j$ where $|i - j| < w$, and those of the far tensors beyond.

    Args:
        near: $q^{(1)}$, shape `(B, H, M, D)`, whose rows are the last of `N` slots, and $k^{(1)}$, `(B, H_kv, N, D)`.
        far: queries for far keys to the left, and to the right (None if causal), and far keys; None if $w \ge N$.
        value: shape `(B, H_kv, N, E)`.
        window: $w \ge 1$.
        scale: $s$.
        is_causal: whether keys to the right are hidden.
        masks: what else is hidden, and where keys are.
        kernel: None: the one that there is.
    """
    query, key = near
    left, right, far_key = (None, None, None) if far is None else far
    if kernel is None:
        kernel = kernel_of(query, value)
    channels = value.shape[-1]
    tensors = [query, key, left, right, far_key, value]
    width = max(channels, query.shape[-1])
    if kernel == "cuda":
        width += -width % 8
    if kernel != "portable" and not width == channels == query.shape[-1]:
        # The kernel has one size; channels of zeros change neither scores nor the other values.
        tensors = [None if x is None else nn.functional.pad(x, (0, width - x.shape[-1])) for x in tensors]
    if kernel == "portable" and is_low_precision(query.dtype):
        tensors = [None if x is None else x.float() for x in tensors]
    if not torch.compiler.is_compiling() and any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        # The operator would give tangents of 0.
        raise RuntimeError("attention in bands has no forward-mode derivative; use backend='reference'")
    given = masks.key_padding_mask, masks.cu_seqlens, masks.attn_mask, masks.positions
    if masks.positions is None:
        window = min(window, key.shape[2])
    out = _forward(*tensors, *given, is_causal, window, scale, kernel)[0].to(query.dtype)
    return out if out.shape[-1] == channels else out[..., :channels]


# Places among the six tensors: near query and key, queries to the left and right, far key, value.
_QUERIES = (0, 2, 3)
_PLACES = {"near": (0, 1), "left": (2, 4), "right": (3, 4)}
_VALUE = 5


@torch.library.custom_op("danlu::banded_attention", mutates_args=())
def _forward(
    near_query: Tensor,
    near_key: Tensor,
    left_query: Tensor | None,
    right_query: Tensor | None,
    far_key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
    positions: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    tensors = _filled(near_query, near_key, left_query, right_query, far_key, value)
    out, total = _like_out(near_query, value)
    masks = Masks(key_padding_mask, cu_seqlens, attn_mask, positions)
    plan = Plan(kernel, scale, window, is_causal)
    for job in jobs(near_query.shape[2], near_key.shape[2], masks, spans=kernel != "portable"):
        given = _taken(tensors, job, masks)
        part, part_total = (_part(x, job.samples, job.rows) for x in (out, total))
        for call, mask in _planned(job, masks, plan, near_query):
            query, key = _PLACES[call.band]
            found = forward(
                call,
                given[query][:, :, call.rows],
                given[key][:, :, call.keys],
                given[_VALUE][:, :, call.keys],
                mask,
                plan,
            )
            _merge(part[:, :, call.rows], part_total[:, :, call.rows], *found)
        _put(out, part, job.samples, job.rows)
        _put(total, part_total, job.samples, job.rows)
    return out, total


@torch.library.custom_op("danlu::banded_attention_backward", mutates_args=())
def _backward(
    near_query: Tensor,
    near_key: Tensor,
    left_query: Tensor | None,
    right_query: Tensor | None,
    far_key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    is_causal: bool,
    window: int,
    scale: float,
    kernel: str,
) -> list[Tensor]:
    """Gradients of the six tensors; those of absent ones are empty."""
    tensors = _filled(near_query, near_key, left_query, right_query, far_key, value)
    grads: list[Tensor | None] = [None] * len(tensors)
    masks = Masks(key_padding_mask, cu_seqlens, attn_mask, positions)
    plan = Plan(kernel, scale, window, is_causal)
    # A row that sees nothing has weights of 0, and not exp(-inf + inf).
    total = total.masked_fill(total == -math.inf, 0.0)
    for job in jobs(near_query.shape[2], near_key.shape[2], masks, spans=kernel != "portable"):
        given = _taken(tensors, job, masks)
        of_rows = [_part(x, job.samples, job.rows) for x in (upstream, out, total)]
        parts: list[Tensor | None] = [None] * len(tensors)
        for call, mask in _planned(job, masks, plan, near_query):
            query, key = _PLACES[call.band]
            found = backward(
                call,
                [x[:, :, call.rows] for x in of_rows],
                given[query][:, :, call.rows],
                given[key][:, :, call.keys],
                given[_VALUE][:, :, call.keys],
                mask,
                plan,
            )
            # One after the other out of the list, so that a large one is gone before the next is taken in.
            for place, where in ((_VALUE, call.keys), (key, call.keys), (query, call.rows)):
                parts[place] = _added(parts[place], found.pop(), where, given[place])
        for i, part in enumerate(parts):
            place = job.rows if i in _QUERIES else job.keys
            if part is not None:
                grads[i] = _added(grads[i], part, place, tensors[i], job.samples)
    # A compiler relies on the strides that the fake promises; a kernel has its own.
    return [
        (torch.zeros_like(x) if grad is None else grad).contiguous() for x, grad in zip(tensors, grads, strict=True)
    ]


def _added(total: Tensor | None, part: Tensor, where: slice, like: Tensor, samples: Tensor | None = None) -> Tensor:
    """Take a part of a gradient in; the first one that is whole becomes the gradient."""
    if total is None:
        if part.shape == like.shape and samples is None:
            return part
        total = torch.zeros_like(like)
    if samples is None:
        total[:, :, where] += part
    else:
        total[samples, :, where] += part
    return total


def _planned(job: Job, masks: Masks, plan: Plan, like: Tensor) -> Iterator[tuple[Call, Tensor | None]]:
    """The calls of a job and their additive masks."""
    rows, keys = job.rows.stop - job.rows.start, job.keys.stop - job.keys.start
    window, is_causal = plan.window, plan.is_causal
    if not job.masked and plan.kernel == "cuda":
        yield from ((call, None) for call in band_calls(rows, keys, window, is_causal, windows=True))
        return
    if not job.masked and plan.kernel == "cpu":
        mask = additive(tile_mask(window, is_causal, like.device), like.dtype)
        for call in band_calls(rows, keys, window, is_causal):
            high, width = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
            yield call, mask[:high, call.mask_from : call.mask_from + width] if call.shape == "tile" else None
        return
    for call in tile_calls(rows, keys, window, is_causal, masks.positions):
        shown = masks if job.masked else Masks()
        visible, bias = call_mask(call, rows, keys, window, is_causal, shown, like.device), call_bias(call, shown)
        if like.device.type == "cpu":
            # Looking is free here, and skips what is hidden altogether.
            if not bool(visible.any()):
                continue
            if bias is None and bool(visible.all()):
                yield call, None
                continue
        yield call, additive(visible, like.dtype, bias)


def _filled(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors, and one without dimensions to speak of for each that is absent."""
    return [torch.empty(0) if x is None else x for x in tensors]


def _taken(tensors: list[Tensor], job: Job, masks: Masks) -> list[Tensor]:
    """What a job needs of the six tensors, without the contents of padding if its calls must look at it."""
    found = []
    for i, tensor in enumerate(tensors):
        if tensor.ndim == 1:
            found.append(tensor)
            continue
        part = _part(tensor, job.samples, job.rows if i in _QUERIES else job.keys)
        if job.masked and masks.key_padding_mask is not None:
            part = without_padding(part, masks.key_padding_mask[:, -part.shape[2] :])
        found.append(part)
    return found


def _part(tensor: Tensor, samples: Tensor | None, place: slice) -> Tensor:
    """A view, or a copy of some samples."""
    return tensor[:, :, place] if samples is None else tensor[samples, :, place]


def _put(tensor: Tensor, part: Tensor, samples: Tensor | None, place: slice) -> None:
    """Write back what was a copy."""
    if samples is not None and tensor.ndim > 1:
        tensor[samples, :, place] = part


def _like_out(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_full(query.shape[:3], -math.inf, dtype=wide)


@_forward.register_fake
def _(
    near_query: Tensor,
    near_key: Tensor,
    left_query: Tensor | None,
    right_query: Tensor | None,
    far_key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
    positions: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return _like_out(near_query, value)


@_backward.register_fake
def _(
    near_query: Tensor,
    near_key: Tensor,
    left_query: Tensor | None,
    right_query: Tensor | None,
    far_key: Tensor | None,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    is_causal: bool,
    window: int,
    scale: float,
    kernel: str,
) -> list[Tensor]:
    tensors = _filled(near_query, near_key, left_query, right_query, far_key, value)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.options = inputs[10:]


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    found = _backward(*given, grad, *ctx.options)
    grads = (None if x is None else g for x, g in zip(given[:6], found, strict=True))
    return (*grads, None, None, None, None, None, None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention in bands has no second derivative; use backend='reference'")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)


def _merge(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Take a band into the output and its log-sum-exp, which is -inf where nothing has been seen yet."""
    merged = torch.logaddexp(total, part_total)
    # Where neither has seen anything both shares are 0.
    level = merged.masked_fill(merged == -math.inf, 0.0)
    seen = (total - level).exp_()[..., None].to(out.dtype)
    fresh = (part_total - level).exp_()[..., None].to(out.dtype)
    out.mul_(seen).addcmul_(fresh, part)
    total.copy_(merged)
