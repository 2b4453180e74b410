"""Many small smooth minimizations at once: dense BFGS on a batch of problems with their own step lengths.

Shape letters: `P` problems, `d` unknowns of each, `T` step lengths tried along a direction.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimize"]

# Step lengths along a direction, all evaluated at once: a whole line search for the price of one call.
_STEPS = tuple(4.0**power for power in range(1, -9, -1))
# A problem is done when this many iterations in a row do not lower its value by more than rounding.
_PATIENCE = 4


def minimize(
    value: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int,
    tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    r"""Minimize `P` functions of `d` unknowns and return the minimizers `(P, d)` and values `(P,)`.

    The inverse Hessian of every problem is held whole: with a handful of unknowns there is nothing to gain from a
    limited memory. Values never rise; a direction that finds no lower value restarts the problem from its gradient.

    Args:
        value: `(..., P, d)` to `(..., P)`.
        gradient: `(P, d)` to `(P, d)`.
        start: `(P, d)`, float64.
        iterations: most iterations.
        tolerance: relative decrease that counts as none.
    """
    steps = start.new_tensor(_STEPS)[:, None, None]
    eye = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    point, level, slope = start, value(start), gradient(start)
    inverse = eye / _norm(slope)[:, None]
    fresh = torch.ones_like(level, dtype=torch.bool)
    stalled = torch.zeros_like(level, dtype=torch.int64)
    for _ in range(iterations):
        direction = -(inverse @ slope[..., None])[..., 0]
        values = value(point + steps * direction)
        # A step into overflow is no candidate.
        best, which = torch.where(values.isnan(), torch.inf, values).min(0)
        improved = best < level
        moved = torch.where(improved[:, None], point + steps[which, 0] * direction, point)
        tried = gradient(moved)
        change, bend = moved - point, tried - slope
        curvature = (change * bend).sum(-1)
        usable = improved & (curvature > 1e-12 * _norm(change)[:, 0] * _norm(bend)[:, 0])
        inverse = torch.where(usable[:, None, None], _updated(inverse, change, bend, curvature, fresh, eye), inverse)
        restart = ~improved & ~fresh
        inverse = torch.where(restart[:, None, None], eye / _norm(tried)[:, None], inverse)
        little = ~improved | (level - best <= tolerance * best.abs())
        stalled = torch.where(little, stalled + 1, 0)
        # A fresh gradient direction without a lower value is a minimum to rounding.
        stalled = torch.where(~improved & fresh, _PATIENCE, stalled)
        fresh = restart | (fresh & ~usable)
        point, level, slope = moved, torch.where(improved, best, level), tried
        if bool((stalled >= _PATIENCE).all()):
            break
    return point, level


def _updated(inverse: Tensor, s: Tensor, y: Tensor, sy: Tensor, fresh: Tensor, eye: Tensor) -> Tensor:
    """The BFGS update; the first one after a restart also sets the scale."""
    safe = torch.where(sy > 0, sy, 1.0)[:, None, None]
    scale = sy[:, None, None] / y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)[:, None, None]
    inverse = torch.where(fresh[:, None, None], scale * eye, inverse)
    left = eye - s[:, :, None] * y[:, None, :] / safe
    return left @ inverse @ left.mT + s[:, :, None] * s[:, None, :] / safe


def _norm(vectors: Tensor) -> Tensor:
    """Euclidean norms `(P, 1)`, never 0."""
    return vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
