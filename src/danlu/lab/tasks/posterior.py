"""Sampling a posterior by particles: Bayesian logistic regression, with a reference that is sampled for long."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.flows import KL, WassersteinFlow
from danlu.lab.data import breast_cancer
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import generator
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["LogisticPosterior", "reference_posterior", "step_lengths"]

_DENSITIES = ("langevin", "blob", "svgd", "gaussian")
_KERNELS = ("blob", "svgd")
# Of the reference: chains, steps that are thrown away, and steps that are kept.
_CHAINS, _BURN_IN, _KEPT = 1000, 100, 200
# Times of a run at which the covariance is kept: every hundredth of its flow time.
_RECORDS = 100


class _Target:
    r"""$\log p(\theta) = -\tfrac12\lVert\theta\rVert^2 + \sum_i \log\sigma(y_i\,(x_i, 1)\cdot\theta)$, batched."""

    def __init__(self, seed: int, train: int, dtype: torch.dtype) -> None:
        data = breast_cancer(seed=seed, train=train)
        self.rows = {
            "train": self._design(data.train_inputs, data.train_targets, dtype),
            "validation": self._design(data.validation_inputs, data.validation_targets, dtype),
            "test": self._design(data.test_inputs, data.test_targets, dtype),
        }

    @staticmethod
    def _design(inputs: object, targets: object, dtype: torch.dtype) -> Tensor:
        r"""Rows of $y\,(x, 1)$."""
        x, y = torch.as_tensor(inputs, dtype=dtype), torch.as_tensor(targets, dtype=dtype)
        return torch.cat([x, torch.ones(len(x), 1, dtype=dtype)], 1) * (2 * y - 1)[:, None]

    def __call__(self, theta: Tensor) -> Tensor:
        return F.logsigmoid(theta @ self.rows["train"].T).sum(-1) - theta.square().sum(-1) / 2

    def negative_log_likelihood(self, theta: Tensor, split: str) -> float:
        """Of the held-out labels under the particles' mean prediction, nats per label."""
        predicted = F.logsigmoid(theta @ self.rows[split].T)
        return -float((predicted.logsumexp(0) - math.log(len(theta))).mean())


