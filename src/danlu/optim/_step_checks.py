"""Checks and gathering that the optimizers by exponentiated gradients share."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.optim._nonfinite import parameter_name, raise_if_nonfinite
from danlu.optim._options import check_gradients, check_lr
from danlu.optim._rounding import check_rounding

__all__ = ["check_common", "check_real_gradients", "plain", "raise_where_wanted"]

_NONFINITE = ("skip", "raise", "off")


def check_common(group: Mapping[str, Any]) -> None:
    check_lr(group["lr"])
    check_real("weight_decay", group["weight_decay"], low=0.0)
    check_choice("nonfinite", group["nonfinite"], _NONFINITE)
    for name in ("foreach", "maximize"):
        if not (isinstance(group[name], bool) or (name == "foreach" and group[name] is None)):
            raise TypeError(f"{name} must be a bool{' or None' * (name == 'foreach')}, got {group[name]!r}")
    check_rounding(group.get("rounding"))
    check_integer("seed", group.get("seed", 0), low=0)


def check_real_gradients(name: str, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RuntimeError` on sparse gradients and complex parameters, before anything is changed."""
    check_gradients(name, param_groups)
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and param.is_complex():
                raise RuntimeError(f"{name} does not support complex parameters, got shape {tuple(param.shape)}")


def raise_where_wanted(param_groups: Sequence[Mapping[str, Any]], everywhere: str | None = None) -> None:
    """Raise on bad gradients in groups with `nonfinite="raise"`, before anything is changed."""
    raise_if_nonfinite(
        {
            parameter_name(param_groups, g, i): param.grad
            for g, group in enumerate(param_groups)
            if (group["nonfinite"] if everywhere is None else everywhere) == "raise"
            for i, param in enumerate(group["params"])
            if param.grad is not None
        }
    )


def plain(value: Tensor) -> Tensor:
    """The number behind a DTensor, of all its shards; any other tensor as it is."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None else value
