r"""Relatives of TaiLr that interpolate between cross entropy and one minus the probability of the label.

Source: Zhang and Sabuncu (2018), arXiv 1805.07836; Zhang et al. (2023), "MixCE", arXiv 2305.16958.

Shape letters: `V` classes; `...` batch axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._common.checks import check_real
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._row_loss import Parts, RowLoss, register_parts
from danlu.losses._targets import check_range, check_row_values, check_targets, negative_log_likelihood

__all__ = ["GeneralizedCE", "MixCE", "generalized_cross_entropy", "mixce_loss"]


@dataclass(frozen=True)
class GeneralizedCE:
    r"""Generalized cross entropy as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $$\varphi(\ell) = \frac{1 - p^q}{q}, \qquad \varphi'(\ell) = p^q, \qquad p = e^{-\ell}$$

    Args:
        q: $q \in [0, 1]$; 0 is cross entropy, 1 is $1 - p$.
        label_smoothing: $\varepsilon \in [0, 1]$.

    Raises:
        ValueError: an option is out of its range.

    Numerics:
        From $\ell$ by `expm1`, so that small $q$ and confident rows keep their digits.

    Source:
        Zhang and Sabuncu (2018), arXiv 1805.07836.

    Example:
        >>> import torch
        >>> from danlu.losses import GeneralizedCE
        >>> GeneralizedCE(q=0.5).value_and_derivative(torch.tensor([1.0, 2.0]))
        (tensor([0.7869, 1.2642]), tensor([0.6065, 0.3679]))
    """

    q: float = 0.7
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_real("q", self.q, low=0.0, high=1.0)
        check_real("label_smoothing", self.label_smoothing, low=0.0, high=1.0)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and $\varphi'(\ell)$."""
        if self.q == 0.0:
            return nll, torch.ones_like(nll)
        return -torch.expm1(-self.q * nll) / self.q, torch.exp(-self.q * nll)


register_parts(
    GeneralizedCE,
    "generalized_ce",
    lambda loss: Parts("generalized_ce", (loss.q,)),
    lambda parts: GeneralizedCE(*parts.numbers),
)


@dataclass(frozen=True)
class MixCE:
    r"""MixCE, the linear mixture of cross entropy and $1 - p$, as a row loss for `linear_loss`.

    Definition:
        $$\varphi(\ell) = \eta\,\ell + (1-\eta)(1-p), \qquad \varphi'(\ell) = \eta + (1-\eta)\,p, \qquad p = e^{-\ell}$$

    Args:
        eta: $\eta \in [0, 1]$; 1 is cross entropy, 0 is $1 - p$.
        label_smoothing: $\varepsilon \in [0, 1]$.

    Raises:
        ValueError: an option is out of its range.

    Numerics:
        From $\ell$ by `expm1`.

    Differences:
        The paper writes $(\eta + (1-\eta)\,p)\,\ell$ with the bracket as a constant; this is the function with that
        gradient.

    Source:
        Zhang et al. (2023), arXiv 2305.16958.

    Example:
        >>> import torch
        >>> from danlu.losses import MixCE
        >>> MixCE(eta=0.5).value_and_derivative(torch.tensor([0.0, 2.0]))
        (tensor([0.0000, 1.4323]), tensor([1.0000, 0.5677]))
    """

    eta: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_real("eta", self.eta, low=0.0, high=1.0)
        check_real("label_smoothing", self.label_smoothing, low=0.0, high=1.0)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and $\varphi'(\ell)$."""
        # Without the part that counts nothing, which an infinite loss would turn into NaN.
        cross_entropy = self.eta * nll if self.eta else torch.zeros_like(nll)
        value = cross_entropy - (1 - self.eta) * torch.expm1(-nll)
        return value, self.eta + (1 - self.eta) * torch.exp(-nll)


register_parts(MixCE, "mixce", lambda loss: Parts("mixce", (loss.eta,)), lambda parts: MixCE(*parts.numbers))


