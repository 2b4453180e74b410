r"""The chunks of `linear_sparse_softmax_loss`: losses of rows, and the few derivatives by their logits that are not 0.

Source: as in [`linear_sparse_softmax_loss`][danlu.losses.linear_sparse_softmax_loss].

Shape letters: `N` rows; `D` features; `V` classes; `C` rows of a chunk; `E` classes with a gradient, over all rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu._common.checks import is_low_precision
from danlu.losses._linear_chunks import default_chunk
from danlu.losses._linear_engine import write_logits
from danlu.losses._prepared import compiles, outside, refusal

__all__ = ["sparse_rows"]

_INSTEAD = "take sparse_softmax_loss(F.linear(input, linear_weight), target)"
_OUTSIDE = "linear_sparse_softmax_loss breaks the graph within torch.func transforms"


def sparse_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor,
    k: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of every row; what those have that are not kept is nobody's business."""
    tensors = (hidden, weight, bias, target, keep)
    if compiles():
        return _compiled_rows(*tensors, k, chunk_size, dtype)[0]
    return outside(_SparseRows.apply, _OUTSIDE)(*tensors, _plan(hidden, weight, k, chunk_size, dtype))[0]


class _Plan(NamedTuple):
    """What does not depend on the tensors' values."""

    k: int
    chunk_size: int
    dtype: torch.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of logits and losses."""
        return torch.float32 if is_low_precision(self.dtype) else self.dtype


def _plan(hidden: Tensor, weight: Tensor, k: int, chunk_size: int | None, dtype: torch.dtype) -> _Plan:
    features, count = hidden.shape[-1], hidden.numel() // max(1, hidden.shape[-1])
    rows = default_chunk(count, features, len(weight)) if chunk_size is None else chunk_size
    return _Plan(k, max(1, min(rows, count)), dtype)


class _Entries(NamedTuple):
    """The derivatives of the rows by their logits that are not 0: row, class and value of each, sorted by row."""

    row: Tensor
    column: Tensor
    value: Tensor


class _SparseRows(torch.autograd.Function):
    """The loss of every row, and its derivatives by the logits."""

    jvp = refusal(f"linear_sparse_softmax_loss has no forward-mode derivative; {_INSTEAD}")
    vmap = refusal(f"linear_sparse_softmax_loss does not work under vmap; {_INSTEAD}")

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, keep: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        values = hidden.new_empty(len(hidden), dtype=plan.row_dtype)
        dense = torch.zeros_like(keep)
        found: list[_Entries] = []
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            head, offset = weight.to(plan.dtype), None if bias is None else bias.to(plan.row_dtype)
            buffer = hidden.new_empty(plan.chunk_size, len(weight), dtype=plan.row_dtype)
            for start in range(0, len(hidden), plan.chunk_size):
                chunk = slice(start, min(start + plan.chunk_size, len(hidden)))
                states = hidden[chunk].to(plan.dtype)
                logits = write_logits(states, head, offset, buffer[: len(states)])
                values[chunk], entries, dense[chunk] = _rows_of(logits, target[chunk], keep[chunk], plan.k)
                found.append(entries._replace(row=entries.row + start))
        if not found:
            nowhere = target.new_empty(0)
            return values, dense, nowhere, nowhere, values.new_empty(0)
        row, column, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values, dense, row, column, value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, plan = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.plan = plan
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 6
        needs = tuple(ctx.needs_input_grad[:3])
        return (*_Gradients.apply(*ctx.saved_tensors, grad_outputs[0], ctx.plan, needs), None, None, None)


class _Gradients(torch.autograd.Function):
    """The gradients, as a function whose own gradient raises: with create_graph they would pass for constants."""

    backward = refusal(f"linear_sparse_softmax_loss has no second derivative; {_INSTEAD}")
    jvp = backward
    vmap = refusal(f"the gradient of linear_sparse_softmax_loss does not work under vmap; {_INSTEAD}")

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        keep: Tensor,
        dense: Tensor,
        row: Tensor,
        column: Tensor,
        value: Tensor,
        upstream: Tensor,
        plan: _Plan,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # The weight of an ignored row may be NaN.
        weights = upstream.to(value.dtype).masked_fill(~keep, 0.0)
        value = value * weights[row]
        # Those whose gradient has too many entries to list.
        others = dense.nonzero()[:, 0].split(plan.chunk_size)
        d_hidden = d_weight = d_bias = None
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            head = weight.to(plan.dtype)
            if needs[0]:
                found = _weighted_sums(row, column, value.to(plan.dtype), head)
                d_hidden = hidden.new_zeros(hidden.shape)
                d_hidden[found[0]] = found[1].to(hidden.dtype)
            if needs[1]:
                # What stands in an ignored row may be NaN, and 0 times that is no 0.
                states = hidden.to(value.dtype).masked_fill(~keep[:, None], 0.0)
                order = column.argsort()
                found = _weighted_sums(column[order], row[order], value[order], states)
                d_weight = weight.new_zeros(weight.shape, dtype=value.dtype if len(others[0]) else weight.dtype)
                d_weight[found[0]] = found[1].to(d_weight.dtype)
            if needs[2] and bias is not None:
                d_bias = value.new_zeros(len(bias)).index_add_(0, column, value)
            offset = None if bias is None else bias.to(value.dtype)
            for rows in others if len(others[0]) else ():
                gradient = _dense_gradient(hidden[rows].to(plan.dtype), head, offset, target[rows], weights[rows], plan)
                if d_hidden is not None:
                    d_hidden[rows] = torch.mm(gradient.to(plan.dtype), head).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.addmm_(gradient.t(), hidden[rows].to(value.dtype))
                if d_bias is not None:
                    d_bias += gradient.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Nothing is kept."""


