r"""Which calls of an attention kernel cover every visible pair of query and key once.

Shape letters: as in `danlu.attention._rerope`; `T` rows of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from danlu.attention._masks import mask_bias, mask_visible

__all__ = [
    "TILE",
    "Call",
    "Job",
    "Masks",
    "band_calls",
    "call_mask",
    "jobs",
    "tile_calls",
    "tile_mask",
    "visible_spans",
]

# Query rows of a tile. The keys of a tile reach over window + TILE - 1 slots, of which a row needs `window`; small
# tiles waste less, and below 32 the calls cost more than they save.
TILE = 64


@dataclass(frozen=True)
class Masks:
    """What is visible by the caller's word; None where all is."""

    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    attn_mask: Tensor | None = None
    # Of the keys, (B, N), float64; None where they are the slots. They say which keys are near.
    positions: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """Samples (None: all) whose rows see these keys, of which the rows are the last; `masked`: and not all of them."""

    samples: Tensor | None
    rows: slice
    keys: slice
    masked: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a kernel: a band, its rows and keys, and which of them see each other.

    "causal": square, a row sees the keys up to its own place. "mirrored": square, from its own place on. "tile": a
    window, in the columns of `tile_mask` from `mask_from` on. "window": all of a window, for kernels that know one;
    rows and keys end together. "masked": by comparison of slots and by the masks.
    """

    band: Literal["left", "near", "right"]
    rows: slice
    keys: slice
    shape: Literal["full", "causal", "mirrored", "tile", "window", "masked"]
    mask_from: int = 0


def jobs(rows: int, keys: int, masks: Masks, *, spans: bool = True) -> list[Job]:
    """Parts of the batch in which the visible slots have no gaps, or one job whose calls look at the masks.

    Looking for gaps waits for a GPU; without `spans` any padding is left to the calls.
    """
    everything, masked = (Job(None, slice(0, rows), slice(0, keys), masked=masked) for masked in (False, True))
    if masks.attn_mask is not None or masks.positions is not None:
        return [masked]
    if masks.cu_seqlens is not None:
        borders = masks.cu_seqlens.tolist()
        return [Job(None, slice(a, b), slice(a, b)) for a, b in pairwise(borders) if a < b]
    if masks.key_padding_mask is None:
        return [everything]
    contiguous = visible_spans(masks.key_padding_mask) if spans else None
    if contiguous is None:
        return [masked]
    found = []
    for (first, last), samples in contiguous.items():
        # Rows before the first visible slot and behind the last are padding, too.
        low, high = max(0, first - (keys - rows)), max(0, last - (keys - rows))
        if low < high:
            whole = len(samples) == len(masks.key_padding_mask)
            found.append(Job(None if whole else samples, slice(low, high), slice(first, last)))
    return found


def visible_spans(key_padding_mask: Tensor) -> dict[tuple[int, int], Tensor] | None:
    """First visible slot and the one behind the last -> samples; None if the visible slots of a sample have gaps."""
    slots = torch.arange(key_padding_mask.shape[1], device=key_padding_mask.device)
    count = key_padding_mask.sum(1)
    last = torch.where(key_padding_mask, slots + 1, 0).amax(1)
    first = torch.where(key_padding_mask, slots, len(slots)).amin(1).minimum(last)
    if bool((last - first != count).any()):
        return None
    pairs, owner = torch.stack((first, last), 1).unique(dim=0, return_inverse=True)
    return {(low, high): (owner == i).nonzero()[:, 0] for i, (low, high) in enumerate(pairs.tolist())}


def band_calls(rows: int, keys: int, window: int, is_causal: bool, *, windows: bool = False) -> Iterator[Call]:
    """The calls when nothing is masked, far bands first; the rows are the last of the slots.

    Far keys to the left, at slots up to `window` before the row's, are a square causal call of shifted rows, after a
    full one for slots that every row sees. Far keys to the right are its mirror image. Near keys are tiles of rows, or
    one call of a kernel that knows `windows`.
    """
    offset = keys - rows
    first = offset - window
    if first > 0:
        yield Call("left", slice(0, rows), slice(0, first), "full")
    start = max(0, -first)
    if start < rows:
        yield Call("left", slice(start, rows), slice(first + start, first + rows), "causal")
    if not is_causal and rows > window:
        yield Call("right", slice(0, rows - window), slice(offset + window, keys), "mirrored")
    if not is_causal and window >= keys:
        yield Call("near", slice(0, rows), slice(0, keys), "full")
        return
    if windows:
        yield Call("near", slice(0, rows), slice(max(0, offset - window + 1), keys), "window")
        return
    begin = 0
    if is_causal and offset == 0:
        begin = min(window, rows)
        yield Call("near", slice(0, begin), slice(0, begin), "causal")
    for low in range(begin, rows, TILE):
        high = min(low + TILE, rows)
        reach = offset + low - window + 1
        stop = offset + high if is_causal else min(keys, offset + high + window - 1)
        yield Call("near", slice(low, high), slice(max(0, reach), stop), "tile", max(0, -reach))


def tile_mask(window: int, is_causal: bool, device: torch.device) -> Tensor:
    """What a tile of the near band sees: row `r` the columns from `r` on, the width of the window on both sides."""
    width = window if is_causal else 2 * window - 1
    row = torch.arange(TILE, device=device)[:, None]
    column = torch.arange(TILE + width - 1, device=device)
    return (column >= row) & (column < row + width)


def tile_calls(rows: int, keys: int, window: int, is_causal: bool, positions: Tensor | None = None) -> Iterator[Call]:
    """The calls when any pair may be hidden: tiles of rows against the keys that are in reach of one of them.

    Positions, sorted, of shape `(B, N)`, are those of `Masks`.
    """
    offset = keys - rows
    for low in range(0, rows, TILE):
        high = min(low + TILE, rows)
        first, last = offset + low, offset + high - 1
        if positions is None:
            # Where near keys begin for the first row and for the last, and where they end.
            begin, left = max(0, first - window + 1), max(0, last - window + 1)
            right, end = min(keys, first + window), min(keys, last + window)
        else:
            begin, left, right, end = _near_slots(positions, first, last, window)
        yield Call("near", slice(low, high), slice(begin, last + 1 if is_causal else end), "masked")
        if left:
            yield Call("left", slice(low, high), slice(0, left), "masked")
        if not is_causal and right < keys:
            yield Call("right", slice(low, high), slice(right, keys), "masked")


def _near_slots(positions: Tensor, first: int, last: int, window: int) -> tuple[int, int, int, int]:
    """The first near slot of the first row and of the last, and the first slots to the right that are not near."""
    if positions.device.type != "cpu":
        # Looking would wait for the device; the masks tell the bands apart.
        return 0, last + 1, first, positions.shape[1]
    own = positions[:, [first, last]].contiguous()
    left = torch.searchsorted(positions, own - window, right=True)
    right = torch.searchsorted(positions, own + window)
    return int(left[:, 0].amin()), int(left[:, 1].amax()), int(right[:, 0].amin()), int(right[:, 1].amax())


def call_mask(
    call: Call, rows: int, keys: int, window: int, is_causal: bool, masks: Masks, device: torch.device
) -> Tensor:
    """Visibility of a "masked" call, broadcastable to (B, H, rows of the call, keys of the call)."""
    slots = torch.arange(keys, device=device)
    own = slots[keys - rows :][call.rows]
    distance = (own[:, None] - slots[call.keys])[None, None]
    visible = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if masks.positions is not None:
        distance = (masks.positions[:, own, None] - masks.positions[:, None, call.keys])[:, None]
    if call.band == "near":
        visible = visible & (distance.abs() < window)
    else:
        visible = visible & (distance >= window if call.band == "left" else distance <= -window)
    if masks.attn_mask is not None:
        visible = visible & mask_visible(_of_call(masks.attn_mask, call))
    if masks.key_padding_mask is not None:
        shown = masks.key_padding_mask
        visible = visible & (shown[:, None, own, None] & shown[:, None, None, call.keys])
    return visible


def call_bias(call: Call, masks: Masks) -> Tensor | None:
    """What a floating mask adds to the scores of a "masked" call."""
    return None if masks.attn_mask is None else mask_bias(_of_call(masks.attn_mask, call))


def _of_call(mask: Tensor, call: Call) -> Tensor:
    """The rows and keys of a call; a mask of one row or column stands for all."""
    mask = mask if mask.shape[-2] == 1 else mask[..., call.rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., call.keys]
