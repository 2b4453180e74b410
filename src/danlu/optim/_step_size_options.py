"""The options of EGStepSize: what a valid group is, and the numbers of a step that follow from it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from danlu._common.checks import check_real
from danlu.optim._gains import Kind, Rule, check_range
from danlu.optim._options import check_beta, check_betas, check_shared_options, checked_rate

__all__ = ["check_adaptation", "check_options", "check_wrapped", "rule_of"]


def check_adaptation(group: Mapping[str, Any]) -> None:
    """Raise unless the options of gains and scales are valid."""
    check_real("gain_lr", group["gain_lr"], low=0.0)
    check_real("scale_lr", group["scale_lr"], low=0.0)
    check_range("gain_range", group["gain_range"])
    check_range("scale_range", group["scale_range"])
    for name in ("normalize_scale", "sign_gain", "per_coordinate"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be a bool, got {group[name]!r}")


def check_options(group: Mapping[str, Any], inner: str) -> None:
    """Raise unless the options of a group are valid, those of the inner update included."""
    check_adaptation(group)
    check_shared_options(group)
    if group["fused"] and inner != "sgdm":
        raise ValueError(f"fused=True is for inner='sgdm', got inner={inner!r}")
    if inner == "sgdm":
        check_beta("momentum", group["momentum"])
        check_beta("momentum_beta", group["momentum_beta"])
        return
    check_betas(group["betas"])
    check_real("eps", group["eps"], low=0.0)


def check_wrapped(inner: Optimizer, params: object, of_inner: Mapping[str, Any]) -> None:
    """Raise unless an optimizer can be wrapped and has its options to itself."""
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError("inner must take a step without a closure, got LBFGS")
    for name, value in {"params": params, **of_inner}.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} belongs to the inner optimizer, which was given; got {name}={value!r} here as well"
            )


def rule_of(kind: Kind, group: Mapping[str, Any]) -> Rule:
    """The numbers of a group; those of an optimizer that is wrapped stay with it."""
    rate = checked_rate(group["lr"])
    numbers: dict[str, Any] = {}
    if kind == "sgdm":
        numbers = {"momentum": group["momentum"], "momentum_beta": group["momentum_beta"]}
    elif kind == "adam":
        numbers = {"betas": tuple(group["betas"]), "eps": group["eps"]}
    return Rule(
        kind=kind,
        lr=rate,
        climb=bool(group.get("maximize", False)),
        decay=0.0 if kind == "wrapped" else rate * group["weight_decay"],
        gain_lr=group["gain_lr"] if group["per_coordinate"] else 0.0,
        scale_lr=group["scale_lr"],
        gain_range=tuple(group["gain_range"]),
        scale_range=tuple(group["scale_range"]),
        normalize_scale=group["normalize_scale"],
        sign_gain=group["sign_gain"],
        guard=kind != "wrapped" and group["nonfinite"] in ("skip", "shrink"),
        **numbers,
    )
