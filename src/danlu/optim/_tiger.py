r"""Tiger (Tight-fisted Optimizer): sign of one momentum, relative step sizes, accumulation inside the momentum.

Source: "Tiger：一个'抠'到极致的优化器" (2023-03-07), reference code github bojone/tiger; 8634 (2021-08-24) for the
accumulation.

Shape letters: `...` any shape, the same for a parameter, its gradient and its momentum.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.optim._nonfinite import event_counts, finite_flags, is_finite, parameter_name, raise_if_nonfinite
from danlu.optim._options import as_float, check_beta, check_gradients, check_lr, check_shared_options
from danlu.optim._param_groups import DECAYED, KINDS, Kind, kind_by_shape, parameter_groups
from danlu.optim._traversal import blocks, compute_dtype, decayed_add_, pick, plan, scratch, write_back

__all__ = ["Tiger", "tiger"]

TigerNonfinite = Literal["shrink", "skip", "raise", "off"]
_NONFINITE = ("shrink", "skip", "raise", "off")


class Tiger(Optimizer):
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
        rms_floor: smallest RMS that is used, $\ge 0$. With 0, as in the original, a tensor that starts at zero (the
            second matrix of LoRA, a zero-initialized head) never moves.
        vector_scale: $s > 0$ of vectors.
        foreach: None or True processes many tensors at once (CPU: one after the other in cache-sized blocks;
            accelerators: `torch._foreach_*` calls), False one after the other with plain operations. DTensors and
            other subclasses always take the plain operations.
        maximize: climb instead of descend.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (reading it waits for the device; it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range, or a kind is unknown; also in a group.
        RuntimeError: from `step` on a sparse or complex gradient, when `grad_accum_steps` changed within a cycle, or on
            a bad gradient with `nonfinite="raise"`.

    Numerics:
        float16 and bfloat16 parameters are computed in float32 and rounded to nearest; the momentum has the
        parameter's dtype. A step smaller than half the spacing of such a parameter is lost, which for bfloat16 are
        most. A positive factor on all gradients changes nothing: loss scaling has no effect.

    Cost:
        4 bytes of state per float32 parameter and no buffer for accumulation; 24 bytes of memory traffic, 28 with the
        look for bad gradients where the tensor does not fit into the cache. Temporaries: one block (CPU) or one bucket
        of tensors (accelerators).

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
        nonfinite: TigerNonfinite = "shrink",
        rms_floor: float = 1e-3,
        vector_scale: float = 0.5,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "grad_accum_steps": grad_accum_steps,
            "average": average,
            "shrink": shrink,
            "nonfinite": nonfinite,
            "rms_floor": rms_floor,
            "vector_scale": vector_scale,
            "foreach": foreach,
            "maximize": maximize,
            "kind": None,
            "center": 0.0,
            # The place in the accumulation cycle is part of the checkpoint, so it lives in the groups.
            "micro_step": 0,
            "cycle_start": 0,
            "cycle_length": grad_accum_steps,
        }
        _check_group(defaults)
        self.micro_weight: float | None = None
        self._nonfinite_counts: dict[Tensor, Tensor] = {}
        self._warned_of_floor = False
        super().__init__(parameter_groups(params) if isinstance(params, nn.Module) else params, defaults)
        if any(group["kind"] is None for group in self.param_groups):
            warnings.warn(
                "Tiger got parameters without their kinds and guesses from the number of axes, so embeddings and norm "
                "gains are treated as any matrix and vector; pass the model or danlu.optim.parameter_groups(model)",
                stacklevel=2,
            )

    @property
    def micro_step(self) -> int:
        """Calls of `step` so far."""
        return max((group["micro_step"] for group in self.param_groups), default=0)

    @property
    def nonfinite_events(self) -> dict[str, int]:
        """How many gradients were not finite so far, by parameter name; empty when there were none."""
        return event_counts(self.param_groups, self._nonfinite_counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if param_group.get("kind") in set(KINDS) - DECAYED:
                param_group.setdefault("weight_decay", 0.0)
            _check_group(self.defaults | param_group)
            if self.param_groups:
                # A new group joins the cycle that is under way.
                running = self.param_groups[0]
                param_group |= {key: running[key] for key in ("micro_step", "cycle_start", "cycle_length")}
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_nonfinite_counts", "_warned_of_floor", "micro_weight")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the optimizer owns copies of its tensors."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Fold every gradient into its momentum, and update the parameters on the last micro-step of a cycle."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients("Tiger", self.param_groups)
        self._check_step()
        small: list[str] = []
        for g, group in enumerate(self.param_groups):
            if group["micro_step"] == group["cycle_start"]:
                group["cycle_length"] = group["grad_accum_steps"]
            last = group["micro_step"] + 1 == group["cycle_start"] + group["cycle_length"]
            share = 1.0 / group["cycle_length"] if group["average"] else 1.0
            params: list[Tensor] = []
            folded: list[bool] = []
            names: list[int] = []
            for i, param in enumerate(group["params"]):
                if param.grad is None and not (param in self.state and self.state[param].get("folded", False)):
                    continue
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                if param not in self._nonfinite_counts:
                    self._nonfinite_counts[param] = param.new_zeros((), dtype=torch.int64)
                params.append(param)
                folded.append(bool(state.get("folded", False)))
                names.append(i)
                # A bad first gradient loses the decay, as in the reference: nobody waits for the device to know of it.
                state["folded"] = not last
            flags = tiger(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                kinds=[group["kind"] or kind_by_shape(param) for param in params],
                lr=group["lr"],
                beta=group["beta"],
                weight_decay=group["weight_decay"],
                share=share if self.micro_weight is None else self.micro_weight,
                folded=folded,
                update=last,
                shrink=group["shrink"],
                center=group["center"],
                nonfinite="off" if group["nonfinite"] == "raise" else group["nonfinite"],
                nonfinite_counts=[self._nonfinite_counts[param] for param in params],
                rms_floor=group["rms_floor"],
                vector_scale=group["vector_scale"],
                decay_vectors=group["kind"] is not None,
                foreach=group["foreach"],
                maximize=group["maximize"],
                report_floor=last and not self._warned_of_floor,
            )
            small += [parameter_name(self.param_groups, g, names[i]) for i in flags]
            group["micro_step"] += 1
            if last:
                group["cycle_start"] = group["micro_step"]
                self._warned_of_floor = self._warned_of_floor or g + 1 == len(self.param_groups)
        if small:
            listed = ", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else "")
            warnings.warn(
                f"the RMS of these parameters is below rms_floor, which is used instead (with rms_floor=0, as in the "
                f"original, a zero tensor never moves): {listed}",
                stacklevel=2,
            )
        return loss

    def _check_step(self) -> None:
        """Refuse what would leave a cycle half done, before anything is changed."""
        if self.micro_weight is not None:
            check_real("micro_weight", self.micro_weight, low=0.0)
        for group in self.param_groups:
            inside = group["micro_step"] != group["cycle_start"]
            if inside and group["grad_accum_steps"] != group["cycle_length"]:
                raise RuntimeError(
                    f"grad_accum_steps changed from {group['cycle_length']} to {group['grad_accum_steps']} within a "
                    "cycle; change it after a step that updates"
                )
            for param in group["params"]:
                if param.is_complex():
                    raise RuntimeError(f"Tiger does not support complex parameters, got shape {tuple(param.shape)}")
        raise_if_nonfinite(
            {
                parameter_name(self.param_groups, g, i): param.grad
                for g, group in enumerate(self.param_groups)
                if group["nonfinite"] == "raise"
                for i, param in enumerate(group["params"])
                if param.grad is not None
            }
        )


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
    rms_floor: float = 1e-3,
    vector_scale: float = 0.5,
    decay_vectors: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    report_floor: bool = False,
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
        rms_floor: as in the class.
        vector_scale: as in the class.
        decay_vectors: whether `weight_decay` holds for vectors as well.
        foreach: as in the class.
        maximize: as in the class.
        report_floor: find the tensors whose RMS is below the floor; this waits for the device.

    Returns:
        Indices of tensors whose RMS is below the floor, with `report_floor`; else empty.

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
        >>> tiger([w], [torch.tensor([[0.1, 0.2]])], [m], kinds=["matrix"], lr=0.1, weight_decay=0.0)
        []
        >>> w
        tensor([[ 2.6464, -4.3536]])
    """
    check_lr(lr)
    check_beta("beta", beta)
    for name, value in (("weight_decay", weight_decay), ("share", share), ("rms_floor", rms_floor)):
        check_real(name, value, low=0.0)
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
    rate = as_float(lr)
    small: list[int] = []
    with torch.no_grad():
        for path, indices in plan(params, grads, foreach):
            step = {"loop": _single_tensor_tiger, "blocks": _blocked_tiger, "bucket": _multi_tensor_tiger}[path]
            if report_floor and update:
                small += [
                    i for i in indices if kinds[i] in DECAYED and _rms(params[i], kinds[i]).min().item() < rms_floor
                ]
            step(
                pick(indices, params),
                pick(indices, grads),
                pick(indices, exp_avgs),
                None if nonfinite_counts is None else pick(indices, nonfinite_counts),
                _Step(
                    kinds=pick(indices, kinds),
                    decays=[1.0 if already[i] else beta for i in indices],
                    gain=(1 - beta) * share,
                    lr=-rate if maximize else rate,
                    # Climbing is descending with -lr, except that the decay still pulls towards 0.
                    weight_decay=-weight_decay if maximize else weight_decay,
                    update=update,
                    shrink=shrink if nonfinite == "shrink" else 1.0,
                    center=center,
                    guard=nonfinite != "off",
                    rms_floor=rms_floor,
                    vector_scale=vector_scale,
                    decay_vectors=decay_vectors,
                ),
            )
    return small


