"""Whole sweeps of learning rates as one fit, so that what is said about the best rate has a value for every seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_mlp import ResidualMLP, bits_per_byte, byte_batch, byte_data
from danlu.lab.tasks.optimizers import make_optimizer, set_learning_rate
from danlu.lab.tasks.training import generator
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["ByteSweep", "log2_optimum"]

Split = Literal["validation", "test"]

# Lion's decay is three times AdamW's, after the rule that divides the rate and multiplies the decay; Tiger's is its
# default, relative like its steps.
_WEIGHT_DECAY = {"adamw": 0.1, "lion": 0.3, "tiger": 0.01}


@dataclass(frozen=True)
class ByteSweep:
    """Next-byte prediction by a residual network, trained once per optimizer, width and learning rate.

    One step of a fit is `updates` updates of every network on batches of `batch_size`, which all networks share, as
    they share their initial weights where they have the same width. `adamw_rates`, `lion_rates` and `tiger_rates` are
    learning rates separated by spaces ("" leaves the optimizer out), `widths` likewise. Every seed has its own sweep:
    the whole of tuning is repeated, and the best rate is chosen on validation text.

    Metrics for the optimizer that `read` names, at the last of `widths`: `bits_per_byte` of the network with the best
    rate; `best_rate` (the rate); `best_is_interior` (1 if it is neither the smallest nor the largest tried, else 0);
    `excess_over_adamw` in bits per byte, if AdamW was swept too.

    With `tuned_at` another width than the last, the rate that is best *there* is used at the last width.
    `rate_octaves` is how far the optima of the two widths lie apart, in factors of two. An optimum is the vertex of the
    parabola through the best point and its neighbors, in the logarithm of the rate, and the best point where it is an
    end of the grid.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "byte_sweep"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "adamw_rates": "",
            "lion_rates": "",
            "tiger_rates": "",
            "widths": "64",
            "context": 16,
            "batch_size": 64,
            "updates": 1,
            "warmup": 0.1,
        }

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation; `tuned_at` 0 is the last width, `places` the number of bytes predicted."""
        return {"read": "adamw", "tuned_at": 0, "places": 8192}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return byte_data()

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        return _Sweep(seed, steps, options)

    def evaluate(self, fit: Fit, *, seed: int, split: Split, options: Options) -> Mapping[str, float]:
        """Metrics on one split."""
        if not isinstance(fit, _Sweep):
            raise TypeError(f"ByteSweep evaluates its own fits, not {type(fit).__name__}")
        optimizer = str(options["read"])
        last, fit.places = fit.widths[-1], int(options["places"])
        tuned_at = int(options["tuned_at"]) or last
        here, there = fit.scores(optimizer, last), fit.scores(optimizer, tuned_at)
        index = _best(list(there.values()))
        rate = list(there)[index]
        metrics = {
            "bits_per_byte": fit.bits(optimizer, last, rate, split),
            "best_rate": rate,
            "best_is_interior": float(0 < index < len(there) - 1),
            "rate_octaves": abs(log2_optimum(here) - log2_optimum(there)),
        }
        if options["adamw_rates"]:
            baseline = fit.scores("adamw", last)
            best = list(baseline)[_best(list(baseline.values()))]
            metrics["excess_over_adamw"] = metrics["bits_per_byte"] - fit.bits("adamw", last, best, split)
        return metrics


class _Sweep:
    """Networks that are trained side by side."""

    def __init__(self, seed: int, steps: int, options: Options) -> None:
        self.widths = [int(width) for width in str(options["widths"]).split()]
        self.rates = {
            name: [float(rate) for rate in str(options[f"{name}_rates"]).split()]
            for name in _WEIGHT_DECAY
            if options[f"{name}_rates"]
        }
        if not self.widths or not self.rates:
            raise TrialError("a sweep needs widths and the learning rates of at least one optimizer")
        self.seed = seed
        self.context, self.batch_size = int(options["context"]), int(options["batch_size"])
        self.updates, self.total = int(options["updates"]), steps * int(options["updates"])
        self.members: dict[str, ResidualMLP] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.settings: dict[str, dict[str, Scalar]] = {}
        self.places = 0
        self._known: dict[tuple[str, str, int], float] = {}
        for name, rates in self.rates.items():
            for width in self.widths:
                for rate in rates:
                    torch.manual_seed(seed)
                    key = _key(name, width, rate)
                    self.members[key] = ResidualMLP(context=self.context, width=width)
                    self.settings[key] = {
                        "optimizer": name,
                        "lr": rate,
                        "weight_decay": _WEIGHT_DECAY[name],
                        "warmup": float(options["warmup"]),
                    }
                    self.optimizers[key] = make_optimizer(self.members[key], self.settings[key])
        self.model: nn.Module = nn.ModuleList(self.members.values())

    def step(self, index: int) -> dict[str, float]:
        """`updates` updates of every network; the curve is that of the network with the lowest loss."""
        self.model.train()
        self._known.clear()
        losses: list[float] = []
        for update in range(index * self.updates, (index + 1) * self.updates):
            source = generator("batch", self.seed, update)
            windows, targets = byte_batch("train", self.context, self.batch_size, source)
            losses = [self._update(key, update, windows, targets) for key in self.members]
        return {"train_loss": min((loss for loss in losses if math.isfinite(loss)), default=math.nan)}

    def _update(self, key: str, update: int, windows: Tensor, targets: Tensor) -> float:
        optimizer = self.optimizers[key]
        set_learning_rate(optimizer, self.settings[key], update, self.total)
        loss = F.cross_entropy(self.members[key](windows), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def bits(self, optimizer: str, width: int, rate: float, split: Split) -> float:
        """Bits per byte of one network; remembered until the next step, since several arms ask."""
        key = _key(optimizer, width, rate)
        place = (key, split, self.places)
        if place not in self._known:
            self._known[place] = bits_per_byte(self.members[key], split, self.context, self.places)
        return self._known[place]

    def scores(self, optimizer: str, width: int) -> dict[float, float]:
        """Learning rate -> bits per byte on validation text."""
        if optimizer not in self.rates:
            raise TrialError(f"optimizer {optimizer!r} was not swept; known: {', '.join(self.rates)}")
        if width not in self.widths:
            raise TrialError(f"width {width} was not swept; known: {', '.join(map(str, self.widths))}")
        return {rate: self.bits(optimizer, width, rate, "validation") for rate in self.rates[optimizer]}

    def state(self) -> dict[str, object]:
        """Models and optimizers by name."""
        return {
            key: {"model": dict(member.state_dict()), "optimizer": self.optimizers[key].state_dict()}
            for key, member in self.members.items()
        }

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        self._known.clear()
        for key, member in self.members.items():
            saved = cast("dict[str, object]", state[key])
            member.load_state_dict(cast("Mapping[str, Tensor]", saved["model"]))
            self.optimizers[key].load_state_dict(cast("dict[str, object]", saved["optimizer"]))

    def optimizer_state(self) -> Iterator[Tensor]:
        """Tensors that all the optimizers keep; step counters are left out."""
        for optimizer in self.optimizers.values():
            for entries in optimizer.state.values():
                for value in cast("dict[str, object]", entries).values():
                    if isinstance(value, Tensor) and value.ndim > 0:
                        yield value


def _key(optimizer: str, width: int, rate: float) -> str:
    return f"{optimizer} width {width} rate {rate:g}"


def _best(scores: Sequence[float]) -> int:
    """Place of the lowest score; one that is not finite is never chosen while another is."""
    return min(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else math.inf)


def log2_optimum(scores: Mapping[float, float]) -> float:
    """Base-2 logarithm of the rate where the parabola through the lowest score and its neighbors has its vertex.

    Args:
        scores: rate -> score, rates in rising order and equally far apart in their logarithm.

    Returns:
        The best rate itself where it is the first or the last, or where a neighbor diverged.
    """
    rates, values = list(scores), list(scores.values())
    i = _best(values)
    place = math.log2(rates[i])
    if not 0 < i < len(rates) - 1:
        return place
    left, middle, right = values[i - 1 : i + 2]
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return place
    return place + 0.5 * (left - right) / curvature * (math.log2(rates[i + 1]) - place)
