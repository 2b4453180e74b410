r"""Writing float32 results into float16 and bfloat16 parameters: to nearest, stochastically, or with a compensation.

A step smaller than half the spacing of a low-precision parameter is lost when it is rounded to nearest. Stochastic
rounding keeps it on average, and Kahan's compensation keeps it in a second tensor of the same dtype.

The random bits are a hash of (seed, step, parameter, element) and nothing else: they do not touch the global random
state, a resumed run repeats them, and every path (plain, blocked, compiled) draws the same ones.

Source: Kahan (1965), "Further remarks on reducing truncation errors".

Shape letters: `...` the shape of a parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from danlu._common.checks import check_choice, check_integer, is_low_precision
from danlu.kernels.sign_update import first_key, mix

__all__ = [
    "ROUNDINGS",
    "Rounding",
    "RoundingMode",
    "Writer",
    "check_rounding",
    "element_index",
    "hashed_bits",
    "hashed_normal",
    "read",
    "resolve_rounding",
    "rounding_key",
    "stochastically_rounded",
    "write",
]

RoundingMode = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS: tuple[RoundingMode, ...] = ("nearest", "stochastic", "kahan")

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35
# Of one integer per parameter, and of one per step: odd constants that spread small integers over 32 bits.
_PARAMETER, _STEP = 0x9E3779B9, 0x7F4A7C15


def _mix_tensor(words: Tensor) -> Tensor:
    """`mix` of every element of an int32 tensor, which is changed; shifts must be logical, so they are masked."""
    words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))
    words.mul_(_signed(_FIRST))
    words.bitwise_xor_((words >> 13).bitwise_and_(0x7FFFF))
    words.mul_(_signed(_SECOND))
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def rounding_key(seed: int, parameter: int, step: int | Tensor) -> tuple[int, int | Tensor]:
    """Two words that, with the element's index, decide its random bits; a tensor `step` stays on its device."""
    first = first_key(seed, parameter)
    if isinstance(step, Tensor):
        words = (step.to(torch.int32) * _signed(_STEP)).bitwise_xor_(_signed(mix(first + 1)))
        return first, _mix_tensor(words)
    return first, mix(step * _STEP & _MASK ^ mix(first + 1))


def hashed_bits(key: tuple[int, int | Tensor], index: Tensor) -> Tensor:
    """32 random bits per element as int32, for `index` (int32), which is changed."""
    first, second = key
    words = _mix_tensor(index.bitwise_xor_(_signed(first)))
    words.add_(second if isinstance(second, Tensor) else _signed(second))
    return _mix_tensor(words)