def _rows_of(logits: Tensor, target: Tensor, keep: Tensor, k: int) -> tuple[Tensor, _Entries, Tensor]:
    """Losses of some rows and their derivatives, 0 in rows that are not kept and in those of the mask at the end.

    The derivatives of the latter are not listed, because too many logits tie.
    """
    largest, columns = logits.topk(min(k + 1, logits.shape[1]), -1, sorted=True)
    # One more than needed tells of ties; NaN and -inf have no equals that count.
    next_one = largest[:, k:]
    largest, columns, smallest = largest[:, :k], columns[:, :k], largest[:, k - 1 : k]
    rows = ((next_one == smallest) & (smallest > -torch.inf)).nonzero()[:, 0]
    total = largest.logsumexp(-1)
    more: list[_Entries] = []
    dense = torch.zeros_like(keep)
    if len(rows):
        # Some logit beyond the k largest is as large as the smallest of them.
        chosen = logits[rows] >= smallest[rows]
        total[rows] = logits[rows].masked_fill(~chosen, -torch.inf).logsumexp(-1)
        chosen = chosen.scatter_(1, columns[rows], False)
        if int(chosen.sum()) > len(logits) * (k + 1):
            dense[rows] = keep[rows]
        else:
            beyond = chosen.nonzero()
            row, column = rows[beyond[:, 0]], beyond[:, 1]
            more.append(_Entries(row, column, (logits[row, column] - total[row]).exp()))
    of_target = logits.gather(1, target[:, None])[:, 0]
    row = torch.arange(len(logits), device=logits.device)[:, None].expand(-1, k + 1)
    column = torch.cat((columns, target[:, None]), 1)
    value = torch.cat(((largest - total[:, None]).exp(), of_target.new_full((len(logits), 1), -1.0)), 1)
    entries = _Entries(row.reshape(-1), column.reshape(-1), value.reshape(-1))
    for other in more:
        row, order = torch.cat((entries.row, other.row)).sort(stable=True)
        column, value = (torch.cat(pair)[order] for pair in zip(entries[1:], other[1:], strict=True))
        entries = _Entries(row, column, value)
    listed = keep & ~dense
    return total - of_target, entries._replace(value=entries.value.masked_fill(~listed[entries.row], 0.0)), dense


