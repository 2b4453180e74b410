"""The Triton side of `sign_update`: all tensors of one dtype in one launch, by tables of addresses on the device.

A table of chunks says which piece of which tensor a program takes. Which gradients are finite, and the root mean
squares of Tiger, come from a launch of their own before the step, and stay on the device. Nothing waits for the host;
with a learning rate and a step number that are tensors, a captured graph replays with their current values.

This module is imported only where Triton is there.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_lion", "launch_tiger", "tables"]

# Elements per program. Kernels of this kind are bound by memory, and 1024 elements give each thread of 4 warps 8.
BLOCK = 1024
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MODES = {"nearest": 0, "stochastic": 1, "kahan": 2}


@triton.jit
def _mix(word):
    word ^= word >> 16
    word *= 0x85EBCA6B
    word ^= word >> 13
    word *= 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _random_bits(first, step, index):
    """The bits of element `index`; `first` is the key's first word, and its second follows from the step."""
    second = _mix((step * 0x7F4A7C15) ^ _mix(first + 1))
    return _mix(_mix(index ^ first) + second)


@triton.jit
def _rounded(value, bits, P: tl.constexpr):
    """Stochastically to a neighbor in float16 or bfloat16, as float32; large values and NaN as they are."""
    if tl.bfloat16 == P:
        words = value.to(tl.uint32, bitcast=True)
        stepped = ((words + (bits >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(value) < 3.3895313892515355e38, stepped, value)
    magnitude = tl.abs(value)
    exponent = (magnitude.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 126
    last = tl.maximum(exponent - 11, -24)
    spacing = ((last + 127).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - last).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    noise = (bits >> 19).to(tl.float32) / 8192.0
    stepped = tl.floor(magnitude * inverse + noise) * spacing
    stepped = tl.where(value < 0, -stepped, stepped)
    return tl.where(magnitude < 65504.0, stepped, value)


@triton.jit
def _address(column, tensor, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor begins; with the promise of 16 bytes, full chunks are read and written in vectors."""
    address = tl.load(column + tensor).to(tl.pointer_type(T))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _read(pointers, mask, F: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0).to(F)
    return tl.load(pointers).to(F)


@triton.jit
def _write(pointers, values, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values)


@triton.jit
def _check_chunk(
    p,
    g,
    c,
    index,
    mask,
    F: tl.constexpr,
    GUARD: tl.constexpr,
    SQUARES: tl.constexpr,
    KAHAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """0 for a finite gradient, else NaN; the parameter's sum of squares."""
    poison = 0.0
    squares = 0.0
    if GUARD:
        poison = tl.sum(_read(g + index, mask, F, MASKED) * 0.0, axis=0)
    if SQUARES:
        theta = _read(p + index, mask, F, MASKED)
        if KAHAN:
            theta += _read(c + index, mask, F, MASKED)
        squares = tl.sum(theta * theta, axis=0)
    return poison, squares


@triton.jit
def _check(
    chunk_tensor,
    chunk_start,
    grads,
    params,
    compensations,
    numels,
    finite,
    partial,
    P: tl.constexpr,
    F: tl.constexpr,
    GUARD: tl.constexpr,
    SQUARES: tl.constexpr,
    KAHAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per chunk: whether the gradient is finite (0 is written where it is not), and the parameter's sum of squares."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
    count = tl.load(numels + tensor)
    index = start + tl.arange(0, BLOCK)
    p = _address(params, tensor, P, ALIGNED)
    g = _address(grads, tensor, P, ALIGNED)
    if GUARD:
        if tl.load(grads + tensor) == 0:
            # No gradient: something must be read, and the parameter is there.
            g = p
    c = _address(compensations, tensor, P, ALIGNED)
    if start + BLOCK <= count:
        poison, squares = _check_chunk(p, g, c, index, index >= 0, F, GUARD, SQUARES, KAHAN, False)
    else:
        poison, squares = _check_chunk(p, g, c, index, index < count, F, GUARD, SQUARES, KAHAN, True)
    if GUARD:
        if (poison != 0.0) & (tl.load(grads + tensor) != 0):
            tl.store(finite + tensor, 0)
    if SQUARES:
        tl.store(partial + chunk, squares)


@triton.jit
def _scales(
    params,
    compensations,
    first_chunk,
    numels,
    rows,
    decayed,
    scale_start,
    partial,
    scales,
    row_tensor,
    row_number,
    vector_scale,
    rms_floor,
    P: tl.constexpr,
    F: tl.constexpr,
    KAHAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One scale per program: of a row where a tensor has a scale for each row, else of the tensor."""
    program = tl.program_id(0)
    tensor = tl.load(row_tensor + program)
    length = tl.load(rows + tensor)
    squares = tl.zeros((BLOCK,), dtype=F)
    count = tl.load(numels + tensor)
    if length > 0:
        base = tl.load(params + tensor).to(tl.pointer_type(P)) + tl.load(row_number + program) * length
        for start in range(0, length, BLOCK):
            index = start + tl.arange(0, BLOCK)
            theta = tl.load(base + index, mask=index < length, other=0.0).to(F)
            if KAHAN:
                lack = tl.load(compensations + tensor).to(tl.pointer_type(P)) + tl.load(row_number + program) * length
                theta += tl.load(lack + index, mask=index < length, other=0.0).to(F)
            squares += theta * theta
        count = length
    else:
        first = tl.load(first_chunk + tensor)
        last = tl.load(first_chunk + tensor + 1)
        for start in range(first, last, BLOCK):
            index = start + tl.arange(0, BLOCK)
            squares += tl.load(partial + index, mask=index < last, other=0.0).to(F)
    rms = tl.sqrt(tl.sum(squares, axis=0) / count.to(F))
    raised = tl.maximum(rms, tl.load(rms_floor).to(F))
    scale = tl.where(tl.load(decayed + tensor) != 0, raised, tl.load(vector_scale).to(F))
    tl.store(scales + tl.load(scale_start + tensor) + tl.load(row_number + program), scale)


@triton.jit
def _store_parameter(
    p, c, theta, key, step, index, mask, P: tl.constexpr, F: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr
):
    if MODE == 1:
        theta = _rounded(theta, _random_bits(key, step, index.to(tl.uint32)), P)
    _write(p, theta.to(P), mask, MASKED)
    if MODE == 2:
        _write(c, (theta - theta.to(P).to(F)).to(P), mask, MASKED)


@triton.jit
def _lion_chunk(
    p,
    g,
    m,
    c,
    key,
    step,
    lr,
    near,
    far,
    wd,
    index,
    mask,
    P: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,
):
    theta = _read(p + index, mask, F, MASKED)
    if MODE == 2:
        theta += _read(c + index, mask, F, MASKED)
    grad = _read(g + index, mask, F, MASKED)
    momentum = _read(m + index, mask, F, MASKED)
    # The two forms of torch.lerp.
    update = tl.where(near < 0.5, momentum + near * (grad - momentum), grad - (grad - momentum) * (1 - near))
    sign = (update > 0).to(F) - (update < 0).to(F)
    momentum = tl.where(far < 0.5, momentum + far * (grad - momentum), grad - (grad - momentum) * (1 - far))
    _write(m + index, momentum.to(M), mask, MASKED)
    _store_parameter(p + index, c + index, theta - lr * (sign + wd * theta), key, step, index, mask, P, F, MODE, MASKED)


@triton.jit
def _lion(
    chunk_tensor,
    chunk_start,
    params,
    grads,
    exp_avgs,
    compensations,
    numels,
    keys,
    finite,
    lr,
    step,
    near,
    far,
    weight_decay,
    P: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    GUARD: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
    count = tl.load(numels + tensor)
    if GUARD:
        # No element of a tensor with a bad gradient is touched.
        count = tl.where(tl.load(finite + tensor) != 0, count, 0)
    index = start + tl.arange(0, BLOCK)
    p = _address(params, tensor, P, ALIGNED)
    g = _address(grads, tensor, P, ALIGNED)
    m = _address(exp_avgs, tensor, M, ALIGNED)
    c = _address(compensations, tensor, P, ALIGNED)
    key = tl.load(keys + tensor).to(tl.uint32)
    bits_step = tl.load(step).to(tl.uint32)
    rate = tl.load(lr).to(F)
    a = tl.load(near).to(F)
    b = tl.load(far).to(F)
    wd = tl.load(weight_decay).to(F)
    if start + BLOCK <= count:
        _lion_chunk(p, g, m, c, key, bits_step, rate, a, b, wd, index, index >= 0, P, M, F, MODE, False)
    else:
        _lion_chunk(p, g, m, c, key, bits_step, rate, a, b, wd, index, index < count, P, M, F, MODE, True)


@triton.jit
def _tiger_chunk(
    p,
    g,
    m,
    c,
    scales,
    key,
    step,
    decay,
    gain,
    lr,
    wd,
    shrink,
    center,
    length,
    good,
    has_grad,
    index,
    mask,
    P: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    GUARD: tl.constexpr,
    UPDATE: tl.constexpr,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,
):
    momentum = _read(m + index, mask, F, MASKED)
    if has_grad:
        momentum = momentum * decay + gain * _read(g + index, mask, F, MASKED)
        _write(m + index, momentum.to(M), mask, MASKED)
    if UPDATE or GUARD:
        theta = _read(p + index, mask, F, MASKED)
        if MODE == 2:
            theta += _read(c + index, mask, F, MASKED)
        moved = theta
        if UPDATE:
            place = tl.where(length > 0, index // tl.maximum(length, 1), 0)
            scale = _read(scales + place, mask, F, MASKED)
            sign = (momentum > 0).to(F) - (momentum < 0).to(F)
            moved = theta - lr * scale * (sign + wd * theta)
        if GUARD:
            shrunk = tl.where(shrink == 1.0, theta, center + (theta - center) * shrink)
            moved = tl.where(good, moved, shrunk)
        _store_parameter(p + index, c + index, moved, key, step, index, mask, P, F, MODE, MASKED)


@triton.jit
def _tiger(
    chunk_tensor,
    chunk_start,
    params,
    grads,
    exp_avgs,
    compensations,
    numels,
    keys,
    rows,
    decayed,
    decays,
    scale_start,
    scales,
    finite,
    lr,
    step,
    gain,
    weight_decay,
    shrink,
    center,
    P: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    GUARD: tl.constexpr,
    UPDATE: tl.constexpr,
    DECAY_VECTORS: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensor + chunk)
    start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
    count = tl.load(numels + tensor)
    good = tl.load(finite + tensor) != 0
    has_grad = tl.load(grads + tensor) != 0
    if GUARD:
        has_grad = has_grad & good
    index = start + tl.arange(0, BLOCK)
    p = _address(params, tensor, P, ALIGNED)
    g = _address(grads, tensor, P, ALIGNED)
    m = _address(exp_avgs, tensor, M, ALIGNED)
    c = _address(compensations, tensor, P, ALIGNED)
    s = scales + tl.load(scale_start + tensor)
    key = tl.load(keys + tensor).to(tl.uint32)
    bits_step = tl.load(step).to(tl.uint32)
    decay = tl.load(decays + tensor).to(F)
    share = tl.load(gain).to(F)
    rate = tl.load(lr).to(F)
    wd = tl.load(weight_decay).to(F)
    if not DECAY_VECTORS:
        wd = tl.where(tl.load(decayed + tensor) != 0, wd, wd * 0.0)
    keep = tl.load(shrink).to(F)
    middle = tl.load(center).to(F)
    length = tl.load(rows + tensor)
    if start + BLOCK <= count:
        _tiger_chunk(
            p, g, m, c, s, key, bits_step, decay, share, rate, wd, keep, middle, length, good, has_grad,
            index, index >= 0, P, M, F, GUARD, UPDATE, MODE, False,
        )  # fmt: skip
    else:
        _tiger_chunk(
            p, g, m, c, s, key, bits_step, decay, share, rate, wd, keep, middle, length, good, has_grad,
            index, index < count, P, M, F, GUARD, UPDATE, MODE, True,
        )  # fmt: skip


def tables(numels: Sequence[int], rows: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """For parameters of `dtype`: which piece of which tensor each program takes, where each tensor's scales begin."""
    counts = [-(-n // BLOCK) for n in numels]
    scale_counts = [n // row if row else 1 for n, row in zip(numels, rows, strict=True)]
    tensor_of_chunk = torch.repeat_interleave(torch.arange(len(numels)), torch.tensor(counts))
    first_chunk = torch.tensor([0, *counts]).cumsum(0)
    scale_start = torch.tensor([0, *scale_counts]).cumsum(0)
    row_tensor = torch.repeat_interleave(torch.arange(len(numels)), torch.tensor(scale_counts))
    made = {
        "chunk_tensor": tensor_of_chunk,
        "chunk_start": (torch.arange(len(tensor_of_chunk)) - first_chunk[tensor_of_chunk]) * BLOCK,
        "first_chunk": first_chunk,
        "numels": torch.tensor(numels),
        "rows": torch.tensor(rows),
        "scale_start": scale_start[:-1],
        "row_tensor": row_tensor,
        "row_number": torch.arange(len(row_tensor)) - scale_start[row_tensor],
    }
    found = {name: table.to(device) for name, table in made.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found["partial"] = torch.empty(len(tensor_of_chunk), dtype=wide, device=device)
    found["scales"] = torch.empty(len(row_tensor), dtype=wide, device=device)
    found["finite"] = torch.ones(len(numels), dtype=torch.int32, device=device)
    return found


def launch_lion(
    table: dict[str, Tensor],
    numbers: dict[str, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    mode: str,
    *,
    guard: bool,
    aligned: bool,
) -> None:
    """The step on the tensors of `table`; `numbers` are tensors with one element."""
    P, M, F = _types(dtypes)
    if guard:
        _launch_check(table, P, F, mode, guard=True, squares=False, aligned=aligned)
    _lion[(len(table["chunk_tensor"]),)](
        *_columns(table, "chunk_tensor chunk_start params grads exp_avgs compensations numels keys finite"),
        *_columns(numbers, "lr step near far weight_decay"),
        P=P,
        M=M,
        F=F,
        GUARD=guard,
        MODE=_MODES[mode],
        ALIGNED=aligned,
        BLOCK=BLOCK,
    )


def launch_tiger(
    table: dict[str, Tensor],
    numbers: dict[str, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    mode: str,
    *,
    guard: bool,
    update: bool,
    decay_vectors: bool,
    aligned: bool,
) -> None:
    """The micro-step on the tensors of `table`; `numbers` are tensors with one element."""
    P, M, F = _types(dtypes)
    if guard or update:
        _launch_check(table, P, F, mode, guard=guard, squares=update, aligned=aligned)
    if update:
        scale_columns = "params compensations first_chunk numels rows decayed scale_start partial scales"
        _scales[(len(table["row_tensor"]),)](
            *_columns(table, scale_columns + " row_tensor row_number"),
            *_columns(numbers, "vector_scale rms_floor"),
            P=P,
            F=F,
            KAHAN=mode == "kahan",
            BLOCK=BLOCK,
        )
    step_columns = "chunk_tensor chunk_start params grads exp_avgs compensations numels keys rows decayed decays"
    _tiger[(len(table["chunk_tensor"]),)](
        *_columns(table, step_columns + " scale_start scales finite"),
        *_columns(numbers, "lr step gain weight_decay shrink center"),
        P=P,
        M=M,
        F=F,
        GUARD=guard,
        UPDATE=update,
        DECAY_VECTORS=decay_vectors,
        MODE=_MODES[mode],
        ALIGNED=aligned,
        BLOCK=BLOCK,
    )


def _launch_check(
    table: dict[str, Tensor], P: Any, F: Any, mode: str, *, guard: bool, squares: bool, aligned: bool
) -> None:
    table["finite"].fill_(1)
    _check[(len(table["chunk_tensor"]),)](
        *_columns(table, "chunk_tensor chunk_start grads params compensations numels finite partial"),
        P=P,
        F=F,
        GUARD=guard,
        SQUARES=squares,
        KAHAN=mode == "kahan",
        ALIGNED=aligned,
        BLOCK=BLOCK,
    )


def _types(dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Any, Any, Any]:
    return _TYPES[dtypes[0]], _TYPES[dtypes[1]], tl.float64 if dtypes[0] == torch.float64 else tl.float32


def _columns(table: dict[str, Tensor], names: str) -> list[Tensor]:
    return [table[name] for name in names.split()]