def hashed_normal(key: tuple[int, int | Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
    """One standard normal number per element of `index` (int32), by the transform of Box and Muller."""
    first, second = key
    # 24 bits are what float32 holds exactly; half a unit keeps the logarithm away from 0.
    uniform = [
        (hashed_bits((first ^ salt, second), index.clone()) >> 8).bitwise_and_(0xFFFFFF).to(dtype).add_(0.5).div_(2**24)
        for salt in (0, _PARAMETER)
    ]
    return (-2 * uniform[0].log()).sqrt_() * (2 * torch.pi * uniform[1]).cos_()


def element_index(tensor: Tensor, start: int = 0) -> Tensor:
    """Number of every element as int32: the place in memory for tensors without gaps, else the place by rows.

    Beyond 2**32 elements the numbers repeat.
    """
    count = torch.arange(start, start + tensor.numel(), device=tensor.device).to(torch.int32)
    if tensor.is_contiguous():
        return count.view(tensor.shape)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    if tensor.permute(order).is_contiguous():
        back = [order.index(axis) for axis in range(tensor.ndim)]
        return count.view([tensor.shape[axis] for axis in order]).permute(back)
    return count.view(tensor.shape)


def resolve_rounding(rounding: RoundingMode | None, dtype: torch.dtype) -> RoundingMode:
    """The mode for a parameter: None means stochastic for bfloat16; wide dtypes are never rounded further."""
    if not is_low_precision(dtype):
        return "nearest"
    if rounding is None:
        return "stochastic" if dtype == torch.bfloat16 else "nearest"
    return rounding


@dataclass(frozen=True)
class Rounding:
    r"""How the results of one step are rounded into float16 and bfloat16 parameters.

    Definition:
        With the result $x$ in float32 and the spacing $h$ of the parameter's dtype at $x$: `"nearest"` stores the
        nearest multiple of $h$; `"stochastic"` stores $h \lfloor x/h + u \rfloor$ with $u$ uniform in $[0, 1)$, so that
        the expectation is $x$; `"kahan"` stores the nearest multiple and keeps $x$ minus it in a second tensor of the
        parameter's dtype, which the next step adds to what it reads.

    Args:
        mode: `"nearest"`, `"stochastic"` or `"kahan"`; None means stochastic for bfloat16 and nearest for float16.
            Wider dtypes are never rounded further.
        seed: of the random bits; they are a hash of seed, step, number of the parameter and element.
        step: number of the step; a tensor stays on its device.
        numbers: number of each parameter in the lists of the step; empty means its place there.
        compensations: second tensor of each parameter, for `"kahan"`; None where it has none.

    Raises:
        TypeError: `seed` or `step` is not an integer.
        ValueError: an unknown `mode`, or a negative `seed` or `step`.

    Numerics:
        A step below half the spacing is lost to `"nearest"`, which for bfloat16 are most steps of a training run.
        Values beyond the largest number of the dtype, and NaN, are rounded to nearest. Random bits repeat beyond
        $2^{32}$ elements of one parameter; stochastic rounding of float16 uses 13 of them, of bfloat16 16.

    Source:
        Kahan (1965), "Further remarks on reducing truncation errors"; Gupta et al. (2015), "Deep Learning with Limited
        Numerical Precision", arXiv 1502.02551, section 3.

    Example:
        >>> import torch
        >>> from danlu.optim import Rounding, lion
        >>> w = torch.ones(1000, dtype=torch.bfloat16)
        >>> grads, momenta = [torch.ones_like(w)], [torch.zeros_like(w)]
        >>> for step in range(100):  # 100 steps of 0.001, each far below half the spacing of 0.0039
        ...     _ = lion([w], grads, momenta, lr=0.001, rounding=Rounding("stochastic", step=step))
        >>> round(w.float().mean().item(), 2)
        0.9
    """

    mode: RoundingMode | None = None
    seed: int = 0
    step: int | Tensor = 0
    numbers: Sequence[int] = ()
    compensations: Sequence[Tensor | None] = ()

    def __post_init__(self) -> None:
        """Refuse unknown modes before any work is done."""
        check_rounding(self.mode)
        check_integer("seed", self.seed, low=0)
        if not isinstance(self.step, Tensor):
            check_integer("step", self.step, low=0)

    def of(self, index: int, dtype: torch.dtype) -> "Writer | None":
        """What reads and writes parameter `index`, of `dtype`; None where nothing is rounded."""
        if not is_low_precision(dtype):
            return None
        mode = resolve_rounding(self.mode, dtype)
        key = rounding_key(self.seed, self.number(index), self.step) if mode == "stochastic" else (0, 0)
        return Writer(mode, key, self.compensation(index) if mode == "kahan" else None)

    def number(self, index: int) -> int:
        """The number of parameter `index` of the lists."""
        return self.numbers[index] if self.numbers else index

    def compensation(self, index: int) -> Tensor:
        """The second tensor of parameter `index` of the lists."""
        found = self.compensations[index] if index < len(self.compensations) else None
        if found is None:
            raise ValueError(f"compensations must hold a tensor for parameter {index} with rounding 'kahan', got none")
        return found

    def pick(self, indices: Sequence[int]) -> "Rounding":
        """For the parameters at `indices` of the lists."""
        return replace(
            self,
            numbers=[self.number(i) for i in indices],
            compensations=[self.compensations[i] for i in indices] if self.compensations else (),
        )


def check_rounding(rounding: object) -> None:
    """Raise `ValueError` unless the mode is known or None."""
    if rounding is not None:
        check_choice("rounding", rounding, ROUNDINGS)


@dataclass(frozen=True)
class Writer:
    """Reads one low-precision parameter in float32, and rounds the result of a step into it.

    Args:
        mode: to nearest, stochastically, or with the compensation of Kahan.
        key: of the random bits, from `rounding_key`.
        compensation: what the parameter lacks, in its shape and dtype, for Kahan.
        start: number of the first element, for views into a parameter.
    """

    mode: RoundingMode
    key: tuple[int, int | Tensor] = (0, 0)
    compensation: Tensor | None = None
    start: int = 0

    def read(self, param: Tensor) -> Tensor:
        """The parameter in float32, with its compensation; a new tensor."""
        value = param.to(torch.float32)
        return value if self.compensation is None else value.add_(self.compensation)

    def write(self, param: Tensor, value: Tensor) -> None:
        """Round `value` (float32, may be changed) into the parameter."""
        if self.mode == "stochastic":
            param, value, start, key = local_part(param, value, self.key)
            index = element_index(param, self.start + start)
            param.copy_(stochastically_rounded(value, hashed_bits(key, index), param.dtype))
            return
        param.copy_(value)
        if self.compensation is not None:
            self.compensation.copy_(value.sub_(param))

    def view(self, compensation: Tensor | None, start: int) -> "Writer":
        """For a view into the parameter that begins `start` elements after it."""
        return replace(self, compensation=compensation, start=self.start + start)


def local_part(
    param: Tensor, value: Tensor, key: tuple[int, int | Tensor]
) -> tuple[Tensor, Tensor, int, tuple[int, int | Tensor]]:
    """The shards of a DTensor that this process holds, with the number of their first element; else all as it is.

    A parameter that is sharded by rows, as FSDP2 does, draws the bits of the whole one. Under other placements every
    shard has bits of its own, and replicas have equal ones.
    """
    if type(param) in (Tensor, nn.Parameter) or not hasattr(param, "to_local"):
        return param, value, 0, key
    placements, mesh = param.placements, param.device_mesh  # pyrefly: ignore[missing-attribute]
    value = value.redistribute(mesh, placements)  # pyrefly: ignore[missing-attribute]
    local, start = param.to_local(), 0
    sharded = [axis for axis, placement in enumerate(placements) if placement.is_shard()]
    if len(sharded) == 1 and placements[sharded[0]].is_shard(dim=0):
        # The split of torch.chunk: all shards but the last have the same number of rows.
        rows = -(-param.shape[0] // mesh.size(sharded[0]))
        start = min(rows * mesh.get_local_rank(sharded[0]), param.shape[0]) * (param.numel() // max(1, param.shape[0]))
    else:
        first, second = key
        for axis in sharded:
            first = mix(first ^ mix(mesh.get_local_rank(axis) + 1))
        key = (first, second)
    return local, value.to_local(), start, key  # pyrefly: ignore[missing-attribute]


def stochastically_rounded(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    r"""One of the two neighbors of `value` (float32) in `dtype`, the nearer one with the higher probability.

    With the spacing $h$ at the value, it is $h \lfloor |x| / h + u \rfloor \operatorname{sign} x$ for $u$ uniform in
    $[0, 1)$ from the upper `bits`. What is not finite, or beyond the largest number, is rounded to nearest.
    """
    if dtype == torch.bfloat16:
        words = value.contiguous().view(torch.int32)
        noise = (bits >> 16).bitwise_and_(0xFFFF)
        # A bfloat16 is the upper half of a float32; a carry out of the lower half is the step to the neighbor.
        rounded = (words + noise.view_as(words)).bitwise_and_(-0x10000).view(torch.float32)
        return torch.where(value.abs() < torch.finfo(dtype).max, rounded, value).to(dtype)
    magnitude = value.abs()
    _, exponent = torch.frexp(magnitude)
    # 11 significant bits, the last at 2**-24 for subnormal numbers; 13 random bits keep the sum exact in float32.
    spacing = torch.ldexp(torch.ones_like(value), (exponent - 11).clamp_(min=-24))
    noise = (bits >> 19).bitwise_and_(0x1FFF).to(torch.float32).div_(8192)
    rounded = (magnitude / spacing).add_(noise).floor_().mul_(spacing).copysign_(value)
    return torch.where(magnitude < torch.finfo(dtype).max, rounded, value).to(dtype)


def read(param: Tensor, writer: Writer | None) -> Tensor:
    """The parameter in the dtype of the arithmetic; itself where that is its own."""
    return param if writer is None else writer.read(param)


def write(param: Tensor, value: Tensor, writer: Writer | None) -> None:
    """Store the result of a step, unless the arithmetic was done in place."""
    if writer is not None:
        writer.write(param, value)
    elif value is not param:
        param.copy_(value)
