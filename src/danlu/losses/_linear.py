r"""A linear head followed by any per-token loss, in chunks of rows: the logits of all rows are never held.

Source: the idea is that of chunked cross entropy; the coefficients follow from the chain rule (Definition below).

Shape letters: `N` rows (tokens); `D` features; `V` classes; `C` rows of a chunk; `...` axes that are flattened to `N`.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from danlu._common.checks import check_floating, check_real, check_same_device, is_low_precision
from danlu._common.reduction import Reduction, check_reduction, row_weight
from danlu.losses._linear_chunks import bytes_of_logit, check_chunk, rows_per_chunk
from danlu.losses._linear_engine import LinearLoss, Plan, TokenLoss
from danlu.losses._linear_ops import CompiledHead
from danlu.losses._prepared import Prepared, compiles, outside
from danlu.losses._row_loss import is_row_loss, is_transport_loss
from danlu.losses._targets import check_range, check_row_values, check_targets

__all__ = ["LinearStats", "check_head", "linear_loss", "product_dtype"]

_OUTSIDE = "linear_loss runs callables of logits, and what torch.func transforms, outside of the graph; take a row loss"


class LinearStats(NamedTuple):
    r"""What [`linear_loss`][danlu.losses.linear_loss] knows of every row, so that a trainer can log without logits.

    Definition:
        $\ell = -\log p_t$, $p_t$, whether $t$ is the largest logit, and $e = \sum_v p_v c_{tv}$.

    Args:
        nll: $\ell$ of the logits that the loss sees, with scale, softcap and shift (nats); 0 in ignored rows.
        target_probability: $e^{-\ell}$; 0 in ignored rows.
        correct: whether the target has the largest logit, before the shift; False in ignored rows.
        cost: $e$ for losses with a ground cost, else None.

    Numerics:
        Without gradients, in the dtype of the loss; each of the shape of `target`.

    Source:
        Definitions.

    Example:
        >>> import torch
        >>> from danlu.losses import CrossEntropy, linear_loss
        >>> hidden, head, target = torch.eye(2), torch.eye(2), torch.tensor([0, 0])
        >>> _, stats = linear_loss(hidden, head, target, CrossEntropy(), return_stats=True)
        >>> stats.correct
        tensor([ True, False])
    """

    nll: Tensor
    target_probability: Tensor
    correct: Tensor
    cost: Tensor | None


@overload
def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: TokenLoss,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_shift: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    return_stats: Literal[False] = False,
    check: bool = False,
) -> Tensor: ...


@overload
def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: TokenLoss,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_shift: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    return_stats: Literal[True],
    check: bool = False,
) -> tuple[Tensor, LinearStats]: ...


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: TokenLoss,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_shift: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, LinearStats]:
    r"""Loss of a linear head, and its gradients, without ever holding the logits of all rows.

    Definition:
        With $u_n = a\,(W h_n + b)$, $z_n = c\tanh(u_n/c)$ (or $u_n$ without a softcap), then
        $z_{n,y_n} \leftarrow z_{n,y_n} - m_n$, $p_n = \operatorname{softmax}(z_n)$, $\ell_n = -\log p_{n,y_n}$, for
        losses with a ground cost $e_n = \sum_v p_{nv} c_{y_n v}$, and a row loss
        $L_n = (1-\varepsilon)\varphi(\ell_n, e_n) + \tfrac{\varepsilon}{V}\sum_v -\log p_{nv}$ with the coefficients
        $\alpha_n$ of $\nabla\ell_n$ and $\beta_n$ of $\nabla e_n$,
        $$G_{nv} = g_n\Big[(1-\varepsilon)\big(\alpha_n (p_{nv} - \delta_{v,y_n})
        + \beta_n\,p_{nv} (c_{y_n v} - e_n)\big) + \varepsilon\,(p_{nv} - \tfrac1V)\Big]\,a\,(1 - \tanh^2(u_{nv}/c)),$$
        $$\nabla_h = G W,\quad \nabla_W = G^\top h,\quad \nabla_b = \textstyle\sum_n G_n$$
        with $h$ = `input`, $W$ = `linear_weight`, $b$ = `linear_bias`, $y$ = `target`, $a$ = `logit_scale`,
        $c$ = `softcap`, $m$ = `target_shift` and $g_n$ the weight of the row in the reduced loss. For any other
        callable $L_n$ = `loss(z_n, y_n)`, and autograd gives $G$ chunk by chunk.

    Args:
        input: hidden states, shape `(..., D)`, floating.
        linear_weight: shape `(V, D)`, dtype of `input` (any floating dtype under autocast). It may be tied to an
            embedding; both gradients then add up as usual.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        loss: a row loss (`CrossEntropy()`, `TaiLr(...)`, `EMO(...)`, `GeneralizedCE(...)`, `MixCE(...)`, or a
            `RowFunction` of the negative log-likelihood), or any callable `(logits, target) -> loss per row` on
            `(C, V)` and `(C,)` that treats rows separately and does not reduce. Ignored rows reach it with target 0.
        linear_bias: shape `(V,)`, or None.
        logit_scale: $a > 0$.
        softcap: $c > 0$, or None. It is applied after the bias, so a bias of $-\infty$ is no mask then.
        target_shift: margin $m$ that the target's logit loses, a number or shape `(...)`; not differentiated.
        token_weight: weight of every row's loss and gradient, shape `(...)`; not differentiated. The denominator of
            "mean" stays the number of rows.
        label_smoothing: $\varepsilon \in [0, 1]$ in place of the row loss's own; None keeps that.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        chunk_size: rows per chunk; None balances the chunk against the weight's gradient, see Cost.
        memory_budget: bytes for the buffers of a chunk, see Cost; the chunk is the largest power of two that fits, at
            least 1. What a callable makes on its own way comes on top.
        return_stats: also return a [`LinearStats`][danlu.losses.LinearStats].
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored gives
        0 with zero gradients. With `return_stats` the pair of that and the statistics.

    Raises:
        TypeError: dtypes do not fit, a tensor is sharded, or `loss` is neither a row loss nor a callable (or a class
            instead of an object).
        ValueError: shapes or devices do not fit, an option is out of its range, `chunk_size` and `memory_budget` are
            both given, `target_shift` or `token_weight` requires a gradient, `label_smoothing` meets a callable, a
            callable does not give one loss per row or uses other tensors that require gradients (it would not give
            them any), or, on the CPU, a target is not a class.
        RuntimeError: from a second derivative, a forward-mode derivative, or `vmap`, which are not supported.

    Numerics:
        Softmax, losses and the accumulation of the weight's gradient over chunks are float32 for half inputs, so the
        result does not degrade with their number. On the CPU half products run in float32 as well; on an accelerator
        they run in the half dtype, which rounds the logits. A logit of $-\infty$ is a mask; with label smoothing it
        makes the loss infinite, as in `F.cross_entropy`. NaN stays within its row's loss and input gradient. An
        ignored row gets exactly zero gradient whatever it holds.

    Cost:
        $6NVD$ flops with gradients, $2NVD$ without; a cosine ground cost of width $E$ adds $2NVE$. Extra memory: $4CV$
        bytes for the chunk (twice that with a cosine ground cost, or for a callable; $2CV$ more for half products) and
        $4VD$ for the weight's gradient (none if it is frozen), both twice in float64; nothing of size $NV$. Half inputs
        on the CPU add $4VD$ for the weight in float32. The default $C$ is
        the power of two at or above $\max(D/2,\ ND/V)$, at most $N$: the chunk then is about half as large as the
        weight's gradient, or as the input, and rereading the accumulated gradient for every chunk stays cheap. At 2048
        rows, 512 features, 32000 classes and one CPU thread that is 256; 64 rows take 1.3 to 1.4 times as long, and
        1024 twice the memory without being faster.

        Gradients are computed in the forward call for "mean" and "sum" and handed over without a copy; a second
        backward through a retained graph computes them again. With "none" the backward recomputes the logits.
        Reverse-mode `torch.func` transforms work. Under `torch.utils.checkpoint` the gradients are right, but nothing
        is saved and the forward runs twice. `torch.compile(fullgraph=True)` takes the loss as one operator; for a
        `RowFunction`, or a row loss class of your own, it traces the function and makes the logits again in the
        backward. Around a callable of logits, and within `torch.func` transforms, it breaks the graph.

        A weight that FSDP2 shards is whole only inside the forward of its module, so there the loss must be computed;
        a `DTensor` is refused.

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
    check_head(input, linear_weight, linear_bias, target)
    of_rows = is_row_loss(loss) or is_transport_loss(loss)
    if isinstance(loss, type) or not (callable(loss) or of_rows):
        found = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a row loss or a callable (logits, target) -> loss, got {found}")
    if not of_rows and label_smoothing is not None:
        raise ValueError("label_smoothing belongs to row losses; a callable of logits must smooth by itself")
    own = float(getattr(loss, "label_smoothing", 0.0)) if of_rows else 0.0
    smoothing = own if label_smoothing is None else label_smoothing
    check_real("label_smoothing", smoothing, low=0.0, high=1.0)
    check_real("logit_scale", logit_scale, low=0.0, low_open=True)
    if softcap is not None:
        check_real("softcap", softcap, low=0.0, low_open=True)
    check_reduction(reduction, normalizer)
    check_chunk(chunk_size, memory_budget)
    if isinstance(target_shift, Tensor):
        check_row_values("target_shift", target_shift, target)
    elif target_shift is not None:
        check_real("target_shift", target_shift)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    count, classes = target.numel(), linear_weight.shape[0]
    if is_transport_loss(loss):
        loss.ground_cost.check(classes, target.device)
    keep = check_range(target, classes, ignore_index, check=check).reshape(-1)
    dtype = product_dtype(input, linear_weight, torch.is_autocast_enabled(input.device.type))
    row_dtype = torch.float32 if is_low_precision(dtype) else dtype
    weight = row_weight(keep, reduction, normalizer, row_dtype)
    if token_weight is not None:
        # Not a product: what stands in an ignored row is nobody's business, and may be NaN.
        weight = torch.where(keep, weight * token_weight.reshape(-1).to(weight.dtype), weight)
    shift = None
    if isinstance(target_shift, Tensor):
        shift = target_shift.reshape(-1).to(row_dtype)
    elif target_shift:
        shift = torch.full((count,), float(target_shift), dtype=row_dtype, device=input.device)
    # Asked here because a forward without context cannot; a transform that knows better recomputes in the backward.
    grad = torch.is_grad_enabled()
    needs = tuple(
        grad and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, linear_bias)
    )
    tensors = (
        input.reshape(count, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1).masked_fill(~keep, 0),
        keep,
        weight,
        shift,
    )
    if of_rows and compiles():
        options = (chunk_size, memory_budget, dtype, float(smoothing), float(logit_scale), softcap, return_stats)
        value, nll, correct, cost = CompiledHead(tensors, needs, options).loss(loss, reduced=reduction != "none")
    else:
        per_logit = bytes_of_logit(loss, dtype)
        plan = Plan(
            loss,
            rows_per_chunk(chunk_size, memory_budget, count, input.shape[-1], classes, per_logit),
            dtype,
            float(smoothing),
            float(logit_scale),
            softcap,
            return_stats,
        )
        apply = outside(LinearLoss.apply, _OUTSIDE)
        value, nll, correct, cost = apply(*tensors, plan, None if reduction == "none" else Prepared(needs))
    value = value.view(target.shape) if reduction == "none" else value
    if not return_stats:
        return value
    stats = LinearStats(
        nll.view(target.shape),
        torch.exp(-nll).masked_fill(~keep, 0.0).view(target.shape),
        correct.view(target.shape),
        cost.view(target.shape) if is_transport_loss(loss) else None,
    )
    return value, stats


def check_head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> None:
    """Raise unless the hidden states, the head and the targets fit each other."""
    check_targets("input", input, target)
    check_floating("linear_weight", linear_weight)
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        # By its name: importing distributed tensors takes longer than the check is worth.
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a sharded DTensor; compute the loss inside the forward of the module that FSDP2 shards, "
                "where its weights are whole"
            )
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


def product_dtype(input: Tensor, linear_weight: Tensor, autocast: bool) -> torch.dtype:
    """Dtype of the matrix products."""
    if autocast and input.device.type != "cpu":
        return torch.get_autocast_dtype(input.device.type)
    dtype = torch.promote_types(input.dtype, linear_weight.dtype)
    # Half products on the CPU are emulated and many times slower.
    return torch.float32 if input.device.type == "cpu" and is_low_precision(dtype) else dtype
