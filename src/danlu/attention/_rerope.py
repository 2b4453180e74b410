r"""Attention with rotary positions, and with rotary positions clipped at a window (ReRoPE, Leaky ReRoPE).

Source: "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07) and the neighboring articles 11 and 13 of the series.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `N` keys; `M` queries, the last `M` of the
`N` slots; `D` head size; `E` value size.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from danlu._common.checks import check_floating, check_integer, check_real, check_same_device, is_low_precision
from danlu.attention._bands import banded_attention, visible_spans, why_not_banded
from danlu.attention._masks import (
    attend,
    check_attention,
    check_attn_mask,
    check_key_padding_mask,
    grouped_matmul,
    visible_keys,
    without_padding,
)
from danlu.positions import apply_rope, rope_frequencies

__all__ = ["ReRoPE", "rerope_attention", "rope_attention"]

Backend = Literal["auto", "banded", "reference"]

# From so many scores of a head on, attention in bands is faster than the dense definition.
_BANDED_FROM = 2**16


def rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Softmax attention with rotary positions, from queries and keys that are *not* rotated yet.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j\!\big(s\,q_i^\top \mathcal R_{j-i}\,k_j\big)\,v_j$$
        over the visible $j$, with $\mathcal R$ the rotation of [`apply_rope`][danlu.positions.apply_rope], $s$ =
        `scale`, and positions that are slots: keys $0, \dots, N-1$, queries $N-M, \dots, N-1$.

    Args:
        query: shape `(B, H, M, D)`.
        key: shape `(B, H_kv, N, D)` with $N \ge M$; each key head serves `H / H_kv` consecutive query heads.
        value: shape `(B, H_kv, N, E)`.
        inv_freq: frequencies (radians per position), shape `(R / 2,)` with $R \le D$; None means
            `rope_frequencies(D)`.
        scale: factor of the scores; None means $D^{-1/2}$.
        is_causal: a query sees the keys of its own and earlier slots; else all keys.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. A query whose own slot is hidden
            is padding, too, and sees nothing.
        attn_mask: bool, broadcastable to `(B, H, M, N)`, True = visible, on top of the other rules; None means all are.
        interleaved: rotate neighboring channels instead of halves.
        backend: "reference" is the dense definition; "banded" uses stock flash kernels and never holds the scores; with
            "auto" the latter where it can run and there are scores enough to gain.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, or a mask that is not bool.
        ValueError: shapes or devices that do not fit, an odd `D` without `inv_freq`, or "banded" where it cannot run;
            the message has the shapes or the reason.

    Numerics:
        Half inputs are computed in float32 and rounded once; float64 stays float64. Angles are float64. Values of
        hidden keys cannot leak, not even NaN.

    Cost:
        $O(MND)$ time. In bands, on the CPU for causal attention with $E = D$, without `attn_mask` and with visible keys
        that have no gaps: memory $O(BHND)$, the time of `scaled_dot_product_attention` and of the rotations, and no
        second derivative. Else $O(BHMN)$ memory.

    Source:
        Su et al. (2021), arXiv 2104.09864.

    Example:
        >>> import torch
        >>> from danlu.attention import rope_attention
        >>> x = torch.eye(4).view(1, 1, 4, 4)
        >>> rope_attention(x, x, x)[0, 0, 0]
        tensor([1., 0., 0., 0.])
    """
    frequencies = _check(query, key, value, inv_freq, scale, key_padding_mask, attn_mask)
    if _in_bands(backend, query, key, value, is_causal, key_padding_mask, attn_mask):
        slots = torch.arange(key.shape[2], device=key.device)
        near = (
            apply_rope(query, slots[key.shape[2] - query.shape[2] :], frequencies, interleaved=interleaved),
            apply_rope(key, slots, frequencies, interleaved=interleaved),
        )
        return _by_spans(near, near, value, key.shape[2], scale, key_padding_mask)
    dtype = query.dtype
    query, key, value = _prepared(query, key, value, key_padding_mask)
    slots, distance = _slots(query, key)
    rotated = _rotate(query, slots[key.shape[2] - query.shape[2] :], frequencies, interleaved, scale)
    scores = grouped_matmul(rotated, apply_rope(key, slots, frequencies, interleaved=interleaved).transpose(-2, -1))
    return attend(scores, value, visible_keys(distance, is_causal, key_padding_mask, attn_mask)).to(dtype)