class _Step:
    """The numbers of one micro-step."""

    def __init__(
        self,
        *,
        kinds: list[Kind],
        decays: list[float],
        gain: float,
        lr: float,
        weight_decay: float,
        update: bool,
        shrink: float,
        center: float,
        guard: bool,
        rms_floor: float,
        vector_scale: float,
        decay_vectors: bool,
    ) -> None:
        self.kinds, self.decays, self.gain = kinds, decays, gain
        self.lr, self.weight_decay, self.update = lr, weight_decay, update
        self.shrink, self.center, self.guard = shrink, center, guard
        self.rms_floor, self.vector_scale, self.decay_vectors = rms_floor, vector_scale, decay_vectors

    def decay_of(self, kind: Kind) -> float:
        """Weight decay of a tensor of this kind."""
        return self.weight_decay if kind in DECAYED or self.decay_vectors else 0.0

    def scale_of(self, theta: Tensor, kind: Kind) -> Tensor | float:
        """The step's scale: a number, a 0-d tensor, or one per row."""
        if kind not in DECAYED:
            return self.vector_scale
        return _rms(theta, kind).clamp(min=self.rms_floor)


def _rms(theta: Tensor, kind: Kind) -> Tensor:
    """Root mean square of the tensor, or of each row (with a last axis of 1) for an embedding."""
    if kind == "embedding" and theta.ndim > 0:
        return torch.linalg.vector_norm(theta, dim=-1, keepdim=True) / max(1, theta.shape[-1]) ** 0.5
    return torch.linalg.vector_norm(theta) / max(1, theta.numel()) ** 0.5


