"""Sparsemax and entmax beside the package `entmax` (default, and with a guess of the support) and torch's softmax.

float32, one thread, forward and backward, interleaved: random rows, where few scores get a probability, and rows of
nearly equal scores, where all do. The floor of the time is a forward and a backward that only move the bytes: a copy of
the scores, and a product of probabilities and cotangents.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import entmax as package
import torch
from torch import Tensor

from _measure import interleave, run_tests, save, show, summary
from danlu.simplex import entmax, entmax15, sparsemax

SHAPES, ROUNDS, GUESS = ((512, 32_000), (4096, 512)), 7, 100


def problem(shape: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(shape, generator=generator)
    return scores.requires_grad_(), torch.randn(shape, generator=generator)


def both_ways(function, scores: Tensor, cotangent: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(function(scores), scores, cotangent)
    return grad


def moved_bytes(scores: Tensor, cotangent: Tensor) -> None:
    with torch.no_grad():
        p = scores.clone()
        torch.mul(p, cotangent)


CANDIDATES = {
    "danlu sparsemax": partial(both_ways, sparsemax),
    "danlu sparsemax, reference": partial(both_ways, partial(sparsemax, impl="reference")),
    "package sparsemax": partial(both_ways, partial(package.sparsemax, dim=-1)),
    "package sparsemax, k=100": partial(both_ways, partial(package.sparsemax, dim=-1, k=GUESS)),
    "danlu entmax15": partial(both_ways, entmax15),
    "danlu entmax15, reference": partial(both_ways, partial(entmax15, impl="reference")),
    "package entmax15": partial(both_ways, partial(package.entmax15, dim=-1)),
    "package entmax15, k=100": partial(both_ways, partial(package.entmax15, dim=-1, k=GUESS)),
    "danlu entmax, alpha=1.25": partial(both_ways, partial(entmax, alpha=1.25)),
    "torch softmax": partial(both_ways, partial(torch.softmax, dim=-1)),
    "floor: bytes moved": moved_bytes,
}


def agreement() -> dict[str, float]:
    """Largest differences from the package, of values and gradients."""
    found = {}
    for mine, theirs in ((sparsemax, package.sparsemax), (entmax15, package.entmax15)):
        scores, cotangent = problem((64, 32_000), 1.0)
        values = [function(scores) for function in (mine, partial(theirs, dim=-1))]
        grads = [torch.autograd.grad(value, scores, cotangent)[0] for value in values]
        found[f"{mine.__name__} value"] = float((values[0] - values[1]).detach().abs().max())
        found[f"{mine.__name__} gradient"] = float((grads[0] - grads[1]).abs().max())
    return found


def main() -> None:
    run_tests("tests/kernels/test_entmax.py", "tests/simplex/test_entmax.py", "tests/simplex/test_sparsemax.py")
    torch.set_num_threads(1)
    content: dict[str, object] = {"rounds": ROUNDS, "float32_differences": agreement()}
    print("float32 differences from the package:", content["float32_differences"])
    for shape in SHAPES:
        for kind, scale in (("random", 1.0), ("all in the support", 1e-4)):
            scores, cotangent = problem(shape, scale)
            rounds = ROUNDS if shape[1] < 10_000 else max(3, ROUNDS - 2)
            times = interleave(
                {name: partial(run, scores, cotangent) for name, run in CANDIDATES.items()}, rounds=rounds, warmup=1
            )
            rows = summary(times, "package entmax15")
            for name, row in rows.items():
                peer = f"package {name.split()[1].rstrip(',')}"
                if name.startswith("danlu") and peer in rows:
                    row["times_faster"] = rows[peer]["median_ms"] / row["median_ms"]
                    row["times_faster_than_k"] = rows[f"{peer}, k=100"]["median_ms"] / row["median_ms"]
            moved = 4 * shape[0] * shape[1] * 5
            title = f"{shape}, {kind}, {rounds} rounds; at least {moved / 2**20:.0f} MiB are moved"
            show(title, rows)
            content[f"{shape[0]}x{shape[1]}, {kind}"] = {"floor_bytes": moved, "candidates": rows}
    path = save("simplex_maps", content)
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
