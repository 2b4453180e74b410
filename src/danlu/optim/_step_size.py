r"""Step sizes adapted during training by exponentiated gradient descent: a gain per element, a scale per tensor.

Source: Amid, Anil, Fifty and Warmuth (2022), "Step-size Adaptation Using Exponentiated Gradient Updates",
arXiv 2202.00145; "指数梯度下降 + 元学习 = 自适应学习率" (2022-03-03).

Shape letters: `...` any shape, the same for a parameter, its gradient and its gain.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from danlu._common.checks import check_choice, check_integer
from danlu.optim._base import GroupOptimizer, loss_of
from danlu.optim._displacement import wrapped_step
from danlu.optim._eg_sgd import EGSGD
from danlu.optim._gain_steps import advance
from danlu.optim._gains import Item, Kind, Measured, adapt_scales, items_of
from danlu.optim._nonfinite import NONFINITE, Nonfinite, parameter_name, plain, raise_where_wanted
from danlu.optim._options import check_real_gradients, check_shrink
from danlu.optim._padding import check_padding
from danlu.optim._rounding import Rounding, RoundingMode
from danlu.optim._step_size_options import check_adaptation, check_options, check_wrapped, rule_of

# Pickles of earlier versions look for EGSGD here.
__all__ = ["EGSGD", "EGStepSize"]

_INNER = ("sgdm", "adam")
# Prefix of the inner optimizer's entries in the one state dict.
_INNER_KEY = "inner."


class EGStepSize(GroupOptimizer):
    r"""Step-size adaptation by exponentiated gradients around momentum SGD, Adam, or any optimizer.

    Definition:
        The step of an inner optimizer is multiplied by a gain $\nu$ per element and a scale $s$ per tensor, both 1 at
        the start. They rise where a step turns out to agree with the next gradient, and fall where it does not:
        $$s \leftarrow \mathrm{clip}(s\,e^{\gamma_s a}), \qquad \nu \leftarrow \mathrm{clip}(\nu\,e^{\gamma_\nu e})$$
        With $g$ = the gradient, $d$ = what the last step subtracted but for its scale, $\gamma_\nu$ = `gain_lr`,
        $\gamma_s$ = `scale_lr`, clipped to `gain_range` and `scale_range`:
        $$a = \frac{\langle g, d\rangle}{(\|g\| + 10^{-10})(\|d\| + 10^{-10})}\ \text{ or }\ \langle g, d\rangle,
        \qquad e = \operatorname{sign} g \cdot \operatorname{sign} \bar g\ \text{ or }\ g\,\bar g$$
        where the first forms are those of `normalize_scale` and `sign_gain`.

        - `inner="sgdm"`, the optimizer of the authors: $m \leftarrow \mu m + \nu g$ and
          $\theta \leftarrow \theta - s\eta m$ with $d = \eta m$; $\bar g$ is the average of the gradients before
          this one, $\bar g \leftarrow \beta\bar g + (1-\beta) g$, divided by $1 - \beta^{t-1}$ in the second form.
        - `inner="adam"`: $\theta \leftarrow \theta - s\,\nu\,\eta\,\hat m / (\sqrt{\hat v} + \epsilon)$; $d$ is the
          last step with its gains, $\bar g$ the last step without them.
        - an optimizer: it takes its step $\Delta$, which becomes $s\,\nu\,\Delta$; $d = -\nu\Delta$ and
          $\bar g = -\Delta$ of the step before.

        $\theta$ = a parameter, $\eta$ = `lr`, $\mu$ = `momentum`, $\beta$ = `momentum_beta`. Weight decay is decoupled
        and not adapted: $\theta \leftarrow (1 - \eta\lambda)\theta$ first.

    Args:
        inner: `"sgdm"` or `"adam"`, whose state shares memory with the adaptation, or a `torch.optim.Optimizer`; that
            one needs a copy of the parameters during a step and of its last displacement between steps.
        params: with a string: parameters, named parameters, or groups of them. With an optimizer: None.
        lr: $\eta \ge 0$, a number or a tensor with one element; None is 0.01 for `"sgdm"` and 0.001 for `"adam"`. With
            an optimizer: None; its groups are shared, so that schedulers act on its learning rate.
        gain_lr: $\gamma_\nu \ge 0$; 0 keeps the gains as they are, and needs no memory if it always was.
        scale_lr: $\gamma_s \ge 0$; likewise.
        gain_range: smallest and largest gain, around 1; (0, `math.inf`) stops at $e^{\pm 80}$.
        scale_range: smallest and largest scale.
        normalize_scale: which form of $a$. The raw product has the unit of the gradient squared and can move the scale
            from end to end within one step.
        sign_gain: which form of $e$; the same warning.
        scale_scope: `"tensor"`, or `"global"` for one scale moved by the inner products over all tensors
            whose gradients are there and good; the others have it too.
        per_coordinate: whether there are gains; False leaves only the scale.
        momentum_beta: $\beta \in [0, 1)$ of `"sgdm"`; None is 0.9.
        momentum: $\mu \in [0, 1)$ of `"sgdm"`; None is 0.9.
        betas: of `"adam"`, each in $[0, 1)$; None is (0.9, 0.999).
        eps: $\epsilon \ge 0$ of `"adam"`; None is $10^{-8}$.
        weight_decay: $\lambda \ge 0$; None is 0.
        nonfinite: what happens to a tensor whose gradient holds NaN or Inf. `"skip"`: it and all of its state stay as
            they are for this step. `"shrink"`: the state stays, and the tensor becomes $c + (\theta - c)\,r$ with $c$
            the group's `center` (0 without one) and $r$ = `shrink`. `"raise"`: `RuntimeError` that names the
            parameters; no tensor is changed. `"off"`: not looked for. Around an optimizer, `"skip"` and `"shrink"` wait
            for the device once per step.
        shrink: $r \in (0, 1]$, of `nonfinite="shrink"`.
        rounding: how results are rounded into float16 and bfloat16 parameters, see [`Rounding`][danlu.optim.Rounding];
            None: stochastically for bfloat16, to nearest for float16. Around an optimizer: None, and
            the stretched step is rounded to nearest.
        seed: of stochastic rounding.
        foreach: None or True takes tensors on the CPU in cache-sized blocks, False one by one. Accelerators and
            DTensors always take plain operations.
        fused: None takes the compiled step of `"sgdm"` on the CPU where it can run, unless `foreach` is given; True
            raises where it cannot; False never. `"adam"` and optimizers have none. It rounds low-precision parameters
            to nearest only.
        maximize: climb instead of descend. Around an optimizer this is its own option.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` counts the gradients that were not finite
        by parameter name since construction (it is not part of the checkpoint).

    Raises:
        TypeError: an option is not of its type, or parameters are missing.
        ValueError: an option is out of its range, belongs to the other kind of inner optimizer, or a range does not
            hold 1; also in a group.
        RuntimeError: from `step` on a sparse or complex gradient, or on a bad one with `nonfinite="raise"`.

    Numerics:
        Gains and scales are kept as logarithms. The state of float16 and bfloat16 parameters is float32, and so is
        their arithmetic; the parameter is rounded as `rounding` says. Inner products that overflow leave the scale
        alone. With both rates 0 every step of wider parameters is bit for bit that of `torch.optim.SGD(momentum)` or
        of `torch.optim.AdamW` (same decay, not fused), or of the optimizer given.

    Cost:
        12 bytes of state per float32 parameter for `"sgdm"` and `"adam"` (4 and 8 with `per_coordinate=False`), 8 more
        than its own for an optimizer. Memory traffic of `"sgdm"`: 36 bytes per parameter, and 8 for the inner products
        where a tensor does not fit into the cache. Kahan's compensation: 2 bytes per low-precision parameter.

    Differences:
        The authors' code multiplies the learning rate into the momentum, PyTorch's SGD into the step; the two agree
        while it is constant, and here a schedule acts at once. Gains of `"adam"` and of optimizers are ours: a gain on
        the gradient would be normalized away. The authors' code ignores sparse gradients; here they raise.

    Source:
        arXiv 2202.00145, and `egdd.py` of tensorflow/lingvo for the details that the paper leaves open;
        "指数梯度下降 + 元学习 = 自适应学习率" (2022-03-03).

    Example:
        >>> import torch
        >>> from danlu.optim import EGStepSize
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = EGStepSize("sgdm", [w], lr=0.05)
        >>> for _ in range(5):
        ...     w.grad = torch.tensor([2.0, 0.5]) * w.data
        ...     optimizer.step()
        >>> w.data
        tensor([-0.0406, -1.3712])
        >>> {name: round(scale, 4) for name, scale in optimizer.scales().items()}
        {"param_groups[0]['params'][0]": 1.0039}
    """

    _copied: ClassVar[tuple[str, ...]] = (*GroupOptimizer._copied, "_shared", "_nonfinite", "_shrink", "_kind", "inner")
    # Pickles of earlier versions lack it.
    _shrink = 0.99

    def __init__(
        self,
        inner: Literal["sgdm", "adam"] | Optimizer,
        params: ParamsT | None = None,
        lr: float | Tensor | None = None,
        *,
        gain_lr: float = 0.01,
        scale_lr: float = 0.001,
        gain_range: tuple[float, float] = (1e-2, 1e2),
        scale_range: tuple[float, float] = (0.1, 10.0),
        normalize_scale: bool = True,
        sign_gain: bool = True,
        scale_scope: Literal["tensor", "global"] = "tensor",
        per_coordinate: bool = True,
        momentum_beta: float | None = None,
        momentum: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
        rounding: RoundingMode | None = None,
        seed: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        own: dict[str, Any] = {
            "gain_lr": gain_lr,
            "scale_lr": scale_lr,
            "gain_range": gain_range,
            "scale_range": scale_range,
            "normalize_scale": normalize_scale,
            "sign_gain": sign_gain,
            "per_coordinate": per_coordinate,
        }
        of_inner: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "momentum_beta": momentum_beta,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "seed": seed,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
        }
        check_choice("scale_scope", scale_scope, ("tensor", "global"))
        check_choice("nonfinite", nonfinite, NONFINITE)
        check_shrink({"shrink": shrink})
        self._shared = scale_scope == "global"
        self._nonfinite, self._shrink = nonfinite, shrink
        self.inner: Optimizer | None = inner if isinstance(inner, Optimizer) else None
        if isinstance(inner, Optimizer):
            check_wrapped(inner, params, of_inner)
            self._kind: Kind = "wrapped"
            self._check_group(own)
            # The groups are the inner optimizer's own, so that schedulers reach its learning rate.
            super().__init__(inner.param_groups, own)
            self.param_groups = inner.param_groups
            return
        check_choice("inner", inner, _INNER)
        if params is None:
            raise TypeError(f"inner={inner!r} needs params")
        foreign = {"sgdm": ("betas", "eps"), "adam": ("momentum", "momentum_beta")}[inner]
        for name in foreign:
            if of_inner.pop(name) is not None:
                raise ValueError(f"{name} has no meaning with inner={inner!r}")
        fallbacks = {
            "lr": 1e-2 if inner == "sgdm" else 1e-3,
            "momentum": 0.9,
            "momentum_beta": 0.9,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "seed": 0,
        }
        for name, value in fallbacks.items():
            if name in of_inner and of_inner[name] is None:
                of_inner[name] = value
        self._kind = inner
        # Calls of `step`: part of the checkpoint, since the bits of stochastic rounding depend on it.
        defaults = {**of_inner, **own, "nonfinite": nonfinite, "shrink": shrink, "step": 0}
        self._check_group(defaults)
        super().__init__(params, defaults)

    def scales(self) -> dict[str, float]:
        """The scale $s$ of every tensor that has one, by parameter name (waits for the device)."""
        return {name: state["log_scale"].exp().item() for name, state in self._named_states("log_scale")}

    def gain_histograms(self, bins: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
        r"""Counts `(bins,)` and edges `(bins + 1,)` in $\log_{10}\nu$ of every tensor that has gains, by its name."""
        check_integer("bins", bins, low=1)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, state in self._named_states("log_gain"):
            logs = plain(state["log_gain"]).detach().flatten().float().cpu() / math.log(10)
            counts, edges = torch.histogram(logs, bins=bins)
            found[name] = counts.to(torch.int64), edges
        return found

    def _named_states(self, key: str) -> list[tuple[str, dict[str, Tensor]]]:
        return [
            (parameter_name(self.param_groups, g, i), self.state[param])
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
            if param in self.state and key in self.state[param]
        ]

    def _check_group(self, group: Mapping[str, Any]) -> None:
        if self.inner is None:
            check_options(group, self._kind)
        else:
            check_adaptation(group)

    def _later_options(self) -> dict[str, Any]:
        # The groups of an optimizer that is wrapped are its own.
        return {} if self.inner is not None else {**super()._later_options(), "fused": None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not give are the optimizer's defaults. The dictionary is not modified."""
        if self.inner is None or not isinstance(param_group, dict):
            super().add_param_group(param_group)
            return
        self._check_group(self.defaults | param_group)
        if self.param_groups is self.inner.param_groups:
            self.inner.add_param_group(self.defaults | param_group)
        else:
            # Under construction: the inner optimizer's groups get our options.
            Optimizer.add_param_group(self, param_group)
        check_padding(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimizers; entries of the inner one begin with `inner.`."""
        packed = super().state_dict()
        if self.inner is not None:
            state = {key: dict(value) for key, value in packed["state"].items()}
            for key, entries in self.inner.state_dict()["state"].items():
                if isinstance(entries, dict):
                    state.setdefault(key, {}).update({f"{_INNER_KEY}{name}": value for name, value in entries.items()})
                else:
                    state[f"{_INNER_KEY}{key}"] = entries
            packed["state"] = state
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the optimizer owns copies of its tensors, in the dtypes in which they were saved."""
        if self.inner is None:
            super().load_state_dict(state_dict)
            return
        own: dict[Any, Any] = {}
        of_inner: dict[Any, Any] = {}
        for key, entries in state_dict["state"].items():
            if isinstance(entries, dict):
                named = {name: value for name, value in entries.items() if name.startswith(_INNER_KEY)}
                own[key] = {name: value for name, value in entries.items() if name not in named}
                of_inner[key] = {name.removeprefix(_INNER_KEY): _clone(value) for name, value in named.items()}
            else:
                of_inner[str(key).removeprefix(_INNER_KEY)] = entries
        kept = {key: entries for key, entries in own.items() if entries}
        groups = state_dict["param_groups"]
        self.inner.load_state_dict({"state": {k: v for k, v in of_inner.items() if v != {}}, "param_groups": groups})
        super().load_state_dict({"state": kept, "param_groups": groups})
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        check_real_gradients("EGStepSize", self.param_groups)
        raise_where_wanted(self.param_groups, self._nonfinite if self.inner is not None else None)
        if self.inner is not None:
            items = [item for group in self.param_groups for item in self._items(group)]
            hide_bad = self._nonfinite in ("skip", "shrink")
            with contextlib.ExitStack() as around:
                for group in self.param_groups:
                    around.enter_context(self._around_wrapped(group))
                wrapped_step(self.inner, items, self._adapt_scales, hide_bad=hide_bad)
            return loss
        batches: list[list[Item]] = []
        number = 0
        for group in self.param_groups:
            batches.append(self._items(group, number))
            number += len(group["params"])
            group["step"] += 1
        with contextlib.ExitStack() as around:
            for group, items in zip(self.param_groups, batches, strict=True):
                params, writers = [item.param for item in items], [item.writer for item in items]
                around.enter_context(self._around(group, params, writers.__getitem__))
            self._advance(batches)
        return loss

    def _advance(self, batches: Sequence[Sequence[Item]]) -> None:
        """The step of all tensors, which are listed by group."""
        if not self._shared:
            for group, items in zip(self.param_groups, batches, strict=True):
                advance(items, foreach=group["foreach"], fused=group["fused"], shared=False)
            return
        first = self.param_groups[0]
        before = self._all_scales()
        everything = list(chain.from_iterable(batches))
        advance(everything, foreach=first["foreach"], fused=first["fused"], shared=True)
        self._share_scale(before)

    def _around_wrapped(self, group: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """`_around` for a group of the inner optimizer, whose options of these names are its own."""
        params = [param for param in group["params"] if param.grad is not None]
        nearest = Rounding("nearest")
        return self._around(
            {**group, "nonfinite": self._nonfinite, "shrink": self._shrink},
            params,
            lambda i: nearest.of(i, params[i].dtype),
        )

    def _items(self, group: Mapping[str, Any], number: int | None = None) -> list[Item]:
        rule = rule_of(self._kind, group if self.inner is None else {**self.defaults, **group})
        scales = (state["log_scale"] for state in self.state.values() if "log_scale" in state)
        shared = next(scales, None) if self._shared else None
        return items_of(group, rule, self.state, self._nonfinite_counts, shared, number)

    def _all_scales(self) -> Tensor | None:
        """The logarithms of the scales of all tensors, if they share one."""
        if not self._shared:
            return None
        scales = [state["log_scale"] for state in self.state.values() if "log_scale" in state]
        return torch.stack([scale.double().to(scales[0].device) for scale in scales]) if scales else None

    def _share_scale(self, before: Tensor | None) -> None:
        """Move the one scale also for tensors that had no gradient in this step, or a bad one."""
        after = self._all_scales()
        if before is None or after is None:
            return
        moved = after[(after - before).abs().argmax()]
        for state in self.state.values():
            if "log_scale" in state:
                state["log_scale"].copy_(moved)

    def _adapt_scales(self, items: Sequence[Item], found: Sequence[Measured]) -> None:
        before = self._all_scales()
        adapt_scales(items, found, shared=self._shared)
        self._share_scale(before)


def _clone(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value
