r"""Lazy rows: an optimizer that moves only those rows of a table whose gradient says something about them.

Under a sign update a row that was seen once keeps moving: the sign of its momentum stays $\pm1$ however small the
momentum gets. Here are the options that ask for lazy rows, and the rows that a caller marks. `_row_steps.py` has the
step.

Source: kexue.fm articles 9736 (2023-08-28) and 6869, the "lazy" optimizer.

Shape letters: V rows, `...` the other axes of a table (none for a vector).
"""

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu import kernels
from danlu._common.checks import check_choice
from danlu.optim._param_groups import KINDS
from danlu.optim._rounding import resolve_rounding
from danlu.optim._row_steps import RowsInPlace, RowUpdate, step_rows

__all__ = ["LazyRows", "check_lazy", "check_rows", "is_lazy", "is_special", "warn_if_lazy_is_idle"]


def check_lazy(options: Mapping[str, Any]) -> None:
    """Raise unless `lazy` is a bool or a sequence of kinds and `lazy_state` is known."""
    lazy = options["lazy"]
    if not isinstance(lazy, (bool, list, tuple)):
        raise TypeError(f"lazy must be a bool or a sequence of kinds such as ('embedding',), got {lazy!r}")
    if not isinstance(lazy, bool):
        for kind in lazy:
            check_choice("lazy", kind, KINDS)
    check_choice("lazy_state", options["lazy_state"], ("decay", "freeze"))


def check_rows(param_groups: list[dict[str, Any]]) -> None:
    """Remove the last group again and raise `ValueError` if it is lazy and a parameter has no rows."""
    group = param_groups[-1]
    if is_lazy(group) and any(param.ndim == 0 for param in group["params"]):
        param_groups.pop()
        raise ValueError("lazy needs parameters with rows, got one of shape ()")


def is_special(group: Mapping[str, Any]) -> bool:
    """Whether a step of this group is more than one call of the optimizer's function on its tensors as they are."""
    return is_lazy(group) or group.get("padding_idx") is not None or group["sign_deadzone"] > 0


def warn_if_lazy_is_idle(name: str, lazy: bool | Sequence[str], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if `lazy` names kinds and no group is of one of them."""
    if not isinstance(lazy, bool) and lazy and not any(is_lazy(group) for group in param_groups):
        warnings.warn(
            f"lazy={tuple(lazy)!r} has no effect: {name} got no parameter group of such a kind; pass the groups of "
            "danlu.optim.parameter_groups(model)",
            stacklevel=3,
        )


def is_lazy(group: Mapping[str, Any]) -> bool:
    """Whether the rows of this group's parameters are updated lazily."""
    lazy = group.get("lazy", ())
    return lazy if isinstance(lazy, bool) else group.get("kind") in lazy


class LazyRows:
    """The marks of one optimizer, and its steps of lazy tables."""

    def __init__(self) -> None:
        self._marks: dict[Tensor, Tensor] = {}

    def mark(self, param_groups: Sequence[Mapping[str, Any]], param: Tensor, ids: Tensor) -> None:
        """Remember rows of `param` for the next step, in addition to those marked since the last one."""
        owner = next((group for group in param_groups if any(param is one for one in group["params"])), None)
        if owner is None:
            raise ValueError(f"param of shape {tuple(param.shape)} is not a parameter of this optimizer")
        if not is_lazy(owner):
            raise ValueError("param is in a group that is not lazy, where marks mean nothing; set lazy=True there")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"token_ids must be a tensor of integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.device.type == "cpu" and ids.numel():
            low, high = (int(one) for one in ids.aminmax())
            if low < 0 or high >= param.shape[0]:
                raise ValueError(f"token_ids must be in [0, {param.shape[0]}), got a value {low if low < 0 else high}")
        if param not in self._marks:
            self._marks[param] = torch.zeros(param.shape[0], dtype=torch.bool, device=param.device)
        self._marks[param][ids.flatten().to(param.device)] = True

    def clear(self) -> None:
        """Forget the marks."""
        self._marks.clear()

    def step(
        self,
        param: Tensor,
        grad: Tensor | None,
        state: MutableMapping[str, Any],
        group: Mapping[str, Any],
        update: RowUpdate,
        *,
        beta: float,
        bad: Tensor,
        in_place: RowsInPlace,
        simple: bool = True,
        **place: bool,
    ) -> None:
        """`step_rows` with the options of a parameter group.

        `in_place` is a compiled `update`, which may be used if the step is `simple`; `place` holds `first`, `last` and
        `row_wise`.
        """
        wanted = group["fused"] or (group["fused"] is None and group["foreach"] is None)
        compiled = bool(wanted) and param.device.type == "cpu" and kernels.explain("sign_update", param) is None
        # The random bits of an element depend on its place in a tensor, which for one row is not that in the table.
        simple = simple and resolve_rounding(group["rounding"], param.dtype) != "stochastic"
        step_rows(
            param,
            grad,
            state,
            update,
            beta=beta,
            lazy_state=group["lazy_state"],
            marked=self._marks.get(param),
            padding_idx=group.get("padding_idx"),
            guard=group["nonfinite"] in ("skip", "shrink"),
            bad=bad,
            compiled=compiled,
            in_place=in_place if compiled and simple else None,
            # Finding rows waits for the device, which a CUDA graph cannot capture.
            eager=group["foreach"] is False or group["capturable"],
            **place,
        )
