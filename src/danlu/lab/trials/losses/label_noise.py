"""TaiLr and its relatives at three levels of label noise, at the last step and against early stopping."""

from danlu.lab.tasks.digits import Digits
from danlu.lab.trial import Arm, Budget, Comparison, Options, Scalar, Trial

_LEVELS = (0, 20, 40)


def _arms(noise: int) -> dict[str, Arm]:
    """The losses at `noise` percent of wrong labels, two tuning fits each."""

    def arm(loss: str, *grid: Options, method: str = "", **options: Scalar) -> Arm:
        return Arm(options={"loss": loss, "lr": 0.002, "label_noise": noise / 100, **options}, grid=grid, method=method)

    return {
        f"cross_entropy@{noise}": arm("cross_entropy", {"lr": 0.002}, {"lr": 0.001}),
        f"label_smoothing@{noise}": arm("cross_entropy", {"smoothing": 0.3}, {"smoothing": 0.1}),
        f"generalized_cross_entropy@{noise}": arm(
            "generalized_cross_entropy", {"q": 0.7}, {"q": 0.4}, method="danlu.losses.generalized_cross_entropy"
        ),
        f"tailr@{noise}": arm("tailr", {"gamma": 0.3}, {"gamma": 0.1}, method="danlu.losses.tailr_loss"),
        f"tailr_rising@{noise}": arm(
            "tailr", {"gamma": 0.5}, {"gamma": 0.3}, gamma_rise=0.5, method="danlu.losses.TaiLrLoss"
        ),
    }


def _parts(noise: int) -> tuple[Comparison, ...]:
    """Accuracy and calibration at the last step, and against a cross entropy that stops early."""
    return tuple(
        Comparison(
            candidate=f"tailr@{noise}",
            baseline=f"cross_entropy@{noise}",
            metric=f"{metric}@{when}",
            better="higher" if metric == "accuracy" else "lower",
        )
        for metric in ("accuracy", "expected_calibration_error")
        for when in ("last_step", "best_validation")
    )


TRIAL = Trial(
    claim=(
        "With 20 % and with 40 % wrong labels TaiLr is more accurate on clean test data than cross entropy and better "
        "calibrated, at the last step and also against early stopping; on clean data it loses less than one point."
    ),
    source="“缓解交叉熵过度自信的一个简明方案” (2023-03-14); arXiv 2302.13344",
    equation=r"L_\gamma=-\frac{\log[\gamma+(1-\gamma)\,p_t]}{1-\gamma},\qquad L_0=-\log p_t,\quad L_1=1-p_t",
    task=Digits(),
    arms={name: arm for noise in _LEVELS for name, arm in _arms(noise).items()},
    decides=(
        *_parts(20),
        *_parts(40),
        Comparison(
            candidate="tailr@0", baseline="cross_entropy@0", metric="accuracy@last_step", better="higher", margin=0.01
        ),
    ),
    selects=("accuracy@last_step", "higher"),
    sizes={
        "ci": Budget(steps=18, seeds=3, grid=1, options={"width": 32}),
        "demo": Budget(steps=540, seeds=3, grid=1),
        "report": Budget(steps=540, seeds=5, tuning_seeds=1),
    },
    notes=(
        "The number behind @ is the percentage of wrong labels in training and validation; test labels are clean. "
        "Every arm tries two points of the knob that matters for it. `best_validation` is early stopping by the noisy "
        "validation labels, the fair baseline. `tailr_rising` takes gamma from 0 up over the first half. "
        "`unbiased_calibration_error` is large: with these labels TaiLr cuts classes to zero, where `tailr_unbias` has "
        "nothing to go back to."
    ),
)
