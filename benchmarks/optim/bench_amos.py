"""One step of Amos beside its peer and AdamW on the CPU: time, bytes moved, state held.

33 million float32 parameters in 100 tensors of a transformer's shapes, one thread, all candidates interleaved in one
process on parameters of their own. The floor is the bytes that a step must move, over the bandwidth that torch's fused
SGD with momentum reaches on its 20 bytes per parameter.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import warnings

import pytorch_optimizer
import torch
from torch import nn

from _measure import interleave, run_tests, save, show, summary
from danlu.optim import Amos

ROUNDS = 15
# 14 layers of seven tensors and two more: 100 tensors, 32.8 million parameters.
SHAPES = [(424, 424)] * 4 + [(1696, 424), (424, 1696), (424,)]
SHAPES = SHAPES * 14 + [(5000, 424), (424, 1024)]
# Tensors for the row where looking at them costs more than their step.
SMALL = [(64,)] * 2000


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def amos(**options: object):
    return lambda params: Amos(params, lr=1e-3, scales=0.05, **options)


REFERENCE = "torch AdamW (fused)"
# Name, constructor, bytes that a step must move per parameter if a gradient is read once.
CANDIDATES = {
    "danlu Amos": (amos(), 12),
    "danlu Amos (scalar statistics)": (amos(reduce="scalar"), 12),
    "danlu Amos (clip)": (amos(clip_value=1.0), 12),
    "danlu Amos (foreach)": (amos(foreach=True), 12),
    "danlu Amos (loop, reference)": (amos(foreach=False), 12),
    "danlu Amos momentum": (amos(momentum=0.9), 20),
    "danlu Amos momentum (foreach)": (amos(momentum=0.9, foreach=True), 20),
    "pytorch_optimizer Amos": (lambda p: pytorch_optimizer.Amos(p, lr=1e-3), 12),
    "pytorch_optimizer Amos momentum": (lambda p: pytorch_optimizer.Amos(p, lr=1e-3, momentum=0.9), 20),
    REFERENCE: (lambda p: torch.optim.AdamW(p, fused=True), 28),
    "torch SGD momentum (fused)": (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True), 20),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors if v.ndim > 0)


def main() -> None:
    warnings.simplefilter("ignore")
    run_tests("tests/optim/test_amos.py", "tests/kernels/test_amos.py")
    torch.set_num_threads(1)
    count = sum(p.numel() for p in parameters())
    optimizers = {name: make(parameters()) for name, (make, _) in CANDIDATES.items()}
    times = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=ROUNDS)
    rows = summary(times, REFERENCE)
    bandwidth = 20 * count / (rows["torch SGD momentum (fused)"]["median_ms"] / 1e3)
    for name, row in rows.items():
        moved = CANDIDATES[name][1]
        row["floor_ms"] = 1e3 * moved * count / bandwidth
        row["B_moved_per_param"] = float(moved)
        row["state_B_per_param"] = state_bytes(optimizers[name]) / count
    show(f"one step, {count / 1e6:.1f} M parameters in {len(SHAPES)} tensors, {ROUNDS} rounds", rows)
    print(f"bandwidth of the floor: {bandwidth / 1e9:.1f} GB/s (torch SGD momentum fused, 20 B per parameter)")
    few = {"danlu Amos": amos(), "danlu Amos momentum": amos(momentum=0.9), REFERENCE: CANDIDATES[REFERENCE][0]}
    small = {name: make(parameters(SMALL)) for name, make in few.items()}
    tiny = summary(interleave({name: o.step for name, o in small.items()}, rounds=ROUNDS), REFERENCE)
    show(f"one step, {len(SMALL)} tensors of 64 elements", tiny)
    path = save("amos", {"parameters": count, "tensors": len(SHAPES), "rounds": ROUNDS, "step": rows, "small": tiny})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
