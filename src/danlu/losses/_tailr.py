r"""TaiLr: cross entropy whose gradient fades where the model disagrees with the label.

Source: Ji et al. (2023), "Tailoring Language Generation Models under Total Variation Distance", arXiv 2302.13344;
"缓解交叉熵过度自信的一个简明方案" (2023-03-14).

Shape letters: `V` classes; `...` batch axes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from danlu._common.checks import check_choice, check_dim, check_floating, check_integer, check_real
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._linear import linear_loss
from danlu.losses._row_loss import Parts, register_parts
from danlu.losses._targets import check_range, check_row_values, check_targets, negative_log_likelihood

__all__ = ["TaiLr", "TaiLrLoss", "linear_tailr_loss", "tailr_loss", "tailr_unbias"]

TaiLrValue = Literal["potential", "weighted"]
# Up to here log-add-exp is exact, from here on log1p; both are exact to 1e-12 in between.
_SWITCH = 0.5


def tailr_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float | Tensor = 0.1,
    min_weight: float = 0.0,
    label_smoothing: float = 0.0,
    value: TaiLrValue = "potential",
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""TaiLr, between cross entropy (`gamma=0`) and one minus the probability of the label (`gamma=1`).

    Definition:
        With $p$ the probability of the target and $\ell = -\log p$,
        $$L_\gamma = -\frac{\log[\gamma + (1-\gamma)\,p]}{1-\gamma},\quad L_0 = \ell,\quad L_1 = 1 - p, \qquad
        \frac{\partial L_\gamma}{\partial \ell} = \alpha = \frac{p}{\gamma + (1-\gamma)\,p} \in (0, 1]$$
        With $b$ = `min_weight` the weight is $\max(b, \alpha)$ and the loss continues linearly in $\ell$ below
        $p^* = b\gamma / (1 - b(1-\gamma))$. With $\varepsilon$ = `label_smoothing` the loss is
        $(1-\varepsilon) L + \tfrac{\varepsilon}{V} \sum_v -\log p_v$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        gamma: $\gamma \in [0, 1]$, a number or a tensor with one element, which is not differentiated. The default
            0.1 is the paper's for translation; $10^{-7}$ for language modeling, 0.8 for fine-tuning a summarizer.
            From scratch 0.8 and more may fail: some classes are never learned then.
        min_weight: $b \in [0, 1]$; 0.2 to 0.3 in the paper's runs.
        label_smoothing: $\varepsilon \in [0, 1]$; 0.1 in the paper's runs with smoothing.
        value: "weighted" gives the paper's number $\max(b, \alpha)\,\ell$ with the weight as a constant: the same
            gradient, but not monotone (it falls to 0 as $p \to 0$), so it is for comparison only.
        token_weight: weight of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored
        gives 0 with zero gradient.

    Raises:
        TypeError: `input` is not floating or `target` not int64.
        ValueError: shapes or devices do not fit, an option is out of its range, or, on the CPU, a target is not a
            class. The range of a tensor `gamma` is checked on the CPU only.

    Numerics:
        Half inputs are computed in float32. From $\ell$, not from $p$: at $\ell = 80$, $\gamma = 10^{-7}$ the value is
        finite and the weight $e^{-80}/10^{-7}$. A logit of $-\infty$ is a mask; with label smoothing it makes the loss
        infinite, as in `F.cross_entropy`. A row of $-\infty$ alone gives NaN. NaN stays within its row, and an ignored
        row gets exactly zero gradient whatever it holds.

    Differences:
        The paper computes the weight without gradient times $\ell$; this is the function with that gradient, so
        its value goes down when the model learns. The article writes $-p$ for $\gamma = 1$; here $1 - p$, which is
        continuous in $\gamma$.

    Source:
        Ji et al. (2023), arXiv 2302.13344; "缓解交叉熵过度自信的一个简明方案" (2023-03-14).

    Example:
        >>> import torch
        >>> from danlu.losses import tailr_loss
        >>> logits, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> tailr_loss(logits, target, gamma=0.5, reduction="none")
        tensor([0.1229, 1.1611])
    """
    check_targets("input", input, target)
    _check_options(gamma, min_weight, label_smoothing, value)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    keep = check_range(target, input.shape[-1], ignore_index, check=check)
    nll, uniform = negative_log_likelihood(input, target, keep, label_smoothing)
    if value == "potential":
        loss = _bounded_potential(nll, gamma, min_weight)
    else:
        loss = _weight(nll, gamma, min_weight).detach() * nll
    if uniform is not None:
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if token_weight is not None:
        loss = loss * token_weight.to(loss.dtype)
    return reduce_loss(loss.masked_fill(~keep, 0.0), keep, reduction, normalizer)


