"""What the optimizers do about NaN and infinite gradients: detecting, naming and counting them."""

import cmath
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "NONFINITE",
    "STEP_NONFINITE",
    "Nonfinite",
    "StepNonfinite",
    "all_finite",
    "counter",
    "event_counts",
    "finite_flags",
    "gradient_values",
    "is_finite",
    "parameter_name",
    "plain",
    "raise_if_nonfinite",
    "raise_where_wanted",
]

Nonfinite = Literal["skip", "shrink", "raise", "off"]
NONFINITE: tuple[Nonfinite, ...] = ("skip", "shrink", "raise", "off")
# Of the functions on lists of tensors, around which the classes shrink.
StepNonfinite = Literal["skip", "raise", "off"]
STEP_NONFINITE: tuple[StepNonfinite, ...] = ("skip", "raise", "off")


def is_finite(tensor: Tensor) -> bool:
    """Whether every element of a tensor on the CPU is finite.

    A finite sum proves it at the speed of one read; only a sum that is not finite, which may be an overflow of finite
    elements, needs the exact answer.
    """
    total = tensor.sum().item()
    if cmath.isfinite(total):
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """One bool per tensor, on their device: no element is NaN or infinite. No tensor may be empty."""
    return torch.stack(torch._foreach_norm(list(tensors), ord=math.inf)).isfinite()


def all_finite(tensor: Tensor) -> Tensor:
    """Whether every element is finite, as a 0-d tensor on its device; for a DTensor, over all its shards."""
    return plain(torch.isfinite(tensor).all())


def raise_if_nonfinite(named_grads: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError` that lists the parameters whose gradients are not finite (one wait for the device)."""
    flags = [all_finite(grad) for grad in named_grads.values()]
    bad = [name for name, flag in zip(named_grads, flags, strict=True) if not flag]
    if bad:
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise RuntimeError(
            f"the gradient holds NaN or Inf, nothing was changed (nonfinite='raise'); parameters: {shown}"
        )


def plain(value: Tensor) -> Tensor:
    """The number behind a DTensor, of all its shards; any other tensor as it is."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None else value


def gradient_values(grad: Tensor) -> Tensor:
    """The elements of a gradient that may differ from 0, duplicate indices summed."""
    return grad.coalesce().values() if grad.is_sparse else grad


def raise_where_wanted(param_groups: Sequence[Mapping[str, Any]], everywhere: str | None = None) -> None:
    """Raise on bad gradients in groups with `nonfinite="raise"`, before anything is changed."""
    raise_if_nonfinite(
        {
            parameter_name(param_groups, g, i): gradient_values(param.grad)
            for g, group in enumerate(param_groups)
            if (group["nonfinite"] if everywhere is None else everywhere) == "raise"
            for i, param in enumerate(group["params"])
            if param.grad is not None
        }
    )


def parameter_name(param_groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str:
    """The qualified name of a parameter, or its place when the optimizer was given no names."""
    names = param_groups[group].get("param_names")
    return names[index] if names else f"param_groups[{group}]['params'][{index}]"


class Counts(Sequence[Tensor]):
    """One counter of bad gradients per parameter, made on its device when it is asked for.

    Args:
        counts: where the counters are kept.
        params: the parameters, in the order of the counters.
    """

    def __init__(self, counts: dict[Tensor, Tensor], params: Sequence[Tensor]) -> None:
        self._counts, self._params = counts, params

    def __len__(self) -> int:
        return len(self._params)

    def __getitem__(self, index: int) -> Tensor:  # pyrefly: ignore[bad-override]
        param = self._params[index]
        found = self._counts.get(param)
        return counter(self._counts, param) if found is None else found


def counter(counts: dict[Tensor, Tensor], param: Tensor) -> Tensor:
    """The counter of a parameter, made on its device when it is asked for first."""
    if param not in counts:
        # A plain tensor also for a DTensor: every process counts the same events.
        counts[param] = torch.zeros((), dtype=torch.int64, device=param.device)
    return counts[param]


def event_counts(param_groups: Sequence[Mapping[str, Any]], counts: Mapping[Tensor, Tensor]) -> dict[str, int]:
    """How many gradients were not finite, by parameter name; parameters without such an event are left out."""
    events: dict[str, int] = {}
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            if param in counts and (count := int(counts[param].item())):
                events[parameter_name(param_groups, g, i)] = count
    return events
