"""Argument checks that look at types, shapes, dtypes and hyperparameters, never at the values of a tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "broadcasts_to",
    "check_bool",
    "check_choice",
    "check_dim",
    "check_floating",
    "check_integer",
    "check_real",
    "check_same_device",
    "is_low_precision",
]


def broadcasts_to(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor of `shape` broadcasts to exactly `wanted`."""
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False))


def check_floating(name: str, tensor: object) -> None:
    """Raise `TypeError` unless `tensor` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")


def check_bool(name: str, tensor: object, true_means: str) -> None:
    """Raise `TypeError` unless `tensor` is a boolean tensor; the message says what True means in it."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a bool tensor with True = {true_means}, got {kind}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise `ValueError` that names the arguments unless all tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")


def check_dim(name: str, dim: int, tensor: Tensor) -> int:
    """Return `dim` as a non-negative axis of `tensor`; raise `ValueError` if there is no such axis or it is empty."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name} must be an int, got {type(dim).__name__}")
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"{name}={dim} is out of range for an input of shape {tuple(tensor.shape)}")
    axis = dim % tensor.ndim
    if tensor.shape[axis] == 0:
        raise ValueError(f"the axis {name}={dim} of an input of shape {tuple(tensor.shape)} is empty")
    return axis


def check_real(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return `value` as a float; raise unless it is a real number in the interval (closed ends by default)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    below = number < low or (low_open and number == low)
    above = number > high or (high_open and number == high)
    # Comparisons and not math.isfinite: a compiler may hold the number as a symbol.
    if not -math.inf < number < math.inf or below or above:
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        interval = f"{left}{low:g}, {high:g}{right}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")
    return number


def check_integer(name: str, value: object, *, low: int) -> int:
    """Return `value`; raise unless it is an int that is at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` that lists `choices` unless `value` is one of them."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether arithmetic in `dtype` is carried out in float32 instead (float16 and bfloat16)."""
    return dtype in (torch.float16, torch.bfloat16)
