"""Tiger against AdamW and Lion on a byte-level language model."""

from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

TRIAL = Trial(
    claim=(
        "Tiger trains as well as AdamW (within 0.02 bits per byte) with half the optimizer state, "
        "and no worse than Lion (same tolerance)."
    ),
    source="“Tiger：一个“抠”到极致的优化器” (2023-03-07); reference code bojone/tiger",
    equation=(
        r"m_t=\beta m_{t-1}+(1-\beta)g_t,\qquad "
        r"\theta_t=\theta_{t-1}-\alpha_t\,s(\theta_{t-1})\,[\operatorname{sign}(m_t)+\lambda\,\theta_{t-1}]"
    ),
    task=ByteLM(),
    arms={
        "adamw": Arm(
            options={"optimizer": "adamw", "weight_decay": 0.1},
            grid=({"lr": 0.0015}, {"lr": 0.003}, {"lr": 0.006}, {"lr": 0.012}),
        ),
        "lion": Arm(
            options={"optimizer": "lion", "weight_decay": 0.1},
            grid=({"lr": 0.0005}, {"lr": 0.001}, {"lr": 0.002}, {"lr": 0.004}),
            method="danlu.optim.Lion",
        ),
        "tiger": Arm(
            options={"optimizer": "tiger", "weight_decay": 0.01},
            grid=({"lr": 0.005}, {"lr": 0.01}, {"lr": 0.02}, {"lr": 0.04}),
            method="danlu.optim.Tiger",
        ),
    },
    decides=(
        Comparison(candidate="tiger", baseline="adamw", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="tiger", baseline="lion", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="tiger", baseline="adamw", metric="optimizer_bytes_per_parameter", better="lower"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(steps=20, seeds=3, grid=2, options={"width": 32, "context": 32, "batch_size": 8, "windows": 16}),
        "demo": Budget(steps=300, seeds=5, options={"batch_size": 16}),
        "report": Budget(steps=800, seeds=5, options={"batch_size": 16}),
        "gpu": Budget(
            steps=5000,
            seeds=5,
            options={"device": "cuda", "width": 512, "layers": 8, "heads": 8, "context": 512, "batch_size": 64},
        ),
    },
    notes=(
        "Every arm gets the same steps, batches, warmup and linear decay, and four learning rates chosen on validation "
        "text with another seed. The articles' evidence is for long runs at large batch; this is a small model."
    ),
)
