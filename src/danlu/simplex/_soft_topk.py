r"""Smooth top-k: maps from scores to numbers in [0, 1] with sum k, which tend to the indicator of the k largest.

Source: "Softmax后传:寻找Top-K的光滑近似" (2024-09-19); for the exponential form arXiv 2302.01425, for subsets arXiv
2210.01941.

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

import math
import warnings
from typing import Literal, overload

import torch
from torch import Tensor, nn

from danlu._common.checks import (
    broadcasts_to,
    check_bool,
    check_dim,
    check_floating,
    check_real,
    check_same_device,
    is_low_precision,
)
from danlu.simplex._subset_sums import inclusion, log_subset_sum
from danlu.simplex._topk_rows import hard_rows, threshold_rows

__all__ = ["SoftTopK", "log_esp", "soft_topk"]

TopKMethod = Literal["laplace", "sigmoid", "exp", "clip", "grad", "iter"]
_METHODS = ("laplace", "sigmoid", "exp", "clip", "grad", "iter")


@overload
def soft_topk(
    input: Tensor,
    k: float | Tensor,
    *,
    method: TopKMethod = "laplace",
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    mask: Tensor | None = None,
    hard: bool = False,
    return_threshold: Literal[False] = False,
) -> Tensor: ...
@overload
def soft_topk(
    input: Tensor,
    k: float | Tensor,
    *,
    method: TopKMethod = "laplace",
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    mask: Tensor | None = None,
    hard: bool = False,
    return_threshold: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def soft_topk(
    input: Tensor,
    k: float | Tensor,
    *,
    method: TopKMethod = "laplace",
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    mask: Tensor | None = None,
    hard: bool = False,
    return_threshold: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Smooth top-k of scores: numbers in [0, 1] whose sum is k.

    Definition:
        With $x$ = `input` along `dim` and $\tau$ = `temperature`, the threshold methods are
        $$p_i = f(x_i/\tau - \lambda), \quad \sum_i p_i = k, \qquad
        \frac{\partial p}{\partial x} v = \frac1\tau\, f' \odot \Big(v - \frac{\langle f', v\rangle}{\sum f'}\Big),
        \quad \frac{\partial p}{\partial k} = \frac{f'}{\sum f'}$$

        | method | $f(d)$ | what it is |
        |---|---|---|
        | "laplace" | $\tfrac12 e^{d}$ for $d < 0$, else $1 - \tfrac12 e^{-d}$ | the default |
        | "sigmoid" | $1/(1+e^{-d})$ | projection by binary entropy |
        | "exp" | $\min(1, e^{d})$ | softmax for $k = 1$; saturated entries have no gradient |
        | "clip" | $d$ clipped to $[0, 1]$ | Euclidean projection; sparsemax for $k = 1$ |

        "grad" is $p_i = \partial \log Z_k / \partial x_i$ with $Z_k = \sum_{|S| = k} e^{\sum_{i \in S} x_i/\tau}$: the
        probability that $i$ is in a random subset $S$; softmax for $k = 1$. "iter" adds up $k$ softmaxes,
        $p \leftarrow p + \operatorname{softmax}((1 - p) \odot (x - \min x))$; its values may exceed 1.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are masks.
        k: $0 \le k \le N$, a number, or a tensor with one number per slice that broadcasts against `input` with length
            1 along `dim`. Fractions are allowed for the threshold methods, which give a floating tensor its gradient.
        method: see the table.
        temperature: $\tau > 0$, a number or a tensor that broadcasts against `input`, which gets its gradient. The
            result tends to the indicator of the k largest as it tends to 0.
        dim: the axis, from `-input.ndim` to `input.ndim - 1`.
        mask: bool, broadcastable to `input`, True = visible; None means all are.
        hard: return the indicator of the k largest (whole `k`), with the gradient of the smooth map
            ("straight-through"), which is computed only where a gradient may be wanted.
        return_threshold: also return $\lambda$, for the threshold methods.

    Returns:
        Shape and dtype of `input`; with `return_threshold` also $\lambda$, with length 1 along `dim`, float32 for half
        inputs. In a slice with at most $k$ visible entries these get 1.

    Raises:
        TypeError: `input` or a tensor `temperature` is not floating, `mask` not bool, or an option of a wrong type.
        ValueError: `k` is not in $[0, N]$, or a fraction where whole numbers are needed; `method` is unknown;
            `temperature` is not positive; shapes do not fit; a threshold is asked of "grad" or "iter". The values of
            tensors are checked on the CPU only.

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once; "grad" is computed in float64. Ties share
        equally. Where everything is saturated the gradient is 0. Between two groups of scores with a gap beyond the
        range of exp the result is exactly hard. NaN stays within its slice. Entries that share a value at the edge of
        the k largest are chosen from the first on by `hard`.
        In float32 a value within 6e-8 of 1 is 1 and has a slope of 0: the gradient of `k` goes to the others. Values
        next to 0 keep their digits, down to the least number of the dtype, whatever is next to 1 beside them.

    Cost:
        The threshold methods scan the scores a few times (Newton's method within a bracket) and sort nothing; on the
        CPU that is compiled code, elsewhere operations in float64. They save $p$ alone. `hard` adds one search for the
        $k$-th largest score, and without a gradient is nothing but that. "grad" takes $O(N\sqrt k)$. Second
        derivatives, `vmap`, reverse-mode `torch.func` transforms and `torch.compile(fullgraph=True)` work.

    Differences:
        The article's formulas for "laplace" stop at a threshold above the least score and cancel for large $k$; its
        recursion for "grad" loses all digits. Here both are exact. "laplace" equals softmax for $k = 1$ only where no
        probability exceeds one half.

    Source:
        The article; the contour sum of "grad" and the solver are own derivations, checked in the tests.

    Example:
        >>> import torch
        >>> from danlu.simplex import soft_topk
        >>> soft_topk(torch.tensor([3.0, 2.0, 1.0, 4.0]), 2)
        tensor([0.6967, 0.3033, 0.1116, 0.8884])
    """
    check_floating("input", input)
    axis = check_dim("dim", dim, input)
    _check_method(method)
    whole = hard or method in ("grad", "iter")
    sizes = _sizes(k, input, axis, whole=whole)
    scores = input.float() if is_low_precision(input.dtype) else input
    tau = _check_temperature(temperature, scores)
    if method == "iter" and isinstance(k, Tensor):
        raise TypeError("k must be a number for method='iter'")
    if return_threshold and method in ("grad", "iter"):
        raise ValueError(f"return_threshold needs a method with a threshold, got {method!r}")
    if mask is not None:
        scores = scores.masked_fill(~_check_mask(mask, input), -math.inf)
    rows = _cooled(scores, tau).movedim(axis, -1)
    sizes = sizes.movedim(axis, -1)
    if hard and not return_threshold and not (torch.is_grad_enabled() and _may_learn(rows, sizes)):
        # The smooth map would be there for its gradient alone.
        return hard_rows(rows, sizes).to(input.dtype).movedim(-1, axis)
    if method == "grad":
        p, threshold = _by_rows(rows, sizes), None
    elif method == "iter":
        p, threshold = _iterated(rows, float(k)), None
    else:
        # Rounded to half, values just below 1 are 1, where the slopes of the other two methods jump to 0.
        smooth = method in ("laplace", "sigmoid")
        if smooth and is_low_precision(input.dtype) and isinstance(tau, float) and tau == 1.0 and mask is None:
            rows = input.movedim(axis, -1)
        p, threshold = threshold_rows(rows, sizes, method)
    if hard:
        p = hard_rows(rows.detach(), sizes.detach(), p)
    out = p.to(input.dtype).movedim(-1, axis)
    return out if not return_threshold or threshold is None else (out, threshold.movedim(-1, axis))


