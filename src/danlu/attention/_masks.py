"""Visibility as booleans (True = visible), a softmax that knows about empty rows, and the shared checks."""

import torch
from torch import Tensor, nn

from danlu._common.checks import broadcasts_to, check_bool, check_floating, check_real, check_same_device
from danlu.positions import rope_frequencies

__all__ = [
    "attend",
    "check_attention",
    "check_attn_mask",
    "check_cu_seqlens",
    "check_key_padding_mask",
    "check_positions",
    "grouped_matmul",
    "mask_bias",
    "mask_visible",
    "masked_softmax",
    "resolve_frequencies",
    "segments",
    "visible_keys",
    "without_padding",
]


_POSITIONS = (torch.int32, torch.int64, torch.float32, torch.float64)


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


def resolve_frequencies(inv_freq: Tensor | None, query: Tensor) -> Tensor:
    """The frequencies on the query's device, by default those of its head size."""
    if inv_freq is None:
        if query.shape[-1] % 2 or query.shape[-1] == 0:
            raise ValueError(f"head_dim must be even and positive without inv_freq, got query {tuple(query.shape)}")
        return rope_frequencies(query.shape[-1]).to(query.device)
    check_floating("inv_freq", inv_freq)
    if inv_freq.ndim != 1 or 2 * inv_freq.shape[0] > query.shape[-1]:
        raise ValueError(
            f"inv_freq must have shape (R / 2,) with R at most {query.shape[-1]}, got {tuple(inv_freq.shape)}"
        )
    check_same_device(query=query, inv_freq=inv_freq)
    return inv_freq


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
    """Raise unless `mask` is None or a boolean or floating tensor that broadcasts to (B, H, M, N)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and not mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attn_mask must be bool with True = visible, or floating and added to scores, got {kind}")
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    given = tuple(mask.shape)
    if not broadcasts_to(given, wanted):
        raise ValueError(f"attn_mask must broadcast to (B, H, M, N) = {wanted}, got {given}")
    check_same_device(query=query, attn_mask=mask)


def mask_visible(mask: Tensor) -> Tensor:
    """Visibility of a bool mask, or of one that is added to the scores.

    Such masks hide with minus infinity or with the lowest finite number, whose weights are not 0 in a row that has
    nothing else; halves of it are as low, since two of them may have been added.
    """
    return mask if mask.dtype == torch.bool else ~(mask <= torch.finfo(mask.dtype).min / 2)


def mask_bias(mask: Tensor | None) -> Tensor | None:
    """What a floating mask adds to visible scores; None for others."""
    if mask is None or mask.dtype == torch.bool:
        return None
    return mask.masked_fill(~mask_visible(mask), 0.0)


def check_cu_seqlens(
    cu_seqlens: Tensor | None, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> None:
    """Raise unless `cu_seqlens` is None or the borders of sequences that fill the only sample."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if key_padding_mask is not None or attn_mask is not None:
        raise ValueError("cu_seqlens is for packed sequences, which have no key_padding_mask and no attn_mask")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        raise ValueError(f"cu_seqlens needs one sample and as many queries as keys, got {shapes}")
    check_same_device(query=query, cu_seqlens=cu_seqlens)
    # Looking at values would wait for a GPU.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != key.shape[2] or borders != sorted(borders):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of slots, {key.shape[2]}, got {borders}")


def check_positions(positions: Tensor | None, key: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The positions of the keys, (B, N) in float64; raise unless they are None or do not fall along the slots."""
    if positions is None:
        return None
    if not isinstance(positions, Tensor) or positions.dtype not in _POSITIONS:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be integers, float32 or float64, got {kind}")
    wanted, given = (key.shape[0], key.shape[2]), tuple(positions.shape)
    if given not in (wanted, wanted[1:]):
        raise ValueError(f"positions must have shape (N,) or (B, N) = {wanted}, got {given}")
    if cu_seqlens is not None:
        raise ValueError("positions of packed sequences start anew in each, so there cannot be others with cu_seqlens")
    check_same_device(key=key, positions=positions)
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        falls = positions.diff() < 0
        if bool(falls.any()):
            place = falls.nonzero()[0].tolist()
            raise ValueError(f"positions must not fall along the slots, but they do behind index {place}")
    return positions.to(torch.float64).expand(wanted).contiguous()


def segments(cu_seqlens: Tensor, count: int) -> Tensor:
    """Which sequence each of the `count` slots belongs to."""
    slots = torch.arange(count, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.to(torch.int64), slots, right=True) - 1


def visible_keys(
    distance: Tensor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | None:
    """Visibility broadcastable to (B, H, M, N), from signed distances (query slot minus key slot); None means all.

    A query whose own slot is padding sees nothing.
    """
    visible = (distance >= 0)[None, None] if is_causal else None
    if attn_mask is not None:
        given = mask_visible(attn_mask)
        visible = given if visible is None else visible & given
    if cu_seqlens is not None:
        owner = segments(cu_seqlens, distance.shape[1])
        same = (owner[:, None] == owner)[None, None]
        visible = same if visible is None else visible & same
    if key_padding_mask is None:
        return visible
    own = key_padding_mask[:, key_padding_mask.shape[1] - distance.shape[0] :]
    padding = own[:, None, :, None] & key_padding_mask[:, None, None, :]
    return padding if visible is None else visible & padding


def without_padding(tensor: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Keys or values with 0 in hidden slots: a weight of 0 does not hide a NaN, since 0 times NaN is NaN."""
    return tensor if key_padding_mask is None else tensor.masked_fill(~key_padding_mask[:, None, :, None], 0.0)


def attend(
    scores: Tensor, value: Tensor, visible: Tensor | None, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Softmax over keys and the weighted sum of values; a row that sees no key gives exactly 0 and no gradient.

    Args:
        scores: shape `(B, H, M, N)`.
        value: shape `(B, H_kv, N, E)` with `H` a multiple of `H_kv`, dtype of the scores.
        visible: broadcastable to the scores, or None.
        attn_mask: is added to the scores if it is floating.
        dropout_p: of the weights.
    """
    bias = mask_bias(attn_mask)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    weights = masked_softmax(scores, visible)
    return grouped_matmul(nn.functional.dropout(weights, dropout_p) if dropout_p else weights, value)


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax along the last dimension over what is visible; a row without any has weights 0 and no gradient."""
    if visible is None:
        return torch.softmax(scores, dim=-1)
    empty = ~visible.any(dim=-1, keepdim=True)
    # Filled before and after, so that an empty row is outside the graph instead of 0 * NaN within it.
    scores = scores.masked_fill(~visible & ~empty, float("-inf")).masked_fill(empty, 0.0)
    return torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)


def grouped_matmul(first: Tensor, second: Tensor) -> Tensor:
    """`first @ second` where `second` has `H_kv` heads and each serves `H / H_kv` consecutive heads of `first`."""
    batch, heads, rows, inner = first.shape
    shared = second.shape[1]
    # Autocast would round scores and weights to half precision.
    with torch.autocast(device_type=first.device.type, enabled=False):
        grouped = first.reshape(batch, shared, (heads // shared) * rows, inner) @ second
    return grouped.reshape(batch, heads, rows, second.shape[-1])
