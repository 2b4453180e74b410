r"""What the rows of a call of attention see, as functions of the rows, for masks of transformers and of torch.

Shape letters: `B` batch, `H` heads, `R` rows (queries), `N` keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.integrations._attention_rows import Rules
from danlu.integrations.transformers_prefix import SplitKind

__all__ = ["of_block_mask", "padding_of", "projected", "rules_of_split", "rules_of_torch", "rules_of_transformers"]


def _split_mask(mask: Tensor, true_hides: bool = False) -> tuple[Tensor, Tensor | None]:
    """A mask as visibility and bias."""
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2, mask
    mask = mask.bool()
    return (~mask if true_hides else mask), None


def rules_of_transformers(
    query: Tensor, key: Tensor, mask: object, options: Mapping[str, Any], *, causal: bool, own: bool
) -> tuple[Rules, bool]:
    """Rules by tile, and whether keys behind a row's slot can be left out."""
    rows, keys = query.shape[2], key.shape[2]
    slots = torch.arange(keys, device=query.device)
    bias = options.get("position_bias")
    window = options.get("sliding_window")
    # Masks of four axes, and masks of flex attention, say everything.
    says_all = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
    causal = causal and not says_all

    def rules(places: Tensor) -> tuple[Tensor | None, Tensor | None]:
        row = places[:, None] + max(0, keys - rows)
        extra: Tensor | None = None
        visible: Tensor | None = None
        if isinstance(bias, Tensor):
            # Some models add their mask to it.
            visible, extra = _split_mask(_rows_of(bias, places)[..., :keys])
        if isinstance(mask, Tensor) and mask.ndim == 2:
            visible = _both(visible, mask.bool()[:, None, None, :keys])
        elif isinstance(mask, Tensor):
            shown, additive = _split_mask(_rows_of(mask, places)[..., :keys])
            visible = _both(visible, shown)
            extra = additive if extra is None else extra if additive is None else extra + additive
        elif mask is not None:
            visible = _both(visible, of_block_mask(mask, query, places, keys))
        if causal:
            visible = _both(visible, slots <= row)
        if window is not None and not says_all:
            visible = _both(visible, (slots > row - window) & (slots < row + window))
        return _without_padding(visible, places, own), extra

    return rules, causal


def rules_of_split(
    query: Tensor, key: Tensor, kind: SplitKind, prefix: Tensor | int | None, padding: Tensor | None, *, own: bool
) -> tuple[Rules, bool]:
    """The same for attention by mask kinds, of heads and samples."""
    rows, keys = query.shape[2], key.shape[2]
    slots = torch.arange(keys, device=query.device)
    border = torch.as_tensor(keys if prefix is None else prefix, device=query.device).view(-1, 1, 1, 1)
    looks_ahead = torch.arange(query.shape[1], device=query.device).view(-1, 1, 1) % 2 == 1

    def rules(places: Tensor) -> tuple[Tensor | None, Tensor | None]:
        row = places[:, None] + keys - rows
        visible = (slots <= row)[None, None]
        inside = (row < border) & (slots < border)
        if kind == "prefix":
            visible = visible | inside
        elif kind != "causal":
            backward = torch.where(row < border, inside & (slots >= row), visible)
            visible = backward if kind == "backward" else torch.where(looks_ahead, backward, visible)
        if padding is not None:
            visible = visible & padding[:, None, None, :]
        return _without_padding(visible, places, own), None

    return rules, kind == "causal"


def rules_of_torch(query: Tensor, key: Tensor, masks: Sequence[Tensor | None], *, own: bool) -> Rules:
    keys = key.shape[2]

    def rules(places: Tensor) -> tuple[Tensor | None, Tensor | None]:
        visible: Tensor | None = None
        bias: Tensor | None = None
        for mask in masks:
            if mask is not None:
                one, additive = _split_mask(_rows_of(mask, places)[..., :keys], true_hides=True)
                visible = _both(visible, one)
                bias = additive if bias is None else bias if additive is None else bias + additive
        return _without_padding(visible, places, own), bias

    return rules


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def _rows_of(mask: Tensor, places: Tensor) -> Tensor:
    """Some rows of a mask; one row stands for all."""
    return mask if mask.shape[-2] == 1 else mask[..., places, :]


def _without_padding(visible: Tensor | None, places: Tensor, own: bool) -> Tensor | None:
    """Rows whose own slot is hidden are padding, and see nothing."""
    if visible is None or not own:
        return visible
    itself = visible.expand(*visible.shape[:-2], len(places), visible.shape[-1])
    return visible & itself.gather(-1, places[:, None].expand(*itself.shape[:-1], 1))


def of_block_mask(mask: Any, query: Tensor, places: Tensor, keys: int) -> Tensor:
    """Visibility by the function of a mask of flex attention."""
    batch, heads, slots = (torch.arange(n, device=query.device) for n in (*query.shape[:2], keys))
    index = torch.meshgrid(batch, heads, places, slots, indexing="ij")
    return cast("Tensor", mask.mask_mod(*index))


def projected(attention: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    width = attention.embed_dim
    if attention._qkv_same_embed_dim:
        weights = (attention.in_proj_weight[:width], attention.in_proj_weight[width : 2 * width])
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight)
    bias = attention.in_proj_bias
    biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    return (
        F.linear(query.to(weights[0].dtype), weights[0], biases[0]),
        F.linear(key.to(weights[1].dtype), weights[1], biases[1]),
    )


def padding_of(nested: Tensor) -> Tensor:
    """True in the padding of a nested tensor when it is padded."""
    lengths = torch.tensor([len(one) for one in nested.unbind()], device=nested.device)
    return torch.arange(int(lengths.max()), device=nested.device) >= lengths[:, None]