def linear_tailr_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float | Tensor = 0.1,
    min_weight: float = 0.0,
    label_smoothing: float = 0.0,
    value: TaiLrValue = "potential",
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check: bool = False,
) -> Tensor:
    r"""TaiLr of a linear head, without ever holding the logits of all rows.

    Definition:
        $$L_\gamma(h W^\top + b,\; y)$$
        of [`tailr_loss`][danlu.losses.tailr_loss], computed in chunks of rows by
        [`linear_loss`][danlu.losses.linear_loss].

    Args:
        input: hidden states $h$, shape `(..., D)`, floating.
        linear_weight: $W$, shape `(V, D)`.
        target: $y$, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        linear_bias: $b$, shape `(V,)`, or None.
        gamma: as in [`tailr_loss`][danlu.losses.tailr_loss].
        min_weight: as there.
        label_smoothing: as there.
        value: as there.
        token_weight: as there.
        ignore_index: as there.
        reduction: as there.
        normalizer: as there.
        chunk_size: rows per chunk; None as in [`linear_loss`][danlu.losses.linear_loss].
        memory_budget: bytes for the buffers of a chunk, as there.
        check: as there.

    Returns:
        A scalar (nats), or shape `(...)` with "none".

    Raises:
        TypeError: as in [`linear_loss`][danlu.losses.linear_loss].
        ValueError: as there, or an option of TaiLr is out of its range.
        RuntimeError: from a second derivative, which is not supported.

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss].

    Cost:
        As there: $6NVD$ flops and $4V(C + D)$ bytes beyond the inputs and the input's gradient.

    Source:
        As in [`tailr_loss`][danlu.losses.tailr_loss].

    Example:
        >>> import torch
        >>> from danlu.losses import linear_tailr_loss, tailr_loss
        >>> hidden, head, target = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
        >>> fused = linear_tailr_loss(hidden, head, target, gamma=0.3, chunk_size=2)
        >>> torch.allclose(fused, tailr_loss(hidden @ head.T, target, gamma=0.3))
        True
    """
    row_loss = TaiLr(gamma, min_weight=min_weight, label_smoothing=label_smoothing, value=value)
    return linear_loss(
        input,
        linear_weight,
        target,
        row_loss,
        linear_bias=linear_bias,
        token_weight=token_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        check=check,
    )


def tailr_unbias(probs: Tensor, *, gamma: float, dim: int = -1) -> Tensor:
    r"""True probabilities from those of a model that minimizes TaiLr.

    Definition:
        TaiLr is not proper: its minimum is at $p_i = [\tau_i/\mu - \gamma]_+/(1-\gamma)$ for true probabilities
        $\tau$. Where nothing is cut to zero,
        $$\hat\tau_i = \frac{\gamma + (1-\gamma)\,p_i}{1 - \gamma + V\gamma} = \tau_i$$
        with $p$ = `probs` and $V$ its length along `dim`. Nothing is cut if
        $\tau_{\min} \ge \gamma/(1 + (V-1)\gamma)$.

    Args:
        probs: probabilities, shape `(..., V, ...)`, floating.
        gamma: $\gamma \in [0, 1]$ of the training.
        dim: axis of the classes.

    Returns:
        Probabilities of the shape and dtype of `probs`; they sum to 1 along `dim`.

    Raises:
        TypeError: `probs` is not floating.
        ValueError: `gamma` is not in [0, 1], or `dim` does not exist or is empty.

    Numerics:
        Elementwise in the dtype of `probs`.

    Source:
        Own derivation from the stationarity of $\sum_i \tau_i L_\gamma(p_i)$ on the simplex; checked in the tests by
        minimizing it.

    Example:
        >>> import torch
        >>> from danlu.losses import tailr_unbias
        >>> tailr_unbias(torch.tensor([0.55263, 0.31053, 0.12895, 0.00789]), gamma=0.05)
        tensor([0.5000, 0.3000, 0.1500, 0.0500])
    """
    check_floating("probs", probs)
    axis = check_dim("dim", dim, probs)
    check_real("gamma", gamma, low=0.0, high=1.0)
    return (gamma + (1 - gamma) * probs) / (1 - gamma + probs.shape[axis] * gamma)


