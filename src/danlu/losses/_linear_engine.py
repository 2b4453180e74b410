r"""The chunks of `linear_loss`: logits of some rows, their losses, and in the same buffer their gradient.

Source: as in [`linear_loss`][danlu.losses.linear_loss].

Shape letters: `N` rows; `D` features; `V` classes; `C` rows of a chunk; `B` rows of a block, which stays in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu._common.checks import is_low_precision
from danlu.kernels import explain
from danlu.kernels.linear_rows import RowCoefficients, row_statistics, write_row_gradients
from danlu.losses._ground_cost import CostRows
from danlu.losses._prepared import Grads, Prepared, refusal
from danlu.losses._row_loss import RowLoss, TransportRowLoss, is_row_loss, is_transport_loss

__all__ = ["Batch", "LinearLoss", "Plan", "TokenLoss", "run_chunks", "write_logits"]

TokenLoss = RowLoss | TransportRowLoss | Callable[[Tensor, Tensor], Tensor]
_INSTEAD = "take the loss of F.linear(input, linear_weight)"
# Elements of a block for every thread of the CPU: 1 MiB of float32. The passes over a block then hit the cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Plan:
    """What does not depend on the tensors' values."""

    loss: TokenLoss
    chunk_size: int
    dtype: torch.dtype
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    stats: bool = False

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of logits and losses."""
        return torch.float32 if is_low_precision(self.dtype) else self.dtype


class _Rows(NamedTuple):
    """What a row gives: its loss, and for the statistics what is known of it on the way (else empty)."""

    value: Tensor
    nll: Tensor
    correct: Tensor
    cost: Tensor


class Batch(NamedTuple):
    """What is given per row; rows that are not kept have target 0."""

    target: Tensor
    keep: Tensor
    weights: Tensor
    shift: Tensor | None

    def cut(self, rows: slice) -> "Batch":
        """Some of the rows."""
        shift = None if self.shift is None else self.shift[rows]
        return Batch(self.target[rows], self.keep[rows], self.weights[rows], shift)


class LinearLoss(torch.autograd.Function):
    """One loss per row, or their weighted sum with the gradients computed on the way; and the statistics."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        keep: Tensor,
        row_weights: Tensor,
        shift: Tensor | None,
        plan: Plan,
        prepared: Prepared | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = (False, False, False) if prepared is None else prepared.needs
        rows, grads = run_chunks(hidden, weight, bias, Batch(target, keep, row_weights, shift), plan, needs)
        if prepared is not None and any(needs):
            prepared.grads = grads
        weighted = rows.value * row_weights
        return weighted if prepared is None else weighted.sum(), rows.nll, rows.correct, rows.cost

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.plan, ctx.prepared = inputs[7:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if grad_outputs[0] is None:
            return (None, None, None, *nothing)
        grads = _LinearLossGradients.apply(
            *ctx.saved_tensors, grad_outputs[0], ctx.plan, ctx.prepared, tuple(ctx.needs_input_grad[:3])
        )
        return (*grads, *nothing)

    jvp = refusal(f"linear_loss has no forward-mode derivative; {_INSTEAD}")
    vmap = refusal(f"linear_loss does not work under vmap; {_INSTEAD}")


class _LinearLossGradients(torch.autograd.Function):
    """The gradients, as a function whose own gradient raises: with create_graph they would pass for constants."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        keep: Tensor,
        row_weights: Tensor,
        shift: Tensor | None,
        upstream: Tensor,
        plan: Plan,
        prepared: Prepared | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        grads = None if prepared is None else prepared.take(needs, upstream)
        if grads is None:
            weights = row_weights * upstream.to(row_weights.dtype)
            return run_chunks(hidden, weight, bias, Batch(target, keep, weights, shift), plan, needs)[1]
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
        """Nothing is kept."""

    backward = refusal(f"linear_loss has no second derivative; {_INSTEAD}")
    jvp = backward
    vmap = refusal(f"the gradient of linear_loss does not work under vmap; {_INSTEAD}")


@torch.no_grad()
def run_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, plan: Plan, needs: tuple[bool, ...]
) -> tuple[_Rows, Grads]:
    """Losses of all rows (0 where ignored), and the gradients of their sum by the weights of the batch."""
    (count, features), classes, grad = hidden.shape, weight.shape[0], any(needs)
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        head = weight.to(plan.dtype)
        offset = None if bias is None else bias.to(plan.row_dtype) * plan.logit_scale
        costs = None
        if is_transport_loss(plan.loss):
            costs = CostRows(plan.loss.ground_cost, head, plan.chunk_size, plan.row_dtype)
        size = plan.chunk_size + (0 if costs is None else costs.extra_rows)
        buffer = hidden.new_empty(size, classes, dtype=plan.row_dtype)
        rows = _empty_rows(hidden, plan, with_cost=costs is not None)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(classes, features, dtype=plan.row_dtype, device=hidden.device) if needs[1] else None
        d_bias = torch.zeros(classes, dtype=plan.row_dtype, device=hidden.device) if needs[2] else None
        for start in range(0, count, plan.chunk_size):
            chunk = slice(start, min(start + plan.chunk_size, count))
            states = hidden[chunk].to(plan.dtype)
            logits = _products(states, head, offset, buffer, costs, batch.target[chunk], plan)
            for block in _blocks(logits, plan.loss):
                of_all = slice(start + block.start, start + block.stop)
                cost = None if costs is None else costs.rows(block)
                _put(rows, of_all, _rows_of(logits[block], cost, batch.cut(of_all), plan, grad=grad))
            if not grad:
                continue
            # `logits` now holds the gradient of the weighted losses.
            gradient = logits.to(plan.dtype)
            if d_hidden is not None:
                if d_hidden.dtype == plan.dtype:
                    torch.mm(gradient, head, out=d_hidden[chunk])
                else:
                    d_hidden[chunk] = torch.mm(gradient, head)
            if d_weight is not None:
                # What stands in an ignored row may be NaN, and 0 times that is no 0.
                _accumulate(d_weight, gradient, states.masked_fill(~batch.keep[chunk, None], 0.0))
            if d_bias is not None:
                d_bias += logits.sum(0)
        return rows, (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )


def _empty_rows(hidden: Tensor, plan: Plan, *, with_cost: bool) -> _Rows:
    count = hidden.shape[0]
    stats = count if plan.stats else 0
    value = hidden.new_empty(count, dtype=plan.row_dtype)
    nll = hidden.new_empty(stats, dtype=plan.row_dtype)
    correct = hidden.new_empty(stats, dtype=torch.bool)
    return _Rows(value, nll, correct, nll.new_empty(stats if with_cost else 0))


def _put(rows: _Rows, where: slice, found: _Rows) -> None:
    for into, what in zip(rows, found, strict=True):
        if into.numel():
            into[where] = what


def _blocks(logits: Tensor, loss: TokenLoss) -> Iterator[slice]:
    """Rows of a chunk that are passed over at once: a few on the CPU, where memory is slower than the cache."""
    count, size = logits.shape[0], logits.shape[0]
    if logits.device.type == "cpu" and (is_row_loss(loss) or is_transport_loss(loss)):
        size = max(1, _BLOCK * torch.get_num_threads() // logits.shape[1])
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + size, count))


def _products(
    states: Tensor,
    head: Tensor,
    offset: Tensor | None,
    buffer: Tensor,
    costs: CostRows | None,
    target: Tensor,
    plan: Plan,
) -> Tensor:
    """Logits of a chunk, and what its costs need, written into `buffer`."""
    count = states.shape[0]
    if plan.logit_scale != 1.0:
        states = states * plan.logit_scale
    if costs is None or costs.table is not None:
        if costs is not None:
            costs.start(target, None)
        return write_logits(states, head, offset, buffer[:count])
    queries = costs.queries(target)
    both = buffer[: count + queries.shape[0]]
    if costs.is_head:
        write_logits(torch.cat((states, queries)), head, None, both)
        if offset is not None:
            both[:count].add_(offset)
    else:
        write_logits(states, head, offset, both[:count])
        write_logits(queries, costs.embedding, None, both[count:])
    costs.start(target, both[count:])
    return both[:count]


def write_logits(states: Tensor, head: Tensor, offset: Tensor | None, out: Tensor) -> Tensor:
    if states.dtype != out.dtype:
        out.copy_(torch.mm(states, head.t()))
        return out if offset is None else out.add_(offset)
    if offset is None:
        return torch.mm(states, head.t(), out=out)
    return torch.addmm(offset, states, head.t(), out=out)


def _accumulate(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add `gradient^T states` to `total`, in the precision of `total`."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), states)
    else:
        total += torch.mm(gradient.t(), states)


def _has_kernel(logits: Tensor, batch: Batch, plan: Plan) -> bool:
    """Whether compiled passes can do all that the plan asks for."""
    if logits.device.type == "cpu" or explain("linear_rows", logits) is not None:
        return False
    if batch.shift is not None and plan.softcap is not None:
        # The shift comes after the cap, which they apply on the fly.
        return False
    # They take the cost of the target for 0, which a table of the user's need not have.
    return is_row_loss(plan.loss) or (is_transport_loss(plan.loss) and plan.loss.ground_cost.matrix is None)


def _rows_of_kernel(logits: Tensor, cost: Tensor | None, batch: Batch, plan: Plan, *, grad: bool) -> _Rows:
    """As `_rows_of`, in two passes over the logits."""
    smoothing, empty = plan.label_smoothing, logits.new_empty(0)
    ignored, classes = ~batch.keep, logits.shape[1]
    shifted = batch.shift is not None
    correct = (logits.argmax(1) == batch.target) & batch.keep if plan.stats and shifted else empty
    if batch.shift is not None:
        logits.scatter_add_(1, batch.target[:, None], -batch.shift[:, None])
    found = row_statistics(logits, batch.target, costs=cost, softcap=plan.softcap)
    if plan.stats and not shifted:
        correct = (found.best == batch.target) & batch.keep
    nll, per_cost = found.log_total - found.chosen, torch.zeros_like(found.log_total)
    if is_transport_loss(plan.loss):
        value, toward_target, per_cost = plan.loss.value_and_derivatives(nll, found.expected)
    elif is_row_loss(plan.loss):
        value, toward_target = plan.loss.value_and_derivative(nll)
    else:
        raise TypeError("a row loss is needed")
    if smoothing:
        value = (1 - smoothing) * value + smoothing * (found.log_total - found.sums / classes)
    if grad:
        # The scale of the logits is that of their gradient, too.
        weights = batch.weights * plan.logit_scale
        toward_target = weights * (1 - smoothing) * toward_target
        coefficients = RowCoefficients(
            per_probability=toward_target + weights * smoothing,
            toward_target=toward_target,
            uniform=weights * (smoothing / classes),
            per_cost=weights * (1 - smoothing) * per_cost,
        )
        write_row_gradients(logits, batch.target, batch.keep, found, coefficients, costs=cost, softcap=plan.softcap)
    expected = empty if cost is None else found.expected.masked_fill(ignored, 0.0)
    return _Rows(value.masked_fill(ignored, 0.0), nll.masked_fill(ignored, 0.0), correct, expected)


def _rows_of(logits: Tensor, cost: Tensor | None, batch: Batch, plan: Plan, *, grad: bool) -> _Rows:
    """Losses of some rows; with `grad` the logits are overwritten by the gradient of the weighted sum."""
    if _has_kernel(logits, batch, plan):
        return _rows_of_kernel(logits, cost, batch, plan, grad=grad)
    slope = None
    if plan.softcap is not None:
        logits.div_(plan.softcap).tanh_()
        slope = 1 - logits.square() if grad else None
        logits.mul_(plan.softcap)
    empty = logits.new_empty(0)
    correct = (logits.argmax(1) == batch.target) & batch.keep if plan.stats else empty
    if batch.shift is not None:
        logits.scatter_add_(1, batch.target[:, None], -batch.shift[:, None])
    if is_row_loss(plan.loss) or is_transport_loss(plan.loss):
        value, nll, expected = _row_loss(logits, cost, batch, plan, grad=grad)
    else:
        nll, expected = empty, empty
        if plan.stats:
            nll = (logits.logsumexp(1) - logits.gather(1, batch.target[:, None])[:, 0]).masked_fill(~batch.keep, 0.0)
        value = _any_loss(logits, batch, plan.loss, grad=grad)
    if grad:
        if slope is not None:
            logits.mul_(slope)
        if plan.logit_scale != 1.0:
            logits.mul_(plan.logit_scale)
        _clear_ignored(logits, batch.keep)
    return _Rows(value, nll, correct, expected)


def _row_loss(
    logits: Tensor, cost: Tensor | None, batch: Batch, plan: Plan, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, negative log-likelihoods and expected costs; with `grad` the logits become the gradient."""
    target, smoothing = batch.target[:, None], plan.label_smoothing
    chosen = logits.gather(1, target)[:, 0]
    mean = logits.mean(1) if smoothing else None
    top = logits.amax(1)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    log_total = top + total.log()
    nll = log_total - chosen
    expected, per_cost = nll.new_empty(0), None
    if cost is not None and is_transport_loss(plan.loss):
        expected = (logits * cost).sum(1) / total
        value, toward_target, per_cost = plan.loss.value_and_derivatives(nll, expected)
    elif is_row_loss(plan.loss):
        value, toward_target = plan.loss.value_and_derivative(nll)
    else:
        raise TypeError("a row loss is needed")
    if mean is not None:
        value = (1 - smoothing) * value + smoothing * (log_total - mean)
    if grad:
        weights = batch.weights
        share = weights * (1 - smoothing) if smoothing else weights
        toward_target = share * toward_target
        per_probability = toward_target + weights * smoothing if smoothing else toward_target
        if cost is not None and per_cost is not None:
            # p [a + b (c - e)] as p (b c + [a - b e]), where p is still to be divided by its sum.
            per_cost = share * per_cost
            constant = per_probability - per_cost * expected
            cost.mul_((per_cost / total)[:, None]).add_((constant / total)[:, None])
            logits.mul_(cost)
        else:
            logits.mul_((per_probability / total)[:, None])
        logits.scatter_add_(1, target, -toward_target[:, None])
        if smoothing:
            logits.sub_((weights * (smoothing / logits.shape[1]))[:, None])
    ignored = ~batch.keep
    if expected.numel():
        expected = expected.masked_fill(ignored, 0.0)
    return value.masked_fill(ignored, 0.0), nll.masked_fill(ignored, 0.0), expected


def _any_loss(logits: Tensor, batch: Batch, loss: TokenLoss, *, grad: bool) -> Tensor:
    """Values of a callable; with `grad` the logits are overwritten by the gradient of the weighted sum."""
    if not callable(loss):
        raise TypeError("a callable is needed")
    target, keep = batch.target, batch.keep
    with torch.set_grad_enabled(grad):
        leaf = logits.detach().requires_grad_(grad)
        rows = loss(leaf, target)
        if not isinstance(rows, Tensor) or rows.shape != target.shape:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"loss must return one value per row, shape {tuple(target.shape)}, got {shape}")
        value = rows.to(logits.dtype).masked_fill(~keep, 0.0)
        if grad:
            _check_constants(rows, leaf)
            (gradient,) = torch.autograd.grad((value * batch.weights).sum(), leaf)
            logits.copy_(gradient)
    return value.detach()


def _check_constants(rows: Tensor, leaf: Tensor) -> None:
    """Raise if the loss depends on another tensor that wants a gradient: it would get none, silently."""
    seen, nodes = set(), [rows.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None) if node.name().endswith("AccumulateGrad") else None
        if variable is not None and variable is not leaf:
            raise ValueError(
                f"loss may differentiate the logits only, but it uses a tensor of shape {tuple(variable.shape)} that "
                f"requires a gradient; detach it, or {_INSTEAD}"
            )
        nodes += [parent for parent, _ in node.next_functions]


def _clear_ignored(gradient: Tensor, keep: Tensor) -> None:
    """Exact zeros in ignored rows: a weight of 0 does not remove a NaN. Looking first is free on the CPU only."""
    if keep.device.type != "cpu" or not bool(keep.all()):
        gradient.masked_fill_(~keep[:, None], 0.0)
