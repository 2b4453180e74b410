"""Learning-rate schedules as factories of `torch.optim.lr_scheduler.LambdaLR`."""

from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from danlu._common.checks import check_integer, check_real

__all__ = ["PiecewiseLinear", "piecewise_linear", "schedule_points"]


class PiecewiseLinear:
    """The factor of the learning rate at a step; a class and not a lambda, so that schedulers can be pickled."""

    def __init__(self, points: tuple[tuple[int, float], ...]) -> None:
        self.points = points

    def __call__(self, step: int) -> float:
        """Interpolate between the neighboring points; constant before the first and after the last."""
        before = self.points[0]
        if step <= before[0]:
            return before[1]
        for after in self.points[1:]:
            if step < after[0]:
                share = (step - before[0]) / (after[0] - before[0])
                return before[1] + share * (after[1] - before[1])
            before = after
        return before[1]


def piecewise_linear(
    optimizer: Optimizer, points: Mapping[int, float], *, from_zero: bool = True, last_epoch: int = -1
) -> LambdaLR:
    r"""Schedule that interpolates linearly between given factors of the learning rate.

    Definition:
        $$\ell(t) = r_i + \frac{t - t_i}{t_{i+1} - t_i}\,(r_{i+1} - r_i), \qquad t_i \le t < t_{i+1}$$
        for `points` $= \{t_1: r_1, t_2: r_2, \dots\}$, constant after the last; the rate is `lr` times $\ell(t)$.

    Args:
        optimizer: whose groups are scheduled, each from its own `lr`.
        points: step (calls of `scheduler.step`, which with `Tiger(grad_accum_steps=k)` are micro-steps) to factor.
        from_zero: put the point (0, 0) first if no point is at 0: a warmup, whose very first step has rate 0.
        last_epoch: step to go on from, as in torch; -1 starts.

    Returns:
        The scheduler.

    Raises:
        TypeError: a step is not an int or a factor not a number.
        ValueError: there are no points, a step is negative, or a factor is.

    Numerics:
        The factor is computed from the step alone, so nothing accumulates.

    Source:
        Reference code of "Tiger：一个'抠'到极致的优化器" (2023-03-07), github bojone/tiger.

    Example:
        >>> import torch
        >>> from danlu.optim import Tiger, piecewise_linear
        >>> optimizer = Tiger(torch.nn.Linear(2, 2), lr=1.0)
        >>> scheduler = piecewise_linear(optimizer, {40: 1.0, 160: 0.5, 640: 0.1})
        >>> [scheduler.lr_lambdas[0](t) for t in (0, 20, 40, 100, 400, 9999)]
        [0.0, 0.5, 1.0, 0.75, 0.3, 0.1]
    """
    return LambdaLR(optimizer, PiecewiseLinear(schedule_points(points, from_zero=from_zero)), last_epoch=last_epoch)


def schedule_points(points: Mapping[int, float], *, from_zero: bool) -> tuple[tuple[int, float], ...]:
    """The points of a schedule in order; raise as `piecewise_linear` does unless they are valid."""
    if not points:
        raise ValueError("points must have at least one step, got none")
    for step, factor in points.items():
        check_integer("a step of points", step, low=0)
        check_real(f"points[{step}]", factor, low=0.0)
    ordered = sorted((step, float(factor)) for step, factor in points.items())
    if from_zero and ordered[0][0] != 0:
        ordered.insert(0, (0, 0.0))
    return tuple(ordered)