def generalized_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""Generalized cross entropy, between cross entropy (`q=0`) and one minus the probability of the label (`q=1`).

    Definition:
        $$L = \frac{1 - p_t^q}{q}, \qquad \frac{\partial L}{\partial \ell} = p_t^q, \qquad \ell = -\log p_t$$
        a geometric interpolation of the weights, where TaiLr's is harmonic. With $\varepsilon$ = `label_smoothing` the
        loss is $(1-\varepsilon) L + \tfrac{\varepsilon}{V} \sum_v -\log p_v$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        q: $q \in [0, 1]$; 0.7 in the paper.
        label_smoothing: $\varepsilon \in [0, 1]$.
        token_weight: weight of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored gives
        0 with zero gradient.

    Raises:
        TypeError: `input` is not floating or `target` not int64.
        ValueError: shapes or devices do not fit, an option is out of its range, or, on the CPU, a target is not a
            class.

    Numerics:
        Half inputs are computed in float32. NaN stays within its row, and an ignored row gets exactly zero gradient.

    Source:
        Zhang and Sabuncu (2018), "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        arXiv 1805.07836.

    Example:
        >>> import torch
        >>> from danlu.losses import generalized_cross_entropy
        >>> generalized_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]), q=0.5)
        tensor(1.)
    """
    return _of_logits(
        input, target, GeneralizedCE(q, label_smoothing), token_weight, ignore_index, reduction, normalizer, check
    )


def mixce_loss(
    input: Tensor,
    target: Tensor,
    *,
    eta: float = 0.5,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""MixCE: a linear mixture of cross entropy (`eta=1`) and one minus the probability of the label (`eta=0`).

    Definition:
        $$L = \eta\,\ell + (1-\eta)(1-p_t), \qquad \frac{\partial L}{\partial \ell} = \eta + (1-\eta)\,p_t, \qquad
        \ell = -\log p_t$$
        With $\varepsilon$ = `label_smoothing` the loss is
        $(1-\varepsilon) L + \tfrac{\varepsilon}{V} \sum_v -\log p_v$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        eta: $\eta \in [0, 1]$.
        label_smoothing: $\varepsilon \in [0, 1]$.
        token_weight: weight of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored gives
        0 with zero gradient.

    Raises:
        TypeError: `input` is not floating or `target` not int64.
        ValueError: shapes or devices do not fit, an option is out of its range, or, on the CPU, a target is not a
            class.

    Numerics:
        Half inputs are computed in float32. NaN stays within its row, and an ignored row gets exactly zero gradient.

    Differences:
        The paper writes $(\eta + (1-\eta)\,p_t)\,\ell$ with the bracket as a constant; this is the function with that
        gradient, so its value goes down when the model learns.

    Source:
        Zhang et al. (2023), "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse
        Cross-Entropies", arXiv 2305.16958.

    Example:
        >>> import torch
        >>> from danlu.losses import mixce_loss
        >>> mixce_loss(torch.zeros(2, 4), torch.tensor([0, 3]), eta=0.0)
        tensor(0.7500)
    """
    return _of_logits(
        input, target, MixCE(eta, label_smoothing), token_weight, ignore_index, reduction, normalizer, check
    )


def _of_logits(
    input: Tensor,
    target: Tensor,
    loss: RowLoss,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    normalizer: float | Tensor | None,
    check: bool,
) -> Tensor:
    """A row loss of logits."""
    check_targets("input", input, target)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    keep = check_range(target, input.shape[-1], ignore_index, check=check)
    nll, uniform = negative_log_likelihood(input, target, keep, loss.label_smoothing)
    row = loss.value_and_derivative(nll)[0]
    if uniform is not None:
        row = (1 - loss.label_smoothing) * row + loss.label_smoothing * uniform
    if token_weight is not None:
        row = row * token_weight.to(row.dtype)
    return reduce_loss(row.masked_fill(~keep, 0.0), keep, reduction, normalizer)
