r"""Gradient flow: the path of steepest descent in continuous time, with a certificate of its energy balance.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `...` shape of the point; `T` number of steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_floating, check_real, is_low_precision
from danlu.flows._proximal import proximal_step

__all__ = ["GradientTrajectory", "gradient_flow"]

Method = Literal["euler", "rk4", "rk45", "implicit"]
_METHODS: tuple[Method, ...] = ("euler", "rk4", "rk45", "implicit")

# Stages of the explicit Runge-Kutta methods: rows of coefficients, and the weights of the result.
_TABLEAUS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": (((),), (1.0,)),
    "rk4": (((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    # Dormand and Prince (1980): order 5, with an embedded order 4 below; the last stage is the next first one.
    "rk45": (
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    ),
}
_EMBEDDED = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)

# The customary control of the step: safety factor and bounds of its change (Hairer, Nørsett and Wanner, II.4).
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0


@dataclass(frozen=True, eq=False)
class GradientTrajectory:
    r"""A path of [`gradient_flow`][danlu.flows.gradient_flow] with the balance of its energy.

    Definition:
        Along the flow $f(x(t)) + \int_0^t \lVert\nabla f(x(s))\rVert^2\,ds = f(x(0))$. The residual is the left side
        minus the right, with the integral computed by the stages of the method itself, so it is of the method's order.

    Args:
        times: shape `(T + 1,)`, float64 on the CPU, from 0.
        x: points, shape `(T + 1, ...)`.
        f: values $f(x)$, shape `(T + 1,)`; None without a certificate.
        squared_gradient_norm: $\lVert\nabla f\rVert^2$, shape `(T + 1,)`; None without a certificate.
        residual: of the energy identity, shape `(T + 1,)`, in the unit of $f$; None without a certificate.

    Numerics:
        `largest_rise` is a property: the largest increase of $f$ in one step, 0 or less where the energy never rose.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.flows import gradient_flow
        >>> path = gradient_flow(lambda x: (x**2).sum() / 2, torch.ones(2), 1.0, method="rk4", step=0.1)
        >>> path.x.shape, bool(path.largest_rise < 0), bool(path.residual.abs().max() < 1e-5)
        (torch.Size([11, 2]), True, True)
    """

    times: Tensor
    x: Tensor = field(repr=False)
    f: Tensor | None = field(default=None, repr=False)
    squared_gradient_norm: Tensor | None = field(default=None, repr=False)
    residual: Tensor | None = field(default=None, repr=False)

    @property
    def largest_rise(self) -> Tensor:
        """Largest increase of $f$ in one step; needs the certificate."""
        if self.f is None:
            raise ValueError("largest_rise needs the values of f; run gradient_flow with certificate=True")
        return self.f.diff().amax()


def gradient_flow(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    t: float,
    *,
    method: Method = "rk4",
    step: float,
    certificate: bool = True,
    tolerance: float | None = None,
) -> GradientTrajectory:
    r"""Follow $\dot x = -\nabla f(x)$ from `x0` for the time `t`.

    Definition:
        With $h$ the step,
        $$\text{euler:}\quad x_{k+1} = x_k - h\,\nabla f(x_k) \qquad
        \text{implicit:}\quad x_{k+1} = \operatorname{argmin}_x f(x) + \frac{\lVert x - x_k\rVert^2}{2h}$$
        and "rk4", "rk45" the classical and the Dormand-Prince Runge-Kutta methods. "euler" is gradient descent with
        learning rate $h$, "implicit" the proximal point method, of which every step decreases $f$ whatever $h$ is.

    Args:
        f: function of one point, shape `(...)` to a scalar, differentiable by autograd; twice for "implicit".
        x0: start, shape `(...)`, float32 or float64.
        t: duration, $> 0$.
        method: "euler" (order 1), "rk4" (order 4), "rk45" (order 5, the step adapts) or "implicit" (order 1).
        step: largest step, $> 0$; `t` is divided into $\lceil t/h \rceil$ equal steps. For "rk45" the first try.
        certificate: record $f$, $\lVert\nabla f\rVert^2$ and the residual of the energy identity; False saves the
            evaluation at the last point.
        tolerance: error per step of "rk45", relative and absolute, of the point and of the energy lost; None means
            $\varepsilon^{1/2}$ of the dtype. For "rk45" only.

    Returns:
        A [`GradientTrajectory`][danlu.flows.GradientTrajectory].

    Raises:
        TypeError: `x0` is not float32 or float64, or a number is not one.
        ValueError: `t`, `step` or `tolerance` is not positive, `method` is unknown, `tolerance` is given for another
            method, or `f` does not return a scalar.
        RuntimeError: the path or its gradient is not finite (the message has the step), the step of "rk45" underflows,
            or the minimization of "implicit" does not converge.

    Numerics:
        In the dtype of `x0`; times in float64. Nothing is read back from the device before the end, except by "rk45"
        and "implicit", which must look at errors. The path is not differentiable in `x0`.

    Cost:
        Gradients per step: 1, 4, 6, and for "implicit" some Newton steps with conjugate gradients on Hessian-vector
        products. Memory: the recorded points.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Dormand and Prince (1980), "A family of embedded Runge-Kutta
        formulae".

    Example:
        >>> import torch
        >>> from danlu.flows import gradient_flow
        >>> scale = torch.tensor([1.0, 10.0])
        >>> for method in ("euler", "implicit"):
        ...     gradient_flow(lambda x: (scale * x**2).sum() / 2, torch.ones(2), 2.5, method=method, step=0.5).x[-1]
        tensor([ 3.1250e-02, -1.0240e+03])
        tensor([1.3169e-01, 1.2860e-04])
    """
    check_point("x0", x0)
    check_real("t", t, low=0.0, low_open=True)
    check_choice("method", method, _METHODS)
    check_real("step", step, low=0.0, low_open=True)
    if tolerance is not None:
        check_real("tolerance", tolerance, low=0.0, low_open=True)
        if method != "rk45":
            raise ValueError(f"tolerance is an option of method='rk45'; it has no meaning with {method!r}")
    recorder = _Recorder(f, x0.detach(), certificate)
    if method == "rk45":
        _adaptive(recorder, t, step, math.sqrt(torch.finfo(x0.dtype).eps) if tolerance is None else tolerance)
    else:
        # Rounding must not add a step: 2.5 / 0.1 is 25.
        count = max(1, math.ceil(t / step * (1 - 1e-12)))
        for k in range(count):
            _fixed(recorder, method, t / count, t * (k + 1) / count)
    return recorder.finish()


def check_point(name: str, x: object) -> None:
    """Raise `TypeError` unless `x` is a float32 or float64 tensor."""
    check_floating(name, x)
    if isinstance(x, Tensor) and is_low_precision(x.dtype):
        raise TypeError(f"{name} must be float32 or float64, since small steps vanish in {x.dtype}")


class _Recorder:
    """The path so far, with the integral of the squared gradient."""

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor, certificate: bool) -> None:
        self.f, self.x, self.certificate = f, x, certificate
        self.slope: Tensor | None = None
        self.times, self.points = [0.0], [x]
        self.values: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.dissipated = [torch.zeros((), dtype=x.dtype, device=x.device)]

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.f(leaf)
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"f must return a scalar, got {found}")
            if not value.requires_grad:
                return value.detach().reshape(()), torch.zeros_like(x)
            (slope,) = torch.autograd.grad(value.reshape(()), leaf, allow_unused=True, materialize_grads=True)
        return value.detach().reshape(()), slope

    def here(self) -> Tensor:
        """The gradient at the last point, which is computed and recorded once."""
        if self.slope is None:
            value, self.slope = self.gradient(self.x)
            if self.certificate:
                self.values.append(value)
                self.norms.append(self.slope.square().sum())
        return self.slope

    def advance(self, x: Tensor, time: float, dissipated: Tensor) -> None:
        """Go to `x`, having lost `dissipated`."""
        self.here()
        self.x, self.slope = x, None
        self.times.append(time)
        self.points.append(x)
        self.dissipated.append(self.dissipated[-1] + dissipated)

    def finish(self) -> GradientTrajectory:
        """The trajectory, checked."""
        if self.certificate:
            self.here()
        times, x = torch.tensor(self.times, dtype=torch.float64), torch.stack(self.points)
        finite = x.reshape(len(self.points), -1).isfinite().all(-1)
        values = torch.stack(self.values) if self.certificate else None
        norms = torch.stack(self.norms) if self.certificate else None
        if values is not None and norms is not None:
            finite = finite & values.isfinite() & norms.isfinite()
        if not bool(finite.all()):
            first = int((~finite).int().argmax())
            raise RuntimeError(
                f"the flow is not finite from step {first} of {len(self.points) - 1} on (time {self.times[first]:g}); "
                "take a smaller step or method='implicit'"
            )
        if values is None:
            return GradientTrajectory(times, x)
        residual = values - values[0] + torch.stack(self.dissipated)
        return GradientTrajectory(times, x, values, norms, residual)


def _fixed(recorder: _Recorder, method: str, h: float, time: float) -> None:
    if method == "implicit":
        x = proximal_step(recorder.f, recorder.x, h)
        # (x_k - x_{k+1}) / h is the gradient at the new point, without another evaluation.
        recorder.advance(x, time, (x - recorder.x).square().sum() / h)
        return
    slopes = _stages(recorder, method, h)
    weights = _TABLEAUS[method][1]
    x = recorder.x - h * _combine(weights, slopes)
    recorder.advance(x, time, h * _combine(weights, [slope.square().sum() for slope in slopes]))


def _stages(recorder: _Recorder, method: str, h: float) -> list[Tensor]:
    slopes = [recorder.here()]
    for row in _TABLEAUS[method][0][1:]:
        slopes.append(recorder.gradient(recorder.x - h * _combine(row, slopes))[1])
    return slopes


def _combine(weights: tuple[float, ...], tensors: list[Tensor]) -> Tensor:
    terms = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _adaptive(recorder: _Recorder, t: float, step: float, tolerance: float) -> None:
    time, h = 0.0, min(step, t)
    weights = _TABLEAUS["rk45"][1]
    difference = tuple(a - b for a, b in zip(weights, _EMBEDDED, strict=True))
    while time < t:
        # A remainder below rounding would be a step of its own.
        last = time + h >= t * (1 - 1e-12)
        h = t - time if last else h
        slopes = _stages(recorder, "rk45", h)
        x = recorder.x - h * _combine(weights, slopes)
        rates = [slope.square().sum() for slope in slopes]
        error = _error(recorder, x, h * _combine(difference, slopes), h * _combine(difference, rates)) / tolerance
        if math.isfinite(error) and error <= 1:
            time = t if last else time + h
            recorder.advance(x, time, h * _combine(weights, rates))
        factor = _SHRINK if not math.isfinite(error) else _SAFETY * max(error, 1e-10) ** -0.2
        h *= min(_GROW, max(_SHRINK, factor))
        if h < 1e-14 * t:
            raise RuntimeError(
                f"the step of method='rk45' underflows at time {time:g}: the gradient is not smooth there"
            )


def _error(recorder: _Recorder, x: Tensor, wrong: Tensor, wrong_energy: Tensor) -> float:
    """The larger of the errors of the point and of the energy lost, each in its own scale."""
    of_energy = wrong_energy.abs() / (1 + recorder.dissipated[-1])
    if not x.numel():
        return float(of_energy)
    of_point = (wrong / (1 + torch.maximum(recorder.x.abs(), x.abs()))).square().mean().sqrt()
    return float(torch.maximum(of_point, of_energy))
