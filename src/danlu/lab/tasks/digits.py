"""Classification of scikit-learn's digits by a small network, with optional label noise in training."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.losses import generalized_cross_entropy, tailr_loss, tailr_unbias

__all__ = ["Digits", "calibration_error"]

_BINS = 15


@dataclass(frozen=True)
class Digits:
    """8x8 digits, a network 64-width-width-10 with ReLU, batches with replacement of `batch_size`.

    The split and the noise are drawn anew for every seed. Noise is symmetric (a wrong label is any of the other
    nine) and is in the training *and* the validation labels, as it is where labels are bad; test labels are clean.

    Metrics, each for the weights `@last_step` and for those `@best_validation` (the epoch of the highest validation
    accuracy, i.e. early stopping): `accuracy`, `expected_calibration_error` (15 equal bins of confidence),
    `unbiased_calibration_error` (the same after `tailr_unbias`, with the loss "tailr" only),
    `negative_log_likelihood` (nats).

    `loss` is "cross_entropy" with `smoothing`, "generalized_cross_entropy" with `q`, or "tailr" with `gamma`, to which
    it rises from 0 over the share `gamma_rise` of the steps.
    """

    train: int = 900
    validation: int = 200

    @property
    def name(self) -> str:
        """Name for tables."""
        return "digits"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "loss": "cross_entropy",
            "gamma": 0.0,
            "gamma_rise": 0.0,
            "smoothing": 0.0,
            "q": 0.7,
            "label_noise": 0.0,
            "width": 256,
            "batch_size": 100,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

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
        data = digits(
            seed=seed, train=self.train, validation=self.validation, label_noise=float(options["label_noise"])
        )
        device = training_device(options)
        images, labels = (torch.from_numpy(a).to(device) for a in (data.train_inputs, data.train_targets))
        batch_size = int(options["batch_size"])
        loss_of = _loss(options, steps)
        torch.manual_seed(seed)
        width = int(options["width"])
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step))
            return loss_of(step, model(images[rows]), labels[rows])

        optimizer = make_optimizer(model, options)
        fit = GradientFit(
            model,
            optimizer,
            loss=loss,
            schedule=lambda step: set_learning_rate(optimizer, options, step, steps),
        )
        held_out = [torch.from_numpy(a).to(device) for a in (data.validation_inputs, data.validation_targets)]
        epoch = math.ceil(len(images) / batch_size)

        def observe(done: int) -> dict[str, float]:
            if done % epoch and done != steps:
                return {}
            accuracy = _metrics(model, held_out[0], held_out[1])["accuracy"]
            if accuracy > cast("float", fit.memory.get("accuracy", -1.0)):
                fit.memory = {
                    "accuracy": accuracy,
                    "model": {name: value.clone() for name, value in model.state_dict().items()},
                }
            return {"validation_accuracy": accuracy}

        fit.observe = observe
        return fit

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        data = digits(
            seed=seed, train=self.train, validation=self.validation, label_noise=float(options["label_noise"])
        )
        held_out = (data.validation_inputs, data.validation_targets)
        arrays = held_out if split == "validation" else (data.test_inputs, data.test_targets)
        images, labels = (torch.from_numpy(a).to(training_device(options)) for a in arrays)
        memory = cast("Mapping[str, Tensor]", cast("dict[str, object]", fit.state()["memory"])["model"])
        best = copy.deepcopy(fit.model)
        best.load_state_dict(memory)
        gamma = float(options["gamma"]) if options["loss"] == "tailr" else None
        conditions = {
            "last_step": _metrics(fit.model, images, labels, gamma),
            "best_validation": _metrics(best, images, labels, gamma),
        }
        return {f"{name}@{when}": found[name] for name in conditions["last_step"] for when, found in conditions.items()}


def _loss(options: Options, steps: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The loss as a function of the step, the logits and the labels."""
    name = options["loss"]
    gamma, rise = float(options["gamma"]), float(options["gamma_rise"]) * steps
    smoothing, q = float(options["smoothing"]), float(options["q"])
    if name == "cross_entropy":
        return lambda _, logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if name == "generalized_cross_entropy":
        return lambda _, logits, labels: generalized_cross_entropy(logits, labels, q=q)
    if name == "tailr":
        return lambda step, logits, labels: tailr_loss(
            logits, labels, gamma=gamma * min(1.0, step / rise) if rise else gamma
        )
    raise TrialError(f"unknown loss {name!r}; known: cross_entropy, generalized_cross_entropy, tailr")


@torch.no_grad()
def _metrics(model: nn.Module, images: Tensor, labels: Tensor, gamma: float | None = None) -> dict[str, float]:
    model.eval()
    log_probabilities = model(images).double().log_softmax(-1)
    probabilities = log_probabilities.exp()
    confidence, guess = probabilities.max(-1)
    correct = guess == labels
    metrics = {
        "accuracy": float(correct.double().mean()),
        "expected_calibration_error": calibration_error(confidence, correct),
        "negative_log_likelihood": float(F.nll_loss(log_probabilities, labels)),
    }
    if gamma is not None:
        unbiased = tailr_unbias(probabilities, gamma=gamma).amax(-1)
        metrics["unbiased_calibration_error"] = calibration_error(unbiased, correct)
    return metrics


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    r"""Expected calibration error $\sum_b \frac{n_b}{n}\,|\mathrm{acc}_b-\mathrm{conf}_b|$ over 15 equal bins.

    Args:
        confidence: probability of the guess, shape `(n,)`.
        correct: whether the guess was right, shape `(n,)`.
    """
    edges = torch.arange(1, _BINS, dtype=confidence.dtype, device=confidence.device) / _BINS
    bins = torch.bucketize(confidence, edges)
    gap = confidence.new_zeros(_BINS).index_add_(0, bins, correct.to(confidence.dtype) - confidence)
    return float(gap.abs().sum() / len(confidence))
