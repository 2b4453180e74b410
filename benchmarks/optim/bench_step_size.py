"""One step with adapted step sizes beside torch's fused AdamW on the CPU: time, bytes moved, state held.

25 million float32 parameters in 100 tensors of a transformer's shapes, one thread, all candidates interleaved in one
process on parameters of their own. No other implementation of the method for PyTorch is known, so the peer is the
optimizer that it would replace. The floor is the bytes that a step must move, over the bandwidth that torch's fused SGD
with momentum reaches on 20 bytes per parameter.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from _measure import interleave, run_tests, save, show, summary
from danlu.optim import EGSGD, EGStepSize, ExponentiatedGradient

ROUNDS = 15
# 14 layers of seven tensors and two more: 100 tensors, 24.9 million parameters.
SHAPES = [(368, 368)] * 4 + [(1472, 368), (368, 1472), (368,)]
SHAPES = SHAPES * 14 + [(8192, 368), (368, 1024)]


def parameters(positive: bool = False) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    starts = [0.02 * torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(start.abs() if positive else start) for start in starts]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def wrapped(**options) -> EGStepSize:
    return EGStepSize(torch.optim.SGD(parameters(), lr=1e-4, momentum=0.9), **options)


# Name, optimizer, bytes that a step must move per parameter (with a second look at gradient and momentum where the
# inner products need one).
CANDIDATES = {
    "danlu EGStepSize sgdm": (lambda: EGStepSize("sgdm", parameters(), lr=1e-4), 44),
    "danlu EGStepSize sgdm (no scale)": (lambda: EGStepSize("sgdm", parameters(), lr=1e-4, scale_lr=0.0), 36),
    "danlu EGStepSize sgdm (scale only)": (
        lambda: EGStepSize("sgdm", parameters(), lr=1e-4, per_coordinate=False),
        28,
    ),
    "danlu EGStepSize sgdm (blocks)": (lambda: EGStepSize("sgdm", parameters(), lr=1e-4, foreach=True), 44),
    "danlu EGStepSize sgdm (loop)": (lambda: EGStepSize("sgdm", parameters(), lr=1e-4, foreach=False), 44),
    "danlu EGStepSize adam": (lambda: EGStepSize("adam", parameters()), 52),
    "danlu EGStepSize(SGD)": (lambda: wrapped(), 60),
    "danlu EGSGD": (lambda: EGSGD(parameters(), lr=1e-4), 28),
    "danlu ExponentiatedGradient": (lambda: ExponentiatedGradient(parameters(positive=True), lr=1e-4), 12),
    "torch AdamW (fused)": (lambda: torch.optim.AdamW(parameters(), fused=True), 28),
    "torch SGD momentum (fused)": (lambda: torch.optim.SGD(parameters(), lr=1e-4, momentum=0.9, fused=True), 20),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    both = [optimizer, *([optimizer.inner] if getattr(optimizer, "inner", None) is not None else [])]
    tensors = [v for o in both for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors if v.ndim > 0)


def main() -> None:
    run_tests("tests/optim/test_step_size.py", "tests/kernels/test_step_size.py")
    torch.set_num_threads(1)
    count = sum(p.numel() for p in parameters())
    optimizers = {name: make() for name, (make, _) in CANDIDATES.items()}
    times = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=ROUNDS)
    rows = summary(times, "torch AdamW (fused)")
    bandwidth = 20 * count / (rows["torch SGD momentum (fused)"]["median_ms"] / 1e3)
    for name, row in rows.items():
        moved = CANDIDATES[name][1]
        row["floor_ms"] = 1e3 * moved * count / bandwidth
        row["B_moved_per_param"] = float(moved)
        row["state_B_per_param"] = state_bytes(optimizers[name]) / count
    show(f"one step, {count / 1e6:.1f} M parameters in {len(SHAPES)} tensors, {ROUNDS} rounds", rows)
    print(f"bandwidth of the floor: {bandwidth / 1e9:.1f} GB/s (torch SGD momentum fused, 20 B per parameter)")
    print("target: EGStepSize sgdm at most 1.5 times torch AdamW (fused)")
    path = save("step_size", {"parameters": count, "tensors": len(SHAPES), "rounds": ROUNDS, "step": rows})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
