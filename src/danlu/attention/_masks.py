"""Visibility as booleans (True = visible), a softmax that knows about empty rows, and the shared checks."""

import torch
from torch import Tensor

from danlu._common.checks import broadcasts_to, check_bool, check_floating, check_real, check_same_device

__all__ = [
    "attend",
    "check_attention",
    "check_attn_mask",
    "check_key_padding_mask",
    "grouped_matmul",
    "visible_keys",
    "without_padding",
]


def check_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
    """Raise `TypeError`/`ValueError` unless the tensors fit together in the layout (B, H, L, D)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (B, H, L, D), got {tuple(tensor.shape)}")
    check_same_device(query=query, key=key, value=value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"batch, key heads and key length must agree, got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same head_dim, got {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads, got {shapes}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"queries are the last of the keys' slots, so there cannot be more of them, got {shapes}")
    if scale is not None:
        check_real("scale", scale)


def check_key_padding_mask(mask: Tensor | None, key: Tensor) -> None:
    """Raise unless `mask` is None or a boolean tensor (B, N) on the keys' device."""
    if mask is None:
        return
    check_bool("key_padding_mask", mask, "visible")
    wanted = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != wanted:
        raise ValueError(f"key_padding_mask must have shape (B, N) = {wanted}, got {tuple(mask.shape)}")
    check_same_device(key=key, key_padding_mask=mask)


def check_attn_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Raise unless `mask` is None or a boolean tensor that broadcasts to (B, H, M, N)."""
    if mask is None:
        return
    check_bool("attn_mask", mask, "visible")
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    given = tuple(mask.shape)
    if not broadcasts_to(given, wanted):
        raise ValueError(f"attn_mask must broadcast to (B, H, M, N) = {wanted}, got {given}")
    check_same_device(query=query, attn_mask=mask)


def visible_keys(
    distance: Tensor, is_causal: bool, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:
    """Visibility broadcastable to (B, H, M, N), from signed distances (query slot minus key slot); None means all.

    A query whose own slot is padding sees nothing.
    """
    visible = (distance >= 0)[None, None] if is_causal else None
    if attn_mask is not None:
        visible = attn_mask if visible is None else visible & attn_mask
    if key_padding_mask is None:
        return visible
    own = key_padding_mask[:, key_padding_mask.shape[1] - distance.shape[0] :]
    padding = own[:, None, :, None] & key_padding_mask[:, None, None, :]
    return padding if visible is None else visible & padding


def without_padding(tensor: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Keys or values with 0 in hidden slots: a weight of 0 does not hide a NaN, since 0 times NaN is NaN."""
    return tensor if key_padding_mask is None else tensor.masked_fill(~key_padding_mask[:, None, :, None], 0.0)


def attend(scores: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over keys and the weighted sum of values; a row that sees no key gives exactly 0 and no gradient.

    Args:
        scores: shape `(B, H, M, N)`.
        value: shape `(B, H_kv, N, E)` with `H` a multiple of `H_kv`, dtype of the scores.
        visible: broadcastable to the scores, or None.
    """
    if visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True)
        # Filled before and after, so that an empty row is outside the graph instead of 0 * NaN within it.
        scores = scores.masked_fill(~visible & ~empty, float("-inf")).masked_fill(empty, 0.0)
        weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    return grouped_matmul(weights, value)


def grouped_matmul(first: Tensor, second: Tensor) -> Tensor:
    """`first @ second` where `second` has `H_kv` heads and each serves `H / H_kv` consecutive heads of `first`."""
    batch, heads, rows, inner = first.shape
    shared = second.shape[1]
    # Autocast would round scores and weights to half precision.
    with torch.autocast(device_type=first.device.type, enabled=False):
        grouped = first.reshape(batch, shared, (heads // shared) * rows, inner) @ second
    return grouped.reshape(batch, heads, rows, second.shape[-1])
