r"""Fits of scaling laws, $y = E + A x^{-\alpha}$ and relatives, with bootstrap intervals.

Source: "基于量子化假设推导模型的尺度定律" (2023-05-18); the objective is that of arXiv 2203.15556, section 3.3.

Shape letters: `n` points, `R` bootstrap replicates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu._common.checks import check_integer
from danlu.diagnostics._sum_of_powers import SumOfPowers, resample

__all__ = ["JointFit", "PowerLawFit", "QuantaRelation", "check_quanta_relation", "fit_joint", "fit_power_law"]

_CONFIDENCE = 0.95
# Residuals below 0.1 % count squared, larger ones linearly: one diverged run does not bend the curve.
_DELTA = 1e-3
# Half-width of an interval, relative to its estimate, beyond which a number is not worth quoting.
_TOO_WIDE = 0.3
# Below it an exponent is 0: it changes no y by more than its rounding.
_ROUNDING = 1e-12
# A replicate starts from the fit itself and from some of the starts of the fit.
_REPLICATE_STARTS = 3

Interval = tuple[float, float]


@dataclass(frozen=True)
class PowerLawFit:
    r"""What [`fit_power_law`][danlu.diagnostics.fit_power_law] found.

    Definition:
        $\hat y(x) = E + A x^{-\alpha}$.

    Args:
        alpha: $\alpha$.
        A: $A$, in the unit of $y$ at $x = 1$.
        E: $E$, in the unit of $y$; 0 if the fit had none.
        intervals: 95 % percentile intervals of "alpha", "A" and "E"; empty without a bootstrap.
        objective: mean Huber loss at the fit, in units of $\delta^2$.
        warnings: what speaks against quoting the numbers, one sentence each.
        freedom: number of points less number of unknowns.
        replicates: $\alpha, A, E$ of the bootstrap replicates, shape `(R, 3)`.

    Numerics:
        float64. The intervals say how far noise of the size of the residuals moves the fit; they know nothing of a
        curve that is no power law.

    Source:
        As in the function.

    Example:
        >>> from danlu.diagnostics import fit_power_law
        >>> fit = fit_power_law([1.0, 10.0, 100.0, 1000.0], [9.0, 5.0, 3.0, 2.0])
        >>> round(fit.alpha, 4), round(fit.A, 4), round(fit.E, 4)
        (0.301, 8.0, 1.0)
        >>> round(float(fit.predict(10.0)), 6)
        5.0
    """

    alpha: float
    A: float
    E: float
    intervals: Mapping[str, Interval]
    objective: float
    warnings: tuple[str, ...]
    freedom: int
    replicates: Tensor = field(repr=False, compare=False)

    def predict(self, x: float | Tensor) -> Tensor:
        """The fitted curve at `x` > 0, float64 of the shape of `x`."""
        return self.E + self.A * _positive("x", x).pow(-self.alpha)


@dataclass(frozen=True)
class JointFit:
    r"""What [`fit_joint`][danlu.diagnostics.fit_joint] found.

    Definition:
        $\hat L(N, D) = E + A N^{-\alpha} + B D^{-\beta}$.

    Args:
        alpha: $\alpha$.
        beta: $\beta$.
        A: $A$, in the unit of $L$.
        B: $B$, in the unit of $L$.
        E: $E$, in the unit of $L$.
        intervals: 95 % percentile intervals of "alpha", "beta", "A", "B" and "E"; empty without a bootstrap.
        objective: mean Huber loss at the fit, in units of $\delta^2$.
        warnings: what speaks against quoting the numbers, one sentence each.
        freedom: number of points less number of unknowns.
        replicates: $\alpha, \beta, A, B, E$ of the bootstrap replicates, shape `(R, 5)`.

    Numerics:
        As in [`PowerLawFit`][danlu.diagnostics.PowerLawFit].

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import fit_joint
        >>> N = torch.logspace(0, 3, 4).repeat(4)
        >>> D = torch.logspace(0, 3, 4).repeat_interleave(4)
        >>> fit = fit_joint(N, D, 1 + 2 * N**-0.5 + 3 * D**-0.25, bootstrap=0)
        >>> round(fit.alpha, 3), round(fit.beta, 3), round(fit.E, 3)
        (0.5, 0.25, 1.0)
    """

    alpha: float
    beta: float
    A: float
    B: float
    E: float
    intervals: Mapping[str, Interval]
    objective: float
    warnings: tuple[str, ...]
    freedom: int
    replicates: Tensor = field(repr=False, compare=False)

    def predict(self, N: float | Tensor, D: float | Tensor) -> Tensor:
        """The fitted curve at `N`, `D` > 0, float64 of their common shape."""
        return self.E + self.A * _positive("N", N).pow(-self.alpha) + self.B * _positive("D", D).pow(-self.beta)


@dataclass(frozen=True)
class QuantaRelation:
    r"""What [`check_quanta_relation`][danlu.diagnostics.check_quanta_relation] found.

    Definition:
        `difference` $= \alpha_D - \alpha_N/(1+\alpha_N)$.

    Args:
        alpha_params: $\alpha_N$.
        alpha_data: $\alpha_D$.
        predicted: $\alpha_N/(1+\alpha_N)$.
        difference: $\alpha_D$ minus `predicted`.
        interval: 95 % interval of the difference.
        consistent: whether the interval holds 0.
        excludes_equality: whether the interval of $\alpha_D - \alpha_N$ excludes 0. If it does not, the data cannot
            tell the relation from equal exponents, and `consistent` says little.

    Numerics:
        Python floats.

    Source:
        As in the function.

    Example:
        See [`check_quanta_relation`][danlu.diagnostics.check_quanta_relation].
    """

    alpha_params: float
    alpha_data: float
    predicted: float
    difference: float
    interval: Interval
    consistent: bool
    excludes_equality: bool


def fit_power_law(
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    *,
    irreducible: bool = True,
    weights: Sequence[float] | Tensor | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> PowerLawFit:
    r"""Fit $y = E + A x^{-\alpha}$ robustly in log space, with intervals.

    Definition:
        $$\min_{A, \alpha, E}\ \sum_{i=1}^{n} w_i\,\mathrm{Huber}_\delta\!\big(
        \operatorname{logsumexp}(\log A - \alpha \log x_i,\ \log E) - \log y_i\big), \qquad \delta = 10^{-3}$$
        from several starts: for each of some values of $E$ the linear regression of $\log(y - E)$ on $\log x$.
        The intervals are 2.5 % to 97.5 % of the fits to replicates, that is the fitted curve plus residuals drawn with
        replacement and scaled by $\sqrt{n/(n-3)}$ (2 instead of 3 without $E$).

    Args:
        x: resource, `(n,)`, positive and strictly increasing, $n \ge 4$.
        y: loss, `(n,)`, positive.
        irreducible: whether there is an $E$; without one, the classic mistake on curves that have one: the slope of the
            log-log plot is far too small (0.12 instead of 0.34 on $1.7 + 30 x^{-0.34}$ for $x$ from $10^3$ to $10^6$).
        weights: $w \ge 0$, `(n,)`, such as inverse variances of $\log y$; points with 0 are left out. None: all alike.
        bootstrap: number of replicates; 0 for none.
        seed: of the replicates.

    Returns:
        The fit. Its `warnings` say when $x$ spans less than a decade, when $E$ is not identified (its interval
        reaches to 1 % of the smallest $y$, is wider than $\pm 30$ %, or that of $\alpha$ includes 0), and when the
        interval of $\alpha$ is that wide or includes 0.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: fewer than 4 points of positive weight, $x$ not strictly increasing, a value not positive or not
            finite, a weight negative, or lengths that differ.

    Numerics:
        float64. The objective is minimized by least squares first ($\delta = 0.1$), then with $\delta = 0.01$ and
        $10^{-3}$. An $E$ that the data do not need comes out as a number close to 0, not as 0. Without noise the
        parameters are found to about $10^{-9}$.

    Cost:
        All starts and replicates are one batch: about half a second of one core for 20 points and 200 replicates.

    Differences:
        The unknowns are few, so the inverse Hessian is held whole (BFGS) where the papers use a limited memory.
        Residuals are resampled, not points: with a dozen points, a sample of points often lacks an end of the curve.

    Source:
        "基于量子化假设推导模型的尺度定律" (2023-05-18); objective of arXiv 2203.15556, section 3.3.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import fit_power_law
        >>> x = torch.logspace(3, 6, 12, dtype=torch.float64)
        >>> fit = fit_power_law(x, 1.7 + 30 * x**-0.34, bootstrap=20)
        >>> round(fit.alpha, 6), round(fit.E, 6), fit.warnings
        (0.34, 1.7, ())
    """
    places, values = _points("x", x), _points("y", y)
    _check_fit(len(places), {"x": places, "y": values}, 4)
    weight = _weights(weights, len(places))
    if not bool((places.diff() > 0).all()):
        raise ValueError("x must be strictly increasing")
    kept = weight > 0
    if int(kept.sum()) < 4:
        raise ValueError(f"weights must leave at least 4 points, got {int(kept.sum())}")
    fit = _fit(places[None, kept], values[kept], weight[kept], irreducible, bootstrap, seed)
    A, alpha, E = fit.values
    intervals = _intervals(("A", "alpha", "E"), fit.replicates, fit.freedom)
    return PowerLawFit(
        alpha=alpha,
        A=A,
        E=E,
        intervals=intervals,
        objective=fit.objective,
        warnings=(
            *_range_warnings({"x": places[kept]}),
            *_warnings({"alpha": alpha, **({"E": E} if irreducible else {})}, intervals, float(values.min())),
        ),
        freedom=fit.freedom,
        replicates=fit.replicates[:, [1, 0, 2]],
    )


def fit_joint(
    N: Sequence[float] | Tensor,
    D: Sequence[float] | Tensor,
    L: Sequence[float] | Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> JointFit:
    r"""Fit $L = E + A N^{-\alpha} + B D^{-\beta}$ robustly in log space, with intervals.

    Definition:
        As [`fit_power_law`][danlu.diagnostics.fit_power_law], with
        $\operatorname{logsumexp}(\log A - \alpha \log N_i,\ \log B - \beta \log D_i,\ \log E)$.

    Args:
        N: parameters, `(n,)`, positive, at least 3 different values, $n \ge 6$.
        D: samples, `(n,)`, positive, at least 3 different values.
        L: loss, `(n,)`, positive.
        weights: $w \ge 0$, `(n,)`; None: all alike.
        bootstrap: number of replicates; 0 for none.
        seed: of the replicates.

    Returns:
        The fit, with warnings as in `fit_power_law`.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: fewer than 6 points, fewer than 3 values of $N$ or $D$, $N$ and $D$ proportional powers of each
            other, a value not positive or not finite, a weight negative, or lengths that differ.

    Numerics:
        As in `fit_power_law`.

    Cost:
        About three times `fit_power_law`.

    Source:
        arXiv 2203.15556, section 3.3; used by arXiv 2303.13506 to compare exponents.

    Example:
        See [`JointFit`][danlu.diagnostics.JointFit].
    """
    params, samples, values = _points("N", N), _points("D", D), _points("L", L)
    _check_fit(len(params), {"N": params, "D": samples, "L": values}, 6)
    weight = _weights(weights, len(params))
    kept = weight > 0
    params, samples, values, weight = params[kept], samples[kept], values[kept], weight[kept]
    if len(values) < 6:
        raise ValueError(f"weights must leave at least 6 points, got {len(values)}")
    for name, column in {"N": params, "D": samples}.items():
        if len(column.unique()) < 3:
            raise ValueError(f"{name} must have at least 3 different values, got {len(column.unique())}")
    places = torch.stack([params, samples])
    if abs(float(torch.corrcoef(places.log())[0, 1])) > 1 - 1e-9:
        raise ValueError("N and D must not be powers of each other: their terms cannot be told apart")
    fit = _fit(places, values, weight, True, bootstrap, seed)
    A, alpha, B, beta, E = fit.values
    intervals = _intervals(("A", "alpha", "B", "beta", "E"), fit.replicates, fit.freedom)
    return JointFit(
        alpha=alpha,
        beta=beta,
        A=A,
        B=B,
        E=E,
        intervals=intervals,
        objective=fit.objective,
        warnings=(
            *_range_warnings({"N": params, "D": samples}),
            *_warnings({"alpha": alpha, "beta": beta, "E": E}, intervals, float(values.min())),
        ),
        freedom=fit.freedom,
        replicates=fit.replicates[:, [1, 3, 0, 2, 4]],
    )


def check_quanta_relation(fitN: PowerLawFit, fitD: PowerLawFit) -> QuantaRelation:
    r"""Test $\alpha_D = \alpha_N/(1+\alpha_N)$, the relation that the quantization hypothesis predicts.

    Definition:
        $\alpha_D^{(r)} - \alpha_N^{(r)}/(1+\alpha_N^{(r)})$ over the bootstrap replicates $r$ of two fits to
        independent runs; consistent if 0 lies between the 2.5 % and 97.5 % quantiles.

    Args:
        fitN: fit of the loss in the number of parameters, with a bootstrap.
        fitD: fit of the loss in the number of samples, with a bootstrap.

    Returns:
        The difference, its interval, and what follows.

    Raises:
        TypeError: an argument is not a `PowerLawFit`.
        ValueError: a fit has no replicates.

    Numerics:
        float64. The replicates are paired in their order; with different numbers, the first of the longer are used.
        A fit of which an exponent is not above $-1$ in some replicate has no interval there: it counts as infinite.

    Source:
        "基于量子化假设推导模型的尺度定律" (2023-05-18); arXiv 2303.13506, section 2.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import check_quanta_relation, fit_power_law
        >>> x = torch.logspace(2, 5, 8, dtype=torch.float64)
        >>> relation = check_quanta_relation(
        ...     fit_power_law(x, 1 + x**-1.0, bootstrap=10), fit_power_law(x, 1 + x**-0.5, bootstrap=10)
        ... )
        >>> round(relation.predicted, 6), abs(relation.difference) < 1e-6, relation.excludes_equality
        (0.5, True, True)
    """
    for name, fit in {"fitN": fitN, "fitD": fitD}.items():
        if not isinstance(fit, PowerLawFit):
            raise TypeError(f"{name} must be a PowerLawFit, got {type(fit).__name__}")
        if len(fit.replicates) < 2:
            raise ValueError(f"{name} must have a bootstrap of at least 2 replicates, got {len(fit.replicates)}")
    count = min(len(fitN.replicates), len(fitD.replicates))
    params, data = fitN.replicates[:count, 0], fitD.replicates[:count, 0]
    predicted = torch.where(params > -1, params / (1 + params), -torch.inf)
    freedom = min(fitN.freedom, fitD.freedom)
    interval, apart = _interval(data - predicted, freedom), _interval(data - params, freedom)
    center = fitN.alpha / (1 + fitN.alpha) if fitN.alpha > -1 else -math.inf
    # Fits without noise have intervals of no width: rounding is no contradiction.
    slack = 1e-6
    return QuantaRelation(
        alpha_params=fitN.alpha,
        alpha_data=fitD.alpha,
        predicted=center,
        difference=fitD.alpha - center,
        interval=interval,
        consistent=interval[0] - slack <= 0 <= interval[1] + slack,
        excludes_equality=not apart[0] - slack <= 0 <= apart[1] + slack,
    )


@dataclass(frozen=True)
class _Fit:
    """Parameters in the order of the terms, and those of the replicates."""

    values: list[float]
    objective: float
    replicates: Tensor
    freedom: int


def _fit(places: Tensor, values: Tensor, weight: Tensor, irreducible: bool, bootstrap: int, seed: int) -> _Fit:
    if not isinstance(irreducible, bool):
        raise TypeError(f"irreducible must be a bool, got {type(irreducible).__name__}")
    check_integer("bootstrap", bootstrap, low=0)
    check_integer("seed", seed, low=0)
    model = SumOfPowers(places.log(), weight / weight.mean(), constant=irreducible, delta=_DELTA)
    log_y = values.log()
    unknowns, objective = model.minimize(model.starts(log_y[None]), log_y[None])
    replicates = torch.empty(0, 2 * len(places) + 1, dtype=torch.float64)
    if bootstrap:
        again = resample(model, unknowns[0], log_y, bootstrap, seed)
        others = model.starts(again)
        others = others[:: max(1, len(others) // _REPLICATE_STARTS)]
        start = torch.cat([unknowns.expand(1, bootstrap, -1), others])
        replicates = model.natural(model.minimize(start, again)[0])
    return _Fit(model.natural(unknowns[0]).tolist(), float(objective), replicates, len(log_y) - unknowns.shape[-1])


def _points(name: str, values: Sequence[float] | Tensor) -> Tensor:
    found = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    if found.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {tuple(found.shape)}")
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got dtype {found.dtype}")
    return found.double()


def _positive(name: str, value: float | Tensor) -> Tensor:
    found = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if not bool((found > 0).all()):
        raise ValueError(f"{name} must be positive, got {float(found.min())}")
    return found


def _check_fit(count: int, columns: Mapping[str, Tensor], fewest: int) -> None:
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{name} must have the length of {next(iter(columns))}, got {len(values)} and {count}")
    if count < fewest:
        raise ValueError(f"at least {fewest} points are needed, got {count}")
    for name, values in columns.items():
        bad = values[~(values.isfinite() & (values > 0))]
        if len(bad):
            raise ValueError(f"{name} must be positive and finite, got {float(bad[0])}")


def _weights(weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count, dtype=torch.float64)
    found = _points("weights", weights)
    if len(found) != count:
        raise ValueError(f"weights must have the length of the points, got {len(found)} and {count}")
    bad = found[~(found.isfinite() & (found >= 0))]
    if len(bad):
        raise ValueError(f"weights must be non-negative and finite, got {float(bad[0])}")
    return found


def _interval(values: Tensor, freedom: int) -> Interval:
    """Percentiles, moved outward as Student's t moves the normal ones ("expanded percentile", Hesterberg 2015)."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(_CONFIDENCE, dtype=torch.float64)))
    n = max(1, freedom)
    # Cornish-Fisher expansion of the t quantile; where it is rough (n < 3) the ends are the extreme replicates anyway.
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    tail = 0.5 * math.erfc(t / math.sqrt(2))
    ends = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype))
    return float(ends[0]), float(ends[1])


