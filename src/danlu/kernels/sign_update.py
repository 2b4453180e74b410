"""One step of Lion and of Tiger on many tensors at once: C++ on the CPU, one launch of a Triton kernel on CUDA.

Each element of parameter, gradient and momentum is read once and written once. Every tensor is dense, and a parameter,
its gradient and its momentum have the same strides.
"""

import ctypes
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["LowPrecision", "SignUpdate", "dtypes_supported"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"nearest": 0, "stochastic": 1, "kahan": 2}


def dtypes_supported(param: torch.dtype, exp_avg: torch.dtype) -> bool:
    """Whether there is a kernel for parameters and momenta of these dtypes."""
    return param in _CODES and (exp_avg == param or (exp_avg == torch.float32 and param != torch.float64))


@dataclass(frozen=True)
class LowPrecision:
    """How results are rounded into the parameters; the random bits are a function of seed, step, number and element."""

    mode: Literal["nearest", "stochastic", "kahan"] = "nearest"
    seed: int = 0
    step: int = 0


class _Columns(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("compensation", ctypes.c_void_p),
        ("numel", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
        ("number", ctypes.c_void_p),
        ("finite", ctypes.c_void_p),
    )


class _LionNumbers(ctypes.Structure):
    _fields_ = (
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("guard", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    )


class _TigerNumbers(ctypes.Structure):
    _fields_ = (
        ("lr", ctypes.c_double),
        ("gain", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("vector_scale", ctypes.c_double),
        ("rms_floor", ctypes.c_double),
        ("guard", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("update", ctypes.c_int32),
        ("decay_vectors", ctypes.c_int32),
    )


class SignUpdate:
    """The tensors of one call on the CPU: their addresses, which stay valid from step to step.

    Args:
        params: parameters of one dtype.
        exp_avgs: their momenta, of one dtype.
        compensations: what the parameters lack, for Kahan's rounding.
        numbers: one number per parameter, for the random bits of stochastic rounding.
        rows: length of a row where every row has a scale of its own, else 0 (Tiger).
        decayed: where the scale is a root mean square and weight decay holds (Tiger).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        *,
        compensations: Sequence[Tensor] = (),
        numbers: Sequence[int] = (),
        rows: Sequence[int] = (),
        decayed: Sequence[bool] = (),
    ) -> None:
        n = len(params)
        self.params, self.exp_avgs = list(params), list(exp_avgs)
        self._compensations = list(compensations)
        self._addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (self.params, self.exp_avgs)]
        self._dtype = params[0].dtype
        self._dtypes = (_CODES[self._dtype], _CODES[exp_avgs[0].dtype])
        # Gradients must lie in memory as their parameters do; for most, contiguity says so at once.
        self._strides = [None if p.is_contiguous() else p.stride() for p in params]
        self._plain = not any(self._strides)
        self._finite = bytearray(n)
        self._kept: list[object] = []
        self._grads = array("q", bytes(8 * n))
        self._columns = _Columns(
            n,
            self._column("q", self._addresses[0]),
            self._grads.buffer_info()[0],
            self._column("q", self._addresses[1]),
            self._column("q", (c.data_ptr() for c in compensations)) if compensations else None,
            self._column("q", (p.numel() for p in params)),
            self._column("q", rows) if rows else None,
            self._column("q", numbers) if numbers else None,
            ctypes.addressof(self._keep((ctypes.c_uint8 * n).from_buffer(self._finite))),
        )
        self._decayed = self._column("B", map(int, decayed)) if decayed else None
        self._decay = array("d", bytes(8 * n))

    def _keep(self, buffer: ctypes.Array[ctypes.c_uint8]) -> ctypes.Array[ctypes.c_uint8]:
        self._kept.append(buffer)
        return buffer

    def _column(self, code: Literal["q", "B"], values: Iterable[int]) -> int:
        column = array(code, values)
        self._kept.append(column)
        return column.buffer_info()[0]

    def holds(self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of this call, still at their addresses."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, exp_avgs, self.exp_avgs))
            and list(map(Tensor.data_ptr, params)) == self._addresses[0]
            and list(map(Tensor.data_ptr, exp_avgs)) == self._addresses[1]
        )

    def take(self, grads: Sequence[Tensor | None]) -> bool:
        """Point to the gradients of this step; False if one cannot be read by the kernel as it lies in memory."""
        try:
            for i, grad in enumerate(grads):
                if grad is None:
                    continue
                if type(grad) is not Tensor or grad.dtype != self._dtype or grad.layout != torch.strided:
                    return False
                strides = self._strides[i]
                if not grad.is_contiguous() if strides is None else grad.stride() != strides:
                    return False
            self._grads[:] = array("q", [0 if grad is None else grad.data_ptr() for grad in grads])
        except RuntimeError:
            # Tensors without storage.
            return False
        return True

    def take_all(self, grads: Sequence[Tensor | None]) -> bool:
        """As `take`, at a fraction of its cost, for the common case; False says nothing but that it is not."""
        if not self._plain:
            return self.take(grads)
        try:
            if set(map(type, grads)) != {Tensor}:
                return False
            tensors = cast("Sequence[Tensor]", grads)
            if {grad.dtype for grad in tensors} != {self._dtype} or not all(map(Tensor.is_contiguous, tensors)):
                return False
            self._grads[:] = array("q", map(Tensor.data_ptr, tensors))
        except RuntimeError:
            # Sparse tensors have no address.
            return False
        return True

    def lion(
        self, *, lr: float, betas: tuple[float, float], weight_decay: float, guard: bool, low: LowPrecision
    ) -> list[int]:
        """One step of Lion in place; returns the indices of tensors that were skipped because of their gradients."""
        numbers = _LionNumbers(
            lr,
            *betas,
            weight_decay,
            guard,
            _MODES[low.mode],
            torch.get_num_threads(),
            low.seed & 0xFFFFFFFF,
            low.step & 0xFFFFFFFF,
        )
        done = _cpp.library("sign_update").danlu_lion(*self._dtypes, ctypes.byref(self._columns), ctypes.byref(numbers))
        return self._finish(done, True, guard)

    def tiger(
        self,
        *,
        decays: Sequence[float],
        gain: float,
        lr: float,
        weight_decay: float,
        vector_scale: float,
        rms_floor: float,
        update: bool,
        decay_vectors: bool,
        guard: bool,
        low: LowPrecision,
    ) -> list[int]:
        """One micro-step of Tiger in place; returns the indices of tensors with gradients that are not finite.

        `decays` is what the momenta are multiplied by. A tensor with a bad gradient is left as it is.
        """
        self._decay[:] = array("d", decays)
        numbers = _TigerNumbers(
            lr,
            gain,
            weight_decay,
            vector_scale,
            rms_floor,
            guard,
            _MODES[low.mode],
            torch.get_num_threads(),
            low.seed & 0xFFFFFFFF,
            low.step & 0xFFFFFFFF,
            update,
            decay_vectors,
        )
        done = _cpp.library("sign_update").danlu_tiger(
            *self._dtypes,
            ctypes.byref(self._columns),
            ctypes.c_void_p(self._decay.buffer_info()[0]),
            ctypes.c_void_p(self._decayed),
            ctypes.byref(numbers),
        )
        return self._finish(done, update, guard)

    def _finish(self, done: int, moved: bool, guard: bool) -> list[int]:
        if not done:
            raise RuntimeError(f"no kernel for parameters of {self._dtype} with momenta of {self.exp_avgs[0].dtype}")
        # Autograd and caches of others see by the version that a tensor has changed.
        if moved:
            torch.autograd.graph.increment_version(self.params)
        torch.autograd.graph.increment_version(self.exp_avgs)
        return [i for i, finite in enumerate(self._finite) if not finite] if guard and 0 in self._finite else []
