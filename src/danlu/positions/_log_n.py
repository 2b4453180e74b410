r"""A factor of the queries that keeps the entropy of attention when there are more keys than in training.

Source: kexue.fm articles 8823 (the entropy of attention) and 9708 (the factor for models trained without it).

Shape letters: `...` any axes of counts.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer

__all__ = ["LogN", "logn_scale"]

LogN = Literal["train", "post"]


def logn_scale(visible: int | Tensor, train_length: int, mode: LogN = "post") -> Tensor:
    r"""Factor of a query that sees `visible` keys.

    Definition:
        $$\frac{\log\max(n, 2)}{\log T}\ \text{(train)}, \qquad \max\Big(1, \frac{\log n}{\log T}\Big)\ \text{(post)}$$
        with $n$ = `visible` and $T$ = `train_length`.

    Args:
        visible: $n$, number of keys that a query sees, its own included: with a causal mask the position plus 1, not
            counting padding. An int, or a tensor of integers of any shape `(...)`.
        train_length: $T \ge 2$, the length that the model was trained on.
        mode: "train" for a model that was trained with the factor; "post" for one that was not, which leaves short text
            as it is.

    Returns:
        Shape `(...)`, float64; 1 where a query of a model in "post" sees nothing.

    Raises:
        TypeError: `visible` is neither an int nor a tensor of integers, or `train_length` not an int.
        ValueError: `train_length` is below 2, an int `visible` is negative, or `mode` is unknown.

    Numerics:
        Computed in float64; cast it to the dtype of the queries, or better multiply the scale of the scores.

    Source:
        As in the module; the mode "post" is what the articles mark with a dagger.

    Example:
        >>> from danlu.positions import logn_scale
        >>> logn_scale(4096, 512)
        tensor(1.3333, dtype=torch.float64)
    """
    check_integer("train_length", train_length, low=2)
    check_choice("mode", mode, ("train", "post"))
    if isinstance(visible, Tensor):
        if visible.is_floating_point() or visible.is_complex() or visible.dtype == torch.bool:
            raise TypeError(f"visible must be integers, got dtype {visible.dtype}")
        count = visible.to(torch.float64)
    else:
        count = torch.tensor(float(check_integer("visible", visible, low=0)), dtype=torch.float64)
    if mode == "train":
        return count.clamp(min=2).log() / math.log(train_length)
    return (count.clamp(min=1).log() / math.log(train_length)).clamp(min=1)