@lru_cache(maxsize=16)
def reference_posterior(seed: int, train: int, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the posterior, float64, by a Metropolis-adjusted Langevin algorithm.

    Chains start at the Laplace approximation, whose covariance also shapes their steps; the acceptance step leaves the
    posterior exactly invariant, so the only error is that of 200 000 correlated draws. The chains run in float32.

    Args:
        seed: of the split of the data.
        train: its training rows.
        stream: another value gives another, independent estimate.
    """
    target = _Target(seed, train, torch.float64)
    single = _Target(seed, train, torch.float32)
    design = target.rows["train"]
    identity = torch.eye(design.shape[1], dtype=torch.float64)
    mode = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(50):
        slope = torch.sigmoid(-(design @ mode))
        hessian = design.T @ (design * (slope * (1 - slope))[:, None]) + identity
        mode = mode + torch.linalg.solve(hessian, design.T @ slope - mode)
    root = torch.linalg.cholesky(torch.linalg.inv(hessian))
    random = generator("posterior", seed, stream)
    shape = (_CHAINS, len(mode))
    center, spread, rows = mode.float(), root.float(), single.rows["train"]

    def state(z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient in coordinates where the Laplace approximation is standard normal."""
        theta = center + z @ spread.T
        slope = torch.sigmoid(-(theta @ rows.T))
        return single(theta), (slope @ rows - theta) @ spread

    step = 1.0 / len(mode) ** (1 / 3)
    z = torch.randn(shape, generator=random)
    log_p, gradient = state(z)
    total, squares = torch.zeros_like(mode), torch.zeros_like(identity)
    for index in range(_BURN_IN + _KEPT):
        proposal = z + step / 2 * gradient + step**0.5 * torch.randn(shape, generator=random)
        new_log_p, new_gradient = state(proposal)
        forth = (proposal - z - step / 2 * gradient).square().sum(-1)
        back = (z - proposal - step / 2 * new_gradient).square().sum(-1)
        log_ratio = new_log_p - log_p + (forth - back) / (2 * step)
        taken = torch.rand(_CHAINS, generator=random).log() < log_ratio
        z = torch.where(taken[:, None], proposal, z)
        gradient = torch.where(taken[:, None], new_gradient, gradient)
        log_p = torch.where(taken, new_log_p, log_p)
        if index >= _BURN_IN:
            wide = z.double()
            total += wide.sum(0)
            squares += wide.T @ wide
    count = _CHAINS * _KEPT
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    return mode + root @ mean, root @ covariance @ root.T


class _Particles(nn.Module):
    """The particles, as the weights of a model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


def step_lengths(steps: int, dt: float, growth: float) -> list[float]:
    """A geometric sequence with mean `dt`, whose last member is `growth` times the first."""
    powers = [growth ** (k / max(1, steps - 1)) for k in range(steps)]
    scale = dt * steps / sum(powers)
    return [scale * power for power in powers]


class _FlowFit:
    """Particles under a flow, one step of it per step, and their covariance at `_RECORDS` times of the run."""

    def __init__(self, x: Tensor, flow: WassersteinFlow, target: _Target, lengths: list[float], seed: int) -> None:
        self.model: nn.Module = _Particles(x)
        self.target = target
        self.covariances = x.new_full((_RECORDS, x.shape[1], x.shape[1]), math.nan)
        self._flow, self._lengths, self._seed = flow, lengths, seed
        # How many records are due after so many steps; rounding must not delay one.
        passed = list(accumulate(lengths, initial=0.0))
        self._due = [int(_RECORDS * time / passed[-1] * (1 + 1e-9)) for time in passed]

    @property
    def x(self) -> Tensor:
        """The particles."""
        return cast("_Particles", self.model).x

    @torch.no_grad()
    def step(self, index: int) -> dict[str, float]:
        """One step; the point of the curve is the mean negative log density before it."""
        x, dt = self.x.detach(), self._lengths[index]
        loss = -float(self.target(x).mean())
        try:
            random = generator("langevin", self._seed, index)
            self.x.copy_(self._flow.step(x, dt, generator=random if self._flow.density == "langevin" else None))
        except RuntimeError:
            # The step is too long for the flow: the particles are lost, and the fit counts as diverged.
            self.x.fill_(math.nan)
            loss = math.nan
        first, last = self._due[index : index + 2]
        if last > first:
            self.covariances[first:last] = self.x.T.cov(correction=0)
        return {"train_loss": loss}

    def state(self) -> dict[str, object]:
        """The particles and what was recorded of them."""
        return {"x": self.x.detach(), "covariances": self.covariances}

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            self.x.copy_(cast("Tensor", state["x"]))
            self.covariances.copy_(cast("Tensor", state["covariances"]))

    def optimizer_state(self) -> Iterator[Tensor]:
        """None: a flow remembers nothing."""
        yield from ()


@dataclass(frozen=True)
class LogisticPosterior:
    """Bayesian logistic regression on the breast cancer data, prior N(0, I), 31 dimensions.

    Particles start as draws of the prior; every step takes one gradient of the log posterior per particle. `dt` is the
    mean length of the steps, so that the flow time is `steps * dt` whatever their `growth`, the last length over the
    first; `bandwidth` is that of the kernels, a number or "median". Metrics against a reference sampled for long:
    `mean_error` (distance of the means over the root of the trace of the covariance), `covariance_error` (Frobenius
    norm of the difference over that of the covariance), `variance_ratio` (trace over trace), and
    `negative_log_likelihood` of held-out labels (nats per label). `log_density_deviation` is the standard deviation of
    the log density over the particles, in nats: moments may match where it tells that the cloud is no sample. Three
    more errors of the covariance tell whether the cloud has come to rest: `@half` at half of the flow time, `@late`,
    the mean from there to the end, and `@least`, the smallest on the way.
    """

    train: int = 400

    @property
    def name(self) -> str:
        """Name for tables."""
        return "logistic posterior"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "density": "langevin",
            "bandwidth": "median",
            "dt": 0.008,
            "growth": 1.0,
            "particles": 300,
        }
        return own

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = breast_cancer(train=self.train)
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": data.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        density = str(options["density"])
        if density not in _DENSITIES:
            raise TrialError(f"unknown density {density!r}; known: {', '.join(_DENSITIES)}")
        target = _Target(seed, self.train, torch.float32)
        shape = (int(options["particles"]), target.rows["train"].shape[1])
        bandwidth: float | None = None
        if density in _KERNELS and options["bandwidth"] != "median":
            bandwidth = float(options["bandwidth"])
        name = cast("Literal['langevin', 'blob', 'svgd', 'gaussian']", density)
        flow = WassersteinFlow(KL(target), density=name, bandwidth=bandwidth)
        x = torch.randn(shape, generator=generator("prior", seed))
        dt, growth = float(options["dt"]), float(options["growth"])
        return _FlowFit(x, flow, target, step_lengths(steps, dt, growth), seed)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics of the particles."""
        run = cast("_FlowFit", fit)
        x = run.x.detach().double()
        mean, covariance = reference_posterior(seed, self.train)
        found = x.T.cov(correction=0)
        trace = covariance.trace()
        course = (run.covariances.double() - covariance).norm(dim=(1, 2)) / covariance.norm()
        return {
            "mean_error": float((x.mean(0) - mean).norm() / trace.sqrt()),
            "covariance_error": float((found - covariance).norm() / covariance.norm()),
            "covariance_error@half": float(course[_RECORDS // 2 - 1]),
            "covariance_error@late": float(course[_RECORDS // 2 - 1 :].mean()),
            "covariance_error@least": float(course.nan_to_num(math.inf).min()),
            "variance_ratio": float(found.trace() / trace),
            "log_density_deviation": float(run.target(run.x.detach()).std()),
            "negative_log_likelihood": run.target.negative_log_likelihood(run.x.detach(), split),
        }