def _check_options(gamma: float | Tensor, min_weight: float, label_smoothing: float, value: str = "potential") -> None:
    check_choice("value", value, ("potential", "weighted"))
    if isinstance(gamma, Tensor):
        if gamma.numel() != 1:
            raise ValueError(f"gamma must be a number or a tensor with one element, got shape {tuple(gamma.shape)}")
        if gamma.device.type == "cpu" and not torch.compiler.is_compiling():
            check_real("gamma", float(gamma.detach()), low=0.0, high=1.0)
    else:
        check_real("gamma", gamma, low=0.0, high=1.0)
    check_real("min_weight", min_weight, low=0.0, high=1.0)
    check_real("label_smoothing", label_smoothing, low=0.0, high=1.0)


def _potential(nll: Tensor, gamma: float | Tensor) -> Tensor:
    r"""$L_\gamma$ from $\ell$."""
    if isinstance(gamma, Tensor):
        return _potential_of_tensor(nll, gamma.detach().to(nll).reshape(()))
    if gamma == 0.0:
        return nll
    if gamma == 1.0:
        return -torch.expm1(-nll)
    if gamma <= _SWITCH:
        return -torch.logaddexp(nll.new_tensor(math.log(gamma)), math.log1p(-gamma) - nll) / (1 - gamma)
    return -torch.log1p((1 - gamma) * torch.expm1(-nll)) / (1 - gamma)


def _potential_of_tensor(nll: Tensor, gamma: Tensor) -> Tensor:
    """The same without reading `gamma`, each branch on values that are safe for it."""
    small = gamma.clamp(min=torch.finfo(nll.dtype).tiny, max=_SWITCH)
    low = -torch.logaddexp(small.log(), torch.log1p(-small) - nll) / (1 - small)
    rest = (1 - gamma).clamp(min=torch.finfo(nll.dtype).eps, max=1 - _SWITCH)
    high = -torch.log1p(rest * torch.expm1(-nll)) / rest
    inner = torch.where(gamma <= _SWITCH, low, torch.where(gamma == 1.0, -torch.expm1(-nll), high))
    return torch.where(gamma == 0.0, nll, inner)


def _slope(nll: Tensor, gamma: float | Tensor) -> Tensor:
    r"""$\alpha$ from $\ell$."""
    if isinstance(gamma, Tensor):
        gamma = gamma.detach().to(nll).reshape(())
        small = gamma.clamp(min=torch.finfo(nll.dtype).tiny, max=_SWITCH)
        low = torch.sigmoid(torch.log1p(-small) - small.log() - nll) / (1 - small)
        p = torch.exp(-nll)
        inner = torch.where(gamma <= _SWITCH, low, p / (gamma.clamp(min=_SWITCH) + (1 - gamma) * p))
        return torch.where(gamma == 0.0, torch.ones_like(nll), inner)
    if gamma == 0.0:
        return torch.ones_like(nll)
    if gamma <= _SWITCH:
        # In logarithms: p and gamma may both be below the smallest number of the dtype.
        return torch.sigmoid(math.log1p(-gamma) - math.log(gamma) - nll) / (1 - gamma)
    p = torch.exp(-nll)
    return p / (gamma + (1 - gamma) * p)


def _threshold(nll: Tensor, gamma: float | Tensor, min_weight: float) -> Tensor | float:
    r"""$\ell^* = -\log p^*$, beyond which the weight is `min_weight`."""
    if min_weight == 1.0:
        return 0.0
    bound = min_weight * gamma / (1 - min_weight * (1 - gamma))
    if isinstance(bound, Tensor):
        return -bound.detach().to(nll).reshape(()).log()
    return -math.log(bound) if bound > 0 else math.inf


def _bounded_potential(nll: Tensor, gamma: float | Tensor, min_weight: float) -> Tensor:
    if min_weight == 0.0:
        return _potential(nll, gamma)
    # Above the threshold the loss goes on as the tangent of slope `min_weight`.
    capped = nll.clamp(max=_threshold(nll, gamma, min_weight))
    return _potential(capped, gamma) + min_weight * (nll - capped)


def _weight(nll: Tensor, gamma: float | Tensor, min_weight: float) -> Tensor:
    slope = _slope(nll, gamma)
    return slope.clamp(min=min_weight) if min_weight else slope


