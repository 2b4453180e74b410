r"""Fenchel-Young losses of sparsemax and entmax: what cross entropy is to softmax.

Source: Blondel, Martins and Niculae (2019), "Learning Classifiers with Fenchel-Young Losses", arXiv 1805.09717 and
1901.02324; Peters, Niculae and Martins (2019), arXiv 1905.05702.

Shape letters: `V` classes; `...` batch axes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from danlu._common.checks import check_real
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._targets import (
    check_range,
    check_row_values,
    check_targets,
    negative_log_likelihood,
    scores_of_kept_rows,
)
from danlu.simplex import entmax

__all__ = ["EntmaxLoss", "SparsemaxLoss", "entmax_loss", "sparsemax_loss"]


def entmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.5,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""The loss whose gradient is entmax less one-hot; it is exactly 0 once the target leads by a margin.

    Definition:
        $$L_t(x) = \langle p, x\rangle + H_\alpha(p) - x_t, \qquad H_\alpha(p) = \frac{1-\sum_i p_i^\alpha}
        {\alpha(\alpha-1)}, \qquad \nabla L_t = p - e_t, \qquad p = \operatorname{entmax}_\alpha(x)$$
        with $x$ = `input` and $t$ = `target`. $L \ge 0$, and $L = 0$ if and only if
        $x_t - \max_{j \ne t} x_j \ge 1/(\alpha-1)$. $\alpha = 1$ is cross entropy.

    Args:
        input: logits, shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        alpha: $\alpha \ge 1$.
        token_weight: multiplies the loss of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored gives 0
        with zero gradient.

    Raises:
        TypeError: `input` or `token_weight` is not floating, `target` not int64, or `alpha` not a number.
        ValueError: shapes or devices do not fit, an option is out of its range, `token_weight` requires a gradient, or,
            on the CPU, a target is not a class.

    Numerics:
        Half inputs are computed in float32, and differences to $x_t$ are summed, not values. A logit of $-\infty$ is a
        mask; as a target it gives an infinite loss. A row of $-\infty$ alone gives NaN. NaN stays within its row, and
        an ignored row gets exactly zero gradient whatever it holds.

    Cost:
        One entmax; only its result is kept for the backward, which is one pass. Second derivatives are right: they are
        those of entmax. Forward-mode derivatives raise: take `torch.func.grad`.

    Differences:
        The article's generic surrogate $\langle p - e_t, \operatorname{sg}(x)\rangle$ does not have the gradient
        $p - e_t$; $\langle\operatorname{sg}(p - e_t), x\rangle$ does, but its value is not a loss. This is the loss
        itself. The package `entmax` fails on ignored rows and on logits of $-\infty$, and takes two axes only.

    Source:
        arXiv 1901.02324; 1905.05702, section 3; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14).

    Example:
        >>> import torch
        >>> from danlu.losses import entmax_loss
        >>> logits = torch.tensor([[0.5, 1.0, 1.4, -0.3], [0.0, 3.0, 1.0, 0.0]])
        >>> entmax_loss(logits, torch.tensor([1, 1]), reduction="none")
        tensor([0.6429, 0.0000])
    """
    check_targets("input", input, target)
    check_real("alpha", alpha, low=1.0)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    keep = check_range(target, input.shape[-1], ignore_index, check=check)
    if alpha == 1.0:
        rows = negative_log_likelihood(input, target, keep, 0.0)[0]
    else:
        scores = scores_of_kept_rows(input, keep)
        rows = _FenchelYoung.apply(scores, entmax(scores, alpha), target.masked_fill(~keep, 0), float(alpha))
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    return reduce_loss(rows.masked_fill(~keep, 0.0), keep, reduction, normalizer)


