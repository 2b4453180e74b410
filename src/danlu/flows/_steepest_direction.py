"""The direction in which a function rises fastest, which depends on how length is measured.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `...` any axes; `N` number of elements; `M`, `K` rows and columns of a matrix.
"""

from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_floating, check_same_device, is_low_precision

__all__ = ["Norm", "steepest_direction"]

Norm = Literal["l2", "linf", "l1", "spectral", "kl"]
_NORMS: tuple[Norm, ...] = ("l2", "linf", "l1", "spectral", "kl")


def steepest_direction(g: Tensor, norm: Norm, *, metric: Tensor | None = None) -> Tensor:
    r"""Unit vector along which the linear function with gradient `g` rises fastest.

    Definition:
        $$d^* = \operatorname{argmax}_{\|d\| = 1} \langle g, d\rangle$$
        with $g$ = `g` and the norm

        | `norm` | $\lVert d\rVert$ | $d^*$ | descent along $-d^*$ |
        |---|---|---|---|
        | "l2" | Euclidean | $g/\lVert g\rVert_2$ | normalized gradient descent |
        | "linf" | largest entry | $\operatorname{sign} g$ | Lion, Tiger |
        | "l1" | sum of moduli | $\operatorname{sign}(g_k)\,e_k$, $\lvert g_k\rvert$ largest | coordinate descent |
        | "spectral" | largest singular value | $U V^\top$ of $g = U\Sigma V^\top$ | Muon |
        | "kl" | $\sqrt{d^\top F d}$ | $F^{-1}g / \sqrt{g^\top F^{-1} g}$ | natural gradient |

        with $F$ = `metric`, for the Fisher matrix twice the KL divergence to second order.

    Args:
        g: gradient, shape `(...)`, floating; "spectral" takes matrices `(..., M, K)`, each on its own.
        norm: one of the table; all but "spectral" see the whole tensor as one vector.
        metric: $F$, symmetric positive definite, shape `(N, N)` for `g` of `N` elements; for "kl" only.

    Returns:
        Shape and dtype of `g`. A zero gradient gives zeros.

    Raises:
        TypeError: `g` or `metric` is not floating.
        ValueError: `norm` is unknown, `g` is not a matrix for "spectral", `metric` is missing, does not fit, or is
            given for another norm.
        RuntimeError: `metric` is not positive definite (from its Cholesky factorization).

    Numerics:
        float16 and bfloat16 are computed in float32. "l2" and "kl" divide by the largest entry first, so gradients of
        any size are safe. Ties of "l1" go to the first entry. "spectral" keeps the singular values above
        $\varepsilon \max(M, K)\,\sigma_{\max}$, so the null space of `g` gets nothing.

    Cost:
        O(N), but one singular value decomposition for "spectral" and one Cholesky factorization for "kl".

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16).

    Example:
        >>> import torch
        >>> from danlu.flows import steepest_direction
        >>> steepest_direction(torch.tensor([3.0, -4.0]), "l2")
        tensor([ 0.6000, -0.8000])
        >>> steepest_direction(torch.tensor([3.0, -4.0]), "l1")
        tensor([ 0., -1.])
    """
    check_floating("g", g)
    check_choice("norm", norm, _NORMS)
    if metric is None and norm == "kl":
        raise ValueError("norm='kl' needs a metric")
    if metric is not None and norm != "kl":
        raise ValueError(f"metric has no meaning with norm={norm!r}, only with 'kl'")
    if norm == "spectral" and g.ndim < 2:
        raise ValueError(f"norm='spectral' needs a matrix, got shape {tuple(g.shape)}")
    if metric is not None:
        check_floating("metric", metric)
        check_same_device(g=g, metric=metric)
        if metric.shape != (g.numel(), g.numel()):
            raise ValueError(
                f"metric must have shape {(g.numel(), g.numel())} for g of shape {tuple(g.shape)}, "
                f"got {tuple(metric.shape)}"
            )
    x = g.float() if is_low_precision(g.dtype) else g
    if g.numel() == 0:
        return torch.zeros_like(g)
    if norm == "linf":
        direction = x.sign()
    elif norm == "spectral":
        direction = _polar_factor(x)
    elif norm == "l1":
        flat = x.flatten()
        # A comparison with the index, since writing at an index is a scatter.
        first = torch.arange(flat.numel(), device=g.device) == flat.abs().argmax()
        direction = (flat.sign() * first).reshape(g.shape)
    else:
        direction = _normalized(x, metric)
    return direction.to(g.dtype)


def _normalized(x: Tensor, metric: Tensor | None) -> Tensor:
    """The natural direction, of length 1 in the metric; zeros for zeros."""
    largest = x.abs().amax()
    flat = (x / torch.where(largest > 0, largest, torch.ones_like(largest))).flatten()
    if metric is None:
        natural = flat
    else:
        factor = torch.linalg.cholesky(metric.to(x.dtype))
        natural = torch.cholesky_solve(flat.unsqueeze(-1), factor).squeeze(-1)
    length = (flat * natural).sum().sqrt()
    return (natural / torch.where(length > 0, length, torch.ones_like(length))).reshape(x.shape)


def _polar_factor(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    floor = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s.amax(-1, keepdim=True)
    return (u * (s > floor).to(x.dtype).unsqueeze(-2)) @ vh
