"""Digits by attention pooling over their pixels, with attention weights from any simplex map."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.simplex import entmax, softmax, sparsemax, taylor_softmax

__all__ = ["SparseAttention", "weight_metrics"]

_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "taylor_softmax": taylor_softmax,
    "entmax125": partial(entmax, alpha=1.25),
    "entmax15": partial(entmax, alpha=1.5),
    "sparsemax": sparsemax,
}


class _Pooling(nn.Module):
    """64 pixels as tokens, `heads` learned queries, one linear layer on what they read."""

    def __init__(self, map: Callable[[Tensor], Tensor], width: int, heads: int) -> None:
        super().__init__()
        self.map = map
        self.place = nn.Parameter(0.5 * torch.randn(64, width))
        self.token = nn.Sequential(nn.Linear(width + 1, width), nn.GELU(), nn.Linear(width, width))
        self.query = nn.Parameter(torch.randn(heads, width // heads))
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, 10)

    def weights_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights `(n, heads, 64)` and logits."""
        heads, size = self.query.shape
        places = self.place.expand(len(images), -1, -1)
        tokens = self.token(torch.cat([places, images[..., None]], -1))
        keys, values = (part(tokens).unflatten(-1, (heads, size)).transpose(1, 2) for part in (self.key, self.value))
        weights = self.map((keys @ self.query[..., None]).squeeze(-1) * size**-0.5)
        read = (weights[..., None, :] @ values).flatten(1)
        return weights, self.out(read)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.weights_and_logits(images)[1]


@dataclass(frozen=True)
class SparseAttention:
    """8x8 digits as 64 pixel tokens, pooled by learned queries whose weights come from `map`.

    Maps: "softmax", "taylor_softmax" (order 2), "entmax125", "entmax15", "sparsemax".

    Metrics: `accuracy`; of the attention weights over 64 pixels, `nonzero`, the mean number above 0, and `perplexity`,
    the exponential of their mean entropy.
    """

    train: int = 1200
    validation: int = 200

    @property
    def name(self) -> str:
        """Name for tables."""
        return "digits, attention pooling"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {"map": "softmax", "width": 32, "heads": 4, "batch_size": 50, "device": "cpu"}
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
        data = digits(seed=seed, train=self.train, validation=self.validation)
        device = training_device(options)
        images, labels = (torch.from_numpy(a).to(device) for a in (data.train_inputs, data.train_targets))
        name = str(options["map"])
        if name not in _MAPS:
            raise TrialError(f"unknown map {name!r}; known: {', '.join(_MAPS)}")
        torch.manual_seed(seed)
        model = _Pooling(_MAPS[name], int(options["width"]), int(options["heads"])).to(device)
        optimizer = make_optimizer(model, options)
        batch_size = int(options["batch_size"])

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=generator("batch", seed, step))
            return F.cross_entropy(model(images[rows]), labels[rows])

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
        data = digits(seed=seed, train=self.train, validation=self.validation)
        held_out = (data.validation_inputs, data.validation_targets)
        arrays = held_out if split == "validation" else (data.test_inputs, data.test_targets)
        images, labels = (torch.from_numpy(a).to(training_device(options)) for a in arrays)
        model = fit.model
        if not isinstance(model, _Pooling):
            raise TypeError(f"the fit is not one of this task: {type(model).__name__}")
        with torch.no_grad():
            weights, logits = model.weights_and_logits(images)
        return {"accuracy": float((logits.argmax(-1) == labels).double().mean()), **weight_metrics(weights)}


def weight_metrics(weights: Tensor) -> dict[str, float]:
    """Of attention weights `(..., keys)`: the mean number above 0, and the exponential of the mean entropy."""
    entropy = torch.special.entr(weights.double()).sum(-1).mean()
    return {
        "nonzero": float((weights > 0).sum(-1).double().mean()),
        "perplexity": float(entropy.exp()),
    }
