"""The passes over blocks of span scores behind the fused loss of GlobalPointer: values, and gradients on the way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.losses._prepared import Grads, Prepared, refusal

__all__ = ["NO_SECOND", "Plan", "SpanLoss", "run_blocks"]

# Scores held at a time: half a million are 2 MB, which stay in the cache between the passes over them.
_BLOCK = 2**19
_INSTEAD = "take multilabel_cross_entropy of the dense scores"
NO_SECOND = f"global_pointer_loss has no second derivative; {_INSTEAD}"


@dataclass(frozen=True)
class Plan:
    """What does not depend on the tensors' values."""

    types: int
    shared: bool
    causal: bool
    scale: float
    threshold: float


class SpanLoss(torch.autograd.Function):
    """One loss per sample and type, or their weighted sum with the gradients computed on the way."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        query: Tensor,
        key: Tensor,
        start_bias: Tensor | None,
        end_bias: Tensor | None,
        spans: Tensor,
        mask: Tensor | None,
        rows: Tensor,
        plan: Plan,
        prepared: Prepared | None,
    ) -> Tensor:
        needs = (False,) * 4 if prepared is None else prepared.needs
        values, grads = run_blocks(query, key, start_bias, end_bias, spans, mask, rows, plan, needs)
        if prepared is None:
            return values
        if any(needs):
            prepared.grads = grads
        return (values * rows).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.plan, ctx.prepared = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = _Gradients.apply(
            *ctx.saved_tensors, *grad_outputs, ctx.plan, ctx.prepared, tuple(ctx.needs_input_grad[:4])
        )
        return (*grads, None, None, None, None, None)

    jvp = refusal(f"global_pointer_loss has no forward-mode derivative; {_INSTEAD}")
    vmap = refusal(f"global_pointer_loss does not work under vmap; {_INSTEAD}")


class _Gradients(torch.autograd.Function):
    """The gradients, as a function whose own gradient raises: with create_graph they would pass for constants."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        query: Tensor,
        key: Tensor,
        start_bias: Tensor | None,
        end_bias: Tensor | None,
        spans: Tensor,
        mask: Tensor | None,
        rows: Tensor,
        upstream: Tensor,
        plan: Plan,
        prepared: Prepared | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        grads = None if prepared is None else prepared.take(needs, upstream)
        if grads is None:
            weights = rows * upstream.to(rows.dtype)
            return run_blocks(query, key, start_bias, end_bias, spans, mask, weights, plan, needs)[1]
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
        """Nothing is kept."""

    backward = refusal(NO_SECOND)
    jvp = backward
    vmap = refusal(f"the gradient of global_pointer_loss does not work under vmap; {_INSTEAD}")


