r"""The negative log-likelihood of a set of labels among all sets of its size.

Source: "Softmax后传:寻找Top-K的光滑近似" (2024-09-19), section on the gradient form.

Shape letters: `V` classes; `...` batch axes.
"""

import torch
from torch import Tensor

from danlu._common.checks import check_bool, check_floating, check_same_device, is_low_precision
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.simplex import log_esp

__all__ = ["topk_multilabel_loss"]


def topk_multilabel_loss(input: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Cross entropy of a set of labels against all sets with as many: softmax cross entropy for one label.

    Definition:
        $$L = \log \sum_{|S| = |T|} e^{\sum_{i \in S} x_i} - \sum_{i \in T} x_i$$
        with $x$ = `input` and $T$ the classes where `target` is True. Its gradient is
        [`soft_topk`][danlu.simplex.soft_topk]`(x, |T|, method="grad")` minus the indicator of $T$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: bool, shape of `input`, True = label; their number may differ between rows.
        reduction: "mean" over the rows, "sum", or "none" for one loss per row.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. Rows without
        labels, or with all of them, have loss 0.

    Raises:
        TypeError: `input` is not floating or `target` not bool.
        ValueError: shapes or devices differ, or an unknown `reduction`.

    Numerics:
        Computed in float64 and rounded once, so that a small loss keeps its digits. Otherwise as in
        [`log_esp`][danlu.simplex.log_esp]. A label at a logit of $-\infty$ gives an infinite loss.

    Source:
        The article; compare arXiv 2210.01941 for distributions over subsets.

    Example:
        >>> import torch
        >>> from danlu.losses import topk_multilabel_loss
        >>> topk_multilabel_loss(torch.zeros(1, 4), torch.tensor([[True, True, False, False]])).exp()
        tensor(6.)
    """
    check_floating("input", input)
    check_bool("target", target, "label")
    if input.ndim == 0 or target.shape != input.shape:
        raise ValueError(f"target must have the shape of input, {tuple(input.shape)}, got {tuple(target.shape)}")
    check_same_device(input=input, target=target)
    check_reduction(reduction, None)
    # Both are near k times the largest logit: in float32 nothing would be left of the difference of confident rows.
    x = input.to(torch.float64)
    rows = log_esp(x, target.sum(-1, keepdim=True)) - torch.where(target, x, 0.0).sum(-1)
    rows = rows.to(torch.float32 if is_low_precision(input.dtype) else input.dtype)
    return reduce_loss(rows, torch.ones_like(rows, dtype=torch.bool), reduction, None)
