"""Whether Tiger's best learning rate carries over from a narrow network to a wide one."""

from danlu.lab.tasks.byte_sweep import ByteSweep
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_NARROW, _WIDE = 64, 256
_RATES = {
    "adamw": "0.002 0.004 0.008 0.016 0.032 0.064 0.128",
    "lion": "0.0005 0.001 0.002 0.004 0.008 0.016 0.032",
    "tiger": "0.0025 0.005 0.01 0.02 0.04 0.08 0.16",
}
_METHODS = {"adamw": "", "lion": "danlu.optim.Lion", "tiger": "danlu.optim.Tiger"}


def _arm(optimizer: str, tuned_at: int) -> Arm:
    options = {f"{optimizer}_rates": _RATES[optimizer], "read": optimizer, "tuned_at": tuned_at}
    return Arm(options=options, method=_METHODS[optimizer])


TRIAL = Trial(
    claim=(
        "Tiger's best learning rate at width 64 serves width 256 as well: the two optima lie within a factor of two, "
        "and using the one of width 64 costs less than 0.02 bits per byte."
    ),
    source="“Tiger：一个“抠”到极致的优化器” (2023-03-07), on relative learning rates; reference code bojone/tiger",
    equation=r"\Delta\theta=-\alpha\,\mathrm{RMS}(\theta)\,[\operatorname{sign}(m)+\lambda\,\theta]",
    task=ByteSweep(),
    arms={
        f"{optimizer}_tuned_at_{width}": _arm(optimizer, width)
        for optimizer in ("tiger", "lion", "adamw")
        for width in (_NARROW, _WIDE)
    },
    decides=(
        # The arm that is tuned where it is used has a distance of 0, so a margin of 1 says "within a factor of two".
        Comparison(
            candidate="tiger_tuned_at_64",
            baseline="tiger_tuned_at_256",
            metric="rate_octaves",
            better="lower",
            margin=1.0,
        ),
        Comparison(
            candidate="tiger_tuned_at_64",
            baseline="tiger_tuned_at_256",
            metric="bits_per_byte",
            better="lower",
            margin=0.02,
        ),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(steps=2, seeds=3, options={"places": 256, "widths": "64 256", "context": 8, "batch_size": 8}),
        "demo": Budget(steps=150, seeds=3, options={"widths": "64 256", "batch_size": 64}),
        "report": Budget(steps=300, seeds=5, options={"widths": "64 256", "batch_size": 64}),
    },
    notes=(
        "All networks are evaluated at width 256, 16 times the parameters of a hidden matrix at width 64. Lion and "
        "AdamW are yardsticks and decide nothing. Every seed repeats the sweep; the optima are the vertices of "
        "parabolas through the best rate and its neighbors."
    ),
)
