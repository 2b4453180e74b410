r"""Exponentiated gradient descent: multiplicative updates of nonnegative, simplex-valued or signed parameters.

Source: Kivinen and Warmuth (1997), "Exponentiated Gradient versus Gradient Descent for Linear Predictors"; article
"指数梯度下降 + 元学习 = 自适应学习率" (2022-03-03).

Shape letters: `...` any shape, the same for a parameter and its gradient.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_choice, check_dim, check_real
from danlu.optim._base import GroupOptimizer, loss_of
from danlu.optim._nonfinite import Nonfinite, all_finite, counter, event_counts, is_finite, plain, raise_where_wanted
from danlu.optim._options import check_rates, check_real_gradients, check_shared_options, checked_rate
from danlu.optim._rounding import Rounding, RoundingMode, Writer, read, write
from danlu.optim._shrink import toward_center
from danlu.optim._state import add_compensation, group_rounding
from danlu.optim._traversal import compute_dtype, plan, rounded_blocks

__all__ = ["ExponentiatedGradient"]

Mode = Literal["nonnegative", "simplex", "signed"]
_MODES = ("nonnegative", "simplex", "signed")
# exp(50) is 5e21: no sensible step changes a weight by more.
_EXPONENT = 50.0
# How far from 1 the sum of a distribution may be before that is worth a warning.
_TOLERANCE = 1e-3


class ExponentiatedGradient(GroupOptimizer):
    r"""Exponentiated gradient descent: a step multiplies, so that signs and zeros stay what they are.

    Definition:
        With $\theta$ = a parameter, $g$ = its gradient (its negative with `maximize=True`), $\eta$ = `lr` and the step
        $x = -\eta g$, by `mode`:

        - `nonnegative`: $\theta \leftarrow \max(\theta \odot e^{x}, f)$, the unnormalized form (EGU);
        - `simplex`: $\theta \leftarrow \operatorname{softmax}(\log\theta + x)$ along `dim`;
        - `signed`: $\theta \leftarrow \beta\sinh(\operatorname{asinh}(\theta/\beta) + x)$. This is
          EGU$^\pm$, $\theta = u - v$ with $u \leftarrow u e^{x}$ and $v \leftarrow v e^{-x}$, whose product
          $uv = \beta^2/4$ is conserved, so that no state is needed.

        $f$ = `floor`, $\beta$ = `beta`. On the simplex with a floor, what exceeds $f$ is scaled so that the sum is 1.

    Args:
        params: parameters, named parameters, or groups of them with their own options, as in torch. They must be
            nonnegative, or distributions along `dim`, as `mode` says.
        lr: $\eta \ge 0$, in units of one over a gradient; a number or a tensor with one element.
        mode: as above.
        dim: the axis of a distribution, for `"simplex"`.
        beta: $\beta > 0$ of `"signed"`, in units of the parameter: elements well below it move as under gradient
            descent with rate $\eta\beta$, elements well above by factors. None is 1.
        floor: $f \ge 0$: smallest value of an element. With 0 an element at exactly 0 stays there for ever. Not for
            `"signed"`, which passes through 0.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"skip"`: it stays as it is for this step.
            `"shrink"`: it becomes $c + (\theta - c)\,r$ with $r$ = `shrink` and $c$ the group's `center` (0 without
            one), or the uniform distribution. `"raise"`: `RuntimeError` that names the parameters; no tensor is
            changed. `"off"`: not looked for.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16. Distributions are always rounded to nearest.
        seed: of stochastic rounding.
        foreach: None or True takes tensors on the CPU in cache-sized blocks and many tensors at once on accelerators,
            False one by one. Distributions, DTensors and other subclasses always go one by one.
        maximize: climb instead of descend.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite,
        and `clamp_events` the elements whose step was cut off at $\pm 50$, by parameter name since construction
        (reading them waits for the device; they are not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type.
        ValueError: `lr`, `floor` or `seed` < 0, `beta` $\le$ 0, an unknown `mode`, `nonfinite` or `rounding`, an option
            of another mode (so `rounding` other than `"nearest"` with `"simplex"`), no axis `dim`, a floor too high for
            its axis, or parameters that are negative, not finite, or without any weight on a distribution; also in a
            group.
        RuntimeError: from `step` on a sparse or complex gradient, or on a bad one with `nonfinite="raise"`.

    Numerics:
        Steps are cut off at $x = \pm 50$ (on the simplex relative to the largest of a distribution, so at -50), and
        results at the largest number of the dtype, so that no finite gradient makes an infinite parameter. float16 and
        bfloat16 parameters are computed in float32 and rounded as `rounding` says; to nearest, factors within 0.2 % of
        1 are lost in bfloat16. Distributions are rounded to nearest, since errors that are drawn element by element
        would move their sum at random. An element that underflows to 0 stays there unless `floor` lifts it.
        Distributions that do not sum to 1 within 0.001 are rescaled at the start, with a warning. `signed` is computed
        from $u$ and $v$ in a form without cancellation, whose result for a zero gradient is the parameter, bit for bit.

    Cost:
        No state but the compensation of Kahan, 2 bytes per low-precision parameter; 12 bytes of memory traffic per
        float32 parameter, 16 with the look for bad gradients where the tensor does not fit into the cache. Temporaries
        of the size of one block (CPU) or tensor.

    Source:
        Kivinen and Warmuth (1997), Information and Computation 132, sections 3 and 4; Ghai, Hazan and Singer (2020),
        "Exponentiated Gradient Meets Gradient Descent", arXiv 1902.01903, for the form with sinh; "指数梯度下降 +
        元学习 = 自适应学习率" (2022-03-03).

    Example:
        >>> import torch
        >>> from danlu.optim import ExponentiatedGradient
        >>> p = torch.nn.Parameter(torch.tensor([0.25, 0.25, 0.5]))
        >>> optimizer = ExponentiatedGradient([p], lr=0.5, mode="simplex")
        >>> p.grad = torch.tensor([1.0, 2.0, 3.0])
        >>> optimizer.step()
        >>> p.data
        tensor([0.4269, 0.2589, 0.3141])
    """

    _copied: ClassVar[tuple[str, ...]] = (*GroupOptimizer._copied, "_clamp_counts")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        mode: Mode = "nonnegative",
        dim: int = -1,
        beta: float | None = None,
        floor: float = 0.0,
        *,
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
        rounding: RoundingMode | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "mode": mode,
            "dim": dim,
            "beta": beta,
            "floor": floor,
            "nonfinite": nonfinite,
            "shrink": shrink,
            "rounding": rounding,
            "seed": seed,
            "foreach": foreach,
            "maximize": maximize,
            # Calls of `step`: part of the checkpoint, since the bits of stochastic rounding depend on it.
            "step": 0,
        }
        self._check_group(defaults)
        self._clamp_counts: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_shared_options({"weight_decay": 0.0, **group})
        if group.get("weight_decay", 0.0) != 0:
            raise ValueError(f"weight_decay has no meaning for ExponentiatedGradient, got {group['weight_decay']!r}")
        check_choice("mode", group["mode"], _MODES)
        check_real("floor", group["floor"], low=0.0)
        if group["beta"] is not None:
            check_real("beta", group["beta"], low=0.0, low_open=True)
        if isinstance(group["dim"], bool) or not isinstance(group["dim"], int):
            raise TypeError(f"dim must be an int, got {group['dim']!r}")
        for name, mode, unset in (("beta", "signed", None), ("dim", "simplex", -1)):
            if group[name] != unset and group["mode"] != mode:
                raise ValueError(
                    f"{name} is an option of mode={mode!r}, got {group[name]!r} with mode={group['mode']!r}"
                )
        if group["rounding"] not in (None, "nearest") and group["mode"] == "simplex":
            raise ValueError(f"rounding must be 'nearest' or None with mode='simplex', got {group['rounding']!r}")
        if group["floor"] != 0 and group["mode"] == "signed":
            raise ValueError(f"floor has no meaning with mode='signed', got {group['floor']!r}")

    @property
    def clamp_events(self) -> dict[str, int]:
        """How many elements had a step beyond the cut-off so far, by parameter name; empty when there were none."""
        return event_counts(self.param_groups, self._clamp_counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                _check_param(param, group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        check_rates(self.param_groups)
        check_real_gradients("ExponentiatedGradient", self.param_groups)
        raise_where_wanted(self.param_groups)
        number = 0
        for group in self.param_groups:
            rate = checked_rate(group["lr"])
            rate = -rate if group["maximize"] else rate
            guard = group["nonfinite"] in ("skip", "shrink")
            params = [param for param in group["params"] if param.grad is not None]
            writers = self._writers(group, number)
            number += len(group["params"])
            group["step"] += 1
            for param in params:
                for counts in (self._nonfinite_counts, self._clamp_counts):
                    counter(counts, param)
            foreach = False if group["mode"] == "simplex" else group["foreach"]
            with self._around(group, params, writers.__getitem__):
                for path, indices in plan(params, [param.grad for param in params], foreach):
                    chosen = [params[i] for i in indices]
                    if path == "bucket" and group["mode"] == "nonnegative":
                        self._bucket(chosen, group, rate, guard, [writers[i] for i in indices])
                        continue
                    move = self._blocks if path == "blocks" else self._whole
                    for i in indices:
                        move(params[i], group, rate, guard, writers[i])
        return loss

    def _shrunk(self, theta: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Distributions shrink towards the uniform one, and nothing falls below the floor."""
        if group["mode"] == "simplex":
            return toward_center(theta, {**group, "center": 1 / theta.shape[group["dim"]]})
        moved = toward_center(theta, group)
        return moved.clamp(min=group["floor"]) if group["mode"] == "nonnegative" else moved

    def _writers(self, group: Mapping[str, Any], first: int) -> list[Writer | None]:
        """How the parameters of a group that have gradients are rounded; `first` is the number of its first one."""
        chosen = [(first + i, param) for i, param in enumerate(group["params"]) if param.grad is not None]
        if group["mode"] == "simplex":
            return [Rounding("nearest").of(0, param.dtype) for _, param in chosen]
        found: list[Writer | None] = []
        for number, param in chosen:
            if group["rounding"] == "kahan":
                add_compensation(self.state[param], param, group)
            states = [self.state.get(param, {})]
            found.append(group_rounding(group, group["step"], [number], states).of(0, param.dtype))
        return found

    def _whole(self, param: Tensor, group: Mapping[str, Any], lr: float, guard: bool, writer: Writer | None) -> None:
        """The definition on a whole tensor, without reading a value back."""
        dtype = compute_dtype(param.dtype)
        theta, exponent = read(param, writer), param.grad.to(dtype).mul(-lr)  # pyrefly: ignore[missing-attribute]
        finite = all_finite(param.grad) if guard else None  # pyrefly: ignore[bad-argument-type]
        exponent = _relative(exponent, group)
        beyond = plain((exponent.abs() > _EXPONENT).sum())
        moved = _moved(theta, exponent.clamp_(-_EXPONENT, _EXPONENT), group, param.dtype)
        if finite is not None:
            moved = torch.where(finite, moved, theta)
            self._nonfinite_counts[param].add_(~finite)
            beyond = torch.where(finite, beyond, torch.zeros_like(beyond))
        self._clamp_counts[param].add_(beyond)
        write(param, moved, writer)

    def _blocks(self, param: Tensor, group: Mapping[str, Any], lr: float, guard: bool, writer: Writer | None) -> None:
        """On the CPU: all passes over a block but the first find it in the cache."""
        grad = param.grad
        assert grad is not None
        if guard and not is_finite(grad):
            self._nonfinite_counts[param].add_(1)
            return
        dtype = compute_dtype(param.dtype)
        for (param_block, grad_block), part in rounded_blocks((param, grad), writer):
            exponent = grad_block.to(dtype).mul(-lr)
            low, high = torch.aminmax(exponent)
            if not (low.item() >= -_EXPONENT and high.item() <= _EXPONENT):
                self._clamp_counts[param].add_((exponent.abs() > _EXPONENT).sum())
                exponent.clamp_(-_EXPONENT, _EXPONENT)
            write(param_block, _moved(read(param_block, part), exponent, group, param.dtype), part)

    def _bucket(
        self,
        params: list[Tensor],
        group: Mapping[str, Any],
        lr: float,
        guard: bool,
        writers: list[Writer | None],
    ) -> None:
        """Nonnegative parameters of one dtype on an accelerator; nothing is read back."""
        dtype = compute_dtype(params[0].dtype)
        grads = [param.grad.to(dtype) for param in params]  # pyrefly: ignore[missing-attribute]
        exponents = torch._foreach_mul(grads, -lr)
        sizes = torch.stack([(exponent.abs() > _EXPONENT).sum() for exponent in exponents])
        if guard:
            finite = torch.stack([torch.isfinite(grad).all() for grad in grads])
            sizes = torch.where(finite, sizes, torch.zeros_like(sizes))
            torch._foreach_add_([self._nonfinite_counts[p] for p in params], list((~finite).to(torch.int64).unbind()))
            # exp(0) is 1, which changes nothing.
            exponents = [
                torch.where(one, exponent, torch.zeros_like(exponent))
                for one, exponent in zip(finite.unbind(), exponents, strict=True)
            ]
        torch._foreach_add_([self._clamp_counts[param] for param in params], list(sizes.unbind()))
        torch._foreach_clamp_min_(exponents, -_EXPONENT)
        torch._foreach_clamp_max_(exponents, _EXPONENT)
        torch._foreach_exp_(exponents)
        before = [read(param, writer) for param, writer in zip(params, writers, strict=True)]
        thetas = torch._foreach_mul(before, exponents)
        torch._foreach_clamp_min_(thetas, group["floor"])
        torch._foreach_clamp_max_(thetas, torch.finfo(params[0].dtype).max)
        if any(writers):
            for param, theta, writer in zip(params, thetas, writers, strict=True):
                write(param, theta, writer)
        else:
            torch._foreach_copy_(params, thetas)


def _relative(exponent: Tensor, group: Mapping[str, Any]) -> Tensor:
    """On the simplex only differences count: relative to the largest of each distribution."""
    if group["mode"] != "simplex":
        return exponent
    return exponent - exponent.amax(group["dim"], keepdim=True)


def _moved(theta: Tensor, exponent: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """New values in the dtype of the arithmetic; may overwrite `exponent`."""
    mode, floor = group["mode"], group["floor"]
    if mode == "simplex":
        moved = torch.softmax(theta.log() + exponent, group["dim"])
        if floor > 0:
            excess = (moved - floor).clamp_(min=0.0)
            free = 1 - floor * theta.shape[group["dim"]]
            moved = floor + excess * (free / excess.sum(group["dim"], keepdim=True))
        return moved
    largest = torch.finfo(dtype).max
    if mode == "nonnegative":
        return exponent.exp_().mul_(theta).clamp_(min=floor, max=largest)
    return _signed(theta, exponent, 1.0 if group["beta"] is None else group["beta"]).clamp_(-largest, largest)


def _signed(theta: Tensor, exponent: Tensor, beta: float) -> Tensor:
    r"""$u e^x - v e^{-x}$ with $u - v = \theta$ and $uv = \beta^2/4$.

    The larger of $u$ and $v$ is a sum and the smaller follows from the product, so neither loses digits. A small step
    is added to $\theta$, which keeps what is smaller than the rounding of $u$.
    """
    larger = theta.abs() / 2 + torch.hypot(theta, theta.new_full((), beta)) / 2
    smaller = (beta / 2) / larger * (beta / 2)
    positive = theta >= 0
    u, v = torch.where(positive, larger, smaller), torch.where(positive, smaller, larger)
    near = theta + (u * torch.expm1(exponent) - v * torch.expm1(-exponent))
    far = u * exponent.exp() - v * (-exponent).exp()
    return torch.where(exponent.abs() < 0.5, near, far)


def _check_param(param: Tensor, group: Mapping[str, Any]) -> None:
    """Refuse what no multiplicative step could repair. The values are read once, at construction."""
    mode, shape = group["mode"], tuple(param.shape)
    if mode == "simplex" and param.numel() > 0:
        axis = check_dim("dim", group["dim"], param)
        if group["floor"] * param.shape[axis] >= 1:
            raise ValueError(
                f"floor must be below 1 over the {param.shape[axis]} elements of a distribution, got {group['floor']!r}"
            )
    if param.numel() == 0 or param.is_meta or param.is_complex():
        return
    data = param.detach()
    if not bool(all_finite(data)):
        raise ValueError(f"params must be finite, got NaN or Inf in a parameter of shape {shape}")
    if mode == "signed":
        return
    if bool(plain((data < 0).any())):
        raise ValueError(f"params must be nonnegative with mode={mode!r}, got a parameter of shape {shape} that is not")
    if mode == "simplex":
        sums = data.to(compute_dtype(data.dtype)).sum(group["dim"], keepdim=True)
        if bool(plain((sums == 0).any())):
            raise ValueError(f"params must have a positive sum along dim={group['dim']}, got 0 in shape {shape}")
        if bool(plain(((sums - 1).abs() > _TOLERANCE).any())):
            warnings.warn(
                f"a parameter of shape {shape} does not sum to 1 along dim={group['dim']}, and was rescaled",
                # The line that constructs the optimizer.
                stacklevel=6,
            )
            with torch.no_grad():
                param.copy_(data / sums)
