r"""Attention of one call, with its log-sum-exp, and the gradients from a given output and log-sum-exp.

A backward gets the output and log-sum-exp of the *whole* softmax row, of which the call is a part, and returns the
part's share of the gradients.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads; `T` rows and `S` keys of the call; `D` head size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import is_low_precision
from danlu.attention import _band_cuda
from danlu.attention._band_calls import Call
from danlu.attention._masks import grouped_matmul

__all__ = ["Kernel", "Plan", "additive", "backward", "forward", "kernel_of"]

Kernel = Literal["cpu", "cuda", "portable"]


@dataclass(frozen=True)
class Plan:
    """What all calls share: the kernel, the factor of the scores, and the band's shape."""

    kernel: str
    scale: float
    window: int
    is_causal: bool

    def portable(self, call: Call) -> bool:
        """Whether plain PyTorch runs: where there is no kernel, or none that takes a mask."""
        return self.kernel == "portable" or (self.kernel == "cuda" and call.shape == "masked")


def kernel_of(query: Tensor, value: Tensor) -> Kernel:
    """Which kernel hands out and takes log-sum-exps for these tensors; "portable" is plain PyTorch."""
    if query.device.type == "cpu" and query.dtype in _CPU_DTYPES:
        return "cpu"
    return "cuda" if query.device.type == "cuda" and _band_cuda.why_not(query, value) is None else "portable"


_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forward(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, -inf where nothing is visible; `mask` is additive, with two or four dimensions."""
    scale = plan.scale
    if plan.portable(call):
        return _portable_forward(query, key, value, mask, scale)
    if plan.kernel == "cuda":
        return _band_cuda.forward(call, query, key, value, scale, plan.window, plan.is_causal)
    if call.shape == "mirrored":
        parts = [_flash(some, None, True, scale) for some in _mirrored_heads([query, key, value])]
        out, total = (torch.cat(x, 1).flip(2) for x in zip(*parts, strict=True))
        return out, total
    out, total = _flash([query, key, value], mask, call.shape == "causal", scale)
    if mask is not None and call.shape == "masked":
        # The kernel says 0 there.
        total = total.masked_fill(mask.amax(-1) == -math.inf, -math.inf)
    return out, total


def backward(
    call: Call,
    of_rows: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: Plan,
) -> list[Tensor]:
    """Gradients of query, key and value; `of_rows`: upstream gradient, output, log-sum-exp, which must be finite."""
    upstream, out, total = of_rows
    scale = plan.scale
    if plan.portable(call):
        return _portable_backward(upstream, query, key, value, out, total, mask, scale)
    if plan.kernel == "cuda":
        return _band_cuda.backward(call, of_rows, query, key, value, scale, plan.window, plan.is_causal)
    tensors = [upstream, query, key, value, out, total]
    if call.shape != "mirrored":
        return _flash_backward(tensors, mask, call.shape == "causal", scale)
    parts = [_flash_backward(some, None, True, scale) for some in _mirrored_heads(tensors)]
    return [torch.cat(x, 1).flip(2) for x in zip(*parts, strict=True)]


def _flash(tensors: list[Tensor], mask: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Of query, key and value."""
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *tensors, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, total


def _flash_backward(tensors: list[Tensor], mask: Tensor | None, is_causal: bool, scale: float) -> list[Tensor]:
    """Of upstream gradient, query, key, value, output and log-sum-exp."""
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return list(grads)


def _mirrored_heads(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors of each key head with their slots in reverse, one head's copies at a time."""
    count = min(x.shape[1] for x in tensors)
    for some in zip(*(x.chunk(count, 1) for x in tensors), strict=True):
        yield [x.flip(2) for x in some]


def additive(visible: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Minus infinity where hidden, else `bias` or 0."""
    if bias is None:
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)
    # The kernel adds float32 to scores of half inputs, whose own dtype would round the bias.
    return torch.where(visible, bias.to(torch.promote_types(dtype, torch.float32)), -math.inf)


def _portable_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, on any device, with the scores of the call in memory."""
    dtype = query.dtype
    query, key, value = _wide([query, key, value])
    scores = _scores(query, key, mask, scale)
    total = scores.logsumexp(-1)
    level = total.masked_fill(total == -math.inf, 0.0)
    return grouped_matmul((scores - level[..., None]).exp_(), value).to(dtype), total


def _portable_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    mask: Tensor | None,
    scale: float,
) -> list[Tensor]:
    dtype = query.dtype
    upstream, query, key, value, out = _wide([upstream, query, key, value, out])
    weights = (_scores(query, key, mask, scale) - total[..., None]).exp_()
    inner = grouped_matmul(upstream, value.transpose(-2, -1)) - (upstream * out).sum(-1, keepdim=True)
    inner = inner * weights * scale
    heads = key.shape[1]
    grads = grouped_matmul(inner, key), _over_rows(inner, query, heads), _over_rows(weights, upstream, heads)
    return [grad.to(dtype) for grad in grads]


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """Half inputs in float32."""
    return [x.float() if is_low_precision(x.dtype) else x for x in tensors]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = grouped_matmul(query * scale, key.transpose(-2, -1))
    return scores if mask is None else scores + mask


def _over_rows(pairs: Tensor, of_rows: Tensor, heads: int) -> Tensor:
    """Sums over the rows of all heads that share a key head: (B, H, T, S), (B, H, T, D) -> (B, H_kv, S, D)."""
    batch, shared = pairs.shape[0], pairs.shape[1] // heads
    pairs = pairs.reshape(batch, heads, shared * pairs.shape[2], pairs.shape[3])
    of_rows = of_rows.reshape(batch, heads, shared * of_rows.shape[2], of_rows.shape[3])
    with torch.autocast(device_type=pairs.device.type, enabled=False):
        return pairs.transpose(-2, -1) @ of_rows
