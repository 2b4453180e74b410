"""ReRoPE against RoPE, interpolation, NTK, windows and cutting, on a pretrained model beyond its trained length."""

from danlu.lab.tasks.pretrained_lm import PretrainedLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial


def _beyond(baseline: str) -> Comparison:
    return Comparison(candidate="rerope", baseline=baseline, metric="loss@beyond", better="lower")


TRIAL = Trial(
    claim=(
        "SmolLM2-135M, trained with RoPE at 8192 positions, predicts the last tokens of longer text better "
        "with ReRoPE than with RoPE, position interpolation, NTK-mixed frequencies or a sliding window of its trained "
        "length, and better than when it is given the last 8192 tokens only, without further training; within its "
        "trained length it loses at most 0.03 nats per token."
    ),
    source="“Transformer升级之路:12、无限外推的ReRoPE?” (2023-08-07)",
    equation=(
        r"\text{score}_{ij}=\tfrac{1}{\sqrt d}\,q_i^\top\mathcal R_{-g(i-j)}k_j,\qquad "
        r"g(t)=\min(t,\,w)"
    ),
    task=PretrainedLM(),
    arms={
        "rope": Arm(options={"reading": "rope"}),
        "truncated": Arm(options={"reading": "truncated"}),
        "pi": Arm(options={"reading": "pi"}),
        "ntk_mixed": Arm(options={"reading": "ntk_mixed"}),
        "sliding_window": Arm(options={"reading": "window"}),
        "rerope": Arm(options={"reading": "rerope"}, method="danlu.integrations.transformers.patch_rope"),
    },
    decides=(
        Comparison(candidate="rerope", baseline="rope", metric="loss@within", better="lower", margin=0.03),
        *(_beyond(baseline) for baseline in ("rope", "pi", "ntk_mixed", "sliding_window", "truncated")),
    ),
    selects=("loss@beyond", "lower"),
    sizes={
        "ci": Budget(steps=0, seeds=3, options={"model": "random", "dtype": "float32", "reach": 2.0, "last": 16}),
        "demo": Budget(steps=0, seeds=3, options={"reach": 1.25}),
        "report": Budget(steps=0, seeds=3),
        "gpu": Budget(steps=0, seeds=8, options={"reach": 2.0, "device": "cuda"}),
    },
    notes=(
        "The weights are those of the carrier, rounded to 4 bits there, and every arm reads with them; nothing is "
        "tuned. A seed is a document, so the interval is over documents. All arms have the same targets: the last 1024 "
        "tokens before the trained length, and the last 1024 of the document. Interpolation and NTK stretch by the "
        "same factor within the trained length, as a model that is to read both must. Twice the trained length costs "
        "twice the time on a CPU, so this size stops at one and a half."
    ),
)
