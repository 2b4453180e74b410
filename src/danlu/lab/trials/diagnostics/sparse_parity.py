"""The exponent of the loss in the number of steps on multitask sparse parity, against the quantization hypothesis."""

from danlu.lab.tasks.sparse_parity import SparseParitySteps
from danlu.lab.trial import Arm, Budget, Comparison, Trial


def _within(gamma: str, margin: float) -> Comparison:
    return Comparison(
        candidate="quanta", baseline="measured", metric=f"relative_error@{gamma}", better="lower", margin=margin
    )


def _closer(gamma: str) -> Comparison:
    return Comparison(candidate="quanta_q", baseline="quanta", metric=f"relative_error@{gamma}", better="lower")


TRIAL = Trial(
    claim=(
        "On tasks of Zipf frequency the loss falls as a power of the number of steps, steeper for larger gamma, with "
        "the exponent gamma/(gamma+1) within 10 %; the measured exponent q of the learning times in the frequency "
        "brings the prediction gamma/(q(gamma+1)) still closer."
    ),
    source="“基于量子化假设推导模型的尺度定律” (2023-05-18); arXiv 2303.13506",
    equation=(
        r"p_k\propto k^{-\gamma-1},\qquad L(S)-a\propto S^{-\alpha_S},\qquad "
        r"\alpha_S=\frac{\gamma}{q(\gamma+1)},\quad t_k\propto p_k^{-q},\quad q=1\text{ in the theory}"
    ),
    task=SparseParitySteps(),
    arms={
        "measured": Arm(options={"law": "measured"}, method="danlu.diagnostics.MultitaskSparseParity"),
        "quanta": Arm(options={"law": "quanta"}, method="danlu.diagnostics.QuantaModel"),
        "quanta_q": Arm(options={"law": "quanta_q"}, method="danlu.diagnostics.QuantaModel"),
        "staircase": Arm(options={"law": "staircase"}),
        "same_for_all": Arm(options={"law": "same_for_all"}),
    },
    decides=(
        Comparison(candidate="measured", baseline="same_for_all", metric="smallest_increase", better="higher"),
        _within("0.3", 0.1),
        _within("0.6", 0.1),
        _within("1", 0.1),
        _closer("0.3"),
        _closer("0.6"),
        _closer("1"),
    ),
    selects=("test_loss", "lower"),
    sizes={
        "ci": Budget(
            steps=250,
            seeds=3,
            options={"tasks": 12, "bits": 10, "width": 64, "batch_size": 512, "lr": 0.01, "samples_per_task": 32},
        ),
        "demo": Budget(steps=2000, seeds=5, options={"tasks": 100, "width": 128, "batch_size": 1024}),
        "report": Budget(steps=3000, seeds=5),
        "gpu": Budget(
            steps=20_000,
            seeds=5,
            options={"device": "cuda", "tasks": 500, "bits": 100, "k": 3, "width": 1024, "batch_size": 20_000},
        ),
    },
    notes=(
        "All arms look at the same trained networks, three for each seed; they differ in the law that answers for the "
        "measured slope, and nothing is tuned. The slope is that of log mean loss over log steps from the learning of "
        "the most frequent task to the end. The staircase takes the finite number of tasks and the end of the run "
        "into account."
    ),
)
