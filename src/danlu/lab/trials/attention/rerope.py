"""ReRoPE against RoPE beyond the training length, on the same weights."""

from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_WINDOWS = ({"window": 0.25}, {"window": 0.5}, {"window": 0.75}, {"window": 1.0})


def _beyond(multiple: int) -> Comparison:
    return Comparison(candidate="rerope", baseline="rope", metric=f"bits_per_byte@{multiple}x", better="lower")


TRIAL = Trial(
    claim=(
        "A model trained with RoPE reads text of 2, 4 and 8 times its training length better with ReRoPE than with "
        "RoPE, without further training, and loses at most 0.03 bits per byte at its training length."
    ),
    source="“Transformer升级之路:12、无限外推的ReRoPE?” (2023-08-07)",
    equation=(
        r"\text{score}_{ij}=\tfrac{1}{\sqrt d}\,q_i^\top\mathcal R_{-g(i-j)}k_j,\qquad "
        r"g(t)=\min(t,\,w)"
    ),
    task=ByteLM(),
    arms={
        "rope": Arm(options={"attention": "rope"}),
        "rerope": Arm(
            options={"attention": "rerope"},
            grid=_WINDOWS,
            method="danlu.attention.rerope_attention",
        ),
        "rerope_logn": Arm(
            options={"attention": "rerope", "logn": True},
            grid=_WINDOWS,
            method="danlu.attention.rerope_attention",
        ),
        "sliding_window": Arm(options={"attention": "window"}),
    },
    decides=(
        Comparison(candidate="rerope", baseline="rope", metric="bits_per_byte@1x", better="lower", margin=0.03),
        _beyond(2),
        _beyond(4),
        _beyond(8),
    ),
    selects=("bits_per_byte@8x", "lower"),
    sizes={
        "ci": Budget(
            steps=20,
            seeds=3,
            options={"width": 32, "context": 32, "batch_size": 8, "reach": 8, "windows": 8, "lr": 0.003},
        ),
        "demo": Budget(
            steps=500, seeds=5, options={"context": 64, "width": 96, "reach": 8, "windows": 64, "lr": 0.004}
        ),
        "report": Budget(
            steps=600,
            seeds=5,
            options={
                "context": 128,
                "width": 96,
                "layers": 3,
                "batch_size": 16,
                "reach": 8,
                "windows": 64,
                "lr": 0.004,
            },
        ),
        "gpu": Budget(
            steps=5000,
            seeds=5,
            options={
                "device": "cuda",
                "context": 512,
                "width": 512,
                "layers": 8,
                "heads": 8,
                "batch_size": 64,
                "reach": 8,
                "lr": 0.001,
            },
        ),
    },
    notes=(
        "All arms read with the same trained weights; they differ only at evaluation. The loss is on the same last "
        "bytes of every window, whatever the length of the text before them. Sliding-window attention of the "
        "training length is in the table because it is the strongest simple baseline. `rerope_logn` scales queries by "
        "max(1, log n / log T) as well. Tuning chooses only ReRoPE's window."
    ),
)
