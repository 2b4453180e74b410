r"""Learning rate, weight decay and schedule from one number: the strategies that follow from the idea of Amos.

Source: "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

Shape letters: `...` the shape of a parameter.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.optim._amos import Amos
from danlu.optim._base import loss_of
from danlu.optim._exponentiated_gradient import ExponentiatedGradient
from danlu.optim._lion import Lion
from danlu.optim._nonfinite import NONFINITE, Nonfinite, counter, event_counts, parameter_name, raise_if_nonfinite
from danlu.optim._options import check_gradients, check_shrink, checked_rate
from danlu.optim._padding import check_padding, fixed_padding
from danlu.optim._param_groups import DECAYED, Kind, kind_by_shape, parameter_groups
from danlu.optim._schedules import inverse_square, inverse_time
from danlu.optim._shrink import toward_center
from danlu.optim._tiger import Tiger
from danlu.optim._traversal import compute_dtype

__all__ = ["UpdateNormalized", "amos_strategy"]

Sigma = Literal["init", "rms"] | float | Callable[[str, Tensor], float]
Decay = Literal["inverse_time", "inverse_square"]
_DECAYS: Mapping[Decay, Callable[..., LambdaLR]] = {"inverse_time": inverse_time, "inverse_square": inverse_square}


def amos_strategy(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    half_life: float,
    alpha0: float = 1e-3,
    decay: Decay = "inverse_time",
    q: float = 1.0,
    warmup: int = 0,
    sigma: Sigma = "init",
) -> tuple[Optimizer, LambdaLR]:
    r"""An optimizer and its schedule for a model, with rates and decays that follow from the scale of each tensor.

    Definition:
        Let an update be $\theta_{t+1} = \theta_t - (\alpha_t u_t + \rho_t\theta_t)$ and the error
        $\varepsilon_t = \theta_t - \theta^*$. If the decay cancels the damage of second order, $\alpha_t^2\lVert u_t
        \rVert^2 = 2\rho_t\,\theta_t\cdot\varepsilon_t \approx 2q\rho_t\lVert\varepsilon_t\rVert^2$, and the error at
        the start is of the size $\sqrt k\,\sigma$ for $k$ entries, then
        $$\alpha_t = \alpha_0\frac{\sigma}{\mathrm{RMS}(u_t)}D(t), \qquad \rho_t = \frac{\alpha_0^2}{2q}D(t)$$
        In terms of decoupled decay: `lr` $= \alpha_0\sigma D(t)/\mathrm{RMS}(u_t)$ and the constant
        `weight_decay` $= \alpha_0\mathrm{RMS}(u_t)/(2q\sigma)$. For an alignment $\cos(u_t, \varepsilon_t)$ in
        proportion to the error $D$ is [`inverse_time`][danlu.optim.inverse_time], for a constant one
        [`inverse_square`][danlu.optim.inverse_square].

    Args:
        model: whose trainable parameters are optimized.
        optimizer_cls: `Lion` or `Tiger` (its core: the sign of one momentum, without its own scales), whose updates
            have RMS 1; or any other class or partial of one, which is called with parameter groups and then wrapped
            in [`UpdateNormalized`][danlu.optim.UpdateNormalized].
        half_life: steps after which the rate is half of $\alpha_0\sigma$, > 0: the order of the length of the run.
        alpha0: $\alpha_0 > 0$, the change per step relative to the size of the tensor; about $10^{-3}$, up to a few
            $10^{-2}$ for easy tasks and short runs.
        decay: $D$, `"inverse_time"` or `"inverse_square"`.
        q: $q > 0$, how much of the error is orthogonal to $\theta^*$; 1 in high dimension.
        warmup: steps of linear warmup, $\ge 0$.
        sigma: $\sigma$ of each tensor. `"init"`: the standard deviation of the current values of matrices and
            embeddings, which must be those of a fresh initialization, and 0.5 for biases, norm gains and other vectors.
            `"rms"`: the current RMS, for a model that is trained already. A number > 0 for all; or a function of
            qualified name and tensor.

    Returns:
        The optimizer, whose groups carry `lr`, `weight_decay`, `sigma`, `kind` and `param_names`, and the scheduler,
        to be stepped after it.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: a number is out of its range, `decay` is unknown, a $\sigma$ is not positive and finite, or
            `optimizer_cls` is `Amos`, which has all this built in.

    Numerics:
        Measured $\sigma$ are rounded to three digits, so that tensors of one shape share a group. A matrix of zeros
        gets $1/\sqrt K$ with $K$ entries per slice of axis 0, and a warning; a zero vector 0.5.

    Cost:
        Reads every parameter once.

    Differences:
        The article replaces $\lVert\varepsilon_0\rVert$ by $\lVert\theta_t\rVert$ to derive LAMB; Tiger by itself does
        the same with its RMS. Here the scale is that of the start, as derived.

    Source:
        "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

    Example:
        >>> import torch
        >>> from danlu.optim import Lion, amos_strategy
        >>> model = torch.nn.Linear(768, 768, bias=False)
        >>> optimizer, scheduler = amos_strategy(
        ...     model, Lion, alpha0=1.11e-3, half_life=1000, sigma=lambda name, param: param.shape[1] ** -0.5
        ... )
        >>> [f"{optimizer.param_groups[0][option]:.4g}" for option in ("lr", "weight_decay")]
        ['4.005e-05', '0.01538']
    """
    check_choice("decay", decay, tuple(_DECAYS))
    check_real("half_life", half_life, low=0.0, low_open=True)
    check_integer("warmup", warmup, low=0)
    _check_numbers(alpha0, q, sigma)
    if not callable(optimizer_cls):
        raise TypeError(f"optimizer_cls must be a class of optimizers or a partial of one, got {optimizer_cls!r}")
    base = getattr(optimizer_cls, "func", optimizer_cls)
    if isinstance(base, type) and issubclass(base, Amos):
        raise ValueError("optimizer_cls must not be Amos, which has these rules built in: use Amos(model)")
    groups = parameter_groups(model, weight_decay=0.0)
    optimizer: Optimizer
    if isinstance(base, type) and issubclass(base, Lion | Tiger):
        divided = _divide(groups, alpha0, q, sigma)
        if issubclass(base, Tiger):
            # Without its scales: every tensor is a vector of scale 1.
            divided = [{**group, "kind": "vector", "vector_scale": 1.0} for group in divided]
        optimizer = optimizer_cls(divided)
    else:
        # The size of the inner step is of no account; 1 is far from the limits of every dtype.
        inner = optimizer_cls([{**group, "lr": 1.0} for group in groups])
        optimizer = UpdateNormalized(inner, alpha0, sigma, q=q)
    return optimizer, _DECAYS[decay](optimizer, half_life, warmup=warmup)


class UpdateNormalized(Optimizer):
    r"""Any update rule with steps of the RMS that the strategy of Amos derives, and its decay.

    Definition:
        With the step $u$ that the inner optimizer proposes for a tensor,
        $$\theta \leftarrow \theta - \eta\,\Big(\frac{u}{\mathrm{RMS}(u)} + \lambda\theta\Big), \qquad
        \eta = \alpha_0\sigma, \qquad \lambda = \frac{\alpha_0}{2q\sigma}$$
        where $\eta$ is the `lr` and $\lambda$ the `weight_decay` of the tensor's group here, and $\alpha_0$ = `alpha0`,
        $\sigma$ = `sigma`, $q$ = `q`. A tensor whose proposed step is zero, or not finite, stays as it is.

    Args:
        inner: the optimizer that proposes the direction: SGD, Adam, RMSprop, ... without weight decay. Its rate is of
            no account. It must not read the parameters: it sees zeros in their place.
        alpha0: $\alpha_0 > 0$, the change per step relative to the size of the tensor.
        sigma: $\sigma$ of each tensor, as in [`amos_strategy`][danlu.optim.amos_strategy].
        q: $q > 0$.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"skip"`: the inner optimizer does not see
            it in this step (one wait for the device). `"shrink"`: nor then, and the tensor becomes
            $c + (\theta - c)\,r$ with $c$ the group's `center` (0 without one) and $r$ = `shrink`. `"raise"`:
            `RuntimeError` that names the parameters; no tensor is changed. `"off"`: not looked for; the state of the
            inner optimizer may then be spoiled.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.

    Returns:
        From `step`: what the closure returned, or None. Schedule the `lr` of this optimizer, not of the inner one; its
        checkpoint holds the state of the inner one. `nonfinite_events` counts skipped gradients by parameter name.

    Raises:
        TypeError: `inner` is not an optimizer, or an option is not of its type.
        ValueError: a number is out of its range; `inner` has a weight decay or a rate of 0, or is one that reads the
            parameters (Amos, ExponentiatedGradient, Tiger) or calls the closure itself (LBFGS).
        RuntimeError: from `step` on a sparse gradient, or on a bad gradient with `nonfinite="raise"`.

    Numerics:
        The proposed step is what the inner optimizer makes of zero, so it is not rounded to the spacing of the
        parameter; its RMS is computed relative to its largest entry, which cannot overflow. float16 and bfloat16
        parameters are computed in float32 and rounded to nearest.

    Cost:
        A copy of the parameters during the step, and about six passes besides the inner step.

    Differences:
        The article writes this per optimizer; the wrapper makes one recipe of it.

    Source:
        "基于Amos优化器思想推导出来的一些“炼丹策略”" (2022-11-22).

    Example:
        >>> import torch
        >>> from danlu.optim import UpdateNormalized
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = UpdateNormalized(torch.optim.SGD([w], lr=1.0), alpha0=0.1, sigma=1.0)
        >>> w.grad = torch.tensor([3e-5, -4e-5])
        >>> optimizer.step()
        >>> w.data
        tensor([-0.0849,  0.1131])
    """

    def __init__(
        self,
        inner: Optimizer,
        alpha0: float = 1e-3,
        sigma: Sigma = "init",
        *,
        q: float = 1.0,
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
    ) -> None:
        if not isinstance(inner, Optimizer):
            raise TypeError(f"inner must be a torch.optim.Optimizer, got {type(inner).__name__}")
        if isinstance(inner, Amos | ExponentiatedGradient | Tiger | torch.optim.LBFGS):
            reason = "calls the closure itself" if isinstance(inner, torch.optim.LBFGS) else "reads the parameters"
            raise ValueError(
                f"inner must propose its step from the gradients alone, but {type(inner).__name__} {reason}"
            )
        _check_numbers(alpha0, q, sigma)
        for group in inner.param_groups:
            _check_inner(group)
        self.inner = inner
        self._recipe: tuple[float, float, Sigma] = (alpha0, q, sigma)
        self._nonfinite_counts: dict[Tensor, Tensor] = {}
        self._complete = False
        defaults = {"lr": alpha0, "weight_decay": 0.0, "nonfinite": nonfinite, "shrink": shrink}
        check_choice("nonfinite", nonfinite, NONFINITE)
        check_shrink(defaults)
        super().__init__(_divide(inner.param_groups, *self._recipe), defaults)
        self._complete = True
        self.state = inner.state

    @property
    def nonfinite_events(self) -> dict[str, int]:
        """How many gradients were skipped so far, by parameter name; empty when there were none."""
        return event_counts(self.param_groups, self._nonfinite_counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to both optimizers; its options are the inner one's. The dictionary is not modified."""
        if not self._complete:
            super().add_param_group(param_group)
            check_padding(self.param_groups)
            return
        _check_inner(param_group)
        self.inner.add_param_group({"weight_decay": 0.0, **param_group})
        check_padding(self.inner.param_groups)
        for group in _divide(self.inner.param_groups[-1:], *self._recipe):
            super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner", "_recipe", "_nonfinite_counts", "_complete")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, each with the options of the inner one: some optimizers count steps in theirs."""
        packed = super().state_dict()
        for group, saved in zip(self.param_groups, packed["param_groups"], strict=True):
            inner = next(one for one in self.inner.param_groups if any(p is group["params"][0] for p in one["params"]))
            saved["inner"] = {key: value for key, value in inner.items() if key not in ("params", "param_names")}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, also into the inner optimizer; both own copies of its tensors."""
        groups = [{key: value for key, value in one.items() if key != "inner"} for one in state_dict["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        # The inner optimizer numbers the parameters by its own groups, and knows the dtypes of its state.
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        entries = {param: state_dict["state"].get(key) for param, key in zip(own, saved, strict=True)}
        numbered = enumerate(chain.from_iterable(group["params"] for group in self.inner.param_groups))
        state = {
            number: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
            for number, param in numbered
            if (entry := entries[param]) is not None
        }
        options = {
            param: saved.get("inner", {})
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
            for param in group["params"]
        }
        groups = [
            {**packed, **(options[group["params"][0]] if group["params"] else {})}
            for group, packed in zip(self.inner.param_groups, self.inner.state_dict()["param_groups"], strict=True)
        ]
        self.inner.load_state_dict({"state": state, "param_groups": groups})
        self.state = self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Let the inner optimizer propose a step for every gradient, and take it at the derived size."""
        loss = loss_of(closure)
        check_gradients("UpdateNormalized", self.param_groups)
        hidden = self._bad_gradients()
        with contextlib.ExitStack() as padding:
            for group in self.param_groups:
                padding.enter_context(fixed_padding(group, group["params"]))
            self._take(hidden)
        return loss

    def _take(self, hidden: Mapping[Tensor, Tensor]) -> None:
        """The step, with the gradients `hidden` from the inner optimizer."""
        live: list[tuple[Tensor, Tensor, float, float]] = []
        for group in self.param_groups:
            numbers = checked_rate(group["lr"]), group["weight_decay"]
            chosen = [p for p in group["params"] if p.grad is not None and p not in hidden]
            live += [(p, p.detach().clone(), *numbers) for p in chosen]
        try:
            for param in hidden:
                param.grad = None
            for param, *_ in live:
                param.zero_()
            self.inner.step()
        except BaseException:
            for param, start, *_ in live:
                param.copy_(start)
            raise
        finally:
            for param, grad in hidden.items():
                param.grad = grad
        for param, start, rate, decay in live:
            param.copy_(_moved(start, param, rate, decay))
        for group in self.param_groups:
            for param in group["params"]:
                if param in hidden and group["nonfinite"] == "shrink":
                    param.copy_(toward_center(param.to(compute_dtype(param.dtype)), group))

    def _bad_gradients(self) -> dict[Tensor, Tensor]:
        """Gradients to hide from the inner optimizer, by parameter."""
        looked: list[Tensor] = []
        strict: dict[str, Tensor] = {}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and group["nonfinite"] == "raise":
                    strict[parameter_name(self.param_groups, g, i)] = param.grad
                elif param.grad is not None and group["nonfinite"] in ("skip", "shrink"):
                    looked.append(param)
        raise_if_nonfinite(strict)
        flags = [torch.isfinite(param.grad).all() for param in looked if param.grad is not None]
        bad = {p: p.grad for p, finite in zip(looked, flags, strict=True) if not finite and p.grad is not None}
        for param in bad:
            counter(self._nonfinite_counts, param).add_(1)
        return bad


def _moved(start: Tensor, proposal: Tensor, lr: float, weight_decay: float) -> Tensor:
    """The parameter after a step in the direction of `proposal` (minus the inner step)."""
    if start.numel() == 0:
        return start
    dtype = compute_dtype(start.dtype)
    theta, direction = start.to(dtype), proposal.to(dtype)
    largest = direction.abs().max()
    # Relative to the largest entry, squares neither overflow nor vanish.
    unit = direction / largest
    rms = ((unit.abs().square()).sum() / unit.numel()).sqrt()
    moved = theta + lr * (unit / rms - weight_decay * theta)
    return torch.where(torch.isfinite(largest) & (largest > 0), moved, theta).to(start.dtype)


def _divide(groups: Sequence[Mapping[str, Any]], alpha0: float, q: float, sigma: Sigma) -> list[dict[str, Any]]:
    """Groups of tensors of one scale, with the rate and the decay that follow from it."""
    divided: dict[object, dict[str, Any]] = {}
    zeros: list[str] = []
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            name = parameter_name(groups, g, i)
            kind: Kind = group.get("kind") or kind_by_shape(param)
            size = _size_of(name, param, kind, sigma, zeros)
            own = {key: group[key] for key in ("kind", "center", "padding_idx") if key in group}
            own |= {"lr": alpha0 * size, "weight_decay": alpha0 / (2 * q * size), "sigma": size}
            part = divided.setdefault(repr(sorted(own.items())), {**own, "params": []})
            part["params"].append(param)
            if group.get("param_names"):
                part.setdefault("param_names", []).append(name)
    if zeros:
        listed = ", ".join(zeros[:10]) + (f" and {len(zeros) - 10} more" if len(zeros) > 10 else "")
        warnings.warn(f"sigma of these zero tensors is taken as 1/sqrt(fan_in): {listed}", stacklevel=4)
    return list(divided.values())


def _size_of(name: str, param: Tensor, kind: Kind, sigma: Sigma, zeros: list[str]) -> float:
    if callable(sigma):
        return check_real(f"sigma of {name}", sigma(name, param), low=0.0, low_open=True)
    if not isinstance(sigma, str):
        return float(sigma)
    if kind not in DECAYED and (sigma == "init" or param.numel() == 0):
        return 0.5
    values = param.detach().to(torch.float64)
    measured = 0.0
    if param.numel() > 0:
        spread = (values - values.mean() if sigma == "init" else values).abs().square().mean().sqrt()
        # A constant that is not 0 has no spread, but a size.
        measured = float(spread.item()) or float(values.abs().max().item())
        if not math.isfinite(measured):
            raise ValueError(f"sigma of {name} cannot be measured: it holds NaN or Inf")
    # Three digits: tensors of one shape and initialization differ by the sampling error of their size only.
    measured = float(f"{measured:.3g}")
    if measured > 0:
        return measured
    if kind not in DECAYED:
        return 0.5
    zeros.append(name)
    return 1.0 / math.sqrt(max(1, math.prod(param.shape[1:])))


def _check_numbers(alpha0: float, q: float, sigma: Sigma) -> None:
    check_real("alpha0", alpha0, low=0.0, low_open=True)
    check_real("q", q, low=0.0, low_open=True)
    if isinstance(sigma, str):
        check_choice("sigma", sigma, ("init", "rms"))
    elif not callable(sigma):
        check_real("sigma", sigma, low=0.0, low_open=True)


def _check_inner(group: Mapping[str, Any]) -> None:
    if group.get("weight_decay", 0) != 0:
        raise ValueError(f"weight_decay of inner must be 0, since the decay is derived, got {group['weight_decay']!r}")
    lr = group.get("lr", 1.0)
    if not isinstance(lr, Tensor) and lr == 0:
        raise ValueError("lr of inner must not be 0: the step that it proposes would vanish")
