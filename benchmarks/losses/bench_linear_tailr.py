"""The chunked TaiLr head beside the unfused loss and torch's chunked cross entropy: time and peak memory.

N = 2048 rows, D = 512, V = 32000, float32, one thread, forward and backward. Every peak is measured in a fresh process,
above the inputs; times are interleaved in one process. The floor of the time is the three matrix products alone.
A sweep over chunk sizes shows what the default chunk size trades.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn import functional as F

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.losses import linear_tailr_loss, tailr_loss

ROWS, FEATURES, CLASSES, CHUNK, ROUNDS = 2048, 512, 32_000, 256, 7
SWEEP, SWEEP_ROUNDS = (32, 64, 128, 256, 512, 1024), 5


def problem(dtype: torch.dtype = torch.float32, rows: int = ROWS, classes: int = CLASSES):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float32).to(dtype)
    weight = (0.02 * torch.randn(classes, FEATURES, generator=generator, dtype=torch.float32)).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def fused(hidden, weight, target, chunk_size=CHUNK):
    linear_tailr_loss(hidden, weight, target, chunk_size=chunk_size).backward()


def unfused(hidden, weight, target):
    tailr_loss(F.linear(hidden, weight), target).backward()


def dense_cross_entropy(hidden, weight, target):
    F.cross_entropy(F.linear(hidden, weight), target).backward()


def torch_chunked(hidden, weight, target):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    F.linear_cross_entropy(hidden, weight, target, options=options).backward()


def products(hidden, weight, target):
    """The floor: the three matrix products of one pass, in chunks, and nothing else."""
    with torch.no_grad():
        buffer = torch.empty(CHUNK, CLASSES)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, ROWS, CHUNK):
            rows = slice(start, start + CHUNK)
            torch.mm(hidden[rows], weight.t(), out=buffer)
            torch.mm(buffer, weight, out=d_hidden[rows])
            d_weight.addmm_(buffer.t(), hidden[rows])


CANDIDATES = {
    "danlu linear_tailr_loss": fused,
    "unfused tailr_loss": unfused,
    "dense cross entropy": dense_cross_entropy,
    "floor: three products": products,
}
if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
    CANDIDATES["torch linear_cross_entropy"] = torch_chunked
CHUNKED = {f"chunk {size}": partial(fused, chunk_size=size) for size in SWEEP}


def peak(name: str) -> None:
    torch.set_num_threads(1)
    inputs = problem()
    # Threads, allocator and libraries are started before the measurement.
    small = problem(rows=8, classes=64)
    (F.linear(small[0], small[1])).sum().backward()
    with PeakMemory() as memory:
        (CANDIDATES | CHUNKED)[name](*inputs)
    print(json.dumps({"extra": memory.extra}))


def exactness() -> dict[str, float]:
    """Largest differences from the unfused loss in float64, relative to the largest value."""
    hidden, weight, target = problem(torch.float64, rows=256, classes=4000)
    target[::7] = -100
    found = {}
    for name, run in (("fused", fused), ("unfused", unfused)):
        hidden.grad = weight.grad = None
        run(hidden, weight, target)
        found[name] = (hidden.grad.clone(), weight.grad.clone())
    with torch.no_grad():
        value = linear_tailr_loss(hidden, weight, target, chunk_size=CHUNK) - tailr_loss(
            F.linear(hidden, weight), target
        )
    names = ("d_input", "d_weight")
    errors = {
        name: float((a - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, found["fused"], found["unfused"], strict=True)
    }
    return {"loss": abs(float(value)), **errors}


def main() -> None:
    run_tests("tests/losses/test_linear.py")
    torch.set_num_threads(1)
    flops = 6 * ROWS * FEATURES * CLASSES
    floor_bytes = 4 * (CHUNK * CLASSES + CLASSES * FEATURES + ROWS * FEATURES)
    print(f"{flops / 1e9:.0f} GFLOP; at least {floor_bytes / 2**20:.0f} MiB beside the inputs (chunk, both gradients)")
    inputs = problem()

    def measure(candidates, reference: str, rounds: int) -> dict[str, dict[str, float]]:
        def run(candidate):
            inputs[0].grad = inputs[1].grad = None
            candidate(*inputs)

        rows = summary(
            interleave({n: partial(run, c) for n, c in candidates.items()}, rounds=rounds, warmup=1), reference
        )
        for name, row in rows.items():
            row["peak_extra_MiB"] = in_fresh_process(__file__, name)["extra"] / 2**20
        base = rows[reference]["peak_extra_MiB"]
        for row in rows.values():
            row["peak_ratio"] = row["peak_extra_MiB"] / base
        return rows

    rows = measure(CANDIDATES, "unfused tailr_loss", ROUNDS)
    show(f"N = {ROWS}, D = {FEATURES}, V = {CLASSES}, chunk {CHUNK}, {ROUNDS} rounds", rows)
    sweep = measure(CHUNKED, f"chunk {CHUNK}", SWEEP_ROUNDS)
    show(f"danlu linear_tailr_loss by chunk size, {SWEEP_ROUNDS} rounds", sweep)
    errors = exactness()
    print("relative differences from the unfused float64 computation:", errors)
    shape = {"rows": ROWS, "features": FEATURES, "classes": CLASSES, "chunk_size": CHUNK, "rounds": ROUNDS}
    path = save(
        "linear_tailr",
        {
            **shape,
            "flops": flops,
            "floor_bytes": floor_bytes,
            "candidates": rows,
            "chunk_sizes": sweep,
            "float64_errors": errors,
        },
    )
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
