"""Tiger on parameters stored in half precision, by the rounding of its steps."""

from danlu.lab.tasks.stressed_digits import StressedDigits
from danlu.lab.trial import Arm, Budget, Comparison, Trial

# The rate of the article, and the one that is best for float32 in this task.
_RATES = (0.001, 0.01)
_STORAGES = {
    "fp32": ("float32", "nearest"),
    "fp16_nearest": ("float16", "nearest"),
    "fp16_stochastic": ("float16", "stochastic"),
    "fp16_kahan": ("float16", "kahan"),
    "bf16_nearest": ("bfloat16", "nearest"),
    "bf16_stochastic": ("bfloat16", "stochastic"),
    "bf16_kahan": ("bfloat16", "kahan"),
}

TRIAL = Trial(
    claim=(
        "Tiger trains in half precision throughout as well as in float32 (within 0.02 nats), at the article's "
        "learning rate and at ten times that: in float16 and bfloat16 rounded to nearest, and in bfloat16 rounded "
        "stochastically or with Kahan's compensation; stochastic rounding loses less of the movement than nearest."
    ),
    source="“Tiger：一个“抠”到极致的优化器” (2023-03-07), on training in half precision throughout",
    equation=(
        r"\theta_t=\mathrm{round}\!\left(\theta_{t-1}-\alpha_t\,\mathrm{RMS}(\theta_{t-1})"
        r"[\operatorname{sign}(m_t)+\lambda\,\theta_{t-1}]\right)"
    ),
    task=StressedDigits(),
    arms={
        f"{name}_rate_{rate:g}": Arm(
            options={"storage": storage, "rounding": rounding, "lr": rate}, method="danlu.optim.Tiger"
        )
        for rate in _RATES
        for name, (storage, rounding) in _STORAGES.items()
    },
    decides=(
        *(
            Comparison(
                candidate=f"{name}_rate_{rate:g}",
                baseline=f"fp32_rate_{rate:g}",
                metric="negative_log_likelihood",
                better="lower",
                margin=0.02,
            )
            for rate in _RATES
            for name in ("fp16_nearest", "bf16_nearest", "bf16_stochastic", "bf16_kahan")
        ),
        Comparison(
            candidate="bf16_stochastic_rate_0.001",
            baseline="bf16_nearest_rate_0.001",
            metric="movement_lost",
            better="lower",
        ),
    ),
    selects=("negative_log_likelihood", "lower"),
    sizes={
        "ci": Budget(steps=20, seeds=3, options={"width": 16}),
        "demo": Budget(steps=270, seeds=5),
        "report": Budget(steps=900, seeds=5),
    },
    notes=(
        "No arm is tuned: all storages are trained at the same two learning rates, so that nothing but the rounding "
        "differs. Parameters, momenta and activations are in half precision; a step is computed in float32 and then "
        "rounded. The metric 'unchanged' counts updates that leave the stored number as it was, 'movement_lost' what "
        "is missing of the sum of all updates; under stochastic rounding most single updates leave no trace and "
        "nothing is lost."
    ),
)
