"""A linear head with a row loss as operators, which a compiler takes as they are.

A compiler would trace the chunks that are written in place, without gain, and its own derivative of them would be
wrong. Eager code does not come here: it hands its gradients over without a copy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu._common.checks import is_low_precision
from danlu.losses._linear_chunks import bytes_of_logit, rows_per_chunk
from danlu.losses._linear_engine import Batch, Plan, run_chunks
from danlu.losses._row_loss import (
    Parts,
    RowFunction,
    RowLoss,
    TransportRowLoss,
    from_parts,
    is_row_loss,
    is_transport_loss,
    parts_of,
    values_of,
)

__all__ = ["CompiledHead", "Found"]

# Values (or their sum), and of every row the negative log-likelihood, whether it is correct, and its cost.
Found = tuple[Tensor, Tensor, Tensor, Tensor]

_INSTEAD = "take the loss of F.linear(input, linear_weight)"
_NO_SECOND = f"linear_loss has no second derivative; {_INSTEAD}"
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor keep, Tensor row_weights, Tensor? shift, "
    "Tensor? first, Tensor? second"
)
_OPTIONS = (
    "str kind, float[] numbers, SymInt? chunk_size, SymInt? memory_budget, ScalarType dtype, float label_smoothing, "
    "float logit_scale, float? softcap, bool stats"
)
_LEAVES, _INPUTS = 3, 9


@dataclass(frozen=True)
class CompiledHead:
    """A linear head and what is given per row, in code that is being compiled.

    Args:
        tensors: hidden states, weight, bias, target, kept rows, weights of the rows, and shift of the target's logit.
        needs: which of the first three need a gradient.
        options: rows per chunk, bytes of a chunk, dtype of the products, label smoothing, scale and cap of the logits,
            and whether statistics are wanted; as the operators take them.
    """

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]
    needs: tuple[bool, ...]
    options: tuple[int | None, int | None, torch.dtype, float, float, float | None, bool]

    def loss(self, loss: RowLoss | TransportRowLoss, *, reduced: bool) -> Found:
        """One weighted loss per row, or their sum; and the statistics, without gradients."""
        parts = parts_of(loss)
        if parts is None:
            value, *stats = self._traced(loss)
            value = value.sum() if reduced else value
        elif reduced:
            value, *stats = _total(*self.tensors, *_taken(parts), *self.options, list(self.needs))[:4]
        else:
            value, *stats = self._rows(parts, self.tensors[5])
        nll, correct, cost = (tensor.detach() for tensor in stats)
        return value, nll, correct, cost

    def _rows(self, parts: Parts, row_weights: Tensor, smoothing: float | None = None) -> Found:
        tensors, options = list(self.tensors), list(self.options)
        tensors[5] = row_weights
        if smoothing is not None:
            options[3] = smoothing
        return _losses(*tensors, *_taken(parts), *options)

    def _traced(self, loss: RowLoss | TransportRowLoss) -> Found:
        """A loss of the user's: the compiler traces it, as a function of what operators say of every row."""
        keep, weights = self.tensors[4:6]
        smoothing, ones = self.options[3], torch.ones_like(weights)
        nll, *stats = self._rows(Parts("cross_entropy"), ones, 0.0)
        if is_transport_loss(loss):
            source, first, table = loss.ground_cost.parts()
            pure = Parts(f"emo/{source}/pure/plain", (1.0, 1.0, math.inf, 0.0, 1.0), first, table)
            expected, *_, stats[2] = self._rows(pure, ones, 0.0)
            value = _with_coefficients(loss.value_and_derivatives, nll, expected)
        elif isinstance(loss, RowFunction):
            value, slope = values_of(loss, nll)
            value = value if slope is None else _Attached.apply(value.detach(), slope.detach(), nll)
        elif is_row_loss(loss):
            value = _with_coefficients(loss.value_and_derivative, nll)
        else:
            raise TypeError("a row loss is needed")
        if smoothing:
            uniform = self._rows(Parts("cross_entropy"), ones, 1.0)[0]
            value = (1 - smoothing) * value + smoothing * uniform
        return value.masked_fill(~keep, 0.0) * weights, stats[0], stats[1], stats[2]


