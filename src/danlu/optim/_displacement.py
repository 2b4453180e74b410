"""Gains and a scale for the displacement that any optimizer made: what is measured before it, and what stretches it."""

from torch import Tensor

from danlu.optim._gains import Item, Measured, measured, updated_gain_
from danlu.optim._traversal import compute_dtype

__all__ = ["adapts", "last_displacement", "stretch"]


def adapts(item: Item) -> bool:
    return "log_gain" in item.state or "log_scale" in item.state


def last_displacement(item: Item) -> Measured:
    """Inner products of the gradient with minus the last displacement and its gains; climbing turns the sign."""
    last = item.state.get("displacement")
    if item.rule.scale_lr == 0 or last is None:
        return Measured(True)
    direction = last if item.rule.climb else -last
    if "log_gain" in item.state:
        direction = direction * item.state["log_gain"].exp()
    found = measured(item, direction)
    return Measured(True, found.dot, found.grad_square, found.direction_square)


def stretch(item: Item, start: Tensor) -> None:
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
