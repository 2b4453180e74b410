r"""The step of Amos on lists of tensors, each by the path that suits it.

Source: Tian & Parikh (2022), "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards Model-Oriented Scale",
arXiv 2210.11693.

Shape letters: `...` any shape, the same for a parameter and its gradient; `R` the reduced shape of its statistics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real
from danlu.optim._amos_step import (
    Numbers,
    amos_kernel_test,
    blocked_amos,
    fused_amos,
    multi_tensor_amos,
    single_tensor_amos,
)
from danlu.optim._nonfinite import STEP_NONFINITE, StepNonfinite, raise_if_nonfinite
from danlu.optim._options import check_beta, check_lengths, check_lr, checked_rate
from danlu.optim._rounding import Rounding
from danlu.optim._traversal import pick, plan

__all__ = ["EPS", "amos", "check_amos_numbers"]

# The smallest number whose inverse float32 still holds with room for the factors around it.
EPS = 2.0**-125
_DEFAULT_ROUNDING = Rounding()


def amos(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None = None,
    *,
    scales: Sequence[float],
    lr: float | Tensor,
    beta: float = 0.999,
    momentum: float = 0.0,
    clip_value: float | None = None,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    eps: float = EPS,
    nonfinite: StepNonfinite = "skip",
    nonfinite_counts: Sequence[Tensor] | None = None,
    rounding: Rounding = _DEFAULT_ROUNDING,
    foreach: bool | None = None,
    fused: bool | None = None,
    maximize: bool = False,
) -> None:
    r"""One step of [`Amos`][danlu.optim.Amos] on lists of tensors, in place.

    Definition:
        As in the class; $M_2$ averages over the axes in which $v$ is shorter than the gradient, and over all if $v$
        has no axes.

    Args:
        params: $\theta$, each of its own shape `(...)`, floating-point; changed in place.
        grads: $g$, shapes of `params`; only read.
        exp_avg_sqs: $v$, each of a shape `R` that broadcasts to its parameter's; changed in place.
        decays: $b$, shapes of `exp_avg_sqs`; changed in place.
        steps: $t - 1$, 0-d float32 tensors on the devices of `params`; changed in place.
        exp_avgs: $\mu$, shapes of `params`; changed in place. Needed if and only if `momentum` > 0.
        scales: $\eta$ of each tensor.
        lr: $\xi$.
        beta: $\beta$.
        momentum: $\rho$.
        clip_value: as in the class.
        extra_l2: $\ell_2$.
        c_coef: $c_c$.
        d_coef: $c_d$.
        eps: $\epsilon$.
        nonfinite: as in the class.
        nonfinite_counts: one 0-d integer tensor per parameter, on its device, to which 1 is added when it is skipped;
            None counts nothing.
        rounding: how results are rounded into float16 and bfloat16 parameters.
        foreach: as in the class.
        fused: as in the class.
        maximize: as in the class.

    Returns:
        None; the lists hold the result.

    Raises:
        ValueError: the lists differ in length, an option is out of its range, a state's shape does not broadcast to
            its parameter's, or `exp_avgs` and `momentum` do not belong together.
        RuntimeError: a gradient is not finite and `nonfinite="raise"`; nothing was changed.

    Numerics:
        As in the class.

    Source:
        As in the class.

    Example:
        >>> import torch
        >>> from danlu.optim import amos
        >>> w, v, b, t = torch.tensor([2.0, -2.0]), torch.zeros(()), torch.zeros(()), torch.zeros(())
        >>> amos([w], [torch.tensor([1.0, 1.0])], [v], [b], [t], scales=[1.0], lr=0.5)
        >>> w
        tensor([ 1.2500, -2.2500])
    """
    check_lr(lr)
    check_amos_numbers(
        {
            "beta": beta,
            "momentum": momentum,
            "clip_value": clip_value,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eps": eps,
        }
    )
    check_choice("nonfinite", nonfinite, STEP_NONFINITE)
    if (exp_avgs is None) != (momentum == 0):
        raise ValueError(f"exp_avgs must be given if and only if momentum > 0, got momentum={momentum}")
    check_lengths(
        {
            "params": params,
            "grads": grads,
            "exp_avg_sqs": exp_avg_sqs,
            "decays": decays,
            "steps": steps,
            "scales": scales,
            "exp_avgs": exp_avgs,
            "nonfinite_counts": nonfinite_counts,
        }
    )
    for i, (param, square, decay) in enumerate(zip(params, exp_avg_sqs, decays, strict=True)):
        check_real(f"scales[{i}]", scales[i], low=0.0, low_open=True)
        fits = square.ndim in (0, param.ndim) and all(
            s in (1, p) for s, p in zip(square.shape, param.shape if square.ndim else (), strict=True)
        )
        if not fits or decay.shape != square.shape:
            raise ValueError(
                f"exp_avg_sqs[{i}] and decays[{i}] must have one shape that is () or broadcasts to params[{i}] of "
                f"shape {tuple(param.shape)}, got {tuple(square.shape)} and {tuple(decay.shape)}"
            )
    if nonfinite == "raise":
        raise_if_nonfinite({f"params[{i}]": grad for i, grad in enumerate(grads)})
    numbers = Numbers(
        lr=checked_rate(lr),
        beta=beta,
        momentum=momentum,
        clip_value=clip_value,
        extra_l2=extra_l2,
        c_coef=c_coef,
        d_coef=d_coef,
        eps=eps,
        sign=-1.0 if maximize else 1.0,
        guard=nonfinite != "off",
    )
    kernel = amos_kernel_test(
        params, grads, exp_avg_sqs, decays, exp_avgs, rounding=rounding, fused=fused, foreach=foreach
    )
    with torch.no_grad():
        for path, indices in plan(params, grads, foreach, kernel):
            chosen = (
                pick(indices, params),
                pick(indices, grads),
                pick(indices, exp_avg_sqs),
                pick(indices, decays),
                pick(indices, steps),
                None if exp_avgs is None else pick(indices, exp_avgs),
            )
            counts = None if nonfinite_counts is None else pick(indices, nonfinite_counts)
            few, etas = rounding.pick(indices), pick(indices, scales)
            if path == "fused":
                for i in fused_amos(chosen, etas, numbers, few):
                    if counts is not None:
                        counts[i].add_(1)
                continue
            update = {"loop": single_tensor_amos, "blocks": blocked_amos, "bucket": multi_tensor_amos}[path]
            writers = [few.of(i, param.dtype) for i, param in enumerate(chosen[0])]
            update(*chosen, counts, writers, etas, numbers)


def check_amos_numbers(options: Mapping[str, Any]) -> None:
    """Raise unless all are in their ranges."""
    check_beta("beta", options["beta"])
    check_beta("momentum", options["momentum"])
    if options["clip_value"] is not None:
        check_real("clip_value", options["clip_value"], low=0.0, low_open=True)
    for name in ("extra_l2", "c_coef", "d_coef", "eps"):
        check_real(name, options[name], low=0.0)
