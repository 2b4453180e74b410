r"""What an energy is: a sum of terms that know their value and the gradient of their first variation.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BatchFunction",
    "Functional",
    "batch_value",
    "batch_value_and_gradient",
    "check_finite",
    "check_functions",
    "check_terms",
    "check_weights",
    "derivative",
]

BatchFunction = Callable[[Tensor], Tensor]


class Functional:
    """A term of an energy; terms add: `Potential(V) + Entropy()`."""

    def terms(self) -> tuple["Functional", ...]:
        """The terms; a single one is its own sum."""
        return (self,)

    @property
    def temperature(self) -> float:
        r"""Factor of $\int q \log q$."""
        return 0.0

    @property
    def dissipates(self) -> bool:
        """Whether the particle flow is the gradient flow of the value computed, up to the entropy."""
        return True

    @property
    def has_value(self) -> bool:
        """Whether the value is known, and not only its gradient."""
        return True

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""Value per particle, of which the energy is the weighted mean, and $\nabla\frac{\delta F}{\delta q}$.

        Both without entropy. The value is None where only a score is known.
        """
        raise NotImplementedError

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        """Value per particle, differentiable in `x`; raise `ValueError` where only a score is known."""
        raise NotImplementedError

    def __add__(self, other: object) -> "Functional":
        if not isinstance(other, Functional):
            return NotImplemented
        return _Sum((*self.terms(), *other.terms()))


@dataclass(frozen=True, eq=False)
class _Sum(Functional):
    parts: tuple[Functional, ...]

    def terms(self) -> tuple[Functional, ...]:
        return self.parts

    @property
    def temperature(self) -> float:
        return sum(term.temperature for term in self.parts)

    @property
    def dissipates(self) -> bool:
        return all(term.dissipates for term in self.parts)

    @property
    def has_value(self) -> bool:
        return all(term.has_value for term in self.parts)

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        both = [term.value_and_gradient(x, weights) for term in self.parts]
        values = [value for value, _ in both if value is not None]
        total = torch.stack(values).sum(0) if len(values) == len(both) else None
        return total, torch.stack([gradient for _, gradient in both]).sum(0)

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([term.value(x, weights) for term in self.parts]).sum(0)


def check_terms(energy: object) -> Functional:
    """Return `energy`; raise `TypeError` unless it is made of the terms of this file."""
    if not isinstance(energy, Functional):
        raise TypeError(
            "energy must be Potential, Interaction, Entropy, KL, FDivergence or a sum of them, "
            f"got {type(energy).__name__}"
        )
    return energy


def check_finite(rows: Tensor, what: str) -> None:
    """Raise `RuntimeError` that names the first particles where `rows` are not finite."""
    finite = rows.isfinite().all(-1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise RuntimeError(f"{what} is not finite at {len(bad)} of {len(rows)} particles: {listed}")


def check_weights(weights: Tensor) -> Tensor:
    """Return `weights` in float64, their sum 1 to rounding; raise unless they are positive with sum 1."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError("weights must be a floating-point tensor")
    if weights.ndim != 1 or not len(weights):
        raise ValueError(f"weights must have shape (N,), got {tuple(weights.shape)}")
    # The kernel of a particle with itself, w_i / max w, must not underflow in float32.
    if not bool((weights > 1e-30 * weights.amax()).all()):
        raise ValueError(
            "weights must be positive, the least at least 1e-30 of the largest; drop particles of weight 0"
        )
    total = float(weights.double().sum())
    if not abs(total - 1) <= 1e-5:
        raise ValueError(f"weights must sum to 1, got {total:.8g}")
    return weights.detach().double() / total


def check_functions(**functions: BatchFunction | None) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    if all(function is None for function in functions.values()):
        raise ValueError(f"{' or '.join(functions)} must be given")


def batch_value(what: str, function: BatchFunction | None, x: Tensor) -> Tensor:
    """One number per row, checked."""
    if function is None:
        raise ValueError(f"{what} is not known, only its gradient; the energy needs it")
    value = function(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must return one number per row, shape {tuple(x.shape[:1])}, got {found}")
    return value


def batch_value_and_gradient(
    term: str, function: BatchFunction | None, gradient: BatchFunction | None, x: Tensor
) -> tuple[Tensor | None, Tensor]:
    if gradient is None:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = batch_value(f"the function of {term}", function, leaf)
            slope = derivative(value.sum(), leaf)
        value = value.detach()
    else:
        slope = gradient(x)
        if not isinstance(slope, Tensor) or slope.shape != x.shape:
            found = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
            raise ValueError(f"the gradient of {term} must have the particles' shape {tuple(x.shape)}, got {found}")
        slope = slope.detach()
        with torch.no_grad():
            value = None if function is None else batch_value(f"the function of {term}", function, x)
    check_finite(slope, f"the gradient of {term}")
    return value, slope


def derivative(total: Tensor, leaf: Tensor) -> Tensor:
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)
    return slope
