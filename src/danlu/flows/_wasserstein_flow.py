r"""Wasserstein gradient flow of a functional of a distribution, by particles.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real, check_same_device
from danlu.flows._density_terms import (
    Pairs,
    gaussian_entropy_and_score,
    kernel_score,
    log_density,
    median_bandwidth,
    stein_velocity,
)
from danlu.flows._functional import Functional, check_finite, check_terms, check_weights
from danlu.flows._gradient_flow import check_point
from danlu.flows._particle_trajectory import RECORDS, Observer, ParticleTrajectory, Record

__all__ = ["WassersteinFlow"]

Density = Literal["langevin", "kde", "blob", "svgd", "gaussian"]
_DENSITIES: tuple[Density, ...] = ("langevin", "kde", "blob", "svgd", "gaussian")
_KERNELS = ("kde", "blob", "svgd")
# A step that is still too long after 40 halvings is 10^12 times shorter than asked.
_HALVINGS = 40


class WassersteinFlow:
    r"""Particles that go down an energy of their distribution.

    Definition:
        $$\partial_t q = \nabla\cdot\left(q\,\nabla\tfrac{\delta F}{\delta q}\right), \qquad
        \dot x_i = -\nabla\tfrac{\delta F}{\delta q}(x_i), \qquad
        \tfrac{dF}{dt} = -\int q\,\left\lVert\nabla\tfrac{\delta F}{\delta q}\right\rVert^2$$
        An entropy $T\int q\log q$ needs $\nabla\log q$ of the particles. With $b = -\nabla\frac{\delta F}{\delta q}$ of
        the other terms, $w$ = `weights` and the kernel $K(z) = e^{-\lVert z\rVert^2/2h^2}$, $h$ = `bandwidth`:

        | `density` | velocity | |
        |---|---|---|
        | "langevin" | $b\,dt + \sqrt{2T}\,dW$ | random; exact as $N\to\infty$, $dt\to0$ |
        | "kde" | $b - T\,\nabla\log(K*q)$ | biased: particles keep their distance |
        | "blob" | $b - T\,[\nabla\log(K*q) + \nabla K * \frac{q}{K*q}]$ | exact flow of $\int q\log(K*q)$ |
        | "svgd" | $\sum_j w_j[K(x_i-x_j)\,b(x_j) + T\,\nabla_{x_j}K(x_i-x_j)]$ | Stein variational gradient descent |
        | "gaussian" | $b + T S^{-1}(x - m)$ | score of the moment-matched Gaussian: exact for Gaussian flows |
        | a callable $s$ | $b - T\,s(x)$ | $s\approx\nabla\log q$, such as a trained network |

    Args:
        energy: `Potential`, `Interaction`, `Entropy`, `KL`, `FDivergence` or a sum of them.
        density: one of the table; None is "langevin" for an energy with entropy. Only for such an energy.
        bandwidth: $h > 0$ in the unit of the particles, or "median":
            $\mathrm{med}\,\lVert x_i-x_j\rVert/\sqrt{2\log(N+1)}$ of every step anew, from at most 512 particles. For
            "kde", "blob" and "svgd" only; None is "median" there.
        weights: shape `(N,)`, positive, with sum 1; None is $1/N$.

    Returns:
        From `velocity` and `step`: shape and dtype of the particles; from `energy`: a scalar; from `run`: a
        [`ParticleTrajectory`][danlu.flows.ParticleTrajectory].

    Raises:
        TypeError: `energy` is no functional, `density` neither a string nor callable, the particles are not float32 or
            float64.
        ValueError: an option is unknown, out of its range or does not apply; `weights` are not positive, do not sum to
            1 within $10^{-5}$, or do not fit the particles; there are no particles.
        RuntimeError: a gradient is not finite (the message has the indices of the particles), or no step of `run`
            decreases the energy.

    Numerics:
        Exponents are formed whole before they are exponentiated, and the kernel of a particle with itself is in every
        sum: far particles cost no division by 0. Distances come from one matrix product where that is accurate, else
        from differences. Where particles coincide the median is floored. "gaussian" without variance in a direction
        leaves that direction alone; on a target that is not Gaussian it does not rest at the target's moments: for
        $p\propto e^{-x^4/4}$ all particles end at $\pm1$. Velocities carry no graph. A few values per step are read
        from the device, to find gradients that are not finite.

    Cost:
        $O(ND)$ and one gradient of the energy per step; kernels $2N^2D$ multiply-adds and $N^2$ exponentials, "blob"
        half as many multiply-adds more; extra memory $2^{18}$ numbers.

    Differences:
        `run` halves its step where the energy would rise, if the energy computed is one that the particles' flow
        decreases: without entropy, with "gaussian", and with "blob" of fixed bandwidth. For "kde", "svgd" and a
        callable there is no such energy, and a rise of the estimate would say nothing about the step.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Jordan, Kinderlehrer and Otto (1998); Carrillo, Craig and Patacchini
        (2019), arXiv 1709.09195, for "blob"; Liu and Wang (2016), arXiv 1608.04471, for "svgd".

    Example:
        >>> import torch
        >>> from danlu.flows import KL, WassersteinFlow
        >>> flow = WassersteinFlow(KL(lambda x: -((x - 3) ** 2).sum(-1) / 2), density="gaussian")
        >>> x0 = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> run = flow.run(x0, 15.0, 0.1, record=("mean", "energy"))
        >>> run.mean[-1], bool((run.energy.diff() <= 1e-6).all())
        (tensor([3.0000, 3.0000]), True)
    """

    def __init__(
        self,
        energy: Functional,
        *,
        density: Density | Callable[[Tensor], Tensor] | None = None,
        bandwidth: Literal["median"] | float | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.functional = check_terms(energy)
        self.temperature = energy.temperature
        if density is None:
            density = "langevin" if self.temperature else None
        elif not self.temperature:
            raise ValueError("density has no meaning for an energy without Entropy or KL")
        if isinstance(density, str):
            check_choice("density", density, _DENSITIES)
        elif density is not None and not callable(density):
            raise TypeError(f"density must be a name or callable, got {type(density).__name__}")
        self.density = density
        if density not in _KERNELS and bandwidth is not None:
            raise ValueError(f"bandwidth has no meaning with density={density!r}, only with 'kde', 'blob' and 'svgd'")
        if isinstance(bandwidth, str):
            check_choice("bandwidth", bandwidth, ("median",))
        elif bandwidth is not None:
            check_real("bandwidth", bandwidth, low=0.0, low_open=True)
        self.bandwidth = "median" if bandwidth is None and density in _KERNELS else bandwidth
        self.weights = None if weights is None else check_weights(weights)

    def __repr__(self) -> str:
        names = " + ".join(type(term).__name__ for term in self.functional.terms())
        return f"WassersteinFlow({names}, density={self.density!r}, bandwidth={self.bandwidth!r})"

    def velocity(self, x: Tensor) -> Tensor:
        """Velocity of each particle, for "langevin" its deterministic part."""
        weights = self._weights(x)
        return self._evaluate(x.detach(), weights, energy=False)[0]

    def energy(self, x: Tensor) -> Tensor:
        """The energy, with the entropy as `density` estimates it ("svgd" as "kde"), up to the constants of the terms.

        Raises `ValueError` where there is no estimate ("langevin" and a callable) or only a score is known.
        """
        self._check_energy()
        weights = self._weights(x)
        x = x.detach()
        value, _ = self.functional.value_and_gradient(x, weights)
        return self._parts(value, weights, self._negentropy(x, weights)).sum()

    def step(self, x: Tensor, dt: float, *, generator: torch.Generator | None = None) -> Tensor:
        """One Euler step of length `dt`, for "langevin" with noise from `generator`."""
        check_real("dt", dt, low=0.0, low_open=True)
        self._check_generator(generator)
        weights = self._weights(x)
        velocity, _ = self._evaluate(x.detach(), weights, energy=False)
        return self._moved(x, velocity, dt, generator)

    def run(
        self,
        x0: Tensor,
        t: float,
        dt: float,
        *,
        record: Sequence[Record] = (),
        generator: torch.Generator | None = None,
        adaptive: bool | None = None,
    ) -> ParticleTrajectory:
        """Follow the flow for the time `t`.

        Args:
            x0: particles, shape `(N, D)`, float32 or float64.
            t: duration, > 0.
            dt: largest step, > 0; without adaption `t` is divided into equal steps.
            record: what to keep of every step, of "mean", "cov", "energy" and "particles".
            generator: of the noise of "langevin"; None is torch's default.
            adaptive: halve the step while the energy would rise, and double it back after a step that did not need
                it. None does so where the energy of the particles is known to fall (see Differences); True raises
                elsewhere.
        """
        weights = self._weights(x0)
        check_real("t", t, low=0.0, low_open=True)
        check_real("dt", dt, low=0.0, low_open=True)
        for name in record:
            check_choice("record", name, RECORDS)
        self._check_generator(generator)
        if adaptive and not self._dissipates:
            raise ValueError(f"adaptive=True needs an energy that the particles decrease; {self!r} has none")
        if "energy" in record:
            self._check_energy()
        x = x0.detach()
        watched = self._dissipates and adaptive is not False
        observed = Observer(weights, record)
        if watched:
            self._run_adaptive(x, t, dt, weights, observed)
        else:
            # Rounding must not add a step: 2.5 / 0.1 is 25.
            count = max(1, math.ceil(t / dt * (1 - 1e-12)))
            for k in range(count):
                velocity, parts = self._evaluate(x, weights, energy="energy" in record)
                observed.add(t * k / count, x, None if parts is None else parts.sum())
                x = self._moved(x, velocity, t / count, generator)
            observed.add(t, x, self.energy(x) if "energy" in record else None)
        check_finite(observed.x, "the position")
        return observed.trajectory()

    def _run_adaptive(self, x: Tensor, t: float, dt: float, weights: Tensor, observed: "Observer") -> None:
        time, h = 0.0, min(dt, t)
        velocity, parts = self._evaluate(x, weights, energy=True)
        assert parts is not None  # asked for
        observed.add(0.0, x, parts.sum())
        while time < t:
            last = time + h >= t * (1 - 1e-12)
            for halvings in range(_HALVINGS):
                length = t - time if last else h
                moved = x + length * velocity
                try:
                    next_velocity, next_parts = self._evaluate(moved, weights, energy=True)
                except RuntimeError:
                    # Beyond a barrier; at the start the error is the caller's.
                    if halvings + 1 == _HALVINGS:
                        raise
                else:
                    assert next_parts is not None  # asked for
                    if self._not_above(next_parts, parts):
                        break
                h, last = length / 2, False
            else:
                raise RuntimeError(f"the energy rises at time {time:g} for every step down to {h:.3g}")
            time = t if last else time + length
            x, velocity, parts = moved, next_velocity, next_parts
            observed.add(time, x, parts.sum())
            h = min(dt, 2 * h) if halvings == 0 else h

    @staticmethod
    def _not_above(new: Tensor, old: Tensor) -> bool:
        # Rounding of a sum of N terms, which matters at rest: it goes by the parts of the energy, which may cancel.
        rounding = 16 * torch.finfo(old.dtype).eps * (1 + old.abs().sum())
        return bool(new.sum() <= old.sum() + rounding)

    @property
    def _dissipates(self) -> bool:
        if not (self.functional.dissipates and self.functional.has_value):
            return False
        smooth = self.density == "gaussian" or (self.density == "blob" and not isinstance(self.bandwidth, str))
        return smooth or self.density is None

    def _check_energy(self) -> None:
        if self.density == "langevin" or callable(self.density):
            kind = "langevin" if self.density == "langevin" else "a callable"
            raise ValueError(
                f"density={kind} has no estimate of the entropy; take the energy of a flow with 'gaussian' or 'kde'"
            )

    def _check_generator(self, generator: torch.Generator | None) -> None:
        if generator is not None and self.density != "langevin":
            raise ValueError(f"generator has no meaning with density={self.density!r}, which is deterministic")

    def _weights(self, x: Tensor) -> Tensor:
        check_point("x", x)
        if x.ndim != 2 or not len(x):
            raise ValueError(f"x must have shape (N, D) with at least one particle, got {tuple(x.shape)}")
        if self.weights is None:
            return x.new_full((len(x),), 1 / len(x))
        check_same_device(x=x, weights=self.weights)
        if len(self.weights) != len(x):
            raise ValueError(f"weights are for {len(self.weights)} particles, x has {len(x)}")
        return self.weights.to(x.dtype)

    def _evaluate(self, x: Tensor, weights: Tensor, *, energy: bool) -> tuple[Tensor, Tensor | None]:
        """Velocity, and the parts of the energy if they are asked for."""
        value, slope = self.functional.value_and_gradient(x, weights)
        drift, scale = -slope, self.temperature
        negentropy: Tensor | None = None
        if self.density in ("kde", "blob"):
            log_q, score = kernel_score(self._pairs(x, weights), blob=self.density == "blob")
            negentropy = weights @ log_q
            drift = drift - scale * score
        elif self.density == "gaussian":
            negentropy, score = gaussian_entropy_and_score(x, weights)
            drift = drift - scale * score
        elif self.density == "svgd":
            pairs = self._pairs(x, weights)
            negentropy = weights @ log_density(pairs) if energy else None
            drift = stein_velocity(pairs, drift, scale)
        elif callable(self.density):
            score = self.density(x)
            if not isinstance(score, Tensor) or score.shape != x.shape:
                raise ValueError(f"density must return a score of the shape of the particles {tuple(x.shape)}")
            drift = drift - scale * score.detach()
        check_finite(drift, "the velocity")
        return drift, self._parts(value, weights, negentropy) if energy else None

    def _negentropy(self, x: Tensor, weights: Tensor) -> Tensor | None:
        if self.density in _KERNELS:
            return weights @ log_density(self._pairs(x, weights))
        return gaussian_entropy_and_score(x, weights)[0] if self.density == "gaussian" else None

    def _parts(self, value: Tensor | None, weights: Tensor, negentropy: Tensor | None) -> Tensor:
        """What the energy is the sum of: the mean of the terms' values, and the entropy."""
        if value is None:
            raise ValueError("the energy needs the functions and not only their gradients; give log_prob or function")
        mean = (weights @ value).reshape(1)
        return mean if negentropy is None else torch.cat([mean, (self.temperature * negentropy).reshape(1)])

    def _pairs(self, x: Tensor, weights: Tensor) -> Pairs:
        fixed = self.bandwidth
        bandwidth = x.new_tensor(fixed) if isinstance(fixed, int | float) else median_bandwidth(x)
        return Pairs(x, weights, bandwidth)

    def _moved(self, x: Tensor, velocity: Tensor, dt: float, generator: torch.Generator | None) -> Tensor:
        moved = x.detach() + dt * velocity
        if self.density == "langevin":
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            moved = moved + math.sqrt(2 * self.temperature * dt) * noise
        return moved
