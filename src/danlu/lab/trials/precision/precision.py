"""Precisions with and without compilation against float32, on a byte-level language model: gains and losses."""

from danlu.lab.tasks.precision_lm import PrecisionLM
from danlu.lab.trial import Arm, Budget, Comparison, Trial

TRIAL = Trial(
    claim=(
        "bf16 and fp16 train as well as fp32 (within 0.02 bits per byte); bf16 makes a step faster and smaller; "
        "compiling makes a step faster in fp32 and in bf16."
    ),
    source="“在bert4keras中使用混合精度和XLA加速训练” (2022-04-28)",
    equation=r"G=\frac1s\,\nabla_\theta\big[s\,L_{\text{half}}(\theta)\big]",
    task=PrecisionLM(),
    arms={
        "fp32": Arm(options={"precision": "fp32"}),
        "bf16": Arm(options={"precision": "bf16"}, method="danlu.precision.TrainStep"),
        "fp16": Arm(options={"precision": "fp16"}, method="danlu.precision.TrainStep"),
        "fp32_compile": Arm(options={"precision": "fp32", "compile": True}, method="danlu.precision.TrainStep"),
        "bf16_compile": Arm(options={"precision": "bf16", "compile": True}, method="danlu.precision.TrainStep"),
    },
    decides=(
        Comparison(candidate="bf16", baseline="fp32", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="fp16", baseline="fp32", metric="bits_per_byte", better="lower", margin=0.02),
        Comparison(candidate="bf16", baseline="fp32", metric="speed_up", better="higher"),
        Comparison(candidate="bf16", baseline="fp32", metric="peak_memory_mib", better="lower"),
        Comparison(candidate="fp32_compile", baseline="fp32", metric="speed_up", better="higher"),
        Comparison(candidate="bf16_compile", baseline="bf16", metric="speed_up", better="higher"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        # The backend "eager" traces the graph and compiles nothing.
        "ci": Budget(
            steps=4,
            seeds=3,
            options={
                "width": 32,
                "layers": 1,
                "context": 32,
                "batch_size": 4,
                "windows": 16,
                "report_steps": 4,
                "backend": "eager",
            },
        ),
        # Most of the time goes into compiling: about 15 seconds of CPU for each seed of a compiled arm.
        "demo": Budget(
            steps=60,
            seeds=3,
            options={"width": 128, "layers": 1, "context": 64, "batch_size": 8, "lr": 0.004, "report_steps": 10},
        ),
        "report": Budget(
            steps=60,
            seeds=5,
            options={"width": 128, "layers": 1, "context": 64, "batch_size": 8, "lr": 0.004, "report_steps": 16},
        ),
        "gpu": Budget(
            steps=2000,
            seeds=5,
            options={
                "device": "cuda",
                "width": 1024,
                "layers": 12,
                "heads": 16,
                "context": 512,
                "batch_size": 32,
                "report_steps": 40,
            },
        ),
    },
    notes=(
        "speed_up is the ratio of the median step to that of float32 stepped in turn in the same process. The first "
        "step of the compiled arms starts from an empty cache; they share the fits of their precision. At the size ci "
        "they are traced and not compiled. What is gained depends on the machine: without bf16 or fp16 instructions a "
        "CPU emulates them."
    ),
)
