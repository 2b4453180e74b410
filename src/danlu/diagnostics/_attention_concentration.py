r"""Does attention concentrate? How many keys a row of weights really reads, with closed forms for Gaussian keys.

Source: "注意力机制真的可以“集中注意力”吗?" (2023-12-12).

Shape letters: `n` keys, `d` features of linear attention.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import (
    broadcasts_to,
    check_bool,
    check_choice,
    check_dim,
    check_floating,
    check_real,
    check_same_device,
    is_low_precision,
)

__all__ = ["attention_sparsity", "linear_attention_sparsity_bound", "sparsity_of_gaussian"]

Kind = Literal["s", "n_eff", "entropy", "max"]
KernelFunction = Literal["exp", "identity", "relu", "square", "relu2"]

_KINDS = ("s", "n_eff", "entropy", "max")
_FUNCTIONS = ("exp", "identity", "relu", "square", "relu2")
# Below this ratio of mean to deviation the closed forms of relu cancel; the series then has 10 digits and more.
_FAR = -12.0
_TERMS = 24


@torch.no_grad()
def attention_sparsity(weights: Tensor, *, mask: Tensor | None = None, dim: int = -1, kind: Kind = "s") -> Tensor:
    r"""How concentrated rows of attention weights are, whatever their scale.

    Definition:
        Over the $n$ visible keys of a row $a$,
        $$S = \frac{\mathbb E|a|}{\sqrt{\mathbb E a^2}} \in \Big[\frac{1}{\sqrt n}, 1\Big], \qquad
        n_{\mathrm{eff}} = n S^2 = \frac{(\sum_j |a_j|)^2}{\sum_j a_j^2} \in [1, n],$$
        and with $p = a / \sum_j a_j$ the entropy $-\sum_j p_j \log p_j$ and the largest $p_j$. $S = 1$ if all $|a_j|$
        are equal and $S = 1/\sqrt n$ if one key has everything; for weights that sum to 1,
        $n_{\mathrm{eff}} = 1 / \sum_j p_j^2$ is the number of keys that are read.

    Args:
        weights: floating-point, of any shape; they need not sum to 1.
        mask: bool, broadcastable to `weights`, True = visible; None means all are.
        dim: axis of the keys.
        kind: "s" for $S$, "n_eff" (keys), "entropy" (nats) or "max". The first two take weights of any sign.

    Returns:
        Shape of `weights` without `dim`, float32, or float64 for float64 weights. NaN where fewer than two keys are
        visible, since nothing can concentrate there, and where all visible weights are 0.

    Raises:
        TypeError: `weights` is not floating-point, or `mask` not bool.
        ValueError: `dim` is no axis or an empty one, `mask` does not broadcast, `kind` is unknown, or "entropy" or
            "max" is asked of negative weights.

    Numerics:
        Half weights are computed in float32. Every row is divided by its largest $|a_j|$ first, so squares neither
        underflow nor overflow. A NaN weight makes its row NaN unless it is hidden.

    Cost:
        O(size); "entropy" and "max" wait for the device.

    Differences:
        Some texts call the square of $S$ sparsity.

    Source:
        "注意力机制真的可以“集中注意力”吗?" (2023-12-12), section 2.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import attention_sparsity
        >>> weights = torch.zeros(100)
        >>> weights[:7] = 1 / 7
        >>> round(attention_sparsity(weights, kind="n_eff").item(), 4), round(attention_sparsity(weights).item(), 4)
        (7.0, 0.2646)
    """
    check_floating("weights", weights)
    axis = check_dim("dim", dim, weights)
    check_choice("kind", kind, _KINDS)
    visible = _visible(mask, weights)
    if is_low_precision(weights.dtype):
        weights = weights.float()
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    size = weights.abs()
    if kind in ("entropy", "max") and bool((weights < 0).any()):
        raise ValueError(f"kind={kind!r} needs weights that are not negative")
    size = size / size.amax(axis, keepdim=True)
    total = size.sum(axis)
    count = _count(visible, size, axis)
    if kind == "max":
        found = 1 / total
    elif kind == "entropy":
        found = torch.special.entr(size / total.unsqueeze(axis)).sum(axis)
    else:
        n_eff = total.square() / size.square().sum(axis)
        found = n_eff if kind == "n_eff" else (n_eff / count).sqrt()
    return found.masked_fill(count < 2, math.nan)


@torch.no_grad()
def sparsity_of_gaussian(f: KernelFunction, beta: Tensor | float, gamma: Tensor | float) -> Tensor:
    r"""Sparsity $S$ of the weights $f(q \cdot k_j)$ over infinitely many Gaussian keys.

    Definition:
        $S = \mathbb E|f| / \sqrt{\mathbb E f^2}$ of $f(x)$, $x \sim \mathcal N(\beta, \gamma^2)$: for keys
        $k \sim \mathcal N(\mu, \sigma^2 I)$, $\beta = q \cdot \mu$ and $\gamma = \sigma \|q\|$. With $\phi, \Phi$ the
        normal density and distribution function at $\beta/\gamma$:

        - exp: $e^{-\gamma^2/2}$, as sparse as one likes by growing $\|q\|$, and independent of $\beta$;
        - identity: $\big(\sqrt{2/\pi}\,\gamma e^{-\beta^2/2\gamma^2} + \beta\,\mathrm{erf}(\beta/\sqrt2\gamma)\big)
          / \sqrt{\beta^2+\gamma^2} \ge \sqrt{2/\pi}$;
        - relu: $(\beta\Phi+\gamma\phi)/\sqrt{(\beta^2+\gamma^2)\Phi+\beta\gamma\phi}$;
        - square: $(\beta^2+\gamma^2)/\sqrt{\beta^4+6\beta^2\gamma^2+3\gamma^4} \ge 1/\sqrt3$;
        - relu2: $\big((\beta^2+\gamma^2)\Phi+\beta\gamma\phi\big) /
          \sqrt{(\beta^4+6\beta^2\gamma^2+3\gamma^4)\Phi+(\beta^3\gamma+5\beta\gamma^3)\phi}$.

        relu and its square become sparse only for $\beta < 0$.

    Args:
        f: "exp", "identity", "relu", "square" or "relu2".
        beta: $\beta$, mean of the scores; a number or a floating-point tensor.
        gamma: $\gamma \ge 0$, their standard deviation; a number or a tensor that broadcasts with `beta`. Of a tensor
            the sign is not looked at.

    Returns:
        A tensor of the broadcast shape, in float64, or in the dtype of the tensors among the arguments. NaN where
        all weights are 0.

    Raises:
        TypeError: `beta` or `gamma` is neither a number nor a floating-point tensor.
        ValueError: `f` is unknown, a number `gamma` is negative, or shapes or devices do not fit.

    Numerics:
        Computed in float64, where the device has it. For relu far below 0 the tails are a scaled error function, and
        a series from $\beta/\gamma$ = -12 on, so there is no cancellation.

    Differences:
        This is the limit of many keys. A row of $n$ keys cannot be below $1/\sqrt n$ and leaves the formula early: of
        512 keys with scores of standard deviation 1, 2, 3, 4 the formula of exp says 0.607, 0.135, 0.011, 0.0003,
        and they have 0.617, 0.243, 0.133, 0.096.

    Source:
        "注意力机制真的可以“集中注意力”吗?" (2023-12-12), sections 3 and 4.

    Example:
        >>> from danlu.diagnostics import sparsity_of_gaussian
        >>> [round(sparsity_of_gaussian(f, 0.0, 2.0).item(), 4) for f in ("exp", "relu", "relu2")]
        [0.1353, 0.5642, 0.4082]
    """
    check_choice("f", f, _FUNCTIONS)
    b, g, dtype = _operands(beta, gamma)
    if f == "exp":
        return torch.exp(-g.square() / 2).expand(b.shape).to(dtype)
    # Only the ratio matters to the others, so the larger of the two is around 1 and powers cannot overflow.
    unit = torch.hypot(b, g)
    b, g = b / unit, g / unit
    ratio = b / g
    if f == "square":
        found = 1 / (b**4 + 6 * (b * g).square() + 3 * g**4).sqrt()
    elif f == "identity":
        root = math.sqrt(2)
        found = math.sqrt(2 / math.pi) * g * torch.exp(-ratio.square() / 2) + b * torch.erf(ratio / root)
    else:
        power = 1 if f == "relu" else 2
        above = _upper_sparsity(b, g, ratio, power)
        found = torch.where(ratio < 0, _lower_sparsity(ratio, power), above)
    return found.to(dtype)


@torch.no_grad()
def linear_attention_sparsity_bound(k_features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""The sharpest that linear attention over these key features can be, whatever the query.

    Definition:
        For weights $a_j = \tilde q \cdot \tilde k_j$ with $\tilde q, \tilde k_j \ge 0$,
        $$S(a) \ge \min_c S_c,$$
        with $S_c$ the sparsity of feature $c$ of the keys alone, $\tilde k_{1c}, \dots, \tilde k_{nc}$: by Minkowski
        $\|a\|_2 \le \sum_c \tilde q_c \|\tilde k_{\cdot c}\|_2$, while $\|a\|_1$ is that sum of 1-norms. So no query,
        however long, is sharper than the sparsest single feature.

    Args:
        k_features: $\tilde k \ge 0$, shape `(..., n, d)`, such as `elu(key) + 1`.
        mask: bool, broadcastable to `(..., n)`, True = visible; None means all are.

    Returns:
        $\min_c S_c$, shape `(...)`, float32, or float64 for float64 features. Its square times the number of visible
        keys is the least $n_{\mathrm{eff}}$. NaN where fewer than two keys are visible or all their features are 0.

    Raises:
        TypeError: `k_features` is not floating-point, or `mask` not bool.
        ValueError: `k_features` has fewer than two axes, an empty one, or negative elements; or `mask` does not
            broadcast.

    Numerics:
        As in [`attention_sparsity`][danlu.diagnostics.attention_sparsity]. Features that are 0 for all visible keys
        add nothing to any row and are left out.

    Cost:
        O(size); waits for the device.

    Differences:
        Not in the article, which argues by averages over keys.

    Source:
        Follows from "注意力机制真的可以“集中注意力”吗?" (2023-12-12), section 4.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import linear_attention_sparsity_bound
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        >>> linear_attention_sparsity_bound(features)  # one feature is of one key: 1 / sqrt(4)
        tensor(0.5000)
    """
    check_floating("k_features", k_features)
    if k_features.ndim < 2 or 0 in k_features.shape[-2:]:
        raise ValueError(f"k_features must have shape (..., n, d) with n, d >= 1, got {tuple(k_features.shape)}")
    if mask is not None:
        _visible(mask, k_features[..., 0])
        mask = mask.unsqueeze(-1)
    if bool((k_features < 0).any()):
        raise ValueError("k_features must not be negative: the bound holds for features that are not")
    columns = attention_sparsity(k_features, mask=mask, dim=-2)
    # NaN features must not look like empty ones.
    absent = (k_features == 0) if mask is None else (k_features == 0) | ~mask
    least = columns.masked_fill(absent.all(-2), math.inf).amin(-1)
    return least.masked_fill(least.isinf(), math.nan)


