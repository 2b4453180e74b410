r"""The quantization model of scaling: skills with Zipf frequencies, learned in the order of their use.

Source: "基于量子化假设推导模型的尺度定律" (2023-05-18); arXiv 2303.13506.

Shape letters: `...` any shape of a resource (quanta, parameters, samples, steps).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_real

__all__ = ["Emergence", "QuantaModel", "ScalingExponents"]

Tail = Literal["exact", "midpoint", "asymptotic"]

# B_2j / (2j)! of the Euler-Maclaurin formula. With the sum started at 17 or later the next term is below 1e-17.
_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)
_DIRECT_TERMS = 16


@dataclass(frozen=True)
class ScalingExponents:
    r"""Exponents of the three scaling laws of a [`QuantaModel`][danlu.diagnostics.QuantaModel].

    Definition:
        $L - a \propto N^{-\alpha_N},\ D^{-\alpha_D},\ S^{-\alpha_S}$ with
        $\alpha_N = \gamma$, $\alpha_D = \gamma/(\gamma+1)$, $\alpha_S = \gamma/(q(\gamma+1))$.

    Args:
        params: $\alpha_N$, in the number of parameters.
        data: $\alpha_D$, in the number of samples of a single pass.
        steps: $\alpha_S$, in the number of steps.

    Numerics:
        Python floats.

    Source:
        arXiv 2303.13506, section 2; the factor $q$ is ours.

    Example:
        >>> from danlu.diagnostics import QuantaModel
        >>> QuantaModel(1.0).exponents(q=0.5)
        ScalingExponents(params=1.0, data=0.5, steps=1.0)
    """

    params: float
    data: float
    steps: float


@dataclass(frozen=True)
class Emergence:
    r"""Where quantum $k$ is learned, and what that does to the mean loss.

    Definition:
        $N_k = Ck$, $D_k = \tau / p_k$, $S_k = \tau / (B\,p_k^q)$; there the mean loss falls by $(b-a)\,p_k$, and the
        loss of the samples that use the quantum falls from $b$ to $a$.

    Args:
        quantum: $k$.
        frequency: $p_k$.
        drop: fall of the mean loss, in the unit of $a$ and $b$.
        params: $N_k$.
        samples: $D_k$.
        steps: $S_k$.

    Numerics:
        Python floats.

    Source:
        arXiv 2303.13506, section 2.

    Example:
        >>> from danlu.diagnostics import QuantaModel
        >>> one = QuantaModel(1.0, K=2).emergence(2, C=10.0)
        >>> one.params, round(one.frequency, 6), round(one.samples, 6)
        (20.0, 0.2, 5.0)
    """

    quantum: int
    frequency: float
    drop: float
    params: float
    samples: float
    steps: float


@dataclass(frozen=True)
class QuantaModel:
    r"""Mean loss of a model that has learned the $n$ most frequent of $K$ skills ("quanta").

    Definition:
        $$p_k = \frac{k^{-\gamma-1}}{Z}, \qquad Z = \sum_{k=1}^{K} k^{-\gamma-1}, \qquad
        L(n) = a + (b-a) \sum_{k>n} p_k = a + \frac{b-a}{Z}\,[\zeta(\gamma+1,\,n+1) - \zeta(\gamma+1,\,K+1)]$$
        with the Hurwitz zeta function, which also gives a meaning to an $n$ that is no integer. The number of quanta
        follows from the resource that limits it:

        - parameters, $C$ for each quantum: $n = N/C$, so $\alpha_N = \gamma$;
        - samples of a single pass, $\tau$ uses to learn a quantum: $D p_n = \tau$, so $\alpha_D = \gamma/(\gamma+1)$;
        - steps of $B$ samples: $S B\,p_n^q = \tau$, so $\alpha_S = \gamma/(q(\gamma+1))$. The theory has $q = 1$; an
          optimizer that learns rare quanta in fewer uses has $q < 1$.

        Hence $\alpha_D = \alpha_N/(1+\alpha_N) < \alpha_N$.

    Args:
        gamma: $\gamma > 0$; the frequencies are those of Zipf with exponent $\gamma + 1$.
        a: loss of a sample whose quantum is learned (any unit of loss).
        b: $b > a$, loss of a sample whose quantum is not.
        K: number of quanta, an int $\ge 1$ or infinity.

    Raises:
        TypeError: an argument is not a number.
        ValueError: `gamma` is not positive, `b` not above `a`, or `K` not a count.

    Numerics:
        float64. The zeta function is computed by the Euler-Maclaurin formula, to a few units in the last place. Close
        to a finite $K$ the tail is a difference: its absolute error stays at rounding, its relative error does not.

    Cost:
        $17 + \gamma$ powers for each element.

    Differences:
        The paper approximates the tail by $n^{-\gamma}/\gamma$ and $K$ by infinity. Its tail is
        `tail="asymptotic"` here, 5 % too high at $n = 10$ for $\gamma = 1$; `"midpoint"` replaces $n$ by
        $n + \frac12$ and is within 0.08 %. A finite $K$ makes the log-log slope steeper as $n$ comes close to it.

    Source:
        "基于量子化假设推导模型的尺度定律" (2023-05-18, kexue.fm 9607); arXiv 2303.13506, section 2.

    Example:
        >>> import torch
        >>> from danlu.diagnostics import QuantaModel
        >>> model = QuantaModel(0.5, a=1.0, b=3.0)
        >>> model.loss(torch.tensor([0, 10, 1000]))
        tensor([3.0000, 1.4724, 1.0484], dtype=torch.float64)
        >>> model.loss_data(1e6, tau=100.0)
        tensor(1.0978, dtype=torch.float64)
    """

    gamma: float
    a: float = field(default=0.0, kw_only=True)
    b: float = field(default=1.0, kw_only=True)
    K: float = field(default=math.inf, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_real("gamma", self.gamma, low=0.0, low_open=True)
        check_real("b", self.b, low=check_real("a", self.a), low_open=True)
        if not (isinstance(self.K, float) and self.K > 0 and math.isinf(self.K)):
            check_integer("K", self.K, low=1)

    def frequency(self, k: float | Tensor) -> Tensor:
        r"""Frequency $p_k$ of quantum `k` $= 1, 2, \dots$, float64 of the shape of `k`; 0 beyond $K$."""
        rank = _resource("k", k, low=1.0)
        return torch.where(rank <= self.K, rank.pow(-self.gamma - 1) / self._norm(), 0.0)

    def loss(self, n: float | Tensor, *, tail: Tail = "exact") -> Tensor:
        r"""Mean loss with the `n` $\ge 0$ most frequent quanta learned, float64 of the shape of `n`.

        `tail` is "exact", "midpoint" for $[(n+\frac12)^{-\gamma} - (K+\frac12)^{-\gamma}]/\gamma$, or "asymptotic" for
        $[n^{-\gamma} - K^{-\gamma}]/\gamma$. Round `n` down for the staircase of whole quanta.
        """
        check_choice("tail", tail, ("exact", "midpoint", "asymptotic"))
        learned = _resource("n", n, low=0.0).clamp(max=self.K)
        total = learned.new_tensor(self.K)
        if tail == "exact":
            rest = _zeta(self.gamma + 1, learned + 1) - _zeta(self.gamma + 1, total + 1)
        else:
            shift = 0.5 if tail == "midpoint" else 0.0
            rest = ((learned + shift).pow(-self.gamma) - (total + shift).pow(-self.gamma)) / self.gamma
        return self.a + (self.b - self.a) * rest / self._norm()

    def loss_params(self, N: float | Tensor, C: float = 1.0) -> Tensor:
        """Mean loss of a model of `N` parameters, `C` for each quantum."""
        return self.loss(_resource("N", N, low=0.0) / check_real("C", C, low=0.0, low_open=True))

    def loss_data(self, D: float | Tensor, tau: float = 1.0) -> Tensor:
        """Mean loss after one pass over `D` samples, `tau` uses to learn a quantum."""
        return self.loss(self._quanta(_resource("D", D, low=0.0), tau, 1.0))

    def loss_steps(self, S: float | Tensor, B: float = 1.0, tau: float = 1.0, q: float = 1.0) -> Tensor:
        """Mean loss after `S` steps of `B` fresh samples, where quantum $k$ needs a time proportional to $p_k^{-q}$."""
        samples = _resource("S", S, low=0.0) * check_real("B", B, low=0.0, low_open=True)
        return self.loss(self._quanta(samples, tau, q))

    def exponents(self, q: float = 1.0) -> ScalingExponents:
        """Exponents of the scaling laws, for infinite $K$."""
        check_real("q", q, low=0.0, low_open=True)
        data = self.gamma / (self.gamma + 1)
        return ScalingExponents(params=float(self.gamma), data=data, steps=data / q)

    def emergence(self, k: int, *, C: float = 1.0, B: float = 1.0, tau: float = 1.0, q: float = 1.0) -> Emergence:
        r"""Where quantum `k` $\le K$ is learned; by default in units of `C`, `tau` and `tau / B`."""
        if check_integer("k", k, low=1) > self.K:
            raise ValueError(f"k must be at most K={self.K}, got {k}")
        for name, value in {"C": C, "B": B, "tau": tau, "q": q}.items():
            check_real(name, value, low=0.0, low_open=True)
        p = float(self.frequency(k))
        return Emergence(
            quantum=k, frequency=p, drop=(self.b - self.a) * p, params=C * k, samples=tau / p, steps=tau / (B * p**q)
        )

    def _norm(self) -> float:
        """$Z$."""
        ends = torch.tensor([0.0, self.K], dtype=torch.float64)
        first, rest = _zeta(self.gamma + 1, ends + 1).tolist()
        return first - rest

    def _quanta(self, samples: Tensor, tau: float, q: float) -> Tensor:
        r"""$n$ from $D\,p_n^q = \tau$."""
        check_real("tau", tau, low=0.0, low_open=True)
        check_real("q", q, low=0.0, low_open=True)
        return (samples / (tau * self._norm() ** q)).pow(1 / (q * (self.gamma + 1)))


def _zeta(s: float, q: Tensor) -> Tensor:
    r"""Hurwitz zeta $\sum_{j \ge 0} (q+j)^{-s}$ for $s > 1$, $q > 0$ in float64; 0 at infinite `q`."""
    # The asymptotic series needs (s + 12) / (2 pi (q + M)) to be small, so the direct sum grows with s.
    count = _DIRECT_TERMS + int(s)
    total = torch.zeros_like(q)
    for j in range(count):
        total += (q + j).pow(-s)
    x = q + count
    # Of the smaller terms first: each factor of x belongs to a product s (s+1) ... (s+2j-2).
    correction = torch.zeros_like(x)
    for j in reversed(range(len(_BERNOULLI))):
        rising = math.prod((s + i) for i in range(2 * j + 1))
        correction += _BERNOULLI[j] * rising * x.pow(-s - 2 * j - 1)
    return total + (correction + 0.5 * x.pow(-s) + x.pow(1 - s) / (s - 1))


def _resource(name: str, value: float | Tensor, *, low: float) -> Tensor:
    """`value` as a float64 tensor; raise unless all of it is at least `low`."""
    if not isinstance(value, Tensor):
        return torch.tensor(check_real(name, value, low=low), dtype=torch.float64)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got dtype {value.dtype}")
    found = value.detach().double()
    if not bool((found >= low).all()):
        raise ValueError(f"{name} must be at least {low:g}, got {float(found.min())}")
    return found
