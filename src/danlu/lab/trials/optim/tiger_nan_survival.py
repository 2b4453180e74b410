"""What Tiger's rescue does when one gradient in a hundred is NaN."""

from danlu.lab.tasks.stressed_digits import StressedDigits
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_RATES = tuple({"lr": rate} for rate in (0.0025, 0.005, 0.01, 0.02, 0.04))
_METHOD = "danlu.optim.Tiger"

TRIAL = Trial(
    claim=(
        "When each tensor's gradient is NaN with probability 1 % in every step, Tiger that shrinks such a tensor "
        "trains as well as on clean gradients (accuracy within 0.01), and so does one that skips it; it trains "
        "better than one that lets the NaN in."
    ),
    source="“Tiger：一个“抠”到极致的优化器” (2023-03-07), on surviving NaN; reference code bojone/tiger",
    equation=r"g_t\ni\mathrm{NaN}:\quad m_t=m_{t-1},\qquad \theta_t=c+(\theta_{t-1}-c)\,r,\quad r=0.99",
    task=StressedDigits(),
    arms={
        "clean": Arm(grid=_RATES, method=_METHOD),
        **{
            mode: Arm(options={"bad_gradients": 0.01, "nonfinite": mode}, grid=_RATES, method=_METHOD)
            for mode in ("shrink", "skip", "off")
        },
    },
    decides=(
        Comparison(candidate="shrink", baseline="clean", metric="accuracy", better="higher", margin=0.01),
        Comparison(candidate="skip", baseline="clean", metric="accuracy", better="higher", margin=0.01),
        Comparison(candidate="shrink", baseline="off", metric="accuracy", better="higher"),
    ),
    selects=("negative_log_likelihood", "lower"),
    sizes={
        "ci": Budget(steps=30, seeds=3, grid=2, options={"width": 16}),
        "demo": Budget(steps=300, seeds=5),
        "report": Budget(steps=600, seeds=8),
    },
    notes=(
        "The whole gradient of a tensor is NaN, as after an overflow, at the same steps in all arms. With "
        "nonfinite='off' a NaN stays in the momentum, its sign is 0, and the tensor no longer moves, so this arm "
        "does best where it learns most before the first NaN."
    ),
)
