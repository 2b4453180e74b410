r"""Amos: Adam-like steps towards a scale that the model tells, with a decay and a rate that adapt by themselves.

Source: Tian & Parikh (2022), "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards Model-Oriented Scale",
arXiv 2210.11693.

Shape letters: `...` any shape, the same for a parameter and its gradient; `R` the reduced shape of its statistics.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_choice, check_real
from danlu.optim._amos_functional import EPS, amos, check_amos_numbers
from danlu.optim._amos_scales import amos_scales, scale_by_kind, scaled_groups
from danlu.optim._base import GroupOptimizer, loss_of
from danlu.optim._nonfinite import Counts, Nonfinite, raise_where_wanted
from danlu.optim._options import check_gradients, check_rates, check_real_parameters, check_shared_options
from danlu.optim._param_groups import KINDS, kind_by_shape, parameter_groups
from danlu.optim._rounding import RoundingMode
from danlu.optim._state import add_compensation, group_rounding
from danlu.optim._traversal import compute_dtype, pick

__all__ = ["Amos"]

Reduce = Literal["auto", "scalar", "none"]
_REDUCE = ("auto", "scalar", "none")


class Amos(GroupOptimizer):
    r"""Amos: adaptive weight decay towards a model-oriented scale; no schedule but a warmup, and almost no state.

    Definition:
        With $v_0 = b_0 = 0$ of a reduced shape, and $M_2(g)$ the mean of $g^2$ over the reduced axes,
        $$v_t = \beta v_{t-1} + (1-\beta) M_2(g_t), \qquad \hat r = \frac{1-\beta^t}{\max(v_t, \epsilon)}, \qquad
        \gamma = \frac{\xi^2\,\hat r\,M_2(g_t)}{\sqrt{1 + c_c\sqrt\xi\,b_{t-1}}}$$
        $$\Delta_t = -\frac{(\tfrac12\gamma + \ell_2)\,\theta_{t-1} + \xi\eta\sqrt{\hat r}\,g_t}
        {1 + c_d\sqrt{\xi\eta}\,b_{t-1}}, \qquad b_t = b_{t-1} + \gamma\,(1 + b_{t-1})$$
        and $\theta_t = \theta_{t-1} + \Delta_t$, or with $\rho > 0$, $\mu_0 = 0$:
        $\mu_t = \rho\mu_{t-1} + (1-\rho)\Delta_t$, $\theta_t = \theta_{t-1} + \mu_t$.

        $\theta$ = a parameter, $g$ = its gradient (its negative with `maximize=True`), clipped to $\pm$`clip_value`
        first, $v$ = the state `exp_avg_sq`, $b$ = `decay`, $\mu$ = `exp_avg`, $t$ = `step`, $\xi$ = `lr`, $\eta$ = the
        expected scale of the tensor's entries (`scales`), $\beta$ = `beta`, $\rho$ = `momentum`,
        $\ell_2$ = `extra_l2`, $c_c$ = `c_coef`, $c_d$ = `d_coef`, $\epsilon$ = `eps`.

    Args:
        params: a model, whose parameters get the scales of [`amos_scales`][danlu.optim.amos_scales]; or groups that
            carry `scale`; or parameters, named or not, or groups of them.
        lr: $\xi \ge 0$, about $1/\sqrt N$ for $N$ independent batches in the training set. Warm it up; it needs no
            decay. A number or a tensor with one element.
        scales: $\eta > 0$: one number for all, or qualified name to number for named parameters. None takes the
            group's `scale`, else the rule for the group's `kind`, else guesses from the number of axes with a warning.
        beta: $\beta \in [0, 1)$, with $1 - \beta$ of the order of `lr`; 0.98 to 0.999.
        momentum: $\rho \in [0, 1)$; 0 needs no tensor of the parameter's size.
        clip_value: bound of each element of the gradient, > 0; None clips nothing.
        extra_l2: $\ell_2 \ge 0$.
        c_coef: $c_c \ge 0$, how fast the adaptive decay fades.
        d_coef: $c_d \ge 0$, how fast the steps shrink.
        eps: $\epsilon \ge 0$; no less than the smallest normal number of the arithmetic is used.
        reduce: shape of $v$ and $b$. `"auto"`: a number per slice of axis 0 (output unit, channel, token), and one for
            a tensor with fewer than two axes. `"scalar"`: one per tensor. `"none"`: one per element.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf, or is so large that $M_2$ overflows.
            `"skip"`: this tensor and its state stay as they are for this step. `"shrink"`: the state stays, and the
            tensor becomes $c + (\theta - c)\,r$ with $c$ the group's `center` (0 without one) and $r$ = `shrink`.
            `"raise"`: `RuntimeError` that names the parameters with NaN or Inf, and no tensor is changed; an overflow
            is skipped. `"off"`: not looked for.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16.
        seed: of stochastic rounding.
        foreach: True processes many tensors at once (CPU: cache-sized blocks; accelerators: one set of small kernels
            for the statistics of many tensors), False one after the other with plain operations. DTensors and other
            subclasses always take the plain operations.
        fused: True takes one compiled call for all tensors (CPU: C++, compiled on first use by the machine's compiler)
            and raises where it cannot run; None takes it on the CPU where it can, unless `foreach` is given.
        maximize: climb instead of descend; the decay still pulls towards 0.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the skipped gradients by parameter
        name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range, also in a group; `scales` lacks a parameter, or the parameters have
            no names; a group has a `weight_decay` other than 0, which Amos replaces.
        RuntimeError: from `step` on a sparse or complex gradient, on a bad gradient with `nonfinite="raise"`, or where
            `fused=True` cannot run.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded as `rounding` says; $v$, $b$ and $\mu$
        are then float32, also after loading a checkpoint. $1 - \beta^t$ is computed as $-\mathrm{expm1}(t\ln\beta)$.
        The result does not depend on the scale of the gradients, short of overflow and underflow of their squares. A
        tensor whose gradients have all been zero does not move. With `lr` 0 from the start nothing moves. The paths
        agree to the rounding of their arithmetic, not bit for bit.

    Cost:
        State per slice of axis 0: two numbers; with momentum 4 bytes per float32 parameter besides. Memory traffic per
        float32 parameter: 12 bytes while a tensor's gradient stays in the cache for its second pass, else 16; momentum
        adds 8. Temporaries: none (fused), one block (CPU) or one bucket of tensors (accelerators).

    Differences:
        The paper's code counts one $t$ for all tensors; here a tensor that has no gradient, or a bad one, does not
        count the step. `extra_l2` is that of the paper's formula: other implementations in PyTorch have its sign
        wrong, add $\epsilon$ where the maximum belongs (which breaks the invariance to the scale of the gradients),
        and know no scales by module and no statistics by row.

    Source:
        Tian & Parikh (2022), arXiv 2210.11693, and github google-research/jestimator;
        "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

    Example:
        >>> import torch
        >>> from danlu.optim import Amos
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> optimizer = Amos(model, lr=0.1)
        >>> [round(group["scale"], 3) for group in optimizer.param_groups]
        [0.5, 0.577, 0.707]
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg_sq"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        scales: Mapping[str, float] | float | None = None,
        beta: float = 0.999,
        momentum: float = 0.0,
        clip_value: float | None = None,
        extra_l2: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        eps: float = EPS,
        reduce: Reduce = "auto",
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
        rounding: RoundingMode | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "momentum": momentum,
            "clip_value": clip_value,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eps": eps,
            "reduce": reduce,
            "nonfinite": nonfinite,
            "shrink": shrink,
            "rounding": rounding,
            "seed": seed,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            # Calls of `step`: part of the checkpoint, since the bits of stochastic rounding depend on it.
            "step": 0,
            # None: by the kind, or else by the shape. Part of the checkpoint, as any option.
            "scale": None,
            "kind": None,
        }
        self._check_group(defaults)
        if isinstance(params, nn.Module):
            found = amos_scales(params)
            if scales is None:
                scales = found
            params = parameter_groups(params)
        super().__init__(params if scales is None else scaled_groups(params, scales), defaults)
        if any(group["scale"] is None and group["kind"] is None for group in self.param_groups):
            warnings.warn(
                "Amos got parameters without their expected scales and guesses them from the number of axes, so "
                "embeddings and norm gains are treated as any matrix and vector; pass the model, or named parameters "
                "with scales=danlu.optim.amos_scales(model)",
                stacklevel=2,
            )

    def _check_group(self, group: Mapping[str, Any]) -> None:
        decay = group.get("weight_decay", 0.0)
        check_shared_options({**group, "weight_decay": decay})
        if decay != 0:
            raise ValueError(
                f"weight_decay must be 0 in a group of Amos, whose decay adapts (see extra_l2), got {decay!r}"
            )
        check_amos_numbers(group)
        check_choice("reduce", group["reduce"], _REDUCE)
        if group["scale"] is not None:
            check_real("scale", group["scale"], low=0.0, low_open=True)
        if group["kind"] is not None:
            check_choice("kind", group["kind"], KINDS)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        check_rates(self.param_groups)
        check_gradients("Amos", self.param_groups)
        check_real_parameters("Amos", self.param_groups)
        raise_where_wanted(self.param_groups)
        first = 0
        for group in self.param_groups:
            chosen = [i for i, param in enumerate(group["params"]) if param.grad is not None]
            params = pick(chosen, group["params"])
            states = [self._state(param, group) for param in params]
            rounding = group_rounding(group, group["step"], [first + i for i in chosen], states)
            with self._around(group, params, lambda i, r=rounding, p=params: r.of(i, p[i].dtype)):
                amos(
                    params,
                    [param.grad for param in params],
                    [state["exp_avg_sq"] for state in states],
                    [state["decay"] for state in states],
                    [state["step"] for state in states],
                    [state["exp_avg"] for state in states] if group["momentum"] > 0 else None,
                    scales=[_scale(param, group) for param in params],
                    lr=group["lr"],
                    beta=group["beta"],
                    momentum=group["momentum"],
                    clip_value=group["clip_value"],
                    extra_l2=group["extra_l2"],
                    c_coef=group["c_coef"],
                    d_coef=group["d_coef"],
                    eps=group["eps"],
                    nonfinite="off" if group["nonfinite"] == "off" else "skip",
                    nonfinite_counts=list(Counts(self._nonfinite_counts, params)),
                    rounding=rounding,
                    foreach=group["foreach"],
                    fused=group["fused"],
                    maximize=group["maximize"],
                )
            first += len(group["params"])
            group["step"] += 1
        return loss

    def _state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        dtype = compute_dtype(param.dtype)
        if "step" not in state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg_sq"] = _reduced_zeros(param, group["reduce"], dtype)
            state["decay"] = torch.zeros_like(state["exp_avg_sq"])
        if group["momentum"] > 0 and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        add_compensation(state, param, group)
        return state


def _reduced_zeros(param: Tensor, reduce: Reduce, dtype: torch.dtype) -> Tensor:
    """Zeros of the reduced shape: a scalar is an ordinary tensor, slices of a DTensor are placed as it is."""
    if reduce == "scalar" or (reduce == "auto" and param.ndim < 2):
        return torch.zeros((), dtype=dtype, device=param.device)
    if reduce == "none":
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if param.numel() == 0:
        return param.new_zeros((param.shape[0], *[1] * (param.ndim - 1)), dtype=dtype)
    slices = param.detach()
    for axis in range(1, param.ndim):
        slices = slices.narrow(axis, 0, 1)
    return torch.zeros_like(slices, dtype=dtype, memory_format=torch.contiguous_format)


def _scale(param: Tensor, group: Mapping[str, Any]) -> float:
    if group["scale"] is not None:
        return float(group["scale"])
    return scale_by_kind(param, group["kind"] or kind_by_shape(param), group.get("center", 1.0))
