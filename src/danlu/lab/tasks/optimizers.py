"""The optimizers that tasks can train with, under one schedule and one rule for weight decay."""

from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.optim import AdamW, Optimizer

from danlu.lab.errors import TrialError
from danlu.lab.trial import Scalar
from danlu.optim import Amos, Lion, Tiger, amos_strategy, parameter_groups

__all__ = ["OPTIMIZER_OPTIONS", "make_optimizer", "set_learning_rate"]

OPTIMIZER_OPTIONS: Mapping[str, Scalar] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "warmup": 0.1}


def make_optimizer(model: nn.Module, options: Mapping[str, Scalar]) -> Optimizer:
    """The optimizer that `options` name, on the groups of `parameter_groups` (no decay for vectors and norms).

    Momenta are those of the papers' language settings: AdamW (0.9, 0.95), Lion (0.95, 0.98), Tiger 0.965. "amos" and
    "amos_momentum" (0.9) take `lr` for their xi and have no other weight decay; "lion_derived" takes it for the alpha0
    of `amos_strategy`, which derives the rates and decays of all tensors.
    """
    name, lr, weight_decay = str(options["optimizer"]), float(options["lr"]), float(options["weight_decay"])
    groups = parameter_groups(model, weight_decay=weight_decay)
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    if name == "lion":
        return Lion(groups, lr=lr, betas=(0.95, 0.98), weight_decay=weight_decay)
    if name == "tiger":
        return Tiger(groups, lr=lr, weight_decay=weight_decay)
    if name in ("amos", "amos_momentum"):
        # 1 - beta is of the order of the rates that short runs need.
        return Amos(model, lr=lr, beta=0.98, momentum=0.9 if name == "amos_momentum" else 0.0, clip_value=1.0)
    if name == "lion_derived":
        # The schedule is that of `set_learning_rate`: a resumed fit has no state of a scheduler.
        return amos_strategy(model, partial(Lion, betas=(0.95, 0.98)), alpha0=lr, half_life=1.0)[0]
    raise TrialError(f"unknown optimizer {name!r}; known: adamw, lion, tiger, amos, amos_momentum, lion_derived")


def set_learning_rate(optimizer: Optimizer, options: Mapping[str, Scalar], step: int, steps: int) -> None:
    """Linear warmup over the fraction `warmup` of the steps, then linear decay to 0.

    Amos has no schedule but the warmup, and "lion_derived" has the inverse-time decay that halves at half of the steps;
    their groups have rates of their own.

    A function of the step alone, so that a resumed fit needs no state of a scheduler.
    """
    warmup = max(1, round(float(options["warmup"]) * steps))
    factor = (step + 1) / warmup
    if options.get("optimizer") in ("amos", "amos_momentum"):
        factor = min(factor, 1.0)
    elif options.get("optimizer") == "lion_derived":
        factor = min(factor, 1.0) / (1.0 + 2.0 * step / steps)
    else:
        factor = min(factor, (steps - step) / max(1, steps - warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = float(group.get("initial_lr", options["lr"])) * factor
