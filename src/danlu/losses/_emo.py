r"""EMO: the cost of moving the predicted distribution to the label, next to cross entropy.

Source: Ren et al. (2023), "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv
2310.04691; "EMO:基于最优传输思想设计的分类损失函数" (2023-10-13).

Shape letters: `V` classes; `E` width of the cost embedding; `D` features; `...` batch axes.
"""

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_floating, check_real
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._ground_cost import GroundCost, inverse_norms
from danlu.losses._linear import linear_loss
from danlu.losses._row_loss import Parts, register_parts
from danlu.losses._targets import check_range, check_row_values, check_targets, scores_of_kept_rows

__all__ = ["EMO", "EMOMode", "check_emo_options", "emo_bound", "emo_loss", "linear_emo_loss"]

EMOMode = Literal["ce_anchored", "emo_anchored", "fixed", "pure"]
MODES: tuple[EMOMode, ...] = get_args(EMOMode)


def emo_loss(
    input: Tensor,
    target: Tensor,
    *,
    cost_embedding: Tensor | None = None,
    cost_matrix: Tensor | None = None,
    mode: EMOMode = "ce_anchored",
    ce_weight: float = 1.0,
    emo_weight: float = 1.0,
    max_ratio: float | None = None,
    shift_target: bool = False,
    min_nll: float = 1e-3,
    eps: float = 1e-10,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    r"""EMO: wrong classes are punished by their distance from the target.

    Definition:
        With $p = \operatorname{softmax}(z)$, target $t$ and $\ell = -\log p_t$, the optimal transport to a one-hot
        label has one feasible plan, with the cost
        $$e = \sum_v p_v\,c_{tv}, \qquad c_{tv} = 1 - \cos(e_t, e_v), \qquad
        \frac{\partial e}{\partial z_j} = p_j\,(c_{tj} - e)$$
        for rows $e_v$ of `cost_embedding`, or $c$ = `cost_matrix`. With $\operatorname{sg}$ for "no gradient",

        - "ce_anchored": $\tfrac12\big(\ell + \operatorname{sg}[\min(\ell/(e+\epsilon), r)]\,e\big)$ with
          $r$ = `max_ratio`;
        - "emo_anchored": $\operatorname{sg}[e/(\ell+\epsilon)]\,\ell + e$;
        - "fixed": $w_{\text{ce}}\,\ell + w_{\text{emo}}\,e$;
        - "pure": $e$.

        `shift_target` replaces the value $e$ by $e + \operatorname{sg}[p_t]$, in the weights and in the loss; the
        gradient of $e$ stays. With $\varepsilon$ = `label_smoothing` the loss is
        $(1-\varepsilon) L + \tfrac{\varepsilon}{V} \sum_v -\log p_v$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        cost_embedding: shape `(V, E)`, any floating dtype; normally a copy of the pretrained head. No gradient flows
            into it. A row of zeros costs 1 from and to all others.
        cost_matrix: shape `(V, V)`, costs $\ge 0$ of target (row) and class (column), in place of the embedding: for
            ordered classes or a hierarchy. Its diagonal is taken as it is; if it is not 0, the weight of "emo_anchored"
            grows without bound as a token is fitted.
        mode: how cross entropy and cost are combined. "pure" is bounded and not proper: it is minimal at a one-hot
            medoid, so it sharpens without bound and learns slowly from scratch; the part of cross entropy keeps the
            calibration.
        ce_weight: $w_{\text{ce}} \ge 0$, for "fixed".
        emo_weight: $w_{\text{emo}} \ge 0$, for "fixed".
        max_ratio: $r > 0$, for "ce_anchored"; None is $\infty$, as in the paper, and the value is then that of $\ell$;
            the authors' package has 3.
        shift_target: of the authors' LLaMA code. **With "emo_anchored" it is unstable** and exists to reproduce their
            results: the weight tends to $1/(1-p_t)$, so the gradient of fitted tokens does not vanish.
        min_nll: with "emo_anchored" and `shift_target` the $\ell$ of the weight is at least this; 0 is the authors'
            code.
        eps: $\epsilon > 0$.
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
        TypeError: a tensor is not floating, or `target` not int64.
        ValueError: both or neither of embedding and matrix are given, shapes or devices do not fit, an option is out of
            its range or belongs to another mode, or, on the CPU, costs are negative or a target is not a class.

    Numerics:
        Half inputs are computed in float32. $e$ is summed with $c_{tt}$ exactly 0, not taken as one minus an inner
        product, which is rounding noise in confident rows, where weights divide by it. A logit of $-\infty$ is a mask.
        NaN stays within its row, and an ignored row gets exactly zero gradient whatever it holds.

    Cost:
        $2NVE$ flops and two tensors of size $NV$ beside the logits; [`linear_emo_loss`][danlu.losses.linear_emo_loss]
        holds neither.

    Differences:
        The authors' code smooths the one-hot target by $10^{-15}$, which float32 rounds away, and takes
        $1 - \langle\cdot,\cdot\rangle$.

    Source:
        Ren et al. (2023), arXiv 2310.04691; "EMO:基于最优传输思想设计的分类损失函数" (2023-10-13).

    Example:
        >>> import torch
        >>> from danlu.losses import emo_loss
        >>> meaning = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> near, far = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> target = torch.tensor([0])
        >>> [round(emo_loss(z, target, cost_embedding=meaning, mode="pure").item(), 2) for z in (near, far)]
        [0.33, 0.62]
    """
    loss = EMO(
        cost_embedding=cost_embedding,
        cost_matrix=cost_matrix,
        mode=mode,
        ce_weight=ce_weight,
        emo_weight=emo_weight,
        max_ratio=max_ratio,
        shift_target=shift_target,
        min_nll=min_nll,
        eps=eps,
        label_smoothing=label_smoothing,
    )
    check_targets("input", input, target)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    classes = input.shape[-1]
    loss.ground_cost.check(classes, target.device)
    keep = check_range(target, classes, ignore_index, check=check)
    scores = scores_of_kept_rows(input, keep)
    rows = target.masked_fill(~keep, 0)
    # Autocast leaves these in float32.
    log_p = scores.log_softmax(-1)
    nll = -log_p.gather(-1, rows[..., None])[..., 0]
    costs = loss.ground_cost.dense(rows.reshape(-1), scores.dtype).view(scores.shape)
    cost = (log_p.exp() * costs).sum(-1)
    value, toward_target, per_cost = loss.value_and_derivatives(nll.detach(), cost.detach())
    # The value as it is, with the gradient that the coefficients say.
    surrogate = toward_target * nll + per_cost * cost
    row = _with_value(surrogate, value)
    if label_smoothing:
        row = (1 - label_smoothing) * row - label_smoothing * log_p.mean(-1)
    if token_weight is not None:
        row = row * token_weight.to(row.dtype)
    return reduce_loss(row.masked_fill(~keep, 0.0), keep, reduction, normalizer)


def _with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    # An infinite loss minus itself is not a number.
    return torch.where(surrogate.isinf(), surrogate, value.detach() + (surrogate - surrogate.detach()))


def emo_bound(
    input: Tensor,
    target: Tensor,
    *,
    cost_embedding: Tensor,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""An upper bound of the optimal transport to a distribution over classes, by the plan that pairs independently.

    Definition:
        $$\sum_{ij} p_i\,\tau_j\,c_{ij}
        = 1 - \langle \textstyle\sum_i p_i \hat e_i,\ \sum_j \tau_j \hat e_j \rangle$$
        with $p = \operatorname{softmax}(z)$, $\tau$ = `target` and unit rows $\hat e$ of `cost_embedding`.

        **The bound is loose**: it is not 0 at $p = \tau$, and its minimum is one-hot whatever $\tau$ is. It equals the
        optimal cost for one-hot $\tau$.

    Args:
        input: logits (nats), shape `(..., V)`, floating.
        target: probabilities $\tau$, shape `(..., V)`, floating; not differentiated.
        cost_embedding: shape `(V, E)`, as in [`emo_loss`][danlu.losses.emo_loss].
        token_weight: weight of every row, shape `(...)`; not differentiated.
        reduction: "mean" over the rows, "sum", or "none" for one bound per row.
        normalizer: replaces the denominator of "mean".

    Returns:
        A scalar, or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or devices do not fit.

    Numerics:
        Half inputs are computed in float32. A row of zeros in the embedding costs 1 to all others and 0 to itself.

    Cost:
        $4NVE$ flops; nothing of size $NV$ beside the logits and the softmax.

    Source:
        "EMO:基于最优传输思想设计的分类损失函数" (2023-10-13).

    Example:
        >>> import torch
        >>> from danlu.losses import emo_bound
        >>> tau = torch.tensor([[0.5, 0.5]])
        >>> emo_bound(torch.zeros(1, 2), tau, cost_embedding=torch.eye(2))  # p = tau, and yet
        tensor(0.5000)
    """
    check_floating("input", input)
    check_floating("target", target)
    if input.ndim < 1 or target.shape != input.shape:
        raise ValueError(
            f"target must hold probabilities in the shape of input {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    cost = GroundCost(embedding=cost_embedding)
    cost.check(input.shape[-1], input.device)
    check_reduction(reduction, normalizer)
    keep = torch.ones(input.shape[:-1], dtype=torch.bool, device=input.device)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, keep)
    scores = scores_of_kept_rows(input, keep)
    with torch.autocast(device_type=input.device.type, enabled=False):
        p, tau = scores.softmax(-1), target.detach().to(scores.dtype)
        table = cost_embedding.detach().to(scores.dtype)
        scale = inverse_norms(table, scores.dtype)
        unit = table * scale[:, None]
        inner = ((p @ unit) * (tau @ unit)).sum(-1)
        # A class without a direction is still at no distance from itself.
        stays = (p * tau) @ (scale == 0).to(scores.dtype)
        row = p.sum(-1) * tau.sum(-1) - inner - stays
    if token_weight is not None:
        row = row * token_weight.to(row.dtype)
    return reduce_loss(row, keep, reduction, normalizer)


def linear_emo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    cost_embedding: Tensor | Literal["head"] | None = None,
    cost_matrix: Tensor | None = None,
    linear_bias: Tensor | None = None,
    mode: EMOMode = "ce_anchored",
    ce_weight: float = 1.0,
    emo_weight: float = 1.0,
    max_ratio: float | None = None,
    shift_target: bool = False,
    min_nll: float = 1e-3,
    eps: float = 1e-10,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check: bool = False,
) -> Tensor:
    r"""EMO of a linear head, without ever holding the logits or the costs of all rows.

    Definition:
        $$L(h W^\top + b,\; y)$$
        of [`emo_loss`][danlu.losses.emo_loss], computed in chunks of rows by
        [`linear_loss`][danlu.losses.linear_loss]. A second product $\hat e_y \hat E^\top$ in each chunk gives both $e$
        and the coefficients of its gradient.

    Args:
        input: hidden states $h$, shape `(..., D)`, floating.
        linear_weight: $W$, shape `(V, D)`.
        target: $y$, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        cost_embedding: as in [`emo_loss`][danlu.losses.emo_loss]; "head" (or the weight itself) takes the current $W$
            without gradient, in one product with the logits and without a copy.
        cost_matrix: as there.
        linear_bias: $b$, shape `(V,)`, or None.
        mode: as there.
        ce_weight: as there.
        emo_weight: as there.
        max_ratio: as there.
        shift_target: as there.
        min_nll: as there.
        eps: as there.
        label_smoothing: as there.
        token_weight: as there.
        ignore_index: as there.
        reduction: as there.
        normalizer: as there.
        chunk_size: rows per chunk; None as in [`linear_loss`][danlu.losses.linear_loss].
        memory_budget: bytes for the buffers of a chunk, as there.
        check: as there.

    Returns:
        A scalar, or shape `(...)` with "none".

    Raises:
        TypeError: as in [`linear_loss`][danlu.losses.linear_loss].
        ValueError: as there, or an option of EMO is out of its range.
        RuntimeError: from a second derivative, which is not supported.

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss].

    Cost:
        $6NVD + 2NVE$ flops and $4V(2C + D)$ bytes beyond the inputs and the input's gradient. On the CPU targets that
        repeat within a chunk are computed once.

    Source:
        As in [`emo_loss`][danlu.losses.emo_loss].

    Example:
        >>> import torch
        >>> from danlu.losses import emo_loss, linear_emo_loss
        >>> hidden, head, target = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
        >>> fused = linear_emo_loss(hidden, head, target, cost_embedding="head", chunk_size=2)
        >>> torch.allclose(fused, emo_loss(hidden @ head.T, target, cost_embedding=head))
        True
    """
    loss = EMO(
        cost_embedding="head" if cost_embedding is linear_weight else cost_embedding,
        cost_matrix=cost_matrix,
        mode=mode,
        ce_weight=ce_weight,
        emo_weight=emo_weight,
        max_ratio=max_ratio,
        shift_target=shift_target,
        min_nll=min_nll,
        eps=eps,
        label_smoothing=label_smoothing,
    )
    return linear_loss(
        input,
        linear_weight,
        target,
        loss,
        linear_bias=linear_bias,
        token_weight=token_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        check=check,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class EMO:
    r"""EMO as a row loss for [`linear_loss`][danlu.losses.linear_loss].

    Definition:
        $\varphi(\ell, e)$ of [`emo_loss`][danlu.losses.emo_loss], with $\alpha$ and $\beta$ the weights that its
        formula has before $\ell$ and $e$.

    Args:
        cost_embedding: as in [`linear_emo_loss`][danlu.losses.linear_emo_loss].
        cost_matrix: as there.
        mode: as there.
        ce_weight: as there.
        emo_weight: as there.
        max_ratio: as there.
        shift_target: as there.
        min_nll: as there.
        eps: as there.
        label_smoothing: as there.
        cost_cache: keep the costs of all pairs of classes in bfloat16 ($2V^2$ bytes, $V \le 50000$) and gather them
            instead of a product. The embedding must not change then, and costs have three digits.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: as in [`emo_loss`][danlu.losses.emo_loss], or the table would be too large.

    Numerics:
        As in [`emo_loss`][danlu.losses.emo_loss].

    Source:
        As there.

    Example:
        >>> import torch
        >>> from danlu.losses import EMO, linear_loss
        >>> loss = EMO(cost_embedding="head", mode="fixed", ce_weight=0.9, emo_weight=0.1)
        >>> linear_loss(torch.zeros(3, 4), torch.eye(5, 4), torch.tensor([0, 1, 2]), loss)
        tensor(1.5285)
    """

    cost_embedding: Tensor | Literal["head"] | None = None
    cost_matrix: Tensor | None = None
    mode: EMOMode = "ce_anchored"
    ce_weight: float = 1.0
    emo_weight: float = 1.0
    max_ratio: float | None = None
    shift_target: bool = False
    min_nll: float = 1e-3
    eps: float = 1e-10
    label_smoothing: float = 0.0
    cost_cache: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_emo_options(
            self.mode, self.ce_weight, self.emo_weight, self.max_ratio, self.min_nll, self.eps, self.label_smoothing
        )
        cost = GroundCost(embedding=self.cost_embedding, matrix=self.cost_matrix, cache=self.cost_cache)
        object.__setattr__(self, "_cost", cost)
        bounded = self.mode == "emo_anchored" and not self.shift_target
        object.__setattr__(self, "_largest", cost.largest() if bounded else None)

    @property
    def ground_cost(self) -> GroundCost:
        """The costs of pairs of classes."""
        return self._cost  # pyrefly: ignore[missing-attribute]

    def value_and_derivatives(self, nll: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""$\varphi(\ell, e)$, $\alpha$ and $\beta$."""
        ones = torch.ones_like(nll)
        e = cost + torch.exp(-nll) if self.shift_target else cost
        if self.mode == "pure":
            return e, torch.zeros_like(nll), ones
        if self.mode == "fixed":
            return self.ce_weight * nll + self.emo_weight * e, self.ce_weight * ones, self.emo_weight * ones
        if self.mode == "ce_anchored":
            ratio = nll / (e + self.eps)
            if self.max_ratio is not None:
                ratio = ratio.clamp(max=self.max_ratio)
            return 0.5 * (nll + ratio * e), 0.5 * ones, 0.5 * ratio
        least = nll.clamp(min=self.min_nll) if self.shift_target else nll
        ratio = e / (least + self.eps)
        # e <= max(c) (1 - p) <= max(c) l. Beyond that is rounding: the l of a fitted token may be 0.
        largest = self._largest  # pyrefly: ignore[missing-attribute]
        if isinstance(largest, Tensor):
            ratio = torch.minimum(ratio, largest.to(ratio.dtype))
        elif largest is not None:
            ratio = ratio.clamp(max=largest)
        return ratio * nll + e, ratio, ones


def _parts(loss: EMO) -> Parts:
    source, first, second = loss.ground_cost.parts()
    if source == "matrix":
        second = loss._largest  # pyrefly: ignore[missing-attribute]
    ratio = math.inf if loss.max_ratio is None else loss.max_ratio
    return Parts(
        f"emo/{source}/{loss.mode}/{'shifted' if loss.shift_target else 'plain'}",
        (loss.ce_weight, loss.emo_weight, ratio, loss.min_nll, loss.eps),
        first,
        second,
    )


def _from_parts(parts: Parts) -> EMO:
    _, source, mode, shift = parts.kind.split("/")
    ce_weight, emo_weight, ratio, min_nll, eps = parts.numbers
    loss = EMO(
        cost_embedding="head",
        mode=cast(EMOMode, mode),
        ce_weight=ce_weight,
        emo_weight=emo_weight,
        max_ratio=None if ratio == math.inf else ratio,
        shift_target=shift == "shifted",
        min_nll=min_nll,
        eps=eps,
    )
    if source != "head":
        # The costs have been looked at, and the bound and the table made, when the loss was.
        object.__setattr__(loss, "_cost", GroundCost.of(source, parts.first, parts.second))
    if source == "matrix" and parts.second is not None:
        object.__setattr__(loss, "_largest", parts.second)
    return loss


register_parts(EMO, "emo", _parts, _from_parts)


def check_emo_options(
    mode: str,
    ce_weight: float,
    emo_weight: float,
    max_ratio: float | None,
    min_nll: float,
    eps: float,
    label_smoothing: float,
) -> None:
    """Raise unless the options are in their ranges and belong to the mode."""
    check_choice("mode", mode, MODES)
    check_real("ce_weight", ce_weight, low=0.0)
    check_real("emo_weight", emo_weight, low=0.0)
    if mode != "fixed" and (ce_weight != 1.0 or emo_weight != 1.0):
        raise ValueError(f"ce_weight and emo_weight belong to mode='fixed', got mode={mode!r}")
    if max_ratio is not None:
        check_real("max_ratio", max_ratio, low=0.0, low_open=True)
        if mode != "ce_anchored":
            raise ValueError(f"max_ratio belongs to mode='ce_anchored', got mode={mode!r}")
    check_real("min_nll", min_nll, low=0.0)
    check_real("eps", eps, low=0.0, low_open=True)
    check_real("label_smoothing", label_smoothing, low=0.0, high=1.0)
