"""Lion against AdamW on a byte-level language model."""

from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.trial import Arm, Comparison, Trial
from danlu.lab.trials.optim.tiger import TRIAL as TIGER

TRIAL = Trial(
    claim="Lion trains at least as well as AdamW (within 0.02 bits per byte) with half the optimizer state.",
    source="“Google新搜出的优化器Lion：效率与效果兼得的“训练狮”” (2023-02-16); arXiv 2302.06675",
    equation=(
        r"u_t=\operatorname{sign}(\beta_1 m_{t-1}+(1-\beta_1)g_t),\quad "
        r"\theta_t=\theta_{t-1}-\eta_t(u_t+\lambda\theta_{t-1}),\quad m_t=\beta_2 m_{t-1}+(1-\beta_2)g_t"
    ),
    task=ByteLM(),
    arms={
        "adamw": TIGER.arms["adamw"],
        "lion": Arm(
            options={"optimizer": "lion", "weight_decay": 0.3},
            grid=({"lr": 0.0005}, {"lr": 0.001}, {"lr": 0.002}, {"lr": 0.004}),
            method="danlu.optim.Lion",
        ),
    },
    decides=(
        Comparison(candidate="lion", baseline="adamw", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="lion", baseline="adamw", metric="optimizer_bytes_per_parameter", better="lower"),
    ),
    selects=TIGER.selects,
    # The budgets of Tiger's trial, so that the fits of AdamW are shared with it.
    sizes=TIGER.sizes,
    notes=(
        "Weight decay is three times AdamW's, after the rule that divides the learning rate and multiplies the decay. "
        "The paper's evidence is for batches of 1024 and more and long runs; this is a small model at a small batch."
    ),
)
