r"""What the alpha-entmax maps share: the threshold of a row, the map as an operator, and its derivatives.

With $\beta = \alpha - 1$ and $z_i = \beta\,(x_i - \max x)$ the map is $p_i \propto [1 + v z_i]_+^{1/\beta}$, where
$1/v \in [n^{-\beta}, 1]$ is the distance of the largest $\beta x$ from the threshold. Where many scores are nearly
equal that distance is small, and would lose its digits in a threshold next to it. The operator is opaque to compilers,
so that the implementation is chosen where it runs; its derivatives of every order are given here.

Shape letters: `N` the length of the last axis; `...` any other axes.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from danlu import kernels
from danlu._common.checks import check_choice, is_low_precision
from danlu._common.vmap import batch_first
from danlu.kernels import entmax as fused

__all__ = ["Implementation", "check_implementation", "entmax_along", "entmax_of_rows"]

Implementation = Literal["auto", "reference", "cpp", "triton"]
_DEVICE = {"cpp": "cpu", "triton": "cuda"}
_NO_FORWARD_MODE = (
    "entmax, sparsemax and their losses have no forward-mode derivative; take reverse mode: torch.func.vjp in place of "
    "jvp, as the Jacobian of the maps is symmetric, and torch.func.grad of a loss"
)


def check_implementation(impl: str) -> None:
    """Raise `ValueError` unless `impl` is known."""
    check_choice("impl", impl, ("auto", "reference", "cpp", "triton"))


def entmax_along(input: Tensor, alpha: float, dim: int, impl: str) -> Tensor:
    r"""The map along `dim` for one $\alpha \ge 1$."""
    return _applied(_Rows)(input.movedim(dim, -1), alpha, impl).movedim(-1, dim)


def entmax_of_rows(input: Tensor, alpha: Tensor, impl: str) -> Tensor:
    r"""The map along the last axis with an $\alpha$ for every row, shape `(..., 1)`, and with its gradient."""
    return _applied(_RowsOfTensor)(input, alpha, impl)


# ------------------------------------------------------------------------------------------------------- the solution


def _reference(input: Tensor, alpha: float | Tensor) -> Tensor:
    """The definition in torch operations, for one alpha or for one per row."""
    scores = input.to(_wide(input, alpha))
    scores = scores.clamp(max=torch.finfo(scores.dtype).max)
    largest = scores.amax(-1, keepdim=True)
    masked = largest == float("-inf")
    scores = scores - largest.masked_fill(masked, 0.0)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(scores)
        found = torch.where(alpha == 1.0, torch.softmax(scores, -1), _powers(scores, _scale(scores, alpha), alpha))
    elif alpha == 1.0:
        found = torch.softmax(scores, -1)
    else:
        found = _powers(scores, _scale(_candidates(scores, alpha), alpha), alpha)
    found = found / found.sum(-1, keepdim=True)
    return found.masked_fill(masked, 0.0).to(input.dtype)


def _wide(input: Tensor, alpha: float | Tensor) -> torch.dtype:
    """Dtype of the arithmetic: float64 where less has too few digits, and where it is there and not slow.

    At the edge of the support a probability is a power of a difference. Its digits count in half results, which have a
    wide range, and beyond 2, where the power is a root: the rounding of float32 would become 2e-4 at 3, and 0.04 at 6.
    """
    device = input.device.type
    rooted = _may_exceed(alpha - 1.0) if isinstance(alpha, float) or device == "cpu" else False
    if (device == "cpu" and is_low_precision(input.dtype)) or (rooted and device in ("cpu", "cuda")):
        return torch.float64
    return torch.float32 if is_low_precision(input.dtype) else input.dtype


def _candidates(scores: Tensor, alpha: float) -> Tensor:
    """The scores that can get a probability, if they are few and a look at them is free (on the CPU); else all."""
    n = scores.shape[-1]
    if scores.device.type != "cpu" or n < 64 or not scores.numel():
        return scores
    count = int((scores > -1.0 / (alpha - 1.0)).sum(-1).amax())
    return scores.topk(count, sorted=False).values if 0 < count <= n // 8 else scores


def _scale(scores: Tensor, alpha: float | Tensor) -> Tensor:
    r"""$v$ of every row, for scores whose maximum is 0: the root of $\|[1+vz]_+\|_{1/\beta} = v$.

    For $\alpha \le 2$ the norm is convex, so that Newton's method comes from the left; the product of residual and
    slope falls by 4 in every step. Beyond 2 the interval of $\log v$ is halved.
    """
    beta = alpha - 1.0
    z = beta * scores
    v = torch.ones_like(scores[..., :1])
    low, precise = torch.zeros_like(v), scores.dtype == torch.float64
    high = (low + beta * math.log(scores.shape[-1])).clamp(max=math.log(torch.finfo(scores.dtype).max) - 2)
    exceeds = _may_exceed(beta)
    bisects = torch.as_tensor(beta > 1.0, device=scores.device)
    # Without a look at the values, which waits for an accelerator, as many as can be needed.
    for _ in range(60 if precise else 32):
        total, slope = _sums(v * z, beta)
        norm = torch.exp(beta * total.log())
        step = (norm - v) / (1 + norm * (slope / total - 1) / v)
        rest = (step / v).abs()
        if exceeds:
            middle = (low + high) / 2
            below = beta * _sums(middle.exp() * z, beta)[0].log() >= middle
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            step, rest = torch.where(bisects, low.exp() - v, step), torch.where(bisects, high - low, rest)
        v = v + step
        if scores.device.type == "cpu" and bool((rest.nan_to_num(0.0) <= 4 * torch.finfo(scores.dtype).eps).all()):
            break
    return v


def _may_exceed(beta: float | Tensor) -> bool:
    if isinstance(beta, Tensor):
        return beta.device.type != "cpu" or bool((beta > 1.0).any())
    return beta > 1.0


def _positive(beta: float | Tensor) -> float | Tensor:
    """For rows that are a softmax anyway."""
    return beta.clamp(min=torch.finfo(beta.dtype).tiny) if isinstance(beta, Tensor) else beta


def _sums(w: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sums of $d^r$ and $d^{r-1}$ over $d = 1 + w > 0$, with $r = 1/β$."""
    if isinstance(beta, float) and beta in (0.5, 1.0):
        d = (1 + w).clamp(min=0.0)
        if beta == 0.5:
            return d.square().sum(-1, keepdim=True), d.sum(-1, keepdim=True)
        return d.sum(-1, keepdim=True), (d > 0).to(d.dtype).sum(-1, keepdim=True)
    inside = w > -1
    r = 1 / _positive(beta)
    # From the logarithm of 1 + w and not of its rounded sum: near alpha = 1 the exponent is large.
    log_d = torch.log1p(w.masked_fill(~inside, 0.0))
    powers = torch.exp(r * log_d).masked_fill(~inside, 0.0)
    lower = torch.exp((r - 1) * log_d).masked_fill(~inside, 0.0)
    return powers.sum(-1, keepdim=True), lower.sum(-1, keepdim=True)


