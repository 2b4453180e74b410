r"""The weights of softmax attention as matrices, to be looked at.

Source: Vaswani et al. (2017), arXiv 1706.03762, equation 1.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `n` slots; `d` head size.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_real, check_same_device
from danlu.attention import attention_mask

__all__ = ["attention_weights"]

Kind = Literal["causal", "backward", "bidirectional", "prefix", "forward_backward"]


@torch.no_grad()
def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    kind: Kind = "causal",
    prefix_lengths: Tensor | int | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""The matrices of softmax attention under a mask of a kind, for the diagnostics of this family.

    Definition:
        $$A_{ij} = \operatorname{softmax}_j(s\,q_i^\top k_j)$$
        over the keys that query $i$ sees by [`attention_mask`][danlu.attention.attention_mask] of `kind`, and 0 beyond.

    Args:
        query: shape `(B, H, n, d)`, with whatever rotation the model gives it.
        key: shape `(B, H_kv, n, d)`; each key head serves `H / H_kv` consecutive query heads.
        kind: "causal", "backward", "bidirectional", "prefix" or "forward_backward".
        prefix_lengths: as in `attention_mask`.
        scale: $s$; None means $d^{-1/2}$.

    Returns:
        Shape `(B, H, n, n)`, float32, or float64 for float64 inputs.

    Raises:
        TypeError: not floating tensors of one dtype, `scale` is no number, or prefixes that are no integers.
        ValueError: shapes or devices that do not fit, an unknown `kind`, or an option that it needs or does not have.

    Numerics:
        Half inputs are computed in float32.

    Cost:
        $B H n^2$ elements, three times over: a tool for looking, not for models.

    Source:
        Vaswani et al. (2017), arXiv 1706.03762, equation 1.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import attention_rank_report, attention_weights
        >>> query, key = torch.randn(2, 1, 4, 32, 8, generator=torch.Generator().manual_seed(0))
        >>> weights = attention_weights(query, key, kind="causal")
        >>> attention_rank_report(weights).log_det.shape
        torch.Size([1, 4])
    """
    for name, tensor in (("query", query), ("key", key)):
        check_floating(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, n, d), got {tuple(tensor.shape)}")
    check_same_device(query=query, key=key)
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must have one dtype, got {query.dtype}, {key.dtype}")
    heads, count = query.shape[1:3]
    same = query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:]
    if not same or key.shape[1] == 0 or heads % key.shape[1]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        raise ValueError(f"all but the number of heads must agree, and that of queries be a multiple, got {shapes}")
    factor = query.shape[-1] ** -0.5 if scale is None else check_real("scale", scale)
    turns = heads if kind == "forward_backward" else None
    mask = attention_mask(kind, count, prefix_lengths=prefix_lengths, num_heads=turns, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(device_type=query.device.type, enabled=False):
        grown = key.to(wide).repeat_interleave(heads // key.shape[1], 1)
        scores = query.to(wide) * factor @ grown.transpose(-2, -1)
    if mask.attn_mask is not None:
        scores = scores.masked_fill(~mask.attn_mask, -math.inf)
    elif mask.is_causal:
        hidden = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1)
