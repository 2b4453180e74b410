"""Softmax with a temperature, defined also where every score is masked.

Source: J. S. Bridle (1990), "Probabilistic Interpretation of Feedforward Classification Network Outputs".

Shape letters: `N` the length of the axis `dim`; `...` any other axes.
"""

import torch
from torch import Tensor, nn

from danlu._common.checks import check_dim, check_floating, check_real, is_low_precision

__all__ = ["Softmax", "softmax"]


def softmax(input: Tensor, *, dim: int = -1, temperature: float = 1.0) -> Tensor:
    r"""Softmax of scores divided by a temperature.

    Definition:
        $$p_i = \frac{e^{x_i/\tau}}{\sum_{j=1}^{N} e^{x_j/\tau}}$$
        with $x$ = `input` along `dim` and $\tau$ = `temperature`. A score of $-\infty$ is a mask and gets exactly 0;
        a slice in which all scores are $-\infty$ is defined as all zeros.

    Args:
        input: scores (nats), shape `(..., N, ...)`, any floating dtype; $-\infty$ entries are masks.
        dim: the axis that is normalized, from `-input.ndim` to `input.ndim - 1`.
        temperature: $\tau > 0$; the result tends to the one-hot maximum as it tends to 0.

    Returns:
        Probabilities of the shape and dtype of `input`; each slice sums to 1, or to 0 where it is fully masked.

    Raises:
        TypeError: `input` is not a floating-point tensor, `dim` not an int, `temperature` not a number.
        ValueError: `dim` does not exist or is empty; `temperature` is not in $(0, \infty)$.

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. The maximum is subtracted first, so scores of
        any size are safe; a single $+\infty$ gives the one-hot vector. A fully masked slice has zero gradient.
        NaN stays within its slice.

    Differences:
        `torch.softmax` returns NaN, with NaN gradient, for a fully masked slice.

    Source:
        Bridle (1990); "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Softmax.

    Example:
        >>> import torch
        >>> from danlu.simplex import softmax
        >>> softmax(torch.tensor([0.0, 1.0, float("-inf")]), temperature=0.5)
        tensor([0.1192, 0.8808, 0.0000])
    """
    check_floating("input", input)
    check_dim("dim", dim, input)
    check_real("temperature", temperature, low=0.0, low_open=True)
    scores = input.float() if is_low_precision(input.dtype) else input
    scores = (scores / temperature).clamp(max=torch.finfo(scores.dtype).max)
    masked = (scores == float("-inf")).all(dim=dim, keepdim=True)
    # Filling before and after keeps the masked slice out of the graph: no 0 * NaN in the backward pass.
    probabilities = torch.softmax(scores.masked_fill(masked, 0.0), dim=dim).masked_fill(masked, 0.0)
    return probabilities.to(input.dtype)


class Softmax(nn.Module):
    r"""Module form of [`softmax`][danlu.simplex.softmax].

    Definition:
        `forward(input) = softmax(input, dim=dim, temperature=temperature)`.

    Args:
        dim: the axis that is normalized.
        temperature: $\tau > 0$.

    Returns:
        From `forward`: probabilities of the shape and dtype of its input.

    Raises:
        ValueError: as in the function; raised at construction for `temperature`.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.simplex import Softmax
        >>> Softmax(temperature=2.0)(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __init__(self, dim: int = -1, temperature: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.temperature = check_real("temperature", temperature, low=0.0, low_open=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return the probabilities."""
        return softmax(input, dim=self.dim, temperature=self.temperature)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"dim={self.dim}, temperature={self.temperature}"
