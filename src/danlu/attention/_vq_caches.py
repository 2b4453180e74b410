r"""What blocks of queries see of far keys: by codeword, the mean of the values and the logarithm of their number.

Shape letters: as in `danlu.attention._vq_blocks`; `T` states, one after the other.
"""

from typing import Any

import torch
from torch import Tensor

from danlu.attention._vq_blocks import Cache

__all__ = ["caches_of_both_sides", "caches_of_the_past"]


def caches_of_the_past(
    value: Tensor, codes: Tensor, weights: Tensor, *, num_codes: int, rows: int, by_distance: bool
) -> tuple[Cache, Cache]:
    """Caches of the forward and of the backward, for causal attention.

    Args:
        value: `(B, G, K, P, E)`.
        codes: `(B, G, K, P)`.
        weights: `(B, G, K, P)`: 1 for a key that counts, NaN for one that is not finite.
        num_codes: `S`.
        rows: blocks of queries, the last of the `K`.
        by_distance: whether scores depend on the distance, so that the block before that of the queries is near in the
            forward, too.
    """
    blocks = value.shape[2]
    # State i is that of the blocks 0, ..., low + i; what a block of queries sees ends one or two blocks before it.
    low = max(blocks - rows, 2) - 2
    states = max(0, blocks - (2 if by_distance else 1) - low)
    means, counts = _means_of_the_past(value, codes, weights, low, states, num_codes)
    logs = counts.log()
    end = max(0, blocks - 2 - low)
    far = Cache(means[:, :, :end], logs[:, :, :end])
    if by_distance:
        return Cache(far.values.detach(), far.logs), far
    start = max(blocks - rows, 1) - 1 - low
    return Cache(means.detach()[:, :, start:], logs[:, :, start:]), far


def caches_of_both_sides(
    value: Tensor, codes: Tensor, weights: Tensor, *, num_codes: int, rows: int, by_distance: bool
) -> tuple[Cache, Cache]:
    """The same for attention in both directions: of all blocks, and of those that are not the own one or next to it."""
    blocks, width = value.shape[2], value.shape[-1]
    index = _index(codes, torch.arange(blocks, device=codes.device), blocks, num_codes)
    shape = (*value.shape[:3], num_codes)
    size = shape[0] * shape[1] * blocks * num_codes
    sums = value.new_zeros(size, width).index_add(0, index, value.reshape(-1, width)).view(*shape, width)
    counts = value.new_zeros(size).index_add(0, index, weights.reshape(-1)).view(shape)

    def outside(x: Tensor) -> Tensor:
        # Sums from both ends: a difference from the total would cancel.
        left, right = x.cumsum(2)[:, :, : blocks - 2], x.flip(2).cumsum(2).flip(2)[:, :, 2:]
        empty = torch.zeros_like(x[:, :, :2])
        return (torch.cat((empty, left), 2) + torch.cat((right, empty), 2))[:, :, blocks - rows :]

    far = _cache(outside(sums), outside(counts)) if blocks > 2 else Cache(sums[:, :, :0], counts[:, :, :0])
    if by_distance:
        return Cache(far.values.detach(), far.logs), far
    total = _cache(sums.detach().sum(2, keepdim=True), counts.sum(2, keepdim=True))
    return Cache(*(x.expand(-1, -1, rows, *x.shape[3:]) for x in total)), far


def _cache(sums: Tensor, counts: Tensor) -> Cache:
    """The logarithm of a count of 0 is -inf, which hides the codeword."""
    return Cache(sums / counts.clamp_min(1.0)[..., None], counts.log())


def _index(codes: Tensor, state: Tensor, states: int, num_codes: int) -> Tensor:
    """Row of every key in a table `(B * G * T * S)`, if block `i` goes to `state[i]`."""
    batch, heads = codes.shape[:2]
    owner = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1, 1) * states
    return ((owner + state[:, None]) * num_codes + codes).flatten()


@torch.library.custom_op("danlu::vq_means_of_the_past", mutates_args=())
def _means_of_the_past(
    value: Tensor, codes: Tensor, weights: Tensor, low: int, states: int, num_codes: int
) -> tuple[Tensor, Tensor]:
    """Means and counts after the blocks `low`, `low + 1`, ...; an operator, so that one table is all that it takes."""
    batch, heads, blocks, _, width = value.shape
    shape = (batch, heads, states, num_codes)
    size = batch * heads * states * num_codes
    block = torch.arange(blocks, device=value.device)
    index = _index(codes, (block - low).clamp_min(0), states, num_codes).view(codes.shape)
    # What comes behind the last state goes to one row more.
    index = index.masked_fill((block >= low + states)[:, None], size).flatten()
    sums = value.new_zeros(size + 1, width).index_add_(0, index, value.reshape(-1, width))[:size].view(*shape, width)
    counts = value.new_zeros(size + 1).index_add_(0, index, weights.reshape(-1))[:size].view(shape)
    for i in range(1, states):
        sums[:, :, i] += sums[:, :, i - 1]
        counts[:, :, i] += counts[:, :, i - 1]
    return sums.div_(counts.clamp_min(1.0)[..., None]), counts


@torch.library.custom_op("danlu::vq_means_of_the_past_backward", mutates_args=())
def _backward(grad: Tensor, counts: Tensor, codes: Tensor, low: int) -> Tensor:
    states, num_codes = counts.shape[2:]
    blocks = codes.shape[2]
    shares = grad / counts.clamp_min(1.0)[..., None]
    for i in range(states - 2, -1, -1):
        shares[:, :, i] += shares[:, :, i + 1]
    block = torch.arange(blocks, device=codes.device)
    if states == 0:
        return grad.new_zeros(*codes.shape, grad.shape[-1])
    index = _index(codes, (block - low).clamp(0, states - 1), states, num_codes)
    found = shares.view(-1, grad.shape[-1]).index_select(0, index).view(*codes.shape, grad.shape[-1])
    found[:, :, low + states :] = 0.0
    return found


@_means_of_the_past.register_fake
def _(value: Tensor, codes: Tensor, weights: Tensor, low: int, states: int, num_codes: int) -> tuple[Tensor, Tensor]:
    shape = (*value.shape[:2], states, num_codes)
    return value.new_empty(*shape, value.shape[-1]), value.new_empty(shape)


@_backward.register_fake
def _(grad: Tensor, counts: Tensor, codes: Tensor, low: int) -> Tensor:
    return grad.new_empty(*codes.shape, grad.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codes, _, ctx.low, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], codes)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    counts, codes = ctx.saved_tensors
    return _backward(grad.contiguous(), counts, codes, ctx.low), None, None, None, None, None


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("attention in blocks has no second derivative; use backend='reference'")


_means_of_the_past.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_refuse)
