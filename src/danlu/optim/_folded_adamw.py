r"""One micro-step of AdamW with accumulation folded into its moments, on lists of tensors.

Source: "隐藏在动量中的梯度累积：少更新几步，效果反而更好？" (2021-08-24).

Shape letters: `...` any shape, the same for a parameter, its gradient and its moments.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real
from danlu.optim._nonfinite import finite_flags
from danlu.optim._options import check_betas, check_lengths, check_lr, checked_rate
from danlu.optim._rounding import Rounding, Writer, read, write

__all__ = ["check_numbers", "folded_adamw"]

_DEFAULT_ROUNDING = Rounding()


def folded_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    share: float = 1.0,
    folded: Sequence[bool] | None = None,
    update: bool = True,
    nonfinite: Literal["skip", "off"] = "skip",
    nonfinite_counts: Sequence[Tensor] | None = None,
    rounding: Rounding = _DEFAULT_ROUNDING,
    foreach: bool | None = None,
    maximize: bool = False,
) -> None:
    r"""One micro-step of [`FoldedAdamW`][danlu.optim.FoldedAdamW] on lists of tensors, in place. Approximate.

    Definition:
        $m \leftarrow b_1 m + (1-\beta_1)\,c\,g$ and $v \leftarrow b_2 v + (1-\beta_2)\,c\,g^2$ with $c$ = `share` and
        $b_i = 1$ where `folded`, else $\beta_i$; then, if `update`, the step of AdamW.

    Args:
        params: $\theta$, each of its own shape `(...)`; changed in place.
        grads: $g$, shapes of `params`; only read. None: nothing is folded in.
        exp_avgs: $m$, shapes of `params`; changed in place.
        exp_avg_sqs: $v$, shapes of `params`; changed in place.
        steps: cycles begun so far, one 0-d floating-point tensor per parameter, on its device; changed in place.
        lr: $\eta$.
        betas: $(\beta_1, \beta_2)$.
        eps: $\epsilon$.
        weight_decay: $\lambda$.
        share: weight of these gradients in their cycle, $1/k$ for an average.
        folded: whether the moments were already decayed in this cycle; None means no.
        update: whether this is the last micro-step of the cycle.
        nonfinite: as in the class.
        nonfinite_counts: one 0-d integer tensor per parameter, on its device, to which 1 is added when its gradient is
            not finite and `nonfinite="skip"`; None counts nothing.
        rounding: how results are rounded into float16 and bfloat16 parameters.
        foreach: as in the class.
        maximize: as in the class.

    Returns:
        None; the lists hold the result.

    Raises:
        ValueError: the lists differ in length, or an option is out of its range.

    Numerics:
        As in the class.

    Source:
        As in the class.

    Example:
        >>> import torch
        >>> from danlu.optim import folded_adamw
        >>> w, m, v, n = torch.ones(2), torch.zeros(2), torch.zeros(2), torch.zeros(())
        >>> folded_adamw([w], [torch.tensor([0.3, -2.0])], [m], [v], [n], lr=0.1, weight_decay=0.0)
        >>> w
        tensor([0.9000, 1.1000])
    """
    check_real("share", share, low=0.0)
    check_choice("nonfinite", nonfinite, ("skip", "off"))
    check_numbers(lr, betas, eps, weight_decay)
    already = list(folded) if folded is not None else [False] * len(params)
    check_lengths(
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "steps": steps,
            "folded": already,
            "nonfinite_counts": nonfinite_counts,
        }
    )
    rate = checked_rate(lr)
    call = _Call(
        betas=betas,
        eps=eps,
        share=share,
        update=update,
        guard=nonfinite == "skip",
        lr=-rate if maximize else rate,
        # Climbing is descending with -lr, except that the decay still pulls towards 0.
        weight_decay=-weight_decay if maximize else weight_decay,
    )
    counts = nonfinite_counts if nonfinite_counts is not None else [torch.zeros_like(n) for n in steps]
    buckets: dict[object, list[int]] = {}
    with torch.no_grad():
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if param.numel() == 0:
                continue
            many = foreach if foreach is not None else param.device.type != "cpu"
            plain = type(param) in (Tensor, torch.nn.Parameter) and (grad is None or type(grad) is Tensor)
            if many and plain:
                key = param.device, param.dtype, None if grad is None else grad.dtype, already[i]
                buckets.setdefault(key, []).append(i)
            else:
                writer = rounding.of(i, param.dtype)
                call.one(param, grad, exp_avgs[i], exp_avg_sqs[i], steps[i], counts[i], already[i], writer)
        for indices in buckets.values():
            columns = (params, exp_avgs, exp_avg_sqs, steps, counts)
            picked = ([column[i] for i in indices] for column in columns)
            gradients = [grad for i in indices if (grad := grads[i]) is not None]
            writers = [rounding.of(i, params[i].dtype) for i in indices]
            call.many(gradients, *picked, folded=already[indices[0]], writers=writers)


class _Call:
    """The numbers of one micro-step, and the step on one tensor or on many of one kind."""

    def __init__(
        self,
        *,
        betas: tuple[float, float],
        eps: float,
        share: float,
        update: bool,
        guard: bool,
        lr: float,
        weight_decay: float,
    ) -> None:
        self.betas, self.eps, self.share, self.update, self.guard = betas, eps, share, update, guard
        self.lr, self.weight_decay = lr, weight_decay

    def one(
        self,
        param: Tensor,
        grad: Tensor | None,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        count: Tensor,
        folded: bool,
        writer: Writer | None,
    ) -> None:
        """The definition with plain operations, without reading a value back: the oracle of `many`."""
        finite = None
        if grad is not None:
            grad = grad.to(exp_avg.dtype)
            mean, square = grad * ((1 - self.betas[0]) * self.share), grad * grad * ((1 - self.betas[1]) * self.share)
            mean = exp_avg * (1.0 if folded else self.betas[0]) + mean
            square = exp_avg_sq * (1.0 if folded else self.betas[1]) + square
            if self.guard:
                finite = torch.isfinite(grad).all()
                count.add_(~finite)
                mean, square = torch.where(finite, mean, exp_avg), torch.where(finite, square, exp_avg_sq)
            exp_avg.copy_(mean)
            exp_avg_sq.copy_(square)
            if not folded:
                step.add_(1 if finite is None else finite)
        if self.update:
            theta = read(param, writer).to(exp_avg.dtype)
            # A cycle that began with a bad gradient is not counted; the first one is, lest it divide by zero.
            cycles = step.clamp(min=1).to(exp_avg.dtype)
            denominator = (exp_avg_sq / (1 - self.betas[1] ** cycles)).sqrt() + self.eps
            moved = theta * (1 - self.lr * self.weight_decay)
            moved = moved - exp_avg / (1 - self.betas[0] ** cycles) / denominator * self.lr
            write(param, moved if finite is None else torch.where(finite, moved, theta), writer)

    def many(
        self,
        grads: list[Tensor],
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        counts: list[Tensor],
        *,
        folded: bool,
        writers: list[Writer | None],
    ) -> None:
        """The same on tensors of one dtype and device, either all or none with a gradient."""
        dtype = exp_avgs[0].dtype
        finite: list[Tensor] | None = None
        if grads:
            grads = [grad.to(dtype) for grad in grads]
            if self.guard:
                finite = list(finite_flags(grads).unbind())
                torch._foreach_add_(counts, [(~flag).to(counts[0].dtype) for flag in finite])
            for moments, beta, powers in ((exp_avgs, self.betas[0], 1), (exp_avg_sqs, self.betas[1], 2)):
                added = torch._foreach_mul(grads, grads) if powers == 2 else grads
                added = torch._foreach_mul(added, (1 - beta) * self.share)
                new = torch._foreach_add(torch._foreach_mul(moments, 1.0 if folded else beta), added)
                if finite is not None:
                    new = [torch.where(f, n, m) for f, n, m in zip(finite, new, moments, strict=True)]
                torch._foreach_copy_(moments, new)
            if not folded and finite is not None:
                torch._foreach_add_(steps, [flag.to(steps[0].dtype) for flag in finite])
            elif not folded:
                torch._foreach_add_(steps, 1)
        if self.update:
            thetas = [read(param, writer).to(dtype) for param, writer in zip(params, writers, strict=True)]
            cycles = [step.clamp(min=1).to(dtype) for step in steps]
            first, second = ([1 - beta**cycle for cycle in cycles] for beta in self.betas)
            denominators = torch._foreach_sqrt(torch._foreach_div(exp_avg_sqs, second))
            torch._foreach_add_(denominators, self.eps)
            directions = torch._foreach_div(torch._foreach_div(exp_avgs, first), denominators)
            moved = torch._foreach_mul(thetas, 1 - self.lr * self.weight_decay)
            torch._foreach_sub_(moved, torch._foreach_mul(directions, self.lr))
            if finite is not None:
                moved = [torch.where(f, new, old) for f, new, old in zip(finite, moved, thetas, strict=True)]
            if writers[0] is None:
                torch._foreach_copy_(params, moved)
            else:
                for param, value, writer in zip(params, moved, writers, strict=True):
                    write(param, value, writer)


def check_numbers(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise unless all are in their ranges."""
    check_lr(lr)
    check_betas(betas)
    check_real("eps", eps, low=0.0)
    check_real("weight_decay", weight_decay, low=0.0)
