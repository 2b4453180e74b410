"""SquarePlus and its derivative from the output alone, in C++ on the CPU.

Called directly, and through operators of torch where a compiler traces: those cost more per call. Neither knows of
derivatives; the caller has them.
"""

import ctypes

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["squareplus_backward", "squareplus_forward", "squareplus_forward_"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def squareplus_forward(input: Tensor, b: float | Tensor) -> Tensor:
    """SquarePlus of a tensor on the CPU; `b` is a number or a tensor with one element."""
    if torch.compiler.is_compiling():
        return _forward(input, torch.as_tensor(b))
    output = torch.empty_like(input)
    _run(_laid_out(input, output), output, b)
    return output


def squareplus_forward_(input: Tensor, b: float | Tensor) -> None:
    """The same in place; `input` is contiguous."""
    _run(input, input, b)


def squareplus_backward(grad: Tensor, output: Tensor, b: float | Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of `b`, the latter in float64."""
    if torch.compiler.is_compiling():
        return _backward(grad, output, torch.as_tensor(b))
    d_input, d_b = torch.empty_like(output), ctypes.c_double()
    grad, output = _laid_out(grad.to(output.dtype), d_input), _laid_out(output, d_input)
    _cpp.library("squareplus").danlu_squareplus_backward(
        _CODES[output.dtype],
        ctypes.c_void_p(grad.data_ptr()),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_void_p(d_input.data_ptr()),
        ctypes.c_int64(output.numel()),
        ctypes.c_double(float(b)),
        torch.get_num_threads(),
        ctypes.byref(d_b),
    )
    return d_input, torch.tensor(d_b.value, dtype=torch.float64)


def _run(input: Tensor, output: Tensor, b: float | Tensor) -> None:
    _cpp.library("squareplus").danlu_squareplus(
        _CODES[input.dtype],
        ctypes.c_void_p(input.data_ptr()),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_int64(input.numel()),
        ctypes.c_double(float(b)),
        torch.get_num_threads(),
    )


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like`, which is dense."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


@torch.library.custom_op("danlu::squareplus", mutates_args=(), device_types="cpu")
def _forward(input: Tensor, b: Tensor) -> Tensor:
    return squareplus_forward(input, b)


@torch.library.custom_op("danlu::squareplus_backward", mutates_args=(), device_types="cpu")
def _backward(grad: Tensor, output: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return squareplus_backward(grad, output, b)


@_forward.register_fake
def _(input: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(input)


@_backward.register_fake
def _(grad: Tensor, output: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), output.new_empty((), dtype=torch.float64)
