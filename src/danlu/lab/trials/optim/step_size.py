"""Adapted step sizes against constant ones, over four decades of learning rates."""

from danlu.lab.tasks.learning_rates import LearningRates
from danlu.lab.trial import Arm, Budget, Comparison, Trial

TRIAL = Trial(
    claim=(
        "Momentum SGD with step sizes adapted by exponentiated gradients is more accurate at low learning rates "
        "(mean over 0.0001 to 0.01) and usable over a wider range than momentum SGD, and at its best learning rate not "
        "worse (within half a point of accuracy)."
    ),
    source="“指数梯度下降 + 元学习 = 自适应学习率” (2022-03-03); arXiv 2202.00145",
    equation=(
        r"s\leftarrow\mathrm{clip}(s\,e^{\gamma_s\cos(g,m)}),\quad "
        r"\nu\leftarrow\mathrm{clip}(\nu\,e^{\gamma_\nu\operatorname{sign}g\,\operatorname{sign}\bar g}),\quad "
        r"m\leftarrow\mu m+\nu\odot g,\quad \theta\leftarrow\theta-s\,\eta\,m"
    ),
    task=LearningRates(),
    arms={
        "sgdm": Arm(options={"optimizer": "sgdm"}),
        "eg_sgdm": Arm(options={"optimizer": "eg_sgdm"}, method="danlu.optim.EGStepSize"),
        "adam": Arm(options={"optimizer": "adam"}),
        "eg_adam": Arm(options={"optimizer": "eg_adam"}, method="danlu.optim.EGStepSize"),
    },
    decides=(
        Comparison(candidate="eg_sgdm", baseline="sgdm", metric="accuracy@low", better="higher"),
        Comparison(candidate="eg_sgdm", baseline="sgdm", metric="usable_decades", better="higher"),
        Comparison(candidate="eg_sgdm", baseline="sgdm", metric="accuracy@best", better="higher", margin=0.005),
    ),
    selects=("accuracy@low", "higher"),
    sizes={
        "ci": Budget(steps=20, seeds=3, options={"width": 16}),
        "demo": Budget(steps=285, seeds=5),
        "report": Budget(steps=285, seeds=12),
        "gpu": Budget(steps=1500, seeds=10, options={"device": "cuda", "width": 512}),
    },
    notes=(
        "The sweep over learning rates is the measurement, not tuning: nothing is chosen but the best rate, by "
        "validation accuracy of the same seed, from the same nine rates for every arm. The rates of the adaptation are "
        "fixed at 0.01 and were not tuned. 285 steps are 15 epochs. Adam and its adapted form are shown beside them "
        "and decide nothing."
    ),
)