class _Attached(torch.autograd.Function):
    """A value as it is, with a gradient by one more scalar, which the coefficient says."""

    @staticmethod
    def forward(value: Tensor, coefficient: Tensor, scalar: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, grads[0] * ctx.saved_tensors[0]


def _with_coefficients(function: Callable[..., tuple[Tensor, ...]], *scalars: Tensor) -> Tensor:
    value, *coefficients = function(*(scalar.detach() for scalar in scalars))
    value = value.detach()
    for coefficient, scalar in zip(coefficients, scalars, strict=True):
        value = _Attached.apply(value, coefficient.detach(), scalar)
    return value


def _taken(parts: Parts) -> tuple[Tensor | None, Tensor | None, str, list[float]]:
    return parts.first, parts.second, parts.kind, list(parts.numbers)


# ----------------------------------------------------------------------------------------------------- operators


def _prepare(inputs: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None, Batch, Plan]:
    """The head, the rows and the plan that the engine takes."""
    hidden, weight, bias, target, keep, row_weights, shift, first, second = inputs
    kind, numbers, chunk_size, memory_budget, dtype, *rest = options
    loss = from_parts(Parts(kind, tuple(numbers), first, second))
    (count, features), per_logit = hidden.shape, bytes_of_logit(loss, dtype)
    size = rows_per_chunk(chunk_size, memory_budget, count, features, len(weight), per_logit)
    return (hidden, weight, bias, Batch(target, keep, row_weights, shift), Plan(loss, size, dtype, *rest))


def _gradients(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _like_gradients(leaves: tuple[Any, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(one, memory_format=torch.contiguous_format) if need else leaves[0].new_empty(0)
        for one, need in zip(leaves, needs, strict=True)
    )


def _like_rows(hidden: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    kind, dtype, stats = options[0], options[4], hidden.shape[0] if options[-1] else 0
    row_dtype = torch.float32 if is_low_precision(dtype) else dtype
    return (
        hidden.new_empty(stats, dtype=row_dtype),
        hidden.new_empty(stats, dtype=torch.bool),
        hidden.new_empty(stats if kind.startswith("emo") else 0, dtype=row_dtype),
    )


@torch.library.custom_op(
    "danlu::linear_loss",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _total(*arguments: Any) -> Any:
    *options, needs = arguments[_INPUTS:]
    hidden, weight, bias, batch, plan = _prepare(arguments[:_INPUTS], tuple(options))
    rows, grads = run_chunks(hidden, weight, bias, batch, plan, tuple(needs))
    total = (rows.value * batch.weights).sum()
    return (total, rows.nll, rows.correct, rows.cost, *_gradients(grads, hidden))


@_total.register_fake
def _(*arguments: Any) -> Any:
    *options, needs = arguments[_INPUTS:]
    stats = _like_rows(arguments[0], tuple(options))
    return (stats[0].new_empty(()), *stats, *_like_gradients(arguments[:_LEAVES], needs))


@torch.library.custom_op(
    "danlu::linear_losses", mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _losses(*arguments: Any) -> Any:
    hidden, weight, bias, batch, plan = _prepare(arguments[:_INPUTS], arguments[_INPUTS:])
    rows = run_chunks(hidden, weight, bias, batch, plan, (False,) * _LEAVES)[0]
    return rows.value * batch.weights, rows.nll, rows.correct, rows.cost


@_losses.register_fake
def _(*arguments: Any) -> Any:
    stats = _like_rows(arguments[0], arguments[_INPUTS:])
    return (stats[0].new_empty(arguments[0].shape[0]), *stats)


@torch.library.custom_op(
    "danlu::linear_loss_vjp",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, Tensor upstream, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _vjp(*arguments: Any) -> Any:
    *options, upstream, needs = arguments[_INPUTS:]
    hidden, weight, bias, batch, plan = _prepare(arguments[:_INPUTS], tuple(options))
    batch = batch._replace(weights=batch.weights * upstream.to(batch.weights.dtype))
    return _gradients(run_chunks(hidden, weight, bias, batch, plan, tuple(needs))[1], hidden)


@_vjp.register_fake
def _(*arguments: Any) -> Any:
    return _like_gradients(arguments[:_LEAVES], arguments[-1])


@torch.library.custom_op("danlu::linear_loss_upstream", mutates_args=())
def _factor(upstream: Tensor, leaf: Tensor) -> Tensor:
    """The factor of gradients that are made already, as if it depended on what they are derivatives by.

    Without, a compiler that is asked for their own gradients would take them for constants.
    """
    return upstream.clone()


@_factor.register_fake
def _(upstream: Tensor, leaf: Tensor) -> Tensor:
    return torch.empty_like(upstream)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Inputs, and gradients that the forward has made; what of it the backward does not need a compiler drops."""
    ctx.save_for_backward(*inputs[:_INPUTS], *output[4:])
    ctx.options = inputs[_INPUTS:]
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None for other in others):
        # The statistics are detached, so this is a gradient of the gradients.
        raise RuntimeError(_NO_SECOND)
    inputs, made = ctx.saved_tensors[:_INPUTS], ctx.saved_tensors[_INPUTS:]
    options, have = (ctx.options[:-1], ctx.options[-1]) if made else (ctx.options, [False] * _LEAVES)
    nothing = (None,) * (_INPUTS - _LEAVES + len(ctx.options))
    needs = [bool(need) for need in ctx.needs_input_grad[:_LEAVES]]
    if upstream is None or not any(needs):
        return (None,) * _LEAVES + nothing
    if all(has or not need for has, need in zip(have, needs, strict=True)):
        # The weight is kept anyway; the hidden states would be for this alone.
        factor = _factor(upstream, inputs[1] if needs[1] else inputs[needs.index(True)])
        grads = tuple(grad * factor for grad in made)
    else:
        grads = _vjp(*inputs, *options, upstream, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(_NO_SECOND)


_vjp.register_autograd(_refuse)
_factor.register_autograd(_refuse)
_total.register_autograd(_pull, setup_context=_keep)
_losses.register_autograd(_pull, setup_context=_keep)
