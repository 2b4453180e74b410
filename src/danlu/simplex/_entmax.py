r"""Alpha-entmax, between softmax ($\alpha = 1$) and sparsemax ($\alpha = 2$), with a gradient for alpha.

Source: Peters, Niculae and Martins (2019), "Sparse Sequence-to-Sequence Models", arXiv 1905.05702; for the gradient by
alpha Correia, Niculae and Martins (2019), "Adaptively Sparse Transformers", arXiv 1909.00015.

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

import torch
from torch import Tensor, nn

from danlu._common.checks import check_dim, check_floating, check_real, check_same_device
from danlu.simplex._entmax_rows import Implementation, check_implementation, entmax_along, entmax_of_rows
from danlu.simplex._softmax import softmax

__all__ = ["Entmax", "Entmax15", "entmax", "entmax15"]


def entmax(input: Tensor, alpha: float | Tensor = 1.5, *, dim: int = -1, impl: Implementation = "auto") -> Tensor:
    r"""Alpha-entmax: sparse probabilities whose sparsity is a number that can be learned.

    Definition:
        $$p = \operatorname{argmax}_{q \in \Delta} \langle q, x\rangle + \frac{1 - \sum_i q_i^\alpha}{\alpha(\alpha-1)}
        = \big[(\alpha-1)\,x - \lambda\big]_+^{1/(\alpha-1)}, \qquad \textstyle\sum_i p_i = 1$$
        with $x$ = `input` along `dim`. $\alpha = 1$ is softmax and $\alpha = 2$ is sparsemax. With
        $s_i = p_i^{2-\alpha}$ on the support (else 0), $\hat s = s / \sum s$ and $\eta_i = p_i \log p_i$,
        $$J v = s \odot (v - \langle \hat s, v\rangle), \qquad
        \frac{\partial p_i}{\partial \alpha} = \frac{p_i - \hat s_i}{(\alpha-1)^2}
        - \frac{\eta_i - \hat s_i \sum_j \eta_j}{\alpha-1}$$
        A score of $-\infty$ is a mask; a slice in which all scores are $-\infty$ is defined as all zeros.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype.
        alpha: $\alpha \ge 1$, a number, or a floating tensor that broadcasts against `input` with length 1 along `dim`
            (one alpha for each head, say), which gets its gradient.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        impl: "reference" (torch operations), "cpp" (CPU), "triton" (CUDA; one alpha in $[1.05, 2]$, $N \le 32768$), or
            "auto", the compiled one where it runs.

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` or a tensor `alpha` is not floating, `alpha` not a number, or `dim` not an int.
        ValueError: `dim` does not exist or is empty, `alpha` is below 1 or does not broadcast, devices differ, or
            `impl` is unknown. The values of a tensor `alpha` are checked on the CPU only; elsewhere a slice with an
            alpha below 1 is undefined.
        RuntimeError: `impl` names a kernel that cannot run here; the message says why.

    Numerics:
        Half inputs are computed in float32 or wider and rounded once; beyond $\alpha = 2$, where a probability at the
        edge of the support is a root, all are computed in float64 (a tensor `alpha` on the CPU only). Ties share
        equally. A single $+\infty$ gives the one-hot vector. NaN stays within its slice. A fully masked slice has zero
        gradient. Everything is exact up to
        rounding also close to $\alpha = 1$, the gradient by alpha included, which there tends to
        $-\tfrac12 p_i\,(\log^2 p_i - \sum_j p_j \log^2 p_j)$; entmax with $\alpha = 1 + \varepsilon$ differs from
        softmax by about that times $\varepsilon$. The Jacobian is infinite at the edge of the support for
        $\alpha > 2$.

    Cost:
        $O(N)$ and one pass over the scores where few of them are within $1/(\alpha-1)$ of the maximum: only those can
        get a probability. For $\alpha \le 2$ Newton's method takes 2 to 10 steps on them, beyond 2 a bisection about
        50. Only the result is saved for the backward. A tensor `alpha` costs several passes in the backward. Second
        derivatives, `vmap`, reverse-mode `torch.func` transforms and `torch.compile(fullgraph=True)` work;
        forward-mode derivatives raise: take `torch.func.vjp`, the Jacobian is symmetric.

    Differences:
        Newton on $\lVert\cdot\rVert_{1/(\alpha-1)}$ and not a bisection: exact, and faster. Its unknown is the distance
        of the largest score from the threshold and not the threshold, so that many nearly equal scores keep their
        digits. The gradient by alpha is rearranged so that nothing cancels. The package `entmax` gives the uniform
        distribution for $\alpha = 1$.

    Source:
        arXiv 1905.05702 and 1909.00015; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Entmax. The
        solver and the rearranged gradient are own derivations, checked in the tests.

    Example:
        >>> import torch
        >>> from danlu.simplex import entmax
        >>> x = torch.tensor([0.5, 1.0, 1.4, -0.3])
        >>> entmax(x, 1.75)
        tensor([0.0204, 0.3235, 0.6561, 0.0000])
        >>> entmax(x.expand(3, 4), torch.tensor([[1.0], [1.5], [2.0]]))
        tensor([[0.1799, 0.2967, 0.4426, 0.0808],
                [0.0985, 0.3180, 0.5835, 0.0000],
                [0.0000, 0.3000, 0.7000, 0.0000]])
    """
    check_floating("input", input)
    axis = check_dim("dim", dim, input)
    check_implementation(impl)
    if not isinstance(alpha, Tensor):
        number = _check_number(alpha)
        return softmax(input, dim=dim) if number == 1.0 else entmax_along(input, number, dim, impl)
    rows = _check_tensor(alpha, input, axis)
    return entmax_of_rows(input.movedim(axis, -1), rows.movedim(axis, -1), impl).movedim(-1, axis)


def entmax15(input: Tensor, *, dim: int = -1, impl: Implementation = "auto") -> Tensor:
    r"""Entmax with $\alpha = 1.5$: sparse, and smoother at the edge of the support than sparsemax.

    Definition:
        $$p_i = \big[\tfrac12 x_i - \lambda\big]_+^2, \qquad \textstyle\sum_i p_i = 1, \qquad
        J v = s \odot \Big(v - \frac{\langle s, v\rangle}{\sum s}\Big),\quad s_i = \sqrt{p_i}$$
        with $x$ = `input` along `dim`; a fully masked slice is all zeros.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are masks.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        impl: as in [`entmax`][danlu.simplex.entmax].

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` is not a floating-point tensor or `dim` not an int.
        ValueError: `dim` does not exist or is empty, or `impl` is unknown.
        RuntimeError: `impl` names a kernel that cannot run here; the message says why.

    Numerics:
        As in [`entmax`][danlu.simplex.entmax].

    Cost:
        As there; only scores within 2 of the maximum can get a probability.

    Source:
        arXiv 1905.05702, section 3.

    Example:
        >>> import torch
        >>> from danlu.simplex import entmax15
        >>> entmax15(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.0985, 0.3180, 0.5835, 0.0000])
    """
    check_floating("input", input)
    check_dim("dim", dim, input)
    check_implementation(impl)
    return entmax_along(input, 1.5, dim, impl)


def _check_number(alpha: object) -> float:
    return check_real("alpha", alpha, low=1.0)


def _check_tensor(alpha: Tensor, input: Tensor, axis: int) -> Tensor:
    """One alpha for every slice, as a view."""
    check_floating("alpha", alpha)
    check_same_device(input=input, alpha=alpha)
    wanted = [1 if i == axis else length for i, length in enumerate(input.shape)]
    try:
        rows = alpha.expand(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"alpha must broadcast to shape {tuple(wanted)} for input {tuple(input.shape)}, got {tuple(alpha.shape)}"
        ) from error
    if alpha.device.type == "cpu" and not torch.compiler.is_compiling() and _any(~(alpha >= 1.0)):
        raise ValueError(f"alpha must be at least 1, got {float(alpha.detach().min())}")
    return rows


def _any(mask: Tensor) -> bool:
    try:
        return bool(mask.any())
    except RuntimeError:
        # Within vmap there are no values to look at.
        return False


class Entmax(nn.Module):
    r"""Module form of [`entmax`][danlu.simplex.entmax].

    Definition:
        `forward(input) = entmax(input, alpha, dim=dim)`.

    Args:
        alpha: $\alpha \ge 1$, a number or a tensor, which becomes a buffer. An `nn.Parameter` is learned; it must be
            kept at 1 or above, such as by `1 + sigmoid` of another parameter, which then goes to the function.
        dim: the axis that is normalized.

    Returns:
        From `forward`: probabilities of the shape and dtype of its input.

    Raises:
        ValueError: as in the function; raised at construction for a number `alpha`.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import Entmax
        >>> Entmax(1.25)(torch.tensor([0.5, 1.0, 1.4, -0.3]))
        tensor([0.1483, 0.3091, 0.5113, 0.0313])
    """

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1) -> None:
        super().__init__()
        self.alpha: float | Tensor
        if isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
            # So that it moves with the module.
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha if isinstance(alpha, Tensor) else _check_number(alpha)
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return entmax(input, self.alpha, dim=self.dim)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        alpha = f"tensor of shape {tuple(self.alpha.shape)}" if isinstance(self.alpha, Tensor) else self.alpha
        return f"alpha={alpha}, dim={self.dim}"


class Entmax15(nn.Module):
    r"""Module form of [`entmax15`][danlu.simplex.entmax15].

    Definition:
        `forward(input) = entmax15(input, dim=dim)`.

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
        >>> from danlu.simplex import Entmax15
        >>> Entmax15()(torch.tensor([3.0, 0.0]))
        tensor([1., 0.])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return entmax15(input, dim=self.dim)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"dim={self.dim}"
