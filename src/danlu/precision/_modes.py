"""What a precision mode means on a device: the autocast dtype, and the precision of float32 matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

__all__ = ["PRECISIONS", "Precision", "autocast_dtype", "matmul_precision", "resolve_precision"]

Precision = Literal["fp32", "tf32", "bf16", "fp16", "auto"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "auto")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What "auto" stands for on `device`: bfloat16 where the hardware multiplies it, else float16 on CUDA, else fp32.

    On a CPU without bfloat16 instructions half products are emulated and slower than float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return "bf16"
    return "fp32"


def _cpu_multiplies_bf16() -> bool:
    # oneDNN's own question goes by AVX-512 alone, which is too little; these names are not public in every version.
    features = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(feature()) for feature in features if feature is not None)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype that autocast runs matrix products in; None means without autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Float32 products as "fp32" (exact) or "tf32" (fast) asks for within the context; other modes leave them alone."""
    if precision not in ("fp32", "tf32"):
        yield
        return
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