def _powers(scores: Tensor, v: Tensor, alpha: float | Tensor) -> Tensor:
    """$[1+vz]_+^r$, which sums to $v^r$."""
    beta = alpha - 1.0
    w = v * (beta * scores)
    # What is nearer to the threshold than rounding is at it. NaN is not outside.
    outside = w <= 4 * torch.finfo(w.dtype).eps - 1
    if isinstance(beta, float) and beta in (0.5, 1.0):
        d = (1 + w).masked_fill(outside, 0.0)
        return d.square() if beta == 0.5 else d
    return torch.exp(torch.log1p(w.masked_fill(outside, 0.0)) / _positive(beta)).masked_fill(outside, 0.0)


# ------------------------------------------------------------------------------------------------------- derivatives


def _weights(p: Tensor, alpha: float | Tensor) -> Tensor:
    r"""$s_i = p_i^{2-\alpha}$ on the support, else 0."""
    outside = p == 0
    if isinstance(alpha, float) and alpha == 2.0:
        return torch.where(outside, 0.0, torch.where(p.isnan(), p, 1.0))
    inside = p.masked_fill(outside, 1.0)
    if isinstance(alpha, float) and alpha == 1.5:
        return inside.sqrt().masked_fill(outside, 0.0)
    return inside.pow(2.0 - alpha).masked_fill(outside, 0.0)


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    # A masked row has no weights.
    return (weights * values).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)


