r"""One proximal step, $\operatorname{argmin}_y f(y) + \lVert y - x\rVert^2 / 2h$, by Newton and conjugate gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["proximal_step"]

# Newton's method needs some ten steps from anywhere on a smooth convex function; the rest is for kinks and saddles.
_NEWTON_STEPS = 100
# Armijo's constant, and how far a direction is shortened before it is given up.
_ARMIJO, _HALVINGS = 1e-4, 50


def proximal_step(f: Callable[[Tensor], Tensor], x: Tensor, h: float) -> Tensor:
    """Minimize the proximal objective from `x` on; its value, and so that of `f`, never rises.

    Raises:
        ValueError: `f` does not return a scalar.
        RuntimeError: the gradient of the objective does not become small.
    """
    eps = torch.finfo(x.dtype).eps
    y = x.clone()
    scale = None
    polishing, last, before = False, math.inf, y
    for _ in range(_NEWTON_STEPS):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            value = _value(f, leaf)
            slope = _derivative(value, leaf, create_graph=True)
        gradient = slope.detach() + (y - x) / h
        size = float(gradient.norm())
        # The terms that cancel set the unit of rounding: the slope, and the displacement over h.
        unit = float(slope.detach().norm()) + float(y.norm() + x.norm()) / h
        scale = unit if scale is None else max(scale, unit)
        if not math.isfinite(size):
            raise RuntimeError("the gradient of f is not finite within a step of method='implicit'")
        if size <= 8 * eps * scale or size == 0.0:
            return y
        if polishing and size >= last:
            return before
        direction = _newton_direction(slope, leaf, gradient, h, min(0.1, size / scale))
        moved = _search(f, x, y, h, float(value.detach()), gradient, direction)
        if moved is None:
            # No decrease can be seen: rounding if the gradient is small, else a kink or a bug of f.
            if size > math.sqrt(eps) * scale:
                break
            # The objective is flat to rounding, its gradient is not: go on while that shrinks.
            polishing, last, before, moved = True, size, y, y + direction
        y = moved
    raise RuntimeError(
        f"method='implicit' does not converge: the gradient of the proximal objective is {size:.3g} "
        f"after {_NEWTON_STEPS} Newton steps; f must be twice differentiable"
    )


def _value(f: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
    value = f(leaf)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"f must return a scalar, got {found}")
    return value.reshape(())


def _derivative(value: Tensor, leaf: Tensor, *, create_graph: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(
        value, leaf, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return slope


def _newton_direction(slope: Tensor, leaf: Tensor, gradient: Tensor, h: float, forcing: float) -> Tensor:
    """Solve (H + 1/h) d = -gradient by conjugate gradients, up to `forcing`; stop at negative curvature."""
    solution, residual = torch.zeros_like(gradient), -gradient
    direction, squared = residual, residual.square().sum()
    target = forcing**2 * squared
    for k in range(max(1, min(2 * gradient.numel(), 500))):
        product = _derivative((slope * direction).sum(), leaf, create_graph=False) + direction / h
        curvature = (direction * product).sum()
        if bool(curvature <= 0):
            return solution if k else direction
        alpha = squared / curvature
        solution = solution + alpha * direction
        residual = residual - alpha * product
        previous, squared = squared, residual.square().sum()
        if bool(squared <= target):
            break
        direction = residual + squared / previous * direction
    return solution


def _search(
    f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, h: float, value: float, gradient: Tensor, direction: Tensor
) -> Tensor | None:
    """The first halving of `direction` that decreases the objective enough; None if none does."""
    expected = float((gradient * direction).sum())
    start = value + float((y - x).square().sum()) / (2 * h)
    length = 1.0
    for _ in range(_HALVINGS):
        candidate = y + length * direction
        with torch.no_grad():
            objective = float(_value(f, candidate)) + float((candidate - x).square().sum()) / (2 * h)
        if objective <= start + _ARMIJO * length * expected and objective < start:
            return candidate
        length /= 2
    return None
