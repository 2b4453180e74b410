"""SquarePlus beside the usual activations: accuracy on digits, and the time of a training step."""

from danlu.lab.tasks.activation_digits import ActivationDigits
from danlu.lab.trial import Arm, Budget, Comparison, Scalar, Trial

_RATES = tuple({"lr": rate} for rate in (0.001, 0.002, 0.004, 0.008, 0.016, 0.0005))
_METHOD = "danlu.activations.squareplus"
_OTHERS = ("relu", "softplus", "gelu", "silu")


def _arm(activation: str, b: float = 4.0, network: str = "mlp") -> Arm:
    options: dict[str, Scalar] = {"activation": activation, "b": b, "network": network}
    return Arm(options=options, grid=_RATES, method=_METHOD if "squareplus" in activation else "")


def _no_worse(baseline: str, network: str = "") -> Comparison:
    candidate, baseline = f"squareplus{network}", f"{baseline}{network}"
    return Comparison(candidate=candidate, baseline=baseline, metric="accuracy", better="higher", margin=0.01)


def _faster(network: str = "") -> Comparison:
    candidate, baseline = f"squareplus{network}", f"softplus{network}"
    return Comparison(candidate=candidate, baseline=baseline, metric="milliseconds_per_step", better="lower")


TRIAL = Trial(
    claim=(
        "On digits networks of linear layers and of convolutions with SquarePlus are as accurate as with ReLU, "
        "softplus, GELU and SiLU (within 0.01), and a training step takes less time than with softplus, because "
        "nothing takes an exponential."
    ),
    source="“SquarePlus：可能是运算最简单的ReLU光滑近似” (2021-12-29); arXiv 2112.11687",
    equation=r"y=\frac{x+\sqrt{x^2+b}}{2},\qquad y'=\frac{y^2}{y^2+b/4}",
    task=ActivationDigits(),
    arms={
        "relu": _arm("relu"),
        "softplus": _arm("softplus"),
        "gelu": _arm("gelu"),
        "silu": _arm("silu"),
        "squareplus": _arm("squareplus"),
        "squareplus_like_softplus": _arm("squareplus", 1.5238210),
        "learned_squareplus": _arm("learned_squareplus"),
        **{f"{name}_cnn": _arm(name, network="cnn") for name in (*_OTHERS, "squareplus")},
    },
    decides=(
        *(_no_worse(baseline) for baseline in _OTHERS),
        _faster(),
        *(_no_worse(baseline, "_cnn") for baseline in _OTHERS),
        _faster("_cnn"),
    ),
    selects=("negative_log_likelihood", "lower"),
    sizes={
        "ci": Budget(steps=20, seeds=3, grid=2, options={"width": 32, "channels": 4}),
        "demo": Budget(steps=300, seeds=5),
        "report": Budget(steps=450, seeds=8, tuning_seeds=2),
    },
    notes=(
        "All arms tune the same learning rates. The time is that of a whole step on the thread's processor, most of it "
        "matrix products and the optimizer, and is measured one arm after the other; the benchmark "
        "bench_squareplus measures the functions alone, in turns. The article itself advises not to spend much effort "
        "on activations."
    ),
)
