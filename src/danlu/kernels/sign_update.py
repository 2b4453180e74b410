"""One step of Lion and of Tiger on many tensors at once: C++ on the CPU, one launch of a Triton kernel on CUDA.

Each element of parameter, gradient and momentum is read once and written once. Every tensor is dense, and a parameter,
its gradient and its momentum have the same strides.
"""

import ctypes
import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["LowPrecision", "SignRows", "SignUpdate", "dtypes_supported", "find_rows", "first_key", "mix"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"nearest": 0, "stochastic": 1, "kahan": 2}
_WORD = 0xFFFFFFFF


def dtypes_supported(param: torch.dtype, exp_avg: torch.dtype) -> bool:
    """Whether there is a kernel for parameters and momenta of these dtypes."""
    return param in _CODES and (exp_avg == param or (exp_avg == torch.float32 and param != torch.float64))


@dataclass(frozen=True)
class LowPrecision:
    """How results are rounded into the parameters; the random bits are a function of seed, step, number and element."""

    mode: Literal["nearest", "stochastic", "kahan"] = "nearest"
    seed: int = 0
    step: int | Tensor = 0


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
        ("near", ctypes.c_double),
        ("far", ctypes.c_double),
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
    """The tensors of one call: their addresses, which stay valid from step to step.

    Args:
        params: parameters of one dtype on one device.
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
        self.params, self.exp_avgs = list(params), list(exp_avgs)
        self._compensations = list(compensations)
        everything = self.params, self.exp_avgs, self._compensations
        self._addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in everything]
        self._dtype = params[0].dtype
        # Gradients must lie in memory as their parameters do; for most, contiguity says so at once.
        self._strides = [None if p.is_contiguous() else p.stride() for p in params]
        self._plain = not any(self._strides)
        self._shapes = [p.shape for p in params]
        self._numels = [p.numel() for p in params]
        backend = _Cpu if params[0].device.type == "cpu" else _Cuda
        self._backend = backend(
            self.params,
            self.exp_avgs,
            self._addresses[:2],
            compensations=self._addresses[2],
            numbers=numbers,
            rows=rows,
            decayed=decayed,
        )

    def holds(
        self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor], compensations: Sequence[Tensor | None] = ()
    ) -> bool:
        """Whether these are the tensors of this call, still at their addresses and of their sizes."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, exp_avgs, self.exp_avgs))
            and len(compensations) == len(self._compensations)
            and all(map(operator.is_, compensations, self._compensations))
            and list(map(Tensor.data_ptr, params)) == self._addresses[0]
            and list(map(Tensor.data_ptr, exp_avgs)) == self._addresses[1]
            and [compensation.data_ptr() for compensation in self._compensations] == self._addresses[2]
            # `param.data = param.data[:n]`, or a transposition, stays at its address.
            and [param.shape for param in params] == self._shapes
            and self._lie_as_before(params)
        )

    def _lie_as_before(self, params: Sequence[Tensor]) -> bool:
        if self._plain:
            return all(map(Tensor.is_contiguous, params))
        return [None if p.is_contiguous() else p.stride() for p in params] == self._strides

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
                if grad.numel() != self._numels[i] or grad.is_neg():
                    return False
            self._backend.point_to(array("q", [0 if grad is None else grad.data_ptr() for grad in grads]))
        except RuntimeError:
            # Tensors without storage.
            return False
        return True

    def take_all(self, grads: Sequence[Tensor | None]) -> bool:
        """As `take`, at a fraction of its cost, for the common case; False says nothing but that it is not."""
        if not self._plain:
            return all(grad is not None for grad in grads) and self.take(grads)
        try:
            if set(map(type, grads)) != {Tensor}:
                return False
            tensors = cast("Sequence[Tensor]", grads)
            if {grad.dtype for grad in tensors} != {self._dtype} or not all(map(Tensor.is_contiguous, tensors)):
                return False
            # The memory of a lazily negated tensor holds the numbers before the negation.
            if list(map(Tensor.numel, tensors)) != self._numels or any(map(Tensor.is_neg, tensors)):
                return False
            self._backend.point_to(array("q", map(Tensor.data_ptr, tensors)))
        except RuntimeError:
            # Sparse tensors have no address.
            return False
        return True

    def lion(
        self,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        guard: bool,
        low: LowPrecision,
        counts: Sequence[Tensor] | None = None,
    ) -> None:
        """One step of Lion in place; tensors with bad gradients are left alone, and 1 is added to their counts."""
        numbers = {"lr": lr, "near": 1 - betas[0], "far": 1 - betas[1], "weight_decay": weight_decay}
        bad = self._backend.lion(numbers, guard, low)
        self._finish(True, bad, counts if guard else None)

    def tiger(
        self,
        *,
        decays: Sequence[float],
        gain: float,
        lr: float | Tensor,
        weight_decay: float,
        vector_scale: float,
        rms_floor: float,
        shrink: float,
        center: float,
        update: bool,
        decay_vectors: bool,
        guard: bool,
        low: LowPrecision,
        counts: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """One micro-step of Tiger in place; `decays` is what the momenta are multiplied by.

        Returns the indices of tensors that the caller must still shrink because of bad gradients; on CUDA that is done.
        """
        numbers = {
            "lr": lr,
            "gain": gain,
            "weight_decay": weight_decay,
            "vector_scale": vector_scale,
            "rms_floor": rms_floor,
            "shrink": shrink,
            "center": center,
        }
        bad = self._backend.tiger(numbers, decays, guard, update, decay_vectors, low)
        on_device = isinstance(bad, Tensor)
        self._finish(update or (guard and on_device), bad, counts if guard else None)
        return [] if isinstance(bad, Tensor) else bad

    def _finish(self, moved: bool, bad: list[int] | Tensor, counts: Sequence[Tensor] | None) -> None:
        """Count bad gradients, which are listed, or flagged on the device."""
        # Autograd and caches of others see by the version that a tensor has changed.
        if moved:
            torch.autograd.graph.increment_version(self.params)
        torch.autograd.graph.increment_version(self.exp_avgs)
        if counts is None:
            return
        if isinstance(bad, Tensor):
            torch._foreach_add_(list(counts), list(bad.unbind()))
        else:
            for i in bad:
                counts[i].add_(1)


class _Cpu:
    """Columns of numbers for the C++ functions."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        addresses: Sequence[Sequence[int]],
        *,
        compensations: Sequence[int],
        numbers: Sequence[int],
        rows: Sequence[int],
        decayed: Sequence[bool],
    ) -> None:
        n = len(params)
        self._dtypes = (_CODES[params[0].dtype], _CODES[exp_avgs[0].dtype])
        self._finite = bytearray(n)
        self._finite_buffer = (ctypes.c_uint8 * n).from_buffer(self._finite)
        self._grads, self._decay = array("q", bytes(8 * n)), array("d", bytes(8 * n))
        self._kept: list[array[int]] = []
        self._columns = _Columns(
            n,
            self._column("q", addresses[0]),
            self._grads.buffer_info()[0],
            self._column("q", addresses[1]),
            self._column("q", compensations) if compensations else None,
            self._column("q", (p.numel() for p in params)),
            self._column("q", rows) if rows else None,
            self._column("q", numbers) if numbers else None,
            ctypes.addressof(self._finite_buffer),
        )
        self._decayed: int | None = self._column("B", map(int, decayed)) if decayed else None
        # Where Lion finds what its momenta are multiplied by first.
        self._lion_decay: int | None = None

    def _column(self, code: Literal["q", "B"], values: Iterable[int]) -> int:
        column = array(code, values)
        self._kept.append(column)
        return column.buffer_info()[0]

    def point_to(self, grads: "array[int]") -> None:
        self._grads[:] = grads

    def lion(self, numbers: Mapping[str, float | Tensor], guard: bool, low: LowPrecision) -> list[int]:
        values = [float(numbers[name]) for name in ("lr", "near", "far", "weight_decay")]
        options = _LionNumbers(*values, guard, *self._common(low))
        done = _cpp.library("sign_update").danlu_lion(
            *self._dtypes, ctypes.byref(self._columns), ctypes.c_void_p(self._lion_decay), ctypes.byref(options)
        )
        return self._bad(done, guard)

    def tiger(
        self,
        numbers: Mapping[str, float | Tensor],
        decays: Sequence[float],
        guard: bool,
        update: bool,
        decay_vectors: bool,
        low: LowPrecision,
    ) -> list[int]:
        decay = self._point_to_decays(decays)
        values = [float(numbers[name]) for name in ("lr", "gain", "weight_decay", "vector_scale", "rms_floor")]
        options = _TigerNumbers(*values, guard, *self._common(low), update, decay_vectors)
        done = _cpp.library("sign_update").danlu_tiger(
            *self._dtypes,
            ctypes.byref(self._columns),
            ctypes.c_void_p(decay),
            ctypes.c_void_p(self._decayed),
            ctypes.byref(options),
        )
        return self._bad(done, guard)

    def _point_to_decays(self, decays: Sequence[float]) -> int | None:
        self._decay[:] = array("d", decays)
        return self._decay.buffer_info()[0]

    def _common(self, low: LowPrecision) -> tuple[int, int, int, int]:
        return _MODES[low.mode], torch.get_num_threads(), low.seed & _WORD, int(low.step) & _WORD

    def _bad(self, done: int, guard: bool) -> list[int]:
        if not done:
            raise RuntimeError(f"there is no kernel for the dtypes with the codes {self._dtypes}")
        return [i for i, finite in enumerate(self._finite) if not finite] if guard and 0 in self._finite else []


class SignRows(_Cpu):
    """Some rows of one table as the tensors of one call, on the CPU, in place.

    Args:
        param: contiguous table.
        grad: contiguous; as many rows as `param`, or one for each of `rows`.
        exp_avg: contiguous momentum.
        rows: places of the rows, all different, int64.
        decays: what the momentum of each row is multiplied by first, float64.
        compensation: what the parameter lacks, for Kahan's rounding.
        row: length of a row where each has a scale of its own, else 0 (Tiger).
        decayed: whether the scale is a root mean square and weight decay holds (Tiger).
    """

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        rows: Tensor,
        decays: Tensor,
        *,
        compensation: Tensor | None = None,
        row: int = 0,
        decayed: bool = False,
    ) -> None:
        n = len(rows)
        self._tables = [param, exp_avg, *([] if compensation is None else [compensation])]
        self._dtypes = (_CODES[param.dtype], _CODES[exp_avg.dtype])
        self._finite = bytearray(n)
        self._finite_buffer = (ctypes.c_uint8 * n).from_buffer(self._finite)
        own = torch.arange(n) if len(grad) == n else rows
        columns = {
            "p": _addresses(param, rows),
            "g": _addresses(grad, own),
            "m": _addresses(exp_avg, rows),
            "numel": torch.full((n,), param[0].numel()),
            "row": torch.full((n,), row),
        }
        if compensation is not None:
            columns["compensation"] = _addresses(compensation, rows)
        marks = torch.full((n,), int(decayed), dtype=torch.uint8)
        # The call reads them by their addresses.
        self._alive = [*columns.values(), marks, decays, grad]
        places = {name: column.data_ptr() for name, column in columns.items()}
        self._columns = _Columns(n=n, finite=ctypes.addressof(self._finite_buffer), **places)
        self._decayed: int | None = marks.data_ptr()
        self._lion_decay: int | None = decays.data_ptr()

    def step_lion(
        self, *, lr: float | Tensor, betas: tuple[float, float], weight_decay: float, low: LowPrecision
    ) -> None:
        """One step of Lion, without a look for bad gradients."""
        self.lion({"lr": lr, "near": 1 - betas[0], "far": 1 - betas[1], "weight_decay": weight_decay}, False, low)
        torch.autograd.graph.increment_version(self._tables)

    def step_tiger(
        self, numbers: Mapping[str, float | Tensor], *, decay_vectors: bool, update: bool, low: LowPrecision
    ) -> None:
        """One micro-step of Tiger, without a look for bad gradients."""
        self.tiger(numbers, (), False, update, decay_vectors, low)
        torch.autograd.graph.increment_version(self._tables if update else self._tables[1:])

    def _point_to_decays(self, decays: Sequence[float]) -> int | None:
        del decays
        return self._lion_decay


def _addresses(table: Tensor, rows: Tensor) -> Tensor:
    return rows * (table.stride(0) * table.element_size()) + table.data_ptr()


def find_rows(table: Tensor) -> tuple[Tensor, bool]:
    """Which rows of a contiguous table on the CPU hold an element other than 0, and whether all elements are finite."""
    found = torch.empty(len(table), dtype=torch.bool)
    finite = _cpp.library("sign_update").danlu_find_rows(
        _CODES[table.dtype],
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int64(len(table)),
        ctypes.c_int64(table.numel() // len(table)),
        torch.get_num_threads(),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found, bool(finite)


class _Cuda:
    """Columns of numbers on the device for the Triton kernels; those that do not change are sent once."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        addresses: Sequence[Sequence[int]],
        *,
        compensations: Sequence[int],
        numbers: Sequence[int],
        rows: Sequence[int],
        decayed: Sequence[bool],
    ) -> None:
        from danlu.kernels import _sign_update_triton as triton_side

        self._triton_side = triton_side
        self._device = params[0].device
        self._dtypes = (params[0].dtype, exp_avgs[0].dtype)
        n = len(params)
        self._numbers_of_params = list(numbers)
        self._host_grads = array("q", bytes(8 * n))
        self._host_decays: list[float] = []
        self._static_aligned = all(address % 16 == 0 for column in (*addresses, compensations) for address in column)
        self._aligned = False
        self._seed: int | None = None
        self._scalars: dict[str, tuple[float, Tensor]] = {}
        self._table = triton_side.tables(
            [p.numel() for p in params], list(rows) or [0] * n, self._device, self._dtypes[0]
        )
        self._table |= {
            "params": self._send(addresses[0]),
            "exp_avgs": self._send(addresses[1]),
            "compensations": self._send(list(compensations) or [0] * n),
            "decayed": self._send([int(one) for one in decayed] or [0] * n),
            "keys": self._send([0] * n),
            "grads": self._send([0] * n),
        }

    def _send(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device)

    def _scalar(self, name: str, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self._device)
        if name not in self._scalars or self._scalars[name][0] != value:
            self._scalars[name] = (value, self._send([value], torch.float64))
        return self._scalars[name][1]

    def point_to(self, grads: "array[int]") -> None:
        if grads != self._host_grads:
            self._host_grads = grads
            self._table["grads"] = self._send(grads)
            self._aligned = self._static_aligned and all(address % 16 == 0 for address in grads)

    def lion(self, numbers: Mapping[str, float | Tensor], guard: bool, low: LowPrecision) -> Tensor:
        self._triton_side.launch_lion(
            self._table, self._prepare(numbers, low), self._dtypes, low.mode, guard=guard, aligned=self._aligned
        )
        return self._bad()

    def tiger(
        self,
        numbers: Mapping[str, float | Tensor],
        decays: Sequence[float],
        guard: bool,
        update: bool,
        decay_vectors: bool,
        low: LowPrecision,
    ) -> Tensor:
        if self._host_decays != list(decays):
            self._host_decays = list(decays)
            self._table["decays"] = self._send(decays, torch.float64)
        self._triton_side.launch_tiger(
            self._table,
            self._prepare(numbers, low),
            self._dtypes,
            low.mode,
            guard=guard,
            update=update,
            decay_vectors=decay_vectors,
            aligned=self._aligned,
        )
        return self._bad()

    def _prepare(self, numbers: Mapping[str, float | Tensor], low: LowPrecision) -> dict[str, Tensor]:
        """The numbers of a step on the device, and the keys of its random bits."""
        found = {name: self._scalar(name, value) for name, value in numbers.items()}
        if low.mode == "stochastic":
            if self._seed != low.seed:
                self._seed = low.seed
                self._table["keys"] = self._send([first_key(low.seed, number) for number in self._numbers_of_params])
            found["step"] = self._scalar("step", low.step)
        else:
            found["step"] = self._scalar("step", 0)
        return found

    def _bad(self) -> Tensor:
        return (1 - self._table["finite"]).to(torch.int64)


def mix(word: int) -> int:
    """Hash of 32 bits, bijective: the finalizer of MurmurHash3 (A. Appleby, public domain)."""
    word &= _WORD
    word ^= word >> 16
    word = word * 0x85EBCA6B & _WORD
    word ^= word >> 13
    word = word * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


def first_key(seed: int, number: int) -> int:
    """The first of the two words that decide the random bits of parameter `number`; the other follows from the step."""
    return mix(mix(seed) + 0x9E3779B9 * (number + 1))
