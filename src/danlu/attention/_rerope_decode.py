r"""One decoding step of ReRoPE on keys that are cached without rotation.

Source: "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07); the split into far and near keys is our own.

Shape letters: `B` batch; `H` query heads; `H_kv` key heads, dividing `H`; `N` slots of the cache; `D` head size; `E`
value size; `R` rotated channels.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer, check_real, check_same_device, is_low_precision
from danlu.attention._log_n import LogN, check_log_n
from danlu.attention._masks import (
    check_attention,
    check_key_padding_mask,
    grouped_matmul,
    masked_softmax,
    resolve_frequencies,
    without_padding,
)
from danlu.positions import apply_rope, logn_scale

__all__ = ["rerope_decode"]

# Keys that are rotated, or widened where no kernel accumulates in float32, at a time.
_CHUNK = 1024
# Angles are sums of a coarse and a fine one, so that few cosines are computed.
_FINE = 32


def rerope_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    length: int | Tensor | None = None,
    slope: float = 0.0,
    inv_freq: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    leaky_key: Tensor | None = None,
    logn: LogN | None = None,
    train_length: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    r"""Attention of one new token per sample over a cache of unrotated keys: the last row of `rerope_attention`.

    Definition:
        With the query at slot $i$ = `length` - 1, distances $t = i - j$, $w$ = `window` and $\rho$ = `slope`,
        $$o = \sum_{j \le i} \operatorname{softmax}_j(a_j)\,v_j, \qquad a_j = \begin{cases}
        s\,q^\top (\mathcal R_{-t}\,k_j) & t < w \\
        s\,(\mathcal R_{w + (i - w)\rho}\,q)^\top (\mathcal R_{j\rho}\,k_j) & t \ge w \end{cases}$$
        With $\rho = 0$ far keys are taken from the cache as they are, and only the last $w$ keys are rotated. The
        angles of near keys depend on $t$ alone.

    Args:
        query: shape `(B, H, 1, D)`, not rotated. Its own key and value are in the cache already.
        key: the cache, shape `(B, H_kv, N, D)`, not rotated.
        value: shape `(B, H_kv, N, E)`.
        window: $w \ge 1$ (tokens).
        length: filled slots, the query's own included; slots behind them are not read as anything. An int for all
            samples, integers of shape `(B,)` for samples of their own lengths, None for all `N`.
        slope: $\rho \ge 0$.
        inv_freq: frequencies (radians per position); None means `rope_frequencies(D)`.
        scale: factor of the scores; None means $D^{-1/2}$.
        key_padding_mask: bool, shape `(B, N)`, True = visible, as for padding on the left; None means that all filled
            slots are visible. A sample whose query slot is hidden gets 0.
        leaky_key: $\mathcal R_{j\rho}\,k_j$, shape of `key`, for `slope` > 0; None means that far keys are rotated in
            every step, which costs more than attention itself.
        logn: "train" or "post", as in `rerope_attention`, with the number of visible keys.
        train_length: $T$ of `logn` (tokens).
        interleaved: rotate neighboring channels instead of halves.

    Returns:
        Shape `(B, H, 1, E)`, dtype of `query`. A sample that sees no key gets exactly 0.

    Raises:
        TypeError: not floating tensors of one dtype, a mask that is not bool, or options of a wrong type.
        ValueError: more than one query, `length` outside of 1 to `N`, `window` < 1, `slope` < 0, `leaky_key` without
            `slope` or of another shape, shapes or devices that do not fit. Lengths in a tensor are not looked at.

    Numerics:
        One softmax over far and near scores. Half inputs are computed in float32 and rounded once; their rotated keys
        are rounded to the dtype of the cache. Angles are float64. Contents of hidden slots cannot leak, not even NaN.

    Cost:
        $O(BHN(D + E))$ and the rotation of $B H_{kv} w$ keys; $O(B(HN + H_{kv} w D))$ memory. With lengths in a tensor
        the near keys and values are gathered.

    Differences:
        The author's code rotates all cached keys anew in every step.

    Source:
        "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07).

    Example:
        >>> import torch
        >>> from danlu.attention import rerope_attention, rerope_decode
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> full = rerope_attention(query, key, value, window=4)
        >>> torch.allclose(rerope_decode(query[:, :, -1:], key, value, window=4), full[:, :, -1:], atol=1e-6)
        True
    """
    frequencies = _check(query, key, value, window, length, slope, inv_freq, scale, key_padding_mask, leaky_key)
    check_log_n(logn, train_length)
    dtype = query.dtype
    if is_low_precision(dtype):
        query = query.float()
    if logn is not None and train_length is not None:
        count = _visible(key.shape[2], length, key_padding_mask, query)
        query = query * logn_scale(count, train_length, logn).to(query.dtype)
    rotation = _Rotation(window, slope, frequencies, interleaved)
    cache = _Band(query, key, value, key_padding_mask)
    if isinstance(length, Tensor):
        bands = _ragged(cache, length, leaky_key, rotation)
    else:
        bands = _uniform(cache, key.shape[2] if length is None else length, leaky_key, rotation)
    out = _attend(bands, query.shape[-1] ** -0.5 if scale is None else scale).to(dtype)
    if key_padding_mask is None:
        return out
    return out.masked_fill(~_own(key_padding_mask, length)[:, None, None, None], 0.0)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    length: int | Tensor | None,
    slope: float,
    inv_freq: Tensor | None,
    scale: float | None,
    key_padding_mask: Tensor | None,
    leaky_key: Tensor | None,
) -> Tensor:
    check_integer("window", window, low=1)
    check_real("slope", slope, low=0.0)
    check_attention(query, key, value, scale)
    if query.shape[2] != 1:
        raise ValueError(f"a decoding step has one query per sample, got query {tuple(query.shape)}")
    check_key_padding_mask(key_padding_mask, key)
    if isinstance(length, Tensor):
        if length.dtype not in (torch.int32, torch.int64) or length.shape != key.shape[:1]:
            raise ValueError(f"length must be integers of shape (B,), got {length.dtype} of {tuple(length.shape)}")
        check_same_device(query=query, length=length)
    elif length is not None:
        check_integer("length", length, low=1)
        if length > key.shape[2]:
            raise ValueError(f"length must be at most the number of slots, {key.shape[2]}, got {length}")
    if leaky_key is not None:
        if not slope:
            raise ValueError("leaky_key is of use with slope > 0 only")
        if leaky_key.shape != key.shape or leaky_key.dtype != key.dtype:
            raise ValueError(
                f"leaky_key must be like key, got {leaky_key.dtype} of {tuple(leaky_key.shape)} and "
                f"{key.dtype} of {tuple(key.shape)}"
            )
        check_same_device(query=query, leaky_key=leaky_key)
    return resolve_frequencies(inv_freq, query)


@dataclass(frozen=True)
class _Rotation:
    """The options of ReRoPE."""

    window: int
    slope: float
    frequencies: Tensor
    interleaved: bool

    def far_query(self, query: Tensor, slot: Tensor) -> Tensor:
        """Queries at the slots, for far keys at theirs times the slope."""
        position = (slot.to(torch.float64) - self.window) * self.slope + self.window
        return apply_rope(query, position, self.frequencies, interleaved=self.interleaved)

    def turned_back(self, key: Tensor, start: float = 0.0, step: float = 1.0) -> Tensor:
        """Keys rotated back by ..., start + 2 step, start + step, start: by distances for queries as they are."""
        count = key.shape[2]
        if count > _CHUNK:
            # In pieces that stay in the processor's cache.
            pieces = range(0, count, _CHUNK)
            ends = [start + step * max(0, count - low - _CHUNK) for low in pieces]
            parts = [key[:, :, low : low + _CHUNK] for low in pieces]
            return torch.cat([self.turned_back(x, end, step) for x, end in zip(parts, ends, strict=True)], 2)
        dtype = torch.float32 if is_low_precision(key.dtype) else key.dtype
        width = 2 * self.frequencies.shape[0]
        with torch.autocast(device_type=key.device.type, enabled=False):
            cos, sin = (table.to(dtype) for table in _tables(key.shape[2], self.frequencies, start, step))
            body = key[..., :width].to(dtype)
            if self.interleaved:
                first, second = body[..., 0::2], body[..., 1::2]
            else:
                first, second = body[..., : width // 2], body[..., width // 2 :]
            turned = (first * cos + second * sin, second * cos - first * sin)
            out = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
            out = out.to(key.dtype)
            return out if width == key.shape[-1] else torch.cat((out, key[..., width:]), -1)


@dataclass(frozen=True)
class _Band:
    """Keys that share the rotation of the query; `visible` of shape `(B, n)`, None if all are."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None

    def cut(self, low: int, high: int) -> "_Band":
        """The keys from `low` to `high`."""
        visible = None if self.visible is None else self.visible[:, low:high]
        return _Band(self.query, self.key[:, :, low:high], self.value[:, :, low:high], visible)

    def cleaned(self) -> "_Band":
        """With 0 in hidden slots."""
        key, value = (without_padding(x, self.visible) for x in (self.key, self.value))
        return _Band(self.query, key, value, self.visible)


