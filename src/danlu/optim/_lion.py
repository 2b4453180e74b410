r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

Source: Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_choice, check_real
from danlu.kernels.sign_update import LowPrecision, SignRows, SignUpdate, dtypes_supported
from danlu.optim._base import loss_of
from danlu.optim._lazy_rows import (
    check_lazy,
    fixed_padding,
    is_lazy,
    is_special,
    warn_if_lazy_is_idle,
)
from danlu.optim._nonfinite import (
    Counts,
    all_finite,
    finite_flags,
    is_finite,
    parameter_name,
    raise_if_nonfinite,
)
from danlu.optim._options import as_float, check_beta, check_layouts, check_lr, check_shared_options
from danlu.optim._rounding import Rounding, RoundingMode, Writer, read, resolve_rounding, write
from danlu.optim._row_steps import LazyState, dense, gradient_values, part_number, settle
from danlu.optim._sign_optimizer import SignOptimizer
from danlu.optim._stale_momentum import apply_deadzone, check_deadzone
from danlu.optim._state import (
    add_compensation,
    device_step,
    group_rounding,
    new_state,
)
from danlu.optim._traversal import (
    compute_dtype,
    decayed_add_,
    kernel_test,
    pick,
    plan,
    prepare_call,
    rounded_blocks,
    scratch,
    write_back,
)

__all__ = ["Lion", "lion"]

LionNonfinite = Literal["skip", "raise", "off"]
_NONFINITE = ("skip", "raise", "off")
_DEFAULT_ROUNDING = Rounding()


