r"""Frequencies of RoPE for text longer than a model was trained on.

Source: "Transformer升级之路:10、RoPE是一种β进制编码" (2023-07-06) and "11、将β进制位置进行到底" (2023-07-31); Chen et
al. (2023), arXiv 2306.15595, for interpolation.

Shape letters: `R` rotated channels.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real

__all__ = ["RopeMethod", "scaled_frequencies"]

RopeMethod = Literal["default", "linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed"]


def scaled_frequencies(dim: int, base: float, method: RopeMethod, factor: float, mixed_power: float) -> Tensor:
    """Frequencies for an expansion `factor`, shape `(dim / 2,)`, float64; `dim` and `base` are checked."""
    check_choice("method", method, get_args(RopeMethod))
    check_real("factor", factor, low=0.0, low_open=True)
    check_real("mixed_power", mixed_power, low=0.0)
    if method == "default":
        if factor != 1:
            raise ValueError(f"factor must be 1 with method='default', got {factor!r}")
        return _powers(base, dim)
    if method == "linear":
        return _powers(base, dim) / factor
    if method == "ntk-old":
        return _powers(base * factor, dim)
    if method == "ntk-aware":
        if dim == 2:
            raise ValueError("method='ntk-aware' needs a dim of at least 4: it keeps the first frequency, got 2")
        return _powers(base * factor ** (dim / (dim - 2)), dim)
    number = torch.arange(1, dim // 2 + 1, dtype=torch.float64)
    if method == "ntk-fixed":
        return _powers(base, dim) * factor ** (-2 * number / dim)
    return _powers(base, dim) * torch.exp(-math.log(factor) * (2 * number / dim) ** mixed_power)


def _powers(base: float, dim: int) -> Tensor:
    return torch.pow(base, -torch.arange(0, dim, 2, dtype=torch.float64) / dim)
