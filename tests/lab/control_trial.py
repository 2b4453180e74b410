"""The A/A control on real data: one arm over many seeds; the tests pair fits of different seeds."""

from danlu.lab.tasks.digits import Digits
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_METRIC = "negative_log_likelihood@last_step"

TRIAL = Trial(
    claim="An arm is better than itself.",
    source="a test",
    task=Digits(),
    arms={"cross_entropy": Arm(options={"width": 16, "lr": 0.01})},
    decides=(Comparison(candidate="cross_entropy", baseline="cross_entropy", metric=_METRIC, better="lower"),),
    selects=(_METRIC, "lower"),
    sizes={"ci": Budget(steps=27, seeds=240)},
)