def _dense_gradient(
    states: Tensor, head: Tensor, offset: Tensor | None, target: Tensor, weights: Tensor, plan: _Plan
) -> Tensor:
    """The derivatives of some weighted rows by all logits, from logits made again."""
    logits = write_logits(states, head, offset, weights.new_empty(len(states), len(head)))
    # Of these logits and not of those before: another shape of the product may round ties apart.
    smallest = logits.topk(plan.k, -1, sorted=True).values[:, -1:]
    gradient = torch.softmax(logits.masked_fill_(logits < smallest, -torch.inf), -1)
    gradient.scatter_add_(1, target[:, None], gradient.new_full((len(states), 1), -1.0))
    return gradient.mul_(weights[:, None])


def _weighted_sums(into: Tensor, of: Tensor, value: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """For every number in `into` (sorted): the number, and the sum of `value * source[of]` over its places."""
    numbers, counts = into.unique_consecutive(return_counts=True)
    sums = F.embedding_bag(of, source, counts.cumsum(0) - counts, mode="sum", per_sample_weights=value)
    return numbers, sums


# ----------------------------------------------------------------------------------------------------- operators

_TENSORS = 5


@torch.library.custom_op("danlu::linear_sparse_softmax_rows", mutates_args=())
def _compiled_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor,
    k: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(hidden, weight, k, chunk_size, dtype)
    values, dense, *entries = _SparseRows.forward(hidden, weight, bias, target, keep, plan)
    # Compilers want a size: the most that are listed. What is not used has a row that does not exist.
    missing = _most(hidden, k) - len(entries[0])
    row, column, value = (F.pad(part, (0, missing), value=fill) for part, fill in zip(entries, (-1, 0, 0), strict=True))
    return values, dense, row, column, value


def _most(hidden: Tensor, k: int) -> int:
    return 2 * hidden.shape[0] * (k + 1)


@_compiled_rows.register_fake
def _(
    hidden: Tensor, weight: Any, bias: Any, target: Tensor, keep: Tensor, k: int, chunk_size: Any, dtype: torch.dtype
) -> Any:
    values = hidden.new_empty(hidden.shape[0], dtype=_Plan(k, 1, dtype).row_dtype)
    most = _most(hidden, k)
    entries = (target.new_empty(most), target.new_empty(most), values.new_empty(most))
    return (values, torch.empty_like(keep), *entries)


@torch.library.custom_op("danlu::linear_sparse_softmax_vjp", mutates_args=())
def _compiled_vjp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor,
    dense: Tensor,
    row: Tensor,
    column: Tensor,
    value: Tensor,
    upstream: Tensor,
    k: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    used = int((row >= 0).sum())
    row, column, value = row[:used], column[:used], value[:used]
    plan = _plan(hidden, weight, k, chunk_size, dtype)
    grads = _Gradients.forward(
        hidden, weight, bias, target, keep, dense, row, column, value, upstream, plan, tuple(needs)
    )
    first, second, third = (hidden.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return first, second, third


@_compiled_vjp.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Any:
    return tuple(
        torch.empty_like(one, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for one, need in zip((hidden, weight, bias), rest[-1], strict=True)
    )


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.options = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _pull_rows(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_TENSORS - 3 + len(ctx.options))
    if any(other is not None for other in others):
        _refuse(ctx)
    if upstream is None:
        return (None, None, None, *nothing)
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = _compiled_vjp(*ctx.saved_tensors, upstream, *ctx.options, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(f"linear_sparse_softmax_loss has no second derivative; {_INSTEAD}")


_compiled_rows.register_autograd(_pull_rows, setup_context=_keep_rows)
_compiled_vjp.register_autograd(_refuse)
