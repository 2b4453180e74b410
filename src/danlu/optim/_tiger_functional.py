r"""One micro-step of Tiger on lists of tensors, each by the path that suits it.

Source: "Tiger：一个'抠'到极致的优化器" (2023-03-07), reference code github bojone/tiger.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_real
from danlu.kernels.sign_update import dtypes_supported
from danlu.optim._options import as_float, check_beta, check_lengths, check_lr
from danlu.optim._param_groups import KINDS, Kind
from danlu.optim._rounding import Rounding
from danlu.optim._tiger_paths import TigerStep, blocked, columns, compiled, multi_tensor, single_tensor
from danlu.optim._traversal import kernel_test, pick, plan, prepare_call

__all__ = ["run_tiger", "tiger"]

_DEFAULT_ROUNDING = Rounding()


def tiger(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    kinds: Sequence[Kind],
    lr: float | Tensor,
    beta: float = 0.965,
    weight_decay: float = 0.01,
    share: float = 1.0,
    folded: Sequence[bool] | None = None,
    update: bool = True,
    shrink: float = 0.99,
    center: float = 0.0,
    nonfinite: Literal["shrink", "skip", "off"] = "shrink",
    nonfinite_counts: Sequence[Tensor] | None = None,
    shrink_noise: float = 0.0,
    rms_floor: float = 1e-3,
    vector_scale: float = 0.5,
    decay_vectors: bool = False,
    sign_power: float = 1.0,
    normalize_power: bool = False,
    rounding: Rounding = _DEFAULT_ROUNDING,
    foreach: bool | None = None,
    fused: bool | None = None,
    maximize: bool = False,
) -> list[int]:
    r"""One micro-step of [`Tiger`][danlu.optim.Tiger] on lists of tensors, in place.

    Definition:
        $m \leftarrow b_1 m + (1-\beta)\,c\,g$ with $c$ = `share` and $b_1 = 1$ where `folded`, else
        $\beta$; then, if `update`, $\theta \leftarrow \theta - \eta s [\operatorname{sign}(m) + \lambda\theta]$.

    Args:
        params: $\theta$, each of its own shape `(...)`; changed in place.
        grads: $g$, shapes of `params`; only read. None: nothing is folded in.
        exp_avgs: $m$, shapes of `params`; changed in place.
        kinds: kind of each tensor.
        lr: $\eta$.
        beta: $\beta$.
        weight_decay: $\lambda$.
        share: weight of these gradients in their cycle, $1/k$ for an average.
        folded: whether the momentum was already decayed in this cycle; None means no.
        update: whether this is the last micro-step of the cycle.
        shrink: as in the class.
        center: what a shrunk parameter is pulled to.
        nonfinite: as in the class.
        nonfinite_counts: one 0-d integer tensor per parameter, on its device, to which 1 is added when its gradient is
            not finite; None counts nothing.
        shrink_noise: as in the class.
        rms_floor: as in the class.
        vector_scale: as in the class.
        decay_vectors: whether `weight_decay` holds for vectors as well.
        sign_power: as in the class, a number.
        normalize_power: as in the class.
        rounding: how results are rounded into float16 and bfloat16 parameters.
        foreach: as in the class.
        fused: as in the class.
        maximize: as in the class.

    Returns:
        The indices of the tensors that the compiled step took; `params` and `exp_avgs` hold the result.

    Raises:
        ValueError: the lists differ in length, or an option is out of its range.

    Numerics:
        As in the class.

    Source:
        As in the class.

    Example:
        >>> import torch
        >>> from danlu.optim import tiger
        >>> w, m = torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2)
        >>> _ = tiger([w], [torch.tensor([[0.1, 0.2]])], [m], kinds=["matrix"], lr=0.1, weight_decay=0.0)
        >>> w
        tensor([[ 2.6464, -4.3536]])
    """
    check_lr(lr)
    check_beta("beta", beta)
    for name, value in (
        ("weight_decay", weight_decay),
        ("share", share),
        ("shrink_noise", shrink_noise),
        ("rms_floor", rms_floor),
    ):
        check_real(name, value, low=0.0)
    check_real("shrink", shrink, low=0.0, low_open=True, high=1.0)
    check_real("vector_scale", vector_scale, low=0.0, low_open=True)
    check_real("sign_power", sign_power, low=0.0, high=1.0)
    check_choice("nonfinite", nonfinite, ("shrink", "skip", "off"))
    already = list(folded) if folded is not None else [False] * len(params)
    check_lengths(
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "kinds": kinds,
            "folded": already,
            "nonfinite_counts": nonfinite_counts,
        }
    )
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    step = TigerStep(
        kinds=kinds,
        decays=[1.0 if done else beta for done in already],
        gain=(1 - beta) * share,
        lr=-lr if maximize else lr,
        # Climbing is descending with -lr, except that the decay still pulls towards 0.
        weight_decay=-weight_decay if maximize else weight_decay,
        update=update,
        shrink=shrink if nonfinite == "shrink" else 1.0,
        shrink_noise=shrink_noise,
        center=center,
        guard=nonfinite != "off",
        rms_floor=rms_floor,
        vector_scale=vector_scale,
        decay_vectors=decay_vectors,
        sign_power=sign_power,
        normalize_power=normalize_power,
        rounding=rounding,
    )
    # Powers of the sign have the plain path only.
    simple = None if sign_power == 1.0 else False
    with torch.no_grad():
        return run_tiger(
            params,
            grads,
            exp_avgs,
            nonfinite_counts,
            step,
            foreach=foreach if simple is None else simple,
            fused=fused if simple is None else simple,
        )


def run_tiger(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    counts: Sequence[Tensor] | None,
    step: TigerStep,
    *,
    foreach: bool | None,
    fused: bool | None,
) -> list[int]:
    """Hand every tensor to the path that suits it; returns the indices of those that the compiled step took."""
    if step.shrink_noise > 0 and fused is None and any(param.is_cuda for param in params):
        # The noise is drawn by plain operations.
        fused = False
    kernel = kernel_test(
        "sign_update", params, grads, exp_avgs, fused=fused, foreach=foreach, supported=dtypes_supported
    )

    def takes(i: int) -> bool:
        if kernel is None or not kernel(i):
            return False
        # The kernel's rows are runs of memory.
        param = params[i]
        runs = step.kinds[i] != "embedding" or param.ndim == 0 or param.shape[-1] == 1 or param.stride(-1) == 1
        if fused and not runs:
            raise RuntimeError(
                f"fused=True, but the kernel cannot run on an embedding of shape {tuple(param.shape)}: its rows are "
                f"not contiguous (strides {param.stride()})"
            )
        return runs

    taken: list[int] = []
    for path, indices in plan(params, grads, foreach, None if kernel is None else takes):
        few = replace(step, **step.pick(indices))
        few_counts = None if counts is None else pick(indices, counts)
        lists = pick(indices, params), pick(indices, grads), pick(indices, exp_avgs)
        if path == "fused":
            compiled(prepare_call(lists, few.rounding, **columns(lists[0], few.kinds)), few_counts, few)
            taken += indices
        else:
            run = {"loop": single_tensor, "blocks": blocked, "bucket": multi_tensor}[path]
            run(*lists, few_counts, replace(few, lr=as_float(few.lr)))
    return taken
