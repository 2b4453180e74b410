"""One step of Lion and Tiger on a CUDA device: time, and the share of the bandwidth of a copy on the same device.

100 million float32 parameters in 100 tensors, all candidates interleaved in one process, times by CUDA events. A step
of Lion moves 20 bytes per parameter, one of Tiger 24; a copy moves 8. Without a CUDA device nothing is measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import statistics
from functools import partial

import torch
from torch import nn

from _measure import machine, run_tests, save, show
from danlu.optim import Lion, Tiger

ROUNDS = 30
SHAPES = [(1024, 1024)] * 92 + [(1024,)] * 4 + [(4096, 1024)] * 1 + [(1000, 1000)] * 3


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(shape, device="cuda")).to(dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def groups(params: list[nn.Parameter]) -> list[dict]:
    vectors = [p for p in params if p.ndim == 1]
    return [{"params": vectors, "kind": "vector"}, {"params": [p for p in params if p.ndim == 2], "kind": "matrix"}]


# Name, constructor, bytes moved per float32 parameter.
CANDIDATES = {
    "danlu Lion (fused, guard off)": (lambda p: Lion(p, weight_decay=0.1, fused=True, nonfinite="off"), 20),
    "danlu Lion (fused)": (lambda p: Lion(p, weight_decay=0.1, fused=True), 24),
    "danlu Lion (foreach)": (lambda p: Lion(p, weight_decay=0.1, foreach=True), 20),
    "danlu Tiger (fused, guard off)": (lambda p: Tiger(groups(p), fused=True, nonfinite="off"), 24),
    "danlu Tiger (fused)": (lambda p: Tiger(groups(p), fused=True), 28),
    "danlu Tiger (foreach)": (lambda p: Tiger(groups(p), foreach=True), 24),
    "torch AdamW (fused)": (lambda p: torch.optim.AdamW(p, fused=True), 28),
    "torch SGD momentum (fused)": (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True), 20),
}


def milliseconds(call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    run_tests("tests/kernels/test_sign_update_triton.py")
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        optimizers = {name: make(parameters(dtype)) for name, (make, _) in CANDIDATES.items()}
        count = sum(torch.Size(shape).numel() for shape in SHAPES)
        source = torch.empty(count, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        calls = {name: optimizer.step for name, optimizer in optimizers.items()} | {
            "copy": partial(target.copy_, source)
        }
        for _ in range(5):
            for call in calls.values():
                call()
        times = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(milliseconds(call))
        size = torch.finfo(dtype).bits // 8
        bandwidth = 2 * size * count / statistics.median(times["copy"])
        rows = {}
        for name, values in times.items():
            moved = (CANDIDATES[name][1] // 4 if name != "copy" else 2) * size
            middle = statistics.median(values)
            share = moved * count / middle / bandwidth
            rows[name] = {"median_ms": middle, "floor_ms": moved * count / bandwidth, "share_of_copy_bandwidth": share}
        show(f"one step, {count / 1e6:.0f} M parameters, {dtype}, on {torch.cuda.get_device_name()}", rows)
        results[str(dtype)] = rows
    path = save("optimizers_gpu", {"device": torch.cuda.get_device_name(), "host": machine(), "step": results})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
