r"""Linear attention: weights that are products of nonnegative features, so that a running sum replaces the softmax.

Source: Katharopoulos et al. (2020), "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
arXiv 2006.16236.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `N` keys; `M` queries, the last `M` of the
`N` slots; `F` features; `E` value size; `C` rows of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from danlu._common.checks import (
    check_choice,
    check_floating,
    check_integer,
    check_real,
    check_same_device,
    is_low_precision,
)
from danlu.attention._feature_maps import FeatureMap, as_feature_map
from danlu.attention._linear_chunks import causal_sums, reciprocal
from danlu.attention._masks import check_attention, check_cu_seqlens, check_key_padding_mask, grouped_matmul
from danlu.positions import apply_rope, rope_frequencies

__all__ = ["LinearAttention", "LinearAttentionState", "linear_attention", "linear_attention_step"]

Backend = Literal["auto", "chunked", "reference"]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = True,
    chunk_size: int = 64,
    eps: float = 0.0,
    normalize: bool = True,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Attention whose weights are products of features, in time and memory linear in the length.

    Definition:
        With features $\phi(q_i)$ = `query[i]`, $\phi(k_j)$ = `key[j]` and the visible $j$ (with `is_causal` those up
        to $i$)
        $$o_i = \frac{\sum_j \big(\phi(q_i) \cdot \phi(k_j)\big)\,v_j}{\sum_j \phi(q_i) \cdot \phi(k_j) +
        \varepsilon}$$
        with $\varepsilon$ = `eps`; without `normalize` the numerator alone. With `inv_freq` the features of the
        numerator, not those of the denominator, are rotated by their positions, as RoFormer has it:
        $\phi(q_i)^\top \mathcal R_{j-i}\,\phi(k_j)$.

    Args:
        query: features, shape `(B, H, M, F)`, for instance from [`feature_map`][danlu.attention.feature_map].
        key: features, shape `(B, H_kv, N, F)` with $N \ge M$; each key head serves `H / H_kv` consecutive query heads.
        value: shape `(B, H_kv, N, E)`.
        is_causal: a query sees the keys of its own and earlier slots; else all keys.
        chunk_size: $C \ge 1$ (tokens); rows that are computed at a time in causal attention.
        eps: $\varepsilon \ge 0$, added to the denominators. It biases the output, and is not needed while a query
            and a key have a common feature above 0.
        normalize: whether to divide; without it features may be negative.
        inv_freq: frequencies (radians per position), shape `(R / 2,)` with $R \le F$; None means no rotation.
        interleaved: rotate neighboring features instead of halves.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. A query whose own slot is hidden
            is padding, too, and sees nothing.
        cu_seqlens: int32 or int64, shape `(sequences + 1,)`, from 0 to `N`: borders of sequences that are packed one
            after the other into the only sample; a query sees keys of its own sequence. None means one sequence.
        backend: "reference" is the dense definition; "chunked" never holds more than the products of some chunks;
            "auto" takes the former for causal attention over at most `chunk_size` keys, which it serves as one chunk.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query whose weights are all 0, for want of visible keys or of common
        features, gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or options of a wrong type.
        ValueError: negative features while `normalize`, shapes or devices that do not fit, `cu_seqlens` with a
            `key_padding_mask`, `chunk_size` < 1, `eps` < 0, `eps` without `normalize`, `interleaved` without
            `inv_freq`, or an unknown `backend`.

    Numerics:
        Half inputs are computed in float32, chunk by chunk, and rounded once; the running sum is float32 or float64.
        Values of hidden keys cannot leak, not even NaN. Features are looked at for negative values at once on the CPU;
        under `torch.compile` and on other devices an assertion does it without waiting, and `torch.func`'s transforms
        go without.

    Cost:
        Causal, in chunks: time $O(L\,C\,(F + E) + L\,F\,E)$ and memory of the order of inputs and output, forward and
        backward, as products are computed again; the backward pass has no second derivative. Faster than causal
        `scaled_dot_product_attention` from about a thousand tokens on (`benchmarks/attention`). Bidirectional:
        $O(L\,F\,E)$ time, two matrix products. The dense definition has $O(BHMN)$ memory. Packed sequences are computed
        one after the other; their borders are read on the host, so a compiler breaks its graph there.

    Differences:
        Where the sum of the weights is 0 the paper's code adds `eps`, which changes every other row as well; here such
        a row is 0, and `eps` is 0. There is no `attn_mask`: a running sum cannot leave out single pairs.

    Source:
        Katharopoulos et al. (2020), arXiv 2006.16236, equations 5, 8 and 9; Su et al. (2021), arXiv 2104.09864,
        equation 19, for the rotation.

    Example:
        >>> import torch
        >>> from danlu.attention import feature_map, linear_attention
        >>> query, key, value = torch.randn(3, 1, 2, 300, 8)
        >>> linear_attention(*feature_map("elu1")(query, key), value).shape
        torch.Size([1, 2, 300, 8])
    """
    check_attention(query, key, value, None)
    check_key_padding_mask(key_padding_mask, key)
    check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, None)
    check_integer("chunk_size", chunk_size, low=1)
    check_choice("backend", backend, ("auto", "chunked", "reference"))
    _check_options(eps, normalize, inv_freq, interleaved, query)
    if cu_seqlens is not None:
        one = partial(
            linear_attention,
            is_causal=is_causal,
            chunk_size=chunk_size,
            eps=eps,
            normalize=normalize,
            inv_freq=inv_freq,
            interleaved=interleaved,
            backend=backend,
        )
        return _one_by_one(one, query, key, value, cu_seqlens)
    query, key, value = _without_padding(query, key, value, key_padding_mask)
    if normalize:
        _check_features(query=query, key=key)
    rows, dtype = query.shape[2], query.dtype
    if backend == "reference" or (backend == "auto" and is_causal and key.shape[2] <= chunk_size):
        return _dense(query, key, value, is_causal, eps, normalize, inv_freq, interleaved).to(dtype)
    if not is_causal:
        return _bidirectional(query, key, value, eps, normalize, inv_freq, interleaved).to(dtype)
    past = key.shape[2] - rows
    state = _empty_state(query, key, value)
    if past:
        state = _absorbed(state, key[:, :, :past], value[:, :, :past], inv_freq, interleaved)
    fresh = (query, key[:, :, past:], value[:, :, past:])
    return _advanced(*fresh, state, chunk_size, eps, normalize, inv_freq, interleaved)[0]


