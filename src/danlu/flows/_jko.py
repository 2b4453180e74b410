r"""One step of the minimizing movement scheme of Jordan, Kinderlehrer and Otto.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension; `H` hidden units.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_real, check_same_device
from danlu.flows._energies import Interaction
from danlu.flows._f_divergence import FDivergence
from danlu.flows._functional import Functional, check_finite, check_terms, check_weights
from danlu.flows._gradient_flow import check_point

__all__ = ["jko_step"]

# A determinant and N of them per evaluation: beyond this dimension the map is the wrong tool.
_MAX_DIM = 10
_NEWTON_STEPS = 200
_ARMIJO, _HALVINGS = 1e-4, 60
# A spacing loses at most this part in one Newton step, so that it stays positive.
_BOUNDARY = 0.9


def jko_step(
    x: Tensor,
    energy: Functional,
    tau: float,
    *,
    method: Literal["1d", "map"] = "1d",
    weights: Tensor | None = None,
    hidden: int | None = None,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Particles after one proximal step of length `tau` in the Wasserstein metric.

    Definition:
        $$q_{k+1} = \operatorname{argmin}_q \frac{W_2^2(q, q_k)}{2\tau} + F[q]$$
        "1d": in one dimension the optimal coupling is that of the order, so with sorted $x$ and weights $w$
        $$\min_{y_1 < \dots < y_N} \sum_i w_i\left[\frac{(y_i - x_i)^2}{2\tau} + V(y_i)\right]
        - T\sum_i \bar w_i \log\frac{y_{i+1} - y_i}{\bar w_i}, \qquad \bar w_i = \tfrac12(w_i + w_{i+1})$$
        the entropy being that of a density which is constant between neighbors. "map": $y = M(x)$ with
        $M(x) = x + Bx + c + W_2\tanh(W_1 x + a)$ and
        $$\min_M \sum_i w_i\left[\frac{\lVert M(x_i) - x_i\rVert^2}{2\tau} + V(M(x_i)) - T\log\det\nabla M(x_i)\right]$$

    Args:
        x: particles, shape `(N, D)`, float32 or float64; also `(N,)` for "1d".
        energy: as in [`WassersteinFlow`][danlu.flows.WassersteinFlow], with functions and not only gradients. No
            `FDivergence`; `Interaction` for "map" only.
        tau: length of the step, > 0.
        method: "1d" for $D = 1$, exact up to the discretization; "map" for $D \le 10$.
        weights: shape `(N,)`, positive, with sum 1; None is $1/N$.
        hidden: hidden units of "map"; None is 32. 0 leaves the affine part, which is exact between Gaussians.
        iterations: of the L-BFGS minimizer of "map"; None is 100.
        generator: of the initial weights of "map"; None is torch's default.

    Returns:
        The new particles, in the order, shape and dtype of `x`.

    Raises:
        TypeError: `x` is not float32 or float64, `energy` is no functional, an option has a wrong type.
        ValueError: shapes do not fit the method, `tau` is not positive, the energy has an unsupported term, `weights`
            are not positive with sum 1, or an option of "map" is given for "1d".
        RuntimeError: a gradient is not finite, or the minimization fails.

    Numerics:
        "1d" is minimized by Newton's method in float64; the tridiagonal systems are solved by parallel cyclic
        reduction. Particles in one place are pulled apart by the entropy; "map" moves them as one. Where $V$ is
        concave its curvature is left out of the Newton matrix, and the minimum found is a local one. "map" never
        returns a worse objective than standing still. The result carries no graph.

    Cost:
        "1d": some 10 to 20 Newton steps of $O(N\log N)$. "map": `iterations` times $O(N (DH + D^2 H + D^3))$.

    Differences:
        The discrete entropy of "1d" lacks the tails beyond the outermost particles, of weight $1/N$: on Gaussians with
        2000 particles mean and standard deviation agree with the exact step to better than 1 %.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Jordan, Kinderlehrer and Otto (1998), "The variational formulation of
        the Fokker-Planck equation".

    Example:
        >>> import torch
        >>> from danlu.flows import KL, jko_step
        >>> x = torch.tensor([1.0, 1.5, 3.0])
        >>> jko_step(x, KL(lambda x: -(x**2).sum(-1) / 2), 0.1)
        tensor([0.7718, 1.4341, 2.7941])
    """
    check_point("x", x)
    check_terms(energy)
    check_real("tau", tau, low=0.0, low_open=True)
    check_choice("method", method, ("1d", "map"))
    flat = method == "1d" and x.ndim == 1
    if not flat and (x.ndim != 2 or not len(x) or (x.shape[1] != 1 if method == "1d" else x.shape[1] > _MAX_DIM)):
        shape = "(N,) or (N, 1)" if method == "1d" else f"(N, D) with D <= {_MAX_DIM}"
        raise ValueError(f"method={method!r} needs shape {shape} with at least one particle, got {tuple(x.shape)}")
    if not len(x):
        raise ValueError(f"x must have at least one particle, got {tuple(x.shape)}")
    _check_options(energy, method, {"hidden": hidden, "iterations": iterations, "generator": generator})
    if weights is None:
        weights = x.new_full((len(x),), 1 / len(x), dtype=torch.float64)
    else:
        weights = check_weights(weights)
        check_same_device(x=x, weights=weights)
        if len(weights) != len(x):
            raise ValueError(f"weights are for {len(weights)} particles, x has {len(x)}")
    if method == "map":
        units = 32 if hidden is None else check_integer("hidden", hidden, low=0)
        rounds = 100 if iterations is None else check_integer("iterations", iterations, low=1)
        return _by_map(x.detach(), energy, tau, weights.to(x.dtype), units, rounds, generator)
    order = x.detach().flatten().argsort(stable=True)
    moved = _sorted_step(x.detach().flatten()[order].double(), energy, tau, weights[order], x.dtype)
    return moved[order.argsort()].to(x.dtype).reshape(x.shape)


