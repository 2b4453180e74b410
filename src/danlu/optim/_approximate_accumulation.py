r"""Gradient accumulation without a buffer for optimizers that it does not fit exactly: two approximations.

[`Tiger`][danlu.optim.Tiger] folds the gradients of a cycle into its momentum and is exact. Adam also needs the square
of their mean, and Lion their mean beside its momentum, so theirs can only be approximated.

Source: "隐藏在动量中的梯度累积：少更新几步，效果反而更好？" (2021-08-24).

Shape letters: `...` any shape, the same for a parameter, its gradient and its moments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_integer
from danlu.optim._base import GroupOptimizer, loss_of
from danlu.optim._cycle import begin_cycle, check_cycle, new_cycle, running_cycle
from danlu.optim._folded_adamw import check_numbers, folded_adamw
from danlu.optim._nonfinite import Nonfinite, raise_where_wanted
from danlu.optim._options import check_beta, check_gradients, check_rates, check_real_parameters, check_shared_options
from danlu.optim._rounding import RoundingMode
from danlu.optim._state import add_compensation, group_rounding
from danlu.optim._traversal import pick

__all__ = ["FoldedAdamW", "equivalent_beta"]


def equivalent_beta(beta: float, grad_accum_steps: int) -> float:
    r"""The beta for a momentum that sees every micro-gradient of a cycle, instead of their mean once. Approximate.

    Definition:
        $$\tilde\beta = 1 - \frac{1-\beta}{k}$$
        with $\beta$ = `beta`, $k$ = `grad_accum_steps`. A cycle of $k$ micro-steps under $\tilde\beta$ decays the
        momentum by $\tilde\beta^k \approx \beta$ and adds $\frac{1-\beta}{k}\tilde\beta^{k-j} g_j \approx
        \frac{1-\beta}{k} g_j$ for the $j$-th micro-gradient. So any optimizer with `beta` replaced by this, whose
        learning rate is 0 but on every $k$-th call, accumulates approximately.

    Args:
        beta: $\beta \in [0, 1)$ of the momentum for whole batches.
        grad_accum_steps: $k \ge 1$, micro-batches per batch.

    Returns:
        $\tilde\beta$, at least `beta`.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: an argument is out of its range.

    Numerics:
        $\tilde\beta^k - \beta$ lies in $[0, e^{-(1-\beta)} - \beta)$: at 0.965 it is 0.00046 for $k=4$ and never above
        0.00061, at 0.9 it is 0.0037 for $k=4$ and never above 0.0049.

    Source:
        "隐藏在动量中的梯度累积：少更新几步，效果反而更好？" (2021-08-24).

    Example:
        >>> from danlu.optim import equivalent_beta
        >>> round(equivalent_beta(0.965, 4), 5), round(equivalent_beta(0.965, 4) ** 4, 5)
        (0.99125, 0.96546)
    """
    check_beta("beta", beta)
    check_integer("grad_accum_steps", grad_accum_steps, low=1)
    return 1 - (1 - beta) / grad_accum_steps


class FoldedAdamW(GroupOptimizer):
    r"""AdamW whose gradient accumulation is folded into its moments, without a buffer. Approximate.

    Definition:
        With $m_0 = v_0 = 0$ and micro-steps $t = 0, 1, \dots$ in cycles of $k$ = `grad_accum_steps`,
        $$m_t = b_1 m_{t-1} + \frac{1-\beta_1}{k} g_t, \qquad v_t = b_2 v_{t-1} + \frac{1-\beta_2}{k} g_t^2$$
        where $b_i = \beta_i$ on the first micro-step of a cycle and 1 on the others; on the last one of cycle $n$
        $$\theta \leftarrow \theta - \eta\left(\frac{m_t/(1-\beta_1^n)}{\sqrt{v_t/(1-\beta_2^n)}+\epsilon}
        + \lambda\theta\right).$$
        With $\theta$ = a parameter, $g$ = its gradient, $m, v$ = the states `exp_avg`, `exp_avg_sq`, $\eta$ = `lr`,
        $(\beta_1, \beta_2)$ = `betas`, $\epsilon$ = `eps`, $\lambda$ = `weight_decay`.

        $m$ is exactly that of AdamW on the mean gradient. $v$ is not: it averages the mean of the squares where AdamW
        averages the square of the mean. With `grad_accum_steps=1` there is no difference.

    Args:
        params: parameters, named or not, or groups of them.
        lr: $\eta \ge 0$. For gradients that are mostly noise $v$ is up to $k$ times that of AdamW and steps up to
            $\sqrt k$ times smaller, so the best rate is between that of AdamW and $\sqrt k$ times it.
        betas: $(\beta_1, \beta_2)$, both in $[0, 1)$.
        eps: $\epsilon \ge 0$.
        weight_decay: $\lambda \ge 0$, decoupled.
        grad_accum_steps: $k \ge 1$, calls of `step` per update. Call `step` and `zero_grad` after every micro-batch and
            do not divide the loss by $k$. It can change between cycles, not within one.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"skip"`: its moments stay as they are, and
            so does the tensor if this is the last micro-step. `"shrink"`: the moments stay, and the tensor becomes
            $c + (\theta - c)\,r$ at once, with $c$ the group's `center` (0 without one) and $r$ = `shrink`. `"raise"`:
            `RuntimeError` that names the parameters; no tensor is changed. `"off"`: not looked for.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16.
        seed: of stochastic rounding.
        foreach: True processes many tensors at once by `torch._foreach_*` calls, False one after the other; None is
            True on accelerators. DTensors and other subclasses always go one after the other.
        maximize: climb instead of descend.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range; also in a group.
        RuntimeError: from `step` on a sparse or complex gradient, when `grad_accum_steps` changed within a cycle, or on
            a bad gradient with `nonfinite="raise"`.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded as `rounding` says; their moments are
        float32, since squares of gradients underflow in float16.

    Cost:
        8 bytes of state per parameter, in all dtypes up to float32, and no buffer for accumulation: 8 bytes while
        gradients are accumulated instead of the 12 of AdamW. Every micro-step reads and writes both moments.

    Differences:
        An optimizer of its own instead of an option, because it does not compute what AdamW with accumulation computes.
        A bad first gradient of a cycle loses the cycle's decay of its moments, as in Tiger. A tensor that has a
        gradient on some micro-steps only is treated as if it were zero on the others; without any, it is left alone.

    Source:
        "隐藏在动量中的梯度累积：少更新几步，效果反而更好？" (2021-08-24); AdamW: Loshchilov and Hutter (2017), arXiv
        1711.05101, algorithm 2.

    Example:
        >>> import torch
        >>> from danlu.optim import FoldedAdamW
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = FoldedAdamW([w], lr=0.1, weight_decay=0.0, grad_accum_steps=2)
        >>> for gradient in (1.0, 3.0):  # AdamW on the mean gradient 2 would step by 0.1
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> round(1 - w.item(), 4)  # 0.1 * 2 / sqrt((1 + 9) / 2)
        0.0894
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        grad_accum_steps: int = 1,
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
        rounding: RoundingMode | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_accum_steps": grad_accum_steps,
            "nonfinite": nonfinite,
            "shrink": shrink,
            "rounding": rounding,
            "seed": seed,
            "foreach": foreach,
            "maximize": maximize,
            **new_cycle(grad_accum_steps),
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_numbers(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        check_integer("grad_accum_steps", group["grad_accum_steps"], low=1)
        check_shared_options(group)

    def _later_options(self) -> dict[str, Any]:
        return {"rounding": None, "seed": 0, "shrink": 0.99}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if isinstance(param_group, dict):
            param_group = param_group | running_cycle(self.param_groups)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Fold every gradient into its moments, and update the parameters on the last micro-step of a cycle."""
        loss = loss_of(closure)
        check_rates(self.param_groups)
        check_gradients("FoldedAdamW", self.param_groups)
        check_real_parameters("FoldedAdamW", self.param_groups)
        for group in self.param_groups:
            check_cycle(group)
        raise_where_wanted(self.param_groups)
        first = 0
        for group in self.param_groups:
            last = begin_cycle(group)
            group["micro_step"] += 1
            chosen = [
                i
                for i, p in enumerate(group["params"])
                if p.grad is not None or self.state.get(p, {}).get("folded", False)
            ]
            params = pick(chosen, group["params"])
            for param in params:
                state = self.state[param]
                if not state:
                    wide = torch.promote_types(param.dtype, torch.float32)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
                    state["step"] = param.new_zeros((), dtype=torch.float32)
                add_compensation(state, param, group)
                if param not in self._nonfinite_counts:
                    self._nonfinite_counts[param] = param.new_zeros((), dtype=torch.int64)
            states = [self.state[param] for param in params]
            rounding = group_rounding(group, group["micro_step"], [first + i for i in chosen], states)
            with self._around(group, params, lambda i, r=rounding, p=params: r.of(i, p[i].dtype)):
                folded_adamw(
                    params,
                    [param.grad for param in params],
                    [self.state[param]["exp_avg"] for param in params],
                    [self.state[param]["exp_avg_sq"] for param in params],
                    [self.state[param]["step"] for param in params],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    share=1.0 / group["cycle_length"],
                    folded=[bool(self.state[param].get("folded", False)) for param in params],
                    update=last,
                    nonfinite="skip" if group["nonfinite"] in ("skip", "shrink") else "off",
                    nonfinite_counts=[self._nonfinite_counts[param] for param in params],
                    rounding=rounding,
                    foreach=group["foreach"],
                    maximize=group["maximize"],
                )
            for param in params:
                self.state[param]["folded"] = not last
            first += len(group["params"])
            if last:
                group["cycle_start"] = group["micro_step"]
        return loss
