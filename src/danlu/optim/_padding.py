r"""Padding rows: rows of a table that stand for "no token", and that no step may move.

Shape letters: V rows, `...` the other axes of a table (none for a vector).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer

__all__ = ["check_padding", "fixed_padding"]


def check_padding(param_groups: list[dict[str, Any]]) -> None:
    """Remove the last group again and raise if its `padding_idx` is not the number of a row of its parameters."""
    group = param_groups[-1]
    row = group.get("padding_idx")
    if row is None:
        return
    try:
        check_integer("padding_idx", row, low=0)
        for param in group["params"]:
            if param.ndim == 0 or param.shape[0] <= row:
                raise ValueError(f"padding_idx={row} is not a row of a parameter of shape {tuple(param.shape)}")
    except (TypeError, ValueError):
        param_groups.pop()
        raise


@contextlib.contextmanager
def fixed_padding(group: Mapping[str, Any], params: Sequence[Tensor]) -> Iterator[None]:
    """Put the padding rows of these parameters of a group back to what they were on entry."""
    row = group.get("padding_idx")
    held: list[tuple[Tensor, Tensor]] = []
    if row is not None:
        held = [(view, view.clone()) for view in (_row(param, row) for param in params)]
    try:
        yield
    finally:
        with torch.no_grad():
            for view, value in held:
                view.copy_(value)


def _row(param: Tensor, row: int) -> Tensor:
    """A view of one row; of a DTensor what this process holds of it, which may be nothing."""
    if type(param) in (Tensor, nn.Parameter) or not hasattr(param, "to_local"):
        return param.detach()[row]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local: Tensor = param.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(
        param.shape,
        param.device_mesh,  # pyrefly: ignore[missing-attribute]
        param.placements,  # pyrefly: ignore[missing-attribute]
    )
    first = offset[0]
    return local[row - first] if first <= row < first + local.shape[0] else local[:0]
