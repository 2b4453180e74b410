r"""The bound of the input gradient of an MLP by its parameter gradient, sample by sample.

Source: "输入梯度惩罚与参数梯度惩罚的一个不等式" (2021-12-11); Dherin et al. (2021), "The Geometric Occam's Razor
Implicit in Deep Learning", arXiv 2111.15090.

Shape letters: `B` samples; `L` linear layers; `D_t` inputs and `D_{t+1}` outputs of layer t.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danlu._common.checks import check_floating, check_integer, is_low_precision

__all__ = ["GradientPenaltyBound", "gradient_penalty_bound"]

_ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)


@dataclass(frozen=True, eq=False)
class GradientPenaltyBound:
    r"""Both sides of the inequality of [`gradient_penalty_bound`][danlu.diagnostics.gradient_penalty_bound].

    Definition:
        `lhs <= tight <= rhs`, and the same for each layer: `lhs_terms <= tight_terms <= rhs_terms`. `ratio` is
        `lhs / rhs` and `tight_ratio` is `tight / rhs`, 0 where `rhs` is 0.

    Args:
        lhs: the left side, shape `(B,)`.
        rhs: $\|\nabla_\theta f\|^2$, shape `(B,)`.
        lhs_terms: the left side by layer, shape `(L, B)`.
        rhs_terms: $\|\nabla_{W^{(t)},b^{(t)}} f\|^2$, shape `(L, B)`.
        tight: the left side of the tight form, shape `(B,)`, or None if it was not asked for.
        tight_terms: the same by layer, shape `(L, B)`, or None.
        input_gradient: $\|\nabla_x f\|^2$, shape `(B,)`.
        degenerate: samples with a 0/0, shape `(B,)`, bool: no change of the input reaches some layer (its terms on
            the left are 0), or the parameter gradient is 0.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import gradient_penalty_bound
        >>> bound = gradient_penalty_bound(torch.nn.Linear(3, 1), torch.ones(2, 3), lambda z: z[:, 0])
        >>> torch.allclose(bound.ratio, torch.ones(2)), bound.degenerate
        (True, tensor([False, False]))
    """

    lhs: Tensor
    rhs: Tensor
    lhs_terms: Tensor
    rhs_terms: Tensor
    tight: Tensor | None
    tight_terms: Tensor | None
    input_gradient: Tensor
    degenerate: Tensor

    @property
    def ratio(self) -> Tensor:
        """`lhs / rhs`, 0 for 0/0."""
        return _divide(self.lhs, self.rhs)

    @property
    def tight_ratio(self) -> Tensor | None:
        """`tight / rhs`, 0 for 0/0, or None."""
        return None if self.tight is None else _divide(self.tight, self.rhs)


def gradient_penalty_bound(
    mlp: nn.Module,
    x: Tensor,
    f: Callable[[Tensor], Tensor],
    *,
    tight: bool = True,
    power_iters: int | None = None,
) -> GradientPenaltyBound:
    r"""Both sides of the inequality between the input and the parameter gradient of an MLP, for every sample.

    Definition:
        With $h^{(1)} = x$, $z^{(t+1)} = W^{(t)} h^{(t)} + b^{(t)}$, $h^{(t+1)} = g(z^{(t+1)})$ and any scalar $f$ of
        the output,
        $$\|\nabla_x f\|^2 \sum_t \frac{1 + \|h^{(t)}\|^2}{\|W^{(t)}\|_2^2\,\|\partial h^{(t)}/\partial x\|_2^2}
        \le \|\nabla_\theta f\|^2 = \sum_t \|\delta^{(t)}\|^2 (1 + \|h^{(t)}\|^2), \qquad
        \delta^{(t)} = \frac{\partial f}{\partial z^{(t+1)}}$$
        term by term, in spectral norms; without a bias there is no 1. The tight form has
        $\|W^{(t)}\,\partial h^{(t)}/\partial x\|_2$ in place of the product of norms.

    Args:
        mlp: a Linear layer, or a Sequential of Linear layers, elementwise activations, Flatten, and Dropout in
            evaluation mode.
        x: samples, shape `(B, D_1)`, or `(B, ...)` if the first layer is Flatten; of the dtype of the parameters.
        f: maps the outputs, shape `(B, D_{L+1})`, to one value per sample, shape `(B,)`, that depends on its own
            row only, such as `lambda z: F.cross_entropy(z, y, reduction="none")`.
        tight: compute the tight form, too.
        power_iters: None for exact spectral norms from the full Jacobians; a number of power iterations with products
            of Jacobian and vector for wide layers.

    Returns:
        [`GradientPenaltyBound`][danlu.diagnostics.GradientPenaltyBound], without a graph.

    Raises:
        TypeError: `x` is not float32 or float64, or the model has a layer that is none of the above; it is named.
        ValueError: Dropout in training mode, no Linear layer, or a shape that does not fit.

    Numerics:
        In the dtype of `x`; with 0/0 the terms are 0 and the sample is flagged. Power iterations approach spectral
        norms from below, so that the left side may be too large by their error.

    Cost:
        Exact: $O(B D_1 \sum_t D_t D_{t+1})$ time and $O(B D_1 \max_t D_t)$ memory for the Jacobians, and a singular
        value decomposition each. Iterated: two passes through the network per layer and iteration.

    Differences:
        The gradient of a *batch mean* is not bounded: it can vanish while those of the samples do not, and penalizing
        it does not control the input gradients. The tight form is our own, and so is the count without a bias.

    Source:
        "输入梯度惩罚与参数梯度惩罚的一个不等式" (2021-12-11); Dherin et al. (2021), arXiv 2111.15090.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import gradient_penalty_bound
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> bound = gradient_penalty_bound(net, torch.randn(4, 3), lambda z: z.square().sum(1))
        >>> bool((bound.lhs <= bound.tight).all() and (bound.tight <= bound.rhs).all())
        True
    """
    check_floating("x", x)
    if is_low_precision(x.dtype):
        raise TypeError(f"x must be float32 or float64, since spectral norms have no kernel in {x.dtype}")
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if power_iters is not None:
        check_integer("power_iters", power_iters, low=1)
    layers = _layers(mlp)
    if x.ndim < 2:
        raise ValueError(f"x must have the samples as first axis, got shape {tuple(x.shape)}")
    with torch.enable_grad():
        given = x.detach().clone().requires_grad_()
        linears, hidden, outputs, slopes = _forward(layers, given)
        values = f(hidden[-1])
        if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"f must give one value per sample, shape ({x.shape[0]},), got {shape}")
        sources = [given, *outputs]
        # A constant f has no graph.
        known = torch.autograd.grad(values.sum(), sources, allow_unused=True) if values.requires_grad else ()
        grads = known or (None,) * len(sources)
    with torch.no_grad():
        d_x, *deltas = [
            torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(sources, grads, strict=True)
        ]
        input_gradient = d_x.flatten(1).square().sum(1)
        chain = _Chain([linear.weight.detach() for linear in linears], slopes)
        lhs: list[Tensor] = []
        tight_terms: list[Tensor] = []
        rhs: list[Tensor] = []
        degenerate = torch.zeros_like(input_gradient, dtype=torch.bool)
        for t, (linear, delta) in enumerate(zip(linears, deltas, strict=True)):
            size = hidden[t].detach().square().sum(1) + (linear.bias is not None)
            rhs.append(delta.square().sum(1) * size)
            weight_norm, jacobian_norm, product_norm = chain.norms(t, power_iters, tight=tight)
            denominator = (weight_norm * jacobian_norm).square()
            degenerate |= denominator == 0
            lhs.append(_divide(input_gradient * size, denominator))
            if product_norm is not None:
                degenerate |= product_norm == 0
                tight_terms.append(_divide(input_gradient * size, product_norm.square()))
        lhs_terms, rhs_terms = torch.stack(lhs), torch.stack(rhs)
        degenerate |= rhs_terms.sum(0) == 0
        tight_stack = torch.stack(tight_terms) if tight else None
        return GradientPenaltyBound(
            lhs=lhs_terms.sum(0),
            rhs=rhs_terms.sum(0),
            lhs_terms=lhs_terms,
            rhs_terms=rhs_terms,
            tight=None if tight_stack is None else tight_stack.sum(0),
            tight_terms=tight_stack,
            input_gradient=input_gradient,
            degenerate=degenerate,
        )


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where `b` is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _layers(mlp: nn.Module) -> list[nn.Module]:
    """The layers in order, nested Sequentials unpacked; raise if one does not belong to an MLP."""
    found: list[nn.Module] = []

    def unpack(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                unpack(f"{name}.{key}", child)
            return
        kind = type(module).__name__
        if isinstance(module, nn.Dropout) and module.training:
            raise ValueError(f"{name} ({kind}) must be in evaluation mode: call mlp.eval()")
        if not isinstance(module, (nn.Linear, nn.Flatten, nn.Dropout, *_ELEMENTWISE)):
            raise TypeError(
                f"{name} ({kind}) is not supported; an MLP has Linear, Flatten, Dropout and elementwise activations"
            )
        found.append(module)

    unpack("mlp", mlp)
    if not any(isinstance(module, nn.Linear) for module in found):
        raise ValueError("mlp has no Linear layer")
    return found


def _forward(layers: list[nn.Module], x: Tensor) -> tuple[list[nn.Linear], list[Tensor], list[Tensor], list[Tensor]]:
    """Linear layers, their inputs (and at the end the output), their outputs, and the slopes after each."""
    linears: list[nn.Linear] = []
    hidden: list[Tensor] = []
    outputs: list[Tensor] = []
    slopes: list[Tensor] = []
    h = x
    for layer in layers:
        if isinstance(layer, nn.Linear):
            if h.ndim != 2 or h.shape[1] != layer.in_features:
                raise ValueError(
                    f"{layer} needs an input of shape (B, {layer.in_features}), got {tuple(h.shape)}; "
                    "put nn.Flatten() before it if samples have several axes"
                )
            linears.append(layer)
            hidden.append(h)
            h = layer(h)
            outputs.append(h)
            slopes.append(torch.ones_like(h))
        elif isinstance(layer, _ELEMENTWISE):
            # A copy, for activations in place.
            before = h.detach().clone().requires_grad_()
            slope = torch.autograd.grad(layer(before.clone()).sum(), before)[0]
            if slopes:
                slopes[-1] = slopes[-1] * slope
            else:
                raise ValueError(f"{layer} before the first Linear layer is part of the data: apply it to x")
            h = layer(h.clone())
        else:
            h = layer(h)
    hidden.append(h)
    return linears, hidden, outputs, slopes


class _Chain:
    r"""The Jacobians $J_t = \partial h^{(t)}/\partial x$: $J_1 = I$, $J_{t+1} = \mathrm{diag}(g')\,W^{(t)} J_t$."""

    def __init__(self, weights: list[Tensor], slopes: list[Tensor]) -> None:
        self._weights = weights
        self._slopes = slopes
        self._jacobian: Tensor | None = None

    def norms(self, t: int, power_iters: int | None, *, tight: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        r"""Spectral norms of $W^{(t)}$, $J_t$ and, if wanted, $W^{(t)} J_t$; in the order of the layers."""
        weight = self._weights[t]
        samples, dtype = self._slopes[0].shape[0], weight.dtype
        if power_iters is None:
            norm = torch.linalg.matrix_norm(weight, ord=2)
            if self._jacobian is None:
                one = weight.new_ones(samples, dtype=dtype)
                product, jacobian_norm = weight.expand(samples, -1, -1), one
                product_norm: Tensor | None = norm.expand(samples)
            else:
                product = weight @ self._jacobian
                jacobian_norm = torch.linalg.matrix_norm(self._jacobian, ord=2)
                product_norm = torch.linalg.matrix_norm(product, ord=2) if tight else None
            self._jacobian = self._slopes[t][:, :, None] * product
            return norm, jacobian_norm, product_norm
        norm = _power(lambda v: v @ weight.T, lambda u: u @ weight, weight.new_ones(1, weight.shape[1]), power_iters)[0]
        start = weight.new_ones(samples, self._weights[0].shape[1])
        jacobian_norm = _power(lambda v: self._push(v, t), lambda u: self._pull(u, t), start, power_iters)
        product_norm = None
        if tight:
            product_norm = _power(
                lambda v: self._push(v, t) @ weight.T, lambda u: self._pull(u @ weight, t), start, power_iters
            )
        return norm, jacobian_norm, product_norm

    def _push(self, v: Tensor, t: int) -> Tensor:
        """$J_t v$."""
        for weight, slope in zip(self._weights[:t], self._slopes[:t], strict=True):
            v = (v @ weight.T) * slope
        return v

    def _pull(self, u: Tensor, t: int) -> Tensor:
        r"""$J_t^\top u$."""
        for weight, slope in reversed(list(zip(self._weights[:t], self._slopes[:t], strict=True))):
            u = (u * slope) @ weight
        return u


def _power(
    push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], start: Tensor, iterations: int
) -> Tensor:
    """The largest singular value of one matrix per row of `start`, from below."""
    # A fixed random direction: a vector of ones is orthogonal to the leading one too easily.
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(start)
    v = nn.functional.normalize(noise, dim=1)
    for _ in range(iterations):
        v = nn.functional.normalize(pull(push(v)), dim=1)
    return torch.linalg.vector_norm(push(v), dim=1)