def _vjp(p: Tensor, cotangent: Tensor, alpha: float | Tensor) -> Tensor:
    r"""$s \odot (v - \langle s, v\rangle / \sum s)$; the Jacobian is symmetric."""
    s = _weights(p, alpha)
    return s * (cotangent - _mean(s, cotangent))


def _exponential_rest(u: Tensor) -> Tensor:
    r"""$(e^u - 1 - u)/u^2$ without cancellation."""
    small = u.abs() < 0.5
    near = torch.where(small, u, 0.0)
    series = torch.zeros_like(near)
    for k in range(18, 2, -1):
        series = (1 + series) * near / k
    far = torch.where(small, 1.0, u)
    return torch.where(small, (1 + series) / 2, (torch.expm1(far) - far) / far.square())


def _alpha_derivative(p: Tensor, alpha: Tensor) -> Tensor:
    r"""$\partial p_i / \partial\alpha$.

    The usual form, $(p_i-\hat s_i)/\varepsilon^2 - (\eta_i - \hat s_i \sum\eta)/\varepsilon$ with
    $\varepsilon = \alpha-1$, $\hat s = s/\sum s$ and $\eta = p \log p$, cancels to nothing near $\alpha = 1$. With
    $u_i = -\varepsilon\log p_i$ and $\tilde r_i = \log^2 p_i\,(e^{u_i}-1-u_i)/u_i^2$ it equals
    $$p_i\,\frac{(u_i - U)\,\tilde R + (\tilde R - \tilde r_i)(1 + U)}{1 + E},\qquad
    U, \tilde R, E = \text{means of } u_i,\ \tilde r_i,\ e^{u_i}-1 \text{ under } p.$$
    """
    outside = p == 0
    log_p = p.masked_fill(outside, 1.0).log()
    u = (1.0 - alpha) * log_p
    rest = log_p.square() * _exponential_rest(u)

    def mean(values: Tensor) -> Tensor:
        return (p * values).sum(-1, keepdim=True)

    mean_u, mean_rest = mean(u), mean(rest)
    # On the support e^u = p^(1-alpha), and p e^u does not overflow.
    total = _weights(p, alpha).sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return p * ((u - mean_u) * mean_rest + (mean_rest - rest) * (1 + mean_u)) / total


# --------------------------------------------------------------------------------------------------------- operators


def _choose(impl: str, tensor: Tensor, alpha: float | Tensor) -> str:
    """The implementation that runs; raise `RuntimeError` if it is asked for by name and cannot."""
    if impl == "reference":
        return impl
    device = tensor.device.type
    if impl != "auto" and device != _DEVICE[impl]:
        raise RuntimeError(f"impl={impl!r} runs on {_DEVICE[impl]!r} tensors, got one on {device!r}")
    reason = kernels.explain("entmax", tensor)
    if reason is None and device == "cuda":
        reason = fused.refusal_of_cuda(tensor.shape[-1], alpha)
    if reason is None:
        return "cpp" if device == "cpu" else "triton"
    if impl != "auto":
        raise RuntimeError(f"impl={impl!r}, but the kernel cannot run here: {reason}")
    return "reference"


def _forward(input: Tensor, alpha: float | Tensor, impl: str) -> Tensor:
    chosen = _choose(impl, input, alpha)
    if chosen == "cpp":
        return fused.entmax_cpu(input, alpha)
    if chosen == "triton" and isinstance(alpha, float):
        return fused.entmax_cuda(input, alpha)
    return _reference(input, alpha).contiguous()