def _uniform(cache: _Band, filled: int, leaky_key: Tensor | None, rotation: _Rotation) -> list[_Band]:
    """Bands that are slices of the cache."""
    border = max(0, filled - rotation.window)
    near = cache.cut(border, filled)
    bands = [replace(near, key=rotation.turned_back(near.key))]
    if not border:
        return bands
    far = cache.cut(0, border)
    if rotation.slope and leaky_key is None:
        # The last far key is `window` away.
        turned = rotation.turned_back(far.key, float(rotation.window), rotation.slope)
        return [*bands, replace(far, key=turned)]
    slot = torch.tensor([filled - 1], device=cache.key.device)
    far_key = far.key if leaky_key is None else leaky_key[:, :, :border]
    return [*bands, replace(far, query=rotation.far_query(cache.query, slot), key=far_key)]


def _ragged(cache: _Band, length: Tensor, leaky_key: Tensor | None, rotation: _Rotation) -> list[_Band]:
    """Bands of samples of different lengths: near keys are gathered, and of all slots the far ones are visible."""
    slots = torch.arange(cache.key.shape[2], device=cache.key.device)
    length = length.to(torch.int64)[:, None]
    count = min(rotation.window, len(slots))
    near_slots = length - count + slots[:count]
    near_visible, near_slots = near_slots >= 0, near_slots.clamp(0, len(slots) - 1)
    far_visible = slots < length - rotation.window
    if cache.visible is not None:
        near_visible = near_visible & cache.visible.gather(1, near_slots)
        far_visible = far_visible & cache.visible

    def near(x: Tensor) -> Tensor:
        return x.gather(2, near_slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    far_query = rotation.far_query(cache.query, length[:, :, None] - 1)
    far_key = cache.key if leaky_key is None else leaky_key
    if rotation.slope and leaky_key is None:
        positions = slots.to(torch.float64) * rotation.slope
        far_key = apply_rope(far_key, positions, rotation.frequencies, interleaved=rotation.interleaved)
    return [
        _Band(cache.query, rotation.turned_back(near(cache.key)), near(cache.value), near_visible),
        _Band(far_query, far_key, cache.value, far_visible),
    ]


def _tables(count: int, frequencies: Tensor, start: float, step: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions ..., start + step, start, float64, shape `(count, R / 2)`."""
    device, frequencies = frequencies.device, frequencies.to(torch.float64)
    fine = torch.arange(_FINE - 1, -1, -1, dtype=torch.float64, device=device) * step + start
    coarse = torch.arange((count - 1) // _FINE, -1, -1, dtype=torch.float64, device=device) * (_FINE * step)
    a, b = coarse[:, None, None] * frequencies, fine[:, None] * frequencies
    # exp(i (a + b)) = exp(i a) exp(i b), at the price of one rounding of float64.
    cos = a.cos() * b.cos() - a.sin() * b.sin()
    sin = a.sin() * b.cos() + a.cos() * b.sin()
    return cos.flatten(0, 1)[-count:], sin.flatten(0, 1)[-count:]


def _own(key_padding_mask: Tensor, length: int | Tensor | None) -> Tensor:
    """Whether the query's own slot is visible, by sample."""
    if isinstance(length, Tensor):
        own = (length.to(torch.int64) - 1).clamp(0, key_padding_mask.shape[1] - 1)
        return key_padding_mask.gather(1, own[:, None])[:, 0]
    return key_padding_mask[:, -1 if length is None else length - 1]


def _visible(slots: int, length: int | Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor:
    """Number of visible keys, broadcastable to `(B, 1, 1, 1)`."""
    if key_padding_mask is None:
        if isinstance(length, Tensor):
            return length[:, None, None, None]
        return torch.tensor(slots if length is None else length, device=like.device)
    if isinstance(length, Tensor):
        key_padding_mask = key_padding_mask & (torch.arange(slots, device=like.device) < length[:, None])
    elif length is not None:
        key_padding_mask = key_padding_mask[:, :length]
    return key_padding_mask.sum(1)[:, None, None, None]


def _attend(bands: list[_Band], scale: float) -> Tensor:
    """Attention over all bands; what hidden slots hold is removed only where it could leak."""
    hidden = any(band.visible is not None for band in bands)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for b in bands for x in (b.query, b.key, b.value))
    looking_is_free = bands[0].key.device.type == "cpu" and not torch.compiler.is_compiling() and not needs_grad
    if not looking_is_free:
        return _dense([band.cleaned() for band in bands], scale)
    out = (_by_kernel if is_low_precision(bands[0].key.dtype) else _dense)(bands, scale)
    # A weight of 0 does not hide a NaN. A cache without what is hidden is a copy, dearer than attention itself.
    if hidden and not bool(out.isfinite().all()):
        return _dense([band.cleaned() for band in bands], scale)
    return out


def _dense(bands: list[_Band], scale: float) -> Tensor:
    """The definition: one softmax over the scores of all bands."""
    wide = bands[0].query.dtype
    if bands[0].key.dtype != wide:
        bands = [b.cut(low, low + _CHUNK) for b in bands for low in range(0, b.key.shape[2], _CHUNK)]
    scores = [grouped_matmul(b.query * scale, b.key.to(wide).transpose(-2, -1)) for b in bands]
    visible = None
    if any(b.visible is not None for b in bands):
        batch = bands[0].key.shape[0]
        shown = [
            b.key.new_ones(batch, b.key.shape[2], dtype=torch.bool) if b.visible is None else b.visible for b in bands
        ]
        visible = torch.cat(shown, 1)[:, None, None]
    weights = masked_softmax(torch.cat(scores, -1), visible).split([b.key.shape[2] for b in bands], -1)
    return torch.stack([grouped_matmul(w, b.value.to(wide)) for w, b in zip(weights, bands, strict=True)]).sum(0)


def _by_kernel(bands: list[_Band], scale: float) -> Tensor:
    """Half precision on the CPU: the flash kernel reads the cache as it is and accumulates in float32.

    The heads that share a key head are the rows of one call, so the cache is read once.
    """
    outs: list[Tensor] = []
    found: list[Tensor] = []
    for band in bands:
        batch, heads, _, dim = band.query.shape
        groups, width = band.key.shape[1], max(dim, band.value.shape[-1])
        query = band.query.to(band.key.dtype).reshape(batch, groups, heads // groups, dim)
        mask = None
        if band.visible is not None:
            mask = torch.zeros(band.visible.shape, dtype=query.dtype).masked_fill_(~band.visible, -math.inf)
            mask = mask[:, None, None].expand(-1, 1, heads // groups, -1)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_widened(x, width) for x in (query, band.key, band.value)), 0.0, False, attn_mask=mask, scale=scale
        )
        outs.append(out[..., : band.value.shape[-1]].float())
        if band.visible is not None:
            # The kernel says 0 where no key is visible.
            total = total.masked_fill(~band.visible.any(1)[:, None, None], -math.inf)
        found.append(total)
    totals = torch.stack(found)
    shares = masked_softmax(totals.movedim(0, -1), (totals > -math.inf).movedim(0, -1)).movedim(-1, 0)
    mixed = (torch.stack(outs) * shares[..., None]).sum(0)
    return mixed.reshape(*bands[0].query.shape[:3], -1)


def _widened(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
