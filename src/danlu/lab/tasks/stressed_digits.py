"""Digits under stress: parameters stored in half precision, and gradients that are not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import digits
from danlu.lab.errors import TrialError
from danlu.lab.tasks.optimizers import set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator
from danlu.lab.trial import Fit, Options
from danlu.optim import Tiger

__all__ = ["StressedDigits"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TRAIN, _VALIDATION, _BATCH = 900, 200, 100


@dataclass(frozen=True)
class StressedDigits:
    r"""Clean digits, a network 64-width-width-10 with ReLU under Tiger, batches of 100 with replacement.

    `storage` is the dtype in which parameters, momenta and activations are held ("float32", "float16", "bfloat16"; the
    loss is computed in float32), `rounding` how the result of a step gets into it ("nearest", "stochastic", "kahan").
    Before every step each tensor's gradient becomes NaN with probability `bad_gradients`, in all its elements;
    `nonfinite` says what Tiger does about it.

    Metrics on the last weights: `accuracy`, `negative_log_likelihood` (nats); of the matrices, over all updates:
    `unchanged`, the fraction of updates along a momentum after which the parameter is the number that it was; and
    `movement_lost` $= 1 - \sum\langle\Delta_{stored},\Delta\rangle / \sum|\Delta|^2$, with $\Delta$ the update in
    exact arithmetic and $\Delta_{stored}$ what happened to the parameter (under "kahan": with what the compensation
    holds). Rounding that is right on average loses no movement, however many single updates leave no trace.
    `bad_gradient_events` counts the gradients that Tiger found to be not finite.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "stressed_digits"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "lr": 0.01,
            "weight_decay": 0.01,
            "warmup": 0.0,
            "width": 128,
            "storage": "float32",
            "rounding": "nearest",
            "bad_gradients": 0.0,
            "nonfinite": "shrink",
        }

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
        if options["storage"] not in _DTYPES:
            raise TrialError(f"unknown storage {options['storage']!r}; known: {', '.join(_DTYPES)}")
        return _Fit(seed, steps, options)

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        if not isinstance(fit, _Fit):
            raise TypeError(f"StressedDigits evaluates its own fits, not {type(fit).__name__}")
        data = digits(seed=seed, train=_TRAIN, validation=_VALIDATION)
        arrays = (
            (data.validation_inputs, data.validation_targets)
            if split == "validation"
            else (data.test_inputs, data.test_targets)
        )
        images, labels = (torch.from_numpy(array) for array in arrays)
        fit.model.eval()
        logits = fit.model(images.to(fit.dtype)).double()
        total = {name: cast("float", value) for name, value in fit.memory.items()}
        return {
            "accuracy": float((logits.argmax(-1) == labels).double().mean()),
            "negative_log_likelihood": float(F.cross_entropy(logits, labels)),
            "unchanged": total["unchanged"] / max(1.0, total["updates"]),
            "movement_lost": 1 - total["moved"] / total["intended"] if total["intended"] else 0.0,
            "bad_gradient_events": total["events"],
        }


class _Fit(GradientFit):
    """A `GradientFit` that spoils gradients and keeps account of what rounding does."""

    def __init__(self, seed: int, steps: int, options: Options) -> None:
        data = digits(seed=seed, train=_TRAIN, validation=_VALIDATION)
        images, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_targets)
        width = int(options["width"])
        self.dtype = _DTYPES[str(options["storage"])]
        self._seed, self._bad = seed, float(options["bad_gradients"])
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        model.to(self.dtype)
        optimizer = _tiger(model, options)

        def loss(step: int) -> Tensor:
            rows = torch.randint(len(images), (_BATCH,), generator=generator("batch", seed, step))
            return F.cross_entropy(model(images[rows].to(self.dtype)).float(), labels[rows])

        super().__init__(
            model, optimizer, loss=loss, schedule=lambda step: set_learning_rate(optimizer, options, step, steps)
        )
        self.memory = {"updates": 0.0, "unchanged": 0.0, "moved": 0.0, "intended": 0.0, "events": 0.0}

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        self.model.train()
        self._schedule(index)
        loss = self._loss(index)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._spoil(index)
        with torch.no_grad():
            before: dict[Tensor, Tensor] = {p: self._stored(p) for p in self.model.parameters() if p.ndim > 1}
            seen = self._events()
            self.optimizer.step()
            self._account(before)
        # The optimizer's own count begins anew when a fit goes on from a checkpoint.
        self.memory["events"] = cast("float", self.memory["events"]) + self._events() - seen
        return {"train_loss": float(loss.detach())}

    def _events(self) -> int:
        return sum(cast("Tiger", self.optimizer).nonfinite_events.values())

    def _spoil(self, index: int) -> None:
        """Make each tensor's gradient NaN with the given probability."""
        params = list(self.model.parameters())
        draws = torch.rand(len(params), generator=generator("bad", self._seed, index))
        for param, draw in zip(params, draws.tolist(), strict=True):
            if draw < self._bad and param.grad is not None:
                param.grad.fill_(math.nan)

    def _stored(self, param: Tensor) -> Tensor:
        """What the optimizer has of a parameter: the parameter, and its compensation if there is one."""
        state = cast("dict[str, Tensor]", self.optimizer.state.get(param, {}))
        value = param.detach().double()
        return value + state["compensation"].double() if "compensation" in state else value

    def _account(self, before: Mapping[Tensor, Tensor]) -> None:
        total = cast("dict[str, float]", self.memory)
        rates = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        for param, old in before.items():
            gradient, group = param.grad, rates[param]
            if gradient is None or not bool(gradient.isfinite().all()):
                continue
            momentum = cast("Tensor", self.optimizer.state[param]["exp_avg"]).double()
            scale = old.square().mean().sqrt().clamp(min=float(group["rms_floor"]))
            wanted = -float(group["lr"]) * scale * (momentum.sign() + float(group["weight_decay"]) * old)
            moved = self._stored(param) - old
            # Where no gradient ever came there is only decay, smaller than any rounding.
            wants = momentum != 0
            total["updates"] += float(wants.sum())
            total["unchanged"] += float((wants & (moved == 0)).sum())
            total["moved"] += float((moved * wanted).sum())
            total["intended"] += float(wanted.square().sum())


def _tiger(model: nn.Module, options: Options) -> Tiger:
    """Tiger with its defaults for vision."""
    rounding, nonfinite = str(options["rounding"]), str(options["nonfinite"])
    return Tiger(
        model,
        lr=float(options["lr"]),
        beta=0.945,
        weight_decay=float(options["weight_decay"]),
        rounding=cast("Literal['nearest', 'stochastic', 'kahan']", rounding),
        nonfinite=cast("Literal['shrink', 'skip', 'off']", nonfinite),
    )
