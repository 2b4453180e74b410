"""Random positions in training against plain ones, on a task that is not local, at five times the length."""

from danlu.lab.tasks.bucket_sort import BucketSort
from danlu.lab.trial import Arm, Budget, Comparison, Options, Trial

_RATES: tuple[Options, ...] = ({"lr": 0.003}, {"lr": 0.001}, {"lr": 0.01})


def _better(candidate: str, baseline: str, length: int, margin: float = 0.0) -> Comparison:
    return Comparison(
        candidate=candidate, baseline=baseline, metric=f"accuracy@{length}", better="higher", margin=margin
    )


TRIAL = Trial(
    claim=(
        "An encoder with rotary positions that was trained on random positions sorts strings of 2 and 5 times its "
        "training length better than one trained on plain positions, and loses at most 0.02 of accuracy at the "
        "training length; so does one trained on positions of equal mean with the log-n scale; ALiBi and a window of "
        "the training length do not replace it; evenly spaced positions read better than random ones; and the log-n "
        "scale improves random subsets, too."
    ),
    source="“Transformer升级之路:8、长度外推性与位置鲁棒性” (2023-01-31); arXiv 2305.16843, 2207.02098",
    equation=(
        r"\{p_i\}\sim\text{uniform subset of }\{0,\dots,L_{\max}-1\}\ \text{in training},\qquad "
        r"p_i=iL_{\max}/n\ \text{at inference}"
    ),
    task=BucketSort(),
    arms={
        "plain": Arm(grid=_RATES),
        "window": Arm(options={"local": True}, grid=_RATES, method="danlu.attention.window_mask"),
        "alibi": Arm(options={"encoding": "alibi"}, grid=_RATES, method="danlu.positions.alibi_bias"),
        "randomized": Arm(
            options={"trained_on": "sorted", "read_with": "even"},
            grid=_RATES,
            method="danlu.positions.random_positions",
        ),
        "randomized_at_test": Arm(
            options={"trained_on": "sorted", "read_with": "random"},
            grid=_RATES,
            method="danlu.positions.random_positions",
        ),
        "randomized_log_n": Arm(
            options={"trained_on": "sorted", "read_with": "even", "logn": True},
            grid=_RATES,
            method="danlu.positions.logn_scale",
        ),
        "equal_mean_log_n": Arm(
            options={"trained_on": "equal_mean", "logn": True},
            grid=_RATES,
            method="danlu.positions.random_positions",
        ),
    },
    decides=(
        _better("randomized", "plain", 20, margin=0.02),
        _better("randomized", "plain", 40),
        _better("randomized", "plain", 100),
        _better("equal_mean_log_n", "plain", 100),
        _better("randomized", "alibi", 100),
        _better("randomized", "window", 100),
        _better("randomized", "randomized_at_test", 100),
        _better("randomized_log_n", "randomized", 100),
    ),
    selects=("accuracy@20", "higher"),
    sizes={
        "ci": Budget(steps=6, seeds=3, grid=1, options={"width": 16, "layers": 1, "heads": 2, "strings": 4}),
        "demo": Budget(steps=300, seeds=3, grid=1),
        "report": Budget(steps=400, seeds=5),
        "gpu": Budget(
            steps=10_000,
            seeds=10,
            options={"device": "cuda", "width": 128, "layers": 3, "batch_size": 64, "strings": 256},
        ),
    },
    notes=(
        "Strings of 5 symbols, 1 to 20 long in training; the answer stands in as many blanks, so that inputs have up "
        "to 40 tokens in training and 200 at the length 100. Random positions are drawn from 256. Learning rates are "
        "tuned on strings of the training length. The window is the training length of 40 tokens, the nearest ones, on "
        "the weights of the plain arm. Random positions are for encoders: the author of the article found them of no "
        "help for generation."
    ),
)