class LinearAttentionState(NamedTuple):
    r"""All that causal linear attention has to remember: its size does not depend on the length.

    Definition:
        $$S = e^{-c} \sum_j \phi(k_j)^\top v_j, \qquad z = e^{-c} \sum_j \phi(k_j)$$
        over the tokens so far; $S$ = `key_value`, $z$ = `key_sum`, $c$ = `log_scale`.

    Args:
        key_value: $S$, shape `(B, H_kv, F, E)`, float32 or float64; of rotated features if there is a rotation.
        key_sum: $z$, shape `(B, H_kv, F)`.
        log_scale: $c$, shape `(B, H_kv, 1, 1)`: the largest logarithm so far of what a feature map divides by.
        length: number of tokens so far, an integer tensor without axes.

    Numerics:
        When $c$ rises, what is there is multiplied by $e^{c_{old} - c_{new}}$, at most 1.

    Source:
        Katharopoulos et al. (2020), arXiv 2006.16236, section 3.4.

    Example:
        >>> import torch
        >>> from danlu.attention import linear_attention_step
        >>> query, key, value = torch.rand(3, 1, 2, 1, 8)
        >>> _, state = linear_attention_step(query, key, value)
        >>> state.key_value.shape, int(state.length)
        (torch.Size([1, 2, 8, 8]), 1)
    """

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor
    length: Tensor


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearAttentionState | None = None,
    *,
    chunk_size: int = 64,
    eps: float = 0.0,
    normalize: bool = True,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    key_padding_mask: Tensor | None = None,
    key_log_scale: Tensor | None = None,
) -> tuple[Tensor, LinearAttentionState]:
    r"""Causal linear attention over new tokens after a state: one token of a decoder, or the next part of a long text.

    Definition:
        The rows of [`linear_attention`][danlu.attention.linear_attention] over all tokens so far that belong to the
        new ones, from the sums over the old ones.

    Args:
        query: features of the new tokens, shape `(B, H, M, F)`.
        key: features, shape `(B, H_kv, M, F)`, divided by the exponential of `key_log_scale`.
        value: shape `(B, H_kv, M, E)`.
        state: of the tokens so far; None means there are none.
        chunk_size: as in the function, if there are several tokens.
        eps: as in the function; relative to the largest feature so far where `key_log_scale` is given.
        normalize: as in the function.
        inv_freq: as in the function; positions go on from the state's length.
        interleaved: as in the function.
        key_padding_mask: bool, shape `(B, M)`, True = visible.
        key_log_scale: shape `(B, H_kv, 1, 1)`, the second result of `key_features` of a feature map; None means 0.

    Returns:
        The output, shape `(B, H, M, E)`, and the new state; the old one is not changed. Both carry gradients, also
        into the old state, so a long text may be trained on in parts.

    Raises:
        TypeError: as in the function.
        ValueError: as in the function, or more or fewer keys than queries, or a state of other shapes.

    Numerics:
        As in the function. A state is rescaled when `key_log_scale` exceeds that of all tokens so far, so that old
        and new features stay comparable and neither overflows. Give it always or never.

    Cost:
        $O(F\,E)$ time and memory per token and head, whatever the length so far.

    Source:
        Katharopoulos et al. (2020), arXiv 2006.16236, equations 16 to 20.

    Example:
        >>> import torch
        >>> from danlu.attention import linear_attention, linear_attention_step
        >>> query, key, value = torch.rand(3, 1, 2, 5, 8)
        >>> state, steps = None, []
        >>> for t in range(5):
        ...     new = (x[:, :, t : t + 1] for x in (query, key, value))
        ...     out, state = linear_attention_step(*new, state)
        ...     steps.append(out)
        >>> torch.allclose(torch.cat(steps, dim=2), linear_attention(query, key, value))
        True
    """
    check_attention(query, key, value, None)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"a step has as many keys as queries, got {tuple(query.shape)} and {tuple(key.shape)}")
    check_key_padding_mask(key_padding_mask, key)
    check_integer("chunk_size", chunk_size, low=1)
    _check_options(eps, normalize, inv_freq, interleaved, query)
    fresh = _empty_state(query, key, value)
    if state is None:
        state = fresh
    _check_state(state, fresh, key_log_scale)
    query, key, value = _without_padding(query, key, value, key_padding_mask)
    if normalize:
        _check_features(query=query, key=key)
    if key_log_scale is not None:
        log_scale = torch.maximum(state.log_scale, key_log_scale.to(state.log_scale.dtype))
        shift = log_scale.masked_fill(log_scale == -torch.inf, 0.0)
        old, new = (state.log_scale - shift).exp(), (key_log_scale - shift).exp()
        state = LinearAttentionState(state.key_value * old, state.key_sum * old[..., 0], log_scale, state.length)
        key = key * new.to(key.dtype)
    return _advanced(query, key, value, state, chunk_size, eps, normalize, inv_freq, interleaved)