class Lion(SignOptimizer):
    r"""Lion (EvoLved Sign Momentum): one state tensor, and every element moves by the same amount.

    Definition:
        With the momentum $m_0 = 0$,
        $$u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t), \qquad
        \theta_t = \theta_{t-1} - \eta\,(u_t + \lambda\,\theta_{t-1}), \qquad
        m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t$$
        with $\theta$ = a parameter, $g$ = its gradient (its negative with `maximize=True`), $m$ = the state `exp_avg`,
        $\eta$ = `lr`, $(\beta_1, \beta_2)$ = `betas`, $\lambda$ = `weight_decay` and $\operatorname{sign}(0) = 0$.
        The update uses the momentum before this gradient and the decay the parameter before this update; there is no
        bias correction. Complex parameters use $\operatorname{sgn} z = z/|z|$. With equal betas and $\lambda = 0$ this
        is SIGNUM.

    Args:
        params: parameters, named parameters, or groups of them with their own options, as in torch.
        lr: $\eta \ge 0$, the distance that each element moves per step; a number or a tensor with one element.
        betas: $(\beta_1, \beta_2)$, each in $[0, 1)$; (0.9, 0.99) is the choice for vision, (0.95, 0.98) for language.
        weight_decay: $\lambda \ge 0$, decoupled; the decay per step is $\eta\lambda$.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"skip"`: this tensor and its momentum stay
            as they are for this step. `"raise"`: `RuntimeError` that names the parameters; no tensor is changed.
            `"off"`: not looked for; one such element then spoils its momentum for good.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16.
        seed: of stochastic rounding.
        state_dtype: `torch.float32` keeps the momentum of a low-precision parameter in float32; None in its dtype.
        foreach: True processes many tensors at once (CPU: one after the other in cache-sized blocks; accelerators:
            `torch._foreach_*` calls), False one after the other with plain operations. DTensors and other subclasses
            always take the plain operations.
        fused: True takes one compiled call for all tensors (CPU: C++, compiled on first use by the machine's compiler;
            CUDA: Triton) and raises where it cannot run; None takes it where it can, unless `foreach` is given.
        lazy: kinds of [`parameter_groups`][danlu.optim.parameter_groups] whose rows are updated only where the
            gradient has something to say, usually `("embedding",)`; in a group also True or False. See
            [`mark_rows`][danlu.optim.Lion.mark_rows] for rows that one knows.
        lazy_state: the momentum of the other rows: "decay" goes on decaying (with $\beta_2$, made up for when the row
            is touched again), "freeze" stays.
        sign_deadzone: $\tau \in [0, 1)$; before a step, elements of the momentum with $|m| < \tau\,\mathrm{RMS}(m)$
            become 0, so that an element without gradients is not pushed for ever. Experimental; $10^{-6}$ is a start,
            0 switches it off. Not applied to lazy groups.
        maximize: climb instead of descend; the momentum then still averages the gradients as they come.
        capturable: keep what changes from step to step on the device, so that a CUDA graph of the fused step replays as
            the step would run; give `lr` as a tensor there if it is to change.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: `lr` < 0, a beta outside $[0, 1)$, `weight_decay` < 0, or an unknown `nonfinite`; also in a group.
        RuntimeError: from `step` on a gradient that is neither dense nor sparse by coordinates, on a bad gradient with
            `nonfinite="raise"`, or where `fused=True` cannot run.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded as `rounding` says. A multiplication of all
        gradients by a power of two changes nothing, short of overflow and underflow. The paths agree to the rounding
        of their arithmetic, not bit for bit.

    Cost:
        4 bytes of state and 20 bytes of memory traffic per float32 parameter, 24 with the look for bad gradients where
        the gradient does not fit into the cache. Temporaries: none (fused), one block (CPU) or one bucket of tensors
        (accelerators). Lazy rows: the same for the touched rows, 4 bytes of state per row, and for a dense gradient the
        search, one read of it; on accelerators that waits for the device. A sparse gradient without lazy rows is made
        dense first.

    Differences:
        The decay is computed as $\eta(u + \lambda\theta)$, not as a factor $1 - \eta\lambda$, which float32 would round
        by several percent of a typical $\eta\lambda = 10^{-6}$. Other implementations let one NaN freeze a coordinate
        and one Inf march it away, and negate `p.grad` in place under `maximize`; here `p.grad` is never written.

    Source:
        Chen et al. (2023), arXiv 2302.06675, algorithm 2; "Google新搜出的优化器Lion：效率与效果兼得的“训练狮”"
        (2023-02-16).

    Example:
        >>> import torch
        >>> from danlu.optim import Lion
        >>> w = torch.nn.Parameter(torch.tensor([0.5, -1.0, 0.0]))
        >>> optimizer = Lion([w], lr=0.1, weight_decay=0.1)
        >>> w.grad = torch.tensor([1.0, -2.0, 0.0])
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.3950, -0.8900,  0.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        nonfinite: LionNonfinite = "skip",
        rounding: RoundingMode | None = None,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        lazy: bool | Sequence[str] = (),
        lazy_state: LazyState = "decay",
        sign_deadzone: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "seed": seed,
            "state_dtype": state_dtype,
            "foreach": foreach,
            "fused": fused,
            "lazy": lazy,
            "lazy_state": lazy_state,
            "sign_deadzone": sign_deadzone,
            "maximize": maximize,
            "capturable": capturable,
            # Calls of `step`: part of the checkpoint, since the bits of stochastic rounding depend on it.
            "step": 0,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)
        warn_if_lazy_is_idle("Lion", lazy, self.param_groups)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])
        check_shared_options(group, _NONFINITE)
        check_lazy(group)
        check_deadzone(group["sign_deadzone"])

    @classmethod
    def from_adamw(
        cls,
        params: ParamsT,
        adamw_lr: float,
        adamw_weight_decay: float,
        ratio: float = 10.0,
        betas: tuple[float, float] = (0.9, 0.99),
        **options: Any,
    ) -> "Lion":
        """Lion with `lr = adamw_lr / ratio` and `weight_decay = adamw_weight_decay * ratio`.

        The decay per step, their product, is then that of AdamW; the paper advises a ratio of 3 to 10. `options` are
        the keyword options of the class; a misspelt one is refused there.
        """
        check_real("adamw_lr", adamw_lr, low=0.0)
        check_real("adamw_weight_decay", adamw_weight_decay, low=0.0)
        check_real("ratio", ratio, low=0.0, low_open=True)
        return cls(params, adamw_lr / ratio, betas, adamw_weight_decay * ratio, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        calls = [
            None if is_special(group) else self._calls.find(g, group, grads[g], self.state)
            for g, group in enumerate(self.param_groups)
        ]
        if None in calls:
            check_layouts("Lion", self.param_groups)
        raise_if_nonfinite(
            {
                parameter_name(self.param_groups, g, i): gradient_values(grad)
                for g, group in enumerate(self.param_groups)
                if group["nonfinite"] == "raise"
                for i, grad in enumerate(grads[g])
                if grad is not None
            }
        )
        number = 0
        for g, group in enumerate(self.param_groups):
            call = calls[g]
            if call is None:
                self._step_group(g, group, grads[g], number)
            else:
                _call_lion(
                    call,
                    Counts(self._nonfinite_counts, group["params"]),
                    lr=group["lr"],
                    betas=group["betas"],
                    weight_decay=group["weight_decay"],
                    guard=group["nonfinite"] == "skip",
                    maximize=group["maximize"],
                    rounding=Rounding(group["rounding"], group["seed"], self._bits_step(group)),
                )
            number += len(group["params"])
            group["step"] += 1
            if group["capturable"]:
                group["device_step"].add_(1)
        self._rows.clear()
        return loss

    def _bits_step(self, group: dict[str, Any]) -> int | Tensor:
        return device_step(group, "device_step", group["step"])

    def _step_group(self, g: int, group: dict[str, Any], grads: Sequence[Tensor | None], first: int) -> None:
        """One group, whatever its tensors are; `first` is the number of its first parameter among all."""
        chosen = [i for i, grad in enumerate(grads) if grad is not None]
        params = pick(chosen, group["params"])
        states: list[dict[str, Any]] = []
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state.update(new_state(param, group))
            add_compensation(state, param, group)
            states.append(state)
        numbers = [first + i for i in chosen]
        counts, step = list(Counts(self._nonfinite_counts, params)), self._bits_step(group)
        fused: list[int] = []
        with fixed_padding(group, params):
            if is_lazy(group):
                for param, state, count, number in zip(params, states, counts, numbers, strict=True):
                    update = partial(_lion_rows, group, step, count, number)
                    self._rows.step(
                        param,
                        param.grad,
                        state,
                        group,
                        update,
                        beta=group["betas"][1],
                        bad=count,
                        in_place=partial(_lion_in_place, group),
                    )
            else:
                for state in states:
                    settle(state, group["betas"][1])
                    apply_deadzone(state["exp_avg"], group["sign_deadzone"])
                whole = [dense(grad) for grad in grads if grad is not None]
                fused = _lion_of_group(group, step, params, whole, states, counts, numbers)
        self._calls.keep(g, group, fused, self.state, numbers)


def _lion_of_group(
    group: Mapping[str, Any],
    step: int | Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    counts: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    guard: bool = True,
) -> list[int]:
    """`lion` with the options of a group; `step` and the parameters' `numbers` among all are for the random bits."""
    return lion(
        params,
        grads,
        [state["exp_avg"] for state in states],
        lr=group["lr"],
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        nonfinite="skip" if guard and group["nonfinite"] == "skip" else "off",
        nonfinite_counts=counts,
        rounding=group_rounding(group, step, numbers, states),
        foreach=group["foreach"],
        fused=group["fused"],
        maximize=group["maximize"],
    )


