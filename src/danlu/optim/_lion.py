r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

Source: Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_real
from danlu.optim._base import loss_of
from danlu.optim._lazy_rows import check_lazy, is_lazy, is_special, warn_if_lazy_is_idle
from danlu.optim._lion_paths import compiled
from danlu.optim._lion_rows import lion_in_place, lion_of_group, lion_rows
from danlu.optim._nonfinite import Counts, Nonfinite, raise_where_wanted
from danlu.optim._options import check_betas, check_layouts, check_rates, check_shared_options
from danlu.optim._rounding import Rounding, RoundingMode
from danlu.optim._row_steps import LazyState, dense, settle
from danlu.optim._sign_optimizer import SignOptimizer
from danlu.optim._stale_momentum import apply_deadzone, check_deadzone
from danlu.optim._state import device_step, group_rounding, momentum_states
from danlu.optim._traversal import pick

__all__ = ["Lion"]


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
            as they are for this step. `"shrink"`: the momentum stays, and the tensor becomes $c + (\theta - c)\,r$
            with $c$ the group's `center` (0 without one) and $r$ = `shrink`, the rescue of
            [`Tiger`][danlu.optim.Tiger]. `"raise"`: `RuntimeError` that names the parameters; no tensor is changed.
            `"off"`: not looked for; one such element then spoils its momentum for good.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.
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
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
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
            "shrink": shrink,
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
        check_betas(group["betas"])
        check_shared_options(group)
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
        check_rates(self.param_groups)
        grads = [[param.grad for param in group["params"]] for group in self.param_groups]
        calls = [
            None
            if is_special(group) or group["nonfinite"] == "shrink"
            else self._calls.find(g, group, grads[g], self.state)
            for g, group in enumerate(self.param_groups)
        ]
        if None in calls:
            check_layouts("Lion", self.param_groups)
        raise_where_wanted(self.param_groups)
        number = 0
        for g, group in enumerate(self.param_groups):
            call = calls[g]
            if call is None:
                self._step_group(g, group, grads[g], number)
            else:
                compiled(
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
        states = momentum_states(self.state, params, group)
        numbers = [first + i for i in chosen]
        counts, step = list(Counts(self._nonfinite_counts, params)), self._bits_step(group)
        fused: list[int] = []
        rounding = group_rounding(group, step, numbers, states)
        with self._around(group, params, lambda i: rounding.of(i, params[i].dtype)):
            if is_lazy(group):
                for param, state, count, number in zip(params, states, counts, numbers, strict=True):
                    update = partial(lion_rows, group, step, count, number)
                    self._rows.step(
                        param,
                        param.grad,
                        state,
                        group,
                        update,
                        beta=group["betas"][1],
                        bad=count,
                        in_place=partial(lion_in_place, group),
                    )
            else:
                for state in states:
                    settle(state, group["betas"][1])
                    apply_deadzone(state["exp_avg"], group["sign_deadzone"])
                whole = [dense(grad) for grad in grads if grad is not None]
                fused = lion_of_group(group, step, params, whole, states, counts, numbers)
        self._calls.keep(g, group, fused, self.state, numbers)