def _one_by_one(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Attention within every sequence of a packed sample."""
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attention(*part) for part in parts], dim=2)


def _check_options(eps: float, normalize: bool, inv_freq: Tensor | None, interleaved: bool, query: Tensor) -> None:
    check_real("eps", eps, low=0.0)
    if eps and not normalize:
        raise ValueError(f"eps belongs to the denominators, and normalize=False has none, got {eps}")
    if inv_freq is None:
        if interleaved:
            raise ValueError("interleaved says how to rotate; it needs inv_freq")
        return
    check_floating("inv_freq", inv_freq)
    check_same_device(query=query, inv_freq=inv_freq)


def _check_features(**features: Tensor) -> None:
    """Raise `ValueError` if a feature is negative."""
    for name, x in features.items():
        # Not of NaN, which goes on to the output.
        text = f"{name} must be features without negative values, or normalize must be False"
        if x.numel() == 0 or torch._C._are_functorch_transforms_active():
            continue
        negative = x.detach().amin() < 0
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            torch._assert_async(~negative, text)
        elif negative:
            raise ValueError(f"{text}, got {float(x.detach().amin()):g}")


def _check_state(state: LinearAttentionState, fresh: LinearAttentionState, key_log_scale: Tensor | None) -> None:
    for name in ("key_value", "key_sum", "log_scale"):
        given, wanted = getattr(state, name).shape, getattr(fresh, name).shape
        if given != wanted:
            raise ValueError(f"state.{name} must have shape {tuple(wanted)} for these tokens, got {tuple(given)}")
    if key_log_scale is not None:
        check_floating("key_log_scale", key_log_scale)
        if key_log_scale.shape != fresh.log_scale.shape:
            wanted = tuple(fresh.log_scale.shape)
            raise ValueError(f"key_log_scale must have shape {wanted}, got {tuple(key_log_scale.shape)}")


def _without_padding(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with 0 in padding; features of 0 give and get no weight."""
    if key_padding_mask is None:
        return query, key, value
    hidden = ~key_padding_mask[:, None, :, None]
    rows = hidden[:, :, key.shape[2] - query.shape[2] :]
    return query.masked_fill(rows, 0.0), key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def _wide(x: Tensor) -> Tensor:
    return x.float() if is_low_precision(x.dtype) else x


def _rotated(x: Tensor, start: int | Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    positions = torch.arange(x.shape[2], device=x.device) + start
    return apply_rope(_wide(x), positions, inv_freq, interleaved=interleaved)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    eps: float,
    normalize: bool,
    inv_freq: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """The definition, with all weights at once."""
    query, key, value = _wide(query), _wide(key), _wide(value)
    past = key.shape[2] - query.shape[2]
    ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(past + 1)

    def weights(query: Tensor, key: Tensor) -> Tensor:
        products = grouped_matmul(query, key.mT)
        return products.masked_fill(ahead, 0.0) if is_causal else products

    plain = turned = weights(query, key)
    if inv_freq is not None:
        turned = weights(_rotated(query, past, inv_freq, interleaved), _rotated(key, 0, inv_freq, interleaved))
    out = grouped_matmul(turned, value)
    return out * reciprocal(plain.sum(-1, keepdim=True), eps) if normalize else out


def _bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
    normalize: bool,
    inv_freq: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """One sum over all keys, which every query reads."""
    query, key, value = _wide(query), _wide(key), _wide(value)
    turned = (query, key)
    if inv_freq is not None:
        past = key.shape[2] - query.shape[2]
        turned = (_rotated(query, past, inv_freq, interleaved), _rotated(key, 0, inv_freq, interleaved))
    with torch.autocast(device_type=key.device.type, enabled=False):
        key_value = turned[1].mT @ value
    out = grouped_matmul(turned[0], key_value)
    return out * reciprocal(grouped_matmul(query, key.sum(2)[..., None]), eps) if normalize else out


def _empty_state(query: Tensor, key: Tensor, value: Tensor) -> LinearAttentionState:
    like = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
    batch, shared, _, features = key.shape
    return LinearAttentionState(
        like.new_zeros(batch, shared, features, value.shape[-1]),
        like.new_zeros(batch, shared, features),
        like.new_full((batch, shared, 1, 1), -torch.inf),
        torch.zeros((), dtype=torch.int64, device=query.device),
    )


def _absorbed(
    state: LinearAttentionState, key: Tensor, value: Tensor, inv_freq: Tensor | None, interleaved: bool
) -> LinearAttentionState:
    """The state after tokens that nobody reads."""
    key, value = _wide(key), _wide(value)
    turned = key if inv_freq is None else _rotated(key, state.length, inv_freq, interleaved)
    with torch.autocast(device_type=key.device.type, enabled=False):
        return LinearAttentionState(
            state.key_value + turned.mT @ value,
            state.key_sum + key.sum(2),
            state.log_scale,
            state.length + key.shape[2],
        )


def _advanced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearAttentionState,
    chunk_size: int,
    eps: float,
    normalize: bool,
    inv_freq: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, LinearAttentionState]:
    """Outputs of new tokens after a state, and the state behind them."""
    dtype, rows = query.dtype, query.shape[2]
    turned = (query, key)
    if inv_freq is not None:
        turned = tuple(_rotated(x, state.length, inv_freq, interleaved) for x in (query, key))
    if rows == 1:
        state = _absorbed(state, key, value, inv_freq, interleaved)
        out = grouped_matmul(_wide(turned[0]), state.key_value)
        total = grouped_matmul(_wide(query), state.key_sum[..., None]) if normalize else None
    elif normalize and inv_freq is None:
        # One sum for both, of values with a column of ones.
        sums = torch.cat((state.key_value, state.key_sum[..., None]), dim=-1)
        out, sums = causal_sums(query, key, value, sums, chunk_size=chunk_size, eps=eps, normalize=True)
        return out, LinearAttentionState(sums[..., :-1], sums[..., -1], state.log_scale, state.length + rows)
    else:
        # Not divided yet, numbers may be too large for half precision.
        numerator = (_wide(turned[0]), _wide(turned[1]), _wide(value))
        out, key_value = causal_sums(*numerator, state.key_value, chunk_size=chunk_size, eps=0.0, normalize=False)
        total, key_sum = None, state.key_sum + _wide(key).sum(2)
        if normalize:
            total = _paired(_wide(query), _wide(key).cumsum(2) + state.key_sum[:, :, None])
        state = LinearAttentionState(key_value, key_sum, state.log_scale, state.length + rows)
    return (out if total is None else out * reciprocal(total, eps)).to(dtype), state


def _paired(query: Tensor, key: Tensor) -> Tensor:
    """Products of queries and keys of the same slots, `(B, H, L, 1)`."""
    grouped = query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1]))
    return (grouped * key[:, :, None]).sum(-1, keepdim=True).flatten(1, 2)


