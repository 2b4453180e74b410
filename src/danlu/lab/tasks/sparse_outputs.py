"""Digits by a small network whose probabilities come from softmax or one of its relatives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.digits import calibration_error
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.losses import entmax_loss, sparse_softmax_loss, sparsemax_loss
from danlu.simplex import entmax15, perturb_max, softmax, sparse_softmax, sparsemax, taylor_softmax

__all__ = ["SparseOutputs", "output_metrics"]

Map = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SparseOutputs:
    r"""8x8 digits, a network 64-width-10 with ReLU, batches of `batch_size` with replacement.

    `output` names the map and its loss: "softmax" (cross entropy), "entmax15" and "sparsemax" (their Fenchel-Young
    losses), "sparse_softmax" (with `k`), "taylor_softmax" (with `order`), "perturb_normal" ($-\log p_t$ both). Label
    noise is symmetric, in training and validation labels.

    Metrics of the map's probabilities: `accuracy`; `support`, the mean number of classes above 0; `true_in_support`,
    the share of samples whose class is among them; `expected_calibration_error`.
    """

    train: int = 900
    validation: int = 200

    @property
    def name(self) -> str:
        """Name for tables."""
        return "digits, sparse outputs"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "output": "softmax",
            "k": 5,
            "order": 2,
            "label_noise": 0.0,
            "width": 128,
            "batch_size": 50,
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
        loss_of = _output(options)[1]
        torch.manual_seed(seed)
        width, batch_size = int(options["width"]), int(options["batch_size"])
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).to(device)
        optimizer = make_optimizer(model, options)

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step))
            return loss_of(model(images[rows]), labels[rows])

        return GradientFit(
            model,
            optimizer,
            loss=loss,
            schedule=lambda step: set_learning_rate(optimizer, options, step, steps),
        )

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
        with torch.no_grad():
            return output_metrics(_output(options)[0](fit.model(images).double()), labels)


def _output(options: Options) -> tuple[Map, Loss]:
    k, order = int(options["k"]), int(options["order"])
    taylor, normal = partial(taylor_softmax, order=order), partial(perturb_max, nodes=32)
    known: dict[str, tuple[Map, Loss]] = {
        "softmax": (softmax, F.cross_entropy),
        "entmax15": (entmax15, entmax_loss),
        "sparsemax": (sparsemax, sparsemax_loss),
        "sparse_softmax": (partial(sparse_softmax, k=k), partial(sparse_softmax_loss, k=k)),
        "taylor_softmax": (taylor, partial(_log_loss, taylor)),
        "perturb_normal": (normal, partial(_log_loss, normal)),
    }
    name = str(options["output"])
    if name not in known:
        raise TrialError(f"unknown output {name!r}; known: {', '.join(known)}")
    return known[name]


def _log_loss(function: Map, logits: Tensor, target: Tensor) -> Tensor:
    # The tail of normal noise ends where single precision does.
    p = function(logits).gather(-1, target[:, None]).clamp(min=torch.finfo(logits.dtype).tiny)
    return -p.log().mean()


def output_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of probabilities `(n, classes)` and labels `(n,)`."""
    confidence, guess = probabilities.max(-1)
    correct = guess == labels
    inside = probabilities > 0
    return {
        "accuracy": float(correct.double().mean()),
        "support": float(inside.sum(-1).double().mean()),
        "true_in_support": float(inside.gather(-1, labels[:, None]).double().mean()),
        "expected_calibration_error": calibration_error(confidence, correct),
    }
