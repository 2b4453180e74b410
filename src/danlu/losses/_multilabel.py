r"""Multi-label categorical cross entropy (ZLPR): every positive score above a threshold, every negative one below it.

Source: Su et al. (2022), "ZLPR: A Novel Loss for Multi-label Classification", arXiv 2208.02955;
"将“Softmax+交叉熵”推广到多标签分类问题" (2020-04-25).

Shape letters: `C` labels; `K` places of a list of positives; `...` batch axes, one row each.
"""

import torch
from torch import Tensor

from danlu._common.checks import (
    broadcasts_to,
    check_bool,
    check_floating,
    check_real,
    check_same_device,
    is_low_precision,
)
from danlu._common.reduction import Reduction, check_reduction, reduce_loss

__all__ = ["multilabel_cross_entropy"]


def multilabel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sparse: bool = False,
    threshold: float | Tensor = 0.0,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""ZLPR, the multi-label relative of softmax with cross entropy.

    Definition:
        For a row of scores $s$ with positives $P$ and negatives $Q$,
        $$L = \log\Big(1 + \sum_{i\in P} e^{-s_i}\Big) + \log\Big(1 + \sum_{i\in Q} e^{s_i}\Big)$$
        where $s$ = `input` - `threshold`; all $s > 0$ are predicted. With soft targets $t \in [0, 1]$
        $$L = \log\Big(1 + \sum_i t_i\,e^{-s_i}\Big) + \log\Big(1 + \sum_i (1 - t_i)\,e^{s_i}\Big)$$
        whose minimum $2\log(1 + \sum_i\sqrt{t_i(1-t_i)})$ is at $t_i = \sigma(2 s_i)$: the probability of a label is
        $\sigma(2s)$ and not $\sigma(s)$.

    Args:
        input: scores (nats), shape `(..., C)`, floating. Of span scores flatten the last two axes.
        target: bool, integers 0 and 1, or floating in $[0, 1]$, the shape of `input`; with `sparse` the places of the
            positives, int64, shape `(..., K)`, filled up with -1. Places that occur twice count once. Not
            differentiated.
        mask: bool, True = counts, broadcastable to `input`; None means all.
        sparse: whether `target` lists the positives.
        threshold: score above which a label is predicted; a number, or a tensor that broadcasts to `input`.
        reduction: "mean" over the rows, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean". For span scores `(B, T, n * n)` the sum over types and mean
            over samples is `normalizer=B`.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. A row without
        any label that counts gives 0 with zero gradient.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes or devices do not fit, or, on the CPU, a target is out of its range or a positive is hidden
            by `mask`; the message has its place.

    Numerics:
        Half inputs are computed in float32. One shifted sum of exponentials each for positives and negatives, so
        scores of $\pm10^4$ are safe. A score of $-\infty$ is a mask for a negative label and an infinite loss for a
        positive one. What is masked is not looked at, NaN included; NaN elsewhere stays in its row.

    Differences:
        The usual code for sparse targets takes the positives out of a sum over all labels by a difference with a
        clip at $10^{-7}$. In float32 that is wrong as soon as a positive is large: scores (20 | -5, -6, -7) give
        3.88 instead of 0.0101. Here the positives are left out of the sum.

    Source:
        Su et al. (2022), arXiv 2208.02955, equations 3 and 8; the identities of soft targets are own derivations.

    Example:
        >>> import torch
        >>> from danlu.losses import multilabel_cross_entropy
        >>> scores = torch.tensor([[20.0, -5.0, -6.0, -7.0]])
        >>> multilabel_cross_entropy(scores, torch.tensor([[0, -1]]), sparse=True)
        tensor(0.0101)
    """
    check_floating("input", input)
    _check(input, target, mask, sparse)
    check_reduction(reduction, normalizer)
    scores = input.float() if is_low_precision(input.dtype) else input
    if isinstance(threshold, Tensor):
        check_floating("threshold", threshold)
        check_same_device(input=input, threshold=threshold)
        scores = scores - threshold.to(scores.dtype)
        if scores.shape != input.shape:
            raise ValueError(
                f"threshold of shape {tuple(threshold.shape)} does not broadcast to input {tuple(input.shape)}"
            )
    elif check_real("threshold", threshold):
        scores = scores - threshold
    hidden = None if mask is None else ~mask.expand(input.shape)
    if hidden is not None:
        scores = scores.masked_fill(hidden, 0.0)
    loss = _sparse(scores, target, hidden) if sparse else _dense(scores, target, hidden)
    return reduce_loss(loss, torch.ones_like(loss, dtype=torch.bool), reduction, normalizer)


def _check(input: Tensor, target: Tensor, mask: Tensor | None, sparse: bool) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if input.ndim < 1 or input.shape[-1] == 0:
        raise ValueError(f"input must have shape (..., C) with at least one label, got {tuple(input.shape)}")
    if sparse and target.dtype != torch.int64:
        raise TypeError(f"a sparse target must be int64, got dtype {target.dtype}")
    if target.is_complex():
        raise TypeError(f"target must be bool, integer or floating, got dtype {target.dtype}")
    wanted = input.shape[:-1] if sparse else input.shape
    if (target.shape[:-1] if sparse else target.shape) != wanted or target.ndim != input.ndim:
        rule = "(..., K) with the batch axes of input" if sparse else "the shape of input"
        raise ValueError(f"target must have {rule}, got input {tuple(input.shape)} and target {tuple(target.shape)}")
    if mask is not None:
        check_bool("mask", mask, "counts")
        given, full = tuple(mask.shape), tuple(input.shape)
        if not broadcasts_to(given, full):
            raise ValueError(f"mask of shape {given} does not broadcast to input {full}")
    check_same_device(input=input, target=target, mask=mask)


def refuse_where(wrong: Tensor, what: str) -> None:
    """Raise `ValueError` with the first place where `wrong` holds, on the CPU.

    On an accelerator that check would wait for the device; under `torch.compile` and `vmap` there are no values.
    """
    if wrong.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        found = bool(wrong.any())
    except RuntimeError:
        # The only way to learn of vmap without private names.
        return
    if found:
        raise ValueError(f"{what}, got one at {tuple(wrong.nonzero()[0].tolist())}")


def _dense(scores: Tensor, target: Tensor, hidden: Tensor | None) -> Tensor:
    if target.is_floating_point():
        soft = target.detach().to(scores.dtype)
        refuse_where(~((soft >= 0) & (soft <= 1)), "target must be in [0, 1]")
        positive, negative = soft > 0, soft < 1
        # -inf + inf would be NaN where a score is infinite and its label is not.
        from_positives = (soft.log() - scores.masked_fill(~positive, 0.0)).masked_fill(~positive, float("-inf"))
        from_negatives = (torch.log1p(-soft) + scores.masked_fill(~negative, 0.0)).masked_fill(~negative, float("-inf"))
    else:
        if target.dtype != torch.bool:
            refuse_where((target != 0) & (target != 1), "target must be 0 or 1")
        positive = target.bool()
        from_positives = (-scores).masked_fill(~positive, float("-inf"))
        from_negatives = scores.masked_fill(positive, float("-inf"))
    if hidden is not None:
        refuse_where(positive & hidden, "a positive must not be masked")
        from_positives = from_positives.masked_fill(hidden, float("-inf"))
        from_negatives = from_negatives.masked_fill(hidden, float("-inf"))
    return _log_one_plus(from_positives) + _log_one_plus(from_negatives)


def _sparse(scores: Tensor, target: Tensor, hidden: Tensor | None) -> Tensor:
    labels = scores.shape[-1]
    refuse_where((target < -1) | (target >= labels), f"a sparse target must be in [0, {labels}), or -1")
    listed = target >= 0
    place = target.clamp(min=0, max=labels - 1)
    # One column more, for the places that are filled up.
    marks = torch.zeros((*scores.shape[:-1], labels + 1), dtype=torch.bool, device=scores.device)
    positive = marks.scatter(-1, place.masked_fill(~listed, labels), True)[..., :labels]
    if hidden is not None:
        refuse_where(positive & hidden, "a positive must not be masked")
    twice = (place[..., :, None] == place[..., None, :]) & listed[..., None, :]
    first = listed & ~twice.tril(-1).any(-1)
    from_positives = (-scores.gather(-1, place)).masked_fill(~first, float("-inf"))
    outside = positive if hidden is None else positive | hidden
    return _log_one_plus(from_positives) + _log_one_plus(scores.masked_fill(outside, float("-inf")))


def _log_one_plus(terms: Tensor) -> Tensor:
    r"""$\log(1 + \sum_i e^{x_i})$ along the last axis; 0 with zero gradient if all are $-\infty$."""
    if terms.shape[-1] == 0:
        return terms.sum(-1)
    largest = terms.detach().amax(-1, keepdim=True).clamp(min=0)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    # Not the logarithm of 1 + sum, which has no digit left of a small sum.
    rest = (-largest).expm1() + (terms - largest).exp().sum(-1, keepdim=True)
    return (largest + rest.log1p())[..., 0]
