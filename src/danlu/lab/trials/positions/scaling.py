"""Static rules that stretch the frequencies of RoPE, on the same weights, without further training."""

from danlu.lab.tasks.stretched_lm import StretchedLM
from danlu.lab.trial import Arm, Budget, Comparison, Options, Trial

_METHOD = "danlu.positions.scale_frequencies"
_DYNAMIC = "danlu.attention.dynamic_rope_attention"
_RATES: tuple[Options, ...] = ({"lr": 0.008}, {"lr": 0.004}, {"lr": 0.016})


def _lower(candidate: str, baseline: str, multiple: int) -> Comparison:
    return Comparison(candidate=candidate, baseline=baseline, metric=f"bits_per_byte@{multiple}x", better="lower")


TRIAL = Trial(
    claim=(
        "Without further training a RoPE model reads text of 4 times its training length better with stretched "
        "frequencies: NTK-fixed beats plain RoPE and interpolation; at 8 times NTK-mixed beats NTK-fixed and "
        "NTK-aware, and the log-n scale improves it further."
    ),
    source="“Transformer升级之路:10、RoPE是一种β进制编码” (2023-07-06), 11 (2023-07-31); arXiv 2306.15595, 2309.00071",
    equation=(
        r"\theta'_m=\theta_m\,\kappa^{-2m/R}\ \text{(fixed)},\qquad "
        r"\theta'_m=\theta_m e^{-am^p},\ a(R/2)^p=\ln\kappa\ \text{(mixed)}"
    ),
    task=StretchedLM(),
    arms={
        "rope": Arm(grid=_RATES),
        "linear": Arm(options={"rule": "linear"}, method=_METHOD, grid=_RATES),
        "ntk_old": Arm(options={"rule": "ntk-old"}, method=_METHOD, grid=_RATES),
        "ntk_aware": Arm(options={"rule": "ntk-aware"}, method=_METHOD, grid=_RATES),
        "ntk_fixed": Arm(options={"rule": "ntk-fixed"}, method=_METHOD, grid=_RATES),
        "ntk_mixed": Arm(options={"rule": "ntk-mixed"}, method=_METHOD, grid=_RATES),
        "by_parts": Arm(options={"rule": "by-parts"}, method=_METHOD, grid=_RATES),
        "ntk_mixed_log_n": Arm(
            options={"rule": "ntk-mixed", "logn": True}, method="danlu.positions.logn_scale", grid=_RATES
        ),
        "ntk_aware_dynamic": Arm(options={"rule": "ntk-aware", "dynamic": True}, method=_DYNAMIC, grid=_RATES),
        "ntk_mixed_dynamic": Arm(options={"rule": "ntk-mixed", "dynamic": True}, method=_DYNAMIC, grid=_RATES),
        "ntk_mixed_dynamic_log_n": Arm(
            options={"rule": "ntk-mixed", "dynamic": True, "logn": True}, method=_DYNAMIC, grid=_RATES
        ),
        "sliding_window": Arm(options={"local": True}, method="danlu.attention.window_mask", grid=_RATES),
    },
    decides=(
        _lower("ntk_fixed", "rope", 4),
        _lower("ntk_fixed", "linear", 4),
        _lower("ntk_mixed", "ntk_fixed", 8),
        _lower("ntk_mixed", "ntk_aware", 8),
        _lower("ntk_mixed_log_n", "ntk_mixed", 8),
    ),
    selects=("bits_per_byte@1x", "lower"),
    sizes={
        "ci": Budget(
            steps=20,
            seeds=3,
            grid=1,
            options={"width": 32, "context": 16, "batch_size": 8, "windows": 8},
        ),
        "demo": Budget(steps=300, seeds=3, grid=1, options={"windows": 48}),
        "report": Budget(steps=500, seeds=5, options={"windows": 64}),
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
            },
        ),
    },
    notes=(
        "All arms read with the same weights, whose learning rate is tuned at the training length, and differ only at "
        "evaluation. The factor of a rule is the length over the training length, so that all arms are equal at 1x; "
        "in the dynamic arms a byte that sees n others reads with the factor n over the training length, and the bytes "
        "before it with theirs. The loss is on the same last bytes of every window. The sliding window of the training "
        "length is in the table because it is the simplest way to read longer text; ReRoPE, in the trial "
        "attention/rerope, changes positions instead of frequencies."
    ),
)
