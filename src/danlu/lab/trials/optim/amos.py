"""Amos, with and without momentum, and Lion by derived rules, against AdamW and hand-tuned Lion."""

from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.trial import Arm, Comparison, Trial
from danlu.lab.trials.optim.tiger import TRIAL as TIGER

TRIAL = Trial(
    claim=(
        "Amos without a schedule trains as well as AdamW with one (within 0.02 bits per byte), with momentum and half "
        "of the optimizer state, and without momentum and next to none; and Lion whose rates, decays and schedule are "
        "derived from one number is no worse than hand-tuned Lion (same tolerance)."
    ),
    source="“基于Amos优化器思想推导出来的一些“炼丹策略”” (2022-11-22); arXiv 2210.11693",
    equation=(
        r"\Delta_t=-d_t\left[\tfrac12\gamma_t\theta_{t-1}+\xi\eta\sqrt{\hat r_t}\,g_t\right],\qquad "
        r"\alpha_t=\alpha_0\frac{\sigma}{\mathrm{RMS}(u_t)}D(t),\qquad \rho_t=\frac{\alpha_0^2}{2q}D(t)"
    ),
    task=ByteLM(),
    arms={
        "adamw": TIGER.arms["adamw"],
        "amos_momentum": Arm(
            options={"optimizer": "amos_momentum"},
            grid=({"lr": 0.0125}, {"lr": 0.025}, {"lr": 0.05}, {"lr": 0.1}),
            method="danlu.optim.Amos",
        ),
        "amos": Arm(
            options={"optimizer": "amos"},
            grid=({"lr": 0.005}, {"lr": 0.01}, {"lr": 0.02}, {"lr": 0.04}),
            method="danlu.optim.Amos",
        ),
        "lion_derived": Arm(
            options={"optimizer": "lion_derived"},
            grid=({"lr": 0.01}, {"lr": 0.02}, {"lr": 0.04}, {"lr": 0.08}),
            method="danlu.optim.amos_strategy",
        ),
        "lion": TIGER.arms["lion"],
    },
    decides=(
        Comparison(candidate="amos_momentum", baseline="adamw", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="amos", baseline="adamw", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="lion_derived", baseline="lion", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="amos_momentum", baseline="adamw", metric="optimizer_bytes_per_parameter", better="lower"),
        Comparison(candidate="amos", baseline="amos_momentum", metric="optimizer_bytes_per_parameter", better="lower"),
    ),
    selects=TIGER.selects,
    # The budgets of Tiger's trial, so that the fits of AdamW and Lion are shared with it.
    sizes=TIGER.sizes,
    notes=(
        "Every arm gets the same steps, batches and warmup, and four points of its one rate (xi of Amos, alpha0 of the "
        "derived Lion) chosen on validation text with another seed. AdamW and Lion decay linearly; Amos has no "
        "schedule; the derived Lion decays by the inverse time, halved at half of the steps. The scales of Amos come "
        "from amos_scales. The paper's evidence is for long pre-training runs; this is a small model and a short run."
    ),
)
