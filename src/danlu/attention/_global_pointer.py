r"""GlobalPointer: every pair of a first and a last token is scored as one span, as attention without a softmax.

Source: Su et al. (2022), "Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition", arXiv
2208.03054; "GlobalPointer：用统一的方式处理嵌套和非嵌套NER" (2021-05-01), "Efficient GlobalPointer：少点参数，多点效果"
(2022-01-25).

Shape letters: `B` samples; `T` types of spans; `n` tokens; `H` channels of a token; `D` channels of a head; `S` spans.
"""

import math

import torch
from torch import Tensor, nn

from danlu._common.checks import (
    check_bool,
    check_floating,
    check_integer,
    check_real,
    check_same_device,
    is_low_precision,
)
from danlu.positions import RotaryEmbedding

__all__ = ["EfficientGlobalPointer", "GlobalPointer", "decode_spans"]


class GlobalPointer(nn.Module):
    r"""Scores of all spans for every type, nested ones and flat ones alike.

    Definition:
        $$[q_{\alpha,i};\, k_{\alpha,i}] = W_\alpha h_i + b_\alpha, \qquad
        s_\alpha(i, j) = \frac{(\mathcal R_i q_{\alpha,i})^\top (\mathcal R_j k_{\alpha,j})}{\sqrt D}$$
        for type $\alpha$, first token $i$ and last token $j$, with $h$ = `hidden` and $\mathcal R$ the rotations of
        RoPE. A span is predicted where $s > 0$.

    Args:
        hidden_size: $H$.
        num_types: $T$.
        head_size: $D$, even; 64 in the paper.
        rope: whether scores know positions; without, a model hardly learns where a span ends.
        bias: whether there is a $b_\alpha$.
        causal_mask: whether spans that end before they start are hidden.

    Returns:
        From `forward(hidden, mask=None, positions=None)`: scores (nats), shape `(B, T, n, n)`, $-\infty$ where the
        span is hidden; float32 for half inputs, else dtype of `hidden`. `mask` is bool `(B, n)`, True = real token;
        `positions` shape `(n,)` or `(B, n)`, None means 0, 1, ..., n - 1. `project`, with the same arguments, gives
        rotated queries and keys `(B, T, n, D)`, for [`global_pointer_loss`][danlu.losses.global_pointer_loss].

    Raises:
        TypeError: an option has the wrong type, or `mask` is not bool.
        ValueError: a size is below 1, `head_size` is odd, or shapes do not fit.

    Numerics:
        The product of queries and keys is in float32 for half inputs, also under autocast. What padding holds changes
        nothing, NaN included. Scores depend on differences of positions only.

    Cost:
        $2TD(H + 1)$ parameters and $2BTn^2D$ flops for the scores.

    Source:
        Su et al. (2022), arXiv 2208.03054, equations 1 to 4.

    Example:
        >>> import torch
        >>> from danlu.attention import GlobalPointer
        >>> scores = GlobalPointer(8, num_types=2, head_size=4)(torch.randn(1, 3, 8))
        >>> scores.shape, int(scores.isfinite().sum())
        (torch.Size([1, 2, 3, 3]), 12)
    """

    def __init__(
        self,
        hidden_size: int,
        num_types: int,
        *,
        head_size: int = 64,
        rope: bool = True,
        bias: bool = True,
        causal_mask: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_types, head_size)
        self.num_types = num_types
        self.head_size = head_size
        self.causal_mask = causal_mask
        self.rope = RotaryEmbedding(head_size, interleaved=True) if rope else None
        self.dense = nn.Linear(hidden_size, 2 * num_types * head_size, bias=bias)

    def project(
        self, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return rotated queries and keys."""
        _check_hidden(hidden, mask, self.dense.in_features)
        heads = self.dense(_without_padding(hidden, mask)).unflatten(-1, (self.num_types, 2, self.head_size))
        query, key = heads.permute(3, 0, 2, 1, 4).unbind(0)
        return _rotated(self.rope, query, positions), _rotated(self.rope, key, positions)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Return the scores of all spans."""
        return _hide(_products(*self.project(hidden, mask, positions)), mask, self.causal_mask)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"num_types={self.num_types}, head_size={self.head_size}, causal_mask={self.causal_mask}"


class EfficientGlobalPointer(nn.Module):
    r"""GlobalPointer whose types share queries and keys and differ in biases: few parameters per type.

    Definition:
        $$[q_i;\, k_i] = W h_i + b, \qquad s_\alpha(i, j) = \frac{(\mathcal R_i q_i)^\top (\mathcal R_j k_j)}{\sqrt D}
        + \tfrac12\big(u_\alpha^\top [q_i;\, k_i] + u_\alpha'^\top [q_j;\, k_j]\big)$$
        where the first term says whether $(i, j)$ is a span and the biases, computed before the rotation, of which
        type; $u$, $u'$ are a linear map $2D \to 2T$ with a bias of its own.

    Args:
        hidden_size: $H$.
        num_types: $T$.
        head_size: $D$, even.
        rope: as in [`GlobalPointer`][danlu.attention.GlobalPointer].
        bias: as there, for both maps.
        causal_mask: as there.

    Returns:
        As there. `project` gives queries and keys `(B, n, D)` and two biases `(B, T, n)`, for
        [`global_pointer_loss`][danlu.losses.global_pointer_loss].

    Raises:
        TypeError: as there.
        ValueError: as there.

    Numerics:
        As there.

    Cost:
        $2D(H + 1) + 2T(2D + 1)$ parameters and $2Bn^2(D + T)$ flops for the scores.

    Source:
        Su et al. (2022), arXiv 2208.03054, section 3.3; the factor $\tfrac12$ is that of the reference code
        bojone/GlobalPointer.

    Example:
        >>> import torch
        >>> from danlu.attention import EfficientGlobalPointer
        >>> head = EfficientGlobalPointer(128, num_types=6, head_size=32)
        >>> sum(p.numel() for p in head.parameters()), head(torch.randn(1, 3, 128)).shape
        (9036, torch.Size([1, 6, 3, 3]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_types: int,
        *,
        head_size: int = 64,
        rope: bool = True,
        bias: bool = True,
        causal_mask: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_types, head_size)
        self.num_types = num_types
        self.head_size = head_size
        self.causal_mask = causal_mask
        self.rope = RotaryEmbedding(head_size, interleaved=True) if rope else None
        self.dense = nn.Linear(hidden_size, 2 * head_size, bias=bias)
        self.types = nn.Linear(2 * head_size, 2 * num_types, bias=bias)

    def project(
        self, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and the biases of first and last tokens."""
        _check_hidden(hidden, mask, self.dense.in_features)
        both = self.dense(_without_padding(hidden, mask))
        start, end = (0.5 * self.types(both)).transpose(1, 2).chunk(2, dim=1)
        query, key = both.chunk(2, dim=-1)
        return _rotated(self.rope, query, positions), _rotated(self.rope, key, positions), start, end

    def forward(self, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Return the scores of all spans."""
        query, key, start, end = self.project(hidden, mask, positions)
        scores = _products(query, key)[:, None]
        scores = scores + start[..., None].to(scores.dtype) + end[..., None, :].to(scores.dtype)
        return _hide(scores, mask, self.causal_mask)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"num_types={self.num_types}, head_size={self.head_size}, causal_mask={self.causal_mask}"


@torch.no_grad()
def decode_spans(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float = 0.0,
    max_length: int | None = None,
    allow_nested: bool = True,
) -> Tensor:
    r"""The spans whose score is above a threshold.

    Definition:
        $$\{(b, \alpha, i, j) : s_{b\alpha}(i, j) > \theta,\; i \le j,\; j - i < m\}$$
        with $\theta$ = `threshold` and $m$ = `max_length`. Without `allow_nested` a span is left out if one of higher
        score that is kept, of whatever type, shares a token with it.

    Args:
        scores: shape `(B, T, n, n)`, floating.
        mask: tokens, bool, shape `(B, n)`, True = real; None means all.
        threshold: $\theta$, nats.
        max_length: $m \ge 1$, tokens; None means any.
        allow_nested: whether spans may overlap.

    Returns:
        int64, shape `(S, 4)`: sample, type, first token and last token (inclusive), by sample and falling score.

    Raises:
        TypeError: `scores` is not floating or `mask` not bool.
        ValueError: shapes do not fit, or `max_length` is below 1.

    Numerics:
        Comparisons only; NaN is no span. Equal scores are ordered by type and place.

    Source:
        Su et al. (2022), arXiv 2208.03054, section 3.1. The choice among overlapping spans is the usual greedy one.

    Example:
        >>> import torch
        >>> from danlu.attention import decode_spans
        >>> scores = torch.full((1, 1, 3, 3), -1.0)
        >>> scores[0, 0, 0, 2], scores[0, 0, 1, 1] = 5.0, 2.0
        >>> decode_spans(scores).tolist(), decode_spans(scores, allow_nested=False).tolist()
        ([[0, 0, 0, 2], [0, 0, 1, 1]], [[0, 0, 0, 2]])
    """
    check_floating("scores", scores)
    if scores.ndim != 4 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must have shape (B, T, n, n), got {tuple(scores.shape)}")
    _check_mask(mask, (scores.shape[0], scores.shape[-1]), scores)
    check_real("threshold", threshold)
    if max_length is not None:
        check_integer("max_length", max_length, low=1)
    found = (scores > threshold) & torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu()
    if max_length is not None:
        found = found.tril(max_length - 1)
    if mask is not None:
        found = found & (mask[:, None, :, None] & mask[:, None, None, :])
    spans = found.nonzero()
    values = scores[found]
    # By falling score, then, stably, by sample.
    order = values.sort(descending=True, stable=True).indices
    order = order[spans[order, 0].sort(stable=True).indices]
    spans = spans[order]
    return spans if allow_nested else spans[_without_overlap(spans.tolist())]


def _without_overlap(spans: list[list[int]]) -> list[int]:
    kept: list[int] = []
    taken: set[int] = set()
    sample = -1
    for place, (own, _, start, end) in enumerate(spans):
        if own != sample:
            sample, taken = own, set()
        tokens = range(start, end + 1)
        if taken.isdisjoint(tokens):
            taken.update(tokens)
            kept.append(place)
    return kept


def _check_sizes(hidden_size: int, num_types: int, head_size: int) -> None:
    check_integer("hidden_size", hidden_size, low=1)
    check_integer("num_types", num_types, low=1)
    check_integer("head_size", head_size, low=2)
    if head_size % 2:
        raise ValueError(f"head_size must be even, since RoPE rotates pairs of channels, got {head_size}")


def _check_mask(mask: Tensor | None, shape: tuple[int, int], like: Tensor) -> None:
    if mask is None:
        return
    check_bool("mask", mask, "real")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask must have shape (B, n) = {shape}, got {tuple(mask.shape)}")
    check_same_device(input=like, mask=mask)


def _check_hidden(hidden: Tensor, mask: Tensor | None, channels: int) -> None:
    check_floating("hidden", hidden)
    if hidden.ndim != 3 or hidden.shape[-1] != channels:
        raise ValueError(f"hidden must have shape (B, n, {channels}), got {tuple(hidden.shape)}")
    _check_mask(mask, (hidden.shape[0], hidden.shape[1]), hidden)


def _without_padding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None else hidden.masked_fill(~mask[..., None], 0.0)


def _rotated(rope: RotaryEmbedding | None, heads: Tensor, positions: Tensor | None) -> Tensor:
    if rope is None:
        return heads
    if positions is not None and positions.ndim == 2 and heads.ndim == 4:
        positions = positions[:, None]
    return rope(heads, positions)


def _products(query: Tensor, key: Tensor) -> Tensor:
    dtype = torch.float32 if is_low_precision(query.dtype) else query.dtype
    # Autocast would round the scores to half precision, whose largest number is soon reached in float16.
    with torch.autocast(device_type=query.device.type, enabled=False):
        scaled = query.to(dtype) / math.sqrt(query.shape[-1])
        return scaled @ key.to(dtype).transpose(-1, -2)


def _hide(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    nowhere = float("-inf")
    if causal:
        tokens = scores.shape[-1]
        below = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril(-1)
        scores = scores.masked_fill(below, nowhere)
    if mask is None:
        return scores
    return scores.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), nowhere)
