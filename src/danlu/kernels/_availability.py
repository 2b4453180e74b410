"""Which compiled implementation can run here, and if none can, why."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from danlu.kernels import _cpp

__all__ = ["Kernel", "explain", "status"]

Kernel = Literal["amos", "entmax", "linear_rows", "sign_update", "soft_topk", "squareplus", "step_size"]

# Which backends every kernel has.
_BACKENDS: Mapping[str, tuple[str, ...]] = {
    "amos": ("cpp",),
    "entmax": ("cpp", "triton"),
    "linear_rows": ("triton",),
    "sign_update": ("cpp", "triton"),
    "soft_topk": ("cpp",),
    "squareplus": ("cpp",),
    "step_size": ("cpp",),
}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def explain(name: Kernel, *tensors: Tensor) -> str | None:
    """Why the kernel `name` cannot run on `tensors`; None if it can. The first call on the CPU compiles it."""
    if name not in _BACKENDS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    if len({tensor.device for tensor in tensors}) > 1:
        return "the tensors are on different devices"
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"dtype {tensor.dtype} is not supported"
        if tensor.layout != torch.strided:
            return f"layout {tensor.layout} is not supported"
    device = tensors[0].device.type if tensors else "cpu"
    if device == "cpu" and "cpp" in _BACKENDS[name]:
        return _cpp.reason(name)
    if device == "cuda" and "triton" in _BACKENDS[name]:
        return _triton_reason()
    return f"there is no kernel for device {device!r}"


def _triton_reason() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton is not installed, or does not support this device"


def status() -> dict[str, str]:
    """For bug reports: every kernel on the CPU and on CUDA, "ready" or why not."""
    found: dict[str, str] = {}
    for name, backends in _BACKENDS.items():
        if "cpp" in backends:
            found[f"{name} (cpu)"] = _cpp.reason(name) or "ready"
        if "triton" in backends:
            found[f"{name} (cuda)"] = _triton_reason() or "ready"
    return found
