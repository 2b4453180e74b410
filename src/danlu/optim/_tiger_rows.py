"""The micro-step of Tiger on rows of a table, as `_row_steps.py` calls it."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from danlu.kernels.sign_update import LowPrecision, SignRows
from danlu.optim._param_groups import DECAYED
from danlu.optim._rounding import resolve_rounding
from danlu.optim._row_steps import part_number
from danlu.optim._tiger_functional import run_tiger
from danlu.optim._tiger_paths import TigerStep

__all__ = ["tiger_in_place", "tiger_rows"]


def tiger_rows(
    step: TigerStep,
    count: Tensor,
    beta: float,
    paths: Mapping[str, bool | None],
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Tensor],
    folded: bool,
    guard: bool,
    part: int,
) -> None:
    """One micro-step as `step_rows` calls it, on some rows of one tensor."""
    number, compensation = step.rounding.number(0), state.get("compensation")
    rounding = replace(step.rounding, numbers=[part_number(number, part)], compensations=[compensation])
    step = replace(step, decays=[1.0 if folded else beta], guard=guard, rounding=rounding)
    run_tiger([param], [grad], [state["exp_avg"]], [count], step, **paths)


def tiger_in_place(
    step: TigerStep,
    beta: float,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor,
    factors: Tensor,
    folded: bool,
) -> None:
    """One micro-step as `step_rows` calls it, on rows where they lie."""
    mode = resolve_rounding(step.rounding.mode, param.dtype)
    kind = step.kinds[0]
    call = SignRows(
        param,
        grad,
        state["exp_avg"],
        rows,
        factors if folded else factors * beta,
        compensation=state["compensation"] if mode == "kahan" else None,
        row=param.shape[-1] if kind == "embedding" else 0,
        decayed=kind in DECAYED,
    )
    numbers = {
        "lr": step.lr,
        "gain": step.gain,
        "weight_decay": step.weight_decay,
        "vector_scale": step.vector_scale,
        "rms_floor": step.rms_floor,
    }
    call.step_tiger(numbers, decay_vectors=step.decay_vectors, update=step.update, low=LowPrecision(mode))
