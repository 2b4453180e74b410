"""Attention that can concentrate and attention that hardly can, in a byte-level language model."""

from danlu.lab.tasks.kernel_bytes import KernelBytes
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.006}, {"lr": 0.003}, {"lr": 0.012})


def _lower(metric: str, candidate: str, baseline: str = "elu1") -> Comparison:
    return Comparison(candidate=candidate, baseline=baseline, metric=metric, better="lower")


TRIAL = Trial(
    claim=(
        "In a byte-level language model the kernels of attention that can concentrate do, and predict better: softmax "
        "and the square of relu read fewer keys than linear attention (elu + 1), with fewer bits per byte."
    ),
    source="“注意力机制真的可以“集中注意力”吗?” (2023-12-12)",
    equation=r"n_{\mathrm{eff}}=nS^2=\frac{1}{\sum_j p_j^2},\qquad S(\tilde q)\ge\min_c S_c",
    task=KernelBytes(),
    arms={
        "softmax": Arm(grid=_LRS),
        "elu1": Arm(options={"kernel": "elu1"}, grid=_LRS),
        "relu2": Arm(options={"kernel": "relu2"}, grid=_LRS),
    },
    decides=(
        _lower("n_eff", "softmax"),
        _lower("n_eff", "relu2"),
        _lower("bits_per_byte", "softmax"),
        _lower("bits_per_byte", "relu2"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(
            steps=6, seeds=3, grid=1, options={"width": 16, "context": 32, "batch_size": 4, "heads": 2, "windows": 8}
        ),
        "demo": Budget(steps=100, seeds=3, grid=1),
        "report": Budget(steps=250, seeds=5),
        "gpu": Budget(
            steps=4000,
            seeds=5,
            options={
                "device": "cuda",
                "context": 512,
                "width": 384,
                "layers": 6,
                "heads": 6,
                "batch_size": 32,
            },
        ),
    },
    notes=(
        "Heads have 16 channels; positions are learned vectors, since a rotation would give the weights of elu + 1 "
        "signs. `n_eff` is the median number of keys that a row reads, over rows that see at least half of the "
        "context; its quantiles are beside it, and `s` is the median of S. The trial attention/linear_attention has "
        "linear attention with rotations."
    ),
)
