r"""Decoding with quantized keys: a state of constant size, one step per token.

Source: Lingle (2023), "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354.

Shape letters: as in `danlu.attention._vq_attention`; `W` = 2 `block_size` slots for the last tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.attention._masks import grouped_matmul
from danlu.attention._vector_quantizer import look_up
from danlu.positions import apply_rope

__all__ = ["VQState", "decode_step", "state_after"]


@dataclass(frozen=True)
class VQState:
    r"""What decoding remembers of the tokens so far; its size does not depend on their number.

    Definition:
        For every codeword $c$ the number $N_c$ of cached keys and the mean $\bar v_c$ of their values; of the last
        $W = 2\ell$ tokens the codes and values, position $p$ in slot $p \bmod W$.

    Args:
        counts: $N$, shape `(B, G, S)`.
        means: $\bar v$, shape `(B, G, S, E)`.
        codes: shape `(B, G, W)`, int64.
        values: shape `(B, G, W, E)`.
        length: tokens seen, shape `(B,)`, int64.

    Numerics:
        At least float32. A mean moves by the difference over the count, so it cannot overflow.

    Source:
        Lingle (2023), arXiv 2309.16354.

    Example:
        >>> import torch
        >>> from danlu.attention import VQAttention
        >>> layer = VQAttention(8, num_heads=2, num_codes=4, block_size=4).eval()
        >>> _, state = layer.prefill(torch.randn(1, 50, 8))
        >>> state.length, state.values.shape
        (tensor([50]), torch.Size([1, 2, 8, 4]))
    """

    counts: Tensor
    means: Tensor
    codes: Tensor
    values: Tensor
    length: Tensor

    def select(self, samples: Tensor) -> "VQState":
        """The state of `samples` (indices of the batch), for beam search."""
        return VQState(*(x[samples] for x in (self.counts, self.means, self.codes, self.values, self.length)))


def state_after(
    codes: Tensor, value: Tensor, key_padding_mask: Tensor | None, *, num_codes: int, block_size: int
) -> VQState:
    """The state behind all tokens of codes `(B, G, N)` and values `(B, G, N, E)`."""
    batch, heads, count = codes.shape
    width = 2 * block_size
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    length = torch.full((batch,), count, device=codes.device)
    if key_padding_mask is not None:
        order = (~key_padding_mask).to(torch.int8).argsort(dim=1, stable=True)
        value = value.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        value = value.gather(2, order[:, None, :, None].expand_as(value))
        codes = codes.gather(2, order[:, None].expand_as(codes))
        length = key_padding_mask.sum(1)
    cached = (torch.arange(count, device=codes.device) < length[:, None] - width).to(value.dtype)[:, None]
    counts = value.new_zeros(batch, heads, num_codes).scatter_add_(2, codes, cached.expand(codes.shape).contiguous())
    sums = value.new_zeros(batch, heads, num_codes, value.shape[-1])
    sums.scatter_add_(2, codes[..., None].expand_as(value), value * cached[..., None])
    # The last position that belongs into every slot; before the beginning there is none.
    last = length[:, None] - 1
    place = last - (last - torch.arange(width, device=codes.device)) % width
    held = place >= 0
    place = place.clamp(0, max(count - 1, 0))[:, None].expand(-1, heads, -1)
    if count == 0:
        codes, value = codes.new_zeros(batch, heads, 1), value.new_zeros(batch, heads, 1, value.shape[-1])
    values = value.gather(2, place[..., None].expand(-1, -1, -1, value.shape[-1]))
    return VQState(
        counts=counts,
        means=sums / counts.clamp_min(1.0)[..., None],
        codes=codes.gather(2, place).masked_fill(~held[:, None], 0),
        values=values.masked_fill(~held[:, None, :, None], 0.0),
        length=length,
    )


def decode_step(
    query: Tensor,
    code: Tensor,
    value: Tensor,
    state: VQState,
    codebook: Tensor,
    *,
    bias: Tensor | None,
    window: int | None,
    inv_freq: Tensor | None,
    scale: float,
    visible: Tensor | None,
) -> tuple[Tensor, VQState]:
    """Output `(B, H, 1, E)` of one more token and the state behind it.

    Args:
        query: `(B, H, 1, D)`.
        code: of its key, `(B, G, 1)`.
        value: `(B, G, 1, E)`.
        state: before this token.
        codebook: `(G, S, D)`.
        bias: by distance, `(H, W)`, or None.
        window: distance at which rotations stop growing, or None.
        inv_freq: of the rotations, or None.
        scale: factor of the scores.
        visible: bool `(B,)`, False where the token is padding, whose output is 0 and which is forgotten; None if none.
    """
    wide = state.means.dtype
    query, value, codebook = query.to(wide), value.to(wide), codebook.to(wide)
    batch, heads, width = state.codes.shape
    new = _with(state, code, value)
    if visible is not None:
        old, kept = state, visible[:, None, None]
        new = VQState(
            counts=torch.where(kept, new.counts, old.counts),
            means=torch.where(kept[..., None], new.means, old.means),
            codes=torch.where(kept, new.codes, old.codes),
            values=torch.where(kept[..., None], new.values, old.values),
            length=torch.where(visible, new.length, old.length),
        )
    # Where nothing was added the distances are to the last token; that output is dropped.
    position = (new.length - 1)[:, None]
    distance = (position - torch.arange(width, device=code.device)) % width
    held = distance <= position
    far_query = query
    if window is not None and inv_freq is not None:
        far_query = apply_rope(query, torch.full((1,), window, device=code.device), inv_freq)
    by_code = grouped_matmul(far_query, codebook.mT.expand(batch, -1, -1, -1)) * scale
    grouped = by_code[:, :, 0].unflatten(1, (heads, -1))
    if window is not None and inv_freq is not None:
        words = apply_rope(look_up(codebook, new.codes), -distance[:, None].clamp_max(window), inv_freq)
        near = (grouped_matmul(query, words.mT) * scale)[:, :, 0].unflatten(1, (heads, -1))
    else:
        near = grouped.gather(-1, new.codes[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    if bias is not None:
        # Slots also hold the beginning of what the block form has in its cache, without a bias.
        block = width // 2
        local = (position - distance) // block >= position // block - 1
        by_slot = bias.to(wide)[:, distance].transpose(0, 1) * local[:, None]
        near = near + by_slot.unflatten(1, (heads, -1))
    near = near.masked_fill(~held[:, None, None], -torch.inf)
    far = grouped + new.counts.log()[:, :, None]
    weights = torch.cat((near, far), -1)
    # A sample that has seen nothing yet.
    empty = (new.length == 0)[:, None, None, None]
    weights = weights.masked_fill(empty, 0.0).softmax(-1)
    with torch.autocast(device_type=query.device.type, enabled=False):
        out = (weights @ torch.cat((new.values, new.means), 2)).flatten(1, 2)[:, :, None]
    dropped = empty if visible is None else empty | ~visible[:, None, None, None]
    return out.masked_fill(dropped, 0.0), new


def _with(state: VQState, code: Tensor, value: Tensor) -> VQState:
    """The state with one more token; the one whose slot it takes goes into the cache."""
    _, heads, width = state.codes.shape
    slot = (state.length % width)[:, None, None].expand(-1, heads, 1)
    leaves = (state.length >= width).to(state.means.dtype)[:, None, None].expand(-1, heads, 1)
    size = value.shape[-1]
    old_code, old_value = state.codes.gather(2, slot), state.values.gather(2, slot[..., None].expand_as(value))
    counts = state.counts.scatter_add(2, old_code, leaves.contiguous())
    index = old_code[..., None].expand(-1, -1, -1, size)
    mean, count = state.means.gather(2, index), counts.gather(2, old_code)[..., None]
    change = (old_value - mean) / count.clamp_min(1.0) * leaves[..., None]
    return VQState(
        counts=counts,
        means=state.means.scatter_add(2, index, change),
        codes=state.codes.scatter(2, slot, code),
        values=state.values.scatter(2, slot[..., None].expand_as(value), value),
        length=state.length + 1,
    )
