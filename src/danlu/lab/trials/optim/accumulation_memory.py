"""Gradient accumulation in the momentum: its memory and its loss beside those of the usual buffer."""

from danlu.lab.tasks.accumulating_bytes import AccumulatingBytes
from danlu.lab.trial import Arm, Budget, Comparison, Scalar, Trial

_ADAMW = (0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
_LION = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
_TIGER = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


def _arm(optimizer: str, accumulation: str, rates: tuple[float, ...], weight_decay: float, method: str = "") -> Arm:
    options: dict[str, Scalar] = {
        "optimizer": optimizer,
        "accumulation": accumulation,
        "weight_decay": weight_decay,
    }
    return Arm(options=options, grid=tuple({"lr": rate} for rate in rates), method=method)


TRIAL = Trial(
    claim=(
        "Tiger that accumulates eight micro-batches inside the backward pass holds fewer bytes of optimizer state "
        "and gradients than AdamW or Lion with a gradient buffer and than Tiger with its gradients kept between the "
        "passes, and trains exactly as the latter; folding into both of Adam's moments trains as well as AdamW with "
        "a buffer (within 0.02 bits per byte)."
    ),
    source=(
        "“隐藏在动量中的梯度累积：少更新几步，效果反而更好？” (2021-08-24); "
        "“Tiger：一个“抠”到极致的优化器” (2023-03-07)"
    ),
    equation=(
        r"m_t=[(\beta-1)\chi_{(t-1)/k}+1]\,m_{t-1}+\frac{1-\beta}{k}g_t,\qquad "
        r"\theta_t=\theta_{t-1}-\chi_{t/k}\,\eta_t\,[\cdot]"
    ),
    task=AccumulatingBytes(),
    arms={
        "adamw_buffer": _arm("adamw", "buffer", _ADAMW, 0.1),
        "lion_buffer": _arm("lion", "buffer", _LION, 0.3, "danlu.optim.Lion"),
        "tiger": _arm("tiger", "folded", _TIGER, 0.01, "danlu.optim.Tiger"),
        "tiger_in_backward": _arm("tiger", "in_backward", _TIGER, 0.01, "danlu.optim.Tiger"),
        "folded_adamw": _arm("folded_adamw", "folded", _ADAMW, 0.1, "danlu.optim.FoldedAdamW"),
        "adamw_every_8th": _arm("adamw", "every_kth", _ADAMW, 0.1, "danlu.optim.equivalent_beta"),
        "adamw_every_8th_same_beta": _arm("adamw", "every_kth_same_beta", _ADAMW, 0.1),
    },
    decides=(
        *(
            Comparison(
                candidate="tiger_in_backward",
                baseline=baseline,
                metric="training_bytes_per_parameter",
                better="lower",
            )
            for baseline in ("adamw_buffer", "lion_buffer", "tiger")
        ),
        # A margin of nothing but rounding: equal to the last bit.
        Comparison(
            candidate="tiger_in_backward", baseline="tiger", metric="bits_per_byte", better="lower", margin=1e-12
        ),
        Comparison(
            candidate="folded_adamw", baseline="adamw_buffer", metric="bits_per_byte", better="lower", margin=0.02
        ),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(steps=3, seeds=3, grid=2, options={"places": 256, "width": 16, "context": 8, "micro_batches": 2}),
        "demo": Budget(steps=100, seeds=3),
        "report": Budget(steps=200, seeds=5),
    },
    notes=(
        "Bytes are those of optimizer state and gradients; the parameters themselves take 4 more. Every arm sees the "
        "same micro-batches and takes the same number of updates. Approximations: folded_adamw averages squares "
        "where AdamW squares an average; adamw_every_8th sees every micro-gradient, under betas nearer to 1, and "
        "moves on every eighth; adamw_every_8th_same_beta leaves the betas as they are. Tiger without in_backward "
        "frees its gradients after each micro-batch and so holds all of them once."
    ),
)