@dataclass(frozen=True, eq=False)
class TaiLr:
    r"""TaiLr as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $\varphi(\ell) = L_\gamma$ and $\varphi'(\ell) = \max(b, \alpha)$ of [`tailr_loss`][danlu.losses.tailr_loss].

    Args:
        gamma: $\gamma \in [0, 1]$, a number or a tensor with one element.
        min_weight: $b \in [0, 1]$.
        label_smoothing: $\varepsilon \in [0, 1]$.
        value: as in the function.

    Raises:
        ValueError: an option is out of its range.

    Numerics:
        As in [`tailr_loss`][danlu.losses.tailr_loss].

    Source:
        As there.

    Example:
        >>> import torch
        >>> from danlu.losses import TaiLr
        >>> TaiLr(0.5).value_and_derivative(torch.tensor([0.0, 1.0]))
        (tensor([-0.0000, 0.7598]), tensor([1.0000, 0.5379]))
    """

    gamma: float | Tensor = 0.1
    min_weight: float = 0.0
    label_smoothing: float = 0.0
    value: TaiLrValue = "potential"

    def __post_init__(self) -> None:
        """Check the options."""
        _check_options(self.gamma, self.min_weight, self.label_smoothing, self.value)

    def value_and_derivative(self, nll: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\varphi(\ell)$ and $\varphi'(\ell)$."""
        weight = _weight(nll, self.gamma, self.min_weight)
        if self.value == "weighted":
            return weight * nll, weight
        return _bounded_potential(nll, self.gamma, self.min_weight), weight


def _parts(loss: TaiLr) -> Parts:
    kind = f"tailr/{loss.value}"
    if isinstance(loss.gamma, Tensor):
        return Parts(kind, (loss.min_weight,), loss.gamma.detach())
    return Parts(kind, (loss.min_weight, loss.gamma))


def _from_parts(parts: Parts) -> TaiLr:
    min_weight, *gamma = parts.numbers
    value = cast(TaiLrValue, parts.kind.partition("/")[2])
    return TaiLr(gamma[0] if parts.first is None else parts.first, min_weight=min_weight, value=value)


register_parts(TaiLr, "tailr", _parts, _from_parts)


class TaiLrLoss(nn.Module):
    r"""Module form of [`tailr_loss`][danlu.losses.tailr_loss], with a schedule for `gamma`.

    Definition:
        `forward(input, target) = tailr_loss(input, target, gamma=self.current_gamma, ...)`, where the current $\gamma$
        is `gamma`, or `gamma(steps)` if that is a function of the number of finished steps.

    Args:
        gamma: $\gamma \in [0, 1]$, a tensor with one element, or a function of the step, such as
            `lambda step: 0.5 * min(1.0, step / 500)`. Call `advance()` after every optimizer step then, as one calls a
            learning-rate schedule; `steps` counts, and is to be restored on resuming.
        min_weight: $b \in [0, 1]$.
        label_smoothing: $\varepsilon \in [0, 1]$.
        value: as in the function.
        ignore_index: target of rows that count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        From `forward`: the loss (nats); `normalizer` replaces the denominator of "mean", `token_weight` weighs rows.

    Raises:
        ValueError: an option is out of its range, at construction; of a schedule, at use.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.losses import TaiLrLoss
        >>> loss = TaiLrLoss(gamma=lambda step: min(1.0, step / 2))
        >>> for _ in range(3):
        ...     print(round(loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4))
        ...     loss.advance()
        1.3863
        0.94
        0.75
    """

    def __init__(
        self,
        gamma: float | Tensor | Callable[[int], float] = 0.1,
        *,
        min_weight: float = 0.0,
        label_smoothing: float = 0.0,
        value: TaiLrValue = "potential",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        fixed = isinstance(gamma, Tensor) or not callable(gamma)
        _check_options(gamma if fixed else gamma(0), min_weight, label_smoothing, value)
        check_reduction(reduction, None)
        self.gamma = gamma
        self.steps = 0
        self.min_weight = min_weight
        self.label_smoothing = label_smoothing
        self.value: TaiLrValue = value
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    @property
    def current_gamma(self) -> float | Tensor:
        r"""$\gamma$ at the current step."""
        gamma = self.gamma
        return gamma if isinstance(gamma, Tensor) or not callable(gamma) else gamma(self.steps)

    def advance(self, steps: int = 1) -> None:
        """Count finished optimizer steps."""
        self.steps += check_integer("steps", steps, low=0)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        normalizer: float | Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return tailr_loss(
            input,
            target,
            gamma=self.current_gamma,
            min_weight=self.min_weight,
            label_smoothing=self.label_smoothing,
            value=self.value,
            token_weight=token_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        return (
            f"gamma={self.gamma}, min_weight={self.min_weight}, label_smoothing={self.label_smoothing}, "
            f"value={self.value!r}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
