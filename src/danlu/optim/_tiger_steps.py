"""How Tiger runs: micro-steps in cycles, by `step` or inside the backward pass."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_real
from danlu.optim._base import loss_of
from danlu.optim._cycle import begin_cycle, check_cycle, running_cycle
from danlu.optim._in_backward import BackwardHooks, refuse_local_gradients
from danlu.optim._lazy_rows import is_lazy, is_special
from danlu.optim._nonfinite import Counts, parameter_name, raise_where_wanted
from danlu.optim._options import as_float, check_layouts, check_rates, check_real_parameters
from danlu.optim._padding import fixed_padding
from danlu.optim._param_groups import DECAYED, KINDS, kind_by_shape
from danlu.optim._row_steps import dense, settle
from danlu.optim._sign_optimizer import SignOptimizer
from danlu.optim._stale_momentum import apply_deadzone
from danlu.optim._state import device_step, group_rounding, momentum_states
from danlu.optim._tiger_functional import run_tiger
from danlu.optim._tiger_paths import TigerStep, columns, compiled, root_mean_square
from danlu.optim._tiger_rows import tiger_in_place, tiger_rows
from danlu.optim._traversal import pick

__all__ = ["TigerSteps"]

_PATHS = ("foreach", "fused")


class TigerSteps(SignOptimizer):
    """The micro-steps of Tiger, whose options are those of the class in `_tiger.py`.

    Args:
        params: parameters or groups.
        defaults: the options of groups that do not give them.
        sign_power: as in the class.
        normalize_power: as in the class.
        schedule: a factor of the learning rate by micro-step, or None.
        in_backward: as in the class.
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
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        sign_power: float | Callable[[float], float],
        normalize_power: bool,
        schedule: Callable[[int], float] | None,
        in_backward: bool,
    ) -> None:
        self.micro_weight: float | None = None
        self.grad_scale: float | Tensor | None = None
        self._sign_power, self._normalize_power = sign_power, normalize_power
        self._schedule = schedule
        self._in_backward = in_backward
        self._warned_of_floor = False
        self._hooks: BackwardHooks | None = None
        # Parameters whose gradients of this micro-step were folded in already, and where each parameter is.
        self._received: set[Tensor] = set()
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._local_gradients = False
        super().__init__(params, defaults)

    def _connect(self, model: Any) -> None:
        """Set the hooks that are needed; `model` is the `DistributedDataParallel` of the parameters, or None."""
        if self._in_backward:
            self._hooks = BackwardHooks(self._places, self._receive, model)
        elif model is not None:
            model.register_forward_pre_hook(self._note_synchronization)

    def _note_synchronization(self, model: Any, _: object) -> None:
        if torch.is_grad_enabled():
            self._local_gradients = not model.require_backward_grad_sync

    def _later_options(self) -> dict[str, Any]:
        return {"rounding": None, "seed": 0}

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
            param_group |= running_cycle(self.param_groups)
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
        check_rates(self.param_groups)
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        calls = [self._prepared(g, group, grads[g]) for g, group in enumerate(self.param_groups)]
        if None in calls:
            check_layouts("Tiger", self.param_groups)
            check_real_parameters("Tiger", self.param_groups)
        self._check_step()
        self._warn_of_floor()
        for g, group in enumerate(self.param_groups):
            call, last = calls[g], begin_cycle(group)
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
            check_real_parameters("Tiger", self.param_groups)
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        with torch.no_grad():
            check_cycle(group)
            begin_cycle(group)
            self._micro_step(g, [i], [grad])
        self._received.add(param)

    def _micro_step(self, g: int, chosen: Sequence[int], grads: list[Tensor | None]) -> list[int]:
        """One micro-step of the parameters `chosen` of group `g`; returns which of them the compiled step took."""
        group = self.param_groups[g]
        last = begin_cycle(group)
        params = pick(chosen, group["params"])
        states = momentum_states(self.state, params, group)
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
                    update = partial(tiger_rows, numbers_of_it, count, group["beta"], paths)
                    self._rows.step(
                        param,
                        grads[i],
                        states[i],
                        group,
                        update,
                        beta=group["beta"],
                        bad=count,
                        in_place=partial(tiger_in_place, numbers_of_it, group["beta"]),
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
            return run_tiger(
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
        if self._warned_of_floor or not any(begin_cycle(group) for group in self.param_groups):
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
                # The line that calls `step`, past the two wrappers of torch.
                stacklevel=5,
            )

    def _check_step(self) -> None:
        """Refuse what would leave a cycle half done, before anything is changed."""
        if self._local_gradients:
            refuse_local_gradients()
        if self.micro_weight is not None:
            check_real("micro_weight", self.micro_weight, low=0.0)
        for group in self.param_groups:
            check_cycle(group)
        raise_where_wanted(self.param_groups)


def _clipped(grad: Tensor, limit: float) -> Tensor:
    """The gradient, scaled down to the norm `limit`; one that is not finite stays so."""
    if grad.is_sparse:
        grad = grad.coalesce()
        values = _clipped(grad.values(), limit)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    norm = torch.linalg.vector_norm(grad)
    return grad * torch.where(norm > limit, limit / norm, torch.ones_like(norm))
