r"""f-divergences from the ratio of two densities.

Source: "梯度流：探索通向最小值之路" (2023-06-16).

Shape letters: `N` particles; `D` their dimension.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu._common.checks import check_choice
from danlu.flows._functional import (
    BatchFunction,
    Functional,
    batch_value,
    batch_value_and_gradient,
    check_finite,
    check_functions,
)

__all__ = ["FDivergence", "divergence_value", "divergence_weight"]

Divergence = Literal["reverse_kl", "kl", "chi2", "jensen_shannon", "hellinger"]
_DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "kl", "chi2", "jensen_shannon", "hellinger")


@dataclass(frozen=True, eq=False)
class FDivergence(Functional):
    r"""f-divergence to a target, given the ratio of the densities.

    Definition:
        $$F[q] = D_f(p\|q) = \int q\,f(r), \quad r = \frac pq, \qquad
        \frac{\delta F}{\delta q} = f(r) - r f'(r), \qquad v = r^2 f''(r)\,\nabla\log r$$

        | `name` | $f(r)$ | $r^2 f''(r)$ |
        |---|---|---|
        | "reverse_kl" | $-\log r$ | $1$ |
        | "kl" | $r\log r$ | $r$ |
        | "chi2" | $(r - 1)^2$ | $2r^2$ |
        | "jensen_shannon" | $r\log r - (r+1)\log\frac{r+1}2$ | $r/(r+1)$ |
        | "hellinger" | $(\sqrt r - 1)^2$ | $\sqrt r/2$ |

    Args:
        name: one of the table.
        log_ratio: $\log r$ for a batch, shape `(N, D)` to `(N,)`, each row by itself, such as the logit of a
            discriminator. It is called with all particles, so it may estimate $q$ from them, detached.

    Raises:
        TypeError: `log_ratio` is not callable.
        ValueError: `name` is unknown; when used, the result has the wrong shape.
        RuntimeError: when used, the velocity is not finite.

    Numerics:
        From $\log r$, so only "kl", "chi2" and "hellinger" overflow where $r$ does. Far from the target the weight of
        all but "reverse_kl" tends to 0, and the particles stand still.

    Differences:
        The energy has its own estimate of $q$, so `density` plays no part in it.

    Source:
        "梯度流：探索通向最小值之路" (2023-06-16); weights by differentiation of $f$.

    Example:
        >>> import torch
        >>> from danlu.flows import FDivergence, WassersteinFlow
        >>> WassersteinFlow(FDivergence("jensen_shannon", lambda x: 2 * x[:, 0])).velocity(torch.zeros(1, 1))
        tensor([[1.]])
    """

    name: Divergence
    log_ratio: BatchFunction

    def __post_init__(self) -> None:
        """Check the name and the function."""
        check_choice("name", self.name, _DIVERGENCES)
        check_functions(log_ratio=self.log_ratio)

    @property
    def dissipates(self) -> bool:
        """Not by the estimate of the ratio, which does not move with the particles."""
        return False

    def value_and_gradient(self, x: Tensor, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        r"""$f(r)$ and $-r^2 f''(r)\,\nabla\log r$."""
        log_ratio, slope = batch_value_and_gradient("FDivergence", self.log_ratio, None, x)
        assert log_ratio is not None  # a function was given
        gradient = -divergence_weight(self.name, log_ratio).unsqueeze(-1) * slope
        # The weight may overflow where the ratio is finite.
        check_finite(gradient, "the velocity of FDivergence")
        return divergence_value(self.name, log_ratio), gradient

    def value(self, x: Tensor, weights: Tensor) -> Tensor:
        """$f(r)$, differentiable with the ratio held fixed as a function."""
        return divergence_value(self.name, batch_value("the function of FDivergence", self.log_ratio, x))


def divergence_value(name: Divergence, log_ratio: Tensor) -> Tensor:
    r"""$f(r)$ from $\log r$."""
    if name == "reverse_kl":
        return -log_ratio
    if name == "kl":
        return log_ratio.exp() * log_ratio
    if name == "chi2":
        return torch.expm1(log_ratio).square()
    if name == "jensen_shannon":
        # r log(2r/(r+1)) + log(2/(r+1)); the first logarithm tends to log 2 and not to infinity minus infinity.
        doubled = torch.log(torch.full_like(log_ratio, 2.0))
        return log_ratio.exp() * (doubled - F.softplus(-log_ratio)) + doubled - F.softplus(log_ratio)
    return torch.expm1(log_ratio / 2).square()


def divergence_weight(name: Divergence, log_ratio: Tensor) -> Tensor:
    r"""$r^2 f''(r)$ from $\log r$."""
    if name == "reverse_kl":
        return torch.ones_like(log_ratio)
    if name == "kl":
        return log_ratio.exp()
    if name == "chi2":
        return 2 * (2 * log_ratio).exp()
    if name == "jensen_shannon":
        return torch.sigmoid(log_ratio)
    return (log_ratio / 2).exp() / 2