def _single_tensor_tiger(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: _Step,
) -> None:
    """The definition with plain operations, without reading a value back: the oracle of the other two paths."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        theta, exp_avg, kind = param.to(dtype), exp_avgs[i].to(dtype), step.kinds[i]
        grad = grads[i]
        finite = None
        if grad is not None:
            grad = grad.to(dtype)
            if step.decays[i] + step.gain == 1.0:
                momentum = torch.lerp(exp_avg, grad, step.gain)
            else:
                momentum = exp_avg * step.decays[i] + grad * step.gain
            if step.guard:
                finite = torch.isfinite(grad).all()
                momentum = torch.where(finite, momentum, exp_avg)
                if counts is not None:
                    counts[i].add_(~finite)
            exp_avgs[i].copy_(momentum)
            exp_avg = momentum
        moved = theta
        if step.update:
            direction = exp_avg.sign() + step.decay_of(kind) * theta
            moved = theta - step.lr * step.scale_of(theta, kind) * direction
        if finite is not None:
            moved = torch.where(finite, moved, _shrunk(theta, step))
        if step.update or finite is not None:
            param.copy_(moved)


def _shrunk(theta: Tensor, step: _Step) -> Tensor:
    return theta if step.shrink == 1.0 else step.center + (theta - step.center) * step.shrink


def _blocked_tiger(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: _Step,
) -> None:
    """On the CPU: all passes over a block but the first find it in the cache."""
    memory: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(params):
        dtype, kind, grad = compute_dtype(param.dtype), step.kinds[i], grads[i]
        if grad is not None and step.guard and not is_finite(grad):
            if counts is not None:
                counts[i].add_(1)
            if step.shrink != 1.0:
                param.copy_(_shrunk(param.to(dtype), step))
            continue
        if grad is None and not step.update:
            continue
        scale: Tensor | float = 0.0
        by_row = kind == "embedding" and param.ndim > 0
        if step.update and not by_row:
            scale = step.scale_of(param.to(dtype), kind)
            scale = scale if isinstance(scale, float) else float(scale.item())
        sources = (param, exp_avgs[i]) if grad is None else (param, exp_avgs[i], grad)
        for block in blocks(*sources, rows=by_row):
            theta, exp_avg = block[0].to(dtype), block[1].to(dtype)
            if grad is not None:
                folding = block[2].to(dtype)
                if step.decays[i] + step.gain == 1.0:
                    exp_avg.lerp_(folding, step.gain)
                elif step.decays[i] == 1.0:
                    exp_avg.add_(folding, alpha=step.gain)
                else:
                    exp_avg.mul_(step.decays[i]).add_(folding, alpha=step.gain)
                write_back(block[1], exp_avg)
            if not step.update:
                continue
            direction = torch.sign(exp_avg, out=scratch(memory, theta))
            if by_row:
                rows = step.scale_of(theta, kind)
                direction.add_(theta, alpha=step.decay_of(kind))
                theta.sub_(direction.mul_(rows).mul_(step.lr))
            else:
                decayed_add_(theta, direction, step.lr * float(scale), step.decay_of(kind))
            write_back(block[0], theta)


def _multi_tensor_tiger(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor],
    counts: list[Tensor] | None,
    step: _Step,
) -> None:
    """On accelerators: one bucket of tensors of one dtype; which gradients are finite stays on the device."""
    dtype = compute_dtype(params[0].dtype)
    thetas, momenta = ([tensor.to(dtype) for tensor in tensors] for tensors in (params, exp_avgs))
    # A bucket holds tensors with gradients or tensors without, never both.
    gradients = [grad.to(dtype) for grad in grads if grad is not None]
    finite = finite_flags(gradients) if gradients and step.guard else None
    if gradients:
        decays: Iterable[Any] = step.decays
        if finite is not None:
            gradients = [torch.where(f, g, torch.zeros_like(g)) for f, g in zip(finite, gradients, strict=True)]
            if counts is not None:
                torch._foreach_add_(counts, list((~finite).to(torch.int64).unbind()))
            factors = torch.tensor(step.decays, dtype=dtype).to(finite.device)
            decays = torch.where(finite, factors, torch.ones_like(factors)).unbind()
        for momentum, decay in zip(momenta, decays, strict=True):
            momentum.mul_(decay)
        torch._foreach_add_(momenta, gradients, alpha=step.gain)
        if dtype != params[0].dtype:
            torch._foreach_copy_(exp_avgs, momenta)
    moved = thetas
    if step.update:
        directions = list(torch._foreach_sign(momenta))
        for i, direction in enumerate(directions):
            kind = step.kinds[i]
            direction.add_(thetas[i], alpha=step.decay_of(kind)).mul_(step.scale_of(thetas[i], kind))
        moved = torch._foreach_add(thetas, directions, alpha=-step.lr)
    if finite is not None and (step.update or step.shrink != 1.0):
        moved = [torch.where(f, m, _shrunk(t, step)) for f, m, t in zip(finite, moved, thetas, strict=True)]
    if moved is not thetas:
        torch._foreach_copy_(params, list(moved))


def _check_group(group: dict[str, Any]) -> None:
    check_shared_options(group, _NONFINITE)
    check_beta("beta", group["beta"])
    check_integer("grad_accum_steps", group["grad_accum_steps"], low=1)
    check_real("shrink", group["shrink"], low=0.0, low_open=True, high=1.0)
    check_real("rms_floor", group["rms_floor"], low=0.0)
    check_real("vector_scale", group["vector_scale"], low=0.0, low_open=True)
    check_real("center", group["center"])
    if not isinstance(group["average"], bool):
        raise TypeError(f"average must be a bool, got {group['average']!r}")
    if group["kind"] is not None:
        check_choice("kind", group["kind"], KINDS)
