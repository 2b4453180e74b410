"""Float16 with gradients below its range: without a loss scale, with a constant one, with a dynamic one."""

from danlu.lab.tasks.precision_lm import PrecisionLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_METHOD = "danlu.precision.TrainStep"

TRIAL = Trial(
    claim=(
        "With gradients below 1e-8 float16 stalls; a constant loss scale of 1000 repairs it, and so does a dynamic one "
        "(both within 0.1 bits per byte of float32)."
    ),
    source="“在bert4keras中使用混合精度和XLA加速训练” (2022-04-28)",
    equation=r"G=\frac1s\,\nabla_\theta\big[s\,L_{\text{half}}(\theta)\big],\qquad |g|<2^{-25}\Rightarrow"
    r"\operatorname{fp16}(g)=0",
    task=PrecisionLM(),
    arms={
        "fp32": Arm(options={"precision": "fp32"}),
        "fp16_unscaled": Arm(options={"precision": "fp16", "loss_scale": "none"}),
        "fp16_static": Arm(options={"precision": "fp16", "loss_scale": "1000"}, method=_METHOD),
        "fp16_dynamic": Arm(options={"precision": "fp16", "loss_scale": "dynamic"}, method=_METHOD),
    },
    decides=(
        Comparison(candidate="fp16_static", baseline="fp16_unscaled", metric="bits_per_byte", better="lower"),
        Comparison(candidate="fp16_dynamic", baseline="fp16_unscaled", metric="bits_per_byte", better="lower"),
        Comparison(candidate="fp16_static", baseline="fp32", metric="bits_per_byte", better="lower", margin=0.1),
        Comparison(candidate="fp16_dynamic", baseline="fp32", metric="bits_per_byte", better="lower", margin=0.1),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(
            steps=6,
            seeds=3,
            options={
                "optimizer": "lion",
                "loss_weight": 1e-6,
                "width": 16,
                "layers": 1,
                "context": 16,
                "batch_size": 4,
                "windows": 16,
                "report_steps": 4,
            },
        ),
        "demo": Budget(
            steps=60,
            seeds=5,
            options={
                "optimizer": "lion",
                "lr": 0.002,
                "loss_weight": 1e-6,
                "width": 32,
                "layers": 1,
                "context": 32,
                "batch_size": 8,
                "report_steps": 4,
            },
        ),
        "report": Budget(
            steps=300,
            seeds=5,
            options={
                "optimizer": "lion",
                "lr": 0.002,
                "loss_weight": 1e-6,
                "width": 64,
                "layers": 1,
                "context": 32,
                "batch_size": 8,
                "report_steps": 4,
            },
        ),
        "gpu": Budget(
            steps=2000,
            seeds=5,
            options={
                "device": "cuda",
                "optimizer": "lion",
                "lr": 0.0005,
                "loss_weight": 1e-6,
                "width": 256,
                "layers": 4,
                "context": 256,
                "batch_size": 32,
                "report_steps": 4,
            },
        ),
    },
    notes=(
        "The loss has the weight 1e-6, as a small part of a sum would, which makes its gradients small. The optimizer "
        "is Lion, which float32 gradients of any size serve alike, so that underflow is all that differs; with Adam "
        "its eps would hide it."
    ),
)
