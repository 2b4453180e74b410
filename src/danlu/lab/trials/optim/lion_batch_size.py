"""How the distance between Lion and AdamW depends on the batch size, at equal samples and at equal steps."""

from danlu.lab.tasks.byte_sweep import ByteSweep
from danlu.lab.trial import Arm, Budget, Comparison, Scalar, Trial

# Updates per step of the fit (a step is 256 samples, or one update), batch size, and the lowest learning rates.
_SETTINGS = {
    "16_equal_samples": (16, 16, {"adamw": 0.001, "lion": 0.001}),
    "64_equal_samples": (4, 64, {"adamw": 0.004, "lion": 0.004}),
    "16_equal_steps": (1, 16, {"adamw": 0.008, "lion": 0.001}),
    "64_equal_steps": (1, 64, {"adamw": 0.004, "lion": 0.002}),
    "256": (1, 256, {"adamw": 0.008, "lion": 0.004}),
}


def _arm(optimizer: str, setting: str) -> Arm:
    updates, batch_size, lowest = _SETTINGS[setting]
    options: dict[str, Scalar] = {"updates": updates, "batch_size": batch_size, "read": optimizer}
    for name, rate in lowest.items():
        options[f"{name}_rates"] = " ".join(f"{rate * 2**i:g}" for i in range(5))
    return Arm(options=options, method="danlu.optim.Lion" if optimizer == "lion" else "")


TRIAL = Trial(
    claim=(
        "At batch 256 Lion trains at least as well as AdamW (within 0.02 bits per byte); at batch 16 it is further "
        "behind AdamW than at batch 256, at equal samples and at equal steps."
    ),
    source="“Google新搜出的优化器Lion：效率与效果兼得的“训练狮”” (2023-02-16); arXiv 2302.06675, sections 4.6 and 5",
    equation=(
        r"u_t=\operatorname{sign}(\beta_1 m_{t-1}+(1-\beta_1)g_t),\quad "
        r"\theta_t=\theta_{t-1}-\eta_t(u_t+\lambda\theta_{t-1}),\quad m_t=\beta_2 m_{t-1}+(1-\beta_2)g_t"
    ),
    task=ByteSweep(),
    arms={f"{name}_{setting}": _arm(name, setting) for setting in _SETTINGS for name in ("adamw", "lion")},
    decides=(
        Comparison(candidate="lion_256", baseline="adamw_256", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="lion_256", baseline="lion_16_equal_samples", metric="excess_over_adamw", better="lower"),
        Comparison(candidate="lion_256", baseline="lion_16_equal_steps", metric="excess_over_adamw", better="lower"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(steps=2, seeds=3, options={"places": 256, "widths": "16", "context": 8}),
        "demo": Budget(steps=60, seeds=3),
        "report": Budget(steps=120, seeds=5),
    },
    notes=(
        "Every optimizer gets five learning rates at every batch size, and every seed repeats this tuning on "
        "validation text. At equal samples batches of 16 and 64 take 16 and 4 times the steps of batch 256; at equal "
        "steps they see a sixteenth and a quarter of its text. The paper's evidence is for batches of 1024 and more "
        "and long runs."
    ),
)