def rerope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    slope: float = 0.0,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Rotary attention whose relative positions stop growing at a window: a RoPE model then reads longer text.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j\!\big(s\,q_i^\top \mathcal R_{-g(i-j)}\,k_j\big)\,v_j, \qquad
        g(t) = \begin{cases} t & |t| < w \\ \operatorname{sign}(t)\,\big(w + (|t| - w)\,\rho\big) & |t| \ge w
        \end{cases}$$
        with $w$ = `window` and $\rho$ = `slope`. $\rho = 0$ is ReRoPE, $0 < \rho < 1$ Leaky ReRoPE, $\rho = 1$ RoPE.
        $\rho > 1$ in training with plain RoPE at inference is InvLeaky ReRoPE.

    Args:
        query: shape `(B, H, M, D)`, not rotated.
        key: shape `(B, H_kv, N, D)` with $N \ge M$, not rotated.
        value: shape `(B, H_kv, N, E)`.
        window: $w \ge 1$ (tokens). A quarter to a half of the training length is recommended for models trained with
            RoPE; at the training length itself quality drops on some models.
        slope: $\rho \ge 0$, growth of relative positions beyond the window.
        inv_freq: frequencies (radians per position) that the model was trained with; None means
            `rope_frequencies(D)`.
        scale: factor of the scores; None means $D^{-1/2}$.
        is_causal: a query sees the keys of its own and earlier slots; else all keys, with $g(-t) = -g(t)$.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. A query whose own slot is hidden
            is padding, too, and sees nothing.
        attn_mask: bool, broadcastable to `(B, H, M, N)`, True = visible, on top of the other rules; None means all are.
        interleaved: rotate neighboring channels instead of halves.
        backend: "reference" is the dense definition; "banded" uses stock flash kernels and never holds the scores; with
            "auto" the latter where it can run and there are scores enough to gain.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or options of a wrong type.
        ValueError: `window` < 1, `slope` < 0, shapes or devices that do not fit, or "banded" where it cannot run.

    Numerics:
        As in [`rope_attention`][danlu.attention.rope_attention], to which it is equal bit for bit when $w \ge N$.

    Cost:
        In bands, see [`rope_attention`][danlu.attention.rope_attention], one causal attention's work: every pair is
        scored once, near ones in a sliding window and far ones in a square causal call on keys shifted by the window,
        and the outputs are merged by their log-sum-exps. The dense definition has two score matrices (three without
        `is_causal`) and $O(BHMN)$ memory.

    Differences:
        The author's code rotates the queries of far keys by $+w$ on both sides, which is right for causal attention
        and wrong without a causal mask; here $g$ is odd.

    Source:
        "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07); 13 (2023-08-14) for InvLeaky.

    Example:
        >>> import torch
        >>> from danlu.attention import rerope_attention
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> rerope_attention(query, key, value, window=4).shape
        torch.Size([1, 2, 16, 8])
    """
    check_integer("window", window, low=1)
    check_real("slope", slope, low=0.0)
    frequencies = _check(query, key, value, inv_freq, scale, key_padding_mask, attn_mask)
    count = key.shape[2]
    if window >= count:
        return rope_attention(
            query,
            key,
            value,
            inv_freq=inv_freq,
            scale=scale,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            interleaved=interleaved,
            backend=backend,
        )
    if _in_bands(backend, query, key, value, is_causal, key_padding_mask, attn_mask):
        slots = torch.arange(count, device=key.device)
        query_slots = slots[count - query.shape[2] :]

        def turned(x: Tensor, positions: Tensor) -> Tensor:
            return apply_rope(x, positions, frequencies, interleaved=interleaved)

        far_slots = (query_slots - window).to(torch.float64) * slope + window
        far_key = turned(key, slots.to(torch.float64) * slope) if slope else key
        near, far = (turned(query, query_slots), turned(key, slots)), (turned(query, far_slots), far_key)
        return _by_spans(near, far, value, window, scale, key_padding_mask)
    dtype = query.dtype
    query, key, value = _prepared(query, key, value, key_padding_mask)
    slots, distance = _slots(query, key)
    query_slots = slots[count - query.shape[2] :]

    def scores(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        rotated = _rotate(query, query_positions, frequencies, interleaved, scale)
        turned = apply_rope(key, key_positions, frequencies, interleaved=interleaved)
        return grouped_matmul(rotated, turned.transpose(-2, -1))

    near = scores(query_slots, slots)
    # g(i - j) = ((i - w) rho + w) - j rho for keys far to the left, and its mirror image to the right.
    leaky_keys = slots.to(torch.float64) * slope
    left = scores((query_slots - window).to(torch.float64) * slope + window, leaky_keys)
    out = torch.where(distance < window, near, left)
    if not is_causal:
        right = scores((query_slots + window).to(torch.float64) * slope - window, leaky_keys)
        out = torch.where(distance <= -window, right, out)
    return attend(out, value, visible_keys(distance, is_causal, key_padding_mask, attn_mask)).to(dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inv_freq: Tensor | None,
    scale: float | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """Check the arguments that both functions share and return the frequencies."""
    check_attention(query, key, value, scale)
    check_key_padding_mask(key_padding_mask, key)
    check_attn_mask(attn_mask, query, key)
    if inv_freq is None:
        if query.shape[-1] % 2 or query.shape[-1] == 0:
            raise ValueError(f"head_dim must be even and positive without inv_freq, got query {tuple(query.shape)}")
        return rope_frequencies(query.shape[-1]).to(query.device)
    check_floating("inv_freq", inv_freq)
    check_same_device(query=query, inv_freq=inv_freq)
    return inv_freq


def _check_backend(backend: str) -> None:
    if backend not in ("auto", "banded", "reference"):
        raise ValueError(f"backend must be 'auto', 'banded' or 'reference', got {backend!r}")


def _in_bands(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether to take the kernels; raise `ValueError` if they are asked for and cannot run."""
    _check_backend(backend)
    large = query.shape[2] * key.shape[2] >= _BANDED_FROM
    if backend == "reference" or (backend == "auto" and not large):
        return False
    reason = why_not_banded(query, key, value)
    if not is_causal:
        reason = "it is not causal"
    elif attn_mask is not None:
        reason = "there is an attn_mask"
    elif key_padding_mask is not None and visible_spans(key_padding_mask) is None:
        reason = "the visible keys of a sample have gaps"
    if reason is None:
        return True
    if backend == "banded":
        raise ValueError(f"backend='banded' cannot run: {reason}")
    _warn_of_memory(reason)
    return False


