r"""Softmax attention on quantized keys (Transformer-VQ), exact in time linear in the length.

Source: Lingle (2023), "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354;
"我在Performer中发现了Transformer-VQ的踪迹" (2023-11-29), "VQ一下Key，Transformer的复杂度就变成线性了" (2023-11-09).

Shape letters: `B` batch; `H` query heads; `G` key heads, dividing `H`; `N` keys; `M` queries, the last `M` of the `N`
slots; `D` head size; `E` value size; `S` codewords of a key head.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from danlu._common.checks import check_choice, check_floating, check_integer, check_real, check_same_device
from danlu.attention._masks import (
    check_attention,
    check_cu_seqlens,
    check_key_padding_mask,
    grouped_matmul,
    resolve_frequencies,
    without_padding,
)
from danlu.attention._vector_quantizer import nearest_codes, straight_through
from danlu.attention._vq_layout import in_blocks, reorder
from danlu.positions import apply_rope

__all__ = ["attend_to_codes", "check_window", "vq_attention"]

Backend = Literal["auto", "blocks", "reference"]


def vq_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    *,
    block_size: int = 512,
    is_causal: bool = True,
    bias: Tensor | None = None,
    window: int | None = None,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    grad_through_cache: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Softmax attention to the codewords of the keys: exact, in time and memory linear in the length.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j\big(s\,q_i^\top \hat k_j + b_{ij}\big)\,v_j, \qquad
        \hat k_j = C_{z_j}, \quad z_j = \operatorname{argmin}_s \lVert k_j - C_s \rVert^2$$
        over the visible $j$, with $s$ = `scale` and $C$ = `codebook`. Tokens are in blocks of $\ell$ = `block_size`. A
        pair is near if its blocks are the same or neighbors: there $b_{ij} = B_{i-j}$, from `bias`, and $\hat k_j =
        \operatorname{sg}(C_{z_j}) + (k_j - \operatorname{sg}(k_j))$ passes its gradient straight through to the key.
        Elsewhere $b_{ij} = 0$ and keys get no gradient. All those keys are summed up, per codeword $c$, by their number
        $N_c$ and the mean $\bar v_c$ of their values,
        $$\sum_{j\ \text{far}} e^{s\,q_i^\top C_{z_j}} v_j = \sum_c e^{s\,q_i^\top C_c + \log N_c}\,\bar v_c ,$$
        so that a row has a softmax of at most $2\ell + S$ entries ($3\ell + S$ in both directions).

        With $w$ = `window` (causal), positions are told as by [`rerope_attention`][danlu.attention.rerope_attention] on
        quantized keys, which are not rotated before: the score is $s\,q_i^\top \mathcal R_{-\min(i-j,\,w)} \hat k_j +
        b_{ij}$. All far keys are at $w$ then, and their codewords stay as they are: $q_i^\top \mathcal R_{-w} C_c$.

    Args:
        query: shape `(B, H, M, D)`.
        key: shape `(B, G, N, D)` with $N \ge M$, not quantized; each key head serves `H / G` consecutive query heads.
        value: shape `(B, G, N, E)`.
        codebook: codewords, shape `(G, S, D)`, floating; it gets no gradient
            ([`VectorQuantizer`][danlu.attention.VectorQuantizer] learns it by a moving average).
        block_size: $\ell \ge 1$ (tokens).
        is_causal: a query sees the keys of its own and earlier tokens; else all keys.
        bias: $B$, shape `(H, 2 * block_size)` with entry $t$ for the distance $i - j = t$; without `is_causal` shape
            `(H, 4 * block_size - 1)` with entry $t + 2\ell - 1$. None means 0.
        window: $w$ in [1, `block_size` + 1] (tokens): rotate by distances up to $w$; None does not rotate. The block
            size itself costs least.
        inv_freq: frequencies of the rotation (radians per token), shape `(R / 2,)` with $R \le D$; None means those of
            [`rope_frequencies`][danlu.positions.rope_frequencies] for $D$.
        scale: factor of the scores; None means $D^{-1/2}$.
        grad_through_cache: whether far values get gradients; with False, as in the original's default, they do not.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. Hidden slots are taken out first:
            blocks and distances count visible tokens. A query whose own slot is hidden is padding, too, and sees
            nothing.
        cu_seqlens: int32 or int64, shape `(sequences + 1,)`, from 0 to `N`: borders of sequences that are packed one
            behind the other in the only sample. They do not see each other, and each begins a block.
        backend: "blocks" is linear in the length; "reference" is the dense definition, which has second derivatives;
            "auto" takes the former.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or options of a wrong type.
        ValueError: `block_size` < 1, shapes or devices that do not fit, an unknown `backend`, a `window` out of range
            or without `is_causal`, `inv_freq` without a `window`, or `cu_seqlens` with a `key_padding_mask`, with
            several samples, or that are no such borders.
        RuntimeError: "blocks" under `torch.func.grad`, `jvp` and their relatives, or a second derivative of it.

    Numerics:
        Half inputs are computed in float32 and rounded once, also under autocast; float64 stays float64. So sums of
        half values cannot overflow, and logarithms of counts are not rounded to half. The lowest code wins a tie. A key
        that is not finite makes the rows that see it NaN; hidden keys and values cannot leak, not even NaN.

    Cost:
        $2M(\ell/2 + S)(D + E)$ flops per head forward, causal without `bias`; else near blocks cost $3\ell/2$ per
        query instead of $\ell/2$ ($3\ell$ in both directions), as they do in the backward; $2\ell$ with a `window` of
        $\ell$, and up to $3\ell$ with another; $2NSD$ for the nearest codes. Memory $O(N(D + E))$ and two states of
        $\lceil N/\ell \rceil SE$ numbers per key head; never a matrix of scores. On the CPU with $E = D$ through stock
        flash kernels. No second derivative. A query that is decoded alone still costs $O(N)$ here;
        [`VQAttention`][danlu.attention.VQAttention] keeps a state of constant size. Packed sequences are taken one by
        one, and their borders are read: a device is waited for, and a compiled graph ends there.

    Differences:
        The original sums values up without a gradient; here far values get theirs by default. In the forward without
        bias only the block of the query itself is taken pair by pair, because quantized keys score the same either
        way. Both directions and the window are extensions. There is no `attn_mask`: a cached key is visible to all
        later blocks or to none.

    Source:
        Lingle (2023), arXiv 2309.16354, sections 3.1 to 3.3.

    Example:
        >>> import torch
        >>> from danlu.attention import vq_attention
        >>> query, key, value = torch.randn(3, 1, 2, 100, 8)
        >>> vq_attention(query, key, value, codebook=torch.randn(2, 16, 8), block_size=16).shape
        torch.Size([1, 2, 100, 8])
    """
    _check(query, key, value, codebook, block_size, is_causal, bias, window, inv_freq, scale, key_padding_mask, backend)
    check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, None)
    return attend_to_codes(
        query,
        key,
        value,
        codebook,
        None,
        block_size=block_size,
        is_causal=is_causal,
        bias=bias,
        window=window,
        inv_freq=inv_freq,
        scale=scale,
        grad_through_cache=grad_through_cache,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def attend_to_codes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    codes: Tensor | None,
    *,
    block_size: int,
    is_causal: bool,
    bias: Tensor | None,
    window: int | None,
    inv_freq: Tensor | None,
    scale: float | None,
    grad_through_cache: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: Backend,
) -> Tensor:
    """`vq_attention` for arguments that are checked, with the codes `(B, G, N)` of the keys where they are known."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows, keys = query.shape[2], key.shape[2]
    if rows == 0 or query.shape[0] == 0:
        # Zero gradients and not none.
        return query.new_zeros(*query.shape[:3], value.shape[-1]) + 0 * (query.sum() + key.sum() + value.sum())
    with torch.autocast(device_type=query.device.type, enabled=False):
        query, key, value, codebook = (x.to(wide) for x in (query, key, value, codebook.detach()))
        bias = None if bias is None else bias.to(wide)
        key, value = without_padding(key, key_padding_mask), without_padding(value, key_padding_mask)
        if backend != "reference":
            _refuse_transforms(query, key, value, bias)
        codes = nearest_codes(key, codebook) if codes is None else codes
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
            parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value, codes)), strict=True)
            sequences = [
                attend_to_codes(
                    query_part,
                    key_part,
                    value_part,
                    codebook,
                    codes_part,
                    block_size=block_size,
                    is_causal=is_causal,
                    bias=bias,
                    window=window,
                    inv_freq=inv_freq,
                    scale=scale,
                    grad_through_cache=grad_through_cache,
                    key_padding_mask=None,
                    cu_seqlens=None,
                    backend=backend,
                )
                for query_part, key_part, value_part, codes_part in parts
            ]
            return torch.cat(sequences, dim=2).to(dtype)
        quantized = straight_through(key, codebook, codes)
        far_value = value if grad_through_cache else value.detach()
        rope = None if window is None else resolve_frequencies(inv_freq, query)
        options = (block_size, is_causal, window or 0, rope, factor)
        if backend == "reference":
            return _dense(query, quantized, value, far_value, bias, key_padding_mask, *options).to(dtype)
        if key_padding_mask is None:
            return in_blocks(query, quantized, value, far_value, codebook, codes, bias, None, *options).to(dtype)
        own = key_padding_mask[:, None, keys - rows :, None]
        # Of fewer queries than keys, how many slots before the first one are hidden differs between samples.
        query = F.pad(query.masked_fill(~own, 0.0), (0, 0, keys - rows, 0))
        order = (~key_padding_mask).to(torch.int8).argsort(dim=1, stable=True)
        query, quantized, value, far_value = (reorder(x, order) for x in (query, quantized, value, far_value))
        codes = codes.gather(2, order[:, None].expand_as(codes))
        seen = torch.arange(keys, device=key.device) < key_padding_mask.sum(1, keepdim=True)
        out = in_blocks(query, quantized, value, far_value, codebook, codes, bias, seen, *options)
        out = reorder(out, order.argsort(dim=1))[:, :, keys - rows :]
        return out.masked_fill(~own, 0.0).to(dtype)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise under `torch.func.grad`, `jvp` and relatives: operators have no rules for them, and `jvp` would give 0."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for tensor in tensors:
        # Under vmap the tensor of the inner transforms is inside.
        while tensor is not None and functorch.is_batchedtensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        if tensor is None:
            continue
        if functorch.is_gradtrackingtensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "attention in blocks has derivatives by backward() and autograd.grad alone, not by torch.func.grad, "
                "jvp and their relatives; use backend='reference'"
            )


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_value: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    block_size: int,
    is_causal: bool,
    window: int,
    inv_freq: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition, with all scores: near pairs with their bias and gradients, far ones without."""
    rows, keys = query.shape[2], key.shape[2]
    shown = key.new_ones(query.shape[0], keys, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    place = (shown.cumsum(1) - 1)[:, None]
    own = place[..., keys - rows :]
    distance = own[..., None] - place[:, :, None]
    near = (own[..., None] // block_size - place[:, :, None] // block_size).abs() <= 1
    visible = shown[:, None, keys - rows :, None] & shown[:, None, None, :]
    visible = visible & (distance >= 0) if is_causal else visible

    def scores_of(words: Tensor) -> Tensor:
        if inv_freq is None:
            return grouped_matmul(query, words.mT) * scale
        within = grouped_matmul(apply_rope(query, own, inv_freq), apply_rope(words, place, inv_freq).mT)
        beyond = grouped_matmul(apply_rope(query, own.new_full((1,), window), inv_freq), words.mT)
        return torch.where(distance < window, within, beyond) * scale

    scores = scores_of(key)
    if bias is not None:
        entry = (distance if is_causal else distance + bias.shape[1] // 2).clamp(0, bias.shape[1] - 1)
        scores = scores + bias[torch.arange(len(bias), device=bias.device)[:, None, None], entry]
    scores = torch.where(near, scores, scores_of(key.detach()))
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~empty, -torch.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    return grouped_matmul(weights * near, value) + grouped_matmul(weights * ~near, far_value)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    block_size: int,
    is_causal: bool,
    bias: Tensor | None,
    window: int | None,
    inv_freq: Tensor | None,
    scale: float | None,
    key_padding_mask: Tensor | None,
    backend: str,
) -> None:
    check_choice("backend", backend, ("auto", "blocks", "reference"))
    check_integer("block_size", block_size, low=1)
    if scale is not None:
        check_real("scale", scale)
    check_attention(query, key, value, scale)
    check_key_padding_mask(key_padding_mask, key)
    check_floating("codebook", codebook)
    wanted = (key.shape[1], key.shape[3])
    if codebook.ndim != 3 or (codebook.shape[0], codebook.shape[2]) != wanted or codebook.shape[1] == 0:
        raise ValueError(
            f"codebook must have shape (G, S, D) with G = {wanted[0]}, S >= 1, D = {wanted[1]}, "
            f"got {tuple(codebook.shape)}"
        )
    check_same_device(query=query, codebook=codebook, bias=bias)
    check_window(window, block_size, is_causal)
    if window is not None:
        resolve_frequencies(inv_freq, query)
    elif inv_freq is not None:
        raise ValueError("inv_freq needs a window, within which positions are told by rotations")
    if bias is not None:
        check_floating("bias", bias)
        width = 2 * block_size if is_causal else 4 * block_size - 1
        if tuple(bias.shape) != (query.shape[1], width):
            raise ValueError(
                f"bias must have shape (H, {'2' if is_causal else '4'} * block_size{'' if is_causal else ' - 1'}) = "
                f"{(query.shape[1], width)}, got {tuple(bias.shape)}"
            )


def check_window(window: int | None, block_size: int, is_causal: bool) -> None:
    """Raise unless cached keys are all at the window or beyond."""
    if window is None:
        return
    if not is_causal:
        raise ValueError("window needs is_causal=True: cached keys before and after a query would need caches apart")
    check_integer("window", window, low=1)
    if window > block_size + 1:
        raise ValueError(
            f"window must be at most block_size + 1 = {block_size + 1}, since cached keys may be as near, got {window}"
        )
