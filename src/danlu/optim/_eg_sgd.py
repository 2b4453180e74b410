r"""SGD with a gain per element that is learned by exponentiated gradients.

Source: "指数梯度下降 + 元学习 = 自适应学习率" (2022-03-03); arXiv 2202.00145.

Shape letters: `...` any shape, the same for a parameter, its gradient and its gain.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from danlu._common.checks import check_real
from danlu.optim._base import GroupOptimizer, loss_of
from danlu.optim._gain_steps import advance
from danlu.optim._gains import Rule, items_of
from danlu.optim._nonfinite import Nonfinite, raise_where_wanted
from danlu.optim._options import check_rates, check_real_gradients, check_shared_options, checked_rate
from danlu.optim._rounding import RoundingMode

__all__ = ["EGSGD"]


class EGSGD(GroupOptimizer):
    r"""SGD with a gain per element that is learned by exponentiated gradients: the plain form of the article.

    Definition:
        With $\nu_0 = 1$ and $g_t$ = the gradient of a parameter $\theta_t$,
        $$\nu_{t+1} = \nu_t \odot e^{\gamma\,g_{t-1} \odot g_t}, \qquad
        \theta_{t+1} = \theta_t - \eta\,\nu_{t+1} \odot g_t$$
        with $\eta$ = `lr` and $\gamma$ = `gamma`. It is one step of exponentiated gradient descent on $\nu$, since
        $\nabla_{\nu_t} L = -\eta\,g_{t-1} \odot g_t$. Weight decay $\lambda$ is decoupled:
        $\theta \leftarrow (1 - \eta\lambda)\theta$ first.

    Args:
        params: parameters, named parameters, or groups of them with their own options, as in torch.
        lr: $\eta \ge 0$, a number or a tensor with one element.
        gamma: $\gamma \ge 0$, in units of one over a gradient squared; 0 is SGD.
        weight_decay: $\lambda \ge 0$.
        nonfinite: as in [`EGStepSize`][danlu.optim.EGStepSize].
        shrink: as in `EGStepSize`.
        rounding: as in `EGStepSize`.
        seed: as in `EGStepSize`.
        foreach: as in `EGStepSize`.
        maximize: climb instead of descend.

    Returns:
        From `step`: what the closure returned, or None. `nonfinite_events` as in `EGStepSize`.

    Raises:
        TypeError: an option is not of its type.
        ValueError: `lr`, `gamma`, `weight_decay` or `seed` < 0, or an unknown `nonfinite` or `rounding`; also in
            a group.
        RuntimeError: from `step` on a sparse or complex gradient, or on a bad one with `nonfinite="raise"`.

    Numerics:
        The gain is kept as its logarithm, which stops at $\pm 80$. Gradients much larger than $\gamma^{-1/2}$ drive it
        there within a step: take `EGStepSize`, which uses signs, unless the gradients are known to be small.
        float16 and bfloat16 parameters are computed in float32, as which their state is kept, and rounded as
        `rounding` says.

    Cost:
        8 bytes of state and 28 bytes of memory traffic per float32 parameter.

    Source:
        "指数梯度下降 + 元学习 = 自适应学习率" (2022-03-03); arXiv 2202.00145.

    Example:
        >>> import torch
        >>> from danlu.optim import EGSGD
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = EGSGD([w], lr=0.05, gamma=0.1)
        >>> for _ in range(4):
        ...     w.grad = torch.tensor([2.0, 0.5]) * w.data
        ...     optimizer.step()
        >>> w.data
        tensor([ 0.4817, -1.7783])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        gamma: float = 0.01,
        *,
        weight_decay: float = 0.0,
        nonfinite: Nonfinite = "skip",
        shrink: float = 0.99,
        rounding: RoundingMode | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "nonfinite": nonfinite,
            "shrink": shrink,
            "rounding": rounding,
            "seed": seed,
            "foreach": foreach,
            "maximize": maximize,
            # As in `EGStepSize`.
            "step": 0,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_shared_options(group)
        check_real("gamma", group["gamma"], low=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; `closure` recomputes the loss and returns it."""
        loss = loss_of(closure)
        check_rates(self.param_groups)
        check_real_gradients("EGSGD", self.param_groups)
        raise_where_wanted(self.param_groups)
        number = 0
        for group in self.param_groups:
            rate = checked_rate(group["lr"])
            rule = Rule(
                kind="sgd",
                lr=rate,
                climb=group["maximize"],
                decay=rate * group["weight_decay"],
                gain_lr=group["gamma"],
                sign_gain=False,
                guard=group["nonfinite"] in ("skip", "shrink"),
            )
            items = items_of(group, rule, self.state, self._nonfinite_counts, first=number)
            with self._around(group, [item.param for item in items], [item.writer for item in items].__getitem__):
                advance(items, foreach=group["foreach"], fused=False, shared=False)
            number += len(group["params"])
            group["step"] += 1
        return loss
