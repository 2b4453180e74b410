"""One step of momentum SGD with exponentiated gains and scales on many tensors at once: C++ on the CPU.

Every tensor is dense, and a parameter, its gradient and its state tensors have the same strides. The state is float64
for float64 parameters and float32 for all others.
"""

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["StepSizeNumbers", "dtypes_supported", "sgdm_step"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE = ("momentum_buffer", "exp_avg", "log_gain", "log_scale", "step")


def dtypes_supported(param: torch.dtype, state: torch.dtype) -> bool:
    """Whether there is a kernel for parameters and states of these dtypes."""
    return param in _CODES and state == (torch.float64 if param == torch.float64 else torch.float32)


@dataclass(frozen=True, kw_only=True)
class StepSizeNumbers:
    """What all tensors of a call share; ranges are of logarithms, `decay` is lr * weight_decay."""

    lr: float
    decay: float
    momentum: float
    momentum_beta: float
    gain_lr: float
    gain_range: tuple[float, float]
    scale_lr: float
    scale_range: tuple[float, float]
    normalize_scale: bool
    sign_gain: bool
    climb: bool
    guard: bool
    shared: bool


class _Columns(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("momentum_buffer", ctypes.c_void_p),
        ("exp_avg", ctypes.c_void_p),
        ("log_gain", ctypes.c_void_p),
        ("log_scale", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("numel", ctypes.c_void_p),
        ("finite", ctypes.c_void_p),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_double)
            for name in (
                "lr",
                "decay",
                "momentum",
                "momentum_beta",
                "gain_lr",
                "gain_low",
                "gain_high",
                "scale_lr",
                "scale_low",
                "scale_high",
            )
        ),
        *((name, ctypes.c_int32) for name in ("normalize", "sign_gain", "climb", "guard", "shared", "threads")),
    )


def sgdm_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    numbers: StepSizeNumbers,
) -> list[int]:
    """One step in place; returns the indices of tensors that were skipped because of their gradients.

    The parameters have one dtype, and the states one set of entries: `momentum_buffer`, and where they adapt gains
    `exp_avg`, `log_gain` and `step`, and a scale `log_scale`.
    """
    n = len(params)
    finite = bytearray(n)
    flags = (ctypes.c_uint8 * n).from_buffer(finite)
    kept: list[array[int]] = []

    def column(values: Sequence[int]) -> int:
        kept.append(array("q", values))
        return kept[-1].buffer_info()[0]

    present = [name for name in _STATE if name in states[0]]
    addresses = {name: column([state[name].data_ptr() for state in states]) for name in present}
    columns = _Columns(
        n,
        column([param.data_ptr() for param in params]),
        column([grad.data_ptr() for grad in grads]),
        *(addresses.get(name) for name in _STATE),
        column([param.numel() for param in params]),
        ctypes.addressof(flags),
    )
    o = numbers
    packed = _Numbers(
        *(o.lr, o.decay, o.momentum, o.momentum_beta, o.gain_lr, *o.gain_range, o.scale_lr, *o.scale_range),
        *(o.normalize_scale, o.sign_gain, o.climb, o.guard, o.shared, torch.get_num_threads()),
    )
    call = _cpp.library("step_size").danlu_step_size
    if not call(_CODES[params[0].dtype], ctypes.byref(columns), ctypes.byref(packed)):
        raise RuntimeError(f"no kernel for parameters of {params[0].dtype}")
    # Autograd and caches of others see by the version that a tensor has changed.
    torch.autograd.graph.increment_version([*params, *(state[name] for state in states for name in present)])
    return [i for i, good in enumerate(finite) if not good] if numbers.guard and 0 in finite else []