def _like(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


@torch.library.custom_op("danlu::entmax", mutates_args=())
def _entmax(input: Tensor, alpha: float, impl: str) -> Tensor:
    return _forward(input, alpha, impl)


@torch.library.custom_op("danlu::entmax_of_rows", mutates_args=())
def _entmax_of_rows(input: Tensor, alpha: Tensor, impl: str) -> Tensor:
    return _forward(input, alpha, impl)


@torch.library.custom_op("danlu::entmax_vjp", mutates_args=())
def _entmax_vjp(probabilities: Tensor, cotangent: Tensor, alpha: float, impl: str) -> Tensor:
    chosen = _choose(impl, probabilities, alpha)
    if chosen == "cpp":
        return fused.entmax_vjp_cpu(probabilities, cotangent, alpha)
    if chosen == "triton":
        return fused.entmax_vjp_cuda(probabilities, cotangent, alpha)
    if not is_low_precision(probabilities.dtype):
        return _vjp(probabilities, cotangent, alpha).contiguous()
    return _vjp(probabilities.float(), cotangent.float(), alpha).to(probabilities.dtype).contiguous()


for _operator in (_entmax, _entmax_of_rows, _entmax_vjp):
    _operator.register_fake(_like)


class _Rows(torch.autograd.Function):
    """The map with one alpha."""

    @staticmethod
    def forward(input: Tensor, alpha: float, impl: str) -> Tensor:  # pyrefly: ignore[bad-override]
        return _entmax(input, alpha, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.alpha, ctx.impl = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _applied(_RowsVjp)(*ctx.saved_tensors, grad_outputs[0], ctx.alpha, ctx.impl), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        input, alpha, impl = args
        return _applied(_Rows)(input.movedim(in_dims[0], 0), alpha, impl), 0


class _RowsVjp(torch.autograd.Function):
    """The Jacobian, which is symmetric, at probabilities p times a vector v."""

    @staticmethod
    def forward(p: Tensor, v: Tensor, alpha: float, impl: str) -> Tensor:  # pyrefly: ignore[bad-override]
        return _entmax_vjp(p, v, alpha, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.alpha, ctx.impl = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """By v the same product; by p the slope of the weights s times both vectors, each less its mean under s."""
        (p, v), (u,) = ctx.saved_tensors, grad_outputs
        wide, first, second = (t.float() if is_low_precision(t.dtype) else t for t in (p, v, u))
        s = _weights(wide, ctx.alpha)
        slope = (2.0 - ctx.alpha) * _weights(wide, ctx.alpha + 1.0)
        d_p = slope * (first - _mean(s, first)) * (second - _mean(s, second))
        return d_p.to(p.dtype), _applied(_RowsVjp)(p, u, ctx.alpha, ctx.impl), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _applied(_RowsVjp)(*batch_first(info, args[:2], in_dims[:2]), *args[2:]), 0


class _RowsOfTensor(torch.autograd.Function):
    """The map with one alpha per row; its derivatives are torch operations, which autograd differentiates again."""

    @staticmethod
    def forward(input: Tensor, alpha: Tensor, impl: str) -> Tensor:  # pyrefly: ignore[bad-override]
        return _entmax_of_rows(input, alpha, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p, alpha = ctx.saved_tensors
        wide, v = (t.float() if is_low_precision(t.dtype) else t for t in (p, grad_outputs[0]))
        exponent = alpha.to(wide.dtype)
        d_input = d_alpha = None
        if ctx.needs_input_grad[0]:
            d_input = _vjp(wide, v, exponent).to(p.dtype)
        if ctx.needs_input_grad[1]:
            d_alpha = (v * _alpha_derivative(wide, exponent)).sum(-1, keepdim=True).to(alpha.dtype)
        return d_input, d_alpha, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _applied(_RowsOfTensor)(*batch_first(info, args[:2], in_dims[:2]), args[2]), 0


def _refuse(*args: Any) -> Any:
    raise NotImplementedError(_NO_FORWARD_MODE)


# The same with an error that says what to do. Compilers do not trace functions with a forward-mode derivative.
_REFUSING: dict[type[torch.autograd.Function], Any] = {
    function: type(function.__name__, (function,), {"jvp": staticmethod(_refuse)})
    for function in (_Rows, _RowsVjp, _RowsOfTensor)
}


def _applied(function: type[torch.autograd.Function]) -> Any:
    return function.apply if torch.compiler.is_compiling() else _REFUSING[function].apply
