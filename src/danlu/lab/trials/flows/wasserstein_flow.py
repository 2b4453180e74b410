"""Density terms of a Wasserstein flow, sampling a posterior in 31 dimensions."""

from danlu.lab.tasks.posterior import LogisticPosterior
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_STEPS = ({"dt": 0.002}, {"dt": 0.004}, {"dt": 0.008}, {"dt": 0.016})

TRIAL = Trial(
    claim=(
        "On a posterior that is nearly Gaussian, 300 particles that move by the score of their matched Gaussian have a "
        "smaller error of the covariance than Langevin and SVGD at equal gradients, and blob a smaller one than SVGD."
    ),
    source="“梯度流：探索通向最小值之路” (2023-06-16); arXiv 1709.09195 (blob), 1608.04471 (SVGD)",
    equation=(
        r"\dot x_i=\nabla\log p(x_i)-\nabla\log q(x_i)\quad\text{or}\quad "
        r"dx_i=\nabla\log p(x_i)\,dt+\sqrt{2}\,dW_i"
    ),
    task=LogisticPosterior(),
    arms={
        name: Arm(options={"density": name}, grid=_STEPS, method="danlu.flows.WassersteinFlow")
        for name in ("langevin", "gaussian", "blob", "svgd")
    },
    decides=(
        Comparison(candidate="gaussian", baseline="langevin", metric="covariance_error", better="lower"),
        Comparison(candidate="gaussian", baseline="svgd", metric="covariance_error", better="lower"),
        Comparison(candidate="blob", baseline="svgd", metric="covariance_error", better="lower"),
    ),
    selects=("covariance_error", "lower"),
    sizes={
        "ci": Budget(steps=10, seeds=3, grid=2, options={"particles": 40}),
        "demo": Budget(steps=300, seeds=3),
        "report": Budget(steps=800, seeds=5),
    },
    notes=(
        "Step lengths are chosen by the error of the covariance on another split of the data. Langevin's error has a "
        "floor that is the noise of 300 independent draws in 31 dimensions, about 0.2 to 0.3."
    ),
)
