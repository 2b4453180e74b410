r"""Robust fits of $y = \sum_j A_j x_j^{-\alpha_j} + E$ in log space, many data sets at once.

Shape letters: `P` problems (starts times data sets), `n` points, `J` power terms, `d` = 2J or 2J + 1 unknowns:
$(\log A_1, \alpha_1, \dots, \log A_J, \alpha_J, \log E)$, all in terms of the standardized $\log x_j$.
"""

import math

import torch
from torch import Tensor

from danlu.diagnostics._bfgs import minimize

__all__ = ["SumOfPowers", "resample"]

# From least squares to the wanted robustness: the last objective is almost piecewise linear, and hard to enter.
_DELTAS = (0.1, 0.01)
_ITERATIONS = (60, 60, 300)
# Shares of the smallest y that the constant takes in a start.
_SHARES = (1e-3, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_EXPONENTS = (0.15, 0.4, 1.0)
# How many of the starts go on from least squares to the robust objective.
_KEPT = 4


class SumOfPowers:
    """The model at fixed places.

    The logarithms of the places are standardized, which takes the correlation out of the unknowns of a term.

    Args:
        log_x: `(J, n)`.
        weights: of the points, `(n,)`, mean 1.
        constant: whether $E$ is an unknown or 0.
        delta: where the Huber loss turns from a square to a line, in units of log y.
    """

    def __init__(self, log_x: Tensor, weights: Tensor, *, constant: bool, delta: float) -> None:
        self.weights = weights
        self.constant = constant
        self.delta = delta
        self.mean = log_x.mean(-1, keepdim=True)
        self.spread = (log_x - self.mean).std(-1, keepdim=True)
        self.places = (log_x - self.mean) / self.spread

    def log_predict(self, unknowns: Tensor) -> Tensor:
        """Log of the model, `(..., n)` from `(..., d)`."""
        total = self._term(unknowns, 0)
        for j in range(1, len(self.places)):
            total = torch.logaddexp(total, self._term(unknowns, j))
        return torch.logaddexp(total, unknowns[..., -1:]) if self.constant else total

    def _term(self, unknowns: Tensor, j: int) -> Tensor:
        return unknowns[..., 2 * j, None] - unknowns[..., 2 * j + 1, None] * self.places[j]

    def objective(self, unknowns: Tensor, log_y: Tensor, delta: float) -> Tensor:
        r"""Weighted mean Huber loss over $\delta^2$ (so that a tolerance means the same for any $\delta$)."""
        size = (self.log_predict(unknowns) - log_y).abs() / delta
        huber = torch.where(size <= 1, 0.5 * size.square(), size - 0.5)
        return (self.weights * huber).mean(-1)

    def gradient(self, unknowns: Tensor, log_y: Tensor, delta: float) -> Tensor:
        """Gradient of `objective`, `(P, d)`."""
        predicted = self.log_predict(unknowns)
        pull = self.weights * ((predicted - log_y) / delta).clamp(-1, 1) / (delta * predicted.shape[-1])
        found: list[Tensor] = []
        for j in range(len(self.places)):
            share = pull * (self._term(unknowns, j) - predicted).exp()
            found += [share.sum(-1), -(share * self.places[j]).sum(-1)]
        if self.constant:
            found.append((pull * (unknowns[..., -1:] - predicted).exp()).sum(-1))
        return torch.stack(found, dim=-1)

    def minimize(self, start: Tensor, log_y: Tensor) -> tuple[Tensor, Tensor]:
        """Best unknowns `(R, d)` and objectives `(R,)` of `R` data sets `(R, n)` from starts `(S, R, d)`."""
        levels = self.objective(start, log_y, self.delta)
        for stage, delta in enumerate((*_DELTAS, self.delta)):
            problems = start.flatten(0, 1)
            targets = log_y.repeat(len(start), 1)

            def value(unknowns: Tensor, targets: Tensor = targets, delta: float = delta) -> Tensor:
                return self.objective(unknowns, targets, delta)

            def gradient(unknowns: Tensor, targets: Tensor = targets, delta: float = delta) -> Tensor:
                return self.gradient(unknowns, targets, delta)

            found, level = minimize(value, gradient, problems, iterations=_ITERATIONS[stage])
            start = found.view(start.shape)
            levels = level.view(start.shape[:2])
            if stage == 0 and len(start) > _KEPT:
                best = levels.argsort(dim=0)[:_KEPT]
                start = start.gather(0, best[..., None].expand(-1, -1, start.shape[-1]))
        level, which = levels.min(0)
        return start.gather(0, which[None, :, None].expand(1, -1, start.shape[-1]))[0], level

    def starts(self, log_y: Tensor) -> Tensor:
        """Starts `(S, R, d)` for data sets `(R, n)`: what the constant leaves over is fitted by linear regression."""
        shares = log_y.new_tensor(_SHARES if self.constant else (0.0,))
        floor = shares[:, None] * log_y.min(-1).values.exp()
        rest = log_y.exp() - floor[..., None]
        log_floor = [floor.log()[..., None]] if self.constant else []
        if len(self.places) == 1:
            height, place = rest.log(), self.places[0]
            weight = self.weights / self.weights.sum()
            center, middle = (weight * height).sum(-1), (weight * place).sum()
            tilt = (weight * height * (place - middle)).sum(-1) / (weight * (place - middle).square()).sum()
            return torch.cat([(center - tilt * middle)[..., None], -tilt[..., None], *log_floor], dim=-1)
        found: list[Tensor] = []
        for first in _EXPONENTS:
            for second in _EXPONENTS:
                exponents = [first * float(self.spread[0, 0]), second * float(self.spread[1, 0])]
                heights = [
                    # Half of the rest for each term, at the geometric mean of its powers.
                    (0.5 * rest).log().mean(-1, keepdim=True) + exponent * self.places[j].mean()
                    for j, exponent in enumerate(exponents)
                ]
                parts = [p for h, e in zip(heights, exponents, strict=True) for p in (h, torch.full_like(h, e))]
                found.append(torch.cat([*parts, *log_floor], dim=-1))
        return torch.cat(found)

    def natural(self, unknowns: Tensor) -> Tensor:
        r"""$(A_1, \alpha_1, \dots, E)$, `(..., 2J + 1)`, from the standardized logarithms."""
        found: list[Tensor] = []
        for j in range(len(self.places)):
            exponent = unknowns[..., 2 * j + 1] / self.spread[j, 0]
            found += [(unknowns[..., 2 * j] + exponent * self.mean[j, 0]).exp(), exponent]
        last = unknowns[..., -1].exp() if self.constant else torch.zeros_like(unknowns[..., 0])
        return torch.stack([*found, last], dim=-1)


def resample(model: SumOfPowers, unknowns: Tensor, log_y: Tensor, count: int, seed: int) -> Tensor:
    """Data sets `(count, n)` with the fitted curve and residuals drawn with replacement."""
    predicted = model.log_predict(unknowns)
    size, unknown = predicted.shape[-1], unknowns.shape[-1]
    scale = model.weights.sqrt()
    # Residuals of a fit are too small by its unknowns; weighted, they are alike and can trade places.
    residual = (log_y - predicted) * scale
    residual = (residual - residual.mean()) * math.sqrt(size / max(1, size - unknown))
    places = torch.randint(size, (count, size), generator=torch.Generator().manual_seed(seed))
    return predicted + residual[places] / scale