def _check_options(energy: Functional, method: str, options: dict[str, object]) -> None:
    for name, value in options.items():
        if method == "1d" and value is not None:
            raise ValueError(f"{name} is an option of method='map'; it has no meaning with '1d'")
    for term in energy.terms():
        if isinstance(term, FDivergence) or (method == "1d" and isinstance(term, Interaction)):
            raise ValueError(f"jko_step does not support {type(term).__name__} with method={method!r}")
    if not energy.has_value:
        raise ValueError("jko_step needs the functions of the energy and not only their gradients")


# ------------------------------------------------------------------------------------------------------ one dimension


def _sorted_step(x: Tensor, energy: Functional, tau: float, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Newton's method on the sorted particles, with a step that keeps their order."""
    n, temperature = len(x), energy.temperature
    between = (weights[1:] + weights[:-1]) / 2
    # Coinciding particles have no spacing to take the logarithm of; the minimum does not depend on the start.
    ramp = math.sqrt(tau * temperature) / n if temperature else 0.0
    y = x + ramp * (torch.arange(n, device=x.device, dtype=x.dtype) - (n - 1) / 2)

    def objective(points: Tensor) -> Tensor:
        value = energy.value(points.unsqueeze(-1), weights)
        total = weights @ ((points - x).square() / (2 * tau) + value)
        return total - temperature * (between * (points.diff() / between).log()).sum() if temperature else total

    current = objective(y)
    for _ in range(_NEWTON_STEPS):
        slope, curvature = _derivatives(energy, y, weights)
        gradient = weights * ((y - x) / tau + slope)
        diagonal = weights * (1 / tau + curvature.clamp(min=0.0))
        off = torch.zeros_like(between)
        if temperature:
            pull = temperature * between / y.diff()
            gradient[:-1] += pull
            gradient[1:] -= pull
            off = pull / y.diff()
            diagonal[:-1] += off
            diagonal[1:] += off
        check_finite(gradient.unsqueeze(-1), "the gradient of the objective")
        direction = -solve_tridiagonal(-off, diagonal, -off, gradient)
        decrement = -float(gradient @ direction)
        # Half the decrement is what is left to gain; below the rounding of the objective there is nothing to see.
        if decrement <= 1e-15 * (1 + abs(float(current))):
            return y
        length = 1.0
        if temperature:
            shrink = float((-direction.diff() / y.diff()).amax()) if n > 1 else 0.0
            length = min(1.0, _BOUNDARY / shrink) if shrink > 0 else 1.0
        for _ in range(_HALVINGS):
            candidate = y + length * direction
            found = objective(candidate)
            if bool(found <= current - _ARMIJO * length * decrement):
                break
            length /= 2
        else:
            # The last digits: the objective no longer tells better from worse.
            if decrement <= 1e-10 * (1 + abs(float(current))):
                return y
            raise RuntimeError("jko_step does not converge: the energy is not smooth or not bounded from below")
        y, current = candidate, found
        if not bool(current.isfinite()):
            break
    raise RuntimeError(f"jko_step does not converge in {_NEWTON_STEPS} Newton steps; is the energy bounded from below?")


def _derivatives(energy: Functional, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the potential at each particle."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = energy.value(leaf.unsqueeze(-1), weights).sum()
        if not value.requires_grad:
            return torch.zeros_like(y), torch.zeros_like(y)
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        if not slope.requires_grad:
            return slope, torch.zeros_like(y)
        (curvature,) = torch.autograd.grad(slope.sum(), leaf, allow_unused=True, materialize_grads=True)
    return slope.detach(), curvature


def solve_tridiagonal(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """Solve a diagonally dominant tridiagonal system by parallel cyclic reduction, in log2(N) vectorized rounds.

    Args:
        lower: below the diagonal, shape `(N - 1,)`.
        diagonal: shape `(N,)`.
        upper: above the diagonal, shape `(N - 1,)`.
        right: the right side, shape `(N,)`.
    """
    n, zero = len(diagonal), diagonal.new_zeros(1)
    a, b, c, d = torch.cat([zero, lower]), diagonal, torch.cat([upper, zero]), right
    shift = 1
    while shift < n:
        # Every equation eliminates its neighbors at the distance `shift`; beyond the ends stands x = 0.
        ends = diagonal.new_zeros(shift)
        ones = diagonal.new_ones(shift)
        a_up, c_up, d_up = (torch.cat([ends, z[:-shift]]) for z in (a, c, d))
        a_down, c_down, d_down = (torch.cat([z[shift:], ends]) for z in (a, c, d))
        b_up, b_down = torch.cat([ones, b[:-shift]]), torch.cat([b[shift:], ones])
        alpha, gamma = -a / b_up, -c / b_down
        a, b, c, d = (
            alpha * a_up,
            b + alpha * c_up + gamma * a_down,
            gamma * c_down,
            d + alpha * d_up + gamma * d_down,
        )
        shift *= 2
    return d / b


# --------------------------------------------------------------------------------------------------------------- map


def _by_map(
    x: Tensor,
    energy: Functional,
    tau: float,
    weights: Tensor,
    hidden: int,
    iterations: int,
    generator: torch.Generator | None,
) -> Tensor:
    """A residual map with one hidden layer, whose Jacobian is written out."""
    dim, temperature = x.shape[1], energy.temperature
    if not dim:
        return x.clone()
    options = {"dtype": x.dtype, "device": x.device}
    # Units in the scale of the particles; the last layer is 0, so that the map starts as the identity.
    center = weights @ x
    spread = (weights @ (x - center).square()).sqrt()
    floor = math.sqrt(torch.finfo(x.dtype).eps)
    scale = spread.clamp(min=floor)
    if not bool((spread > floor).any()):
        # At a single place a map could only raise the entropy, without bound and by chance: it moves as one.
        hidden, temperature, scale = 0, 0.0, torch.ones_like(scale)
    inputs = (x - center) / scale
    inner = torch.randn(hidden, dim, generator=generator, **options) / math.sqrt(dim)
    bias = torch.randn(hidden, generator=generator, **options)
    parameters = [
        torch.zeros(dim, dim, **options),
        torch.zeros(dim, **options),
        torch.zeros(dim, hidden, **options),
        inner,
        bias,
    ]
    for parameter in parameters:
        parameter.requires_grad_()

    def mapped() -> tuple[Tensor, Tensor]:
        linear, shift, outer, inner, bias = parameters
        active = torch.tanh(inputs @ inner.mT + bias)
        moved = x + (inputs @ linear.mT + shift + active @ outer.mT) * scale
        slope = linear + torch.einsum("oh,nh,hi->noi", outer, 1 - active.square(), inner)
        # In scaled coordinates, which does not change the determinant.
        return moved, torch.eye(dim, **options) + slope

    def objective() -> tuple[Tensor, Tensor, Tensor]:
        moved, jacobian = mapped()
        sign, logarithm = torch.linalg.slogdet(jacobian)
        distance = (moved - x).square().sum(-1) / (2 * tau)
        return weights @ (distance + energy.value(moved, weights) - temperature * logarithm), moved, sign

    # Inside `enable_grad`, as the caller may have switched gradients off.
    with torch.enable_grad():
        start = objective()[0].detach()
        minimizer = torch.optim.LBFGS(
            parameters,
            max_iter=iterations,
            history_size=20,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            minimizer.zero_grad()
            loss = objective()[0]
            loss.backward()
            return loss

        minimizer.step(closure)
    with torch.no_grad():
        end, moved, sign = objective()
    check_finite(moved, "the position")
    rounding = 16 * torch.finfo(x.dtype).eps * (1 + start.abs())
    if not bool((sign > 0).all() & (end <= start + rounding)):
        raise RuntimeError("the map of jko_step folds or does not decrease its objective; take a smaller tau")
    return moved.detach()
