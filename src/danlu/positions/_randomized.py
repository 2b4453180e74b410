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


def random_positions(
    lengths: Tensor | Sequence[int],
    max_position: int,
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
        max_position: $M$, as large as the longest text at inference or larger.
        mode: as above; "equal_mean" gives real numbers, which only functional encodings take (RoPE, sinusoids).
        distribution: of $\nu$.
        concentration: $\alpha + \beta > 0$ of the beta distribution.
        endpoint: as above.
        generator: source of the random numbers, on the device of `lengths` (the CPU for a list); processes that share
            a batch's samples must draw differently.

    Returns:
        Shape `(B, L)` with $L$ the longest length or that of the mask; int64, or float32 with "equal_mean". Padding
        gets 0.

    Raises:
        TypeError: `lengths` is not of integers or bool.
        ValueError: a length is negative or above `max_position` (on the CPU), shapes do not fit, a mask has a hole, or
            an option is unknown or out of its range.

    Numerics:
        Without replacement by sorting uniform numbers, all in one call on the device; nothing waits for it but, for a
        list or lengths on the CPU, the checks. Positions are drawn outside of the layers, so that recomputation under
        gradient checkpointing sees the same.

    Cost:
        $O(B M \log M)$, about the time of a sort.

    Differences:
        The code of arXiv 2305.16843 draws one set of positions for all samples of a call; here each sample has its own.

    Source:
        As in the module.

    Example:
        >>> import torch
        >>> from danlu.positions import random_positions
        >>> random_positions([3, 1], 10, generator=torch.Generator().manual_seed(0))
        tensor([[2, 3, 4],
                [2, 0, 0]])
    """
    check_integer("max_position", max_position, low=1)
    check_choice("mode", mode, ("sorted", "equal_mean"))
    check_choice("distribution", distribution, ("exponential", "beta"))
    check_real("concentration", concentration, low=0.0, low_open=True)
    counts, mask = _tokens(lengths, max_position)
    samples, slots = mask.shape
    # Slots of the tokens, from 0; padding has any.
    index = (mask.cumsum(1) - 1).clamp(min=0)
    if mode == "equal_mean":
        total = _totals(counts, max_position, distribution, concentration, generator)
        steps = (counts - 1 if endpoint else counts).clamp(min=1)
        return (index * (total / steps)[:, None]).masked_fill(~mask, 0.0).to(torch.float32)
    if slots == 0 or samples == 0:
        return index
    # The ranks of i.i.d. numbers are a random permutation; the first n of it are n different integers.
    drawn = torch.rand(samples, max_position, generator=generator, device=mask.device).argsort(1)[:, :slots]
    if drawn.shape[1] < slots:
        drawn = torch.nn.functional.pad(drawn, (0, slots - drawn.shape[1]), value=max_position)
    beyond = torch.arange(slots, device=mask.device) >= counts[:, None]
    ordered = drawn.masked_fill(beyond, max_position).sort(1).values
    return ordered.gather(1, index).masked_fill(~mask, 0)


def even_positions(length: int, max_position: int) -> Tensor:
    r"""Evenly spaced positions for inference with a model that was trained on `random_positions(mode="sorted")`.

    Definition:
        $$p_i = i\,M/n, \qquad i = 0, \dots, n-1$$
        with $n$ = `length` and $M$ = `max_position`.

    Args:
        length: $n \ge 0$.
        max_position: $M \ge n$, as in training.

    Returns:
        Shape `(n,)`, float64.

    Raises:
        ValueError: `length` is negative or above `max_position`.

    Numerics:
        Real numbers; models with a table of positions need `.long()` of them, which are then different integers.

    Source:
        "Transformer升级之路:8、长度外推性与位置鲁棒性" (2023-01-31), where even spacing is usually better than a draw.

    Example:
        >>> from danlu.positions import even_positions
        >>> even_positions(4, 10)
        tensor([0.0000, 2.5000, 5.0000, 7.5000], dtype=torch.float64)
    """
    check_integer("length", length, low=0)
    check_integer("max_position", max_position, low=1)
    if length > max_position:
        raise ValueError(f"length must be at most max_position={max_position}, got {length}")
    return torch.arange(length, dtype=torch.float64) * (max_position / max(1, length))


def _tokens(lengths: Tensor | Sequence[int], max_position: int) -> tuple[Tensor, Tensor]:
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
    if on_cpu and counts.numel() and int(counts.max()) > max_position:
        raise ValueError(f"lengths must be at most max_position={max_position}, got {int(counts.max())}")
    return counts, mask


def _totals(
    counts: Tensor, max_position: int, distribution: str, concentration: float, generator: torch.Generator | None
) -> Tensor:
    """A random number of mean `counts` for every sample, float64."""
    mean = counts.to(torch.float64)
    if distribution == "exponential":
        uniform = torch.rand(mean.shape, dtype=torch.float64, generator=generator, device=mean.device)
        return -torch.log1p(-uniform) * mean
    share = (mean / max_position).clamp(1e-6, 1 - 1e-6)
    # A beta variable is the share of one of two gamma variables in their sum.
    first, second = (torch._standard_gamma(concentration * one, generator=generator) for one in (share, 1 - share))
    return max_position * first / (first + second)
