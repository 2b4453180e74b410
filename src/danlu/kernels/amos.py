"""One step of Amos on many tensors at once, in C++ on the CPU.

A gradient is read for its mean squares and again for the step; parameter and momentum are read once and written once.
Every tensor is dense, and a parameter, its gradient and its momentum have the same strides.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.kernels import _cpp
from danlu.kernels.sign_update import LowPrecision

__all__ = ["amos_cpu", "dtypes_supported"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"nearest": 0, "stochastic": 1, "kahan": 2}


def dtypes_supported(param: torch.dtype, state: torch.dtype) -> bool:
    """Whether there is a kernel for parameters of this dtype with state in that of the arithmetic."""
    return param in _CODES and state == (torch.float64 if param == torch.float64 else torch.float32)


class _Columns(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("t", ctypes.c_void_p),
        ("compensation", ctypes.c_void_p),
        ("numel", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("number", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("finite", ctypes.c_void_p),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta", "momentum", "clip", "extra_l2", "c_coef", "d_coef")),
        ("eps", ctypes.c_double),
        ("sign", ctypes.c_double),
        ("guard", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    )


def amos_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    *,
    scales: Sequence[float],
    lr: float,
    beta: float,
    momentum: float,
    clip_value: float | None,
    extra_l2: float,
    c_coef: float,
    d_coef: float,
    eps: float,
    sign: float,
    guard: bool,
    low: LowPrecision,
    compensations: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
) -> list[int]:
    """One step in place, on tensors of one dtype; returns the indices of those that were skipped.

    `exp_avg_sqs` and `decays` are contiguous and hold one number per tensor, or one per slice of the axis that is
    outermost in memory. `compensations` are for Kahan's rounding, `numbers` of the parameters for the stochastic one.
    """
    n, kept = len(params), list[object]()

    def column(code: Literal["q", "d"], values: Iterable[float]) -> int:
        values_in_memory: array[Any] = array(code, values)
        kept.append(values_in_memory)
        return values_in_memory.buffer_info()[0]

    def addresses(tensors: Sequence[Tensor]) -> int:
        return column("q", map(Tensor.data_ptr, tensors))

    finite = array("B", bytes(n))
    columns = _Columns(
        n,
        addresses(params),
        addresses(grads),
        None if exp_avgs is None else addresses(exp_avgs),
        addresses(exp_avg_sqs),
        addresses(decays),
        addresses(steps),
        addresses(compensations) if compensations else None,
        column("q", map(Tensor.numel, params)),
        column("q", map(Tensor.numel, exp_avg_sqs)),
        column("q", numbers) if numbers else None,
        column("d", scales),
        finite.buffer_info()[0],
    )
    options = _Numbers(
        lr, beta, momentum, clip_value or 0.0, extra_l2, c_coef, d_coef, eps, sign, guard, _MODES[low.mode],
        torch.get_num_threads(), low.seed & 0xFFFFFFFF, low.step & 0xFFFFFFFF,
    )  # fmt: skip
    code = _CODES[params[0].dtype]
    if not _cpp.library("amos").danlu_amos(code, ctypes.byref(columns), ctypes.byref(options)):
        raise RuntimeError(f"no kernel for parameters of {params[0].dtype} with rounding {low.mode!r}")
    # Autograd and caches of others see by the version that a tensor has changed.
    torch.autograd.graph.increment_version([*params, *exp_avg_sqs, *decays, *steps, *(exp_avgs or ())])
    return [i for i in range(n) if not finite[i]] if guard else []
