r"""Margin softmax: cross entropy of scaled cosines whose target is made harder by a margin.

Source: Wang et al. (2018), "CosFace", arXiv 1801.09414, and "Additive Margin Softmax", arXiv 1801.05599; Deng et al.
(2019), "ArcFace", arXiv 1801.07698.

Shape letters: `V` classes; `D` features; `...` batch axes.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._common.checks import check_choice, check_floating, check_real, is_low_precision
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._linear import linear_loss
from danlu.losses._row_loss import CrossEntropy
from danlu.losses._targets import check_range, check_row_values, check_targets, scores_of_kept_rows

__all__ = ["MarginSoftmaxLoss", "linear_margin_softmax_loss", "margin_softmax_loss"]

Kind = Literal["cosface", "arcface"]
_MARGINS = {"cosface": 0.35, "arcface": 0.5}
# The scale 30 of the papers.
_TEMPERATURE = 1.0 / 30.0
# The derivative of arccos is infinite at the ends.
_LEAST_SINE = 1e-7


def margin_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    kind: Kind = "cosface",
    margin: float | None = None,
    temperature: float = _TEMPERATURE,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""Cross entropy of cosines, with a margin by which the target must lead.

    Definition:
        $$L = -\log \frac{e^{\psi(c_t)/\tau}}{e^{\psi(c_t)/\tau} + \sum_{j \ne t} e^{c_j/\tau}}, \qquad
        \psi_{\text{cosface}}(c) = c - m, \qquad
        \psi_{\text{arcface}}(c) = \cos(\arccos c + m)\ \text{if}\ c \ge -\cos m,\ \text{else}\ c - m \sin m$$
        with $c$ = `input`, $t$ = `target`, $m$ = `margin` and $\tau$ = `temperature`. The second branch continues
        ArcFace monotonically where $\arccos c + m > \pi$.

    Args:
        input: cosines of features and class vectors, shape `(..., V)`, floating; see
            [`linear_margin_softmax_loss`][danlu.losses.linear_margin_softmax_loss] for features and vectors.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        kind: "cosface" (also called AM-softmax) or "arcface".
        margin: $m$, a cosine in $[0, 2]$ for CosFace, an angle (radians) in $[0, \pi/2]$ for ArcFace; None is 0.35 or
            0.5.
        temperature: $\tau > 0$; the papers' scale is its inverse.
        token_weight: multiplies the loss of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean".
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored
        gives 0 with zero gradient.

    Raises:
        TypeError: `input` or `token_weight` is not floating, or `target` not int64.
        ValueError: shapes or devices do not fit, an option is out of its range, `token_weight` requires a gradient, or,
            on the CPU, a target is not a class.

    Numerics:
        Half inputs are computed in float32. The sine is $\sqrt{(1-c)(1+c)}$, at least 1e-7, also for cosines that are
        rounded beyond 1. NaN stays within its row, and an ignored row gets exactly zero gradient whatever it holds.

    Source:
        arXiv 1801.05599, 1801.09414, 1801.07698; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14).

    Example:
        >>> import torch
        >>> from danlu.losses import margin_softmax_loss
        >>> cosines = torch.tensor([[0.9, 0.1, -0.2]])
        >>> margin_softmax_loss(cosines, torch.tensor([0]), temperature=0.5)
        tensor(0.4884)
    """
    check_targets("input", input, target)
    chosen = _check_options(kind, margin, temperature)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    keep = check_range(target, input.shape[-1], ignore_index, check=check)
    rows = _rows(scores_of_kept_rows(input, keep), target.masked_fill(~keep, 0), kind, chosen, temperature)
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    return reduce_loss(rows.masked_fill(~keep, 0.0), keep, reduction, normalizer)


