"""Input, batch and per-sample gradient penalties against a tuned learning rate, on few digits with wrong labels."""

from danlu.lab.tasks.gradient_penalty_digits import GradientPenaltyDigits
from danlu.lab.trial import Arm, Budget, Comparison, Options, Trial

# From the best without a penalty to one at which the network learns the wrong labels by heart.
_LEARNING_RATES = (0.0125, 0.1, 0.025, 0.05, 0.006)


def _grid(strengths: tuple[float, ...]) -> tuple[Options, ...]:
    return tuple({"strength": strength, "lr": lr} for strength in strengths for lr in _LEARNING_RATES)


def _better(candidate: str, metric: str = "accuracy") -> Comparison:
    better = "higher" if metric == "accuracy" else "lower"
    return Comparison(candidate=candidate, baseline="none", metric=metric, better=better)


TRIAL = Trial(
    claim=(
        "With 150 samples and 20 % wrong labels a penalty on the input gradient, on the batch's and on every sample's "
        "parameter gradient is each more accurate than a tuned learning rate alone, and both parameter penalties lower "
        "the input gradient, too."
    ),
    source="“输入梯度惩罚与参数梯度惩罚的一个不等式” (2021-12-11); arXiv 2111.15090, 2009.11162",
    equation=(
        r"\|\nabla_x\ell\|^2\sum_t\frac{1+\|h^{(t)}\|^2}{\|W^{(t)}\|_2^2\,\|\partial h^{(t)}/\partial x\|_2^2}"
        r"\le\|\nabla_\theta\ell\|^2"
    ),
    task=GradientPenaltyDigits(),
    arms={
        "none": Arm(grid=tuple({"lr": round(0.0125 * 2 ** (step / 3), 5)} for step in sorted(range(-9, 16), key=abs))),
        "input": Arm(
            options={"penalty": "input"},
            grid=_grid((1.0, 0.3, 0.1, 0.03, 3.0)),
            method="danlu.losses.input_gradient_penalty",
        ),
        "batch": Arm(
            options={"penalty": "batch"},
            grid=_grid((1.0, 0.3, 0.1, 3.0, 10.0)),
            method="danlu.losses.parameter_gradient_penalty",
        ),
        "per_sample": Arm(
            options={"penalty": "per_sample"},
            grid=_grid((0.01, 0.003, 0.03, 0.1, 0.001)),
            method="danlu.losses.parameter_gradient_penalty",
        ),
    },
    decides=(
        _better("input"),
        _better("batch"),
        _better("per_sample"),
        _better("batch", "input_gradient"),
        _better("per_sample", "input_gradient"),
    ),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=30, seeds=3, grid=2, options={"width": 32}),
        "demo": Budget(steps=450, seeds=5, grid=10),
        "report": Budget(steps=450, seeds=8, tuning_seeds=3),
    },
    notes=(
        "450 steps are 150 epochs. Every arm tunes 25 points; the penalties share theirs between strength and "
        "learning rate. Validation labels are as noisy as the training labels. The inequality is about samples, and "
        "`log_correlation` says how well it predicts: the gradient of a batch mean can be small while those of its "
        "samples are not."
    ),
)
