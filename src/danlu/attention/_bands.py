r"""Causal attention in two bands with stock flash kernels: near keys with one rotation, far keys with another.

A softmax row over near and far keys is the mean of the two bands' softmaxes, weighted by their sums of exponentials.
The near band is sliding-window attention; the far band, keys at a distance of at least the window, is square causal
attention of queries shifted by the window. No pair is scored twice and no matrix of scores is held.

The backward does not go through that mean: a flash backward recomputes the weights as $e^{S - \ell}$ from the
log-sum-exp that it is given. Given the merged $\ell$ and output it returns the band's share of all gradients.

Shape letters: as in `danlu.attention._rerope`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["banded_attention", "visible_spans", "why_not_banded"]

# Query rows of a tile of the near band. The keys of a tile reach over window + TILE - 1 slots, of which a row needs
# `window`; small tiles waste less, and below 32 the calls cost more than they save.
_TILE = 64


def why_not_banded(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if query.device.type != "cpu":
        return f"there is no banded kernel for device {query.device.type!r}"
    if query.shape[-1] != value.shape[-1]:
        return f"the head size of value, {value.shape[-1]}, is not that of query, {query.shape[-1]}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"dtype {query.dtype} is not supported"
    return None


def visible_spans(key_padding_mask: Tensor) -> dict[tuple[int, int], Tensor] | None:
    """First visible slot and the one behind the last -> samples; None if the visible slots of a sample have gaps."""
    slots = torch.arange(key_padding_mask.shape[1], device=key_padding_mask.device)
    count = key_padding_mask.sum(1)
    last = torch.where(key_padding_mask, slots + 1, 0).amax(1)
    first = torch.where(key_padding_mask, slots, len(slots)).amin(1).minimum(last)
    if bool((last - first != count).any()):
        return None
    pairs, owner = torch.stack((first, last), 1).unique(dim=0, return_inverse=True)
    return {(low, high): (owner == i).nonzero()[:, 0] for i, (low, high) in enumerate(pairs.tolist())}


def banded_attention(
    near_query: Tensor,
    near_key: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    value: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    r"""Causal attention with scores $s\,q^{(1)}_i k^{(1)}_j$ where $i - j < w$, and $s\,q^{(2)}_i k^{(2)}_j$ beyond.

    Args:
        near_query: $q^{(1)}$, shape `(B, H, M, D)`; queries are the last `M` of `N` slots.
        near_key: $k^{(1)}$, shape `(B, H_kv, N, D)`.
        far_query: $q^{(2)}$, shape of `near_query`.
        far_key: $k^{(2)}$, shape of `near_key`.
        value: shape `(B, H_kv, N, D)`.
        window: $w \ge 1$.
        scale: $s$.
    """
    return _forward(near_query, near_key, far_query, far_key, value, min(window, near_key.shape[2]), scale)[0]


@dataclass(frozen=True)
class _Call:
    """One call of a kernel: a band, its rows and keys, and which of them see each other."""

    far: bool
    rows: slice
    keys: slice
    is_causal: bool
    # Of the keys' first slot behind the start of the tile's reach, where a mask is needed.
    mask_from: int | None = None


def _calls(rows: int, keys: int, window: int) -> Iterator[_Call]:
    """The calls that cover every visible pair once, the far band first.

    `keys` counts all slots; the rows are the last of them.
    """
    offset = keys - rows
    first = offset - window
    if first > 0:
        yield _Call(True, slice(0, rows), slice(0, first), False)
    start = max(0, -first)
    if start < rows:
        yield _Call(True, slice(start, rows), slice(first + start, first + rows), True)
    begin = 0
    if offset == 0:
        begin = min(window, rows)
        yield _Call(False, slice(0, begin), slice(0, begin), True)
    for low in range(begin, rows, _TILE):
        high = min(low + _TILE, rows)
        reach = offset + low - window + 1
        yield _Call(False, slice(low, high), slice(max(0, reach), offset + high), False, max(0, -reach))


def _tile_mask(window: int, like: Tensor) -> Tensor:
    """Additive mask of a tile: row `r` sees the columns `r` to `r + window - 1` of the tile's reach."""
    row = torch.arange(_TILE, device=like.device)[:, None]
    column = torch.arange(_TILE + window - 1, device=like.device)
    hidden = (column < row) | (column >= row + window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


def _masked(call: _Call, mask: Tensor) -> Tensor | None:
    if call.mask_from is None:
        return None
    rows, width = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
    return mask[:rows, call.mask_from : call.mask_from + width]


@torch.library.custom_op("danlu::banded_attention", mutates_args=())
def _forward(
    near_query: Tensor,
    near_key: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    out, total = _like_out(near_query)
    mask = _tile_mask(window, near_query)
    for call in _calls(near_query.shape[2], near_key.shape[2], window):
        query, key = (far_query, far_key) if call.far else (near_query, near_key)
        part, part_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, call.rows],
            key[:, :, call.keys],
            value[:, :, call.keys],
            0.0,
            call.is_causal,
            attn_mask=_masked(call, mask),
            scale=scale,
        )
        _merge(out[:, :, call.rows], total[:, :, call.rows], part, part_total)
    return out, total


def _like_out(query: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.zeros_like(query, memory_format=torch.contiguous_format), query.new_full(
        query.shape[:3], -math.inf, dtype=wide
    )


@torch.library.custom_op("danlu::banded_attention_backward", mutates_args=())
def _backward(
    near_query: Tensor,
    near_key: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both queries, both keys, and the value."""
    queries = {True: torch.zeros_like(far_query), False: torch.zeros_like(near_query)}
    keys = {True: torch.zeros_like(far_key), False: torch.zeros_like(near_key)}
    values = torch.zeros_like(value)
    mask = _tile_mask(window, near_query)
    for call in _calls(near_query.shape[2], near_key.shape[2], window):
        query, key = (far_query, far_key) if call.far else (near_query, near_key)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream[:, :, call.rows],
            query[:, :, call.rows],
            key[:, :, call.keys],
            value[:, :, call.keys],
            out[:, :, call.rows],
            total[:, :, call.rows],
            0.0,
            call.is_causal,
            attn_mask=_masked(call, mask),
            scale=scale,
        )
        queries[call.far][:, :, call.rows] += parts[0]
        keys[call.far][:, :, call.keys] += parts[1]
        values[:, :, call.keys] += parts[2]
    return queries[False], keys[False], queries[True], keys[True], values


@_forward.register_fake
def _(
    near_query: Tensor,
    near_key: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like_out(near_query)


@_backward.register_fake
def _(
    near_query: Tensor,
    near_key: Tensor,
    far_query: Tensor,
    far_key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (near_query, near_key, far_query, far_key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.window, ctx.scale = inputs[5:]


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, grad, ctx.window, ctx.scale), None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention in bands has no second derivative; use backend='reference'")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)


def _merge(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Take a band into the output and its log-sum-exp, which is -inf where nothing has been seen yet."""
    merged = torch.logaddexp(total, part_total)
    seen = (total - merged).exp_()[..., None].to(out.dtype)
    fresh = (part_total - merged).exp_()[..., None].to(out.dtype)
    out.mul_(seen).addcmul_(fresh, part)
    total.copy_(merged)
