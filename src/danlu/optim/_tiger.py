r"""Tiger (Tight-fisted Optimizer): sign of one momentum, relative step sizes, accumulation inside the momentum.

Source: "Tiger：一个'抠'到极致的优化器" (2023-03-07), reference code github bojone/tiger; 8634 (2021-08-24) for the
accumulation.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.kernels.sign_update import LowPrecision, SignRows, dtypes_supported
from danlu.optim._base import loss_of
from danlu.optim._in_backward import BackwardHooks, data_parallel_model, refuse_local_gradients
from danlu.optim._lazy_rows import (
    check_lazy,
    fixed_padding,
    is_lazy,
    is_special,
    warn_if_lazy_is_idle,
)
from danlu.optim._nonfinite import Counts, parameter_name, raise_if_nonfinite
from danlu.optim._options import as_float, check_beta, check_layouts, check_lr, check_shared_options
from danlu.optim._param_groups import DECAYED, KINDS, Kind, kind_by_shape, parameter_groups
from danlu.optim._rounding import Rounding, RoundingMode, resolve_rounding
from danlu.optim._row_steps import LazyState, dense, gradient_values, part_number, settle
from danlu.optim._schedules import PiecewiseLinear, schedule_points
from danlu.optim._sign_optimizer import SignOptimizer
from danlu.optim._stale_momentum import apply_deadzone, check_deadzone
from danlu.optim._state import (
    add_compensation,
    device_step,
    group_rounding,
    new_state,
)
from danlu.optim._tiger_paths import (
    TigerStep,
    blocked,
    columns,
    compiled,
    multi_tensor,
    root_mean_square,
    single_tensor,
)
from danlu.optim._traversal import kernel_test, pick, plan, prepare_call

__all__ = ["Tiger", "tiger"]

TigerNonfinite = Literal["shrink", "skip", "raise", "off"]
_NONFINITE = ("shrink", "skip", "raise", "off")
_DEFAULT_ROUNDING = Rounding()
_PATHS = ("foreach", "fused")


class Tiger(SignOptimizer):
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

    _copied: ClassVar[tuple[str, ...]] = (
        *SignOptimizer._copied,
        "_warned_of_floor",
        "_sign_power",
        "_normalize_power",
        "_schedule",
        "_in_backward",
        "micro_weight",
        "grad_scale",
    )

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
        nonfinite: TigerNonfinite = "shrink",
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
            # The place in the accumulation cycle is part of the checkpoint, so it lives in the groups.
            "micro_step": 0,
            "cycle_start": 0,
            "cycle_length": grad_accum_steps,
        }
        self._check_group(defaults)
        _check_switches(in_backward=in_backward, normalize_power=normalize_power)
        if not callable(sign_power):
            check_real("sign_power", sign_power, low=0.0, high=1.0)
        if in_backward and nonfinite == "raise":
            raise ValueError("nonfinite='raise' cannot leave all tensors unchanged with in_backward=True")
        if in_backward and capturable:
            raise ValueError("capturable=True cannot be combined with in_backward=True")
        self.micro_weight: float | None = None
        self.grad_scale: float | Tensor | None = None
        self._sign_power = sign_power
        self._normalize_power = normalize_power
        self._schedule = None if lr_schedule is None else PiecewiseLinear(schedule_points(lr_schedule, from_zero=True))
        self._in_backward = in_backward
        self._warned_of_floor = False
        self._hooks: BackwardHooks | None = None
        # Parameters whose gradients of this micro-step were folded in already, and where each parameter is.
        self._received: set[Tensor] = set()
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._local_gradients = False
        model = data_parallel_model(params)
        inner = params if model is None else model.module
        super().__init__(parameter_groups(inner) if isinstance(inner, nn.Module) else inner, defaults)
        if any(group["kind"] is None for group in self.param_groups):
            warnings.warn(
                "Tiger got parameters without their kinds and guesses from the number of axes, so embeddings and norm "
                "gains are treated as any matrix and vector; pass the model or danlu.optim.parameter_groups(model)",
                stacklevel=2,
            )
        warn_if_lazy_is_idle("Tiger", lazy, self.param_groups)
        if in_backward:
            self._hooks = BackwardHooks(self._places, self._receive, model)
        elif model is not None:
            model.register_forward_pre_hook(self._note_synchronization)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_shared_options(group, _NONFINITE)
        check_beta("beta", group["beta"])
        check_integer("grad_accum_steps", group["grad_accum_steps"], low=1)
        check_real("shrink", group["shrink"], low=0.0, low_open=True, high=1.0)
        check_real("shrink_noise", group["shrink_noise"], low=0.0)
        check_real("rms_floor", group["rms_floor"], low=0.0)
        check_real("vector_scale", group["vector_scale"], low=0.0, low_open=True)
        check_real("center", group["center"])
        check_lazy(group)
        check_deadzone(group["sign_deadzone"])
        if group["tensor_clip_norm"] is not None:
            check_real("tensor_clip_norm", group["tensor_clip_norm"], low=0.0, low_open=True)
        _check_switches(average=group["average"])
        if group["capturable"] and group["grad_accum_steps"] > 1:
            raise ValueError(f"grad_accum_steps must be 1 with capturable=True, got {group['grad_accum_steps']}")
        if group["kind"] is not None:
            check_choice("kind", group["kind"], KINDS)

    def _later_options(self) -> dict[str, Any]:
        return {"rounding": None, "seed": 0}

    def _note_synchronization(self, model: Any, _: object) -> None:
        if torch.is_grad_enabled():
            self._local_gradients = not model.require_backward_grad_sync

    @property
    def micro_step(self) -> int:
        """Calls of `step` so far."""
        return max((group["micro_step"] for group in self.param_groups), default=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if param_group.get("kind") in set(KINDS) - DECAYED:
                param_group.setdefault("weight_decay", 0.0)
            if self.param_groups:
                # A new group joins the cycle that is under way.
                running = self.param_groups[0]
                param_group |= {key: running[key] for key in ("micro_step", "cycle_start", "cycle_length")}
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            self._places[param] = (len(self.param_groups) - 1, i)
            if self._hooks is not None:
                self._hooks.add(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_hooks" not in self.__dict__:
            # A copy: its parameters have no hooks yet.
            self._received, self._local_gradients = set(), False
            self._places = {
                param: (g, i) for g, group in enumerate(self.param_groups) for i, param in enumerate(group["params"])
            }
            self._hooks = BackwardHooks(self._places, self._receive, None) if self._in_backward else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the optimizer owns copies of its tensors, in the dtypes in which they were saved."""
        super().load_state_dict(state_dict)
        # Gradients of a micro-step that was given up belong to the state before.
        self._received.clear()

    def remove_backward_hooks(self) -> None:
        """Undo `in_backward`: from now on gradients stay in `.grad` until `step`."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks, self._in_backward = None, False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Fold every gradient into its momentum, and update the parameters on the last micro-step of a cycle."""
        loss = loss_of(closure)
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        calls = [self._prepared(g, group, grads[g]) for g, group in enumerate(self.param_groups)]
        if None in calls:
            check_layouts("Tiger", self.param_groups)
            self._check_types()
        self._check_step(grads)
        self._warn_of_floor()
        for g, group in enumerate(self.param_groups):
            call, last = calls[g], self._begin_cycle(group)
            if call is None:
                chosen = [i for i, param in enumerate(group["params"]) if self._takes_part(param, grads[g][i])]
                fused = self._micro_step(g, chosen, pick(chosen, grads[g])) if chosen else []
                if not self._in_backward and None not in grads[g]:
                    kinds = [group["kind"] or kind_by_shape(param) for param in group["params"]]
                    numbers = self._numbers(g, chosen)
                    self._calls.keep(g, group, fused, self.state, numbers, **columns(group["params"], kinds))
            else:
                compiled(
                    call,
                    Counts(self._nonfinite_counts, group["params"]),
                    self._step_numbers(g, range(len(grads[g])), last),
                )
            group["micro_step"] += 1
            if group["capturable"] and "device_step" in group:
                group["device_step"].add_(1)
            if last:
                group["cycle_start"] = group["micro_step"]
        for param in self._received:
            # DistributedDataParallel puts the average into .grad after the hand-over.
            param.grad = None
        self._received.clear()
        self._rows.clear()
        return loss

    def _prepared(self, g: int, group: dict[str, Any], grads: list[Tensor | None]) -> Any:
        plain = self._plain_sign() and group["tensor_clip_norm"] is None and not is_special(group)
        usable = plain and not self._in_backward
        return self._calls.find(g, group, grads, self.state) if usable else None

    def _takes_part(self, param: Tensor, grad: Tensor | None) -> bool:
        """Whether a tensor has a gradient, or had one in this cycle; not if the backward pass saw to it already."""
        if param in self._received:
            return False
        return grad is not None or (param in self.state and bool(self.state[param].get("folded", False)))

    def _receive(self, param: Tensor, grad: Tensor) -> None:
        """One gradient, during the backward pass."""
        if param in self._received:
            raise RuntimeError(
                f"{self._name(param)} got a second gradient before step() was called; with in_backward=True call it "
                "after every backward pass"
            )
        g, i = self._places[param]
        group = self.param_groups[g]
        if param.is_complex():
            self._check_types()
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        with torch.no_grad():
            self._check_cycle(group)
            self._begin_cycle(group)
            self._micro_step(g, [i], [grad])
        self._received.add(param)

    def _begin_cycle(self, group: dict[str, Any]) -> bool:
        """Fix the length of the cycle at its first micro-step; returns whether this is the last."""
        if group["micro_step"] == group["cycle_start"]:
            group["cycle_length"] = group["grad_accum_steps"]
        return bool(group["micro_step"] + 1 == group["cycle_start"] + group["cycle_length"])

    def _micro_step(self, g: int, chosen: Sequence[int], grads: list[Tensor | None]) -> list[int]:
        """One micro-step of the parameters `chosen` of group `g`; returns which of them the compiled step took."""
        group = self.param_groups[g]
        last = self._begin_cycle(group)
        params = pick(chosen, group["params"])
        states: list[dict[str, Any]] = []
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state.update(new_state(param, group))
            add_compensation(state, param, group)
            states.append(state)
        if group["tensor_clip_norm"] is not None:
            grads = [None if grad is None else _clipped(grad, group["tensor_clip_norm"]) for grad in grads]
        first = [not state.get("folded", False) for state in states]
        numbers = self._step_numbers(g, chosen, last)
        paths: dict[str, bool | None] = {name: group[name] if self._plain_sign() else False for name in _PATHS}
        counts = list(Counts(self._nonfinite_counts, params))
        with fixed_padding(group, params):
            if is_lazy(group):
                for i, (param, count) in enumerate(zip(params, counts, strict=True)):
                    numbers_of_it = replace(numbers, **numbers.pick([i]))
                    update = partial(_tiger_rows, numbers_of_it, count, group["beta"], paths)
                    self._rows.step(
                        param,
                        grads[i],
                        states[i],
                        group,
                        update,
                        beta=group["beta"],
                        bad=count,
                        in_place=partial(_tiger_in_place, numbers_of_it, group["beta"]),
                        simple=self._plain_sign(),
                        first=first[i],
                        last=last,
                        row_wise=numbers.is_row_wise(i, param),
                    )
                return []
            for fresh, state in zip(first, states, strict=True):
                settle(state, group["beta"])
                if fresh:
                    apply_deadzone(state["exp_avg"], group["sign_deadzone"])
            return _run(
                params,
                [None if grad is None else dense(grad) for grad in grads],
                [state["exp_avg"] for state in states],
                counts,
                numbers,
                **paths,
            )

    def _step_numbers(self, g: int, chosen: Sequence[int], last: bool) -> TigerStep:
        """The numbers of this micro-step; marks the tensors as folded in this cycle."""
        group = self.param_groups[g]
        params = pick(chosen, group["params"])
        states = [self.state[param] for param in params]
        decays = [1.0 if state.get("folded", False) else group["beta"] for state in states]
        if group["cycle_length"] > 1:
            for state in states:
                # A bad first gradient loses the decay, as in the reference: nobody waits for the device to know of it.
                state["folded"] = not last
        share = 1.0 / group["cycle_length"] if group["average"] else 1.0
        if self.micro_weight is not None:
            share = self.micro_weight
        rate = group["lr"]
        if self._schedule is not None:
            rate = rate * self._schedule(group["micro_step"])
        return TigerStep(
            kinds=[group["kind"] or kind_by_shape(param) for param in params],
            decays=decays,
            gain=(1 - group["beta"]) * share,
            lr=-rate if group["maximize"] else rate,
            # Climbing is descending with -lr, except that the decay still pulls towards 0.
            weight_decay=-group["weight_decay"] if group["maximize"] else group["weight_decay"],
            update=last,
            shrink=group["shrink"] if group["nonfinite"] == "shrink" else 1.0,
            shrink_noise=group["shrink_noise"],
            center=group["center"],
            guard=group["nonfinite"] in ("shrink", "skip"),
            rms_floor=group["rms_floor"],
            vector_scale=group["vector_scale"],
            decay_vectors=group["kind"] is not None,
            sign_power=self._power(group, rate),
            normalize_power=self._normalize_power,
            rounding=group_rounding(
                group,
                device_step(group, "device_step", group["micro_step"]),
                self._numbers(g, chosen),
                states,
            ),
        )

    def _numbers(self, g: int, chosen: Sequence[int]) -> list[int]:
        """The numbers of parameters of a group among all parameters, which decide their random bits."""
        first = sum(len(group["params"]) for group in self.param_groups[:g])
        return [first + i for i in chosen]

    def _plain_sign(self) -> bool:
        return not callable(self._sign_power) and self._sign_power == 1.0

    def _power(self, group: dict[str, Any], lr: float | Tensor) -> float:
        if not callable(self._sign_power):
            return float(self._sign_power)
        rate = as_float(lr)
        initial = as_float(group.get("initial_lr", self.defaults["lr"]))
        power = self._sign_power(min(1.0, rate / initial) if initial > 0 else 1.0)
        return check_real("the value of sign_power", power, low=0.0, high=1.0)

    def _name(self, param: Tensor) -> str:
        return parameter_name(self.param_groups, *self._places[param])

    def _warn_of_floor(self) -> None:
        """Once, before the first update: name the tensors that the floor keeps moving. This waits for the device."""
        if self._warned_of_floor or not any(self._begin_cycle(group) for group in self.param_groups):
            return
        self._warned_of_floor = True
        small = [
            parameter_name(self.param_groups, g, i)
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
            if (kind := group["kind"] or kind_by_shape(param)) in DECAYED and param.numel() > 0
            if param.grad is not None or param in self.state
            if root_mean_square(param.detach().float(), kind).min().item() < group["rms_floor"]
        ]
        if small:
            listed = ", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else "")
            warnings.warn(
                f"the RMS of these parameters is below rms_floor, which is used instead (with rms_floor=0, as in the "
                f"original, a zero tensor never moves): {listed}",
                stacklevel=3,
            )

    def _check_types(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.is_complex():
                    raise RuntimeError(f"Tiger does not support complex parameters, got shape {tuple(param.shape)}")

    def _check_cycle(self, group: dict[str, Any]) -> None:
        inside = group["micro_step"] != group["cycle_start"]
        if inside and group["grad_accum_steps"] != group["cycle_length"]:
            raise RuntimeError(
                f"grad_accum_steps changed from {group['cycle_length']} to {group['grad_accum_steps']} within a "
                "cycle; change it after a step that updates"
            )

    def _check_step(self, grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Refuse what would leave a cycle half done, before anything is changed."""
        if self._local_gradients:
            refuse_local_gradients()
        if self.micro_weight is not None:
            check_real("micro_weight", self.micro_weight, low=0.0)
        for group in self.param_groups:
            self._check_cycle(group)
        raise_if_nonfinite(
            {
                parameter_name(self.param_groups, g, i): gradient_values(grad)
                for g, group in enumerate(self.param_groups)
                if group["nonfinite"] == "raise"
                for i, grad in enumerate(grads[g])
                if grad is not None
            }
        )


def _clipped(grad: Tensor, limit: float) -> Tensor:
    """The gradient, scaled down to the norm `limit`; one that is not finite stays so."""
    if grad.is_sparse:
        grad = grad.coalesce()
        values = _clipped(grad.values(), limit)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    norm = torch.linalg.vector_norm(grad)
    return grad * torch.where(norm > limit, limit / norm, torch.ones_like(norm))


def _tiger_rows(
    step: TigerStep,
    count: Tensor,
    beta: float,
    paths: Mapping[str, bool | None],
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Tensor],
    folded: bool,
    guard: bool,
    part: int,
) -> None:
    """One micro-step as `step_rows` calls it, on some rows of one tensor."""
    number, compensation = step.rounding.number(0), state.get("compensation")
    rounding = replace(step.rounding, numbers=[part_number(number, part)], compensations=[compensation])
    step = replace(step, decays=[1.0 if folded else beta], guard=guard, rounding=rounding)
    _run([param], [grad], [state["exp_avg"]], [count], step, **paths)


def _tiger_in_place(
    step: TigerStep,
    beta: float,
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor,
    factors: Tensor,
    folded: bool,
) -> None:
    """One micro-step as `step_rows` calls it, on rows where they lie."""
    mode = resolve_rounding(step.rounding.mode, param.dtype)
    kind = step.kinds[0]
    call = SignRows(
        param,
        grad,
        state["exp_avg"],
        rows,
        factors if folded else factors * beta,
        compensation=state["compensation"] if mode == "kahan" else None,
        row=param.shape[-1] if kind == "embedding" else 0,
        decayed=kind in DECAYED,
    )
    numbers = {
        "lr": step.lr,
        "gain": step.gain,
        "weight_decay": step.weight_decay,
        "vector_scale": step.vector_scale,
        "rms_floor": step.rms_floor,
    }
    call.step_tiger(numbers, decay_vectors=step.decay_vectors, update=step.update, low=LowPrecision(mode))


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
    lengths = {
        "params": len(params),
        "grads": len(grads),
        "exp_avgs": len(exp_avgs),
        "kinds": len(kinds),
        "folded": len(already),
    }
    if nonfinite_counts is not None:
        lengths["nonfinite_counts"] = len(nonfinite_counts)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists must have one length, got {lengths}")
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
        return _run(
            params,
            grads,
            exp_avgs,
            nonfinite_counts,
            step,
            foreach=foreach if simple is None else simple,
            fused=fused if simple is None else simple,
        )


def _run(
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


def _check_switches(**switches: object) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
