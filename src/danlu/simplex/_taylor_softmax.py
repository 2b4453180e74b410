r"""Taylor softmax: an even Taylor polynomial in place of the exponential.

Source: de Brébisson and Vincent (2015), "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
Family", arXiv 1511.05042; Banerjee et al. (2020), "Exploring Alternatives to Softmax Function", arXiv 2011.11538.

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from danlu._common.checks import check_choice, check_dim, check_floating, check_integer, is_low_precision
from danlu.simplex._softmax import softmax

__all__ = ["TaylorSoftmax", "taylor_softmax"]

Shift = Literal["mean", "max"]

# From here on the polynomial in 1/x is summed, so that no power of x overflows.
_FAR = 10.0


def taylor_softmax(input: Tensor, *, dim: int = -1, order: int = 2, shift: Shift | None = None) -> Tensor:
    r"""Softmax with $\sum_{m \le k} x^m/m!$ for the exponential: tails that fall as a power of the score.

    Definition:
        $$p_i = \frac{f_k(x_i)}{\sum_j f_k(x_j)}, \qquad f_k(x) = \sum_{m=0}^{k} \frac{x^m}{m!} > 0, \qquad
        f_k' = f_{k-1}$$
        with $x$ = `input` along `dim`, less its mean or its maximum if `shift` says so, and $k$ = `order`. A score of
        $-\infty$ is a mask and gets exactly 0; a slice in which all scores are $-\infty$ is all zeros.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are masks.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        order: $k$, even and at least 2.
        shift: None is the article's definition. "mean" (over the scores that are not masked) and "max" are
            differentiated, too, and make the map shift invariant. With "max" all scores are on the left, where $f_k$
            falls, so nearly the whole order is reversed; "mean" is what is usually wanted.

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` is not a floating-point tensor, `dim` or `order` not an int.
        ValueError: `dim` does not exist or is empty, `order` is odd or below 2, or `shift` is unknown.

    Numerics:
        Half inputs are computed in float32 and rounded once. In logarithms throughout, so that scores of any size are
        safe. A fully masked slice has zero gradient. NaN stays within its slice.

    Differences:
        $f_k$ is smallest at the real root of $f_{k-1}$: $-1$ for $k = 2$, $-1.596$ for 4, $-2.181$ for 6, $-2.759$ for
        8, and *rises to the left of it*. So the order of scores is kept only to the right of the root, and the map is
        not shift invariant, which is often claimed of relatives of softmax.

    Source:
        arXiv 1511.05042, 2011.11538; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Taylor-Softmax.

    Example:
        >>> import torch
        >>> from danlu.simplex import taylor_softmax
        >>> taylor_softmax(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.1970, 0.3030, 0.4097, 0.0903])
    """
    check_floating("input", input)
    check_dim("dim", dim, input)
    _check_options(order, shift)
    scores = input.float() if is_low_precision(input.dtype) else input
    masked = scores == float("-inf")
    scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(masked, 0.0)
    if shift == "mean":
        count = (~masked).sum(dim, keepdim=True).clamp(min=1)
        scores = scores - scores.sum(dim, keepdim=True) / count
    elif shift == "max":
        largest = scores.masked_fill(masked, float("-inf")).amax(dim, keepdim=True)
        scores = scores - largest.masked_fill(largest == float("-inf"), 0.0)
    logarithms = _log_polynomial(scores, order).masked_fill(masked, float("-inf"))
    return softmax(logarithms, dim=dim).to(input.dtype)


def _log_polynomial(x: Tensor, order: int) -> Tensor:
    r"""$\log f_k(x)$; far from 0 as $k \log|x| - \log k! + \log \sum_j \frac{k!}{(k-j)!} x^{-j}$."""
    far = x.abs() > _FAR
    near, distant = x.masked_fill(far, 0.0), x.masked_fill(~far, 2 * _FAR)
    inner = outer = torch.ones_like(x)
    inverse = distant.reciprocal()
    # Both sums from the innermost bracket.
    for m in range(order, 0, -1):
        inner = 1 + inner * near / m
        outer = 1 + outer * inverse * (order + 1 - m)
    leading = order * distant.abs().log() - math.lgamma(order + 1)
    return torch.where(far, leading + outer.log(), inner.log())


def _check_options(order: int, shift: str | None) -> None:
    check_integer("order", order, low=2)
    if order % 2:
        raise ValueError(f"order must be even, or the polynomial has a root and is negative beyond it, got {order}")
    if shift is not None:
        check_choice("shift", shift, ("mean", "max"))


class TaylorSoftmax(nn.Module):
    r"""Module form of [`taylor_softmax`][danlu.simplex.taylor_softmax].

    Definition:
        `forward(input) = taylor_softmax(input, dim=dim, order=order, shift=shift)`.

    Args:
        dim: the axis that is normalized.
        order: even, at least 2.
        shift: None, "mean" or "max".

    Returns:
        From `forward`: probabilities of the shape and dtype of its input.

    Raises:
        ValueError: as in the function; raised at construction for `order` and `shift`.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import TaylorSoftmax
        >>> TaylorSoftmax(order=4)(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.1812, 0.2978, 0.4395, 0.0815])
    """

    def __init__(self, dim: int = -1, *, order: int = 2, shift: Shift | None = None) -> None:
        super().__init__()
        _check_options(order, shift)
        self.dim = dim
        self.order = order
        self.shift: Shift | None = shift

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return taylor_softmax(input, dim=self.dim, order=self.order, shift=self.shift)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"dim={self.dim}, order={self.order}, shift={self.shift!r}"
