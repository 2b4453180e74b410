r"""The passes over a chunk of logits in a linear head with a loss: statistics of its rows, then gradients in place.

Both read the chunk once, the second overwrites it: two reads and one write, whatever the loss. Here the Triton kernels
for CUDA; on the CPU `danlu.losses` has the same in operations of PyTorch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowCoefficients", "RowStatistics", "row_statistics", "write_row_gradients"]


@dataclass(frozen=True)
class RowStatistics:
    r"""Of every row $z$ of a chunk, shape `(C,)` each: what losses need of it.

    Attributes:
        log_total: $\log \sum_v e^{z_v}$.
        chosen: $z_y$, the logit of the target.
        sums: $\sum_v z_v$, for label smoothing.
        expected: $e = \sum_v p_v c_v$ with $c_y = 0$, or 0 without costs.
        best: the first class with the largest logit.
    """

    log_total: Tensor
    chosen: Tensor
    sums: Tensor
    expected: Tensor
    best: Tensor


@dataclass(frozen=True)
class RowCoefficients:
    r"""What the gradient of a row is made of, shape `(C,)` each, zero in ignored rows.

    $$G_v = (a\,p_v - t\,\delta_{v,y} - u + b\,p_v (c_v - e))\,(1 - (z_v/\kappa)^2)$$
    with $a$ = `per_probability`, $t$ = `toward_target`, $u$ = `uniform`, $b$ = `per_cost`, and $\kappa$ a soft cap; the
    last factor is 1 without one.
    """

    per_probability: Tensor
    toward_target: Tensor
    uniform: Tensor
    per_cost: Tensor


def row_statistics(
    logits: Tensor, target: Tensor, *, costs: Tensor | None = None, softcap: float | None = None
) -> RowStatistics:
    r"""Statistics of the rows of `logits`, shape `(C, V)`, with `target`, shape `(C,)`, and `costs`, shape `(C, V)`.

    With `softcap` $\kappa$ the logits are $\kappa\tanh(z/\kappa)$, which are not stored.
    """
    from danlu.kernels._linear_rows_triton import launch_statistics

    _check(logits, costs)
    return RowStatistics(*launch_statistics(logits, target, costs, softcap))


def write_row_gradients(
    logits: Tensor,
    target: Tensor,
    keep: Tensor,
    statistics: RowStatistics,
    coefficients: RowCoefficients,
    *,
    costs: Tensor | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradients of the weighted losses in the logits as they are before the cap, written to `out` (None: in place).

    Rows where `keep` is False get exact zeros, whatever they hold. `out` may have another dtype.
    """
    from danlu.kernels._linear_rows_triton import launch_gradient

    _check(logits, costs)
    out = logits if out is None else out
    if out.shape != logits.shape or out.stride(1) != 1:
        raise ValueError(f"out must have shape {tuple(logits.shape)} with contiguous rows, got {tuple(out.shape)}")
    dtype = statistics.log_total.dtype
    numbers = (
        coefficients.per_probability,
        coefficients.toward_target,
        coefficients.uniform,
        coefficients.per_cost,
    )
    per_probability, toward_target, uniform, per_cost = (x.to(dtype).expand_as(keep).contiguous() for x in numbers)
    launch_gradient(
        logits,
        target,
        keep,
        statistics.log_total,
        per_probability,
        toward_target,
        uniform,
        costs,
        per_cost,
        statistics.expected,
        softcap,
        out,
    )
    return out


def _check(logits: Tensor, costs: Tensor | None) -> None:
    for name, tensor in {"logits": logits, "costs": costs}.items():
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != logits.shape or (tensor.numel() and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} must have shape (C, V) with contiguous rows, got {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}"
            )
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"logits must be floating, got {logits.dtype}")
