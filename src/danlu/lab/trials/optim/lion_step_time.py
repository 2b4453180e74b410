"""Whether a step of Lion is faster than one of AdamW."""

from danlu.lab.tasks.step_time import StepTime
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_METHODS = {"lion": "danlu.optim.Lion", "tiger": "danlu.optim.Tiger"}

TRIAL = Trial(
    claim=(
        "A step of Lion takes less time than one of AdamW, also of torch's fused one, because it neither divides nor "
        "takes roots and keeps half the state."
    ),
    source="“Google新搜出的优化器Lion：效率与效果兼得的“训练狮”” (2023-02-16); arXiv 2302.06675",
    equation=(r"20\ \text{bytes per parameter (read}\ \theta,g,m\text{; write}\ \theta,m)\quad\text{against}\quad 28"),
    task=StepTime(),
    arms={
        variant: Arm(options={"variant": variant}, method=_METHODS.get(variant, ""))
        for variant in ("adamw_fused", "adamw_foreach", "sgd_momentum_fused", "lion", "tiger")
    },
    decides=(
        Comparison(candidate="lion", baseline="adamw_fused", metric="time_over_fused_adamw", better="lower"),
        Comparison(candidate="lion", baseline="adamw_foreach", metric="time_over_fused_adamw", better="lower"),
        Comparison(candidate="lion", baseline="adamw_fused", metric="optimizer_bytes_per_parameter", better="lower"),
    ),
    selects=("time_over_fused_adamw", "lower"),
    sizes={
        "ci": Budget(steps=6, seeds=3, options={"width": 32, "blocks": 1}),
        "demo": Budget(steps=30, seeds=5),
        "report": Budget(steps=60, seeds=8, options={"width": 512, "blocks": 4}),
    },
    notes=(
        "Times on the processor are measured in turns with torch's fused AdamW on equal tensors in one thread, so "
        "that the ratio does not depend on what else the machine does; the arm adamw_fused, measured against itself, "
        "shows what the measurement is worth. adamw_foreach is torch's default on accelerators. Lion and Tiger look "
        "for gradients that are not finite, AdamW does not."
    ),
)
