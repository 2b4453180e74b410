r"""Sparse softmax: softmax over the largest scores, and exact zeros elsewhere.

Source: Sun et al. (2021), "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation", arXiv 2112.12433.

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

from torch import Tensor, nn

from danlu._common.checks import check_dim, check_floating, check_integer, check_real, is_low_precision
from danlu.simplex._softmax import softmax

__all__ = ["SparseSoftmax", "sparse_softmax"]


def sparse_softmax(input: Tensor, *, dim: int = -1, k: int | None = None, p: float | None = None) -> Tensor:
    r"""Softmax over the `k` largest scores, or over the fewest whose softmax adds up to `p` (the nucleus).

    Definition:
        $$p_i = \frac{e^{x_i}}{\sum_{j \in \Omega} e^{x_j}}\ (i \in \Omega),\quad 0\ \text{else}, \qquad
        \Omega = \{i : x_i \ge x_{(m)}\}$$
        with $x$ = `input` along `dim`, $x_{(m)}$ its $m$-th largest entry, and $m$ = `k`, or the smallest number with
        $\sum_{j \le m} \operatorname{softmax}(x)_{(j)} \ge$ `p`. A score of $-\infty$ is a mask; a slice in which all
        scores are $-\infty$ is all zeros.

    Args:
        input: scores (nats), shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are masks.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        k: from 1 to `N`; the paper's experiments use 10. `N` is softmax.
        p: mass in $(0, 1]$; 1 is softmax. Give `k` or `p`.

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` is not a floating-point tensor, `dim` or `k` not an int, `p` not a number.
        ValueError: `dim` does not exist or is empty, `k` is not in $[1, N]$, `p` not in $(0, 1]$, or not exactly one of
            them is given.

    Numerics:
        Half inputs are computed in float32 and rounded once. Scores that tie with the smallest of the chosen ones are
        all kept, so the map commutes with permutations; there may then be more than `k`. A fully masked slice has zero
        gradient. NaN stays within its slice. The choice itself is not differentiated: scores outside get no gradient.

    Cost:
        `torch.topk` and one softmax; a sort with `p`.

    Differences:
        The paper's top-k keeps exactly `k` of tied scores, whichever come first.

    Source:
        arXiv 2112.12433; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Sparse Softmax. The nucleus:
        Holtzman et al. (2020), arXiv 1904.09751.

    Example:
        >>> import torch
        >>> from danlu.simplex import sparse_softmax
        >>> sparse_softmax(torch.tensor([0.5, 1.0, 1.4, -0.3]), k=2)
        tensor([0.0000, 0.4013, 0.5987, 0.0000])
    """
    check_floating("input", input)
    axis = check_dim("dim", dim, input)
    _check_options(k, p)
    if k is not None and k > input.shape[axis]:
        raise ValueError(f"k must be at most the length of the axis, got {k} for {input.shape[axis]}")
    scores = input.float() if is_low_precision(input.dtype) else input
    fixed = scores.detach()
    if k is not None:
        smallest = fixed.topk(k, axis, sorted=True).values.narrow(axis, k - 1, 1)
    elif p is not None and p < 1.0:
        ranked = fixed.sort(axis, descending=True).values
        mass = softmax(ranked, dim=axis)
        # Those before which there is less than p; the largest always is.
        count = ((mass.cumsum(axis) - mass) < p).sum(axis, keepdim=True)
        smallest = ranked.gather(axis, (count - 1).clamp(min=0))
    else:
        return softmax(input, dim=axis)
    # NaN is not below, so it reaches the softmax.
    return softmax(scores.masked_fill(fixed < smallest, float("-inf")), dim=axis).to(input.dtype)


def _check_options(k: int | None, p: float | None) -> None:
    if (k is None) == (p is None):
        raise ValueError(f"give exactly one of k and p, got k={k!r} and p={p!r}")
    if k is not None:
        check_integer("k", k, low=1)
    else:
        check_real("p", p, low=0.0, high=1.0, low_open=True)


class SparseSoftmax(nn.Module):
    r"""Module form of [`sparse_softmax`][danlu.simplex.sparse_softmax].

    Definition:
        `forward(input) = sparse_softmax(input, dim=dim, k=k, p=p)`.

    Args:
        dim: the axis that is normalized.
        k: number of scores that are kept.
        p: mass that is kept; give `k` or `p`.

    Returns:
        From `forward`: probabilities of the shape and dtype of its input.

    Raises:
        ValueError: as in the function; raised at construction for `k` and `p`.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import SparseSoftmax
        >>> SparseSoftmax(p=0.7)(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.0000, 0.4013, 0.5987, 0.0000])
    """

    def __init__(self, dim: int = -1, *, k: int | None = None, p: float | None = None) -> None:
        super().__init__()
        _check_options(k, p)
        self.dim = dim
        self.k = k
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return sparse_softmax(input, dim=self.dim, k=self.k, p=self.p)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"dim={self.dim}, k={self.k}, p={self.p}"