def log_esp(input: Tensor, k: int | Tensor, *, dim: int = -1) -> Tensor:
    r"""Logarithm of an elementary symmetric polynomial of exponentials: of all products of k of them.

    Definition:
        $$\log e_k(e^{x}) = \log \sum_{|S| = k} e^{\sum_{i \in S} x_i}$$
        with $x$ = `input` along `dim`. Its gradient is [`soft_topk`][danlu.simplex.soft_topk] with `method="grad"`,
        and $\log e_k - \sum_{i \in T} x_i$ is the negative log-likelihood of the set $T$ of $k$ entries.

    Args:
        input: scores, shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are left out.
        k: $0 \le k \le N$, an int, or a tensor of whole numbers that broadcasts against `input` with length 1 along
            `dim`.
        dim: the axis that is summed over.

    Returns:
        Shape of `input` without `dim`; float32 for half inputs, else dtype of `input`. $-\infty$ with fewer than `k`
        entries.

    Raises:
        TypeError: `input` is not floating or `k` not a number.
        ValueError: `k` is not a whole number in $[0, N]$, or `dim` does not exist.

    Numerics:
        Computed in float64 by a contour sum and rounded once; the error is a few units in the last place of
        $\sum_i |x_i|$ in float64. A NaN gives NaN in its slice, $+\infty$ gives $+\infty$.

    Source:
        As in [`soft_topk`][danlu.simplex.soft_topk].

    Example:
        >>> import torch
        >>> from danlu.simplex import log_esp
        >>> round(log_esp(torch.tensor([1.0, 2.0, 3.0]).log(), 2).exp().item(), 4)
        11.0
    """
    check_floating("input", input)
    axis = check_dim("dim", dim, input)
    sizes = _sizes(k, input, axis, whole=True).movedim(axis, -1)
    rows = input.movedim(axis, -1)
    x, sizes, visible, inner = _finite(rows, sizes)
    safe = torch.where(inner, sizes, 1.0)
    value = log_subset_sum(x.reshape(-1, x.shape[-1]), safe.reshape(-1, 1)).view(safe.shape)
    count = visible.sum(-1, keepdim=True)
    everything = torch.where(visible, rows.to(torch.float64), 0.0).sum(-1, keepdim=True)
    value = torch.where(inner, value, torch.where(sizes == 0, 0.0, torch.where(sizes == count, everything, -math.inf)))
    endless = (rows == math.inf).any(-1, keepdim=True) & (sizes > 0) & (sizes <= count)
    value = torch.where(endless, math.inf, value)
    value = torch.where(rows.isnan().any(-1, keepdim=True), math.nan, value)
    wide = torch.float32 if is_low_precision(input.dtype) else input.dtype
    return value.to(wide)[..., 0]


