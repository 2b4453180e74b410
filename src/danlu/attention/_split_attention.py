r"""Attention of a mask kind as calls that need no mask: whole blocks, causal ones, and causal ones in reverse.

Source: "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17) and its FAQ (2023-03-20).

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `M` queries, the last `M` of `N` slots; `D`
head size; `E` value size.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu._common.checks import check_choice, check_same_device
from danlu.attention._band_calls import Masks
from danlu.attention._band_kernels import kernel_of
from danlu.attention._bands import banded_attention
from danlu.attention._mask_kinds import MaskKind, check_kind, pairs
from danlu.attention._mask_kinds import is_causal as is_causal_kind
from danlu.attention._masks import (
    attend,
    check_attention,
    check_key_padding_mask,
    grouped_matmul,
    without_padding,
)

__all__ = ["split_attention"]

# Rows whose mask over all keys is small beside the keys. For more, rows of zeros in front of them make a square.
_FEW = 128


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kind: MaskKind,
    prefix_lengths: Tensor | int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: Literal["auto", "split", "reference"] = "auto",
) -> Tensor:
    r"""Softmax attention with a mask of a kind, in calls of kernels that skip what is hidden.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j(s\,q_i^\top k_j)\,v_j$$
        over the keys $j$ that query $i$ sees by [`attention_mask`][danlu.attention.attention_mask] of `kind`. It is
        computed as

        - causal: one causal call; backward: one causal call on the reversed text;
        - forward_backward: one causal call on the even heads, and one on the odd heads and the reversed text;
        - prefix: the rows of the prefix see the block of the prefix, and the others are the last rows of a causal call.

    Args:
        query: shape `(B, H, M, D)`, the last $M$ of the slots.
        key: shape `(B, H_kv, N, D)` with $N \ge M$; each key head serves `H / H_kv` consecutive query heads.
        value: shape `(B, H_kv, N, E)`.
        kind: "causal", "backward", "bidirectional", "prefix" or "forward_backward".
        prefix_lengths: $0 \le P \le N$ (slots, padding counts), an int for all samples or an integer tensor `(B,)`. For
            "prefix" and the backward kinds, as in `attention_mask`.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. A query whose own slot is hidden is
            padding, too, and sees nothing.
        scale: $s$; None means $D^{-1/2}$.
        backend: "split" are the calls; "reference" is the dense definition, which has second derivatives; "auto" is
            "split".

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or prefixes that are no integers.
        ValueError: an unknown `kind` or `backend`, an option that the kind needs or does not have, a prefix outside of
            $[0, N]$, or shapes or devices that do not fit.

    Numerics:
        As the kernels: statistics in float32 for half inputs, float64 for float64. Values of hidden keys cannot leak,
        not even NaN. `torch.compile` takes ints for `prefix_lengths` as one graph, and breaks it at tensors.

    Cost:
        The visible pairs and no more, up to tiles of the kernels; memory $O(B H N D)$. Samples of one prefix length go
        together, so tensors of many different ones are many calls, and wait for the device.

    Differences:
        On the CPU the kernels are those of [`rerope_attention`][danlu.attention.rerope_attention], elsewhere those of
        `scaled_dot_product_attention`, and tiles in plain PyTorch where there is padding. There, the rows behind a
        prefix are a kernel of their own, except in compiled code, which computes the causal pairs of the prefix, too.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17) and its FAQ (2023-03-20).

    Example:
        >>> import torch
        >>> from danlu.attention import split_attention
        >>> query, key, value = torch.randn(3, 2, 4, 16, 8)
        >>> split_attention(query, key, value, kind="prefix", prefix_lengths=torch.tensor([5, 12])).shape
        torch.Size([2, 4, 16, 8])
    """
    check_attention(query, key, value, scale)
    check_kind(kind, prefix_lengths, key.shape[2])
    check_key_padding_mask(key_padding_mask, key)
    check_choice("backend", backend, ("auto", "split", "reference"))
    if isinstance(prefix_lengths, Tensor):
        check_same_device(query=query, prefix_lengths=prefix_lengths)
        if prefix_lengths.shape[0] != query.shape[0]:
            raise ValueError(f"prefix_lengths must have shape ({query.shape[0]},), got {tuple(prefix_lengths.shape)}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference" or 0 in query.shape[:3]:
        return _dense(query, key, value, kind, prefix_lengths, key_padding_mask, factor)
    key, value = (without_padding(x, key_padding_mask) for x in (key, value))
    if not isinstance(prefix_lengths, Tensor):
        return _split(query, key, value, kind, prefix_lengths, key_padding_mask, factor)
    parts: list[Tensor] = []
    order: list[Tensor] = []
    for prefix, samples in _by_prefix(prefix_lengths):
        padding = None if key_padding_mask is None else key_padding_mask[samples]
        parts.append(_split(query[samples], key[samples], value[samples], kind, prefix, padding, factor))
        order.append(samples)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kind: MaskKind,
    prefix: Tensor | int | None,
    padding: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition."""
    dtype, keys = query.dtype, key.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    key, value = (without_padding(x, padding).to(wide) for x in (key, value))
    rows = torch.arange(keys - query.shape[2], keys, device=query.device)
    visible = pairs(kind, rows, keys, prefix, query.shape[1])
    if padding is not None:
        visible = visible & padding[:, None, None, :] & padding[:, None, rows, None]
    scores = grouped_matmul(query.to(wide) * scale, key.transpose(-2, -1))
    return attend(scores, value, visible).to(dtype)


