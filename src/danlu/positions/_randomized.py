r"""Position ids drawn at random in training, so that a model has seen every position that long text will have.

Source: Ruoss et al. (2023), "Randomized Positional Encodings Boost Length Generalization of Transformers", arXiv
2305.16843; "Transformer升级之路:8、长度外推性与位置鲁棒性" (2023-01-31).

Shape letters: `B` samples; `L` slots of a batch; `M` positions to draw from.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_real

__all__ = ["even_positions", "random_positions"]

# From so many times more positions than slots on, drawing some and mending repetitions beats a key for each.
_SPARSE_FROM = 16


def random_positions(
    lengths: Tensor | Sequence[int],
    max_position: int | None = None,
    *,
    mode: Literal["sorted", "equal_mean"] = "sorted",
    distribution: Literal["exponential", "beta"] = "exponential",
    concentration: float = 2.0,
    endpoint: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Position ids for one training batch; all layers and heads share them.

    Definition:
        For a sample of $n$ tokens, with $M$ = `max_position`:

        - "sorted": $n$ different integers of $0, \dots, M-1$, drawn uniformly and sorted. The mean of the $i$-th (from
          0) is $(i+1)(M+1)/(n+1) - 1$.
        - "equal_mean": $p_i = \nu\,i/n$ with a random $\nu$ of mean $n$, so that the mean of $p_i$ is $i$: plain
          positions at inference are then those seen on average. $\nu$ is exponential, or $M$ times a beta variable of
          mean $n/M$ and of $\alpha + \beta$ = `concentration`. With `endpoint` $p_i = \nu\,i/(n-1)$, as the article
          writes it, whose mean is $i\,n/(n-1)$.

    Args:
        lengths: $n$ of every sample, integers, shape `(B,)` or a list; or a mask of the tokens, shape `(B, L)`, bool or
            of 0 and 1, with padding on either side.
        max_position: $M$, as large as the longest text at inference or larger; None only for the exponential, which has
            no bound.
        mode: as above; "equal_mean" gives real numbers, which only functional encodings take (RoPE, sinusoids).
        distribution: of $\nu$.
        concentration: $\alpha + \beta \ge 0.1$ of the beta distribution.
        endpoint: as above.
        generator: source of the random numbers, on the device of `lengths` (the CPU for a list); processes that share
            a batch's samples must draw differently.

    Returns:
        Shape `(B, L)` with $L$ the longest length or that of the mask; int64, or float32 with "equal_mean". Padding
        gets 0.

    Raises:
        TypeError: `lengths` is not of integers or bool.
        ValueError: a length is negative or above `max_position`, or not below it with "beta" (on the CPU); shapes do
            not fit, a mask has a hole, `max_position` is missing, or an option is unknown or out of its range.

    Numerics:
        Every subset is as likely. Reals are drawn in float64 and cast to float32, never to less: bfloat16 has no
        position 257. Nothing waits for a device but lengths that are not a mask. Positions are drawn outside of the
        layers, so that recomputation under gradient checkpointing sees the same.

    Cost:
        $O(B M)$ time and memory, $O(B L \log L)$ on the CPU from $M = 16 L$ on.

    Differences:
        The code of arXiv 2305.16843 draws one set of positions for all samples of a call; here each sample has its own.

    Source:
        As in the module.

    Example:
        >>> import torch
        >>> from danlu.positions import random_positions
        >>> random_positions([3, 1], 10, generator=torch.Generator().manual_seed(0))
        tensor([[0, 3, 5],
                [9, 0, 0]])
    """
    check_choice("mode", mode, ("sorted", "equal_mean"))
    check_choice("distribution", distribution, ("exponential", "beta"))
    # Below, both gamma variables of a beta variable may round to 0.
    check_real("concentration", concentration, low=0.1)
    if max_position is not None:
        check_integer("max_position", max_position, low=1)
    elif mode == "sorted" or distribution == "beta":
        raise ValueError("max_position is missing: how many positions there are to draw from")
    counts, mask = _tokens(lengths, max_position)
    # Slots of the tokens, from 0; padding has any.
    index = (mask.cumsum(1) - 1).clamp(min=0)
    if mode == "equal_mean":
        total = _totals(counts, max_position, distribution, concentration, generator)
        steps = (counts - 1 if endpoint else counts).clamp(min=1)
        return (index * (total / steps)[:, None]).masked_fill(~mask, 0.0).to(torch.float32)
    if max_position is None or mask.numel() == 0:
        return index
    return _subsets(counts, mask.shape[1], max_position, generator).gather(1, index).masked_fill(~mask, 0)


