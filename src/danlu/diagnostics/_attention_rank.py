r"""Rank of attention matrices: exact at a tolerance, effective, stable; condition and log-determinant.

Source: "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17).

Shape letters: `n` slots; `d` head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_integer, check_real

__all__ = ["AttentionRankReport", "attention_rank_report"]

# A matrix of so many slots is 128 MiB in float64, and its singular values take a minute.
_LARGEST = 4096
# Relative spacing of float32 weights, times a few: what is smaller is rounding.
_LEAST_TOLERANCE = 1e-6


@dataclass(frozen=True)
class AttentionRankReport:
    r"""What [`attention_rank_report`][danlu.diagnostics.attention_rank_report] found, for each matrix.

    Definition:
        See there.

    Args:
        rank: number of singular values above `tol` times the largest, int64.
        effective_rank: $\exp$ of the entropy of $\sigma/\sum\sigma$.
        stable_rank: $\sum\sigma^2/\sigma_1^2$.
        condition: $\sigma_1/\sigma_n$; infinite for a singular matrix.
        log_det: $\log|\det A|$, $-\infty$ for a singular matrix.

    Numerics:
        All but `rank` are float64.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17).

    Example:
        >>> import torch
        >>> from danlu.diagnostics import attention_rank_report
        >>> attention_rank_report(torch.eye(4)).stable_rank
        tensor(4., dtype=torch.float64)
    """

    rank: Tensor
    effective_rank: Tensor
    stable_rank: Tensor
    condition: Tensor
    log_det: Tensor


@torch.no_grad()
def attention_rank_report(weights: Tensor, *, tol: float = 1e-6, sample: int | None = None) -> AttentionRankReport:
    r"""How many independent mixtures of values attention matrices make.

    Definition:
        With the singular values $\sigma_1 \ge \dots \ge \sigma_n$ of $A$: the rank, the number of
        $\sigma_i > \mathrm{tol}\,\sigma_1$; the effective rank $\exp H(\sigma/\sum\sigma)$; the stable rank
        $\sum\sigma^2/\sigma_1^2$; the condition $\sigma_1/\sigma_n$; and $\log|\det A|$. Causal attention is
        triangular, so $\det A = \prod_i A_{ii} > 0$ and $\log\det A = \sum_i \log A_{ii}$: its rank is
        full in exact arithmetic, though not at a tolerance. Linear attention with $d$ features has rank $\le d$
        without a causal mask.

    Args:
        weights: $A$, floating-point, shape `(..., n, n)`.
        tol: $> 0$, relative to the largest singular value; $\ge 10^{-6}$ unless the weights are float64.
        sample: report on the principal submatrices of this many slots, drawn once and kept in their order, where there
            are more; None means all, which are at most 4096.

    Returns:
        [`AttentionRankReport`][danlu.diagnostics.AttentionRankReport] with tensors of shape `(...)`.

    Raises:
        TypeError: `weights` is not floating-point, or an option is of a wrong type.
        ValueError: not square matrices of at least one slot, $n > 4096$ without `sample`, `sample` < 1, or a `tol` that
            is not positive or too small for the dtype.

    Numerics:
        Singular values in float64. The log-determinant of a lower triangular matrix is the sum over its diagonal, which
        does not suffer where singular values are rounding; that of others is by their factors. A matrix with NaN or
        infinite weights has NaN everywhere and rank 0.

    Cost:
        $O(n^3)$ a matrix; waits for the device.

    Source:
        "为什么现在的LLM都是Decoder-only的架构?" (2023-03-17); Dong et al. (2021), arXiv 2103.03404.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import attention_rank_report
        >>> features = torch.rand(16, 3, dtype=torch.float64)
        >>> linear = features @ features.T
        >>> attention_rank_report(linear).rank, attention_rank_report(linear.tril()).rank
        (tensor(3), tensor(16))
    """
    check_floating("weights", weights)
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] == 0:
        raise ValueError(f"weights must have shape (..., n, n) with n >= 1, got {tuple(weights.shape)}")
    check_real("tol", tol, low=0.0, low_open=True)
    if weights.dtype != torch.float64 and tol < _LEAST_TOLERANCE:
        least = f"tol must be at least {_LEAST_TOLERANCE:g} for {weights.dtype}, whose rounding is as large"
        raise ValueError(f"{least}, got {tol:g}")
    count = weights.shape[-1]
    if sample is not None and check_integer("sample", sample, low=1) < count:
        slots = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:sample].sort().values
        slots = slots.to(weights.device)
        weights = weights[..., slots[:, None], slots]
    elif sample is None and count > _LARGEST:
        raise ValueError(f"weights of more than {_LARGEST} slots need sample, got {count}")
    matrix = weights.detach().double()
    usable = matrix.isfinite().all(-1).all(-1)
    matrix = torch.where(usable[..., None, None], matrix, 0.0)
    values = torch.linalg.svdvals(matrix)
    share = values / values.sum(-1, keepdim=True)
    triangular = (matrix.triu(1) == 0).all(-1).all(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    log_det = torch.where(triangular, diagonal, torch.linalg.slogdet(matrix).logabsdet)
    floats = (
        torch.special.entr(share).sum(-1).exp(),
        (values / values[..., :1]).square().sum(-1),
        values[..., 0] / values[..., -1],
        log_det,
    )
    rank = ((values > tol * values[..., :1]) & usable[..., None]).sum(-1)
    return AttentionRankReport(rank, *(x.masked_fill(~usable, torch.nan) for x in floats))