def _by_prefix(prefix_lengths: Tensor) -> list[tuple[int, Tensor]]:
    values, owner = prefix_lengths.unique(return_inverse=True)
    return [(value, (owner == i).nonzero()[:, 0]) for i, value in enumerate(values.tolist())]


def _split(
    query: Tensor, key: Tensor, value: Tensor, kind: MaskKind, prefix: int | None, padding: Tensor | None, scale: float
) -> Tensor:
    """One prefix length for all samples."""
    rows, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    if is_causal_kind(kind, prefix):
        return _call(query, key, value, padding, scale, is_causal=True)
    border = keys if prefix is None else prefix
    if kind == "forward_backward":
        turns = [_every_other(query, key, value, start) for start in range(min(2, heads))]
        parts = [_call(*turns[0], padding, scale, is_causal=True)]
        parts += [_split(*turn, "backward", border, padding, scale) for turn in turns[1:]]
        order = torch.cat([torch.arange(start, heads, 2, device=query.device) for start in (0, 1)])
        return torch.cat(parts, 1)[:, order.argsort()]
    # Rows in front of the border come first, and are the last of the slots in front of it.
    inside = max(0, border - (keys - rows))
    parts = []
    if inside and kind == "backward":
        own = slice(border - inside, border)
        turned = query[:, :, :inside].flip(2), key[:, :, own].flip(2), value[:, :, own].flip(2)
        shown = None if padding is None else padding[:, own].flip(1)
        parts.append(_call(*turned, shown, scale, is_causal=True).flip(2))
    elif inside:
        shown = None if padding is None else padding[:, :border]
        block = query[:, :, :inside], key[:, :, :border], value[:, :, :border]
        parts.append(_call(*block, shown, scale, is_causal=False))
    if inside < rows:
        parts.append(_call(query[:, :, inside:], key, value, padding, scale, is_causal=True))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _every_other(query: Tensor, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads `start`, `start` + 2, ... with the keys and values that they share."""
    group = query.shape[1] // key.shape[1]
    if group % 2:
        # Neighbors of an odd group fall into different halves.
        key, value = (x.repeat_interleave(group, 1)[:, start::2] for x in (key, value))
    return query[:, start::2], key, value


def _call(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float, *, is_causal: bool
) -> Tensor:
    """Attention of the last rows of the slots, causal or not, without a mask of pairs."""
    rows, keys = query.shape[2], key.shape[2]
    is_causal = is_causal and rows > 1
    if padding is not None or kernel_of(query, value) != "portable":
        far, window = None, keys
        if is_causal and rows < keys:
            # With a window of one key, all others are a whole block and a square causal one.
            far, window = (query, None, key), 1
        return banded_attention(
            (query, key),
            far,
            value,
            window=window,
            scale=scale,
            is_causal=is_causal,
            masks=Masks(padding, None, None),
        )
    grouped = query.shape[1] != key.shape[1]
    if not is_causal or rows == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    # The flag means the first rows of the slots, and these are the last.
    if _has_lower_right(query):
        # Importing it brings the compiler.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(rows, keys)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)
    if rows <= _FEW:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    whole = F.pad(query, (0, 0, keys - rows, 0))
    out = F.scaled_dot_product_attention(whole, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[:, :, keys - rows :]


def _has_lower_right(query: Tensor) -> bool:
    """Whether torch has a kernel for the last rows: not in graphs of the compiler, and elsewhere it makes a mask."""
    return query.is_cuda and not torch.compiler.is_compiling()
