r"""The step of Lion on lists of tensors, each by the path that suits it.

Source: Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real
from danlu.kernels.sign_update import dtypes_supported
from danlu.optim._lion_paths import blocked, compiled, multi_tensor, single_tensor
from danlu.optim._nonfinite import STEP_NONFINITE, StepNonfinite, raise_if_nonfinite
from danlu.optim._options import as_float, check_betas, check_lengths, check_lr
from danlu.optim._rounding import Rounding
from danlu.optim._traversal import kernel_test, pick, plan, prepare_call

__all__ = ["lion"]

_DEFAULT_ROUNDING = Rounding()


def lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    nonfinite: StepNonfinite = "skip",
    nonfinite_counts: Sequence[Tensor] | None = None,
    rounding: Rounding = _DEFAULT_ROUNDING,
    foreach: bool | None = None,
    fused: bool | None = None,
    maximize: bool = False,
) -> list[int]:
    r"""One step of [`Lion`][danlu.optim.Lion] on lists of tensors, in place.

    Definition:
        $u = \operatorname{sign}(\beta_1 m + (1-\beta_1) g)$, then $\theta \leftarrow \theta - \eta(u + \lambda\theta)$
        and $m \leftarrow \beta_2 m + (1-\beta_2) g$.

    Args:
        params: $\theta$, each of its own shape `(...)`, floating-point or complex; changed in place.
        grads: $g$, shapes of `params`; only read.
        exp_avgs: $m$, shapes of `params`; changed in place.
        lr: $\eta$.
        betas: $(\beta_1, \beta_2)$.
        weight_decay: $\lambda$.
        nonfinite: as in the class, without `"shrink"`.
        nonfinite_counts: one 0-d integer tensor per parameter, on its device, to which 1 is added when its gradient is
            not finite and `nonfinite="skip"`; None counts nothing.
        rounding: how results are rounded into float16 and bfloat16 parameters.
        foreach: as in the class.
        fused: as in the class.
        maximize: as in the class.

    Returns:
        The indices of the tensors that the compiled step took; `params` and `exp_avgs` hold the result.

    Raises:
        ValueError: the lists differ in length, or an option is out of its range.
        RuntimeError: a gradient is not finite and `nonfinite="raise"`; nothing was changed.

    Numerics:
        As in the class.

    Source:
        As in the class.

    Example:
        >>> import torch
        >>> from danlu.optim import lion
        >>> w, m = torch.tensor([1.0, -1.0]), torch.zeros(2)
        >>> _ = lion([w], [torch.tensor([0.3, 0.2])], [m], lr=0.5)
        >>> w
        tensor([ 0.5000, -1.5000])
    """
    check_lr(lr)
    check_betas(betas)
    check_real("weight_decay", weight_decay, low=0.0)
    check_choice("nonfinite", nonfinite, STEP_NONFINITE)
    check_lengths({"params": params, "grads": grads, "exp_avgs": exp_avgs, "nonfinite_counts": nonfinite_counts})
    if nonfinite == "raise":
        raise_if_nonfinite({f"params[{i}]": grad for i, grad in enumerate(grads)})
    kernel = kernel_test(
        "sign_update", params, grads, exp_avgs, fused=fused, foreach=foreach, supported=dtypes_supported
    )
    taken: list[int] = []
    with torch.no_grad():
        for path, indices in plan(params, grads, foreach, kernel):
            lists = pick(indices, params), pick(indices, grads), pick(indices, exp_avgs)
            counts = None if nonfinite_counts is None else pick(indices, nonfinite_counts)
            few = rounding.pick(indices)
            if path == "fused":
                taken += indices
                call = prepare_call(lists, few)
                compiled(
                    call,
                    counts,
                    lr=lr,
                    betas=betas,
                    weight_decay=weight_decay,
                    guard=nonfinite == "skip",
                    maximize=maximize,
                    rounding=few,
                )
                continue
            update = {"loop": single_tensor, "blocks": blocked, "bucket": multi_tensor}[path]
            rate = as_float(lr)
            update(
                *lists,
                counts,
                [few.of(i, param.dtype) for i, param in enumerate(lists[0])],
                lr=-rate if maximize else rate,
                betas=betas,
                # Climbing is descending with -lr, except that the decay still pulls towards 0.
                weight_decay=-weight_decay if maximize else weight_decay,
                guard=nonfinite == "skip",
            )
    return taken
