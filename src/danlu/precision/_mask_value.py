"""The finite stand-in for minus infinity of a dtype.

Source: "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28), the advice to adjust "infinity" in half precision.
"""

import torch

__all__ = ["mask_value"]


def mask_value(dtype: torch.dtype) -> float:
    r"""The most negative finite number of a dtype, for scores that a softmax must not see.

    Definition:
        $$m = -x_{\max}(\text{dtype})$$
        such as $-65504$ for float16 and about $-3.4\cdot10^{38}$ for bfloat16 and float32. For use as
        `scores.masked_fill(hidden, mask_value(scores.dtype))`.

    Args:
        dtype: a real floating dtype, that of the tensor that is filled.

    Returns:
        A Python number that `dtype` holds exactly.

    Raises:
        TypeError: `dtype` is not a real floating `torch.dtype`.

    Numerics:
        A masked score has probability exactly 0 beside any ordinary score. A row that is masked as a whole gets the
        *uniform* distribution, where $-\infty$ would give NaN; treat such rows apart, as
        [`danlu.simplex.softmax`][danlu.simplex.softmax] does. Fill with this value, and do not add it: two of them
        add up to $-\infty$. A fixed $10^{12}$ is infinite in float16, where `scores - (1 - mask) * 1e12` makes NaN of
        the scores that are *not* masked, since $0 \cdot \infty$ is NaN.

    Source:
        "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28).

    Example:
        >>> import torch
        >>> from danlu.precision import mask_value
        >>> mask_value(torch.float16)
        -65504.0
        >>> scores = torch.zeros(3, dtype=torch.float16).masked_fill(torch.tensor([False, False, True]), -65504.0)
        >>> torch.softmax(scores, dim=-1)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float16)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point torch.dtype, got {dtype!r}")
    return torch.finfo(dtype).min
