"""Checks of the hyperparameters and gradients that all optimizers share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.optim._nonfinite import NONFINITE
from danlu.optim._rounding import check_rounding

__all__ = [
    "as_float",
    "check_beta",
    "check_betas",
    "check_gradients",
    "check_layouts",
    "check_lengths",
    "check_lr",
    "check_rates",
    "check_real_gradients",
    "check_real_parameters",
    "check_shared_options",
    "check_shrink",
    "check_switches",
    "checked_rate",
]


def check_lr(lr: float | Tensor) -> None:
    """Raise unless `lr` is a non-negative number or a tensor with one element (whose value is not read)."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
    else:
        check_real("lr", lr, low=0.0)


def check_beta(name: str, beta: object) -> None:
    """Raise unless `beta` is a number in [0, 1)."""
    check_real(name, beta, low=0.0, high=1.0, high_open=True)


def check_betas(betas: object) -> None:
    """Raise unless `betas` are two numbers in [0, 1)."""
    # A checkpoint that went through JSON gives back a list.
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    check_beta("betas[0]", betas[0])
    check_beta("betas[1]", betas[1])


def check_lengths(lists: Mapping[str, Sequence[object] | None]) -> None:
    """Raise unless all lists but those that are None have one length."""
    lengths = {name: len(items) for name, items in lists.items() if items is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have one length, got {lengths}")


def check_switches(**switches: object) -> None:
    """Raise unless all are bools."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def check_shared_options(group: Mapping[str, Any]) -> None:
    """Check the options of a parameter group that every optimizer has."""
    check_lr(group["lr"])
    check_real("weight_decay", group["weight_decay"], low=0.0)
    check_choice("nonfinite", group["nonfinite"], NONFINITE)
    check_shrink(group)
    for name in ("foreach", "fused", "maximize", "capturable"):
        optional = name in ("foreach", "fused")
        if name in group and not (isinstance(group[name], bool) or (optional and group[name] is None)):
            raise TypeError(f"{name} must be a bool{' or None' * optional}, got {group[name]!r}")
    if group.get("foreach") and group.get("fused"):
        raise ValueError("foreach and fused cannot both be True")
    check_rounding(group.get("rounding"))
    check_integer("seed", group.get("seed", 0), low=0)
    if group.get("state_dtype") not in (None, torch.float32):
        raise ValueError(f"state_dtype must be None or torch.float32, got {group['state_dtype']!r}")


def check_shrink(group: Mapping[str, Any]) -> None:
    """Raise unless `shrink` is in (0, 1] and `center`, where a group has one, a number."""
    check_real("shrink", group["shrink"], low=0.0, low_open=True, high=1.0)
    if "center" in group:
        check_real("center", group["center"])


def check_gradients(name: str, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RuntimeError` if any gradient is sparse, before anything is changed."""
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(
                    f"{name} does not support sparse gradients, got one for a parameter of shape {tuple(param.shape)}; "
                    "use sparse=False in the embedding"
                )


def check_real_parameters(name: str, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RuntimeError` if any parameter is complex, before anything is changed."""
    for group in param_groups:
        for param in group["params"]:
            if param.is_complex():
                raise RuntimeError(f"{name} does not support complex parameters, got shape {tuple(param.shape)}")


def check_real_gradients(name: str, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RuntimeError` on sparse gradients and complex parameters, before anything is changed."""
    check_gradients(name, param_groups)
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and param.is_complex():
                raise RuntimeError(f"{name} does not support complex parameters, got shape {tuple(param.shape)}")


def check_layouts(name: str, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RuntimeError` if any gradient is neither dense nor sparse by coordinates, before anything is changed."""
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout not in (torch.strided, torch.sparse_coo):
                raise RuntimeError(
                    f"{name} does not support gradients of layout {param.grad.layout}, got one for a parameter of "
                    f"shape {tuple(param.shape)}"
                )


def as_float(lr: float | Tensor) -> float:
    """The learning rate as a number; a tensor on an accelerator is waited for, once per group."""
    return float(lr.item()) if isinstance(lr, Tensor) else float(lr)


def checked_rate(lr: float | Tensor) -> float:
    """`as_float` of a rate that a schedule may have set, or of a tensor, whose value is first known here."""
    return check_real("lr", as_float(lr), low=0.0)


def check_rates(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` on a rate below 0, before anything is changed; an accelerator's tensor is not waited for."""
    for group in param_groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.device.type != "cpu" or torch.compiler.is_compiling()):
            continue
        checked_rate(lr)
