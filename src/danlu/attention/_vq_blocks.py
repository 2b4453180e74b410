r"""Attention on quantized keys in blocks: near blocks pair by pair, all others through one entry per codeword.

The softmax of a row over near keys and cached codewords is the mean of the parts' softmaxes, weighted by their sums of
exponentials. The backward does not go through that mean: with the merged output and log-sum-exp, the backward of a part
gives its share of the gradients (see `danlu.attention._bands`). The forward may use fewer near blocks than the
backward, since a quantized key scores the same in both places; only its gradient differs.

With a window, queries and keys have twice the channels: first as they are for pairs within it (rotated by their
places), then as they are for pairs beyond (rotated by the window, and not at all).

Shape letters: `B` batch; `H` query heads; `G` key heads; `K` blocks of keys; `R` blocks of queries, the last of them;
`P` tokens of a block; `D` head size; `E` value size; `S` codewords; `Q` = `D`, or `2D` with a window.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu.attention._vq_calls import Call, calls, distance_index, near_offsets

__all__ = ["Cache", "blockwise_attention"]


class Cache(NamedTuple):
    """Codewords as keys: mean values `(B, G, R', S, E)` and logarithms of counts `(B, G, R', S)`.

    Entry `r` serves the block of queries that is as far from the last one.
    """

    values: Tensor
    logs: Tensor


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    *,
    cache: Cache,
    far: Cache,
    bias: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    """Attention output, shape `(B, H, R, P, E)`.

    Args:
        query: `(B, H, R, P, Q)`.
        key: quantized keys, `(B, G, K, P, Q)`; they get the gradients of near pairs.
        value: `(B, G, K, P, E)`; likewise.
        codebook: `(G, S, D)`, no gradient.
        cache: what the forward uses beside its near blocks (see `near_offsets`), no gradient.
        far: the part of it beyond the near blocks of the backward; its values get gradients.
        bias: scores by distance, `(H, W)`: entry `t` is for distance `t` if causal, else `t - W // 2`.
        seen: bool `(B, K, P)`, False for keys that nobody sees; None if all are seen.
        is_causal: whether tokens see only themselves and earlier ones.
        window: distance from which on pairs use the second half of the channels, at most `P + 1`; 0 if there is none.
        scale: factor of the scores.
    """
    return _forward(query, key, value, codebook, *cache, *far, bias, seen, is_causal, window, scale)[0]


def _take(tensor: Tensor, call: Call, blocks: slice) -> Tensor:
    """Of a tensor with key heads: `(samples * G, blocks, P, ...)`, a view."""
    return tensor[call.samples, :, blocks].flatten(0, 1)


def _group(tensor: Tensor, key_heads: int, call: Call) -> Tensor:
    """The same of a tensor with query heads."""
    return tensor.unflatten(1, (key_heads, -1))[call.samples, :, call.group, call.rows].flatten(0, 1)


def _channels(tensor: Tensor, codebook: Tensor, call: Call) -> Tensor:
    """The channels that the pairs of a call use, a view."""
    size = codebook.shape[-1]
    return tensor[..., size : 2 * size] if call.beyond else tensor[..., :size]


def _codewords(codebook: Tensor, call: Call) -> Tensor:
    copies = call.samples.stop - call.samples.start
    words = codebook if copies == 1 else codebook.repeat(copies, 1, 1)
    return words[:, None].expand(-1, call.keys.stop - call.keys.start, -1, -1)


def _use_flash(codebook: Tensor, value: Tensor) -> bool:
    return value.device.type == "cpu" and codebook.shape[-1] == value.shape[-1]


@torch.library.custom_op("danlu::vq_blockwise_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    cache_values: Tensor,
    cache_logs: Tensor,
    far_values: Tensor,
    far_logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    out, total = _like_out(query, value)
    flash = _use_flash(codebook, value)
    offsets = near_offsets(is_causal, bias is not None or window > 0, False)
    started = False
    for call in calls(query, key, cache_logs, bias, seen, is_causal, window, offsets, flash):
        near = call.offset is not None
        rows = _channels(_group(query, key.shape[1], call), codebook, call)
        keys = _channels(_take(key, call, call.keys), codebook, call) if near else _codewords(codebook, call)
        values = _take(value if near else cache_values, call, call.keys)
        part, part_total = (_flash if flash else _plain)(rows, keys, values, call.mask, call.is_causal, scale)
        if call.mask is not None:
            # The kernel gives 0 where a row sees nothing.
            nothing = (call.mask.amax(-1) == -math.inf).expand(part_total.shape)
            part_total = part_total.masked_fill(nothing, -math.inf)
        _merge(_group(out, key.shape[1], call), _group(total, key.shape[1], call), part, part_total)
        started = True
    if not started:
        return out.zero_(), total.zero_()
    # A row that sees nothing: 0 makes the weights of the backward exp(-inf - 0) = 0.
    return out, total.masked_fill_(total == -math.inf, 0.0)


def _like_out(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    shape = query.shape[:4]
    return query.new_zeros(*shape, value.shape[-1]), query.new_full(shape, -math.inf)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=_expanded(mask, query, key), scale=scale
    )


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*query.shape[:3], key.shape[2])


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    scores = (query * scale) @ key.mT
    if mask is not None:
        scores = scores + mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill_(later, -math.inf)
    return scores


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, mask, is_causal, scale)
    total = scores.logsumexp(-1)
    # Where nothing is seen the weights are 0 and not exp(-inf + inf).
    weights = scores.sub_(total.masked_fill(total == -math.inf, 0.0)[..., None]).exp_()
    return weights @ value, total


def _merge(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Take a part into the output and its log-sum-exp, which is -inf where nothing has been seen yet."""
    merged = torch.logaddexp(total, part_total)
    # Where neither has seen anything the weights are exp(-inf - 0) = 0.
    base = merged.masked_fill(merged == -math.inf, 0.0)
    seen, fresh = (total - base).exp_()[..., None], (part_total - base).exp_()[..., None]
    out.mul_(seen).addcmul_(fresh, part)
    total.copy_(merged)


