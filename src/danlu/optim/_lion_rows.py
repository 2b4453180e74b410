"""The step of Lion on a group, and on rows of a table as `_row_steps.py` calls it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from danlu.kernels.sign_update import LowPrecision, SignRows
from danlu.optim._lion_functional import lion
from danlu.optim._rounding import resolve_rounding
from danlu.optim._row_steps import part_number
from danlu.optim._state import group_rounding

__all__ = ["lion_in_place", "lion_of_group", "lion_rows"]


def lion_of_group(
    group: Mapping[str, Any],
    step: int | Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    counts: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    guard: bool = True,
) -> list[int]:
    """`lion` with the options of a group; `step` and the parameters' `numbers` among all are for the random bits."""
    return lion(
        params,
        grads,
        [state["exp_avg"] for state in states],
        lr=group["lr"],
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        nonfinite="skip" if guard and group["nonfinite"] in ("skip", "shrink") else "off",
        nonfinite_counts=counts,
        rounding=group_rounding(group, step, numbers, states),
        foreach=group["foreach"],
        fused=group["fused"],
        maximize=group["maximize"],
    )


def lion_rows(
    group: Mapping[str, Any],
    step: int | Tensor,
    count: Tensor,
    number: int,
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Tensor],
    folded: bool,
    guard: bool,
    part: int,
) -> None:
    """`lion` as `step_rows` calls it, on some rows of one tensor."""
    if grad is not None:
        lion_of_group(group, step, [param], [grad], [state], [count], [part_number(number, part)], guard=guard)


def lion_in_place(
    group: Mapping[str, Any],
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor,
    factors: Tensor,
    folded: bool,
) -> None:
    """`lion` as `step_rows` calls it, on rows where they lie."""
    del folded
    mode = resolve_rounding(group["rounding"], param.dtype)
    call = SignRows(
        param, grad, state["exp_avg"], rows, factors, compensation=state["compensation"] if mode == "kahan" else None
    )
    lr, weight_decay = group["lr"], group["weight_decay"]
    if group["maximize"]:
        lr, weight_decay = -lr, -weight_decay
    call.step_lion(lr=lr, betas=group["betas"], weight_decay=weight_decay, low=LowPrecision(mode))
