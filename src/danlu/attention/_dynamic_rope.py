r"""Rotary attention whose frequencies follow the length of the text, so that short text is read as the model knows it.

Source: bloc97 and emozilla (2023), "dynamic NTK" as transformers has it; the length of each query is our own.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `N` keys; `M` queries, the last `M` of the
`N` slots; `D` head size; `E` value size; `R` rotated channels.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from danlu._common.checks import check_integer
from danlu.attention._log_n import LogN
from danlu.attention._masks import (
    check_attention,
    check_cu_seqlens,
    check_key_padding_mask,
    resolve_frequencies,
)
from danlu.attention._rerope import rope_attention
from danlu.attention._rerope_backend import Backend
from danlu.attention._rerope_decode import rerope_decode
from danlu.positions import dynamic_factor, scale_frequencies

__all__ = ["DynamicMethod", "dynamic_rope_attention"]

DynamicMethod = Literal["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]

_OF_DECODING = ("scale", "logn", "train_length", "interleaved")


def dynamic_rope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    train_length: int,
    factor: float = 1.0,
    method: DynamicMethod = "ntk-aware",
    mixed_power: float = 0.625,
    step: int | None = None,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logn: LogN | None = None,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Softmax attention from unrotated queries and keys, where a query's frequencies fit the number of keys it sees.

    Definition:
        $$o_i = \sum_{j \le i} \operatorname{softmax}_j\!\big(s\,q_i^\top \mathcal R^{(n_i)}_{j-i}\,k_j\big)\,v_j$$
        where query $i$ sees $n_i$ keys and $\mathcal R^{(n)}$ rotates by the frequencies that
        [`scale_frequencies`][danlu.positions.scale_frequencies] makes by `method` with the factor
        $$\kappa(n) = \max\!\Big(1,\; f\,\frac{n'}{T} - (f - 1)\Big), \qquad
        n' = T + \sigma \lceil (n - T) / \sigma \rceil$$
        with $f$ = `factor`, $T$ = `train_length`, $\sigma$ = `step`. Up to $T$ keys it is plain RoPE.

    Args:
        query: shape `(B, H, M, D)`, not rotated.
        key: shape `(B, H_kv, N, D)` with $N \ge M$, not rotated.
        value: shape `(B, H_kv, N, E)`.
        train_length: $T \ge 1$ (tokens).
        factor: $f \ge 1$. With 1 the frequencies are stretched by the length over the training length; transformers'
            "dynamic" has 2 as a rule, which stretches more than the text is long.
        method: a rule of [`scale_frequencies`][danlu.positions.scale_frequencies]; "ntk-aware" is dynamic NTK.
        mixed_power: of "ntk-mixed".
        step: $\sigma \ge 1$ (tokens), how often the frequencies change beyond $T$; 1 is the rule of transformers, None
            means $\max(1, T / 8)$.
        inv_freq: frequencies (radians per position), shape `(R / 2,)` with $R \le D$; None means
            `rope_frequencies(D)`.
        scale: factor of the scores; None means $D^{-1/2}$.
        is_causal: a query sees the keys of its own and earlier slots; else all keys, which have one length.
        key_padding_mask: bool, shape `(B, N)`, True = visible; None means all are. Padding counts for no length. A
            query whose own slot is hidden is padding, too, and sees nothing.
        cu_seqlens: int32 or int64, shape `(sequences + 1,)`, from 0 to `N`: borders of packed sequences, as in
            [`rope_attention`][danlu.attention.rope_attention].
        logn: None, "train" or "post", as there, with $T$.
        interleaved: rotate neighboring channels instead of halves.
        backend: as there.

    Returns:
        Shape `(B, H, M, E)`, dtype of `query`. A query that sees no key gets exactly 0 and no gradient.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or options of a wrong type.
        ValueError: `train_length` or `step` < 1, `factor` < 1, an unknown `method`, and as in
            [`rope_attention`][danlu.attention.rope_attention].

    Numerics:
        As in [`rope_attention`][danlu.attention.rope_attention], of which it is some calls, or one up to $T$ keys.

    Cost:
        The time of one attention, and a rotation of all keys for every $\sigma$ queries beyond $T$, of which training
        keeps the results. A step of decoding rotates all keys. Padding and borders are looked at, which waits for the
        device, and samples of different padding are calls of their own.

    Differences:
        transformers takes one length for all tokens of a call, that of the longest sample with what comes after the
        token. A token's output then depends on how the text is cut into calls, and in its cache keys stay rotated by
        the frequencies of older calls. Here it depends on the tokens before it alone, so text that is generated step
        by step, from a cache of unrotated keys, is the text that is read at once.

    Source:
        As in the module; the keys in the cache are transformers' issue 25104.

    Example:
        >>> import torch
        >>> from danlu.attention import dynamic_rope_attention, rope_attention
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> out = dynamic_rope_attention(query, key, value, train_length=8)
        >>> torch.allclose(out[:, :, :8], rope_attention(*(x[:, :, :8] for x in (query, key, value))), atol=1e-6)
        True
    """
    check_attention(query, key, value, scale)
    check_key_padding_mask(key_padding_mask, key)
    check_cu_seqlens(cu_seqlens, query, key, key_padding_mask, None)
    check_integer("train_length", train_length, low=1)
    step = max(1, train_length // 8) if step is None else check_integer("step", step, low=1)
    rule = _Rule(resolve_frequencies(inv_freq, query), train_length, factor, method, mixed_power, step)
    # Options are looked at however short the text is.
    rule.frequencies(train_length)
    options: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "interleaved": interleaved, "backend": backend}
    if logn is not None:
        options |= {"logn": logn, "train_length": train_length}
    if key.shape[2] <= train_length or (key_padding_mask is None and cu_seqlens is None):
        options |= {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        return _attend(query, key, value, rule, options)
    first = key.shape[2] - query.shape[2]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for samples, slots in _texts(key_padding_mask, cu_seqlens):
        rows = slots[slots >= first] - first
        if len(rows):
            text = query[samples][:, :, rows], key[samples][:, :, slots], value[samples][:, :, slots]
            # Indices on either side of the heads put those last but one.
            out[samples[:, None], :, rows] = _attend(*text, rule, options).transpose(1, 2)
    return out


@dataclass(frozen=True)
class _Rule:
    """Frequencies by length."""

    inv_freq: Tensor
    train_length: int
    factor: float
    method: DynamicMethod
    mixed_power: float
    step: int

    def rounded(self, length: int) -> int:
        """The length whose frequencies a text of `length` has."""
        if length <= self.train_length:
            return self.train_length
        return self.train_length + self.step * math.ceil((length - self.train_length) / self.step)

    def frequencies(self, length: int) -> Tensor:
        """Those of a length."""
        return scale_frequencies(
            self.inv_freq,
            method=self.method,
            factor=dynamic_factor(length, train_length=self.train_length, factor=self.factor),
            mixed_power=self.mixed_power,
            train_length=self.train_length if self.method == "by-parts" else None,
        )


def _attend(query: Tensor, key: Tensor, value: Tensor, rule: _Rule, options: dict[str, Any]) -> Tensor:
    """Attention to texts of one length: a call for all queries of the same frequencies."""
    count = key.shape[2]
    first = count - query.shape[2]
    if count <= rule.train_length or first == count:
        # As given, and not as cast: bit for bit plain attention.
        return rope_attention(query, key, value, inv_freq=rule.inv_freq, **options)
    if not options["is_causal"]:
        return rope_attention(query, key, value, inv_freq=rule.frequencies(rule.rounded(count)), **options)
    if first == count - 1 and options["backend"] == "auto":
        frequencies = rule.frequencies(rule.rounded(count))
        step = {name: value for name, value in options.items() if name in _OF_DECODING}
        # A window that holds all keys; angles of distances need few cosines.
        return rerope_decode(query, key, value, window=count, inv_freq=frequencies, **step)
    parts: list[Tensor] = []
    low = first
    while low < count:
        length = rule.rounded(low + 1)
        high = min(count, length)
        rows = query[:, :, low - first : high - first]
        frequencies = rule.frequencies(length)
        parts.append(rope_attention(rows, key[:, :, :high], value[:, :, :high], inv_freq=frequencies, **options))
        low = high
    return torch.cat(parts, 2)


def _texts(key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples and slots of the texts in a batch; texts in the same slots are of one length and go together."""
    if key_padding_mask is not None:
        kinds, owner = key_padding_mask.unique(dim=0, return_inverse=True)
        for index, kind in enumerate(kinds):
            yield (owner == index).nonzero().flatten(), kind.nonzero().flatten()
    elif cu_seqlens is not None:
        only = torch.zeros(1, dtype=torch.int64, device=cu_seqlens.device)
        for low, high in itertools.pairwise(cu_seqlens.tolist()):
            yield only, torch.arange(low, high, device=cu_seqlens.device)
