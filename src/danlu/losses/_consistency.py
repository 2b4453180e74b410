r"""Divergences between two passes of a model, and the two regularizers made of them: R-Drop and VAT.

Source: "GlobalPointer下的“KL散度”应该是怎样的?" (2022-04-15); Wu et al. (2021), "R-Drop: Regularized Dropout for Neural
Networks", arXiv 2106.14448; Miyato et al. (2017), "Virtual Adversarial Training", arXiv 1704.03976.

Shape letters: `C` labels or classes; `...` batch axes, one row each.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import (
    check_bool,
    check_choice,
    check_floating,
    check_integer,
    check_real,
    check_same_device,
    is_low_precision,
)
from danlu._common.reduction import Reduction, check_reduction, reduce_loss

__all__ = ["rdrop", "symmetric_kl", "virtual_adversarial_loss"]

Kind = Literal["bernoulli", "softmax"]


def symmetric_kl(
    input: Tensor,
    other: Tensor,
    *,
    kind: Kind = "bernoulli",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two sets of scores: of a sigmoid per label, or of softmaxes.

    Definition:
        $$D(s, t) = \sum_i \big(\sigma(s_i) - \sigma(t_i)\big)(s_i - t_i)
        = \mathrm{KL}(B_s\,\|\,B_t) + \mathrm{KL}(B_t\,\|\,B_s)$$
        for independent Bernoulli variables ("bernoulli"), and for $p$, $q$ the softmax of $s$, $t$ ("softmax")
        $$D(s, t) = \sum_i (p_i - q_i)(s_i - t_i) = \mathrm{KL}(p\,\|\,q) + \mathrm{KL}(q\,\|\,p)$$
        with $s$ = `input`, $t$ = `other`. $\partial D/\partial s_i = \sigma'(s_i)(s_i - t_i) + \sigma(s_i) -
        \sigma(t_i)$ in the first case.

    Args:
        input: scores (nats), shape `(..., C)`, floating. Of span scores flatten the last two axes.
        other: scores of the same shape; both get gradients.
        kind: "bernoulli" for multi-label scores, such as those of spans; "softmax" for classes.
        mask: bool, True = counts, broadcastable to `input`; None means all.
        reduction: "mean" over the rows, "sum", or "none" for one number per row.
        normalizer: replaces the denominator of "mean".

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else the common dtype. At least 0, and
        0 if and only if the distributions are equal.

    Raises:
        TypeError: a tensor is not floating, or `mask` not bool.
        ValueError: shapes or devices do not fit, or `kind` is unknown.

    Numerics:
        Half inputs are computed in float32. The difference of sigmoids is taken at the side where they are small, so
        that it keeps its digits at 40 and 41 as at -40 and -41; $\pm10^4$ is finite. Where both scores are $-\infty$
        they count as masked: the difference would be NaN. What is masked is not looked at. A row without any label
        that counts gives 0.

    Source:
        "GlobalPointer下的“KL散度”应该是怎样的?" (2022-04-15). That it is the divergence of Bernoulli variables
        is tested in float64.

    Example:
        >>> import torch
        >>> from danlu.losses import symmetric_kl
        >>> symmetric_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0]))
        tensor(0.9242)
    """
    check_floating("input", input)
    check_floating("other", other)
    if input.ndim < 1 or input.shape != other.shape:
        raise ValueError(
            f"input and other must have one shape (..., C), got {tuple(input.shape)} and {tuple(other.shape)}"
        )
    check_choice("kind", kind, ("bernoulli", "softmax"))
    check_reduction(reduction, normalizer)
    if mask is not None:
        check_bool("mask", mask, "counts")
    check_same_device(input=input, other=other, mask=mask)
    dtype = torch.promote_types(input.dtype, other.dtype)
    dtype = torch.float32 if is_low_precision(dtype) else dtype
    s, t = input.to(dtype), other.to(dtype)
    nowhere = float("-inf")
    hidden = (s == nowhere) & (t == nowhere)
    if mask is not None:
        try:
            hidden = hidden | ~mask.expand(input.shape)
        except RuntimeError:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to input {tuple(input.shape)}"
            ) from None
    terms = _bernoulli(s, t, hidden) if kind == "bernoulli" else _softmax(s, t, hidden)
    rows = terms.sum(-1)
    return reduce_loss(rows, torch.ones_like(rows, dtype=torch.bool), reduction, normalizer)


