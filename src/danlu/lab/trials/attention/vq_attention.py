"""Transformer-VQ against the same model without its quantizer."""

from danlu.lab.tasks.quantized_lm import QuantizedLM
from danlu.lab.trial import Arm, Budget, Comparison, Scalar, Trial

_RATES = ({"lr": 0.008}, {"lr": 0.004}, {"lr": 0.016}, {"lr": 0.002}, {"lr": 0.032})


def _vq(codes: int, **options: Scalar) -> Arm:
    return Arm(
        options={"attention": "vq", "codes": codes, **options}, grid=_RATES, method="danlu.attention.VQAttention"
    )


def _better(candidate: str, baseline: str, margin: float = 0.0) -> Comparison:
    return Comparison(candidate=candidate, baseline=baseline, metric="bits_per_byte", better="lower", margin=margin)


TRIAL = Trial(
    claim=(
        "Attention in linear time to keys quantized with 128 codewords predicts bytes as well (within 0.05 bits per "
        "byte) as softmax attention to the same keys unquantized; 128 codewords are better than 32; replacing dead "
        "codewords helps; and so does telling distances within a block by ReRoPE on the quantized keys."
    ),
    source="“VQ一下Key，Transformer的复杂度就变成线性了” (2023-11-09); arXiv 2309.16354",
    equation=(
        r"o_i=\sum_j\operatorname{softmax}_j(q_i^\top\hat k_j+b_{ij})\,v_j,\quad \hat k_j=C_{z_j},\quad "
        r"\sum_je^{q^\top C_{z_j}}v_j=\sum_ce^{q^\top C_c+\log N_c}\,\bar v_c"
    ),
    task=QuantizedLM(),
    arms={
        "softmax_rope": Arm(options={"attention": "rope"}, grid=_RATES),
        "softmax_bias": Arm(options={"attention": "bias"}, grid=_RATES),
        "vq_32": _vq(32),
        "vq_128": _vq(128),
        "vq_128_reseeded": _vq(128, reseed_below=0.5),
        "vq_128_rerope": _vq(128, rerope=True),
    },
    decides=(
        _better("vq_128", "softmax_bias", margin=0.05),
        _better("vq_128", "vq_32"),
        _better("vq_128_reseeded", "vq_128"),
        _better("vq_128_rerope", "vq_128"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(
            steps=8,
            seeds=3,
            grid=1,
            options={"width": 16, "heads": 2, "layers": 1, "context": 48, "block_size": 8, "windows": 16},
        ),
        "demo": Budget(steps=100, seeds=3, grid=1),
        "report": Budget(steps=160, seeds=5),
        "gpu": Budget(
            steps=3000,
            seeds=5,
            options={
                "device": "cuda",
                "context": 1024,
                "block_size": 128,
                "batch_size": 32,
                "width": 512,
                "layers": 6,
                "heads": 8,
            },
        ),
    },
    notes=(
        "softmax_bias and the vq arms have the same parameters: queries and keys normalized per head, and a learned "
        "bias by distance in the token's own block of 16 and the one before. Only the keys differ. softmax_rope shows "
        "what rotary positions are worth here; quantized keys can have them up to a distance: vq_128_rerope has the "
        "bias and rotations up to 16 tokens. Context 64, blocks of 16: most keys of a late token are cached. A "
        "codeword is dead when fewer than 0.5 keys per step come to it, in the moving average."
    ),
)
