"""Rows of smooth top-k by a threshold, their vector-Jacobian product, and rows of hard top-k, in C++ on the CPU."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["hard_topk_cpu", "soft_topk_cpu", "soft_topk_vjp_cpu"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_METHODS = {"exp": 0, "laplace": 1, "sigmoid": 2, "clip": 3}
# Starting a thread takes as long as this many elements.
_PER_THREAD = 1 << 16


@cache
def _library() -> Any:
    library = _cpp.library("soft_topk")
    pointer, integer, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.danlu_soft_topk.argtypes = [code, code, integer, integer, pointer, pointer, pointer, pointer, code]
    library.danlu_soft_topk_vjp.argtypes = [code, code, integer, integer, pointer, pointer, pointer, code]
    library.danlu_hard_topk.argtypes = [code, integer, integer, pointer, pointer, pointer, code]
    return library


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // _PER_THREAD))


def soft_topk_cpu(scores: Tensor, k: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Values and thresholds along the last axis; `k` broadcasts to one number per row."""
    scores = scores.contiguous()
    rows = scores.shape[:-1]
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    out, thresholds = torch.empty_like(scores), scores.new_empty(*rows, 1, dtype=wide)
    if scores.numel():
        n = scores.shape[-1]
        sizes = k.expand(*rows, 1).to(torch.float64).contiguous()
        _library().danlu_soft_topk(
            _CODES[scores.dtype], _METHODS[method], scores.numel() // n, n, scores.data_ptr(), sizes.data_ptr(),
            out.data_ptr(), thresholds.data_ptr(), _threads(scores),
        )  # fmt: skip
    return out, thresholds


def soft_topk_vjp_cpu(values: Tensor, cotangent: Tensor, method: str) -> Tensor:
    """The Jacobian at `values` times `cotangent`."""
    values, cotangent = values.contiguous(), cotangent.to(values.dtype).contiguous()
    out = torch.empty_like(values)
    if values.numel():
        n = values.shape[-1]
        _library().danlu_soft_topk_vjp(
            _CODES[values.dtype], _METHODS[method], values.numel() // n, n, values.data_ptr(), cotangent.data_ptr(),
            out.data_ptr(), _threads(values),
        )  # fmt: skip
    return out


def hard_topk_cpu(scores: Tensor, k: Tensor) -> Tensor:
    """The indicator of the k largest along the last axis, of equal ones the first; `k` as in `soft_topk_cpu`."""
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    if scores.numel():
        n = scores.shape[-1]
        sizes = k.expand(*scores.shape[:-1], 1).to(torch.float64).contiguous()
        _library().danlu_hard_topk(
            _CODES[scores.dtype], scores.numel() // n, n, scores.data_ptr(), sizes.data_ptr(), out.data_ptr(),
            _threads(scores),
        )  # fmt: skip
    return out
