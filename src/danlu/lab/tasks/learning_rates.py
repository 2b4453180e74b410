"""Digits learned at many learning rates at once, optionally with a shift of the pixels halfway."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options
from danlu.optim import EGStepSize

__all__ = ["LearningRates", "Sweep", "sweep_metrics"]

# A learning rate is usable where the accuracy is at least this.
_USABLE = 0.9
# Log-spaced learning rates up to this count as low.
_LOW = 0.0101


class Sweep(nn.Module):
    """One network per learning rate, equal at the start; the output is `(rates, batch, 10)`."""

    def __init__(self, rates: int, width: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        self.networks = nn.ModuleList(copy.deepcopy(first) for _ in range(rates))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all networks."""
        return torch.stack([network(images) for network in self.networks])


@dataclass(frozen=True)
class LearningRates:
    """8x8 digits, networks 64-width-width-10 with ReLU, the same batches for every learning rate of the sweep.

    One fit trains all networks of the sweep, each with its own parameter group. The sweep is what is measured and not
    tuning: every arm is judged at every rate. Where a best rate is named, it is the one of the highest validation
    accuracy of the same seed, which every arm chooses from equally many. With `shift` the pixels are permuted after
    half of the steps, in training and in what is evaluated.

    Metrics: `accuracy@<rate>` and `train_loss@<rate>` (nats, on the training images) for every rate; `accuracy@low`
    and `train_loss@low`, their means over the rates up to 0.01; `accuracy@best`; `rate@best`; `usable_decades`, the
    distance from the lowest to the highest rate that reaches an accuracy of 0.9.
    """

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
    train: int = 1200
    validation: int = 200

    @property
    def name(self) -> str:
        """Name for tables."""
        return "digits at many learning rates"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "optimizer": "sgdm",
            "schedule": "constant",
            "gain_lr": 0.01,
            "scale_lr": 0.01,
            "shift": False,
            "width": 64,
            "batch_size": 64,
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
        data = digits(seed=seed, train=self.train, validation=self.validation)
        device = training_device(options)
        images, labels = (torch.from_numpy(a).to(device) for a in (data.train_inputs, data.train_targets))
        moved = images[:, _permutation(seed).to(device)] if options["shift"] else images
        torch.manual_seed(seed)
        model = Sweep(len(self.rates), int(options["width"])).to(device)
        groups: list[dict[str, Any]] = [
            {"params": list(network.parameters()), "lr": rate}
            for network, rate in zip(model.networks, self.rates, strict=True)
        ]
        optimizer = _optimizer(groups, options)
        batch_size = int(options["batch_size"])

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step)).to(device)
            shown = moved if 2 * step >= steps else images
            # A sum, so that every network learns as if it were alone.
            return _losses(model(shown[rows]), labels[rows]).sum()

        def schedule(step: int) -> None:
            factor = _factor(str(options["schedule"]), step, steps)
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor

        return GradientFit(model, optimizer, loss=loss, schedule=schedule)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split; the best rate is always chosen on the validation split."""
        data = digits(seed=seed, train=self.train, validation=self.validation)
        device = training_device(options)
        order = _permutation(seed) if options["shift"] else torch.arange(64)
        arrays = {
            "train": (data.train_inputs, data.train_targets),
            "validation": (data.validation_inputs, data.validation_targets),
            "test": (data.test_inputs, data.test_targets),
        }
        logits: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, (inputs, targets) in arrays.items():
                logits[name] = fit.model(torch.from_numpy(inputs)[:, order].to(device)).double().cpu()
                labels[name] = torch.from_numpy(targets)
        accuracies = {n: (logits[n].argmax(-1) == labels[n]).double().mean(-1).tolist() for n in arrays}
        train_losses = _losses(logits["train"], labels["train"]).tolist()
        return sweep_metrics(self.rates, accuracies[split], accuracies["validation"], train_losses)


def sweep_metrics(
    rates: tuple[float, ...], accuracies: list[float], validation: list[float], train_losses: list[float]
) -> dict[str, float]:
    """The metrics of a sweep from what was measured at every rate; a diverged loss counts as that of guessing."""
    losses = [loss if math.isfinite(loss) else math.log(10) for loss in train_losses]
    found = {f"accuracy@{rate:g}": value for rate, value in zip(rates, accuracies, strict=True)}
    found |= {f"train_loss@{rate:g}": value for rate, value in zip(rates, losses, strict=True)}
    low = [i for i, rate in enumerate(rates) if rate <= _LOW]
    if low:
        found["accuracy@low"] = sum(accuracies[i] for i in low) / len(low)
        found["train_loss@low"] = sum(losses[i] for i in low) / len(low)
    best = max(range(len(rates)), key=lambda i: validation[i])
    found["accuracy@best"], found["rate@best"] = accuracies[best], rates[best]
    usable = [rates[i] for i, accuracy in enumerate(accuracies) if accuracy >= _USABLE]
    found["usable_decades"] = math.log10(max(usable) / min(usable)) if usable else 0.0
    return found


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of every network, shape `(rates,)`."""
    wanted = labels.expand(len(logits), -1)
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(-1)


def _permutation(seed: int) -> Tensor:
    return torch.randperm(64, generator=generator("pixels", seed))


def _factor(schedule: str, step: int, steps: int) -> float:
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    raise TrialError(f"unknown schedule {schedule!r}; known: constant, cosine")


def _optimizer(groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """SGD with momentum 0.9 or Adam, with adapted step sizes where the name begins with `eg_`."""
    name = str(options["optimizer"])
    if name == "sgdm":
        return SGD(groups, momentum=0.9)
    if name == "adam":
        return Adam(groups)
    if name in ("eg_sgdm", "eg_adam"):
        inner = cast("Literal['sgdm', 'adam']", name.removeprefix("eg_"))
        return EGStepSize(inner, groups, gain_lr=float(options["gain_lr"]), scale_lr=float(options["scale_lr"]))
    raise TrialError(f"unknown optimizer {name!r}; known: sgdm, adam, eg_sgdm, eg_adam")
