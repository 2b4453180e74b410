"""The optimizers that tasks can train with, under one schedule and one rule for weight decay."""

from collections.abc import Mapping

from torch import nn
from torch.optim import AdamW, Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.trial import Scalar
from danlu.optim import Lion, Tiger, parameter_groups

__all__ = ["OPTIMIZER_OPTIONS", "make_optimizer", "set_learning_rate"]

OPTIMIZER_OPTIONS: Mapping[str, Scalar] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "warmup": 0.1}


def make_optimizer(model: nn.Module, options: Mapping[str, Scalar]) -> Optimizer:
    """The optimizer that `options` name, on the groups of `parameter_groups` (no decay for vectors and norms).

    Momenta are those of the papers' language settings: AdamW (0.9, 0.95), Lion (0.95, 0.98), Tiger 0.965.
    """
    name, lr, weight_decay = str(options["optimizer"]), float(options["lr"]), float(options["weight_decay"])
    groups = parameter_groups(model, weight_decay=weight_decay)
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    if name == "lion":
        return Lion(groups, lr=lr, betas=(0.95, 0.98), weight_decay=weight_decay)
    if name == "tiger":
        return Tiger(groups, lr=lr, weight_decay=weight_decay)
    raise TrialError(f"unknown optimizer {name!r}; known: adamw, lion, tiger")


def set_learning_rate(optimizer: Optimizer, options: Mapping[str, Scalar], step: int, steps: int) -> None:
    """Linear warmup over the fraction `warmup` of the steps, then linear decay to 0.

    A function of the step alone, so that a resumed fit needs no state of a scheduler.
    """
    warmup = max(1, round(float(options["warmup"]) * steps))
    factor = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = float(options["lr"]) * factor
