r"""Attention with rotary positions, and with rotary positions clipped at a window (ReRoPE, Leaky ReRoPE).

Source: "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07) and the neighboring articles 11 and 13 of the series.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `N` keys; `M` queries, the last `M` of the
`N` slots; `D` head size; `E` value size.
"""

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer, check_real, is_low_precision
from danlu.attention._band_calls import Masks
from danlu.attention._bands import banded_attention
from danlu.attention._log_n import LogN, check_log_n, count_visible
from danlu.attention._masks import (
    attend,
    check_attention,
    check_attn_mask,
    check_cu_seqlens,
    check_key_padding_mask,
    check_positions,
    grouped_matmul,
    resolve_frequencies,
    visible_keys,
    without_padding,
)
from danlu.attention._rerope_backend import Backend, check_backend, in_bands
from danlu.positions import apply_rope, logn_scale, rope_frequencies

__all__ = ["ReRoPE", "rerope_attention", "rope_attention"]


def rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    logn: LogN | None = None,
    train_length: int | None = None,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Softmax attention with rotary positions, from queries and keys that are *not* rotated yet.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j\!\big(s\,q_i^\top \mathcal R_{j-i}\,k_j\big)\,v_j$$
        over the visible $j$, with $\mathcal R$ the rotation of [`apply_rope`][danlu.positions.apply_rope], $s$ =
        `scale`, and positions that are slots: keys $0, \dots, N-1$, queries $N-M, \dots, N-1$. With `positions` $p$ it
        is $\mathcal R_{p_j - p_i}$; what a query sees still goes by slots.

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
        cu_seqlens: int32 or int64, shape `(sequences + 1,)`, from 0 to `N`: borders of sequences that are packed one
            after the other into the only sample; positions and visibility start anew in each. None means one sequence.
        attn_mask: bool, True = visible, or floating, added to the scores; broadcastable to `(B, H, M, N)`, on top of
            the other rules. Minus infinity hides a key, and so does anything up to half of the lowest finite number of
            the mask's dtype. None adds nothing.
        logn: None, or scale the query that sees $n$ keys: "train" by $\log \max(n, 2) / \log T$, for models that were
            trained with it; "post" by $\max(1, \log n / \log T)$, for models that were not.
        train_length: $T \ge 2$ of `logn` (tokens).
        positions: of the keys, shape `(N,)` or `(B, N)`, integers or float32/float64, not falling along the slots; None
            means the slots. Not with `cu_seqlens`. Only differences count.
        dropout_p: each weight is 0 with this probability, and the others are divided by $1 - p$, at every call. The
            dense definition only.
        interleaved: rotate neighboring channels instead of halves.
        backend: "reference" is the dense definition; "banded" never holds the scores, see
            [`explain_backend`][danlu.attention.explain_backend]; "auto" takes the latter from a size on.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask of integers, `cu_seqlens` that are not integers, or half
            `positions`.
        ValueError: shapes or devices that do not fit, an odd `D` without `inv_freq`, `cu_seqlens` with another mask or
            that do not rise from 0 to `N`, `positions` that fall (both looked at on the CPU only), `dropout_p` outside
            of $[0, 1)$, or `logn` without `train_length`; the message has the shapes or values. Also "banded" for an
            `attn_mask` that needs a gradient, or with dropout.

    Numerics:
        Half inputs are computed in float32 and rounded once; float64 stays float64. Angles are float64. Values of
        hidden keys cannot leak, not even NaN.

    Cost:
        $O(MND)$ time. In bands memory is $O(BHND)$, or $O(BHND + bN)$ with masks that have gaps, $b$ = 64 rows times
        the heads and samples that the mask tells apart; the time is that of `scaled_dot_product_attention` and of the
        rotations; there is no second derivative. The dense definition has $O(BHMN)$ memory.

    Source:
        Su et al. (2021), arXiv 2104.09864.

    Example:
        >>> import torch
        >>> from danlu.attention import rope_attention
        >>> x = torch.eye(4).view(1, 1, 4, 4)
        >>> rope_attention(x, x, x)[0, 0, 0]
        tensor([1., 0., 0., 0.])
    """
    frequencies = _check(query, key, value, inv_freq, scale, key_padding_mask, cu_seqlens, attn_mask)
    where = check_positions(positions, key, cu_seqlens)
    check_real("dropout_p", dropout_p, low=0.0, high=1.0, high_open=True)
    check_log_n(logn, train_length)
    masks = Masks(key_padding_mask, cu_seqlens, attn_mask)
    factor = _query_factor(query, key, is_causal, masks, logn, train_length)
    count = key.shape[2]
    slots = torch.arange(count, device=key.device)
    query_slots = slots[count - query.shape[2] :]
    keys_at = slots if where is None else where[:, None]
    queries_at = keys_at[..., count - query.shape[2] :]
    if in_bands(backend, query, key, value, attn_mask, dropout_p):
        near = (
            _turned_query(query, factor, queries_at, frequencies, interleaved),
            apply_rope(key, keys_at, frequencies, interleaved=interleaved),
        )
        return banded_attention(
            near, None, value, window=max(1, count), scale=_scale(query, scale), is_causal=is_causal, masks=masks
        )
    dtype = query.dtype
    query, key, value = _prepared(query, key, value, key_padding_mask)
    rotated = _turned_query(query, factor, queries_at, frequencies, interleaved) * _scale(query, scale)
    scores = grouped_matmul(rotated, apply_rope(key, keys_at, frequencies, interleaved=interleaved).transpose(-2, -1))
    visible = visible_keys(query_slots[:, None] - slots, is_causal, key_padding_mask, attn_mask, cu_seqlens)
    return attend(scores, value, visible, attn_mask, dropout_p).to(dtype)


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
    cu_seqlens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    logn: LogN | None = None,
    train_length: int | None = None,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Rotary attention whose relative positions stop growing at a window: a RoPE model then reads longer text.

    Definition:
        $$o_i = \sum_j \operatorname{softmax}_j\!\big(s\,q_i^\top \mathcal R_{-g(i-j)}\,k_j\big)\,v_j, \qquad
        g(t) = \begin{cases} t & |t| < w \\ \operatorname{sign}(t)\,\big(w + (|t| - w)\,\rho\big) & |t| \ge w
        \end{cases}$$
        with $w$ = `window` and $\rho$ = `slope`. $\rho = 0$ is ReRoPE, $0 < \rho < 1$ Leaky ReRoPE, $\rho = 1$ RoPE.
        $\rho > 1$ in training with plain RoPE at inference is InvLeaky ReRoPE. With `positions` $p$ it is
        $g(p_i - p_j)$; what a query sees still goes by slots.

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
        cu_seqlens: int32 or int64, shape `(sequences + 1,)`, from 0 to `N`: borders of sequences that are packed one
            after the other into the only sample; positions and visibility start anew in each. None means one sequence.
        attn_mask: bool, True = visible, or floating, added to the scores; broadcastable to `(B, H, M, N)`, on top of
            the other rules. Minus infinity hides a key, and so does anything up to half of the lowest finite number of
            the mask's dtype. None adds nothing.
        logn: None, or scale the query that sees $n$ keys: "train" by $\log \max(n, 2) / \log T$, for models that were
            trained with it; "post" by $\max(1, \log n / \log T)$, for models that were not.
        train_length: $T \ge 2$ of `logn` (tokens).
        positions: of the keys, shape `(N,)` or `(B, N)`, integers or float32/float64, not falling along the slots; None
            means the slots. Not with `cu_seqlens`. They say which
            keys are near.
        dropout_p: each weight is 0 with this probability, and the others are divided by $1 - p$, at every call. The
            dense definition only.
        interleaved: rotate neighboring channels instead of halves.
        backend: "reference" is the dense definition; "banded" never holds the scores, see
            [`explain_backend`][danlu.attention.explain_backend]; "auto" takes the latter from a size on.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask of integers, or options of a wrong type.
        ValueError: `window` < 1, `slope` < 0, and as in [`rope_attention`][danlu.attention.rope_attention].

    Numerics:
        As in [`rope_attention`][danlu.attention.rope_attention], to which it is equal bit for bit when $w \ge N$.

    Cost:
        In bands, see [`rope_attention`][danlu.attention.rope_attention], one attention's work: every pair is scored
        once, near ones in a sliding window and far ones in a square causal call on keys shifted by the window (and its
        mirror image without `is_causal`), and the outputs are merged by their log-sum-exps. With masks that have gaps,
        or `positions`, tiles of 64 rows take both bands' keys in reach. The dense definition has two score matrices
        (three without `is_causal`) and $O(BHMN)$ memory.

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
    frequencies = _check(query, key, value, inv_freq, scale, key_padding_mask, cu_seqlens, attn_mask)
    where = check_positions(positions, key, cu_seqlens)
    check_real("dropout_p", dropout_p, low=0.0, high=1.0, high_open=True)
    count = key.shape[2]
    if window >= count and positions is None:
        return rope_attention(
            query,
            key,
            value,
            inv_freq=inv_freq,
            scale=scale,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            attn_mask=attn_mask,
            logn=logn,
            train_length=train_length,
            dropout_p=dropout_p,
            interleaved=interleaved,
            backend=backend,
        )
    check_log_n(logn, train_length)
    masks = Masks(key_padding_mask, cu_seqlens, attn_mask, where)
    factor = _query_factor(query, key, is_causal, masks, logn, train_length)
    slots = torch.arange(count, device=key.device)
    query_slots = slots[count - query.shape[2] :]
    keys_at = slots if where is None else where[:, None]
    queries_at = keys_at[..., count - query.shape[2] :]
    # g(i - j) = ((i - w) rho + w) - j rho for keys far to the left, and its mirror image to the right.
    leaky_keys = keys_at.to(torch.float64) * slope
    left_slots = (queries_at - window).to(torch.float64) * slope + window
    right_slots = (queries_at + window).to(torch.float64) * slope - window
    if in_bands(backend, query, key, value, attn_mask, dropout_p):

        def turned(x: Tensor, positions: Tensor) -> Tensor:
            return apply_rope(x, positions, frequencies, interleaved=interleaved)

        near = _turned_query(query, factor, queries_at, frequencies, interleaved), turned(key, keys_at)
        left = _turned_query(query, factor, left_slots, frequencies, interleaved)
        right = None if is_causal else _turned_query(query, factor, right_slots, frequencies, interleaved)
        far = left, right, turned(key, leaky_keys) if slope else key
        return banded_attention(
            near, far, value, window=window, scale=_scale(query, scale), is_causal=is_causal, masks=masks
        )
    dtype = query.dtype
    query, key, value = _prepared(query, key, value, key_padding_mask)

    def scores(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        rotated = _turned_query(query, factor, query_positions, frequencies, interleaved) * _scale(query, scale)
        keys = apply_rope(key, key_positions, frequencies, interleaved=interleaved)
        return grouped_matmul(rotated, keys.transpose(-2, -1))

    distance = queries_at[..., None] - keys_at[..., None, :]
    out = torch.where(distance < window, scores(queries_at, keys_at), scores(left_slots, leaky_keys))
    if not is_causal:
        out = torch.where(distance <= -window, scores(right_slots, leaky_keys), out)
    visible = visible_keys(query_slots[:, None] - slots, is_causal, key_padding_mask, attn_mask, cu_seqlens)
    return attend(out, value, visible, attn_mask, dropout_p).to(dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inv_freq: Tensor | None,
    scale: float | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """Check the arguments that both functions share and return the frequencies."""
    check_attention(query, key, value, scale)
    check_key_padding_mask(key_padding_mask, key)
    check_attn_mask(attn_mask, query, key)
    check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, attn_mask)
    return resolve_frequencies(inv_freq, query)


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in at least float32, with padding taken out."""
    if is_low_precision(query.dtype):
        query, key, value = query.float(), key.float(), value.float()
    # A query of padding gets a gradient of 0, and 0 times NaN would reach the keys' gradients.
    own = None if key_padding_mask is None else key_padding_mask[:, key.shape[2] - query.shape[2] :]
    return without_padding(query, own), without_padding(key, key_padding_mask), without_padding(value, key_padding_mask)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _query_factor(
    query: Tensor, key: Tensor, is_causal: bool, masks: Masks, logn: LogN | None, train_length: int | None
) -> Tensor | None:
    """What `logn` multiplies queries by, broadcastable to (B, H, M, 1)."""
    if logn is None or train_length is None:
        return None
    count = count_visible(
        query.shape[2],
        key.shape[2],
        query.device,
        is_causal=is_causal,
        key_padding_mask=masks.key_padding_mask,
        cu_seqlens=masks.cu_seqlens,
        attn_mask=masks.attn_mask,
    )
    return logn_scale(count, train_length, logn).to(torch.promote_types(query.dtype, torch.float32))


