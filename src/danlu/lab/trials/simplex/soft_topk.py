"""Smooth top-k maps for choosing pixels, against filters and simpler masks."""

from danlu.lab.tasks.pixel_selection import PixelSelection
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_METHOD = "danlu.simplex.soft_topk"
_RATES = ({"score_lr": 0.05}, {"score_lr": 0.1}, {"score_lr": 0.025}, {"score_lr": 0.2})


def _learned(method: str, k: int = 6) -> Arm:
    known = method in ("exp", "laplace", "sigmoid", "grad", "iter", "straight_through")
    return Arm(options={"method": method, "k": k}, grid=_RATES, method=_METHOD if known else "")


def _filter(method: str, k: int = 6) -> Arm:
    # The same number of fits; a filter has no rate of scores, so it may choose the network's.
    return Arm(options={"method": method, "k": k}, grid=({"lr": 0.003}, {"lr": 0.006}, {"lr": 0.0015}, {"lr": 0.012}))


def _better(candidate: str, baseline: str, metric: str = "accuracy", margin: float = 0.0) -> Comparison:
    return Comparison(candidate=candidate, baseline=baseline, metric=metric, better="higher", margin=margin)


TRIAL = Trial(
    claim=(
        "Six pixels of 64, and twelve, that a smooth top-k mask has learned recognize digits better than the best of a "
        "filter, and six better than those of a straight-through mask or of k times a softmax; and the Laplace map "
        "loses least when its mask is made hard."
    ),
    source="“Softmax后传:寻找Top-K的光滑近似” (2024-09-19)",
    equation=r"p_i=f(x_i/\tau-\lambda),\qquad\textstyle\sum_i p_i=k",
    task=PixelSelection(),
    arms={
        "random": _filter("random"),
        "anova": _filter("anova"),
        "mutual_information": _filter("mutual_information"),
        "straight_through": _learned("straight_through"),
        "scaled_softmax": _learned("scaled_softmax"),
        "iter": _learned("iter"),
        "exp": _learned("exp"),
        "sigmoid": _learned("sigmoid"),
        "laplace": _learned("laplace"),
        "grad": _learned("grad"),
        "anova_12": _filter("anova", 12),
        "mutual_information_12": _filter("mutual_information", 12),
        "scaled_softmax_12": _learned("scaled_softmax", 12),
        "laplace_12": _learned("laplace", 12),
    },
    decides=(
        _better("laplace", "anova"),
        _better("laplace", "mutual_information"),
        _better("laplace", "straight_through"),
        _better("laplace", "scaled_softmax"),
        _better("laplace_12", "anova_12"),
        _better("laplace_12", "mutual_information_12"),
        _better("laplace", "scaled_softmax", "searched_accuracy"),
        _better("laplace_12", "scaled_softmax_12", "searched_accuracy"),
        _better("laplace", "exp", "searched_accuracy"),
        _better("laplace", "sigmoid", "searched_accuracy"),
        _better("laplace", "grad", "searched_accuracy"),
    ),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=40, seeds=3, grid=1),
        "demo": Budget(steps=700, seeds=5, grid=2),
        "report": Budget(steps=700, seeds=8, tuning_seeds=2),
    },
    notes=(
        "Arms in `_12` choose twelve pixels, the others six. Of 700 steps 420 search while the temperature falls from "
        "1 to 0.03; the network then starts anew on the chosen pixels. `scaled_softmax` is k times softmax, clipped at "
        "1: the baseline that costs nothing. `searched_accuracy` is that of the network of the search with the hard "
        "mask, without a second training."
    ),
)