@torch.library.custom_op("danlu::vq_blockwise_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    far_values: Tensor,
    far_logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    is_causal: bool,
    window: int,
    scale: float,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, far values, and the bias (empty if it does not learn)."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, far_values)]
    bias_grad = _bias_like(query, bias, bias_learns)
    flash = _use_flash(codebook, value)
    offsets = near_offsets(is_causal, bias is not None, True)
    near_flash = flash and not bias_learns
    heads = key.shape[1]
    # The flash backward has no gradient of its mask.
    todo = [
        (call, near_flash)
        for call in calls(query, key, far_logs[:, :, :0], bias, seen, is_causal, window, offsets, near_flash)
    ]
    todo += [(call, flash) for call in calls(query, key, far_logs, bias, seen, is_causal, window, (), flash)]
    for call, kernel in todo:
        near = call.offset is not None
        rows = _channels(_group(query, heads, call), codebook, call)
        keys = _channels(_take(key, call, call.keys), codebook, call) if near else _codewords(codebook, call)
        values = _take(value if near else far_values, call, call.keys)
        given, sums, logs = (_group(x, heads, call) for x in (upstream, out, total))
        if kernel:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                given,
                rows,
                keys,
                values,
                sums,
                logs,
                0.0,
                call.is_causal,
                attn_mask=_expanded(call.mask, rows, keys),
                scale=scale,
            )
        else:
            weights = _scores(rows, keys, call.mask, call.is_causal, scale).sub_(logs[..., None]).exp_()
            inner = (given * sums).sum(-1, keepdim=True)
            by_pair = (given @ values.mT).sub_(inner).mul_(weights)
            # Codewords have no gradient.
            key_part = (by_pair.mT @ rows).mul_(scale) if near else by_pair
            parts = ((by_pair @ keys).mul_(scale), key_part, weights.mT @ given)
            if near and bias_learns:
                _add_bias_grad(bias_grad, by_pair, call, heads, is_causal)
        _channels(_group(grads[0], heads, call), codebook, call).add_(parts[0])
        if near:
            _channels(_take(grads[1], call, call.keys), codebook, call).add_(parts[1])
        _take(grads[2] if near else grads[3], call, call.keys).add_(parts[2])
        # Not held beside those of the next call.
        del parts
    return grads[0], grads[1], grads[2], grads[3], bias_grad


def _bias_like(query: Tensor, bias: Tensor | None, learns: bool) -> Tensor:
    return torch.zeros_like(bias) if bias is not None and learns else query.new_zeros(0)


def _add_bias_grad(grad: Tensor, by_pair: Tensor, call: Call, key_heads: int, is_causal: bool) -> None:
    """Sum the gradients of scores over samples, blocks, and pairs of one distance."""
    size = by_pair.shape[-1]
    summed = by_pair.unflatten(0, (-1, key_heads)).sum((0, 2)).flatten(1)
    offset = call.offset or 0
    index = distance_index(size, offset, grad.shape[1], is_causal, grad.device).flatten()
    grad.unflatten(0, (key_heads, -1))[:, call.group].index_add_(1, index, summed)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    cache_values: Tensor,
    cache_logs: Tensor,
    far_values: Tensor,
    far_logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like_out(query, value)


@_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    far_values: Tensor,
    far_logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    out: Tensor,
    total: Tensor,
    upstream: Tensor,
    is_causal: bool,
    window: int,
    scale: float,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, far_values)
    )
    return first, second, third, fourth, _bias_like(query, bias, bias_learns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, codebook, _, _, far_values, far_logs, bias, seen, *options = inputs
    ctx.is_causal, ctx.window, ctx.scale = options
    ctx.save_for_backward(query, key, value, codebook, far_values, far_logs, bias, seen, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    bias_learns = ctx.needs_input_grad[8]
    grads = _backward(*ctx.saved_tensors, grad.contiguous(), ctx.is_causal, ctx.window, ctx.scale, bias_learns)
    last = grads[4] if bias_learns else None
    return (*grads[:3], None, None, None, grads[3], None, last, None, None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention in blocks has no second derivative; use backend='reference'")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)
