r"""Do the rows of an embedding run away? Numbers to look at, for a trained table.

Source: kexue.fm article 9736 (2023-08-28).

Shape letters: V rows (tokens), D channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_real

__all__ = ["EmbeddingHealth", "embedding_health"]

# A row is called large when its RMS is this many times the median of all rows.
_LARGE = 10.0


@dataclass(frozen=True)
class EmbeddingHealth:
    r"""What [`embedding_health`][danlu.diagnostics.embedding_health] found.

    Definition:
        See there.

    Args:
        max_component: $\max |E_{ij}|$; NaN if any element is NaN.
        bound: $1/\lambda$, where the sign of a stale momentum and the decay balance; infinite without decay.
        share_near_bound: fraction of the elements beyond half of the bound.
        large_rows: number of rows whose RMS is more than 10 times the median.
        share_of_large_rows: their fraction.
        median_rms: median RMS of a row.
        rank_correlation: Spearman's correlation of RMS and count over the rows; None without counts, or where one of
            the two does not vary. Clearly negative: the rare tokens are the large ones.

    Numerics:
        All numbers are floats of Python.

    Source:
        kexue.fm article 9736 (2023-08-28).

    Example:
        >>> import torch
        >>> from danlu.diagnostics import embedding_health
        >>> embedding_health(torch.ones(4, 2), weight_decay=0.01).bound
        100.0
    """

    max_component: float
    bound: float
    share_near_bound: float
    large_rows: int
    share_of_large_rows: float
    median_rms: float
    rank_correlation: float | None


@torch.no_grad()
def embedding_health(weight: Tensor, weight_decay: float, *, counts: Tensor | None = None) -> EmbeddingHealth:
    r"""Signs of the embedding anomaly of sign optimizers: rare rows that run to $\pm 1/\lambda$.

    Definition:
        With rows $E_i \in \mathbb R^D$ and $r_i = \sqrt{\tfrac1D \sum_j E_{ij}^2}$: the largest $|E_{ij}|$, the
        fraction of elements with $|E_{ij}| > 0.5/\lambda$, the number of rows with $r_i > 10\,\mathrm{median}(r)$, and
        the rank correlation of $r_i$ with the number of times that token $i$ was seen.

    Args:
        weight: $E$ `(V, D)`, floating-point.
        weight_decay: $\lambda \ge 0$ of the optimizer; the bound is its inverse, whatever the learning rate.
        counts: `(V)`, how often each token was seen in training; any real dtype. None leaves the correlation out.

    Returns:
        [`EmbeddingHealth`][danlu.diagnostics.EmbeddingHealth].

    Raises:
        TypeError: `weight` is not a floating-point tensor, `weight_decay` not a number, or `counts` not a real tensor.
        ValueError: `weight` is not a matrix, `weight_decay` < 0, or `counts` is not one number per row.

    Numerics:
        Computed in float64, where the device has it. A row with NaN has an RMS of NaN and is no large row; the median
        is over the others. A table without elements has the values of a table of zeros.

    Cost:
        O(V D) time; V D elements of float64, and V log V for the ranks. Waits for the device.

    Source:
        kexue.fm article 9736 (2023-08-28); the thresholds are ours.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import embedding_health
        >>> weight = torch.full((20, 4), 0.02)
        >>> weight[7] = 75.0  # a token that was seen once
        >>> found = embedding_health(weight, weight_decay=0.01, counts=torch.tensor([9] * 7 + [1] + [9] * 12))
        >>> found.max_component, found.large_rows, found.share_near_bound, round(found.rank_correlation, 6)
        (75.0, 1, 0.05, -1.0)
    """
    check_floating("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix of rows, got shape {tuple(weight.shape)}")
    check_real("weight_decay", weight_decay, low=0.0)
    if counts is not None and (not isinstance(counts, Tensor) or counts.is_complex()):
        raise TypeError(f"counts must be a real tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
    if counts is not None and counts.shape != weight.shape[:1]:
        raise ValueError(f"counts must have shape ({weight.shape[0]},), got {tuple(counts.shape)}")
    bound = 1 / weight_decay if weight_decay > 0 else float("inf")
    if weight.numel() == 0:
        return EmbeddingHealth(0.0, bound, 0.0, 0, 0.0, 0.0, None)
    size = weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64).abs()
    rms = torch.linalg.vector_norm(size, dim=1) / size.shape[1] ** 0.5
    median = float(rms.nanquantile(0.5).nan_to_num(0.0))
    large = int((rms > _LARGE * median).sum()) if median > 0 else 0
    return EmbeddingHealth(
        max_component=float(size.max()),
        bound=bound,
        share_near_bound=float((size > 0.5 * bound).double().mean()) if bound < float("inf") else 0.0,
        large_rows=large,
        share_of_large_rows=large / len(rms),
        median_rms=median,
        rank_correlation=None if counts is None else _rank_correlation(rms, counts.detach().to(rms)),
    )


def _rank_correlation(first: Tensor, second: Tensor) -> float | None:
    ranks = [_ranks(values) for values in (first, second)]
    centered = [one - one.mean() for one in ranks]
    norms = [float(torch.linalg.vector_norm(one)) for one in centered]
    if not norms[0] or not norms[1]:
        return None
    return float(torch.dot(*centered)) / (norms[0] * norms[1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, the mean of its ranks for equal values."""
    _, place, count = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2).to(values.dtype)[place]
