"""Exponentiated gradients against projection and softplus for a nonnegative factorization of images."""

from danlu.lab.tasks.factorization import Factorization
from danlu.lab.trial import Arm, Budget, Comparison, Options, Trial

# From 0.08 to 3.6: the best of every arm is inside.
_RATES: tuple[Options, ...] = tuple({"lr": round(0.08 * 2.0 ** (power / 2), 3)} for power in range(12))

TRIAL = Trial(
    claim=(
        "After equally many steps exponentiated gradients reach a lower error of a nonnegative factorization than "
        "projected gradients and than gradients through a softplus, on the pixels shown and on pixels held out."
    ),
    source="“指数梯度下降 + 元学习 = 自适应学习率” (2022-03-03); Kivinen and Warmuth (1997)",
    equation=r"W\leftarrow W\odot e^{-\eta\nabla_W},\qquad H\leftarrow H\odot e^{-\eta\nabla_H}",
    task=Factorization(),
    arms={
        "projected": Arm(options={"method": "projected"}, grid=_RATES),
        "softplus": Arm(options={"method": "softplus"}, grid=_RATES),
        "egu": Arm(options={"method": "egu"}, grid=_RATES, method="danlu.optim.ExponentiatedGradient"),
    },
    decides=(
        Comparison(candidate="egu", baseline="projected", metric="relative_error@shown", better="lower"),
        Comparison(candidate="egu", baseline="softplus", metric="relative_error@shown", better="lower"),
        Comparison(candidate="egu", baseline="projected", metric="relative_error@held_out", better="lower"),
        Comparison(candidate="egu", baseline="softplus", metric="relative_error@held_out", better="lower"),
    ),
    selects=("relative_error@shown", "lower"),
    sizes={
        "ci": Budget(steps=20, seeds=3, grid=2),
        "demo": Budget(steps=300, seeds=5),
        "report": Budget(steps=1000, seeds=8, tuning_seeds=2),
        "gpu": Budget(steps=20000, seeds=8, options={"device": "cuda", "rank": 32}),
    },
    notes=(
        "Every arm has the same start, the same steps on full batches and twelve learning rates tuned on another seed. "
        "The part of the factors that is (nearly) zero is shown and decides nothing."
    ),
)