def _finite(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 rows for the contour sum, whether entries are visible, and rows that are neither trivial nor NaN.

    Hidden entries are moved so far down that they are not chosen, without being infinite.
    """
    x = rows.to(torch.float64)
    visible = x != -math.inf
    sizes = sizes.to(torch.float64).expand(*x.shape[:-1], 1)
    inner = (sizes > 0) & (sizes < visible.sum(-1, keepdim=True))
    # An infinite score is far above all others, and as likely as another one.
    top = torch.where(x.detach().isfinite(), x.detach(), -math.inf).amax(-1, keepdim=True)
    x = torch.where(x == math.inf, torch.where(top.isfinite(), top, 0.0) + 800.0, x)
    least = torch.where(visible, x.detach(), math.inf).amin(-1, keepdim=True)
    usable = inner & least.isfinite()
    x = torch.where(visible & usable, x, torch.where(usable, least - 800.0, 0.0))
    return x, sizes, visible, inner


def _by_rows(rows: Tensor, sizes: Tensor) -> Tensor:
    x, sizes, visible, inner = _finite(rows, sizes)
    safe = torch.where(inner, sizes, 1.0)
    p = inclusion(x.reshape(-1, x.shape[-1]), safe.reshape(-1, 1)).view(x.shape)
    trivial = torch.where(visible & (sizes > 0), 1.0, 0.0)
    p = torch.where(visible & inner, p, trivial)
    return torch.where(rows.isnan().any(-1, keepdim=True), math.nan, p).to(rows.dtype)


def _iterated(rows: Tensor, k: float) -> Tensor:
    warnings.warn("the values of method='iter' may exceed 1 and are not in the order of the scores", stacklevel=3)
    hidden = rows == -math.inf
    least = torch.where(hidden, math.inf, rows).amin(-1, keepdim=True)
    x = rows - torch.where(least.isfinite(), least, 0.0)
    p = torch.zeros_like(rows)
    for _ in range(int(k)):
        z = torch.where(hidden, -math.inf, (1 - p) * torch.where(hidden, 0.0, x))
        p = p + torch.where(
            hidden.all(-1, keepdim=True), 0.0, torch.softmax(z.masked_fill(hidden.all(-1, True), 0), -1)
        )
    return p


def _cooled(scores: Tensor, tau: float | Tensor) -> Tensor:
    """Scores divided by the temperature."""
    if not isinstance(tau, Tensor):
        return scores if tau == 1.0 else scores / tau
    # Infinite scores stay out of the graph: their product with a gradient of 0 is NaN in the gradient of tau.
    finite = scores.isfinite()
    return torch.where(finite, torch.where(finite, scores, 0.0) / tau, scores)


def _may_learn(*tensors: Tensor) -> bool:
    """Whether a gradient may be wanted: within transforms, as in a compiler, a tensor does not say."""
    if torch.compiler.is_compiling():
        return True
    try:
        return any(tensor.requires_grad or not tensor.data_ptr() for tensor in tensors if tensor.numel())
    except RuntimeError:
        return True


def _check_method(method: str) -> str:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    return method


def _sizes(k: float | Tensor, input: Tensor, axis: int, *, whole: bool) -> Tensor:
    """`k` as one number per slice, a view."""
    n = input.shape[axis]
    wanted = [1 if i == axis else length for i, length in enumerate(input.shape)]
    if not isinstance(k, Tensor):
        number = check_real("k", k, low=0.0)
        if number > n:
            raise ValueError(f"k must be at most N = {n} for input {tuple(input.shape)}, got {k}")
        if whole and number != int(number):
            raise ValueError(f"k must be a whole number here, got {k}")
        return torch.full((1,) * input.ndim, number, dtype=torch.float64, device=input.device).expand(wanted)
    if k.dtype == torch.bool or k.is_complex():
        raise TypeError(f"k must be a number or a real tensor, got dtype {k.dtype}")
    check_same_device(input=input, k=k)
    try:
        sizes = k.expand(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"k must broadcast to shape {tuple(wanted)} for input {tuple(input.shape)}, got {tuple(k.shape)}"
        ) from error
    if k.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(k.detach(), n, whole)
    return sizes


def _check_values(k: Tensor, n: int, whole: bool) -> None:
    try:
        wrong = bool((~((k >= 0) & (k <= n))).any())
        fraction = whole and bool((k != k.round()).any())
    except RuntimeError:
        # Within vmap there are no values to look at.
        return
    if wrong:
        raise ValueError(f"k must be in [0, {n}], got values from {float(k.min())} to {float(k.max())}")
    if fraction:
        raise ValueError("k must hold whole numbers here")


def _check_temperature(temperature: float | Tensor, scores: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return check_real("temperature", temperature, low=0.0, low_open=True)
    check_floating("temperature", temperature)
    check_same_device(input=scores, temperature=temperature)
    given, shape = tuple(temperature.shape), tuple(scores.shape)
    if not broadcasts_to(given, shape):
        raise ValueError(f"temperature must broadcast to input {shape}, got {given}")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            positive = bool((temperature.detach() > 0).all())
        except RuntimeError:
            # Within vmap there are no values to look at.
            return temperature
        if not positive:
            raise ValueError(f"temperature must be positive, got a least value of {float(temperature.detach().min())}")
    return temperature


def _check_mask(mask: Tensor, input: Tensor) -> Tensor:
    check_bool("mask", mask, "visible")
    given, shape = tuple(mask.shape), tuple(input.shape)
    if not broadcasts_to(given, shape):
        raise ValueError(f"mask must broadcast to input {shape}, got {given}")
    return mask


class SoftTopK(nn.Module):
    r"""Module form of [`soft_topk`][danlu.simplex.soft_topk].

    Definition:
        `forward(input) = soft_topk(input, k, method=method, temperature=temperature, dim=dim, hard=hard)`.

    Args:
        k: $k \ge 0$.
        method: see [`soft_topk`][danlu.simplex.soft_topk].
        temperature: $\tau > 0$.
        dim: the axis.
        hard: the indicator of the k largest, with the gradient of the smooth map.

    Returns:
        From `forward`: values in [0, 1] of the shape and dtype of its input.

    Raises:
        ValueError: as in the function; raised at construction for `k` < 0, `method` and `temperature`.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import SoftTopK
        >>> SoftTopK(2, hard=True)(torch.tensor([3.0, 2.0, 1.0, 4.0]))
        tensor([1., 0., 0., 1.])
    """

    def __init__(
        self,
        k: float,
        *,
        method: TopKMethod = "laplace",
        temperature: float = 1.0,
        dim: int = -1,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.k = check_real("k", k, low=0.0)
        _check_method(method)
        self.method: TopKMethod = method
        self.temperature = check_real("temperature", temperature, low=0.0, low_open=True)
        self.dim = dim
        self.hard = hard

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the values."""
        return soft_topk(
            input, self.k, method=self.method, temperature=self.temperature, dim=self.dim, mask=mask, hard=self.hard
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"k={self.k:g}, method={self.method!r}, temperature={self.temperature}, dim={self.dim}, hard={self.hard}"
