"""One step of Lion and Tiger beside their peers on the CPU: time, bytes moved, state held.

33 million float32 parameters in 100 tensors of a transformer's shapes, one thread, all candidates interleaved in one
process on the same parameters and gradients, with states of their own. The floor is the bytes that a step must move,
over the bandwidth that torch's fused SGD with momentum reaches on the same 20 bytes per parameter. Then 2000 tensors of
64 elements, where what counts is the work per tensor; then the bytes that are held between micro-batches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import warnings

import lion_pytorch
import pytorch_optimizer
import torch
from torch import nn

from _measure import interleave, run_tests, save, show, summary
from danlu.optim import Lion, Tiger

ROUNDS = 15
# 14 layers of seven tensors and two more: 100 tensors, 33.1 million parameters.
SHAPES = [(414, 414)] * 4 + [(1656, 414), (414, 1656), (414,)]
SHAPES = SHAPES * 14 + [(9216, 414), (414, 1152)]
SMALL = [(64,)] * 2000


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def tiger_groups(params: list[nn.Parameter]) -> list[dict]:
    kinds = {"embedding": params[-2:-1], "vector": [p for p in params if p.ndim == 1]}
    rest = [p for p in params[:-2] if p.ndim == 2] + params[-1:]
    return [{"params": group, "kind": kind} for kind, group in {**kinds, "matrix": rest}.items()]


# Name, constructor, bytes that a step must move per parameter. With the look for bad gradients the gradient of a
# tensor beyond the cache is read twice; the floor leaves that out.
CANDIDATES = {
    "danlu Lion": (lambda p: Lion(p, weight_decay=0.1), 20),
    "danlu Lion (guard off)": (lambda p: Lion(p, weight_decay=0.1, nonfinite="off"), 20),
    "danlu Lion (foreach)": (lambda p: Lion(p, weight_decay=0.1, foreach=True), 20),
    "danlu Lion (loop, reference)": (lambda p: Lion(p, weight_decay=0.1, foreach=False), 20),
    "danlu Tiger": (lambda p: Tiger(tiger_groups(p)), 24),
    "danlu Tiger (guard off)": (lambda p: Tiger(tiger_groups(p), nonfinite="off"), 24),
    "danlu Tiger (foreach)": (lambda p: Tiger(tiger_groups(p), foreach=True), 24),
    "danlu Tiger (loop, reference)": (lambda p: Tiger(tiger_groups(p), foreach=False), 24),
    "pytorch_optimizer Lion": (lambda p: pytorch_optimizer.Lion(p, weight_decay=0.1), 20),
    "pytorch_optimizer Lion (foreach)": (lambda p: pytorch_optimizer.Lion(p, weight_decay=0.1, foreach=True), 20),
    "pytorch_optimizer Tiger": (lambda p: pytorch_optimizer.Tiger(p, weight_decay=0.1), 20),
    "lion-pytorch": (lambda p: lion_pytorch.Lion(p, weight_decay=0.1), 20),
    "torch AdamW (fused)": (lambda p: torch.optim.AdamW(p, fused=True), 28),
    "torch SGD momentum (fused)": (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True), 20),
}
SMALL_CANDIDATES = {
    "danlu Lion": lambda p: Lion(p),
    "danlu Tiger": lambda p: Tiger([{"params": p, "kind": "vector"}]),
    "pytorch_optimizer Lion": lambda p: pytorch_optimizer.Lion(p),
    "torch AdamW (fused)": lambda p: torch.optim.AdamW(p, fused=True),
    "torch SGD momentum (fused)": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors if v.ndim > 0)


ACCUMULATION = {
    "torch AdamW + accumulation": lambda net, k: torch.optim.AdamW(net.parameters()),
    "danlu Lion + accumulation": lambda net, k: Lion(net.parameters()),
    "danlu Tiger": lambda net, k: Tiger(net, grad_accum_steps=k),
    "danlu Tiger (in backward)": lambda net, k: Tiger(net, grad_accum_steps=k, in_backward=True),
}


def accumulation_memory(k: int = 4) -> dict[str, dict[str, object]]:
    """Bytes per parameter over k micro-batches: weights, optimizer state, gradients at their peak, and kept between.

    The peak is at the end of a backward pass, or for the step inside it at the largest single gradient, which the
    hooks of this function see before they are handed over.
    """
    rows = {}
    for name, make in ACCUMULATION.items():
        net = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])
        params = list(net.parameters())
        count = sum(p.numel() for p in params)
        peak = [0]

        def look(_: object = None, params: list = params, peak: list = peak) -> None:
            peak[0] = max(peak[0], sum(p.grad.numel() * 4 for p in params if p.grad is not None))

        for p in params:
            p.register_post_accumulate_grad_hook(look)
        optimizer = make(net, k)
        kept = 0
        for step in range(2 * k):
            net(torch.ones(4, 256)).square().mean().backward()
            look()
            if isinstance(optimizer, Tiger) or (step + 1) % k == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if (step + 1) % k:
                kept = max(kept, sum(p.grad.numel() * 4 for p in params if p.grad is not None))
        held = state_bytes(optimizer)
        rows[name] = {
            "state_B_per_param": held / count,
            "kept_grad_B_per_param": kept / count,
            "peak_grad_B_per_param": peak[0] / count,
            "weights+state+peak": (4 * count + held + peak[0]) / count,
        }
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    run_tests("tests/optim/test_lion.py", "tests/optim/test_tiger.py", "tests/kernels/test_sign_update.py")
    torch.set_num_threads(1)
    params = parameters(SHAPES)
    count = sum(p.numel() for p in params)
    optimizers = {name: make(params) for name, (make, _) in CANDIDATES.items()}
    times = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=ROUNDS)
    rows = summary(times, "torch AdamW (fused)")
    bandwidth = 20 * count / (rows["torch SGD momentum (fused)"]["median_ms"] / 1e3)
    for name, row in rows.items():
        moved = CANDIDATES[name][1]
        row["floor_ms"] = 1e3 * moved * count / bandwidth
        row["B_moved_per_param"] = float(moved)
        row["state_B_per_param"] = state_bytes(optimizers[name]) / count
    show(f"one step, {count / 1e6:.1f} M parameters in {len(SHAPES)} tensors, {ROUNDS} rounds, ratio to AdamW", rows)
    print(f"bandwidth of the floor: {bandwidth / 1e9:.1f} GB/s (torch SGD momentum fused, 20 B per parameter)")
    params = parameters(SMALL)
    small = {name: make(params).step for name, make in SMALL_CANDIDATES.items()}
    small_rows = summary(interleave(small, rounds=3 * ROUNDS), "torch SGD momentum (fused)")
    show(f"one step, {len(SMALL)} tensors of {SMALL[0][0]}, ratio to SGD with momentum", small_rows)
    memory = accumulation_memory()
    show("memory over micro-batches, k = 4, bytes per parameter", memory)
    content = {"parameters": count, "tensors": len(SHAPES), "rounds": ROUNDS, "ratio_to": "torch AdamW (fused)"}
    content |= {"step": rows, "small_ratio_to": "torch SGD momentum (fused)", "small": small_rows}
    path = save("optimizers", {**content, "accumulation": memory})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
