r"""Attention on quantized keys in blocks: near blocks pair by pair, all others through one entry per codeword.

The softmax of a row over near keys and cached codewords is the mean of the parts' softmaxes, weighted by their sums of
exponentials. The backward does not go through that mean: with the merged output and log-sum-exp, the backward of a part
gives its share of the gradients (see `danlu.attention._bands`). The forward may use fewer near blocks than the
backward, since a quantized key scores the same in both places; only its gradient differs.

Shape letters: `B` batch; `H` query heads; `G` key heads; `K` blocks of keys; `R` blocks of queries, the last of them;
`P` tokens of a block; `D` head size; `E` value size; `S` codewords.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Cache", "blockwise_attention"]

# Elements that a call makes at a time, scores in the plain form, gradients with a flash kernel: they fit the cache of a
# core, or feed a GPU.
_HELD = {"cpu": 2**20}
_HELD_ELSEWHERE = 2**26


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
    scale: float,
) -> Tensor:
    """Attention output, shape `(B, H, R, P, E)`.

    Args:
        query: `(B, H, R, P, D)`.
        key: quantized keys, `(B, G, K, P, D)`; they get the gradients of near pairs.
        value: `(B, G, K, P, E)`; likewise.
        codebook: `(G, S, D)`, no gradient.
        cache: what the forward uses beside its near blocks (see `_offsets`), no gradient.
        far: the part of it beyond the near blocks of the backward; its values get gradients.
        bias: scores by distance, `(H, W)`: entry `t` is for distance `t` if causal, else `t - W // 2`.
        seen: bool `(B, K, P)`, False for keys that nobody sees; None if all are seen.
        is_causal: whether tokens see only themselves and earlier ones.
        scale: factor of the scores.
    """
    return _forward(query, key, value, codebook, *cache, *far, bias, seen, is_causal, scale)[0]


def _offsets(is_causal: bool, with_bias: bool, backward: bool) -> tuple[int, ...]:
    """Near blocks of keys, relative to that of the queries."""
    if with_bias or backward:
        return (0, -1) if is_causal else (0, -1, 1)
    return (0,) if is_causal else ()


class _Call(NamedTuple):
    """A part of the work for a kernel: 4-dimensional views of rows and keys, and how to add to the gradients."""

    samples: slice
    group: int
    rows: slice
    keys: slice
    # Additive, broadcastable to the scores.
    mask: Tensor | None
    is_causal: bool
    offset: int | None


def _calls(
    query: Tensor,
    key: Tensor,
    logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    offsets: tuple[int, ...],
    flash: bool,
) -> Iterator[_Call]:
    """The calls that cover the near blocks at `offsets`, and the codewords."""
    batch, heads, rows, size, _ = query.shape
    blocks, key_heads = key.shape[2], key.shape[1]
    first = blocks - rows
    for group in range(heads // key_heads):
        for offset in offsets:
            low, high = max(0, -offset - first), min(rows, blocks - offset - first)
            table = None if bias is None else _table(bias, size, offset, is_causal)
            table = None if table is None else table.unflatten(0, (key_heads, -1))[:, group, None]
            masked = not flash or (table is not None and seen is not None)
            per_sample = key_heads * size * (size if masked else query.shape[-1]) * (high - low)
            for samples, part in _pieces(batch, low, high, per_sample, query.device):
                keys = slice(part.start + first + offset, part.stop + first + offset)
                mask = None if table is None else table.repeat(samples.stop - samples.start, 1, 1, 1)
                if seen is not None:
                    hidden = _hide(seen[samples, None, keys], query.dtype)
                    hidden = hidden.expand(-1, key_heads, -1, -1, -1).flatten(0, 1)
                    mask = hidden if mask is None else mask + hidden
                yield _Call(samples, group, part, keys, mask, is_causal and offset == 0, offset)
        count = logs.shape[2]
        per_sample = key_heads * logs.shape[3] * (query.shape[-1] if flash else size) * count
        for samples, part in _pieces(batch, 0, count, per_sample, query.device):
            shift = rows - count
            mask = logs[samples, :, part, None].flatten(0, 1)
            yield _Call(samples, group, slice(part.start + shift, part.stop + shift), part, mask, False, None)


def _pieces(batch: int, low: int, high: int, per_sample: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Samples and blocks that come in one call: several samples with all blocks, or one with some of them."""
    if low >= high:
        return
    limit = _HELD.get(device.type, _HELD_ELSEWHERE)
    many = min(batch, limit // max(1, per_sample)) or 1
    step = high - low if many * per_sample <= limit else max(1, (high - low) * limit // per_sample)
    for sample in range(0, batch, many):
        for start in range(low, high, step):
            yield slice(sample, min(sample + many, batch)), slice(start, min(start + step, high))


def _hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[..., None, :]


def _distance_index(size: int, offset: int, width: int, is_causal: bool, device: torch.device) -> Tensor:
    slots = torch.arange(size, device=device)
    distance = slots[:, None] - slots - offset * size
    # Negative distances are hidden where attention is causal.
    return distance.clamp_min(0) if is_causal else distance + width // 2


def _table(bias: Tensor, size: int, offset: int, is_causal: bool) -> Tensor:
    """Bias of every pair of a block of queries and one of keys, `(H, P, P)`."""
    return bias[:, _distance_index(size, offset, bias.shape[1], is_causal, bias.device)]


def _take(tensor: Tensor, call: _Call, blocks: slice) -> Tensor:
    """Of a tensor with key heads: `(samples * G, blocks, P, ...)`, a view."""
    return tensor[call.samples, :, blocks].flatten(0, 1)


def _group(tensor: Tensor, key_heads: int, call: _Call) -> Tensor:
    """The same of a tensor with query heads."""
    return tensor.unflatten(1, (key_heads, -1))[call.samples, :, call.group, call.rows].flatten(0, 1)


def _codewords(codebook: Tensor, call: _Call) -> Tensor:
    copies = call.samples.stop - call.samples.start
    words = codebook if copies == 1 else codebook.repeat(copies, 1, 1)
    return words[:, None].expand(-1, call.keys.stop - call.keys.start, -1, -1)


def _use_flash(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


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
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    out, total = _like_out(query, value)
    flash = _use_flash(query, value)
    offsets = _offsets(is_causal, bias is not None, False)
    started = False
    for call in _calls(query, key, cache_logs, bias, seen, is_causal, offsets, flash):
        near = call.offset is not None
        rows = _group(query, key.shape[1], call)
        keys = _take(key, call, call.keys) if near else _codewords(codebook, call)
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
    scale: float,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, far values, and the bias (empty if it does not learn)."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, far_values)]
    bias_grad = _bias_like(query, bias, bias_learns)
    flash = _use_flash(query, value)
    offsets = _offsets(is_causal, bias is not None, True)
    near_flash = flash and not bias_learns
    heads = key.shape[1]
    # The flash backward has no gradient of its mask.
    todo = [
        (call, near_flash)
        for call in _calls(query, key, far_logs[:, :, :0], bias, seen, is_causal, offsets, near_flash)
    ]
    todo += [(call, flash) for call in _calls(query, key, far_logs, bias, seen, is_causal, (), flash)]
    for call, kernel in todo:
        near = call.offset is not None
        rows = _group(query, heads, call)
        keys = _take(key, call, call.keys) if near else _codewords(codebook, call)
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
        _group(grads[0], heads, call).add_(parts[0])
        if near:
            _take(grads[1], call, call.keys).add_(parts[1])
        _take(grads[2] if near else grads[3], call, call.keys).add_(parts[2])
        # Not held beside those of the next call.
        del parts
    return grads[0], grads[1], grads[2], grads[3], bias_grad


def _bias_like(query: Tensor, bias: Tensor | None, learns: bool) -> Tensor:
    return torch.zeros_like(bias) if bias is not None and learns else query.new_zeros(0)


def _add_bias_grad(grad: Tensor, by_pair: Tensor, call: _Call, key_heads: int, is_causal: bool) -> None:
    """Sum the gradients of scores over samples, blocks, and pairs of one distance."""
    size = by_pair.shape[-1]
    summed = by_pair.unflatten(0, (-1, key_heads)).sum((0, 2)).flatten(1)
    offset = call.offset or 0
    index = _distance_index(size, offset, grad.shape[1], is_causal, grad.device).flatten()
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
    scale: float,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, far_values)
    )
    return first, second, third, fourth, _bias_like(query, bias, bias_learns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, codebook, _, _, far_values, far_logs, bias, seen, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, codebook, far_values, far_logs, bias, seen, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    bias_learns = ctx.needs_input_grad[8]
    grads = _backward(*ctx.saved_tensors, grad.contiguous(), ctx.is_causal, ctx.scale, bias_learns)
    last = grads[4] if bias_learns else None
    return (*grads[:3], None, None, None, grads[3], None, last, None, None, None)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention in blocks has no second derivative; use backend='reference'")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)
