r"""ALiBi: a penalty on scores that grows with the distance of the key, the baseline of length extrapolation.

Source: Press, Smith and Lewis (2021), "Train Short, Test Long", arXiv 2108.12409.

Shape letters: `H` heads; `M` queries; `N` keys; `...` batch axes.
"""

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_integer, check_same_device, is_low_precision

__all__ = ["alibi_bias", "alibi_slopes"]


def alibi_slopes(num_heads: int) -> Tensor:
    r"""Slopes of ALiBi.

    Definition:
        $$\lambda_h = 2^{-8h/H}, \qquad h = 1, \dots, H$$
        with $H$ = `num_heads`.

    Args:
        num_heads: $H \ge 1$.

    Returns:
        Slopes (score per position), shape `(H,)`, float64, on the CPU, falling.

    Raises:
        TypeError: `num_heads` is not an int.
        ValueError: `num_heads` < 1.

    Numerics:
        float64.

    Differences:
        The published code takes other slopes where $H$ is not a power of 2, every second one of the next power; here
        the formula holds for every $H$, so checkpoints with such head counts need their own slopes.

    Source:
        Press, Smith and Lewis (2021), arXiv 2108.12409, section 3.

    Example:
        >>> from danlu.positions import alibi_slopes
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039], dtype=torch.float64)
    """
    check_integer("num_heads", num_heads, low=1)
    return torch.pow(2.0, -8.0 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads)


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    r"""What ALiBi adds to the scores.

    Definition:
        $$B_{hij} = -\lambda_h\,|p_i - p_j|$$
        on both sides of the query; a causal mask is the attention's own affair.

    Args:
        slopes: $\lambda$, shape `(H,)`, floating; its dtype is that of the result.
        query_positions: shape `(..., M)`, integers or float32/float64.
        key_positions: shape `(..., N)`, of the same axes before the last.

    Returns:
        Shape `(..., H, M, N)`, dtype of `slopes`: an additive `attn_mask` of `scaled_dot_product_attention`.

    Raises:
        TypeError: `slopes` is not floating; positions are bool, complex or half.
        ValueError: `slopes` is not one-dimensional, positions have no axis, or devices differ.

    Numerics:
        Computed in float64 and cast at the end.

    Cost:
        $O(HMN)$ memory: a baseline for short text, not a kernel.

    Source:
        Press, Smith and Lewis (2021), arXiv 2108.12409, section 3.

    Example:
        >>> import torch
        >>> from danlu.positions import alibi_bias, alibi_slopes
        >>> alibi_bias(alibi_slopes(2), torch.arange(3), torch.arange(3))[0, 2]
        tensor([-0.1250, -0.0625, -0.0000], dtype=torch.float64)
    """
    check_floating("slopes", slopes)
    if slopes.ndim != 1:
        raise ValueError(f"slopes must have shape (H,), got {tuple(slopes.shape)}")
    for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
        if not isinstance(positions, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(positions).__name__}")
        if positions.dtype == torch.bool or positions.is_complex() or is_low_precision(positions.dtype):
            raise TypeError(f"{name} must be integers, float32 or float64, got dtype {positions.dtype}")
        if positions.ndim == 0:
            raise ValueError(f"{name} must have shape (..., L), got {tuple(positions.shape)}")
    check_same_device(slopes=slopes, query_positions=query_positions, key_positions=key_positions)
    distance = (query_positions.double()[..., :, None] - key_positions.double()[..., None, :]).abs()
    return (distance[..., None, :, :] * -slopes.double()[:, None, None]).to(slopes.dtype)
