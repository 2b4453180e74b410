"""Positions of equal mean with the log-n scale, on masked bytes: a task that is mostly local."""

from danlu.lab.tasks.masked_bytes import MaskedBytes
from danlu.lab.trial import Arm, Budget, Comparison, Options, Trial

_RATES: tuple[Options, ...] = ({"lr": 0.004}, {"lr": 0.002}, {"lr": 0.008}, {"lr": 0.016})


def _better(candidate: str, baseline: str, multiple: int, margin: float = 0.0) -> Comparison:
    return Comparison(
        candidate=candidate, baseline=baseline, metric=f"accuracy@{multiple}x", better="higher", margin=margin
    )


TRIAL = Trial(
    claim=(
        "An encoder that was trained on masked bytes with positions of equal mean and the log-n scale guesses them in "
        "8 times longer text better than one trained on plain positions and than one trained on random subsets of "
        "positions, and loses at most 0.02 of accuracy at the training length."
    ),
    source="“Transformer升级之路:8、长度外推性与位置鲁棒性” (2023-01-31)",
    equation=r"p_i=\frac{\nu\,i}{n},\quad\nu\sim\text{Exp, }\mathbb E\nu=n;\qquad\lambda_n=\frac{\ln n}{\ln T}",
    task=MaskedBytes(),
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
        "equal_mean": Arm(options={"trained_on": "equal_mean"}, grid=_RATES, method="danlu.positions.random_positions"),
        "equal_mean_log_n": Arm(
            options={"trained_on": "equal_mean", "logn": True},
            grid=_RATES,
            method="danlu.positions.random_positions",
        ),
    },
    decides=(
        _better("equal_mean_log_n", "plain", 1, margin=0.02),
        _better("equal_mean_log_n", "plain", 8),
        _better("equal_mean_log_n", "randomized", 8),
    ),
    selects=("accuracy@1x", "higher"),
    sizes={
        "ci": Budget(
            steps=6,
            seeds=3,
            grid=1,
            options={"width": 16, "layers": 1, "heads": 2, "context": 16, "batch_size": 4, "windows": 8},
        ),
        "demo": Budget(steps=200, seeds=3, grid=1, options={"windows": 64}),
        "report": Budget(steps=400, seeds=5, options={"batch_size": 16, "windows": 96}),
        "gpu": Budget(
            steps=20_000,
            seeds=5,
            options={"device": "cuda", "width": 256, "layers": 6, "context": 128, "max_position": 2048},
        ),
    },
    notes=(
        "Windows of 64 bytes in training and up to 512 at test, around the same hidden bytes. Random positions are "
        "drawn from 1024. The window of 64 nearest bytes, on the weights of the plain arm, and ALiBi are in the table "
        "because neighbors tell most of a hidden byte: they are the baselines to beat. Learning rates are tuned on "
        "validation text of the training length."
    ),
)
