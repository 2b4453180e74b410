r"""Tiger (Tight-fisted Optimizer): sign of one momentum, relative step sizes, accumulation inside the momentum.

Source: "Tiger：一个'抠'到极致的优化器" (2023-03-07), reference code github bojone/tiger; 8634 (2021-08-24) for the
accumulation.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.optim._cycle import new_cycle
from danlu.optim._in_backward import data_parallel_model
from danlu.optim._lazy_rows import check_lazy, warn_if_lazy_is_idle
from danlu.optim._nonfinite import Nonfinite
from danlu.optim._options import check_beta, check_shared_options, check_switches
from danlu.optim._param_groups import KINDS, parameter_groups
from danlu.optim._rounding import RoundingMode
from danlu.optim._row_steps import LazyState
from danlu.optim._schedules import PiecewiseLinear, schedule_points
from danlu.optim._stale_momentum import check_deadzone
from danlu.optim._tiger_steps import TigerSteps

__all__ = ["Tiger"]


class Tiger(TigerSteps):
    r"""Tiger: Lion with one beta, steps relative to the size of a tensor, and gradient accumulation without a buffer.

    Definition:
        With $m_0 = 0$, micro-steps $t = 0, 1, \dots$ and $k$ = `grad_accum_steps`,
        $$m_t = b_1 m_{t-1} + b_2 g_t, \qquad
        \theta_t = \theta_{t-1} - \eta\,s(\theta_{t-1})\,[\operatorname{sign}(m_t) + \lambda\,\theta_{t-1}]
        \ \text{ if } k \mid t + 1, \text{ else } \theta_{t-1}$$
        where $b_1 = \beta$ on the first micro-step of a cycle of $k$ and 1 on the others, and $b_2 = (1-\beta)/k$. This
        equals averaging the $k$ gradients and taking one step. The scale $s$ goes by the kind of the tensor:

        - `vector` and `norm_scale`: `vector_scale`, without decay;
        - `embedding`: $\max(\mathrm{RMS}, r_{\min})$ of each row;
        - `matrix`: $\max(\mathrm{RMS}, r_{\min})$ of the whole tensor.

        With $\theta$ = a parameter, $g$ = its gradient, $m$ = the state `exp_avg`, $\eta$ = `lr`, $\beta$ = `beta`,
        $\lambda$ = `weight_decay`, $r_{\min}$ = `rms_floor`. A gradient that is not finite: see `nonfinite`.

    Args:
        params: a model, whose parameters are grouped by [`parameter_groups`][danlu.optim.parameter_groups]; or groups
            that carry `kind`; or parameters, named or not, whose kinds are then guessed from their number of axes,
            with a warning.
        lr: $\eta \ge 0$, relative to the size of a tensor; $10^{-3}$ to $2\cdot10^{-3}$ for pre-training. A number or a
            tensor with one element.
        beta: $\beta \in [0, 1)$; 0.965 for language, 0.945 for vision (means of Lion's pairs).
        weight_decay: $\lambda \ge 0$ for kinds `embedding` and `matrix`; the decay per step is $\eta s \lambda$.
        grad_accum_steps: $k \ge 1$, calls of `step` per update. Call `step` and `zero_grad` after every micro-batch and
            do not divide the loss by $k$. It can change between cycles, not within one.
        average: whether a gradient counts $1/k$; False for loops that divide the loss themselves. For micro-batches of
            unequal size assign `optimizer.micro_weight` (their share of the cycle) before each `step` instead.
        shrink: $r \in (0, 1]$, factor of the rescue below.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"shrink"`: the momentum stays as it is and
            the parameter becomes $c + (\theta - c)\,r$, with $c$ the group's `center` (1 for the gain of a norm). It
            rescues a run that meets bad gradients in half precision; it is no cure for a too large `lr`. `"skip"`: the
            tensor and its momentum stay as they are for this micro-step. `"raise"`: `RuntimeError` that names the
            parameters; no tensor is changed. `"off"`: not looked for.
        shrink_noise: standard deviation of Gaussian noise that is added to a tensor when it shrinks, as a fraction of
            its RMS; $\ge 0$.
        rms_floor: smallest RMS that is used, $\ge 0$. With 0, as in the original, a tensor that starts at zero (the
            second matrix of LoRA, a zero-initialized head) never moves.
        vector_scale: $s > 0$ of vectors.
        sign_power: $\gamma \in [0, 1]$ of the direction $\operatorname{sign}(m)\,|m|^{1-\gamma}$, from 1 (Tiger) to 0
            (the momentum itself); or a function of the ratio of the current to the initial learning rate, such as
            `lambda ratio: ratio` or `math.sqrt`. With $\gamma < 1$ the unit of `lr` changes: rescale it, or use
            `normalize_power`. It takes the plain operations.
        normalize_power: whether the direction is divided by its RMS where `sign_power` is not 1.
        tensor_clip_norm: largest norm of one gradient tensor, to which larger ones are scaled down before they are
            folded in; None: no limit. A norm over all parameters is not known inside the backward pass, and a sign
            does not need it.
        lr_schedule: `{step: factor}` for [`piecewise_linear`][danlu.optim.piecewise_linear] over the micro-steps, as
            sugar; `lr` in the groups then stays as it is. None: no schedule of its own.
        in_backward: whether gradients are folded in during the backward pass, each as soon as it is there, and freed
            (see Cost). Call `step` once after every backward pass as before; between two calls, a parameter may have
            one gradient. Under `DistributedDataParallel`, which keeps buckets of all gradients anyway, give the
            wrapped model as `params`.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16.
        seed: of stochastic rounding and of `shrink_noise`.
        state_dtype: `torch.float32` keeps the momentum of a low-precision parameter in float32; None in its dtype.
        foreach: True processes many tensors at once (CPU: one after the other in cache-sized blocks; accelerators:
            `torch._foreach_*` calls), False one after the other with plain operations. DTensors and other subclasses
            always take the plain operations.
        fused: True takes one compiled call for all tensors (CPU: C++, compiled on first use by the machine's compiler;
            CUDA: Triton) and raises where it cannot run; None takes it where it can, unless `foreach` is given.
        lazy: kinds whose rows are updated only where the gradient has something to say, usually `("embedding",)`; in a
            group also True or False. With accumulation a row counts if any micro-step of the cycle touched it. See
            [`mark_rows`][danlu.optim.Tiger.mark_rows] for rows that one knows.
        lazy_state: the momentum of the other rows: "decay" goes on decaying (made up for when the row is touched
            again), "freeze" stays.
        sign_deadzone: $\tau \in [0, 1)$; at the start of a cycle, elements of the momentum with
            $|m| < \tau\,\mathrm{RMS}(m)$ become 0, so that an element without gradients is not pushed for ever.
            Experimental; $10^{-6}$ is a start, 0 switches it off. Not applied to lazy groups.
        maximize: climb instead of descend.
        capturable: keep what changes from step to step on the device, so that a CUDA graph of the fused step replays as
            the step would run; give `lr` as a tensor there if it is to change.
            Only with `grad_accum_steps=1` and without `in_backward`.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range, or a kind is unknown; also in a group.
        RuntimeError: from `step` on a gradient that is complex, or neither dense nor sparse by coordinates, when
            `grad_accum_steps` changed within a cycle, on a bad gradient with `nonfinite="raise"`, where `fused=True`
            cannot run, or when the gradients of a `DistributedDataParallel` were not averaged (`no_sync`); with
            `in_backward`, the last and a second gradient within one micro-step are raised from the backward pass.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded as `rounding` says. A positive factor on all
        gradients changes nothing: loss scaling has no effect. With loss scaling and `in_backward`, assign the scale to
        `optimizer.grad_scale` before the backward pass; gradients are divided by it, so that a momentum never mixes
        scales.

    Cost:
        4 bytes of state per float32 parameter and no buffer for accumulation; 24 bytes of memory traffic, 28 with the
        look for bad gradients where the tensor does not fit into the cache. With `in_backward` weights, state and
        gradients together take 8 bytes per float32 parameter and the largest single gradient. Temporaries: none
        (fused), one block (CPU) or one bucket of tensors (accelerators). Lazy rows: the same for the touched rows, 4
        bytes of state per row, and for a dense gradient the search, one read of it; on accelerators that waits for the
        device. A sparse gradient without lazy rows is made dense first.

    Differences:
        `rms_floor` is ours; it equals the reference wherever the RMS is at least the floor. The reference looks for
        NaN only; here infinities count as well. As in the reference, a bad gradient on the last micro-step of a cycle
        loses the cycle's update of its tensor, and one on the first loses the decay of its momentum. A tensor that has
        a gradient on some micro-steps only is treated as if it were zero on the others; without any, it is left alone.

    Source:
        "Tiger：一个'抠'到极致的优化器" (2023-03-07) and github bojone/tiger; kexue.fm article 8634 (2021-08-24) for the
        accumulation.

    Example:
        >>> import torch
        >>> from danlu.optim import Tiger
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Tiger(model, lr=0.01, grad_accum_steps=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2)).sum().backward()
        ...     optimizer.step()
        >>> optimizer.micro_step
        4
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        grad_accum_steps: int = 1,
        average: bool = True,
        shrink: float = 0.99,
        nonfinite: Nonfinite = "shrink",
        shrink_noise: float = 0.0,
        rms_floor: float = 1e-3,
        vector_scale: float = 0.5,
        sign_power: float | Callable[[float], float] = 1.0,
        normalize_power: bool = False,
        tensor_clip_norm: float | None = None,
        lr_schedule: Mapping[int, float] | None = None,
        in_backward: bool = False,
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
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "grad_accum_steps": grad_accum_steps,
            "average": average,
            "shrink": shrink,
            "nonfinite": nonfinite,
            "shrink_noise": shrink_noise,
            "rms_floor": rms_floor,
            "vector_scale": vector_scale,
            "tensor_clip_norm": tensor_clip_norm,
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
            "kind": None,
            "center": 0.0,
            **new_cycle(grad_accum_steps),
        }
        self._check_group(defaults)
        check_switches(in_backward=in_backward, normalize_power=normalize_power)
        if not callable(sign_power):
            check_real("sign_power", sign_power, low=0.0, high=1.0)
        if in_backward and nonfinite == "raise":
            raise ValueError("nonfinite='raise' cannot leave all tensors unchanged with in_backward=True")
        if in_backward and capturable:
            raise ValueError("capturable=True cannot be combined with in_backward=True")
        schedule = None if lr_schedule is None else PiecewiseLinear(schedule_points(lr_schedule, from_zero=True))
        model = data_parallel_model(params)
        inner = params if model is None else model.module
        super().__init__(
            parameter_groups(inner) if isinstance(inner, nn.Module) else inner,
            defaults,
            sign_power=sign_power,
            normalize_power=normalize_power,
            schedule=schedule,
            in_backward=in_backward,
        )
        if any(group["kind"] is None for group in self.param_groups):
            warnings.warn(
                "Tiger got parameters without their kinds and guesses from the number of axes, so embeddings and norm "
                "gains are treated as any matrix and vector; pass the model or danlu.optim.parameter_groups(model)",
                stacklevel=2,
            )
        warn_if_lazy_is_idle("Tiger", lazy, self.param_groups)
        self._connect(model)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_shared_options(group)
        check_beta("beta", group["beta"])
        check_integer("grad_accum_steps", group["grad_accum_steps"], low=1)
        check_real("shrink_noise", group["shrink_noise"], low=0.0)
        check_real("rms_floor", group["rms_floor"], low=0.0)
        check_real("vector_scale", group["vector_scale"], low=0.0, low_open=True)
        check_lazy(group)
        check_deadzone(group["sign_deadzone"])
        if group["tensor_clip_norm"] is not None:
            check_real("tensor_clip_norm", group["tensor_clip_norm"], low=0.0, low_open=True)
        check_switches(average=group["average"])
        if group["capturable"] and group["grad_accum_steps"] > 1:
            raise ValueError(f"grad_accum_steps must be 1 with capturable=True, got {group['grad_accum_steps']}")
        if group["kind"] is not None:
            check_choice("kind", group["kind"], KINDS)
