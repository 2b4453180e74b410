r"""How attention on quantized keys is cut into calls of a kernel, and which pairs each of them sees.

Shape letters: as in `danlu.attention._vq_blocks`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Call", "calls", "distance_index", "near_offsets"]

# Elements that a call makes at a time, scores in the plain form, gradients with a flash kernel: they fit the cache of a
# core, or feed a GPU.
_HELD = {"cpu": 2**20}
_HELD_ELSEWHERE = 2**26


class Call(NamedTuple):
    """A part of the work for a kernel: 4-dimensional views of rows and keys, and how to add to the gradients."""

    samples: slice
    group: int
    rows: slice
    keys: slice
    # Additive, broadcastable to the scores.
    mask: Tensor | None
    is_causal: bool
    # Of the block of keys from that of the queries; None for codewords.
    offset: int | None
    # Whether these are pairs at the window or beyond, for which queries and keys have channels of their own.
    beyond: bool


def near_offsets(is_causal: bool, by_distance: bool, backward: bool) -> tuple[int, ...]:
    """Near blocks of keys; in the forward, scores that do not depend on the distance come from codewords alone."""
    if by_distance or backward:
        return (0, -1) if is_causal else (0, -1, 1)
    return (0,) if is_causal else ()


def calls(
    query: Tensor,
    key: Tensor,
    logs: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    is_causal: bool,
    window: int,
    offsets: tuple[int, ...],
    flash: bool,
) -> Iterator[Call]:
    """The calls that cover the near blocks at `offsets`, and the codewords."""
    batch, heads, rows, size, _ = query.shape
    blocks, key_heads = key.shape[2], key.shape[1]
    first = blocks - rows
    for group in range(heads // key_heads):
        for offset, beyond in _bands(offsets, size, window):
            low, high = max(0, -offset - first), min(rows, blocks - offset - first)
            table = _table(bias, query, offset, is_causal, window, beyond)
            if bias is not None and table is not None:
                table = table.unflatten(0, (key_heads, -1))[:, group]
            masked = not flash or (table is not None and seen is not None)
            per_sample = key_heads * size * (size if masked else query.shape[-1]) * (high - low)
            for samples, part in _pieces(batch, low, high, per_sample, query.device):
                keys = slice(part.start + first + offset, part.stop + first + offset)
                mask = None if table is None else table[:, None]
                if mask is not None and bias is not None:
                    mask = mask.repeat(samples.stop - samples.start, 1, 1, 1)
                if seen is not None:
                    hidden = _hide(seen[samples, None, keys], query.dtype)
                    hidden = hidden.expand(-1, key_heads, -1, -1, -1).flatten(0, 1)
                    mask = hidden if mask is None else mask + hidden
                yield Call(
                    samples,
                    group,
                    part,
                    keys,
                    mask,
                    is_causal and (offset == 0 or _is_triangle(offset, size, window, beyond)),
                    offset,
                    beyond,
                )
        count = logs.shape[2]
        per_sample = key_heads * logs.shape[3] * (query.shape[-1] if flash else size) * count
        for samples, part in _pieces(batch, 0, count, per_sample, query.device):
            shift = rows - count
            mask = logs[samples, :, part, None].flatten(0, 1)
            yield Call(
                samples, group, slice(part.start + shift, part.stop + shift), part, mask, False, None, window > 0
            )


def _bands(offsets: tuple[int, ...], size: int, window: int) -> Iterator[tuple[int, bool]]:
    """Pairs of blocks; where there is a window, so that attention is causal, their pairs within it and beyond apart."""
    for offset in offsets:
        nearest, farthest = _reach(offset, size)
        if window == 0 or nearest < window:
            yield offset, False
        if 0 < window <= farthest:
            yield offset, True


def _reach(offset: int, size: int) -> tuple[int, int]:
    """Smallest and largest distance of a causal pair of blocks."""
    return max(0, 1 - size - offset * size), size - 1 - offset * size


def _is_triangle(offset: int, size: int, window: int, beyond: bool) -> bool:
    """Whether the pairs beyond the window begin on the diagonal of two different blocks."""
    return beyond and offset == -1 and window == size


def _pieces(batch: int, low: int, high: int, per_sample: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Samples and blocks that come in one call: several samples with all blocks, or one with some of them."""
    if low >= high:
        return
    limit = _HELD.get(device.type, _HELD_ELSEWHERE)
    many = min(batch, limit // max(1, per_sample)) or 1
    step = high - low if many * per_sample <= limit else max(1, (high - low) * limit // per_sample)
    for sample in range(0, batch, many):
        for start in range(low, high, step):
            yield slice(sample, min(sample + many, batch)), slice(start, min(start + step, high))


def _hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[..., None, :]


def distance_index(size: int, offset: int, width: int, is_causal: bool, device: torch.device) -> Tensor:
    slots = torch.arange(size, device=device)
    distance = slots[:, None] - slots - offset * size
    # Negative distances are hidden where attention is causal.
    return distance.clamp_min(0) if is_causal else distance + width // 2


def _table(
    bias: Tensor | None, query: Tensor, offset: int, is_causal: bool, window: int, beyond: bool
) -> Tensor | None:
    """Added to the scores of a block of queries and one of keys, `(H, P, P)`, or `(1, P, P)` without a bias."""
    size = query.shape[3]
    table = None
    if bias is not None:
        table = bias[:, distance_index(size, offset, bias.shape[1], is_causal, bias.device)]
    nearest, farthest = _reach(offset, size)
    all_in_band = nearest >= window if beyond else farthest < window
    if window == 0 or all_in_band or _is_triangle(offset, size, window, beyond):
        return table
    distance = distance_index(size, offset, 2 * size, True, query.device)
    hidden = distance < window if beyond else distance >= window
    return (query.new_zeros(1, size, size) if table is None else table).masked_fill(hidden, -math.inf)
