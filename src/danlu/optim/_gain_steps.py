r"""One step with exponentiated gains: three inner updates, each tensor by the path that suits it.

A step has three phases. *Measure*: inner products of the gradient with the direction of the last step, and whether the
gradient is finite. *Adapt*: the scale of the tensor. *Move*: the gains, the inner state and the parameter.

Shape letters: `...` any shape, the same for a parameter, its gradient and its state tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.kernels.step_size import StepSizeNumbers, dtypes_supported, sgdm_step
from danlu.optim._gains import Item, Measured, Rule, adapt_scales, log_range, measured, updated_gain_
from danlu.optim._nonfinite import is_finite
from danlu.optim._rounding import read, write
from danlu.optim._traversal import blocks, compute_dtype, kernel_test, plan, rounded_blocks, scratch

__all__ = ["advance"]

Number = float | Tensor

# State tensors of a parameter's shape; the others are single numbers.
_ELEMENTWISE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "previous_grad", "log_gain")


def advance(items: Sequence[Item], *, foreach: bool | None, fused: bool | None, shared: bool) -> None:
    """One step of all `items`, in place; with `shared` one inner product of all tensors moves all scales."""
    params, grads = [item.param for item in items], [item.grad for item in items]
    compiled: list[Item] = []
    loop: list[Item] = []
    blocked: list[Item] = []
    for path, indices in plan(params, grads, foreach, _kernel(items, foreach=foreach, fused=fused, shared=shared)):
        {"fused": compiled, "blocks": blocked}.get(path, loop).extend(items[i] for i in indices)
    for alike in _alike(compiled):
        _move_compiled(alike, shared=shared)
    memory: dict[torch.dtype, Tensor] = {}
    pairs = [(item, False) for item in loop] + [(item, True) for item in blocked]
    # Tensor by tensor, so that the second phase finds in the cache what the first has read.
    for batch in [pairs] if shared else [[pair] for pair in pairs]:
        found = [_measure_blocks(item) if fast else _measure(item) for item, fast in batch]
        adapt_scales([item for item, _ in batch], found, shared=shared)
        for (item, fast), one in zip(batch, found, strict=True):
            if item.count is not None and item.rule.guard and one.finite is not True:
                item.count.add_(1 if one.finite is False else ~one.finite)
            if not fast:
                _move(item, one)
            elif one.finite is not False:
                _move_blocks(item, memory)


def _kernel(
    items: Sequence[Item], *, foreach: bool | None, fused: bool | None, shared: bool
) -> Callable[[int], bool] | None:
    """What tells which tensors the compiled step takes.

    Without gains and scales it takes none: their step is then that of torch, bit for bit. It rounds to nearest only.
    """
    adapted = [item.rule.kind == "sgdm" and ("log_gain" in item.state or "log_scale" in item.state) for item in items]
    if not any(adapted):
        return None
    nearest = [item.writer is None or item.writer.mode == "nearest" for item in items]
    if fused and not all(nearest):
        modes = sorted({item.writer.mode for item in items if item.writer is not None})
        raise RuntimeError(
            f"fused=True, but the kernel rounds low-precision parameters to nearest only, not by {modes}"
        )
    states = [item.state["momentum_buffer"] for item in items]
    takes = kernel_test(
        "step_size",
        [item.param for item in items],
        [item.grad for item in items],
        states,
        fused=fused,
        foreach=foreach,
        supported=dtypes_supported,
    )
    if takes is None:
        return None
    taken = [item.param.numel() > 0 and adapted[i] and nearest[i] and takes(i) for i, item in enumerate(items)]
    chosen = [item for item, one in zip(items, taken, strict=True) if one]
    if shared and (len(_alike(chosen)) != 1 or len(chosen) < sum(item.param.numel() > 0 for item in items)):
        if fused:
            raise RuntimeError(
                "fused=True, but the kernel moves one scale for all tensors only if they have one dtype and one rule"
            )
        # One scale needs all inner products in one place.
        return None
    return taken.__getitem__


def _alike(items: Sequence[Item]) -> list[list[Item]]:
    """Items that one compiled call can take: of one dtype and rule, with the same state entries."""
    found: dict[object, list[Item]] = {}
    for item in items:
        found.setdefault((item.param.dtype, item.rule, tuple(sorted(item.state))), []).append(item)
    return list(found.values())


def _move_compiled(items: Sequence[Item], *, shared: bool) -> None:
    rule = items[0].rule
    numbers = StepSizeNumbers(
        lr=rule.lr,
        decay=rule.decay,
        momentum=rule.momentum,
        momentum_beta=rule.momentum_beta,
        gain_lr=rule.gain_lr,
        gain_range=log_range(rule.gain_range),
        scale_lr=rule.scale_lr,
        scale_range=log_range(rule.scale_range),
        normalize_scale=rule.normalize_scale,
        sign_gain=rule.sign_gain,
        climb=rule.climb,
        guard=rule.guard,
        shared=shared,
    )
    skipped = sgdm_step(
        [item.param for item in items], [item.grad for item in items], [item.state for item in items], numbers
    )
    for i in skipped:
        count = items[i].count
        if count is not None:
            count.add_(1)


def _measure(item: Item) -> Measured:
    if item.rule.scale_lr == 0:
        return measured(item, None)
    state = item.state
    direction = _direction(state, item.rule, _bias(state, item.rule))
    return measured(item, direction)


def _measure_blocks(item: Item) -> Measured:
    rule, state, grad = item.rule, item.state, item.grad
    if rule.scale_lr == 0:
        return Measured(not rule.guard or is_finite(grad))
    names = [name for name in _ELEMENTWISE if name in state]
    dtype = compute_dtype(grad.dtype)
    dot, grad_square, direction_square = 0.0, 0.0, 0.0
    bias = _bias(state, rule)
    for grad_block, *parts in blocks(grad, *(state[name] for name in names)):
        gradient = grad_block.to(dtype)
        views = dict(zip(names, parts, strict=True))
        direction = views["momentum_buffer"] if rule.kind == "sgdm" else _direction(views, rule, bias)
        if direction.stride() != gradient.stride() or not direction.is_contiguous():
            gradient, direction = gradient.contiguous(), direction.contiguous()
        g, d = gradient.view(-1), direction.view(-1)
        dot += torch.dot(g, d).item()
        grad_square += torch.dot(g, g).item()
        direction_square += torch.dot(d, d).item()
    finite = not rule.guard or math.isfinite(grad_square) or is_finite(grad)
    # The direction of sgdm is its buffer times the learning rate.
    factor = rule.lr if rule.kind == "sgdm" else 1.0
    as_tensor = state["log_scale"].new_tensor
    return Measured(finite, as_tensor(factor * dot), as_tensor(grad_square), as_tensor(factor**2 * direction_square))


def _move(item: Item, one: Measured) -> None:
    """The whole tensor on copies; where the gradient is not finite, the old values are kept."""
    dtype, state = compute_dtype(item.param.dtype), item.state
    if one.finite is False:
        return
    before = read(item.param, item.writer)
    theta, grad = before.clone(), item.grad.to(dtype)
    parts = {name: state[name].clone() for name in _ELEMENTWISE if name in state}
    step = state["step"] + 1 if "step" in state else None
    _move_(theta, grad, parts, item.rule, _Step.of(state, item.rule), None)
    finite = one.finite
    if isinstance(finite, Tensor):
        theta = torch.where(finite, theta, before)
        parts = {name: torch.where(finite, value, state[name]) for name, value in parts.items()}
        step = torch.where(finite, step, state["step"]) if step is not None else None
    write(item.param, theta, item.writer)
    for name, value in parts.items():
        state[name].copy_(value)
    if step is not None:
        state["step"].copy_(step)


def _move_blocks(item: Item, memory: dict[torch.dtype, Tensor]) -> None:
    """Block after block in place; all passes over a block but the first find it in the cache."""
    dtype, state = compute_dtype(item.param.dtype), item.state
    names = [name for name in _ELEMENTWISE if name in state]
    step = _Step.of(state, item.rule)
    tensors = (item.param, item.grad, *(state[name] for name in names))
    for (param_block, grad_block, *parts), writer in rounded_blocks(tensors, item.writer):
        theta = read(param_block, writer)
        _move_(theta, grad_block.to(dtype), dict(zip(names, parts, strict=True)), item.rule, step, memory)
        write(param_block, theta, writer)
    if "step" in state:
        state["step"].add_(1)


@dataclass(frozen=True)
class _Step:
    """What a step of one tensor needs of its single numbers, as numbers where the host has them."""

    coefficient: Number
    bias: tuple[Number, Number]
    previous_bias: tuple[Number, Number]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], rule: Rule) -> "_Step":
        coefficient: Number = -rule.lr if rule.climb else rule.lr
        if "log_scale" in state:
            coefficient = coefficient * _number(state["log_scale"].exp())
        return cls(coefficient, _bias(state, rule, ahead=1), _bias(state, rule))


def _bias(state: Mapping[str, Tensor], rule: Rule, ahead: int = 0) -> tuple[Number, Number]:
    """Adam's corrections, or twice that of the gradient's average, after the steps so far and `ahead` more."""
    if "step" not in state:
        return 1.0, 1.0
    count = _number((state["step"] + ahead).clamp(min=1))
    first, second = rule.betas if rule.kind == "adam" else (rule.momentum_beta, rule.momentum_beta)
    return 1 - first**count, 1 - second**count


def _direction(parts: Mapping[str, Tensor], rule: Rule, bias: tuple[Number, Number]) -> Tensor:
    """What the last step subtracted, but for its scale: gains included."""
    if rule.kind == "sgdm":
        return parts["momentum_buffer"] * rule.lr
    last = _adam_direction(parts, rule, bias)
    return last.mul_(parts["log_gain"].exp()) if "log_gain" in parts else last


def _adam_direction(parts: Mapping[str, Tensor], rule: Rule, bias: tuple[Number, Number]) -> Tensor:
    size = (parts["exp_avg_sq"].sqrt() / _root(bias[1])).add_(rule.eps)
    return parts["exp_avg"] / size * (rule.lr / bias[0])


def _move_(
    theta: Tensor,
    grad: Tensor,
    parts: Mapping[str, Tensor],
    rule: Rule,
    step: _Step,
    memory: dict[torch.dtype, Tensor] | None,
) -> None:
    """The update in place, on a whole tensor or a block; the gradient is only read."""
    if rule.decay != 0:
        theta.mul_(1 - rule.decay)
    gain = _gain_(grad, parts, rule, step, memory) if "log_gain" in parts else None
    if rule.kind == "sgdm":
        momentum = parts["momentum_buffer"].mul_(rule.momentum)
        momentum.add_(grad if gain is None else gain.mul_(grad))
        if "exp_avg" in parts:
            parts["exp_avg"].lerp_(grad, 1 - rule.momentum_beta)
        _subtract_(theta, momentum, step.coefficient)
    elif rule.kind == "adam":
        average, square = parts["exp_avg"].lerp_(grad, 1 - rule.betas[0]), parts["exp_avg_sq"]
        square.mul_(rule.betas[1]).addcmul_(grad, grad, value=1 - rule.betas[1])
        size = (square.sqrt() / _root(step.bias[1])).add_(rule.eps)
        coefficient = step.coefficient / step.bias[0]
        if gain is None and isinstance(coefficient, float):
            theta.addcdiv_(average, size, value=-coefficient)
        else:
            direction = torch.div(average, size)
            _subtract_(theta, direction if gain is None else direction.mul_(gain), coefficient)
    else:
        _subtract_(theta, grad if gain is None else gain.mul_(grad), step.coefficient)
        if "previous_grad" in parts:
            parts["previous_grad"].copy_(grad)


def _gain_(
    grad: Tensor, parts: Mapping[str, Tensor], rule: Rule, step: _Step, memory: dict[torch.dtype, Tensor] | None
) -> Tensor:
    """Update log nu by the last direction or average, and return nu in memory that may be written to."""
    log_gain = parts["log_gain"]
    evidence = torch.empty_like(log_gain) if memory is None else scratch(memory, log_gain)
    last = parts["previous_grad"] if rule.kind == "sgd" else parts["exp_avg"]
    if rule.sign_gain:
        # A sign times a number cannot underflow, which a product of two numbers can.
        torch.sign(last, out=evidence)
        evidence.mul_(grad).sign_()
    else:
        if rule.kind == "adam":
            last = _adam_direction(parts, rule, step.previous_bias)
        torch.mul(last, grad, out=evidence)
        if rule.kind == "sgdm":
            evidence.div_(step.previous_bias[0])
    updated_gain_(log_gain, evidence, rule)
    return torch.exp(log_gain, out=evidence)


def _subtract_(theta: Tensor, update: Tensor, coefficient: Number) -> None:
    if isinstance(coefficient, Tensor):
        theta.sub_(update * coefficient)
    else:
        theta.add_(update, alpha=-coefficient)


def _root(value: Number) -> Number:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _number(value: Tensor) -> Number:
    """A number where reading it does not wait for a device."""
    return value.item() if value.device.type == "cpu" else value
