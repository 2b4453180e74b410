"""The exponents in parameters and in data on multitask sparse parity: does the second follow from the first?"""

from danlu.lab.tasks.sparse_parity import SparseParityScaling
from danlu.lab.trial import Arm, Budget, Comparison, Trial

TRIAL = Trial(
    claim=(
        "On tasks of Zipf frequency the exponent of the loss in the data follows from the one in the parameters, "
        "alpha_D = alpha_N/(1+alpha_N) within 0.1, and this predicts it better than equal exponents."
    ),
    source="“基于量子化假设推导模型的尺度定律” (2023-05-18); arXiv 2303.13506",
    equation=r"\alpha_N=\gamma,\qquad \alpha_D=\frac{\gamma}{\gamma+1}=\frac{\alpha_N}{1+\alpha_N}",
    task=SparseParityScaling(),
    arms={
        "measured": Arm(options={"law": "measured"}, method="danlu.diagnostics.fit_power_law"),
        "quanta": Arm(options={"law": "quanta"}, method="danlu.diagnostics.check_quanta_relation"),
        "equal": Arm(options={"law": "equal"}),
    },
    decides=(
        Comparison(candidate="quanta", baseline="measured", metric="error", better="lower", margin=0.1),
        Comparison(candidate="quanta", baseline="equal", metric="error", better="lower"),
    ),
    selects=("test_loss", "lower"),
    sizes={
        "ci": Budget(
            steps=60,
            seeds=3,
            options={"tasks": 12, "bits": 10, "batch_size": 256, "lr": 0.01, "sizes": 4, "samples_per_task": 32},
        ),
        "demo": Budget(steps=1000, seeds=5, options={"tasks": 50, "batch_size": 256, "lr": 0.005}),
        "report": Budget(steps=4000, seeds=5, options={"tasks": 50, "batch_size": 256, "lr": 0.005}),
        "gpu": Budget(
            steps=30_000, seeds=5, options={"device": "cuda", "tasks": 500, "bits": 100, "k": 3, "batch_size": 10_000}
        ),
    },
    notes=(
        "One fit is fourteen trainings: seven widths on fresh samples, and the widest on seven training sets with "
        "early stopping. All arms look at the same losses and nothing is tuned. The sizes lie between a network that "
        "learns nothing and one that the steps limit, which leaves less than two decades: read the half-widths of "
        "the exponents beside the verdict."
    ),
)
