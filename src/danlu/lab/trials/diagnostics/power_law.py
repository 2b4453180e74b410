"""A scaling law of byte-level language models in the number of parameters, and what it is worth."""

from danlu.lab.tasks.text_scaling import TextScaling
from danlu.lab.trial import Arm, Budget, Comparison, Trial

TRIAL = Trial(
    claim=(
        "At equal tokens the test loss of language models is E + A N^-alpha: the sizes tried determine alpha within "
        "30 %, the law of the smaller ones predicts the largest within 1 %, and better than a law without E."
    ),
    source="“基于量子化假设推导模型的尺度定律” (2023-05-18); arXiv 2303.13506; fit of arXiv 2203.15556",
    equation=r"L(N)=E+A\,N^{-\alpha}",
    task=TextScaling(),
    arms={
        "measured": Arm(options={"law": "measured"}),
        "power_law": Arm(options={"law": "power_law"}, method="danlu.diagnostics.fit_power_law"),
        "power_law_with_floor": Arm(options={"law": "power_law_with_floor"}, method="danlu.diagnostics.fit_power_law"),
    },
    decides=(
        Comparison(
            candidate="power_law_with_floor",
            baseline="measured",
            metric="exponent_half_width",
            better="lower",
            margin=0.3,
        ),
        Comparison(
            candidate="power_law_with_floor",
            baseline="measured",
            metric="extrapolation_error",
            better="lower",
            margin=0.01,
        ),
        Comparison(
            candidate="power_law_with_floor", baseline="power_law", metric="extrapolation_error", better="lower"
        ),
    ),
    selects=("test_loss", "lower"),
    sizes={
        "ci": Budget(steps=15, seeds=3, options={"context": 16, "batch_size": 4, "layers": 1, "sizes": 5}),
        "demo": Budget(steps=200, seeds=5, options={"batch_size": 8}),
        "report": Budget(steps=400, seeds=5),
        "gpu": Budget(steps=10_000, seeds=5, options={"device": "cuda", "context": 256, "batch_size": 64, "layers": 4}),
    },
    notes=(
        "All arms read the losses of the same trained models: seven sizes for each seed, the same batches, a learning "
        "rate that goes with 1 / width, nothing tuned. The arm “measured” errs by nothing; the margins say how far "
        "the law may be from it. If the interval of alpha is wider than 30 %, no exponent is claimed. N counts all "
        "parameters, the embedding and the head among them."
    ),
)
