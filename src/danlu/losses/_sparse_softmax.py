r"""The loss of sparse softmax: cross entropy against the largest logits only.

Source: Sun et al. (2021), "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation", arXiv 2112.12433.

Shape letters: `V` classes; `...` batch axes.
"""

from torch import Tensor, nn

from danlu._common.checks import check_integer
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._targets import check_range, check_row_values, check_targets, scores_of_kept_rows

__all__ = ["SparseSoftmaxLoss", "sparse_softmax_loss"]


def sparse_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    k: int = 10,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""Cross entropy whose denominator has the `k` largest logits only, for fine-tuning.

    Definition:
        $$L_t(x) = \log \sum_{i \in \Omega_k} e^{x_i} - x_t, \qquad \Omega_k = \{i : x_i \ge x_{(k)}\}, \qquad
        \nabla L_t = \operatorname{softmax}_{\Omega_k}(x) - e_t$$
        with $x$ = `input`, $t$ = `target` and $x_{(k)}$ the $k$-th largest logit. If $t \notin \Omega_k$ the value is
        at least $\log k$ and is not $-\log$ of a probability, but its gradient still raises $x_t$. $k = V$ is cross
        entropy.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        k: from 1 to `V`. The default is that of the paper's experiments.
        token_weight: multiplies the loss of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored
        gives 0 with zero gradient.

    Raises:
        TypeError: `input` or `token_weight` is not floating, `target` not int64, or `k` not an int.
        ValueError: shapes or devices do not fit, `k` is not in $[1, V]$, `token_weight` requires a gradient, or, on the
            CPU, a target is not a class.

    Numerics:
        Half inputs are computed in float32. Logits that tie with the $k$-th largest all belong to $\Omega_k$. A logit
        of $-\infty$ is a mask; as a target it gives an infinite loss. A row of $-\infty$ alone gives NaN. NaN stays
        within its row, and an ignored row gets exactly zero gradient whatever it holds.

    Cost:
        `torch.topk` and one masked softmax. Classes outside of $\Omega_k$ and $t$ get no gradient, which is why the
        loss is for models that are trained already.

    Source:
        arXiv 2112.12433, equation 5; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Sparse Softmax.

    Example:
        >>> import torch
        >>> from danlu.losses import sparse_softmax_loss
        >>> x = torch.tensor([0.5, 1.0, 1.4, -0.3])
        >>> sparse_softmax_loss(x.expand(2, 4), torch.tensor([2, 0]), k=2, reduction="none")
        tensor([0.5130, 1.4130])
    """
    check_targets("input", input, target)
    check_integer("k", k, low=1)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    keep = check_range(target, input.shape[-1], ignore_index, check=check)
    if k > input.shape[-1]:
        raise ValueError(f"k must be at most the number of classes, got {k} for {input.shape[-1]}")
    scores = scores_of_kept_rows(input, keep)
    fixed = scores.detach()
    smallest = fixed.topk(k, -1, sorted=True).values[..., -1:]
    # NaN is not below.
    total = scores.masked_fill(fixed < smallest, float("-inf")).logsumexp(-1)
    rows = total - scores.gather(-1, target.masked_fill(~keep, 0)[..., None])[..., 0]
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    return reduce_loss(rows.masked_fill(~keep, 0.0), keep, reduction, normalizer)


class SparseSoftmaxLoss(nn.Module):
    r"""Module form of [`sparse_softmax_loss`][danlu.losses.sparse_softmax_loss].

    Definition:
        `forward(input, target) = sparse_softmax_loss(input, target, k=self.k, ...)`.

    Args:
        k: from 1 to `V`.
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss (nats); `normalizer` replaces the denominator of "mean".

    Raises:
        ValueError: an option is out of its range, at construction.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.losses import SparseSoftmaxLoss
        >>> SparseSoftmaxLoss(k=2)(torch.tensor([[0.5, 1.0, 1.4, -0.3]]), torch.tensor([2]))
        tensor(0.5130)
    """

    def __init__(self, *, k: int = 10, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.k = check_integer("k", k, low=1)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the loss."""
        return sparse_softmax_loss(
            input, target, k=self.k, ignore_index=self.ignore_index, reduction=self.reduction, normalizer=normalizer
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return f"k={self.k}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