def _lion_rows(
    group: Mapping[str, Any],
    step: int | Tensor,
    count: Tensor,
    number: int,
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Tensor],
    folded: bool,
    guard: bool,
    part: int,
) -> None:
    """`lion` as `step_rows` calls it, on some rows of one tensor."""
    if grad is not None:
        _lion_of_group(group, step, [param], [grad], [state], [count], [part_number(number, part)], guard=guard)


def _lion_in_place(
    group: Mapping[str, Any],
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor,
    factors: Tensor,
    folded: bool,
) -> None:
    """`lion` as `step_rows` calls it, on rows where they lie."""
    del folded
    mode = resolve_rounding(group["rounding"], param.dtype)
    call = SignRows(
        param, grad, state["exp_avg"], rows, factors, compensation=state["compensation"] if mode == "kahan" else None
    )
    lr, weight_decay = group["lr"], group["weight_decay"]
    if group["maximize"]:
        lr, weight_decay = -lr, -weight_decay
    call.step_lion(lr=lr, betas=group["betas"], weight_decay=weight_decay, low=LowPrecision(mode))


def lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    nonfinite: LionNonfinite = "skip",
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
        nonfinite: as in the class.
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
    _check_betas(betas)
    check_real("weight_decay", weight_decay, low=0.0)
    check_choice("nonfinite", nonfinite, _NONFINITE)
    lengths = {"params": len(params), "grads": len(grads), "exp_avgs": len(exp_avgs)}
    if nonfinite_counts is not None:
        lengths["nonfinite_counts"] = len(nonfinite_counts)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have one length, got {lengths}")
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
                _call_lion(
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
            update = {"loop": _single_tensor_lion, "blocks": _blocked_lion, "bucket": _multi_tensor_lion}[path]
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


def _call_lion(
    call: SignUpdate,
    counts: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
    maximize: bool,
    rounding: Rounding,
) -> None:
    """The compiled step."""
    call.lion(
        lr=-lr if maximize else lr,
        betas=betas,
        weight_decay=-weight_decay if maximize else weight_decay,
        guard=guard,
        low=LowPrecision(resolve_rounding(rounding.mode, call.params[0].dtype), rounding.seed, rounding.step),
        counts=counts,
    )


def _single_tensor_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other paths."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        theta, grad, exp_avg = read(param, writers[i]), grads[i].to(dtype), exp_avgs[i].to(dtype)
        finite = all_finite(grad) if guard else None
        if finite is not None:
            # lerp(m, m, w) is m, bit for bit.
            grad = torch.where(finite, grad, exp_avg)
            if counts is not None:
                counts[i].add_(~finite)
        update = torch.lerp(exp_avg, grad, 1 - betas[0]).sgn_()
        if weight_decay != 0:
            update.add_(theta, alpha=weight_decay)
        if finite is not None:
            update = torch.where(finite, update, torch.zeros_like(update))
        write(param, theta.add_(update, alpha=-lr), writers[i])
        write_back(exp_avgs[i], exp_avg.lerp_(grad, 1 - betas[1]))


def _blocked_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """On the CPU: all passes over a block but the first find it in the cache."""
    memory: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(params):
        if guard and not is_finite(grads[i]):
            if counts is not None:
                counts[i].add_(1)
            continue
        dtype = compute_dtype(param.dtype)
        for (param_block, grad_block, exp_avg_block), writer in rounded_blocks(
            (param, grads[i], exp_avgs[i]), writers[i]
        ):
            theta, grad, exp_avg = read(param_block, writer), grad_block.to(dtype), exp_avg_block.to(dtype)
            update = torch.lerp(exp_avg, grad, 1 - betas[0], out=scratch(memory, theta)).sgn_()
            write_back(exp_avg_block, exp_avg.lerp_(grad, 1 - betas[1]))
            decayed_add_(theta, update, lr, weight_decay)
            write(param_block, theta, writer)


def _multi_tensor_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    writers: list[Writer | None],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """On accelerators: one bucket of tensors of one dtype; which gradients are finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    thetas = [read(param, writer) for param, writer in zip(params, writers, strict=True)]
    gradients, momenta = ([tensor.to(dtype) for tensor in tensors] for tensors in (grads, exp_avgs))
    finite = finite_flags(gradients) if guard else None
    if finite is not None:
        gradients = [torch.where(f, g, m) for f, g, m in zip(finite, gradients, momenta, strict=True)]
        if counts is not None:
            torch._foreach_add_(counts, list((~finite).to(torch.int64).unbind()))
    updates = torch._foreach_lerp(momenta, gradients, 1 - betas[0])
    torch._foreach_sign_(updates)
    if weight_decay != 0:
        torch._foreach_add_(updates, thetas, alpha=weight_decay)
    if finite is not None:
        torch._foreach_mul_(updates, list(finite.to(dtype).unbind()))
    torch._foreach_add_(thetas, updates, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1 - betas[1])
    for param, theta, writer in zip(params, thetas, writers, strict=True):
        write(param, theta, writer)
    if momenta[0] is not exp_avgs[0]:
        torch._foreach_copy_(exp_avgs, momenta)


def _check_betas(betas: tuple[float, float]) -> None:
    # A checkpoint that went through JSON gives back a list.
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    check_beta("betas[0]", betas[0])
    check_beta("betas[1]", betas[1])