def _bernoulli(s: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    s, t = s.masked_fill(hidden, 0.0), t.masked_fill(hidden, 0.0)
    flip = torch.where(s + t > 0, -1.0, 1.0).to(s.dtype)
    # sigma(s) - sigma(t) = sigma(-t) - sigma(-s): with the sign at which the larger of the two is small.
    return flip * ((flip * s).sigmoid() - (flip * t).sigmoid()) * (s - t)


def _softmax(s: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    empty = hidden.all(-1, keepdim=True)
    logs = [x.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0).log_softmax(-1) for x in (s, t)]
    difference = logs[0].masked_fill(hidden, 0.0) - logs[1].masked_fill(hidden, 0.0)
    return (logs[0].exp() - logs[1].exp()) * difference


def rdrop(
    forward: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    weight: float = 1.0,
    kind: Kind = "bernoulli",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""R-Drop: the loss of two passes with different dropout, and how far apart they are.

    Definition:
        $$\tfrac12 (L_1 + L_2) + \tfrac w4\, D(s_1, s_2)$$
        with $s_1, s_2$ two results of `forward`, $L_i$ = `loss` of them, $D$ their
        [`symmetric_kl`][danlu.losses.symmetric_kl] and $w$ = `weight`.

    Args:
        forward: one pass of the model in training mode, without arguments; returns scores `(..., C)`. It is called
            twice; what differs is the dropout.
        loss: scores to a scalar.
        weight: $w \ge 0$; 1 to 5 in the paper's runs.
        kind: as in `symmetric_kl`.
        mask: as there.
        reduction: of the divergence, "mean" or "sum"; that of `loss`.
        normalizer: as there.

    Returns:
        A scalar (nats).

    Raises:
        TypeError: `forward` or `loss` is not callable.
        ValueError: `weight` is negative, `reduction` is "none", or as in `symmetric_kl`.

    Numerics:
        As in `symmetric_kl`.

    Cost:
        Two passes forward and backward.

    Differences:
        The paper's $L_1 + L_2 + \alpha\,\tfrac12(\mathrm{KL} + \mathrm{KL})$ is twice this with $\alpha = w$, so that
        the scale is that of a loss and a learning rate can stay.

    Source:
        Wu et al. (2021), arXiv 2106.14448, equation 4.

    Example:
        >>> import torch
        >>> from torch.nn.functional import dropout
        >>> from danlu.losses import multilabel_cross_entropy, rdrop
        >>> features, target = torch.ones(2, 5), torch.tensor([[0], [3]])
        >>> forward = lambda: dropout(features, 0.5) - 2
        >>> rdrop(forward, lambda s: multilabel_cross_entropy(s, target, sparse=True)).shape
        torch.Size([])
    """
    for name, function in (("forward", forward), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    check_real("weight", weight, low=0.0)
    check_choice("reduction", reduction, ("mean", "sum"))
    first, second = forward(), forward()
    apart = symmetric_kl(first, second, kind=kind, mask=mask, reduction=reduction, normalizer=normalizer)
    return 0.5 * (loss(first) + loss(second)) + 0.25 * weight * apart


def virtual_adversarial_loss(
    forward: Callable[[Tensor], Tensor],
    input: Tensor,
    *,
    scores: Tensor | None = None,
    epsilon: float = 1.0,
    xi: float = 0.01,
    num_iterations: int = 1,
    kind: Kind = "bernoulli",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Virtual adversarial training (VAT): how far the worst small change of the input moves the scores.

    Definition:
        $$D\big(\mathrm{sg}[f(x)],\; f(x + r)\big), \qquad r = \epsilon\,\frac{g}{\|g\|}, \qquad
        g = \nabla_d\, D\big(\mathrm{sg}[f(x)],\; f(x + \xi d)\big)$$
        with $f$ = `forward`, $x$ = `input`, $D$ the [`symmetric_kl`][danlu.losses.symmetric_kl], sg without gradient,
        and $d$ a random direction of norm 1 per sample, which every further iteration replaces by $g/\|g\|$. It is
        added to the loss; it needs no labels.

    Args:
        forward: inputs to scores `(B, ..., C)`. Dropout, if it is on, must be the same in all passes, else its noise
            is what is measured.
        input: embeddings or features, shape `(B, ...)`, floating. Norms are per sample, over all other axes.
        scores: $f(x)$, if it is known; it gets no gradient here.
        epsilon: $\epsilon > 0$, norm of the change, in units of the input.
        xi: $\xi > 0$, norm at which the gradient is taken.
        num_iterations: of the power iteration, at least 1, as in the paper.
        kind: as in `symmetric_kl`.
        mask: as there.
        generator: of the directions; None is torch's own.
        reduction: as there.
        normalizer: as there.

    Returns:
        A scalar (nats), or one number per row with "none". Gradients reach whatever `forward` uses, through its last
        call, and `input`; the search leaves none behind.

    Raises:
        TypeError: `forward` is not callable, or `input` not floating.
        ValueError: an option is out of its range, or as in `symmetric_kl`.

    Numerics:
        Directions are in float32 at least. A sample on which nothing depends has gradient 0, and a change of 0.

    Cost:
        `num_iterations + 1` passes forward and backward beside $f(x)$.

    Differences:
        The paper's $\xi = 10^{-6}$ leaves nothing of a float32 gradient, which is proportional to it; its
        divergence is $\mathrm{KL}(p\,\|\,q)$ alone, which is half of ours up to higher orders of $r$.

    Source:
        Miyato et al. (2017), arXiv 1704.03976, equations 6 to 14.

    Example:
        >>> import torch
        >>> from danlu.losses import virtual_adversarial_loss
        >>> weight = torch.tensor([[1.0, 0.0]])
        >>> loss = virtual_adversarial_loss(lambda x: x @ weight.T, torch.zeros(1, 2), epsilon=2.0)
        >>> loss  # the direction that matters is found: (sigma(2) - sigma(0)) * 2
        tensor(0.7616)
    """
    if not callable(forward):
        raise TypeError(f"forward must be callable, got {type(forward).__name__}")
    check_floating("input", input)
    if input.ndim < 2:
        raise ValueError(f"input must have shape (B, ...), got {tuple(input.shape)}")
    check_real("epsilon", epsilon, low=0.0, low_open=True)
    check_real("xi", xi, low=0.0, low_open=True)
    check_integer("num_iterations", num_iterations, low=1)
    with torch.no_grad():
        clean = (forward(input) if scores is None else scores).detach()
    dtype = torch.float32 if is_low_precision(input.dtype) else input.dtype
    noise = torch.randn(input.shape, dtype=dtype, device=input.device, generator=generator)
    direction, frozen = _unit(noise), input.detach()
    for _ in range(num_iterations):
        direction.requires_grad_()
        with torch.enable_grad():
            moved = forward(frozen + (xi * direction).to(input.dtype))
            apart = symmetric_kl(moved, clean, kind=kind, mask=mask, reduction="sum")
            # Scores may not depend on the input at all.
            gradient = torch.autograd.grad(apart, direction, allow_unused=True)[0] if apart.requires_grad else None
        direction = _unit(torch.zeros_like(noise) if gradient is None else gradient.detach())
    moved = forward(input + (epsilon * direction).to(input.dtype))
    return symmetric_kl(moved, clean, kind=kind, mask=mask, reduction=reduction, normalizer=normalizer)


def _unit(direction: Tensor) -> Tensor:
    """Every sample divided by its norm; 0 stays 0."""
    flat = direction.flatten(1)
    # By the largest element first: squares of small gradients are 0.
    flat = flat / flat.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return (flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-12)).view_as(direction)
