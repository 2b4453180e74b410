r"""Potential, KL, entropy and interaction: the terms of an energy.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_real
from danlu.flows._functional import (
    BatchFunction,
    Functional,
    batch_value,
    batch_value_and_gradient,
    check_finite,
    check_functions,
    derivative,
)

__all__ = ["KL", "Entropy", "Interaction", "Potential"]

# Differences of pairs that are held at once; 2**18 float32 numbers are 1 MiB, which stays in a core's cache.
_CHUNK_ELEMENTS = 2**18


@dataclass(frozen=True, eq=False)
class Potential(Functional):
    r"""Energy of a distribution in an outer potential.

    Definition:
        $$F[q] = \int V q, \qquad \frac{\delta F}{\delta q} = V$$

    Args:
        function: $V$ for a batch, shape `(N, D)` to `(N,)`, each row by itself. None if only its gradient is known.
        gradient: $\nabla V$ for a batch, shape `(N, D)` to `(N, D)`; None takes autograd's.

    Raises:
        TypeError: a function is not callable.
        ValueError: both are None. When used: a result has the wrong shape, or the value is needed and not known.
        RuntimeError: when used, the gradient is not finite; the message has the indices of the particles.

    Numerics:
        In the dtype of the particles.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16).

    Example:
        >>> import torch
        >>> from danlu.flows import Potential, WassersteinFlow
        >>> flow = WassersteinFlow(Potential(lambda x: (x**2).sum(-1) / 2))
        >>> flow.velocity(torch.tensor([[1.0], [-2.0]]))
        tensor([[-1.],
                [ 2.]])
    """

    function: BatchFunction | None = None
    gradient: BatchFunction | None = None

    def __post_init__(self) -> None:
        """Check the functions."""
        check_functions(function=self.function, gradient=self.gradient)

    @property
    def has_value(self) -> bool:
        """Whether `function` is given."""
        return self.function is not None

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""$V$ and its gradient."""
        return batch_value_and_gradient("Potential", self.function, self.gradient, x)

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        """$V$, differentiable."""
        return batch_value("the function of Potential", self.function, x)


@dataclass(frozen=True, eq=False)
class KL(Functional):
    r"""KL divergence to a target density, reverse KL of variational inference.

    Definition:
        $$F[q] = KL(q\|p) = \int q\log q - \int q \log p, \qquad \frac{\delta F}{\delta q} = \log\frac qp + 1$$
        the sum of `Potential(-log p)` and `Entropy()`.

    Args:
        log_prob: $\log p$ up to a constant for a batch, shape `(N, D)` to `(N,)`, each row by itself. None if only the
            score is known.
        score: $\nabla\log p$ for a batch, shape `(N, D)` to `(N, D)`; None takes autograd's.

    Raises:
        TypeError: as in [`Potential`][danlu.flows.Potential].
        ValueError: as there.
        RuntimeError: as there.

    Numerics:
        In the dtype of the particles. Energies are off by the constant that $\log p$ lacks.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Jordan, Kinderlehrer and Otto (1998).

    Example:
        >>> import torch
        >>> from danlu.flows import KL, WassersteinFlow
        >>> flow = WassersteinFlow(KL(lambda x: -(x**2).sum(-1) / 2), density="gaussian")
        >>> flow.velocity(torch.tensor([[1.0], [3.0]]))
        tensor([[-2.],
                [-2.]])
    """

    log_prob: BatchFunction | None = None
    score: BatchFunction | None = None

    def __post_init__(self) -> None:
        """Check the functions."""
        check_functions(log_prob=self.log_prob, score=self.score)

    @property
    def has_value(self) -> bool:
        """Whether `log_prob` is given."""
        return self.log_prob is not None

    @property
    def temperature(self) -> float:
        """1."""
        return 1.0

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""$-\log p$ and its gradient."""
        value, gradient = batch_value_and_gradient("KL", self.log_prob, self.score, x)
        return None if value is None else -value, -gradient

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        r"""$-\log p$, differentiable."""
        return -batch_value("the function of KL", self.log_prob, x)


@dataclass(frozen=True, eq=False)
class Entropy(Functional):
    r"""Negative entropy, which spreads a distribution out.

    Definition:
        $$F[q] = T\int q\log q, \qquad \frac{\delta F}{\delta q} = T(\log q + 1)$$
        with $T$ = `scale`. Its flow alone is the heat equation $\partial_t q = T\Delta q$.

    Args:
        scale: temperature $T > 0$.

    Raises:
        TypeError: `scale` is not a number.
        ValueError: `scale` is not positive.

    Numerics:
        How $\log q$ is found is the choice `density` of the flow.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16).

    Example:
        >>> import torch
        >>> from danlu.flows import Entropy, WassersteinFlow
        >>> WassersteinFlow(Entropy(), density="gaussian").velocity(torch.tensor([[1.0], [3.0]]))
        tensor([[-1.],
                [ 1.]])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the scale."""
        check_real("scale", self.scale, low=0.0, low_open=True)

    @property
    def temperature(self) -> float:
        """The scale."""
        return float(self.scale)

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing: the flow adds the density term."""
        return x.new_zeros(len(x)), torch.zeros_like(x)

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        """Zeros."""
        return x.new_zeros(len(x))


