"""Few digits with wrong labels, and a tanh network that can learn them by heart: what gradient penalties change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from danlu.diagnostics import gradient_penalty_bound
from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options
from danlu.losses import GradientPenalty

__all__ = ["GradientPenaltyDigits", "log_correlation"]

# Held-out rows for the gradients: the bound takes a singular value decomposition per row.
_ROWS = 200


@dataclass(frozen=True)
class GradientPenaltyDigits:
    r"""8x8 digits, a network 64-width-10 with tanh, SGD with momentum 0.9 and cosine decay, batches of `batch_size`.

    `penalty` is "none", "input", "batch", "batch_finite_difference" or "per_sample", with weight `strength`. Noise is
    symmetric and in training and validation labels; test labels are clean. An epoch is every training row once.

    Metrics on the split: `accuracy`; on its first 200 rows `input_gradient`, the mean over the samples of
    $\|\nabla_x \ell\|^2$; `parameter_gradient`, the mean of $\|\nabla_\theta \ell\|^2$; `log_correlation` of the two
    over the samples; `bound_ratio` and `tight_ratio`, the mean ratios of the inequality. On the training rows with
    their labels: `input_gradient@train` and `parameter_gradient@train`.
    """

    train: int = 150
    validation: int = 300

    @property
    def name(self) -> str:
        """Name for tables."""
        return "few noisy digits"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "penalty": "none",
            "strength": 0.0,
            "lr": 0.1,
            "label_noise": 0.2,
            "width": 128,
            "batch_size": 50,
            "device": "cpu",
        }

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = digits(seed=0, train=self.train, validation=self.validation)
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": data.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        images, labels = self._rows(seed, "train", options)
        torch.manual_seed(seed)
        width, batch_size = int(options["width"]), int(options["batch_size"])
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).to(images.device)
        optimizer = SGD(model.parameters(), lr=float(options["lr"]), momentum=0.9)
        penalty = _penalty(model, options)
        batches = math.ceil(len(images) / batch_size)

        def loss(step: int) -> Tensor:
            order = torch.randperm(len(images), generator=generator("epoch", seed, step // batches))
            rows = order[(step % batches) * batch_size :][:batch_size]
            x, y = images[rows].requires_grad_(penalty.input > 0), labels[rows]
            return penalty(lambda: F.cross_entropy(model(x), y, reduction="none"), x, step=step)

        def schedule(step: int) -> None:
            for group in optimizer.param_groups:
                group["lr"] = float(options["lr"]) * (1 + math.cos(math.pi * step / steps)) / 2

        return GradientFit(model, optimizer, loss=loss, schedule=schedule)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split, and of the gradients on the training rows."""
        images, labels = self._rows(seed, split, options)
        found = _gradients(fit.model, images[:_ROWS], labels[:_ROWS])
        with torch.no_grad():
            accuracy = float((fit.model(images).argmax(-1) == labels).double().mean())
        train = _gradients(fit.model, *self._rows(seed, "train", options))
        kept = {f"{name}@train": train[name] for name in ("input_gradient", "parameter_gradient")}
        return {"accuracy": accuracy, **found, **kept}

    def _rows(self, seed: int, split: str, options: Options) -> tuple[Tensor, Tensor]:
        data = digits(
            seed=seed, train=self.train, validation=self.validation, label_noise=float(options["label_noise"])
        )
        arrays = {
            "train": (data.train_inputs, data.train_targets),
            "validation": (data.validation_inputs, data.validation_targets),
            "test": (data.test_inputs, data.test_targets),
        }
        device = training_device(options)
        inputs, targets = arrays[split]
        return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


def _penalty(model: nn.Module, options: Options) -> GradientPenalty:
    strength = float(options["strength"])
    made = {
        "none": partial(GradientPenalty, model),
        "input": partial(GradientPenalty, model, input=strength),
        "batch": partial(GradientPenalty, model, parameter=strength),
        "batch_finite_difference": partial(
            GradientPenalty, model, parameter=strength, method="finite_difference", radius=1e-2
        ),
        "per_sample": partial(GradientPenalty, model, parameter=strength, scope="per_sample"),
    }
    name = options["penalty"]
    if name not in made:
        raise TrialError(f"unknown penalty {name!r}; known: {', '.join(made)}")
    return made[str(name)]()


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    bound = gradient_penalty_bound(
        model.double(), images.double(), lambda z: F.cross_entropy(z, labels, reduction="none")
    )
    model.float()
    tight = bound.tight_ratio
    return {
        "input_gradient": float(bound.input_gradient.mean()),
        "parameter_gradient": float(bound.rhs.mean()),
        "log_correlation": log_correlation(bound.input_gradient, bound.rhs),
        "bound_ratio": float(bound.ratio.mean()),
        "tight_ratio": math.nan if tight is None else float(tight.mean()),
    }


def log_correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the logarithms of two positive quantities over the samples, shape `(n,)` each."""
    tiny = torch.finfo(torch.float64).tiny
    logs = torch.stack([a.double().clamp(min=tiny).log(), b.double().clamp(min=tiny).log()])
    return float(torch.corrcoef(logs)[0, 1])
