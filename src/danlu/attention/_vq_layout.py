r"""Tokens in blocks for attention on quantized keys: padding moved behind, rotations, and caches.

Shape letters: as in `danlu.attention._vq_attention`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.attention._vq_blocks import blockwise_attention
from danlu.attention._vq_caches import caches_of_both_sides, caches_of_the_past
from danlu.positions import apply_rope

__all__ = ["in_blocks", "reorder"]


def in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_value: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    block_size: int,
    is_causal: bool,
    window: int,
    inv_freq: Tensor | None,
    scale: float,
) -> Tensor:
    """The block form for tokens without padding in between; `seen` `(B, N)` is False from some token on."""
    rows, keys = query.shape[2], key.shape[2]
    size = min(block_size, keys)
    # Codewords are finite where their keys are not: the counts carry what must not be hidden.
    weights = 1 + 0 * key.detach().sum(-1)
    if inv_freq is not None:
        # As they are within the window, then as they are beyond.
        slots = torch.arange(keys, device=key.device)
        beyond = apply_rope(query, slots.new_full((1,), window), inv_freq)
        query = torch.cat((apply_rope(query, slots[keys - rows :], inv_freq), beyond), -1)
        key = torch.cat((apply_rope(key, slots, inv_freq), key), -1)
    blocks = -(-keys // size)
    before, behind = (keys - rows) % size, blocks * size - keys
    # Where they have a block each, queries begin within the block of their first one.
    query = _padded(query, before, behind).unflatten(2, (-1, size))
    shared = far_value is value
    key, value = (_padded(x, 0, behind).unflatten(2, (blocks, size)) for x in (key, value))
    far_value = value if shared else _padded(far_value, 0, behind).unflatten(2, (blocks, size))
    codes, weights = (F.pad(x, (0, behind)).unflatten(2, (blocks, size)) for x in (codes, weights))
    by_distance = bias is not None or inv_freq is not None
    if is_causal:
        # Hidden tokens are behind all others, which do not see them.
        seen = None
        cache, far = caches_of_the_past(
            far_value, codes, weights, num_codes=codebook.shape[1], rows=query.shape[2], by_distance=by_distance
        )
    else:
        if seen is None and behind:
            seen = key.new_ones(len(key), keys, dtype=torch.bool)
        if seen is not None:
            seen = F.pad(seen, (0, behind)).unflatten(1, (blocks, size))
            weights = weights * seen[:, None]
        cache, far = caches_of_both_sides(
            far_value, codes, weights, num_codes=codebook.shape[1], rows=query.shape[2], by_distance=by_distance
        )
    out = blockwise_attention(
        query,
        key,
        value,
        codebook,
        cache=cache,
        far=far,
        bias=bias,
        seen=seen,
        is_causal=is_causal,
        window=window,
        scale=scale,
    )
    return out.flatten(2, 3)[:, :, before : before + rows]


def _padded(tensor: Tensor, before: int, behind: int) -> Tensor:
    """With zeros around its tokens; as it is where there are none, since padding always copies."""
    return F.pad(tensor, (0, 0, before, behind)) if before or behind else tensor.contiguous()


def reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """Tokens of a tensor `(B, H, N, D)` in the order `(B, N)`."""
    return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