def _turned_query(
    query: Tensor, factor: Tensor | None, positions: Tensor, frequencies: Tensor, interleaved: bool
) -> Tensor:
    """Rotated queries of their dtype, rounded once."""
    if factor is None:
        return apply_rope(query, positions, frequencies, interleaved=interleaved)
    return apply_rope(query * factor, positions, frequencies, interleaved=interleaved).to(query.dtype)


class ReRoPE(nn.Module):
    r"""Module form of [`rerope_attention`][danlu.attention.rerope_attention].

    Definition:
        `forward(query, key, value) = rerope_attention(query, key, value, window=window, slope=slope, ...)` with the
        frequencies $\theta_m = b^{-2(m-1)/D}$ of `base` $b$.

    Args:
        window: $w \ge 1$ (tokens).
        slope: $\rho \ge 0$.
        base: base of the frequencies that the model was trained with.
        logn: as in the function.
        train_length: as in the function.
        is_causal: whether a query sees only its own and earlier slots.
        dropout_p: as in the function, in training mode only.
        interleaved: rotate neighboring channels instead of halves.
        backend: as in the function.

    Returns:
        From `forward`: the attention output, shape `(B, H, M, E)`.

    Raises:
        TypeError: an option is not of its type.
        ValueError: `window` < 1, `slope` < 0, `base` not positive, `dropout_p` outside of $[0, 1)$ or an unknown
            `backend`, at construction.

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
        logn: LogN | None = None,
        train_length: int | None = None,
        is_causal: bool = True,
        dropout_p: float = 0.0,
        interleaved: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_log_n(logn, train_length)
        self.window = check_integer("window", window, low=1)
        self.slope = check_real("slope", slope, low=0.0)
        self.base = check_real("base", base, low=0.0, low_open=True)
        self.logn: LogN | None = logn
        self.train_length = train_length
        self.is_causal = is_causal
        self.dropout_p = check_real("dropout_p", dropout_p, low=0.0, high=1.0, high_open=True)
        self.interleaved = interleaved
        self.backend: Backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
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
            cu_seqlens=cu_seqlens,
            logn=self.logn,
            train_length=self.train_length,
            positions=positions,
            dropout_p=self.dropout_p if self.training else 0.0,
            interleaved=self.interleaved,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"window={self.window}, slope={self.slope}, base={self.base}, is_causal={self.is_causal}, "
            f"interleaved={self.interleaved}, logn={self.logn!r}, train_length={self.train_length}, "
            f"dropout_p={self.dropout_p}, backend={self.backend!r}"
        )