class LinearAttention(nn.Module):
    r"""Linear attention of a feature map, as a module on queries and keys.

    Definition:
        `forward(query, key, value) = linear_attention(*features(query, key), value, ...)` with
        [`linear_attention`][danlu.attention.linear_attention]; with `rope_base` features are rotated with the
        frequencies of that base.

    Args:
        features: a name ("elu1", "relu" or "exp"), a function, or a feature map such as
            [`FavorFeatures`][danlu.attention.FavorFeatures].
        is_causal: whether a query sees only its own and earlier slots.
        chunk_size: as in the function.
        eps: as in the function.
        normalize: as in the function; without it, `features` must not divide out factors (`stabilize=False`).
        rope_base: base of the frequencies; None means no rotation.
        backend: as in the function.

    Returns:
        From `forward(query, key, value, key_padding_mask=None, *, cu_seqlens=None)`: the output, shape `(B, H, M, E)`.
        From `step(query, key, value, state=None, key_padding_mask=None)`: the output of new tokens, and the state.

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option out of its range, `normalize=False` with features that are stabilized, or `step` of a
            module that is not causal.

    Numerics:
        As in the functions. Decoding carries the largest feature so far and rescales the state when it rises. Reading
        a text at once divides keys by the largest of all of it: in float32 keys of exponential features ("exp",
        FAVOR+) count as 0 that are smaller by a factor of $e^{104}$, also than a later one.

    Source:
        As in the functions.

    Example:
        >>> import torch
        >>> from danlu.attention import LinearAttention
        >>> attention = LinearAttention("elu1", rope_base=10000.0)
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8)
        >>> out, state = attention.step(query, key, value)
        >>> torch.allclose(out, attention(query, key, value), atol=1e-6)
        True
    """

    def __init__(
        self,
        features: str | Callable[[Tensor], Tensor] | FeatureMap = "elu1",
        *,
        is_causal: bool = True,
        chunk_size: int = 64,
        eps: float = 0.0,
        normalize: bool = True,
        rope_base: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.features = as_feature_map(features)
        self.is_causal = is_causal
        self.chunk_size = check_integer("chunk_size", chunk_size, low=1)
        self.eps = check_real("eps", eps, low=0.0)
        self.normalize = normalize
        self.rope_base = None if rope_base is None else check_real("rope_base", rope_base, low=0.0, low_open=True)
        check_choice("backend", backend, ("auto", "chunked", "reference"))
        self.backend: Backend = backend
        if eps and not normalize:
            raise ValueError(f"eps belongs to the denominators, and normalize=False has none, got {eps}")
        if not normalize and getattr(self.features, "stabilize", False):
            raise ValueError("normalize=False keeps the factors that features with stabilize=True divide out")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output."""
        if cu_seqlens is not None:
            check_attention(query, key, value, None)
            check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, None)
            # Features of a sequence are divided by their own largest, not by that of another one.
            return _one_by_one(self._attended, query, key, value, cu_seqlens)
        return self._attended(query, key, value, key_padding_mask)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        query, key = self.features(query, key, key_padding_mask)
        return linear_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            chunk_size=self.chunk_size,
            eps=self.eps,
            normalize=self.normalize,
            inv_freq=self._inv_freq(key),
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: LinearAttentionState | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, LinearAttentionState]:
        """Return the output of new tokens, and the state behind them."""
        if not self.is_causal:
            raise ValueError("a step needs is_causal=True: tokens to come would change the outputs of earlier ones")
        features, log_scale = self.features.key_features(key, key_padding_mask)
        return linear_attention_step(
            self.features.query_features(query),
            features,
            value,
            state,
            chunk_size=self.chunk_size,
            eps=self.eps,
            normalize=self.normalize,
            inv_freq=self._inv_freq(features),
            key_padding_mask=key_padding_mask,
            key_log_scale=log_scale,
        )

    def _inv_freq(self, features: Tensor) -> Tensor | None:
        if self.rope_base is None:
            return None
        return rope_frequencies(features.shape[-1], base=self.rope_base).to(features.device)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"is_causal={self.is_causal}, chunk_size={self.chunk_size}, eps={self.eps}, normalize={self.normalize}, "
            f"rope_base={self.rope_base}, backend={self.backend!r}"
        )
