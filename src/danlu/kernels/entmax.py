"""Rows of alpha-entmax and their vector-Jacobian product, in C++ on the CPU and in Triton on CUDA devices."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["entmax_cpu", "entmax_cuda", "entmax_vjp_cpu", "entmax_vjp_cuda", "refusal_of_cuda"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Starting a thread takes as long as this many elements.
_PER_THREAD = 1 << 17
# Longer rows do not fit into the registers of one program.
_LONGEST_ROW = 1 << 15


def entmax_cpu(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """The map along the last axis; `alpha` is a number or holds one per row."""
    return _call(scores, None, alpha)


def entmax_vjp_cpu(probabilities: Tensor, cotangent: Tensor, alpha: float | Tensor) -> Tensor:
    """The Jacobian at `probabilities` times `cotangent`."""
    return _call(probabilities, cotangent, alpha)


@cache
def _function() -> Any:
    function = _cpp.library("entmax").danlu_entmax
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        ctypes.c_int, integer, integer, pointer, pointer, pointer, ctypes.c_double, pointer, ctypes.c_int,
    ]  # fmt: skip
    return function


def _call(first: Tensor, second: Tensor | None, alpha: float | Tensor) -> Tensor:
    first = first.contiguous()
    second = None if second is None else second.to(first.dtype).contiguous()
    out = torch.empty_like(first)
    n = first.shape[-1]
    if not first.numel():
        return out
    rows = first.numel() // n
    alphas = None
    if isinstance(alpha, Tensor):
        alphas = alpha.expand(*first.shape[:-1], 1).to(torch.float64).contiguous()
    threads = max(1, min(torch.get_num_threads(), first.numel() // _PER_THREAD))
    done = _function()(
        _CODES[first.dtype], rows, n, first.data_ptr(), None if second is None else second.data_ptr(), out.data_ptr(),
        0.0 if isinstance(alpha, Tensor) else alpha, None if alphas is None else alphas.data_ptr(), threads,
    )  # fmt: skip
    if not done:
        raise RuntimeError(f"no kernel for rows of {first.dtype}")
    return out


def refusal_of_cuda(length: int, alpha: float | Tensor) -> str | None:
    """Why the Triton kernel does not take rows of `length` scores with this `alpha`; None if it does."""
    if isinstance(alpha, Tensor):
        return "the Triton kernel takes one alpha for all rows"
    # Below, powers of single precision lose too much; above, Newton's method does not converge from the left.
    if not 1.05 <= alpha <= 2.0:
        return f"the Triton kernel takes alpha in [1.05, 2], got {alpha:g}"
    if length > _LONGEST_ROW:
        return f"the Triton kernel takes rows of at most {_LONGEST_ROW} scores, got {length}"
    return None


def entmax_cuda(scores: Tensor, alpha: float) -> Tensor:
    """The map along the last axis."""
    from danlu.kernels import _entmax_triton

    return _entmax_triton.forward(scores.contiguous(), alpha)


def entmax_vjp_cuda(probabilities: Tensor, cotangent: Tensor, alpha: float) -> Tensor:
    """The Jacobian at `probabilities` times `cotangent`."""
    from danlu.kernels import _entmax_triton

    return _entmax_triton.vjp(probabilities.contiguous(), cotangent.to(probabilities.dtype).contiguous(), alpha)
