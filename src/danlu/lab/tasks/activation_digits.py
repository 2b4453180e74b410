"""Classification of scikit-learn's digits by a network whose activation is an option, and the time of its steps."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.activations import SquarePlus
from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["ActivationDigits"]

_TRAIN, _VALIDATION = 900, 200
_ACTIVATIONS: Mapping[str, Callable[[float], nn.Module]] = {
    "relu": lambda b: nn.ReLU(),
    "softplus": lambda b: nn.Softplus(),
    "gelu": lambda b: nn.GELU(),
    "silu": lambda b: nn.SiLU(),
    "squareplus": SquarePlus,
    "learned_squareplus": lambda b: SquarePlus(b, learnable=True),
}


@dataclass(frozen=True)
class ActivationDigits:
    """8x8 digits, batches with replacement of `batch_size`; the split is drawn by seed.

    The `network` is "mlp", of layers 64-width-width-10, or "cnn": 3x3 convolutions to `channels` and, by strides of
    two, to twice as many, and a linear layer. `activation` names the function and `b` is the width of SquarePlus's
    bend, where "learned_squareplus" begins.

    Metrics: `accuracy`, `negative_log_likelihood` (nats), and `milliseconds_per_step`, the median over the steps of
    the thread's time on its processor. The last is a measurement, which does not repeat to the last bit.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "activation_digits"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {"activation": "relu", "b": 4.0, "network": "mlp", "width": 256}
        own |= {"channels": 16, "batch_size": 100, "device": "cpu"}
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = digits(seed=0, train=_TRAIN, validation=_VALIDATION)
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": data.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        name = str(options["activation"])
        if name not in _ACTIVATIONS:
            raise TrialError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
        data = digits(seed=seed, train=_TRAIN, validation=_VALIDATION)
        device = training_device(options)
        images, labels = (torch.from_numpy(a).to(device) for a in (data.train_inputs, data.train_targets))
        batch_size = int(options["batch_size"])
        torch.manual_seed(seed)
        model = _network(options, lambda: _ACTIVATIONS[name](float(options["b"]))).to(device)

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step))
            return F.cross_entropy(model(images[rows]), labels[rows])

        optimizer = make_optimizer(model, options)
        return _Fit(
            model, optimizer, loss=loss, schedule=lambda step: set_learning_rate(optimizer, options, step, steps)
        )

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        data = digits(seed=seed, train=_TRAIN, validation=_VALIDATION)
        held_out = (data.validation_inputs, data.validation_targets)
        arrays = held_out if split == "validation" else (data.test_inputs, data.test_targets)
        images, labels = (torch.from_numpy(a).to(training_device(options)) for a in arrays)
        fit.model.eval()
        logits = fit.model(images).double()
        times = cast("list[float]", cast("dict[str, object]", fit.state()["memory"]).get("milliseconds", []))
        return {
            "accuracy": float((logits.argmax(-1) == labels).double().mean()),
            "negative_log_likelihood": float(F.cross_entropy(logits, labels)),
            "milliseconds_per_step": statistics.median(times) if times else 0.0,
        }


def _network(options: Options, activation: Callable[[], nn.Module]) -> nn.Sequential:
    if options["network"] == "mlp":
        width = int(options["width"])
        layers: list[nn.Module] = [nn.Linear(64, width), activation(), nn.Linear(width, width), activation()]
        return nn.Sequential(*layers, nn.Linear(width, 10))
    if options["network"] != "cnn":
        raise TrialError(f"network must be 'mlp' or 'cnn', got {options['network']!r}")
    channels = int(options["channels"])
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), activation()]
    layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), activation(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * channels * 16, 10))


class _Fit(GradientFit):
    """A `GradientFit` that remembers how long its steps took."""

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        started = time.thread_time()
        point = super().step(index)
        times = cast("list[float]", self.memory.setdefault("milliseconds", []))
        self.memory["milliseconds"] = [*times, 1e3 * (time.thread_time() - started)]
        return point