def _warn_of_memory(reason: str) -> None:
    # Once per reason: the default filter shows equal texts from one line once.
    warnings.warn(
        f"attention falls back to the dense definition, which holds all scores, because {reason}", stacklevel=4
    )


def _by_spans(
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    value: Tensor,
    window: int,
    scale: float | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Attention in bands; with padding, on the samples that share their first and last visible slot."""
    factor = value.shape[-1] ** -0.5 if scale is None else scale
    rows, keys = near[0].shape[2], value.shape[2]
    spans = None if key_padding_mask is None else visible_spans(key_padding_mask)
    if spans is None:
        return banded_attention(*near, *far, value, window=window, scale=factor)
    parts: list[Tensor] = []
    for (first, last), samples in spans.items():
        # Rows before the first visible slot and behind the last are padding, too.
        low, high = max(0, first - (keys - rows)), max(0, last - (keys - rows))
        if low >= high:
            parts.append(near[0].new_zeros(len(samples), *near[0].shape[1:3], value.shape[-1]))
            continue
        queries = [query[samples, :, low:high] for query in (near[0], far[0])]
        seen = [x[samples, :, first:last] for x in (near[1], far[1], value)]
        part = banded_attention(queries[0], seen[0], queries[1], seen[1], seen[2], window=window, scale=factor)
        parts.append(nn.functional.pad(part, (0, 0, low, rows - high)))
    order = torch.cat(list(spans.values())).argsort()
    return torch.cat(parts)[order]


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in at least float32, with padding taken out of keys and values."""
    if is_low_precision(query.dtype):
        query, key, value = query.float(), key.float(), value.float()
    return query, without_padding(key, key_padding_mask), without_padding(value, key_padding_mask)


def _slots(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the keys, and query slot minus key slot for every pair."""
    slots = torch.arange(key.shape[2], device=key.device)
    return slots, slots[key.shape[2] - query.shape[2] :, None] - slots


def _rotate(query: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool, scale: float | None) -> Tensor:
    """Rotated and scaled queries; scaling the queries costs less than scaling the scores."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return apply_rope(query, positions, inv_freq, interleaved=interleaved) * factor


class ReRoPE(nn.Module):
    r"""Module form of [`rerope_attention`][danlu.attention.rerope_attention].

    Definition:
        `forward(query, key, value) = rerope_attention(query, key, value, window=window, slope=slope, ...)` with the
        frequencies $\theta_m = b^{-2(m-1)/D}$ of `base` $b$.

    Args:
        window: $w \ge 1$ (tokens).
        slope: $\rho \ge 0$.
        base: base of the frequencies that the model was trained with.
        is_causal: whether a query sees only its own and earlier slots.
        interleaved: rotate neighboring channels instead of halves.
        backend: as in the function.

    Returns:
        From `forward`: the attention output, shape `(B, H, M, E)`.

    Raises:
        TypeError: an option is not of its type.
        ValueError: `window` < 1, `slope` < 0, `base` not positive or an unknown `backend`, at construction.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.attention import ReRoPE
        >>> ReRoPE(window=4)(*torch.randn(3, 1, 2, 16, 8)).shape
        torch.Size([1, 2, 16, 8])
    """

    def __init__(
        self,
        window: int,
        *,
        slope: float = 0.0,
        base: float = 10000.0,
        is_causal: bool = True,
        interleaved: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_backend(backend)
        self.window = check_integer("window", window, low=1)
        self.slope = check_real("slope", slope, low=0.0)
        self.base = check_real("base", base, low=0.0, low_open=True)
        self.is_causal = is_causal
        self.interleaved = interleaved
        self.backend: Backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return the attention output."""
        return rerope_attention(
            query,
            key,
            value,
            window=self.window,
            slope=self.slope,
            inv_freq=rope_frequencies(query.shape[-1], base=self.base).to(query.device),
            is_causal=self.is_causal,
            key_padding_mask=key_padding_mask,
            interleaved=self.interleaved,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"window={self.window}, slope={self.slope}, base={self.base}, is_causal={self.is_causal}, "
            f"interleaved={self.interleaved}, backend={self.backend!r}"
        )
