"""Rows of rare words under Tiger's sign, the remedies, and what both cost."""

from danlu.lab.tasks.word_lm import WordLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_TIGER = ({"lr": 0.01}, {"lr": 0.005}, {"lr": 0.02})
_METHOD = "danlu.optim.Tiger"

TRIAL = Trial(
    claim=(
        "Under Tiger the embedding rows of rare words grow beyond ten times their initial size; lazy rows, tied "
        "embeddings and AdamW for the embedding each prevent it. It does not show in the loss (lazy rows gain less "
        "than 0.02 nats), but in the loss on rare contexts and after fine-tuning on them, which lazy rows lower."
    ),
    source="“Lion/Tiger optimizers and their embedding anomaly”, kexue.fm 9736 (2023-08-28)",
    equation=(
        r"|\theta|(t)=\frac{1/\lambda}{1+\left(1/(\lambda|\theta_0|)-1\right)e^{-\alpha t}}"
        r"\quad\text{for a row without gradients}"
    ),
    task=WordLM(),
    arms={
        "tiger": Arm(options={"optimizer": "tiger"}, grid=_TIGER, method=_METHOD),
        "tiger_lazy": Arm(options={"optimizer": "tiger", "remedy": "lazy"}, grid=_TIGER, method=_METHOD),
        "tiger_tied": Arm(
            options={"optimizer": "tiger", "remedy": "tied"}, grid=_TIGER, method="danlu.optim.tie_embeddings"
        ),
        "tiger_adamw_embedding": Arm(
            options={"optimizer": "tiger", "remedy": "adamw"},
            grid=(
                {"lr": 0.01, "embedding_lr": 0.002},
                {"lr": 0.01, "embedding_lr": 0.005},
                {"lr": 0.02, "embedding_lr": 0.005},
            ),
            method="danlu.optim.HybridOptimizer",
        ),
        "tiger_whole_rms": Arm(options={"optimizer": "tiger", "remedy": "whole_rms"}, grid=_TIGER, method=_METHOD),
        "lion": Arm(
            options={"optimizer": "lion"}, grid=({"lr": 0.002}, {"lr": 0.001}, {"lr": 0.004}), method="danlu.optim.Lion"
        ),
        "adamw": Arm(options={"optimizer": "adamw"}, grid=({"lr": 0.004}, {"lr": 0.002}, {"lr": 0.008})),
    },
    decides=(
        Comparison(candidate="tiger_lazy", baseline="tiger", metric="share_of_large_rows", better="lower"),
        Comparison(candidate="tiger_tied", baseline="tiger", metric="share_of_large_rows", better="lower"),
        Comparison(candidate="tiger_adamw_embedding", baseline="tiger", metric="share_of_large_rows", better="lower"),
        Comparison(candidate="tiger", baseline="tiger_lazy", metric="loss", better="lower", margin=0.02),
        Comparison(candidate="tiger_lazy", baseline="tiger", metric="loss@rare_contexts", better="lower"),
        Comparison(candidate="tiger_lazy", baseline="tiger", metric="loss@fine_tuned", better="lower"),
    ),
    selects=("loss", "lower"),
    sizes={
        "ci": Budget(
            steps=20,
            seeds=3,
            grid=1,
            options={"types": 500, "megabytes": 0.3, "width": 16, "hidden": 32, "batch_size": 32, "places": 256},
        ),
        "demo": Budget(
            steps=400,
            seeds=5,
            grid=2,
            options={"types": 4000, "megabytes": 2.0, "width": 48, "hidden": 128, "batch_size": 64},
        ),
        "report": Budget(
            steps=600,
            seeds=5,
            options={"types": 4000, "megabytes": 2.0, "width": 48, "hidden": 128, "batch_size": 64},
        ),
        "gpu": Budget(
            steps=20000,
            seeds=5,
            options={
                "device": "cuda",
                "types": 32000,
                "megabytes": 12.0,
                "width": 256,
                "hidden": 1024,
                "batch_size": 128,
            },
        ),
    },
    notes=(
        "Training streams once through the text at a constant rate after a short warmup: the anomaly grows with the "
        "sum of the rates, which stands for a long run here. Arms may choose different rates; each had as many tries."
    ),
)
