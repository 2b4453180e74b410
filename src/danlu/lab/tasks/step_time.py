"""The time of an optimizer's step, side by side with torch's fused AdamW in one process."""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import generator
from danlu.lab.trial import Fit, Options
from danlu.optim import Lion, Tiger, parameter_groups

__all__ = ["StepTime"]

_VARIANTS = ("adamw_fused", "adamw_foreach", "sgd_momentum_fused", "lion", "tiger")


@dataclass(frozen=True)
class StepTime:
    """Steps on random tensors in the shapes of transformer blocks, with gradients that stay as they are.

    One step of a fit is one step of the optimizer that `variant` names and one of torch's fused AdamW on a copy of the
    tensors, in turns, so that both meet the same noise of the machine. Time is that of the thread on its processor, so
    that waiting for one does not count; fits have one thread.

    Metrics: `milliseconds_per_step` and `time_over_fused_adamw`, the medians over the steps of the time and of its
    ratio to fused AdamW's; `optimizer_bytes_per_parameter`. These are measurements: they do not repeat to the last bit.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "step_time"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {"variant": "adamw_fused", "width": 256, "blocks": 4}

    @property
    def evaluate_options(self) -> Options:
        """None."""
        return {}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return {"name": "random tensors", "sha256": "", "license": "", "split": "none"}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        return _Fit(seed, options)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Medians over the steps that were taken; the first fifth, at least one, warms up."""
        if not isinstance(fit, _Fit):
            raise TypeError(f"StepTime evaluates its own fits, not {type(fit).__name__}")
        own, other = ([float(value) for value in times] for times in (fit.own, fit.other))
        warm = max(1, len(own) // 5)
        held = sum(tensor.numel() * tensor.element_size() for tensor in fit.optimizer_state())
        return {
            "milliseconds_per_step": 1000 * statistics.median(own[warm:]),
            "time_over_fused_adamw": statistics.median(a / b for a, b in zip(own[warm:], other[warm:], strict=True)),
            "optimizer_bytes_per_parameter": held / sum(p.numel() for p in fit.model.parameters()),
        }


class _Fit:
    """Two optimizers on equal tensors, and the times of their steps."""

    def __init__(self, seed: int, options: Options) -> None:
        self.model, self.twin = (_tensors(seed, int(options["width"]), int(options["blocks"])) for _ in range(2))
        self.optimizer = _optimizer(str(options["variant"]), self.model)
        self.yardstick = _optimizer("adamw_fused", self.twin)
        self.own: list[float] = []
        self.other: list[float] = []

    def step(self, index: int) -> dict[str, float]:
        """One step of each; who goes first alternates."""
        turns = [(self.optimizer, self.own), (self.yardstick, self.other)]
        for optimizer, times in turns if index % 2 == 0 else reversed(turns):
            started = time.thread_time()
            optimizer.step()
            times.append(time.thread_time() - started)
        return {"train_loss": 0.0, "milliseconds": 1000 * self.own[-1]}

    def state(self) -> dict[str, object]:
        """The times so far; the tensors, hundreds of megabytes, follow from the seed and the number of steps."""
        return {"own": list(self.own), "other": list(self.other)}

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned, taking the steps again from where this fit starts."""
        self.own, self.other = (list(cast("list[float]", state[name])) for name in ("own", "other"))
        for _ in self.own:
            self.optimizer.step()
            self.yardstick.step()

    def optimizer_state(self) -> Iterator[Tensor]:
        """Tensors that the optimizer under test keeps; step counters are left out."""
        for entries in self.optimizer.state.values():
            for value in cast("dict[str, object]", entries).values():
                if isinstance(value, Tensor) and value.ndim > 0:
                    yield value


def _tensors(seed: int, width: int, blocks: int) -> nn.Module:
    """The parameters of transformer blocks with gradients; nothing is ever computed with them."""
    source = generator("tensors", seed)
    model = nn.Sequential(
        *(
            nn.ModuleList(
                [
                    nn.LayerNorm(width),
                    nn.Linear(width, 3 * width),
                    nn.Linear(width, width),
                    nn.LayerNorm(width),
                    nn.Linear(width, 4 * width),
                    nn.Linear(4 * width, width),
                ]
            )
            for _ in range(blocks)
        )
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.02 * torch.randn(param.shape, generator=source))
            param.grad = torch.randn(param.shape, generator=source)
    return model


def _optimizer(variant: str, model: nn.Module) -> Optimizer:
    groups = parameter_groups(model, weight_decay=0.1)
    if variant == "adamw_fused":
        return AdamW(groups, lr=1e-5, fused=True)
    if variant == "adamw_foreach":
        return AdamW(groups, lr=1e-5, foreach=True)
    if variant == "sgd_momentum_fused":
        return SGD(groups, lr=1e-5, momentum=0.9, fused=True)
    if variant == "lion":
        return Lion(groups, lr=1e-5)
    if variant == "tiger":
        return Tiger(groups, lr=1e-5)
    raise TrialError(f"unknown variant {variant!r}; known: {', '.join(_VARIANTS)}")
