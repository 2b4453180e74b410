"""Ways to accumulate gradients over micro-batches, with an account of the memory that they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_mlp import ResidualMLP, bits_per_byte, byte_batch, byte_data
from danlu.lab.tasks.optimizers import set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator
from danlu.lab.trial import Fit, Options
from danlu.optim import FoldedAdamW, Lion, Tiger, equivalent_beta, parameter_groups

__all__ = ["AccumulatingBytes"]

# As in `make_optimizer`: the papers' momenta for language.
_ADAM_BETAS, _LION_BETAS = (0.9, 0.95), (0.95, 0.98)
_ACCUMULATIONS = ("buffer", "folded", "in_backward", "every_kth", "every_kth_same_beta")


@dataclass(frozen=True)
class AccumulatingBytes:
    """Next-byte prediction by a residual network, `micro_batches` micro-batches of `batch_size` per update.

    One step of a fit is one update. `accumulation` says how the micro-batches come together:

    - "buffer": gradients add up in `.grad` and the optimizer sees their mean, the usual loop;
    - "folded": the optimizer is called after every micro-batch and `.grad` is freed; "tiger" (exact) and
      "folded_adamw" (approximate) accumulate in their moments;
    - "in_backward": the same inside the backward pass, for "tiger";
    - "every_kth": the optimizer is called after every micro-batch, with a learning rate of 0 but on the last one; its
      betas are replaced by `equivalent_beta`;
    - "every_kth_same_beta": the same with the betas as they are.

    Metrics: `bits_per_byte`; `training_bytes_per_parameter`, the most bytes of optimizer state and `.grad` that lived
    at the same time, looked at whenever a gradient is ready and after every call of the optimizer.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "accumulating_bytes"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "optimizer": "adamw",
            "accumulation": "buffer",
            "lr": 0.01,
            "weight_decay": 0.1,
            "warmup": 0.1,
            "micro_batches": 8,
            "batch_size": 16,
            "context": 16,
            "width": 64,
        }

    @property
    def evaluate_options(self) -> Options:
        """The number of bytes predicted."""
        return {"places": 8192}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return byte_data()

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        return _Fit(seed, steps, options)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        if not isinstance(fit, _Fit):
            raise TypeError(f"AccumulatingBytes evaluates its own fits, not {type(fit).__name__}")
        parameters = sum(p.numel() for p in fit.model.parameters())
        return {
            "bits_per_byte": bits_per_byte(fit.model, split, int(options["context"]), int(options["places"])),
            "training_bytes_per_parameter": cast("int", fit.memory["peak"]) / parameters,
        }


class _Fit(GradientFit):
    """A `GradientFit` whose step goes through several micro-batches."""

    def __init__(self, seed: int, steps: int, options: Options) -> None:
        self._how, self._count = str(options["accumulation"]), int(options["micro_batches"])
        if self._how not in _ACCUMULATIONS:
            raise TrialError(f"unknown accumulation {self._how!r}; known: {', '.join(_ACCUMULATIONS)}")
        context, batch_size = int(options["context"]), int(options["batch_size"])
        torch.manual_seed(seed)
        model = ResidualMLP(context=context, width=int(options["width"]))
        # Before the optimizer's hooks, which may free a gradient at once.
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(self._look)
        optimizer = _optimizer(model, self._how, self._count, options)

        def loss(micro_step: int) -> Tensor:
            windows, targets = byte_batch("train", context, batch_size, generator("batch", seed, micro_step))
            return F.cross_entropy(model(windows), targets)

        super().__init__(
            model, optimizer, loss=loss, schedule=lambda step: set_learning_rate(optimizer, options, step, steps)
        )
        self.memory = {"peak": 0}

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        self.model.train()
        total = 0.0
        for micro in range(self._count):
            last = micro == self._count - 1
            self._schedule(index)
            if self._how.startswith("every_kth") and not last:
                for group in self.optimizer.param_groups:
                    group["lr"] = 0.0
            loss = self._loss(index * self._count + micro)
            (loss / self._count if self._how == "buffer" else loss).backward()
            total += float(loss.detach())
            if self._how != "buffer" or last:
                self.optimizer.step()
                self._look()
                self.optimizer.zero_grad(set_to_none=True)
        return {"train_loss": total / self._count}

    def _look(self, _: Tensor | None = None) -> None:
        """Note the bytes of gradients and optimizer state that live now."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        alive = sum(t.numel() * t.element_size() for t in [*gradients, *self.optimizer_state()])
        self.memory["peak"] = max(cast("int", self.memory["peak"]), alive)


def _optimizer(model: ResidualMLP, how: str, micro_batches: int, options: Options) -> Optimizer:
    name, lr, weight_decay = str(options["optimizer"]), float(options["lr"]), float(options["weight_decay"])
    groups = parameter_groups(model, weight_decay=weight_decay)
    folds = how in ("folded", "in_backward")

    def betas(pair: tuple[float, float]) -> tuple[float, float]:
        if how != "every_kth":
            return pair
        return equivalent_beta(pair[0], micro_batches), equivalent_beta(pair[1], micro_batches)

    if name == "adamw" and not folds:
        return AdamW(groups, lr=lr, betas=betas(_ADAM_BETAS), weight_decay=weight_decay)
    if name == "lion" and not folds:
        return Lion(groups, lr=lr, betas=betas(_LION_BETAS), weight_decay=weight_decay)
    if name == "folded_adamw" and how == "folded":
        return FoldedAdamW(groups, lr=lr, betas=_ADAM_BETAS, weight_decay=weight_decay, grad_accum_steps=micro_batches)
    if name == "tiger" and how == "folded":
        return Tiger(groups, lr=lr, weight_decay=weight_decay, grad_accum_steps=micro_batches)
    if name == "tiger" and how == "in_backward":
        return Tiger(groups, lr=lr, weight_decay=weight_decay, grad_accum_steps=micro_batches, in_backward=True)
    raise TrialError(f"optimizer {name!r} does not accumulate as {how!r}")
