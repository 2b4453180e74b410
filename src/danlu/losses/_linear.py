r"""A linear head followed by any per-token loss, in chunks of rows: the logits of all rows are never held.

Source: the idea is that of chunked cross entropy; the coefficients follow from the chain rule (Definition below).

Shape letters: `N` rows (tokens); `D` features; `V` classes; `C` rows of a chunk; `...` axes that are flattened to `N`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_integer, check_real, check_same_device, is_low_precision
from danlu._common.reduction import Reduction, check_reduction, row_weight
from danlu.losses._targets import check_range, check_targets

__all__ = ["CrossEntropy", "RowLoss", "linear_loss"]


@runtime_checkable
class RowLoss(Protocol):
    r"""A loss that depends on a row only through $\ell = -\log p_t$, so that its logit gradient is known.

    `label_smoothing` $\varepsilon$ mixes the loss with the mean of $-\log p_v$ over the classes.
    """

    @property
    def label_smoothing(self) -> float:
        """Share of the uniform target, in $[0, 1]$."""
        ...

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and $\varphi'(\ell)$ for every row."""
        ...


TokenLoss = RowLoss | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    r"""Cross entropy as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $$L = (1-\varepsilon)\,\ell + \frac{\varepsilon}{V}\sum_v -\log p_v, \qquad \ell = -\log p_t$$
        with $\varepsilon$ = `label_smoothing`.

    Args:
        label_smoothing: $\varepsilon \in [0, 1]$.

    Raises:
        ValueError: `label_smoothing` is not in [0, 1].

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss].

    Source:
        Szegedy et al. (2015), arXiv 1512.00567, section 7, for the smoothing.

    Example:
        >>> import torch
        >>> from danlu.losses import CrossEntropy, linear_loss
        >>> linear_loss(torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2]), CrossEntropy())
        tensor(1.6094)
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_real("label_smoothing", self.label_smoothing, low=0.0, high=1.0)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\ell$ and 1."""
        return nll, torch.ones_like(nll)


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: TokenLoss,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Loss of a linear head, and its gradients, without ever holding the logits of all rows.

    Definition:
        With $z_n = W h_n + b$, $p_n = \operatorname{softmax}(z_n)$, $\ell_n = -\log p_{n,y_n}$ and a row loss
        $L_n = (1-\varepsilon)\varphi(\ell_n) + \tfrac{\varepsilon}{V}\sum_v -\log p_{nv}$,
        $$G_{nv} = g_n\Big[(1-\varepsilon)\,\varphi'(\ell_n)\,(p_{nv} - \delta_{v,y_n})
        + \varepsilon\,(p_{nv} - \tfrac1V)\Big], \qquad
        \nabla_h = G W,\quad \nabla_W = G^\top h,\quad \nabla_b = \textstyle\sum_n G_n$$
        with $h$ = `input`, $W$ = `linear_weight`, $b$ = `linear_bias`, $y$ = `target` and $g_n$ the weight of the row
        in the reduced loss. For any other callable $L_n$ = `loss(z_n, y_n)`, and autograd gives $G$ chunk by chunk.

    Args:
        input: hidden states, shape `(..., D)`, floating.
        linear_weight: shape `(V, D)`, dtype of `input` (any floating dtype under autocast). It may be tied to an
            embedding; both gradients then add up as usual.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        loss: a row loss (`CrossEntropy()`, `TaiLr(...)`), or any callable `(logits, target) -> loss per row` on
            `(C, V)` and `(C,)` that treats rows separately and does not reduce. Ignored rows reach it with target 0.
        linear_bias: shape `(V,)`, or None.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        chunk_size: rows per chunk; None balances the chunk against the weight's gradient, see Cost.

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored gives
        0 with zero gradients.

    Raises:
        TypeError: dtypes do not fit, or `loss` is neither a row loss nor a callable (or a class instead of an object).
        ValueError: shapes or devices do not fit, `chunk_size` < 1, a callable does not give one loss per row or uses
            other tensors that require gradients (it would not give them any), or, on the CPU, a target is not a class.
        RuntimeError: from a second derivative, a forward-mode derivative, or `vmap`, which are not supported.

    Numerics:
        Softmax, losses and the accumulation of the weight's gradient over chunks are float32 for half inputs, so the
        result does not degrade with their number. On the CPU half products run in float32 as well; on an accelerator
        they run in the half dtype, which rounds the logits. A logit of $-\infty$ is a mask; with label smoothing it
        makes the loss infinite, as in `F.cross_entropy`. NaN stays within its row's loss and input gradient. An
        ignored row gets exactly zero gradient whatever it holds.

    Cost:
        $6NVD$ flops with gradients, $2NVD$ without. Extra memory: $4CV$ bytes for the chunk and $4VD$ for the
        weight's gradient (none if it is frozen); nothing of size $NV$. Half inputs on the CPU add $4VD$ for the weight
        in float32. The default $C$ is the power of two at or above $\max(D/2,\ ND/V)$, at most $N$: the chunk then is
        about half as large as the weight's gradient, or as the input, and rereading the accumulated gradient for
        every chunk stays cheap. At 2048 rows, 512 features, 32000 classes and one CPU thread that is 256; 64 rows take
        1.3 to 1.4 times as long, and 1024 twice the memory without being faster.

        Gradients are computed in the forward call for "mean" and "sum" and handed over without a copy; a second
        backward through a retained graph computes them again. With "none" the backward recomputes the logits.
        Reverse-mode `torch.func` transforms work. `torch.compile` breaks the graph here. Under
        `torch.utils.checkpoint` the gradients are right, but nothing is saved and the forward runs twice.

    Differences:
        torch's `F.linear_cross_entropy` has cross entropy only. Kernels that accumulate the weight's gradient in half
        precision drift with the number of chunks; this one does not.

    Source:
        The gradient is the chain rule; compare `torch.nn.functional.linear_cross_entropy` (torch 2.13) and Wijmans et
        al. (2024), "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.

    Example:
        >>> import torch
        >>> from danlu.losses import TaiLr, linear_loss
        >>> hidden, head = torch.zeros(3, 4), torch.zeros(10, 4, requires_grad=True)
        >>> linear_loss(hidden, head, torch.tensor([1, 2, -100]), TaiLr(gamma=1.0)).item()
        0.8999999761581421
    """
    check_targets("input", input, target)
    check_floating("linear_weight", linear_weight)
    if linear_weight.ndim != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have shape (V, {input.shape[-1]}) for input {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:1]:
            raise ValueError(
                f"linear_bias must have shape {tuple(linear_weight.shape[:1])}, got {tuple(linear_bias.shape)}"
            )
    check_same_device(input=input, linear_weight=linear_weight, linear_bias=linear_bias, target=target)
    autocast = torch.is_autocast_enabled(input.device.type)
    if not autocast and any(t.dtype != input.dtype for t in (linear_weight, linear_bias) if t is not None):
        raise TypeError(
            f"input and linear_weight (and linear_bias) must have one dtype outside autocast, got {input.dtype} and "
            f"{linear_weight.dtype}" + ("" if linear_bias is None else f" and {linear_bias.dtype}")
        )
    if isinstance(loss, type) or not (callable(loss) or isinstance(loss, RowLoss)):
        found = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a row loss or a callable (logits, target) -> loss, got {found}")
    check_reduction(reduction, normalizer)
    count, classes = target.numel(), linear_weight.shape[0]
    keep = check_range(target, classes, ignore_index)
    if chunk_size is None:
        chunk_size = _default_chunk(count, input.shape[-1], classes)
    check_integer("chunk_size", chunk_size, low=1)

    plan = _Plan(loss, min(chunk_size, max(1, count)), _compute_dtype(input, linear_weight, autocast))
    keep = keep.reshape(-1)
    weight = row_weight(keep, reduction, normalizer, plan.row_dtype)
    # Asked here because a forward without context cannot; a transform that knows better recomputes in the backward.
    grad = torch.is_grad_enabled()
    needs = tuple(
        grad and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, linear_bias)
    )
    # Chunks written in place are no gain to a compiler, and its own derivative of them would be silently wrong.
    apply = torch.compiler.disable(_LinearLoss.apply) if torch.compiler.is_compiling() else _LinearLoss.apply
    rows = apply(
        input.reshape(count, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1).masked_fill(~keep, 0),
        keep,
        weight,
        plan,
        None if reduction == "none" else _Prepared(needs),
    )
    return rows.view(target.shape) if reduction == "none" else rows


def _default_chunk(count: int, features: int, classes: int) -> int:
    wanted = max(features / 2, count * features / max(1, classes))
    return max(1, min(count, 2 ** math.ceil(math.log2(max(1.0, wanted)))))


def _compute_dtype(input: Tensor, linear_weight: Tensor, autocast: bool) -> torch.dtype:
    """Dtype of the matrix products."""
    if autocast and input.device.type != "cpu":
        return torch.get_autocast_dtype(input.device.type)
    dtype = torch.promote_types(input.dtype, linear_weight.dtype)
    # Half products on the CPU are emulated and many times slower.
    return torch.float32 if input.device.type == "cpu" and is_low_precision(dtype) else dtype


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the tensors' values."""

    loss: TokenLoss
    chunk_size: int
    dtype: torch.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of logits and losses."""
        return torch.float32 if is_low_precision(self.dtype) else self.dtype


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
_INSTEAD = "take the loss of F.linear(input, linear_weight)"


class _Prepared:
    """Gradients on their way from the forward to the first backward.

    They are neither outputs nor saved tensors, so that nothing else refers to the buffers when they are handed over,
    and `.grad` takes them without a copy.
    """

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs = needs
        self.grads: Grads | None = None

    def take(self, needs: tuple[bool, ...]) -> Grads | None:
        """Return the gradients once, if they are all that is needed."""
        grads, self.grads = self.grads, None
        return grads if all(have or not need for have, need in zip(self.needs, needs, strict=True)) else None


class _LinearLoss(torch.autograd.Function):
    """One loss per row, or their weighted sum with the gradients computed on the way."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        keep: Tensor,
        row_weights: Tensor,
        plan: _Plan,
        prepared: _Prepared | None,
    ) -> Tensor:
        needs = (False, False, False) if prepared is None else prepared.needs
        values, grads = _run(hidden, weight, bias, target, keep, row_weights, plan, needs)
        if prepared is None:
            return values
        if any(needs):
            prepared.grads = grads
        return (values * row_weights).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.plan, ctx.prepared = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = _LinearLossGradients.apply(
            *ctx.saved_tensors, *grad_outputs, ctx.plan, ctx.prepared, tuple(ctx.needs_input_grad[:3])
        )
        return (*grads, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        raise RuntimeError(f"linear_loss has no forward-mode derivative; {_INSTEAD}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        raise RuntimeError(f"linear_loss does not work under vmap; {_INSTEAD}")


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
        upstream: Tensor,
        plan: _Plan,
        prepared: _Prepared | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        grads = None if prepared is None else prepared.take(needs)
        if grads is None:
            weights = row_weights * upstream.to(row_weights.dtype)
            return _run(hidden, weight, bias, target, keep, weights, plan, needs)[1]
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"linear_loss has no second derivative; {_INSTEAD}")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Grads:
        raise RuntimeError(f"linear_loss has no second derivative; {_INSTEAD}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Grads, Any]:
        raise RuntimeError(f"the gradient of linear_loss does not work under vmap; {_INSTEAD}")


@torch.no_grad()
def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    keep: Tensor,
    row_weights: Tensor,
    plan: _Plan,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Grads]:
    """Losses of all rows (0 where ignored), and the gradients of their sum weighted by `row_weights`."""
    count, features = hidden.shape
    classes = weight.shape[0]
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        head = weight.to(plan.dtype)
        offset = None if bias is None else bias.to(plan.row_dtype)
        values = hidden.new_empty(count, dtype=plan.row_dtype)
        buffer = hidden.new_empty(plan.chunk_size, classes, dtype=plan.row_dtype)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(classes, features, dtype=plan.row_dtype, device=hidden.device) if needs[1] else None
        d_bias = torch.zeros(classes, dtype=plan.row_dtype, device=hidden.device) if needs[2] else None
        for start in range(0, count, plan.chunk_size):
            rows = slice(start, min(start + plan.chunk_size, count))
            states = hidden[rows].to(plan.dtype)
            logits = _logits(states, head, offset, buffer[: states.shape[0]])
            of_rows = (target[rows], keep[rows], row_weights[rows], plan.loss)
            if isinstance(plan.loss, RowLoss):
                values[rows] = _row_loss(logits, *of_rows, grad=any(needs))
            else:
                values[rows] = _any_loss(logits, *of_rows, grad=any(needs))
            if not any(needs):
                continue
            # `logits` now holds the gradient of the weighted losses.
            gradient = logits.to(plan.dtype)
            if d_hidden is not None:
                if d_hidden.dtype == plan.dtype:
                    torch.mm(gradient, head, out=d_hidden[rows])
                else:
                    d_hidden[rows] = torch.mm(gradient, head)
            if d_weight is not None:
                _accumulate(d_weight, gradient, states)
            if d_bias is not None:
                d_bias += logits.sum(0)
        return values, (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )


def _logits(states: Tensor, head: Tensor, offset: Tensor | None, out: Tensor) -> Tensor:
    """Logits of a chunk, written into `out`."""
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


def _row_loss(logits: Tensor, target: Tensor, keep: Tensor, weights: Tensor, loss: TokenLoss, *, grad: bool) -> Tensor:
    """Values of a row loss; with `grad` the logits are overwritten by the gradient of the weighted sum."""
    if not isinstance(loss, RowLoss):
        raise TypeError("a row loss is needed")
    smoothing = loss.label_smoothing
    chosen = logits.gather(1, target[:, None])[:, 0]
    mean = logits.mean(1) if smoothing else None
    top = logits.amax(1)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    log_total = top + total.log()
    nll = log_total - chosen
    value, slope = loss.value_and_derivative(nll)
    if mean is not None:
        value = (1 - smoothing) * value + smoothing * (log_total - mean)
    if grad:
        toward_target = weights * (slope * (1 - smoothing) if smoothing else slope)
        per_probability = (toward_target + weights * smoothing) / total
        logits.mul_(per_probability[:, None])
        logits.scatter_add_(1, target[:, None], -toward_target[:, None])
        if smoothing:
            logits.sub_((weights * (smoothing / logits.shape[1]))[:, None])
        _clear_ignored(logits, keep)
    return value.masked_fill(~keep, 0.0)


def _any_loss(logits: Tensor, target: Tensor, keep: Tensor, weights: Tensor, loss: TokenLoss, *, grad: bool) -> Tensor:
    """Values of a callable; with `grad` the logits are overwritten by the gradient of the weighted sum."""
    if isinstance(loss, RowLoss):
        raise TypeError("a callable is needed")
    with torch.set_grad_enabled(grad):
        leaf = logits.detach().requires_grad_(grad)
        rows = loss(leaf, target)
        if not isinstance(rows, Tensor) or rows.shape != target.shape:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"loss must return one value per row, shape {tuple(target.shape)}, got {shape}")
        value = rows.to(logits.dtype).masked_fill(~keep, 0.0)
        if grad:
            _check_constants(rows, leaf)
            (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
            logits.copy_(gradient)
            _clear_ignored(logits, keep)
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
