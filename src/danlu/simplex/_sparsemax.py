r"""Sparsemax, the Euclidean projection of scores on the simplex.

Source: Martins and Astudillo (2016), "From Softmax to Sparsemax", arXiv 1602.02068.

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

from torch import Tensor, nn

from danlu._common.checks import check_dim, check_floating
from danlu.simplex._entmax_rows import Implementation, check_implementation, entmax_along

__all__ = ["Sparsemax", "sparsemax"]


def sparsemax(input: Tensor, *, dim: int = -1, impl: Implementation = "auto") -> Tensor:
    r"""The probability vector that is nearest to the scores; it has exact zeros.

    Definition:
        $$p = \operatorname{argmin}_{q \in \Delta} \lVert q - x \rVert^2 = [x - \lambda]_+, \qquad
        \textstyle\sum_i [x_i - \lambda]_+ = 1, \qquad
        J v = s \odot \Big(v - \frac{\langle s, v\rangle}{\sum s}\Big),\quad s_i = 1_{p_i > 0}$$
        with $x$ = `input` along `dim` and $J$ the symmetric Jacobian. A score of $-\infty$ is a mask; a slice in which
        all scores are $-\infty$ is defined as all zeros.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        impl: "reference" (torch operations), "cpp" (CPU), "triton" (CUDA), or "auto", the compiled one where it runs.

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` is not a floating-point tensor or `dim` not an int.
        ValueError: `dim` does not exist or is empty, or `impl` is unknown.
        RuntimeError: `impl` names a kernel that cannot run here; the message says why.

    Numerics:
        Half inputs are computed in float32 or wider and rounded once. Ties share equally. A single $+\infty$ gives the
        one-hot vector. NaN stays within its slice. A fully masked slice has zero gradient. The derivative is that of
        the support; where a score is exactly at the threshold, that is one of several.

    Cost:
        $O(N)$ and one pass over the scores where few of them are within 1 of the maximum: only those can get a
        probability. Newton's method then takes 2 to 9 steps on them. Only the result is saved for the backward.
        Second derivatives, `vmap`, reverse-mode `torch.func` transforms and `torch.compile(fullgraph=True)` work;
        forward-mode derivatives raise: take `torch.func.vjp`, the Jacobian is symmetric.

    Differences:
        No sorting. The package `entmax` fails on fully masked slices and NaN, and has no second derivative.

    Source:
        arXiv 1602.02068; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Sparsemax.

    Example:
        >>> import torch
        >>> from danlu.simplex import sparsemax
        >>> sparsemax(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.0000, 0.3000, 0.7000, 0.0000])
    """
    check_floating("input", input)
    check_dim("dim", dim, input)
    check_implementation(impl)
    return entmax_along(input, 2.0, dim, impl)


class Sparsemax(nn.Module):
    r"""Module form of [`sparsemax`][danlu.simplex.sparsemax].

    Definition:
        `forward(input) = sparsemax(input, dim=dim)`.

    Args:
        dim: the axis that is normalized.

    Returns:
        From `forward`: probabilities of the shape and dtype of its input.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import Sparsemax
        >>> Sparsemax()(torch.tensor([2.0, 1.5, 0.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return sparsemax(input, dim=self.dim)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"dim={self.dim}"