@dataclass(frozen=True, eq=False)
class Interaction(Functional):
    r"""Energy of pairs.

    Definition:
        $$F[q] = \tfrac12\iint W(x-y)\,q(x)\,q(y), \qquad \frac{\delta F}{\delta q} = W * q$$
        for even $W$. Of any $W$ only the even part $\frac12[W(z) + W(-z)]$ counts, and is used.

    Args:
        function: $W$ for a batch of differences, shape `(M, D)` to `(M,)`, each row by itself.

    Raises:
        TypeError: `function` is not callable.
        ValueError: when used, the result has the wrong shape.
        RuntimeError: when used, the gradient is not finite (as at a singular $W$ with two particles in one place).

    Numerics:
        The pair of a particle with itself is left out, so $W$ may be singular at 0; for a smooth one that only takes a
        constant from the energy.

    Cost:
        $N^2$ evaluations of $W$ and its gradient per velocity, in chunks of $2^{18}$ numbers.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); Carrillo, Craig and Patacchini (2019), arXiv 1709.09195.

    Example:
        >>> import torch
        >>> from danlu.flows import Interaction, WassersteinFlow
        >>> flow = WassersteinFlow(Interaction(lambda z: (z**2).sum(-1) / 2))
        >>> flow.velocity(torch.tensor([[0.0], [4.0]]))
        tensor([[ 2.],
                [-2.]])
    """

    function: BatchFunction

    def __post_init__(self) -> None:
        """Check the function."""
        check_functions(function=self.function)

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""$\frac12 W * q$ and the gradient of $W * q$."""
        rows = max(1, _CHUNK_ELEMENTS // max(1, x.numel()))
        values, gradients = list[Tensor](), list[Tensor]()
        for start in range(0, len(x), rows):
            with torch.enable_grad():
                chunk = x[start : start + rows].detach().requires_grad_()
                value = self._of_rows(chunk, x.detach(), start, weights)
                gradients.append(derivative(value.sum(), chunk))
            values.append(value.detach() / 2)
        slope = torch.cat(gradients)
        check_finite(slope, "the gradient of Interaction")
        return torch.cat(values), slope

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        r"""$\frac12 W * q$, differentiable in all particles."""
        rows = max(1, _CHUNK_ELEMENTS // max(1, x.numel()))
        parts = [self._of_rows(x[start : start + rows], x, start, weights) for start in range(0, len(x), rows)]
        return torch.cat(parts) / 2

    def _of_rows(self, chunk: Tensor, x: Tensor, start: int, weights: Tensor) -> Tensor:
        """Weighted sum of the even part of W over the other particles, for each particle of the chunk."""
        count, dim = x.shape
        own = torch.arange(len(chunk), device=x.device).unsqueeze(-1) + start
        own = own == torch.arange(count, device=x.device)
        # A place away from a singularity, whose value and gradient are then masked.
        pairs = torch.where(own.unsqueeze(-1), torch.ones_like(x[:1]), chunk.unsqueeze(1) - x).reshape(-1, dim)
        both = batch_value("the function of Interaction", self.function, pairs)
        both = both + batch_value("the function of Interaction", self.function, -pairs)
        return torch.where(own, 0.0, both.reshape(own.shape) / 2) @ weights
