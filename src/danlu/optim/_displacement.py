"""Gains and a scale for the displacement that any optimizer made: what is measured before it, and what stretches it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.optim._gains import Item, Measured, measured, updated_gain_
from danlu.optim._nonfinite import all_finite
from danlu.optim._traversal import compute_dtype

__all__ = ["wrapped_step"]


def wrapped_step(
    inner: Optimizer,
    items: Sequence[Item],
    adapt: Callable[[Sequence[Item], Sequence[Measured]], None],
    *,
    hide_bad: bool,
) -> None:
    """The inner optimizer's step, multiplied by gains and by scales, which `adapt` moves before that.

    With `hide_bad` the inner optimizer does not see bad gradients.
    """
    hidden = _bad(items) if hide_bad else []
    for item in hidden:
        if item.count is not None:
            item.count.add_(1)
        item.param.grad = None
    bad = {id(item) for item in hidden}
    adapted = [item for item in items if id(item) not in bad and _adapts(item)]
    before = [item.param.detach().clone() for item in adapted]
    try:
        inner.step()
    finally:
        for item in hidden:
            item.param.grad = item.grad
    adapt(adapted, [_last_displacement(item) for item in adapted])
    for item, start in zip(adapted, before, strict=True):
        _stretch(item, start)


def _bad(items: Sequence[Item]) -> list[Item]:
    """Items with a bad gradient; one wait for each device."""
    flags: dict[torch.device, list[tuple[Item, Tensor]]] = {}
    for item in items:
        flags.setdefault(item.grad.device, []).append((item, all_finite(item.grad)))
    return [
        item
        for pairs in flags.values()
        for (item, _), finite in zip(pairs, torch.stack([flag for _, flag in pairs]).tolist(), strict=True)
        if not finite
    ]


def _adapts(item: Item) -> bool:
    return "log_gain" in item.state or "log_scale" in item.state


def _last_displacement(item: Item) -> Measured:
    """Inner products of the gradient with minus the last displacement and its gains; climbing turns the sign."""
    last = item.state.get("displacement")
    if item.rule.scale_lr == 0 or last is None:
        return Measured(True)
    direction = last if item.rule.climb else -last
    if "log_gain" in item.state:
        direction = direction * item.state["log_gain"].exp()
    found = measured(item, direction)
    return Measured(True, found.dot, found.grad_square, found.direction_square)


def _stretch(item: Item, start: Tensor) -> None:
    """Gains from the last displacement, then this displacement times gains and scale."""
    state, rule, dtype = item.state, item.rule, compute_dtype(item.param.dtype)
    start = start.to(dtype)
    displacement = item.param.to(dtype) - start
    stretched = displacement
    if "log_gain" in state:
        if "displacement" in state:
            grad = item.grad.to(dtype)
            evidence = state["displacement"].sign() * grad.sign() if rule.sign_gain else state["displacement"] * grad
            updated_gain_(state["log_gain"], evidence if rule.climb else -evidence, rule)
        stretched = stretched * state["log_gain"].exp()
    if "log_scale" in state:
        stretched = stretched * state["log_scale"].exp()
    item.param.copy_(start + stretched)
    state["displacement"] = displacement
