r"""Exponentiated gains of a step: a gain per element and a scale per tensor, their state, and what moves them.

Shape letters: `...` any shape, the same for a parameter, its gradient and its state tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from danlu._common.checks import check_real
from danlu.optim._nonfinite import all_finite, counter, plain
from danlu.optim._rounding import Writer
from danlu.optim._state import add_compensation, group_rounding
from danlu.optim._traversal import compute_dtype

__all__ = [
    "Item",
    "Kind",
    "Measured",
    "Rule",
    "adapt_scales",
    "check_range",
    "items_of",
    "log_range",
    "measured",
    "updated_gain_",
]

Kind = Literal["sgdm", "adam", "sgd", "wrapped"]

# exp(80) and exp(-80) are still ordinary float32 numbers; gains without bounds stop there.
LOG_LIMIT = 80.0
# Of the reference implementation: keeps the cosine of two vanishing vectors at 0.
_TINY = 1e-10


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The numbers of one step of a group; `climb` is for steps upwards, `decay` is lr * weight_decay."""

    kind: Kind
    lr: float
    climb: bool = False
    decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum_beta: float = 0.9
    gain_lr: float = 0.0
    scale_lr: float = 0.0
    gain_range: tuple[float, float] = (0.0, math.inf)
    scale_range: tuple[float, float] = (0.0, math.inf)
    normalize_scale: bool = True
    sign_gain: bool = True
    guard: bool = True


@dataclass(frozen=True)
class Item:
    """One tensor of a step with its state, its counter of gradients that were not finite, and how it is rounded."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    count: Tensor | None
    rule: Rule
    writer: Writer | None = None


@dataclass(frozen=True)
class Measured:
    """Whether the gradient is finite (a bool if the host knows), and inner products with the last direction."""

    finite: bool | Tensor
    dot: Tensor | None = None
    grad_square: Tensor | None = None
    direction_square: Tensor | None = None


def check_range(name: str, bounds: object) -> None:
    """Raise unless `bounds` is a pair with 0 <= low <= 1 <= high; high may be infinite."""
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {bounds!r}")
    check_real(f"{name}[0]", bounds[0], low=0.0, high=1.0)
    if bounds[1] != math.inf:
        check_real(f"{name}[1]", bounds[1], low=1.0)


def log_range(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds as logarithms."""
    low = math.log(bounds[0]) if bounds[0] > 0 else -LOG_LIMIT
    high = math.log(bounds[1]) if bounds[1] < math.inf else LOG_LIMIT
    return max(low, -LOG_LIMIT), min(high, LOG_LIMIT)


def _new_state(state: dict[str, Tensor], param: Tensor, rule: Rule, log_scale: Tensor | None = None) -> None:
    """Add the tensors that `rule` needs and `state` lacks; a rate that never was positive needs none.

    All are in the dtype of the arithmetic, so float32 for bfloat16 parameters: a gain moves by 1 % per step. The
    scale starts at 1, or at that of the others where they share one.
    """

    def zeros() -> Tensor:
        return torch.zeros_like(param, dtype=compute_dtype(param.dtype), memory_format=torch.preserve_format)

    def number(dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device=param.device)

    missing: dict[str, bool] = {
        "momentum_buffer": rule.kind == "sgdm",
        "exp_avg": rule.kind == "adam" or (rule.kind == "sgdm" and rule.gain_lr > 0),
        "exp_avg_sq": rule.kind == "adam",
        "previous_grad": rule.kind == "sgd" and rule.gain_lr > 0,
        "log_gain": rule.gain_lr > 0,
    }
    for name, needed in missing.items():
        if needed and name not in state:
            state[name] = zeros()
    if (rule.kind == "adam" or (rule.kind == "sgdm" and rule.gain_lr > 0)) and "step" not in state:
        state["step"] = number(torch.float32)
    if rule.scale_lr > 0 and "log_scale" not in state:
        state["log_scale"] = number(compute_dtype(param.dtype))
        if log_scale is not None:
            state["log_scale"].copy_(log_scale)


def items_of(
    group: Mapping[str, Any],
    rule: Rule,
    states: Mapping[Tensor, dict[str, Any]],
    counts: dict[Tensor, Tensor],
    log_scale: Tensor | None = None,
    first: int | None = None,
) -> list[Item]:
    """What a step works on: the parameters of a group that have gradients, with their states.

    `first` is the number of the group's first parameter among all; None where another optimizer writes the parameters.
    """
    items: list[Item] = []
    for i, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        _new_state(states[param], param, rule, log_scale)
        writer = None
        if first is not None:
            add_compensation(states[param], param, group)
            writer = group_rounding(group, group["step"], [first + i], [states[param]]).of(0, param.dtype)
        items.append(Item(param, param.grad, states[param], counter(counts, param), rule, writer))
    return items


def measured(item: Item, direction: Tensor | None) -> Measured:
    """Inner products of the whole gradient with `direction`, without reading a value back."""
    grad = item.grad.to(compute_dtype(item.grad.dtype))
    finite = all_finite(grad) if item.rule.guard else True
    if direction is None:
        return Measured(finite)
    return Measured(
        finite,
        plain((grad * direction).sum()),
        plain((grad * grad).sum()),
        plain((direction * direction).sum()),
    )


def adapt_scales(items: Sequence[Item], found: Sequence[Measured], *, shared: bool) -> None:
    r"""$s \leftarrow \mathrm{clip}(s\,e^{\gamma_s a})$, with $a$ of each tensor or of all."""
    known = [one for one in found if one.dot is not None and one.finite is not False]
    if not known:
        return
    if shared:
        device = known[0].dot.device  # pyrefly: ignore[missing-attribute]
        dot, grad_square, direction_square = (
            torch.stack([_kept(getattr(one, name), one.finite).double().to(device) for one in known]).sum()
            for name in ("dot", "grad_square", "direction_square")
        )
        found = [Measured(one.finite, dot, grad_square, direction_square) for one in found]
    for item, one in zip(items, found, strict=True):
        rule = item.rule
        if rule.scale_lr == 0 or one.finite is False or one.dot is None:
            continue
        evidence = one.dot
        if rule.normalize_scale:
            norms = (one.grad_square.sqrt() + _TINY) * (one.direction_square.sqrt() + _TINY)  # pyrefly: ignore[missing-attribute]
            evidence = evidence / norms
        log_scale = item.state["log_scale"]
        # Inner products that overflow say nothing.
        step = torch.nan_to_num(evidence, nan=0.0, posinf=0.0, neginf=0.0).to(log_scale) * rule.scale_lr
        log_scale.add_(_kept(step, one.finite)).clamp_(*log_range(rule.scale_range))


def updated_gain_(log_gain: Tensor, evidence: Tensor, rule: Rule) -> None:
    r"""$\log\nu \leftarrow \mathrm{clip}(\log\nu + \gamma_\nu e)$."""
    log_gain.add_(evidence, alpha=rule.gain_lr).clamp_(*log_range(rule.gain_range))


def _kept(value: Tensor, finite: bool | Tensor) -> Tensor:
    return torch.where(finite, value, torch.zeros_like(value)) if isinstance(finite, Tensor) else value