@torch.no_grad()
def run_blocks(
    query: Tensor,
    key: Tensor,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
    spans: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    plan: Plan,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Grads]:
    """Losses by sample and type, and the gradients of their sum weighted by `rows`."""
    samples, tokens = query.shape[0], query.shape[-2]
    dtype, device = rows.dtype, query.device
    # Gradients are summed in the arithmetic's dtype, and are 0 where nothing is added.
    grads = tuple(
        torch.zeros(tensor.shape, dtype=dtype, device=device) if need and tensor is not None else None
        for need, tensor in zip(needs, (query, key, start_bias, end_bias), strict=True)
    )
    values = torch.zeros(samples, plan.types, dtype=dtype, device=device)
    if not values.numel() or not tokens:
        return values, _as_inputs(grads, query, key, start_bias, end_bias)
    step = max(1, min(samples, _BLOCK // (tokens * tokens)))
    scores = torch.empty(step, tokens, tokens, dtype=dtype, device=device)
    shared = plan.shared
    base = torch.empty_like(scores) if shared else scores
    weights = torch.empty_like(scores) if shared and any(needs[:2]) else scores
    order, is_first = _sorted(spans, plan.types, tokens)
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril(-1) if plan.causal else None

    def heads(place: tuple[Any, ...]) -> list[Tensor]:
        return [_clean(x[place], mask, place[0], dtype) for x in (query, key)]

    with torch.autocast(device_type=device.type, enabled=False):
        for begin in range(0, samples, step):
            block = slice(begin, min(begin + step, samples))
            size = block.stop - begin
            hidden = _hidden(below, None if mask is None else mask[block])
            block_spans = _Spans(order, is_first, begin, block.stop)
            part = scores[:size]
            q, k = heads((block,) if shared else (block, 0))
            if shared:
                torch.bmm(q * plan.scale, k.transpose(1, 2), out=base[:size])
                weights[:size].zero_()
            for kind in range(plan.types):
                if not shared:
                    q, k = heads((block, kind))
                    torch.bmm(q * plan.scale, k.transpose(1, 2), out=part)
                if start_bias is not None and end_bias is not None:
                    u, v = (_clean(x[block, kind, :, None], mask, block, dtype) for x in (start_bias, end_bias))
                    torch.add(base[:size], u, out=part)
                    part.add_(v.transpose(1, 2))
                if plan.threshold:
                    part.sub_(plan.threshold)
                if hidden is not None:
                    part.masked_fill_(hidden, float("-inf"))
                values[block, kind], factor = _losses(part, block_spans.of(kind), any(needs))
                if factor is None:
                    continue
                factor = factor * rows[block, kind]
                if grads[2] is not None:
                    grads[2][block, kind] = part.sum(2) * factor[:, None]
                if grads[3] is not None:
                    grads[3][block, kind] = part.sum(1) * factor[:, None]
                if shared and any(needs[:2]):
                    weights[:size].addcmul_(part, factor[:, None, None])
                elif not shared:
                    _products(grads, (block, kind), part, q, k, factor * plan.scale)
            if shared:
                _products(grads, (block,), weights[:size], q, k, q.new_full((size,), plan.scale))
    return values, _as_inputs(grads, query, key, start_bias, end_bias)


def _as_inputs(grads: Grads, *inputs: Tensor | None) -> Grads:
    return tuple(
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, inputs, strict=True)
    )


def _clean(tensor: Tensor, mask: Tensor | None, block: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a block with 0 in padding: a weight of 0 does not hide a NaN."""
    found = tensor.to(dtype)
    return found if mask is None else found.masked_fill(~mask[block, :, None], 0.0)


def _hidden(below: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return below
    padding = ~(mask[:, :, None] & mask[:, None, :])
    return padding if below is None else padding | below


def _products(grads: Grads, place: tuple[Any, ...], weights: Tensor, q: Tensor, k: Tensor, factor: Tensor) -> None:
    """Gradients of queries and keys from the weights of the scores."""
    if grads[0] is not None:
        grads[0][place] = torch.bmm(weights, k) * factor[:, None, None]
    if grads[1] is not None:
        grads[1][place] = torch.bmm(weights.transpose(1, 2), q) * factor[:, None, None]


def _sorted(spans: Tensor, types: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The spans in order, and which of them are the first of equal ones and no filling."""
    code = ((spans[:, 0] * types + spans[:, 1]) * tokens + spans[:, 2]) * tokens + spans[:, 3]
    code, order = code.sort()
    first = torch.ones_like(code, dtype=torch.bool)
    first[1:] = code[1:] != code[:-1]
    arranged = spans[order]
    return arranged, first & (arranged >= 0).all(1)


class _Spans:
    """The positives of a block of samples; those of other blocks and types are there, too, and do not count.

    Picking them out would wait for the device; there are few of them. Where everything is on the CPU they are picked.
    """

    def __init__(self, spans: Tensor, first: Tensor, begin: int, end: int) -> None:
        self._valid = first & (spans[:, 0] >= begin) & (spans[:, 0] < end)
        if spans.device.type == "cpu":
            spans, self._valid = spans[self._valid], self._valid[self._valid]
        self._spans, self._begin = spans, begin

    def of(self, kind: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample within the block, first, last, and whether it counts."""
        valid, spans = self._valid & (self._spans[:, 1] == kind), self._spans
        if spans.device.type == "cpu":
            spans, valid = spans[valid], valid[valid]
        sample, _, start, end = spans.masked_fill(~valid[:, None], 0).unbind(1)
        return torch.where(valid, sample - self._begin, 0), start, end, valid


def _losses(scores: Tensor, spans: tuple[Tensor, Tensor, Tensor, Tensor], grad: bool) -> tuple[Tensor, Tensor | None]:
    """One loss per sample; with `grad` the scores become weights, whose product with the factor is the gradient."""
    sample, start, end, valid = spans
    count = scores.shape[0]
    positive = scores[sample, start, end].masked_fill(~valid, float("inf"))
    zero = positive.new_zeros(count)
    # Added, since those that do not count all stand at one place, where there may be a positive.
    nothing = torch.zeros_like(positive)
    scores.index_put_((sample, start, end), nothing.masked_fill(valid, float("-inf")), accumulate=True)
    shift_p = zero.scatter_reduce(0, sample, -positive, "amax")
    terms = (-positive - shift_p[sample]).exp()
    # Less 1, since the logarithm of 1 + sum has no digit left of a small sum.
    rest_p = (-shift_p).expm1().index_add(0, sample, terms)
    shift = scores.amax((1, 2)).clamp(min=0)
    # Where the loss is infinite there is no shift that helps.
    shift = shift.masked_fill(shift.isinf(), 0.0)
    torch.sub(scores, shift[:, None, None], out=scores).exp_()
    rest = (-shift).expm1() + scores.sum((1, 2))
    values = shift_p + rest_p.log1p() + shift + rest.log1p()
    if not grad:
        return values, None
    total = 1 + rest
    pull = (-terms / (1 + rest_p)[sample] * total[sample]).masked_fill(~valid, 0.0)
    scores.index_put_((sample, start, end), pull, accumulate=True)
    return values, 1 / total