def _visible(mask: Tensor | None, weights: Tensor) -> Tensor | None:
    if mask is None:
        return None
    check_bool("mask", mask, "visible")
    if not broadcasts_to(mask.shape, weights.shape):
        raise ValueError(f"mask must broadcast to {tuple(weights.shape)}, got {tuple(mask.shape)}")
    check_same_device(weights=weights, mask=mask)
    return mask


def _count(visible: Tensor | None, size: Tensor, axis: int) -> Tensor:
    """Number of visible keys of every row, in the dtype of `size`."""
    if visible is None:
        return size.new_full(size.sum(axis).shape, size.shape[axis])
    return visible.expand(size.shape).sum(axis).to(size.dtype)


def _operands(beta: Tensor | float, gamma: Tensor | float) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in float64 and of one shape, and the dtype of the result."""
    given = {name: one for name, one in (("beta", beta), ("gamma", gamma)) if isinstance(one, Tensor)}
    for name, one in given.items():
        check_floating(name, one)
    check_same_device(**given)
    dtype, device = torch.float64, None
    if given:
        dtypes = [one.dtype for one in given.values()]
        dtype, device = torch.promote_types(dtypes[0], dtypes[-1]), next(iter(given.values())).device
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
    if not isinstance(beta, Tensor):
        beta = torch.tensor(check_real("beta", beta), dtype=wide, device=device)
    if not isinstance(gamma, Tensor):
        gamma = torch.tensor(check_real("gamma", gamma, low=0.0), dtype=wide, device=device)
    try:
        shape = torch.broadcast_shapes(beta.shape, gamma.shape)
    except RuntimeError:
        raise ValueError(
            f"beta and gamma must broadcast, got shapes {tuple(beta.shape)} and {tuple(gamma.shape)}"
        ) from None
    return beta.to(wide).expand(shape), gamma.to(wide).expand(shape), dtype


def _upper_sparsity(b: Tensor, g: Tensor, ratio: Tensor, power: int) -> Tensor:
    """Sparsity of relu to a power, where the mean is not negative."""
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(ratio)
    second = (b.square() + g.square()) * share + b * g * density
    if power == 1:
        return (b * share + g * density) / second.sqrt()
    fourth = (b**4 + 6 * (b * g).square() + 3 * g**4) * share + (b**3 * g + 5 * b * g**3) * density
    return second / fourth.sqrt()


def _lower_sparsity(ratio: Tensor, power: int) -> Tensor:
    r"""The same for $z = \beta/\gamma \le 0$, from the moments over the density: both have $\phi$ as a factor."""
    # Beyond -100 the density is 0 and the powers of the series may be, too.
    z = ratio.clamp(min=-100.0, max=0.0)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    found = _moment(z, power) / _moment(z, 2 * power).sqrt() * density.sqrt()
    # Without deviation nothing is above 0.
    return found.masked_fill(ratio.isinf(), math.nan)


def _moment(z: Tensor, n: int) -> Tensor:
    r"""$\int_0^\infty t^n e^{-t^2/2 + zt} dt$ for $z \le 0$ and $n$ = 1, 2 or 4."""
    near = z.clamp(min=_FAR)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-near / math.sqrt(2))
    if n == 1:
        found = near * mills + 1
    elif n == 2:
        found = (near.square() + 1) * mills + near
    else:
        found = (near**4 + 6 * near.square() + 3) * mills + near**3 + 5 * near
    far = z.clamp(max=_FAR).abs()
    # Term by term from the series of the Gaussian: (-1/2)^k / k! times (n + 2k)! / |z|^(n + 2k + 1).
    term = math.factorial(n) * far ** -(n + 1)
    series = term.clone()
    for k in range(1, _TERMS):
        term = term * (-(n + 2 * k) * (n + 2 * k - 1) / (2 * k)) / far.square()
        series += term
    return torch.where(z < _FAR, series, found)