def even_positions(length: int | Tensor, max_position: int) -> Tensor:
    r"""Evenly spaced positions for inference with a model that was trained on `random_positions(mode="sorted")`.

    Definition:
        $$p_i = i\,M/n, \qquad i = 0, \dots, n-1$$
        with $n$ = `length` and $M$ = `max_position`.

    Args:
        length: $0 \le n \le M$; or lengths `(B,)` or a mask `(B, L)` of a batch, as in
            [`random_positions`][danlu.positions.random_positions].
        max_position: $M$, as in training.

    Returns:
        Shape `(n,)`, or `(B, L)` with 0 in the padding, float64.

    Raises:
        TypeError: `length` is neither an int nor a tensor of integers or bool.
        ValueError: `length` is negative or above `max_position`, or as in `random_positions`.

    Numerics:
        Real numbers; models with a table of positions need `.long()` of them, which are then different integers. The
        spacing depends on $n$, so a text that grows moves its positions: this is for encoders, not for decoding.

    Source:
        "Transformer升级之路:8、长度外推性与位置鲁棒性" (2023-01-31), where even spacing is usually better than a draw.

    Example:
        >>> import torch
        >>> from danlu.positions import even_positions
        >>> even_positions(4, 10)
        tensor([0.0000, 2.5000, 5.0000, 7.5000], dtype=torch.float64)
        >>> even_positions(torch.tensor([4, 2]), 10)
        tensor([[0.0000, 2.5000, 5.0000, 7.5000],
                [0.0000, 5.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    check_integer("max_position", max_position, low=1)
    if isinstance(length, Tensor):
        counts, mask = _tokens(length, max_position)
        index = (mask.cumsum(1) - 1).clamp(min=0).to(torch.float64)
        return (index * max_position / counts.clamp(min=1)[:, None]).masked_fill(~mask, 0.0)
    check_integer("length", length, low=0)
    if length > max_position:
        raise ValueError(f"length must be at most max_position={max_position}, got {length}")
    # Multiplied first: exact where the quotient is.
    return torch.arange(length, dtype=torch.float64) * max_position / max(1, length)


def _tokens(lengths: Tensor | Sequence[int], max_position: int | None) -> tuple[Tensor, Tensor]:
    """Lengths `(B,)` and which slots hold tokens `(B, L)`."""
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor([check_integer(f"lengths[{i}]", n, low=0) for i, n in enumerate(lengths)])
        lengths = lengths.to(torch.int64)
    if lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be integers or a mask, got dtype {lengths.dtype}")
    if lengths.ndim not in (1, 2) or (lengths.ndim == 1 and lengths.dtype == torch.bool):
        raise ValueError(f"lengths must have shape (B,), or (B, L) for a mask, got {tuple(lengths.shape)}")
    on_cpu = lengths.device.type == "cpu"
    if lengths.ndim == 2:
        mask = lengths != 0
        if on_cpu and bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > 2 - mask[:, :1].any(1).to(torch.int64)).any()):
            raise ValueError("lengths must be a mask without holes: the tokens of a sample stand together")
        counts = mask.sum(1)
    else:
        counts = lengths.to(torch.int64)
        if on_cpu and counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(counts.min())}")
        longest = int(counts.max()) if counts.numel() else 0
        mask = torch.arange(longest, device=counts.device) < counts[:, None]
    if max_position is not None and on_cpu and counts.numel() and int(counts.max()) > max_position:
        raise ValueError(f"lengths must be at most max_position={max_position}, got {int(counts.max())}")
    return counts, mask


def _subsets(counts: Tensor, slots: int, limit: int, generator: torch.Generator | None) -> Tensor:
    """Rows of int64 whose first `counts` members are a uniform subset of range(limit) in rising order."""
    if counts.device.type == "cpu" and limit >= _SPARSE_FROM * slots:
        order = _distinct(len(counts), slots, limit, generator)
    else:
        # float64, since equal keys would favor one of the positions.
        keys = torch.rand(len(counts), limit, dtype=torch.float64, device=counts.device, generator=generator)
        order = keys.topk(min(slots, limit), dim=1).indices
        order = torch.nn.functional.pad(order, (0, slots - order.shape[1]))
    chosen = torch.arange(slots, device=counts.device) < counts[:, None]
    return order.masked_fill(~chosen, limit).sort(dim=1).values


def _distinct(rows: int, columns: int, limit: int, generator: torch.Generator | None) -> Tensor:
    """The first `columns` distinct numbers of every row of independent draws from range(limit), in order of drawing."""
    extra = columns // 4 + 16
    while True:
        draws = torch.randint(limit, (rows, columns + extra), generator=generator)
        values, order = draws.sort(dim=1, stable=True)
        repeated = torch.zeros_like(values, dtype=torch.bool)
        repeated[:, 1:] = values[:, 1:] == values[:, :-1]
        fresh = torch.ones_like(repeated).scatter(1, order, ~repeated)
        kept = fresh & (fresh.cumsum(1) <= columns)
        if int(kept.sum()) == rows * columns:
            # Row by row in order, as many of each.
            return draws[kept].view(rows, columns)
        # No number is favored by the rejection of all of the draws.
        extra = 2 * extra


def _totals(
    counts: Tensor, max_position: int | None, distribution: str, concentration: float, generator: torch.Generator | None
) -> Tensor:
    """A random number of mean `counts` for every sample, float64."""
    mean = counts.to(torch.float64)
    if distribution == "exponential" or max_position is None:
        uniform = torch.rand(mean.shape, dtype=torch.float64, generator=generator, device=mean.device)
        return -torch.log1p(-uniform) * mean
    if counts.device.type == "cpu" and counts.numel() and int(counts.max()) == max_position:
        raise ValueError(f"lengths must be below max_position={max_position} with distribution='beta': it is a mean")
    share = (mean / max_position).clamp(1e-6, 1 - 1e-6)
    # A beta variable is the share of one of two gamma variables in their sum.
    first, second = (torch._standard_gamma(concentration * one, generator=generator) for one in (share, 1 - share))
    return max_position * first / (first + second)
