"""TaiLr against cross entropy under label noise."""

from danlu.lab.tasks.digits import Digits
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.0005}, {"lr": 0.001}, {"lr": 0.002}, {"lr": 0.004})

TRIAL = Trial(
    claim=(
        "With 20 % wrong labels TaiLr is more accurate on clean test data than cross entropy and better calibrated, "
        "at the last step and also against early stopping."
    ),
    source="“缓解交叉熵过度自信的一个简明方案” (2023-03-14); arXiv 2302.13344",
    equation=r"L_\gamma=-\frac{\log[\gamma+(1-\gamma)\,p_t]}{1-\gamma},\qquad L_0=-\log p_t,\quad L_1=1-p_t",
    task=Digits(),
    arms={
        "cross_entropy": Arm(options={"loss": "cross_entropy"}, grid=_LRS),
        "tailr": Arm(
            options={"loss": "tailr", "lr": 0.002},
            grid=({"gamma": 0.1}, {"gamma": 0.3}, {"gamma": 0.5}, {"gamma": 0.7}),
            method="danlu.losses.tailr_loss",
        ),
    },
    decides=(
        Comparison(candidate="tailr", baseline="cross_entropy", metric="accuracy@last_step", better="higher"),
        Comparison(candidate="tailr", baseline="cross_entropy", metric="accuracy@best_validation", better="higher"),
        Comparison(
            candidate="tailr", baseline="cross_entropy", metric="expected_calibration_error@last_step", better="lower"
        ),
        Comparison(
            candidate="tailr",
            baseline="cross_entropy",
            metric="expected_calibration_error@best_validation",
            better="lower",
        ),
    ),
    selects=("accuracy@last_step", "higher"),
    sizes={
        "ci": Budget(steps=45, seeds=3, grid=2, options={"label_noise": 0.2, "width": 64}),
        "demo": Budget(steps=540, seeds=8, options={"label_noise": 0.2}),
        "report": Budget(steps=1080, seeds=20, tuning_seeds=3, options={"label_noise": 0.2}),
        "gpu": Budget(
            steps=540, seeds=20, tuning_seeds=3, options={"device": "cuda", "label_noise": 0.2, "width": 1024}
        ),
    },
    notes=(
        "Cross entropy tunes its learning rate, TaiLr its gamma at a learning rate fixed beforehand, with the same "
        "number of fits. Validation labels are as noisy as the training labels. On clean data there is nothing to "
        "gain, and gamma of 0.8 or more fails from scratch."
    ),
)