def _intervals(names: Sequence[str], replicates: Tensor, freedom: int) -> dict[str, Interval]:
    if not len(replicates):
        return {}
    return {name: _interval(replicates[:, i], freedom) for i, name in enumerate(names)}


def _range_warnings(places: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, values in places.items():
        decades = float((values.max() / values.min()).log10())
        if decades < 1 - 1e-9:
            found.append(f"{name} spans {decades:.2g} decades; an exponent needs at least one")
    return found


def _warnings(values: Mapping[str, float], intervals: Mapping[str, Interval], smallest: float) -> list[str]:
    found = []
    constant_term = False
    for name, value in values.items():
        if name not in intervals:
            continue
        low, high = intervals[name]
        # Without noise an exponent of 0 comes out as a rounding error, with an interval of no width.
        flat = low - _ROUNDING <= 0 <= high + _ROUNDING
        wide = high - low > 2 * _TOO_WIDE * abs(value)
        shown = f"95 % interval {low:.3g} to {high:.3g}"
        # A term that does not fall cannot be told from E.
        constant_term |= name != "E" and flat
        if name == "E" and (low < 0.01 * smallest or wide or constant_term):
            found.append(f"E is not identified: {shown}, smallest value {smallest:.3g}")
        elif name != "E" and flat:
            found.append(f"{name} is not distinguished from 0: {shown}")
        elif name != "E" and wide:
            found.append(f"{name} is uncertain by more than {100 * _TOO_WIDE:.0f} %: {shown}")
    return found
