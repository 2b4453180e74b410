"""The fused loss of GlobalPointer as operators, which a compiler takes as they are.

A compiler would trace the blocks that are written in place, without gain, and its own derivative of them would be
wrong. Eager code does not come here: it hands its gradients over without a copy.
"""

from typing import Any

import torch
from torch import Tensor

from danlu.losses._global_pointer_engine import NO_SECOND, Plan, run_blocks

__all__ = ["compiled_span_loss"]

_INPUTS = 4


def compiled_span_loss(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    spans: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    plan: Plan,
    needs: tuple[bool, ...] | None,
) -> Tensor:
    """One loss per sample and type, or, with `needs`, their sum with the weights `rows` and its gradients at once."""
    options = (plan.types, plan.shared, plan.causal, plan.scale, plan.threshold)
    if needs is None:
        return _rows(*inputs, spans, mask, rows, *options)
    return _total(*inputs, spans, mask, rows, *options, list(needs))[0]


def _losses_and_gradients(
    query: Tensor,
    key: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    spans: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    options: tuple[Any, ...],
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    plan = Plan(*options)
    values, grads = run_blocks(query, key, start_bias, end_bias, spans, mask, rows, plan, tuple(needs))
    return values, [rows.new_empty(0) if grad is None else grad for grad in grads]


def _like_gradients(inputs: tuple[Tensor | None, ...], rows: Tensor, needs: list[bool]) -> list[Tensor]:
    return [
        rows.new_empty(0) if one is None or not need else torch.empty_like(one, memory_format=torch.contiguous_format)
        for one, need in zip(inputs, needs, strict=True)
    ]


@torch.library.custom_op("danlu::span_loss", mutates_args=())
def _total(
    query: Tensor,
    key: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    spans: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    types: int,
    shared: bool,
    causal: bool,
    scale: float,
    threshold: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (types, shared, causal, scale, threshold)
    values, grads = _losses_and_gradients(query, key, start_bias, end_bias, spans, mask, rows, options, needs)
    return ((values * rows).sum(), grads[0], grads[1], grads[2], grads[3])


@_total.register_fake
def _(
    query: Tensor, key: Tensor, start_bias: Any, end_bias: Any, spans: Any, mask: Any, rows: Tensor, *rest: Any
) -> Any:
    return (rows.new_empty(()), *_like_gradients((query, key, start_bias, end_bias), rows, rest[-1]))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needs, ctx.count = inputs[-1], len(inputs)
    ctx.set_materialize_grads(False)


def _scaled(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None for other in others):
        # Of the gradients, which nobody else sees.
        raise RuntimeError(NO_SECOND)
    if upstream is None:
        return (None,) * ctx.count
    grads = tuple(
        grad * upstream.to(grad.dtype) if need else None
        for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return grads + (None,) * (ctx.count - _INPUTS)


_total.register_autograd(_scaled, setup_context=_keep_gradients)


@torch.library.custom_op("danlu::span_losses", mutates_args=())
def _rows(
    query: Tensor,
    key: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    spans: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    types: int,
    shared: bool,
    causal: bool,
    scale: float,
    threshold: float,
) -> Tensor:
    options = (types, shared, causal, scale, threshold)
    return _losses_and_gradients(query, key, start_bias, end_bias, spans, mask, rows, options, [False] * _INPUTS)[0]


@_rows.register_fake
def _(query: Any, key: Any, start_bias: Any, end_bias: Any, spans: Any, mask: Any, rows: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("danlu::span_losses_vjp", mutates_args=())
def _vjp(
    query: Tensor,
    key: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    spans: Tensor,
    mask: Tensor | None,
    upstream: Tensor,
    types: int,
    shared: bool,
    causal: bool,
    scale: float,
    threshold: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (types, shared, causal, scale, threshold)
    grads = _losses_and_gradients(query, key, start_bias, end_bias, spans, mask, upstream, options, needs)[1]
    return (grads[0], grads[1], grads[2], grads[3])


@_vjp.register_fake
def _(
    query: Tensor, key: Tensor, start_bias: Any, end_bias: Any, spans: Any, mask: Any, upstream: Tensor, *rest: Any
) -> Any:
    return tuple(_like_gradients((query, key, start_bias, end_bias), upstream, rest[-1]))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[7:]


def _recomputed(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:_INPUTS]]
    grads = _vjp(*ctx.saved_tensors, upstream.contiguous(), *ctx.options, needs)
    found = tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    return found + (None,) * (3 + len(ctx.options))


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(NO_SECOND)


_vjp.register_autograd(_refuse)
_rows.register_autograd(_recomputed, setup_context=_keep_inputs)