def sparsemax_loss(
    input: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""The loss whose gradient is sparsemax less one-hot; it is exactly 0 once the target leads by 1.

    Definition:
        $$L_t(x) = \tfrac12 - x_t + \tfrac12\sum_{i \in \Omega} (x_i^2 - \lambda^2), \qquad
        \nabla L_t = p - e_t, \qquad p = \operatorname{sparsemax}(x) = [x - \lambda]_+$$
        with $x$ = `input`, $t$ = `target` and $\Omega$ the support of $p$; it is
        [`entmax_loss`][danlu.losses.entmax_loss] with $\alpha = 2$.

    Args:
        input: logits, shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        token_weight: as in [`entmax_loss`][danlu.losses.entmax_loss].
        ignore_index: as there.
        reduction: as there.
        normalizer: as there.
        check: as there.

    Returns:
        A scalar, or shape `(...)` with "none".

    Raises:
        TypeError: as in [`entmax_loss`][danlu.losses.entmax_loss].
        ValueError: as there.

    Numerics:
        As there.

    Source:
        Martins and Astudillo (2016), arXiv 1602.02068, section 3.2.

    Example:
        >>> import torch
        >>> from danlu.losses import sparsemax_loss
        >>> sparsemax_loss(torch.tensor([0.5, 1.0, 1.4, -0.3]), torch.tensor(1))
        tensor(0.4900)
    """
    return entmax_loss(
        input,
        target,
        alpha=2.0,
        token_weight=token_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        check=check,
    )


class _FenchelYoung(torch.autograd.Function):
    """The loss of every row from the scores and their probabilities.

    By the optimality of the probabilities the derivative through them is 0, so the first backward ends here; the second
    goes on through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, p: Tensor, target: Tensor, alpha: float) -> Tensor:  # pyrefly: ignore[bad-override]
        chosen = scores.gather(-1, target[..., None])
        # A masked score has probability 0, and their product is 0.
        linear = (p * (scores - chosen)).masked_fill(p == 0, 0.0).sum(-1)
        # A row without a score has no loss: 0 times its infinite maximum.
        undefined = scores.amax(-1) * 0.0
        return (linear + _entropy(p, alpha)).clamp(min=0.0) + undefined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        p, target = ctx.saved_tensors
        upstream = grad_outputs[0][..., None]
        return (p * upstream).scatter_add(-1, target[..., None], -upstream), None, None, None


def _entropy(p: Tensor, alpha: float) -> Tensor:
    r"""$H_\alpha$, also close to $\alpha = 1$, where the written form cancels."""
    if alpha == 2.0:
        return (1.0 - p.square().sum(-1)) / 2.0
    if alpha == 1.5:
        return (1.0 - (p * p.sqrt()).sum(-1)) / 0.75
    inside = p.masked_fill(p == 0, 1.0)
    return -(p * torch.expm1((alpha - 1.0) * inside.log())).sum(-1) / (alpha * (alpha - 1.0))


class EntmaxLoss(nn.Module):
    r"""Module form of [`entmax_loss`][danlu.losses.entmax_loss].

    Definition:
        `forward(input, target) = entmax_loss(input, target, alpha=self.alpha, ...)`.

    Args:
        alpha: $\alpha \ge 1$.
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss; `normalizer` replaces the denominator of "mean".

    Raises:
        ValueError: an option is out of its range, at construction.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.losses import EntmaxLoss
        >>> EntmaxLoss(1.5)(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.6667)
    """

    def __init__(self, alpha: float = 1.5, *, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.alpha = check_real("alpha", alpha, low=1.0)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the loss."""
        return entmax_loss(
            input,
            target,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SparsemaxLoss(nn.Module):
    r"""Module form of [`sparsemax_loss`][danlu.losses.sparsemax_loss].

    Definition:
        `forward(input, target) = sparsemax_loss(input, target, ...)`.

    Args:
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss; `normalizer` replaces the denominator of "mean".

    Raises:
        ValueError: an option is out of its range, at construction.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.losses import SparsemaxLoss
        >>> SparsemaxLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.3750)
    """

    def __init__(self, *, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the loss."""
        return sparsemax_loss(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction, normalizer=normalizer
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
