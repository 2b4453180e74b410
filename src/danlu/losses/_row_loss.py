r"""Losses of a row through its target's $\ell = -\log p_t$: the protocols, cross entropy, and functions of the user's.

Source: the coefficients follow from the chain rule, see [`linear_loss`][danlu.losses.linear_loss].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from danlu._common.checks import check_real
from danlu.losses._ground_cost import GroundCost

__all__ = [
    "CrossEntropy",
    "Parts",
    "RowFunction",
    "RowLoss",
    "TransportRowLoss",
    "from_parts",
    "is_row_loss",
    "is_transport_loss",
    "parts_of",
    "register_parts",
    "values_of",
]


class RowLoss(Protocol):
    r"""A loss that depends on a row only through $\ell = -\log p_t$, so that its logit gradient is known.

    `label_smoothing` $\varepsilon$ mixes the loss with the mean of $-\log p_v$ over the classes.
    """

    @property
    def label_smoothing(self) -> float:
        """Share of the uniform target, in $[0, 1]$."""
        ...

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and $\varphi'(\ell)$ for every row."""
        ...


class TransportRowLoss(Protocol):
    r"""A loss of $\ell$ and of $e = \sum_v p_v c_{tv}$, the cost of moving the prediction to the target."""

    @property
    def label_smoothing(self) -> float:
        """Share of the uniform target, in $[0, 1]$."""
        ...

    @property
    def ground_cost(self) -> GroundCost:
        """The costs $c$."""
        ...

    def value_and_derivatives(self, nll: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""$\varphi(\ell, e)$ and the coefficients of $\nabla\ell$ and $\nabla e$ for every row."""
        ...


def is_row_loss(loss: object) -> TypeGuard[RowLoss]:
    """Whether `loss` is a function of the negative log-likelihood. A compiler gets `isinstance` of protocols wrong."""
    return hasattr(loss, "value_and_derivative")


def is_transport_loss(loss: object) -> TypeGuard[TransportRowLoss]:
    """Whether `loss` is a function of the negative log-likelihood and of an expected cost."""
    return hasattr(loss, "value_and_derivatives")


class Parts(NamedTuple):
    """A row loss taken apart into what an operator takes: a name, numbers and tensors. Its smoothing is not in it."""

    kind: str
    numbers: tuple[float, ...] = ()
    first: Tensor | None = None
    second: Tensor | None = None


_TAKE_APART: dict[type, Callable[[Any], Parts]] = {}
_PUT_TOGETHER: dict[str, Callable[[Parts], RowLoss | TransportRowLoss]] = {}


def register_parts(
    kind: type, name: str, take_apart: Callable[[Any], Parts], put_together: Callable[[Parts], Any]
) -> None:
    """Say how losses of this class come apart, and together again; their kinds begin with `name` (up to a slash)."""
    _TAKE_APART[kind] = take_apart
    _PUT_TOGETHER[name] = put_together


def parts_of(loss: object) -> Parts | None:
    """The parts of a row loss of this package; None for any other, subclasses included."""
    take_apart = _TAKE_APART.get(type(loss))
    return None if take_apart is None else take_apart(loss)


def from_parts(parts: Parts) -> RowLoss | TransportRowLoss:
    """The row loss of some parts, without its smoothing."""
    return _PUT_TOGETHER[parts.kind.partition("/")[0]](parts)


@dataclass(frozen=True)
class CrossEntropy:
    r"""Cross entropy as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $$L = (1-\varepsilon)\,\ell + \frac{\varepsilon}{V}\sum_v -\log p_v, \qquad \ell = -\log p_t$$
        with $\varepsilon$ = `label_smoothing`.

    Args:
        label_smoothing: $\varepsilon \in [0, 1]$.

    Raises:
        ValueError: `label_smoothing` is not in [0, 1].

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss].

    Source:
        Szegedy et al. (2015), arXiv 1512.00567, section 7, for the smoothing.

    Example:
        >>> import torch
        >>> from danlu.losses import CrossEntropy, linear_loss
        >>> linear_loss(torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2]), CrossEntropy())
        tensor(1.6094)
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_real("label_smoothing", self.label_smoothing, low=0.0, high=1.0)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\ell$ and 1."""
        return nll, torch.ones_like(nll)


register_parts(CrossEntropy, "cross_entropy", lambda _: Parts("cross_entropy"), lambda _: CrossEntropy())


@dataclass(frozen=True, eq=False)
class RowFunction:
    r"""Any function of the negative log-likelihood as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $L_n = \varphi(\ell_n)$ with $\varphi$ = `function`. It returns $\varphi(\ell)$, and autograd differentiates it,
        or the pair $(\varphi(\ell), \alpha)$ with the coefficient $\alpha$ that $\nabla\ell$ shall get; the pair is how
        a loss with detached weights is written.

    Args:
        function: of a vector $\ell \ge 0$, elementwise.
        label_smoothing: $\varepsilon \in [0, 1]$.

    Raises:
        TypeError: `function` is not callable.
        ValueError: `label_smoothing` is not in [0, 1], or, at use, `function` does not give one value per row.

    Numerics:
        The function sees float32 for half inputs.

    Source:
        The chain rule.

    Example:
        >>> import torch
        >>> from danlu.losses import RowFunction, linear_loss
        >>> missed = RowFunction(lambda nll: 1 - torch.exp(-nll))
        >>> linear_loss(torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2]), missed)
        tensor(0.8000)
    """

    function: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {type(self.function).__name__}")
        check_real("label_smoothing", self.label_smoothing, low=0.0, high=1.0)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and its derivative, or the coefficient that the function gives."""
        with torch.enable_grad():
            leaf = nll.detach().requires_grad_()
            value, slope = values_of(self, leaf)
            if slope is None:
                if not value.requires_grad:
                    slope = torch.zeros_like(nll)
                else:
                    (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope.detach()


def values_of(loss: RowFunction, nll: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the user's function gives: values, and coefficients if it has its own."""
    found = loss.function(nll)
    value, slope = found if isinstance(found, tuple) else (found, None)
    for part in (value,) if slope is None else (value, slope):
        if not isinstance(part, Tensor) or part.shape != nll.shape:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"function must return one value per row, shape {tuple(nll.shape)}, got {shape}")
    return value, slope
