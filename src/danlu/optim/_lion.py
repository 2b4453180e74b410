r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

Source: Chen et al. (2023), "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from danlu._common.checks import check_choice, check_real
from danlu.optim._nonfinite import event_counts, finite_flags, is_finite, parameter_name, raise_if_nonfinite
from danlu.optim._options import as_float, check_beta, check_gradients, check_lr, check_shared_options
from danlu.optim._traversal import blocks, compute_dtype, decayed_add_, pick, plan, scratch, write_back

__all__ = ["Lion", "lion"]

LionNonfinite = Literal["skip", "raise", "off"]
_NONFINITE = ("skip", "raise", "off")


class Lion(Optimizer):
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
        foreach: None or True processes many tensors at once (CPU: one after the other in cache-sized blocks;
            accelerators: `torch._foreach_*` calls), False one after the other with plain operations. DTensors and
            other subclasses always take the plain operations.
        maximize: climb instead of descend; the momentum then still averages the gradients as they come.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: `lr` < 0, a beta outside $[0, 1)$, `weight_decay` < 0, or an unknown `nonfinite`; also in a group.
        RuntimeError: from `step` on a sparse gradient, or on a bad gradient with `nonfinite="raise"`.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded to nearest; the momentum has the
        parameter's dtype. A step smaller than half the spacing of such a parameter is lost. A multiplication of all
        gradients by a power of two changes nothing, short of overflow and underflow.

    Cost:
        4 bytes of state and 20 bytes of memory traffic per float32 parameter, 24 with the look for bad gradients where
        the gradient does not fit into the cache. Temporaries: one block (CPU) or one bucket of tensors (accelerators).

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
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "nonfinite": nonfinite,
            "foreach": foreach,
            "maximize": maximize,
        }
        _check_group(defaults)
        self._nonfinite_counts: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    @classmethod
    def from_adamw(
        cls,
        params: ParamsT,
        adamw_lr: float,
        adamw_weight_decay: float,
        ratio: float = 10.0,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        nonfinite: LionNonfinite = "skip",
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> "Lion":
        """Lion with `lr = adamw_lr / ratio` and `weight_decay = adamw_weight_decay * ratio`.

        The decay per step, their product, is then that of AdamW; the paper advises a ratio of 3 to 10.
        """
        check_real("adamw_lr", adamw_lr, low=0.0)
        check_real("adamw_weight_decay", adamw_weight_decay, low=0.0)
        check_real("ratio", ratio, low=0.0, low_open=True)
        return cls(
            params,
            adamw_lr / ratio,
            betas,
            adamw_weight_decay * ratio,
            nonfinite=nonfinite,
            foreach=foreach,
            maximize=maximize,
        )

    @property
    def nonfinite_events(self) -> dict[str, int]:
        """How many gradients were not finite so far, by parameter name; empty when there were none."""
        return event_counts(self.param_groups, self._nonfinite_counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if isinstance(param_group, dict):
            _check_group(self.defaults | param_group)
            param_group = dict(param_group)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_nonfinite_counts": self._nonfinite_counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the optimizer owns copies of its tensors."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients("Lion", self.param_groups)
        raise_if_nonfinite(
            {
                parameter_name(self.param_groups, g, i): param.grad
                for g, group in enumerate(self.param_groups)
                if group["nonfinite"] == "raise"
                for i, param in enumerate(group["params"])
                if param.grad is not None
            }
        )
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            counts: list[Tensor] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                if param not in self._nonfinite_counts:
                    self._nonfinite_counts[param] = param.new_zeros((), dtype=torch.int64)
                params.append(param)
                grads.append(param.grad)
                exp_avgs.append(state["exp_avg"])
                counts.append(self._nonfinite_counts[param])
            lion(
                params,
                grads,
                exp_avgs,
                lr=group["lr"],
                betas=group["betas"],
                weight_decay=group["weight_decay"],
                nonfinite="skip" if group["nonfinite"] == "skip" else "off",
                nonfinite_counts=counts,
                foreach=group["foreach"],
                maximize=group["maximize"],
            )
        return loss


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
    foreach: bool | None = None,
    maximize: bool = False,
) -> None:
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
        foreach: as in the class.
        maximize: as in the class.

    Returns:
        None; `params` and `exp_avgs` hold the result.

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
        >>> lion([w], [torch.tensor([0.3, 0.2])], [m], lr=0.5)
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
    rate = as_float(lr)
    with torch.no_grad():
        for path, indices in plan(params, grads, foreach):
            update = {"loop": _single_tensor_lion, "blocks": _blocked_lion, "bucket": _multi_tensor_lion}[path]
            update(
                pick(indices, params),
                pick(indices, grads),
                pick(indices, exp_avgs),
                None if nonfinite_counts is None else pick(indices, nonfinite_counts),
                lr=-rate if maximize else rate,
                betas=betas,
                # Climbing is descending with -lr, except that the decay still pulls towards 0.
                weight_decay=-weight_decay if maximize else weight_decay,
                guard=nonfinite == "skip",
            )


def _single_tensor_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other two paths."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        theta, grad, exp_avg = param.to(dtype), grads[i].to(dtype), exp_avgs[i].to(dtype)
        finite = torch.isfinite(grad).all() if guard else None
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
        write_back(param, theta.add_(update, alpha=-lr))
        write_back(exp_avgs[i], exp_avg.lerp_(grad, 1 - betas[1]))


def _blocked_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
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
        for param_block, grad_block, exp_avg_block in blocks(param, grads[i], exp_avgs[i]):
            theta, grad, exp_avg = param_block.to(dtype), grad_block.to(dtype), exp_avg_block.to(dtype)
            update = torch.lerp(exp_avg, grad, 1 - betas[0], out=scratch(memory, theta)).sgn_()
            write_back(exp_avg_block, exp_avg.lerp_(grad, 1 - betas[1]))
            decayed_add_(theta, update, lr, weight_decay)
            write_back(param_block, theta)


def _multi_tensor_lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    guard: bool,
) -> None:
    """On accelerators: one bucket of tensors of one dtype; which gradients are finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    thetas, gradients, momenta = ([tensor.to(dtype) for tensor in tensors] for tensors in (params, grads, exp_avgs))
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
    if dtype != params[0].dtype:
        torch._foreach_copy_(params, thetas)
        torch._foreach_copy_(exp_avgs, momenta)


def _check_betas(betas: tuple[float, float]) -> None:
    # A checkpoint that went through JSON gives back a list.
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    check_beta("betas[0]", betas[0])
    check_beta("betas[1]", betas[1])


def _check_group(group: dict[str, Any]) -> None:
    _check_betas(group["betas"])
    check_shared_options(group, _NONFINITE)
