"""'none' | 'mean' | 'sum' over per-token losses: the one place where the denominator of the mean is decided."""

from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real

__all__ = ["Reduction", "check_normalizer", "check_reduction", "reduce_loss", "row_weight"]

Reduction = Literal["none", "mean", "sum"]


def check_reduction(reduction: str, normalizer: float | Tensor | None) -> None:
    """Raise `ValueError`/`TypeError` unless `reduction` is known and `normalizer` is usable with it."""
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    check_normalizer(normalizer)
    if normalizer is not None and reduction != "mean":
        raise ValueError(
            f"normalizer replaces the denominator of reduction='mean'; it has no meaning with {reduction!r}"
        )


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raise unless `normalizer` is None, a positive number or a tensor with one element."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or a tensor with one element, got shape {tuple(normalizer.shape)}"
            )
    elif normalizer is not None:
        check_real("normalizer", normalizer, low=0.0, low_open=True)


def row_weight(keep: Tensor, reduction: Reduction, normalizer: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of every row in the reduced loss: 0 where ignored, else 1 over the denominator of the mean."""
    weight = keep.to(dtype)
    return weight / _denominator(keep, normalizer, dtype) if reduction == "mean" else weight


def reduce_loss(loss: Tensor, keep: Tensor, reduction: Reduction, normalizer: float | Tensor | None) -> Tensor:
    """Reduce per-row `loss`, in which ignored rows (`keep` False) are already 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / _denominator(keep, normalizer, loss.dtype) if reduction == "mean" else total


def _denominator(keep: Tensor, normalizer: float | Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The number of kept rows, or `normalizer` (gradient accumulation passes the count of the whole batch).

    Without any kept row it is not 0, so that such a batch gives 0 and not NaN.
    """
    if normalizer is None:
        return keep.sum().clamp(min=1)
    if not isinstance(normalizer, Tensor):
        return normalizer
    # A count of tokens is 0 if every micro-batch is ignored; a 0 with rows to weigh stays an infinite loss.
    count = normalizer.detach().reshape(()).to(dtype)
    return count + ((count == 0) & ~keep.any())
