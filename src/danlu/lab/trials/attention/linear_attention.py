"""Linear attention against softmax attention in a language model: elu + 1, its rotation, random features, soft VQ."""

from danlu.lab.tasks.linear_byte_lm import LinearByteLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.008}, {"lr": 0.004}, {"lr": 0.016})
# Without positions the best one is lower.
_LOWER_LRS = ({"lr": 0.004}, {"lr": 0.008}, {"lr": 0.002})
_FUNCTION = "danlu.attention.linear_attention"


def _as_good(candidate: str) -> Comparison:
    return Comparison(candidate=candidate, baseline="softmax_rope", metric="bits_per_byte", better="lower", margin=0.05)


TRIAL = Trial(
    claim=(
        "Linear attention predicts bytes as well as softmax attention with RoPE, to 0.05 bits per byte: with elu + 1 "
        "features rotated in the numerator, which are better than unrotated ones, with 64 random features (FAVOR+), "
        "and with soft assignment to 64 codes learned by gradient (soft vector quantization), rotated likewise."
    ),
    source="arXiv 2006.16236, 2104.09864, 2009.14794; “我在Performer中发现了Transformer-VQ的踪迹” (2023-11-29)",
    equation=r"o_i=\frac{\sum_{j\le i}(\phi(q_i)\cdot\phi(k_j))\,v_j}{\sum_{j\le i}\phi(q_i)\cdot\phi(k_j)}",
    task=LinearByteLM(),
    arms={
        "softmax_rope": Arm(grid=_LRS),
        "elu1": Arm(options={"kind": "elu1"}, grid=_LOWER_LRS, method=_FUNCTION),
        "elu1_rope": Arm(options={"kind": "elu1_rope"}, grid=_LRS, method=_FUNCTION),
        "favor_rope": Arm(options={"kind": "favor_rope"}, grid=_LRS, method="danlu.attention.FavorFeatures"),
        "softvq_rope": Arm(options={"kind": "softvq_rope"}, grid=_LRS, method="danlu.attention.SoftVQFeatures"),
    },
    decides=(
        _as_good("elu1_rope"),
        _as_good("favor_rope"),
        _as_good("softvq_rope"),
        Comparison(candidate="elu1_rope", baseline="elu1", metric="bits_per_byte", better="lower"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(
            steps=10, seeds=3, grid=1, options={"width": 16, "context": 32, "batch_size": 4, "heads": 2, "windows": 8}
        ),
        "demo": Budget(steps=100, seeds=3, grid=1),
        "report": Budget(steps=250, seeds=5),
        "gpu": Budget(
            steps=3000,
            seeds=5,
            grid=2,
            options={
                "device": "cuda",
                "context": 1024,
                "width": 512,
                "layers": 6,
                "heads": 8,
                "features": 256,
                "batch_size": 32,
            },
        ),
    },
    notes=(
        "Heads have 16 channels; FAVOR+ has 64 fixed features, of queries and keys that are rotated before, so it "
        "estimates the very attention of the baseline. elu + 1 without rotation has no notion of positions but the "
        "causal mask. The codes of soft quantization are 4096 more parameters a layer; its width is 0.5 in the unit of "
        "the keys, the best of 0.25, 0.5, 1 and 2 after 100 steps of another seed."
    ),
)
