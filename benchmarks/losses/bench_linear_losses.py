"""Losses of a linear head beside torch's chunked cross entropy and the authors' dense EMO: time and peak memory.

N = 2048 rows, D = 512, V = 32000, float32, one thread, forward and backward, the same chunk for all. Every peak is
measured in a fresh process, above the inputs and the cost embedding; times are interleaved in one process. The floors
are the matrix products alone: three, with the costs four, and one for sparse softmax.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from _measure import PeakMemory, in_fresh_process, interleave, run_tests, save, show, summary
from danlu.losses import emo_loss, linear_emo_loss, linear_sparse_softmax_loss, linear_tailr_loss

ROWS, FEATURES, CLASSES, CHUNK, ROUNDS = 2048, 512, 32_000, 256, 5
REFERENCE = "torch linear_cross_entropy"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(rows: int = ROWS, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states, head, targets, and a frozen copy of the head as the cost embedding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float32).to(dtype)
    weight = (0.02 * torch.randn(classes, FEATURES, generator=generator, dtype=torch.float32)).to(dtype)
    # All different, so that no row of costs is shared; in text a chunk has about half as many types as tokens.
    target = torch.randperm(classes, generator=generator)[:rows] if classes >= rows else torch.arange(rows) % classes
    return hidden.requires_grad_(), weight.requires_grad_(), target, weight.detach().clone()


def torch_chunked(hidden, weight, target, frozen):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    F.linear_cross_entropy(hidden, weight, target, options=options).backward()


def tailr(hidden, weight, target, frozen):
    linear_tailr_loss(hidden, weight, target, chunk_size=CHUNK).backward()


def sparse_softmax(hidden, weight, target, frozen):
    linear_sparse_softmax_loss(hidden, weight, target, chunk_size=CHUNK).backward()


def emo_of_the_head(hidden, weight, target, frozen):
    linear_emo_loss(hidden, weight, target, cost_embedding="head", chunk_size=CHUNK).backward()


def emo_of_a_copy(hidden, weight, target, frozen):
    linear_emo_loss(hidden, weight, target, cost_embedding=frozen, chunk_size=CHUNK).backward()


def dense_emo(hidden, weight, target, frozen):
    emo_loss(F.linear(hidden, weight), target, cost_embedding=frozen).backward()


def official_emo(hidden, weight, target, frozen):
    """The package EMOLoss 0.0.3, which drops the last position of the logits and the first label."""
    from emo import EMOLoss

    logits = F.linear(hidden, weight)[None]
    EMOLoss(logits, target[None], frozen, mode=1).backward()


def one_product(hidden, weight, target, frozen):
    """The floor of a loss without a dense gradient."""
    with torch.no_grad():
        buffer = torch.empty(CHUNK, CLASSES)
        for start in range(0, ROWS, CHUNK):
            torch.mm(hidden[start : start + CHUNK], weight.t(), out=buffer)


def products(hidden, weight, target, frozen, *, costs=False):
    """The floor: the matrix products of one pass, in chunks, and nothing else."""
    with torch.no_grad():
        buffer = torch.empty(CHUNK, CLASSES)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, ROWS, CHUNK):
            rows = slice(start, start + CHUNK)
            if costs:
                torch.mm(frozen[target[rows]], frozen.t(), out=buffer)
            torch.mm(hidden[rows], weight.t(), out=buffer)
            torch.mm(buffer, weight, out=d_hidden[rows])
            d_weight.addmm_(buffer.t(), hidden[rows])


CANDIDATES = {
    REFERENCE: torch_chunked,
    "danlu linear_tailr_loss": tailr,
    "danlu linear_sparse_softmax_loss": sparse_softmax,
    "danlu linear_emo_loss, head": emo_of_the_head,
    "danlu linear_emo_loss, copy": emo_of_a_copy,
    "danlu emo_loss, dense": dense_emo,
    "EMOLoss 0.0.3, dense": official_emo,
    "floor: one product": one_product,
    "floor: three products": products,
    "floor: four products": partial(products, costs=True),
}


def peak(name: str) -> None:
    torch.set_num_threads(1)
    inputs = problem()
    # Threads, allocator and libraries are started before the measurement.
    small = problem(rows=8, classes=64)
    emo_loss(F.linear(small[0], small[1]), small[2], cost_embedding=small[3]).backward()
    with PeakMemory() as memory:
        CANDIDATES[name](*inputs)
    print(json.dumps({"extra": memory.extra}))


def exactness() -> dict[str, float]:
    """Largest differences of the fused EMO from the dense one in float64, relative to the largest value."""
    hidden, weight, target, frozen = problem(256, 4000, torch.float64)
    target[::7] = -100
    found = []
    for loss in (
        linear_emo_loss(hidden, weight, target, cost_embedding=frozen, chunk_size=64),
        emo_loss(F.linear(hidden, weight), target, cost_embedding=frozen),
    ):
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    names = ("loss", "d_input", "d_weight")
    return {n: float((a - b).abs().max() / b.abs().max()) for n, a, b in zip(names, *found, strict=True)}


def main() -> None:
    run_tests(
        "tests/losses/test_linear.py", "tests/losses/test_ground_cost.py", "tests/losses/test_linear_sparse_softmax.py"
    )
    torch.set_num_threads(1)
    flops = 2 * ROWS * FEATURES * CLASSES
    print(f"{3 * flops / 1e9:.0f} GFLOP for cross entropy and TaiLr, {4 * flops / 1e9:.0f} for EMO")
    floor_bytes = 4 * (CHUNK * CLASSES + CLASSES * FEATURES + ROWS * FEATURES)
    print(f"at least {floor_bytes / 2**20:.0f} MiB beside the inputs (a chunk of logits, both gradients)")
    inputs = problem()

    def run(candidate):
        inputs[0].grad = inputs[1].grad = None
        candidate(*inputs)

    rows = summary(interleave({n: partial(run, c) for n, c in CANDIDATES.items()}, rounds=ROUNDS, warmup=1), REFERENCE)
    for name, row in rows.items():
        row["peak_extra_MiB"] = in_fresh_process(__file__, name)["extra"] / 2**20
    for row in rows.values():
        row["peak_ratio"] = row["peak_extra_MiB"] / rows[REFERENCE]["peak_extra_MiB"]
    show(f"N = {ROWS}, D = {FEATURES}, V = {CLASSES}, chunk {CHUNK}, {ROUNDS} rounds", rows)
    official, fused = rows["EMOLoss 0.0.3, dense"], rows["danlu linear_emo_loss, copy"]
    faster = official["median_ms"] / fused["median_ms"]
    smaller = official["peak_extra_MiB"] / fused["peak_extra_MiB"]
    print(f"the fused EMO is {faster:.2f} times as fast and {smaller:.1f} times as small as the package")
    errors = exactness()
    print("relative differences from the dense float64 computation:", errors)
    shape = {"rows": ROWS, "features": FEATURES, "classes": CLASSES, "chunk_size": CHUNK, "rounds": ROUNDS}
    path = save("linear_losses", {**shape, "floor_bytes": floor_bytes, "candidates": rows, "float64_errors": errors})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
