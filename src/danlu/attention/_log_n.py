r"""The number of keys that each query sees, for [`logn_scale`][danlu.positions.logn_scale].

Source: "Transformer升级之路:12、无限外推的ReRoPE?" (2023-08-07).

Shape letters: as in `danlu.attention._rerope`.
"""

from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer
from danlu.attention._masks import mask_visible, segments

__all__ = ["LogN", "check_log_n", "count_visible"]

LogN = Literal["train", "post"]

# Rows whose visibility is held at once while keys are counted.
_ROWS = 256


def check_log_n(logn: str | None, train_length: int | None) -> None:
    """Raise unless both are given and right, or neither is."""
    if logn is None:
        if train_length is not None:
            raise ValueError(f"train_length is of use with logn only, got {train_length} without it")
        return
    check_choice("logn", logn, ("train", "post"))
    if train_length is None:
        raise ValueError(f"logn={logn!r} needs train_length, the length that the model was trained with")
    check_integer("train_length", train_length, low=2)


def count_visible(
    rows: int,
    keys: int,
    device: torch.device,
    *,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """Number of keys that each query sees, broadcastable to (B, H, M, 1); the queries are the last of the slots.

    A query that is padding itself gets some number or other.
    """
    slots = torch.arange(keys, device=device)
    own = slots[keys - rows :]
    if attn_mask is not None:
        counts = []
        for low in range(0, rows, _ROWS):
            visible = mask_visible(attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., low : low + _ROWS, :])
            if is_causal:
                visible = visible & (own[low : low + _ROWS, None] >= slots)
            if key_padding_mask is not None:
                visible = visible & key_padding_mask[:, None, None]
            # A mask of one row or column stands for all of them.
            visible = visible.expand(*visible.shape[:-2], min(_ROWS, rows - low), keys)
            counts.append(visible.sum(-1, keepdim=True))
        return torch.cat(counts, -2) if counts else slots.new_zeros(0, 1)
    if cu_seqlens is not None:
        owner = segments(cu_seqlens, keys)
        starts = cu_seqlens.to(torch.int64)
        return (own - starts[owner] + 1 if is_causal else starts[owner + 1] - starts[owner])[:, None]
    if key_padding_mask is not None:
        if is_causal:
            return key_padding_mask.cumsum(1)[:, None, keys - rows :, None]
        return key_padding_mask.sum(1)[:, None, None, None]
    return own[:, None] + 1 if is_causal else torch.full_like(own[:, None], keys)
