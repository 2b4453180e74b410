"""Sampling a posterior by particles: Bayesian logistic regression, with a reference that is sampled for long."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.flows import KL, WassersteinFlow
from danlu.lab.data import breast_cancer
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import generator
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["LogisticPosterior", "reference_posterior"]

_DENSITIES = ("langevin", "blob", "svgd", "gaussian")
# Of the reference: chains, steps that are thrown away, and steps that are kept.
_CHAINS, _BURN_IN, _KEPT = 1000, 100, 200


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


class _FlowFit:
    """Particles under a flow, one step of it per step."""

    def __init__(self, x: Tensor, flow: WassersteinFlow, target: _Target, dt: float, seed: int) -> None:
        self.model: nn.Module = _Particles(x)
        self.target = target
        self._flow, self._dt, self._seed = flow, dt, seed

    @property
    def x(self) -> Tensor:
        """The particles."""
        return cast("_Particles", self.model).x

    @torch.no_grad()
    def step(self, index: int) -> dict[str, float]:
        """One step; the point of the curve is the mean negative log density before it."""
        x = self.x.detach()
        loss = -float(self.target(x).mean())
        try:
            random = generator("langevin", self._seed, index)
            self.x.copy_(self._flow.step(x, self._dt, generator=random if self._flow.density == "langevin" else None))
        except RuntimeError:
            # The step is too long for the flow: the particles are lost, and the fit counts as diverged.
            self.x.fill_(math.nan)
            loss = math.nan
        return {"train_loss": loss}

    def state(self) -> dict[str, object]:
        """The particles."""
        return {"x": self.x.detach()}

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            self.x.copy_(cast("Tensor", state["x"]))

    def optimizer_state(self) -> Iterator[Tensor]:
        """None: a flow remembers nothing."""
        yield from ()


@dataclass(frozen=True)
class LogisticPosterior:
    """Bayesian logistic regression on the breast cancer data, prior N(0, I), 31 dimensions.

    Particles start as draws of the prior; every step takes one gradient of the log posterior per particle. Metrics
    against a reference sampled for long: `mean_error` (distance of the means over the root of the trace of the
    covariance), `covariance_error` (Frobenius norm of the difference over that of the covariance), `variance_ratio`
    (trace over trace), and `negative_log_likelihood` of held-out labels (nats per label).
    """

    train: int = 400

    @property
    def name(self) -> str:
        """Name for tables."""
        return "logistic posterior"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {"density": "langevin", "dt": 0.005, "particles": 300}
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
        flow = WassersteinFlow(KL(target), density=cast("Literal['langevin', 'blob', 'svgd', 'gaussian']", density))
        x = torch.randn(shape, generator=generator("prior", seed))
        return _FlowFit(x, flow, target, float(options["dt"]), seed)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics of the particles."""
        run = cast("_FlowFit", fit)
        x = run.x.detach().double()
        mean, covariance = reference_posterior(seed, self.train)
        found = x.T.cov(correction=0)
        trace = covariance.trace()
        return {
            "mean_error": float((x.mean(0) - mean).norm() / trace.sqrt()),
            "covariance_error": float((found - covariance).norm() / covariance.norm()),
            "variance_ratio": float(found.trace() / trace),
            "negative_log_likelihood": run.target.negative_log_likelihood(run.x.detach(), split),
        }