def linear_margin_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    kind: Kind = "cosface",
    margin: float | None = None,
    temperature: float = _TEMPERATURE,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    check: bool = False,
) -> Tensor:
    r"""Margin softmax of features and class vectors, without ever holding the cosines of all rows.

    Definition:
        [`margin_softmax_loss`][danlu.losses.margin_softmax_loss] of
        $$c_{nj} = \frac{\langle z_n, w_j\rangle}{\lVert z_n\rVert\,\lVert w_j\rVert}$$
        with $z$ = `input` and $w$ = `linear_weight`, in chunks of rows by
        [`linear_loss`][danlu.losses.linear_loss].

    Args:
        input: features $z$, shape `(..., D)`, floating.
        linear_weight: one vector for every class, shape `(V, D)`.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        kind: as in [`margin_softmax_loss`][danlu.losses.margin_softmax_loss].
        margin: as there.
        temperature: as there.
        token_weight: as there.
        ignore_index: as there.
        reduction: as there.
        normalizer: as there.
        chunk_size: rows per chunk, as in [`linear_loss`][danlu.losses.linear_loss].
        check: as there.

    Returns:
        A scalar (nats), or shape `(...)` with "none".

    Raises:
        TypeError: as in [`linear_loss`][danlu.losses.linear_loss].
        ValueError: as there, or an option is out of its range.
        RuntimeError: from a second derivative, which is not supported.

    Numerics:
        Norms and products are float32 for half inputs. A feature or vector of norm 0 has cosine 0 with everything.

    Cost:
        That of [`linear_loss`][danlu.losses.linear_loss], and a copy of both inputs of norm 1. CosFace is its cross
        entropy; ArcFace is differentiated chunk by chunk.

    Source:
        As in [`margin_softmax_loss`][danlu.losses.margin_softmax_loss].

    Example:
        >>> import torch
        >>> from danlu.losses import linear_margin_softmax_loss
        >>> features, vectors = torch.eye(3), 2 * torch.eye(3)
        >>> linear_margin_softmax_loss(features, vectors, torch.arange(3), temperature=0.5)
        tensor(0.4351)
    """
    check_targets("input", input, target)
    check_floating("linear_weight", linear_weight)
    chosen = _check_options(kind, margin, temperature)
    keep = check_range(target, linear_weight.shape[0], ignore_index, check=check)

    vectors = linear_weight.float() if is_low_precision(linear_weight.dtype) else linear_weight
    features, vectors = F.normalize(scores_of_kept_rows(input, keep), dim=-1), F.normalize(vectors, dim=-1)
    run = partial(
        linear_loss,
        features,
        vectors,
        target,
        token_weight=token_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        chunk_size=chunk_size,
    )
    if kind == "cosface":
        # The margin is a constant, so this is cross entropy of shifted logits.
        return run(CrossEntropy(), logit_scale=1.0 / temperature, target_shift=chosen / temperature)
    return run(lambda cosines, classes: _rows(cosines, classes, kind, chosen, temperature))


def _rows(cosines: Tensor, target: Tensor, kind: str, margin: float, temperature: float) -> Tensor:
    at = target[..., None]
    c = cosines.gather(-1, at)
    if kind == "cosface":
        harder = c - margin
    else:
        sine = ((1 - c) * (1 + c)).clamp(min=_LEAST_SINE**2).sqrt()
        turned = c * math.cos(margin) - sine * math.sin(margin)
        harder = torch.where(c >= -math.cos(margin), turned, c - margin * math.sin(margin))
    logits = cosines.scatter(-1, at, harder) / temperature
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.flatten(), reduction="none").view(target.shape)


def _check_options(kind: str, margin: float | None, temperature: float) -> float:
    check_choice("kind", kind, ("cosface", "arcface"))
    check_real("temperature", temperature, low=0.0, low_open=True)
    if margin is None:
        return _MARGINS[kind]
    return check_real("margin", margin, low=0.0, high=2.0 if kind == "cosface" else math.pi / 2)


class MarginSoftmaxLoss(nn.Module):
    r"""Margin softmax with class vectors of its own: the last layer of a network that learns embeddings.

    Definition:
        `forward(input, target) = linear_margin_softmax_loss(input, self.weight, target, ...)`.

    Args:
        num_features: `D`.
        num_classes: `V`.
        kind: "cosface" or "arcface".
        margin: None is 0.35 or 0.5.
        temperature: $\tau > 0$.
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss (nats); `normalizer` replaces the denominator of "mean".

    Raises:
        ValueError: an option is out of its range, at construction.

    Numerics:
        As in [`linear_margin_softmax_loss`][danlu.losses.linear_margin_softmax_loss].

    Source:
        As in [`margin_softmax_loss`][danlu.losses.margin_softmax_loss].

    Example:
        >>> import torch
        >>> from danlu.losses import MarginSoftmaxLoss
        >>> loss = MarginSoftmaxLoss(8, 5, kind="arcface")
        >>> loss(torch.randn(3, 8), torch.tensor([0, 4, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        kind: Kind = "cosface",
        margin: float | None = None,
        temperature: float = _TEMPERATURE,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.margin = _check_options(kind, margin, temperature)
        self.kind: Kind = kind
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        # Only directions count.
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the loss."""
        return linear_margin_softmax_loss(
            input,
            self.weight,
            target,
            kind=self.kind,
            margin=self.margin,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        classes, features = self.weight.shape
        return (
            f"num_features={features}, num_classes={classes}, kind={self.kind!r}, margin={self.margin}, "
            f"temperature={self.temperature:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
