"""Learning-rate schedules as factories of `torch.optim.lr_scheduler.LambdaLR`."""

from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from danlu._common.checks import check_integer, check_real

__all__ = ["PiecewiseLinear", "inverse_square", "inverse_time", "piecewise_linear", "schedule_points"]


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


class InverseDecay:
    """A power of an inverse linear function of the step, 1/2 at `half_life`, times a linear warmup."""

    def __init__(self, half_life: float, power: int, warmup: int) -> None:
        self.half_life, self.power, self.warmup = half_life, power, warmup

    def __call__(self, step: int) -> float:
        """The factor of the learning rate at `step`."""
        growth = 2.0 ** (1.0 / self.power) - 1.0
        decayed = (1.0 + growth * step / self.half_life) ** -self.power
        return decayed * min(1.0, (step + 1) / self.warmup) if self.warmup else decayed


def inverse_time(optimizer: Optimizer, half_life: float, *, warmup: int = 0, last_epoch: int = -1) -> LambdaLR:
    r"""Schedule that decays like the inverse of the step: the one that goes with steps in proportion to the error.

    Definition:
        $$D(t) = \frac{1}{1 + t/T}\cdot\min\left(1, \frac{t+1}{w}\right)$$
        with $T$ = `half_life`, so that without the warmup of $w$ = `warmup` steps $D(T) = \tfrac12$. If the update's
        alignment with the error falls in proportion to the error, $p_t = p_0\lVert\varepsilon_t\rVert/
        \lVert\varepsilon_0\rVert$, this is the optimal decay, with $1/T = 2\alpha_0 p_0$.

    Args:
        optimizer: whose groups are scheduled, each from its own `lr`.
        half_life: $T > 0$, in steps.
        warmup: $w \ge 0$, in steps; the first step has the rate $1/w$, and the decay runs from the start.
        last_epoch: step to go on from, as in torch; -1 starts.

    Returns:
        The scheduler.

    Raises:
        TypeError: an option is not of its type.
        ValueError: `half_life` is not positive, or `warmup` < 0.

    Numerics:
        The factor is computed from the step alone, so nothing accumulates.

    Source:
        "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

    Example:
        >>> import torch
        >>> from danlu.optim import Lion, inverse_time
        >>> scheduler = inverse_time(Lion([torch.nn.Parameter(torch.ones(1))]), 100)
        >>> [scheduler.lr_lambdas[0](t) for t in (0, 100, 300)]
        [1.0, 0.5, 0.25]
    """
    return LambdaLR(optimizer, inverse_decay("inverse_time", half_life, warmup), last_epoch=last_epoch)


def inverse_square(optimizer: Optimizer, half_life: float, *, warmup: int = 0, last_epoch: int = -1) -> LambdaLR:
    r"""Schedule that decays like the inverse square of the step: the one that goes with steps of a constant alignment.

    Definition:
        $$D(t) = \frac{1}{(1 + (\sqrt2-1)\,t/T)^2}\cdot\min\left(1, \frac{t+1}{w}\right)$$
        with $T$ = `half_life` and $w$ = `warmup`; $D(T) = \tfrac12$ without warmup. For an update whose alignment with
        the error stays $p$, this is the optimal decay, with $(\sqrt2 - 1)/T = \alpha_0 p$.

    Args:
        optimizer: whose groups are scheduled, each from its own `lr`.
        half_life: $T > 0$, in steps.
        warmup: $w \ge 0$, in steps; the first step has the rate $1/w$, and the decay runs from the start.
        last_epoch: step to go on from, as in torch; -1 starts.

    Returns:
        The scheduler.

    Raises:
        TypeError: an option is not of its type.
        ValueError: `half_life` is not positive, or `warmup` < 0.

    Numerics:
        The factor is computed from the step alone, so nothing accumulates.

    Source:
        "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

    Example:
        >>> import torch
        >>> from danlu.optim import Lion, inverse_square
        >>> scheduler = inverse_square(Lion([torch.nn.Parameter(torch.ones(1))]), 100)
        >>> [round(scheduler.lr_lambdas[0](t), 4) for t in (0, 100, 300)]
        [1.0, 0.5, 0.1988]
    """
    return LambdaLR(optimizer, inverse_decay("inverse_square", half_life, warmup), last_epoch=last_epoch)


def inverse_decay(decay: str, half_life: float, warmup: int) -> InverseDecay:
    """The factor of `inverse_time` or `inverse_square`, after a check of its numbers."""
    check_real("half_life", half_life, low=0.0, low_open=True)
    check_integer("warmup", warmup, low=0)
    return InverseDecay(half_life, {"inverse_time": 1, "inverse_square": 2}[decay], warmup)
