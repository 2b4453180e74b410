"""What the `vmap` rules of autograd functions share."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["batch_first"]


def batch_first(info: Any, tensors: Sequence[Tensor], axes: Sequence[int | None]) -> list[Tensor]:
    """The axis of `vmap` in front; made where there is none."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(tensors, axes, strict=True)
    ]
