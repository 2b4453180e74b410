"""Adapted step sizes against a constant and a decaying learning rate when the data change halfway."""

from danlu.lab.tasks.learning_rates import LearningRates
from danlu.lab.trial import Arm, Budget, Comparison, Trial
from danlu.lab.trials.optim.step_size import TRIAL as ROBUSTNESS

TRIAL = Trial(
    claim=(
        "After the pixels of the images are permuted halfway, momentum SGD with adapted step sizes is more accurate "
        "at its best learning rate than momentum SGD under a cosine schedule and than momentum SGD at a constant "
        "rate, and more accurate than the latter at low learning rates."
    ),
    source=ROBUSTNESS.source,
    equation=ROBUSTNESS.equation,
    task=LearningRates(),
    arms={
        "sgdm": Arm(options={"optimizer": "sgdm"}),
        "sgdm_cosine": Arm(options={"optimizer": "sgdm", "schedule": "cosine"}),
        "eg_sgdm": Arm(options={"optimizer": "eg_sgdm"}, method="danlu.optim.EGStepSize"),
    },
    decides=(
        Comparison(candidate="eg_sgdm", baseline="sgdm_cosine", metric="accuracy@best", better="higher"),
        Comparison(candidate="eg_sgdm", baseline="sgdm", metric="accuracy@best", better="higher"),
        Comparison(candidate="eg_sgdm", baseline="sgdm", metric="accuracy@low", better="higher"),
    ),
    selects=ROBUSTNESS.selects,
    sizes={
        "ci": Budget(steps=20, seeds=3, options={"width": 16, "shift": True}),
        "demo": Budget(steps=228, seeds=5, options={"shift": True}),
        "report": Budget(steps=228, seeds=10, options={"shift": True}),
        "gpu": Budget(steps=1200, seeds=10, options={"device": "cuda", "width": 512, "shift": True}),
    },
    notes=(
        "Accuracy is on test images with permuted pixels, at the last step; the permutation is drawn for every seed. "
        "The cosine schedule ends at 0, as one made for data that do not change. Every arm has nine learning rates "
        "and takes the best by validation accuracy of the same seed. 228 steps are 12 epochs."
    ),
)
