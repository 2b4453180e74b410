r"""The loss of sparse softmax on a linear head: one product forward, and a few rows of the weight backward.

Source: Sun et al. (2021), "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation", arXiv 2112.12433.

Shape letters: `N` rows; `D` features; `V` classes; `C` rows of a chunk; `E` classes with a gradient, over all rows.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu._common.checks import check_integer, is_low_precision
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._linear import check_head, default_chunk, product_dtype
from danlu.losses._linear_engine import write_logits
from danlu.losses._prepared import refusal
from danlu.losses._targets import check_range, check_row_values

__all__ = ["linear_sparse_softmax_loss"]

_INSTEAD = "take sparse_softmax_loss(F.linear(input, linear_weight), target)"


def linear_sparse_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    k: int = 10,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    check: bool = False,
) -> Tensor:
    r"""[`sparse_softmax_loss`][danlu.losses.sparse_softmax_loss] of a linear head, without holding its logits.

    Definition:
        With $z_n = W h_n + b$, $\Omega_n$ = the $k$ largest logits of row $n$ (and those that tie with the smallest of
        them), $p_n = \operatorname{softmax}_{\Omega_n}(z_n)$ and $g_n$ the weight of the row in the reduced loss,
        $$L_n = \log\sum_{v \in \Omega_n} e^{z_{nv}} - z_{n y_n}, \qquad
        \nabla_{h_n} = g_n\Big(\sum_{v \in \Omega_n} p_{nv} W_v - W_{y_n}\Big), \qquad
        \nabla_{W_v} = \sum_n g_n\,(p_{nv}\,[v \in \Omega_n] - [v = y_n])\,h_n$$
        with $h$ = `input`, $W$ = `linear_weight`, $b$ = `linear_bias` and $y$ = `target`.

    Args:
        input: hidden states, shape `(..., D)`, floating.
        linear_weight: shape `(V, D)`, dtype of `input` (any floating dtype under autocast).
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        k: from 1 to `V`. The default is that of the paper's experiments.
        linear_bias: shape `(V,)`, or None.
        token_weight: multiplies the loss of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        chunk_size: rows per chunk; None as in [`linear_loss`][danlu.losses.linear_loss].
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored
        gives 0 with zero gradients.

    Raises:
        TypeError: dtypes do not fit, a tensor is sharded, or `k` or `chunk_size` is not an int.
        ValueError: shapes or devices do not fit, an option is out of its range, `token_weight` requires a gradient, or,
            on the CPU, a target is not a class.
        RuntimeError: from a second derivative, a forward-mode derivative, or `vmap`, which are not supported.

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss]; the gradients of $W$ are summed in float32 for half inputs.

    Cost:
        $2NVD$ flops for the logits and $4N(k+1)D$ for both gradients, where a loss with a dense gradient takes $6NVD$;
        and one `torch.topk` of every row. Extra memory: $4CV$ bytes for the chunk, $4VD$ for the weight's gradient
        (none if it is frozen), and $O(Nk + ND)$. Where more than $C(k+1)$ further logits of a chunk tie, as all do in a
        head of zeros, the rows that they are in take a dense gradient, chunk by chunk: $8NVD$ flops and $12CV$ bytes.
        On accelerators the search for ties waits for the device once per chunk.

    Differences:
        The gradient of $W$ is a dense tensor, as every optimizer takes it; its rows that no token touched are 0.

    Source:
        arXiv 2112.12433; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Sparse Softmax.

    Example:
        >>> import torch
        >>> from danlu.losses import linear_sparse_softmax_loss
        >>> hidden, head = torch.eye(3), torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0], [1.4, 0.0, 0.0]])
        >>> linear_sparse_softmax_loss(hidden[:1], head, torch.tensor([2]), k=2)
        tensor(0.5130)
    """
    check_head(input, linear_weight, linear_bias, target)
    classes, count = linear_weight.shape[0], target.numel()
    check_integer("k", k, low=1)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    if chunk_size is None:
        chunk_size = default_chunk(count, input.shape[-1], classes)
    else:
        check_integer("chunk_size", chunk_size, low=1)
    keep = check_range(target, classes, ignore_index, check=check)
    if k > classes:
        raise ValueError(f"k must be at most the number of classes, got {k} for {classes}")
    dtype = product_dtype(input, linear_weight, torch.is_autocast_enabled(input.device.type))
    # A compiler gains nothing from chunks that are written in place, as in `linear_loss`.
    compiler = torch.compiler.is_compiling() or "torch._dynamo" in sys.modules
    apply = torch.compiler.disable(_SparseRows.apply) if compiler else _SparseRows.apply
    rows = apply(
        input.reshape(count, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1).masked_fill(~keep.reshape(-1), 0),
        keep.reshape(-1),
        _Plan(k, max(1, min(chunk_size, count)), dtype),
    )[0].view(target.shape)
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    return reduce_loss(rows.masked_fill(~keep, 0.0), keep, reduction, normalizer)


class _Plan(NamedTuple):
    """What does not depend on the tensors' values."""

    k: int
    chunk_size: int
    dtype: torch.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of logits and losses."""
        return torch.float32 if is_low_precision(self.dtype) else self.dtype


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
