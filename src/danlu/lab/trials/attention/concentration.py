"""Softmax against attention that cannot concentrate, on a task that needs one key of many."""

from danlu.lab.tasks.associative_recall import AssociativeRecall
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.03})


def _more_accurate(pairs: int) -> Comparison:
    return Comparison(candidate="softmax", baseline="elu1", metric=f"accuracy@{pairs}", better="higher")


def _sharper(baseline: str, pairs: int) -> Comparison:
    return Comparison(candidate="softmax", baseline=baseline, metric=f"n_eff@{pairs}", better="lower")


TRIAL = Trial(
    claim=(
        "A head of 16 dimensions with softmax recalls one value out of 16, 32, 64 and 128 pairs more accurately than "
        "with linear attention (elu + 1), because it concentrates: at 64 and 128 pairs it reads fewer than that, and "
        "fewer than with the square of relu, which can be sparse only where the scores' mean is negative."
    ),
    source="“注意力机制真的可以“集中注意力”吗?” (2023-12-12)",
    equation=r"S(a)=\frac{\mathbb E|a|}{\sqrt{\mathbb E a^2}},\qquad n_{\mathrm{eff}}=nS^2=\frac{1}{\sum_j p_j^2}",
    task=AssociativeRecall(),
    arms={
        "softmax": Arm(grid=_LRS),
        "elu1": Arm(options={"kernel": "elu1"}, grid=_LRS),
        "relu2": Arm(options={"kernel": "relu2"}, grid=_LRS),
    },
    decides=(
        *(_more_accurate(pairs) for pairs in (16, 32, 64, 128)),
        *(_sharper(baseline, pairs) for baseline in ("elu1", "relu2") for pairs in (64, 128)),
    ),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=30, seeds=3, grid=2, options={"width": 16, "batch_size": 16, "samples": 64}),
        "demo": Budget(steps=600, seeds=5, grid=2),
        "report": Budget(steps=1000, seeds=5),
    },
    notes=(
        "One layer, one head; a pair is one token, so nothing but the attention limits what is read. `n_eff` is the "
        "median number of pairs that a query reads; 1 is enough. `zero` is the share of weights that are exactly 0."
    ),
)
