"""A step of an embedding table: plain, lazily with a dense gradient, lazily with a sparse gradient; beside SparseAdam.

V = 50000 rows of d = 512 float32 elements, 2000 of them touched; one thread, all candidates interleaved in one process
on tables of their own, which leaves every table out of the caches when its turn comes; a second pair of numbers has the
plain and the sparse step repeated alone. The floors are the bytes that a step must move, 20 per touched element and 4
per element of a dense gradient that must be searched, over the bandwidth that torch's fused SGD with momentum reaches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from _measure import interleave, run_tests, save, show, summary
from danlu.optim import Lion, Tiger

ROUNDS = 15
V, D, TOUCHED = 50_000, 512, 2_000


def gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(V, generator=generator)[:TOUCHED]
    values = torch.randn(TOUCHED, D, generator=generator)
    every = torch.randn(V, D, generator=generator)
    half = every.clone()
    half[::2] = 0
    return {
        "sparse": torch.sparse_coo_tensor(rows[None], values, (V, D), check_invariants=True),
        "few": torch.zeros(V, D).index_copy_(0, rows, values),
        "half": half,
        "every": every,
    }


def table(grad: torch.Tensor) -> nn.Parameter:
    p = nn.Parameter(0.02 * torch.randn(V, D))
    p.grad = grad
    return p


def main() -> None:
    run_tests("tests/optim/test_lazy_rows.py")
    torch.set_num_threads(1)
    grads = gradients()
    results = {}
    for cls in (Lion, Tiger):

        def make(name: str, lazy: bool, cls=cls, **options) -> torch.optim.Optimizer:
            return cls([{"params": [table(grads[name])], "kind": "embedding", "lazy": lazy}], **options)

        # The searched elements and the touched ones, which decide the floor.
        candidates = {
            "plain": (make("every", False), 0, V * D),
            "lazy, gradient in every row": (make("every", True), 0, V * D),
            "lazy, gradient in half the rows": (make("half", True), V * D, V * D // 2),
            "lazy, gradient in 2000 rows": (make("few", True), V * D, TOUCHED * D),
            "lazy, sparse gradient of 2000 rows": (make("sparse", True), 0, TOUCHED * D),
            "lazy with masks (reference)": (make("few", True, foreach=False), V * D, V * D),
            "torch SparseAdam, same gradient": (torch.optim.SparseAdam([table(grads["sparse"])]), 0, TOUCHED * D),
            "torch SGD momentum (fused)": (
                torch.optim.SGD([table(grads["every"])], momentum=0.9, fused=True),
                0,
                V * D,
            ),
        }
        times = interleave({name: one.step for name, (one, _, _) in candidates.items()}, rounds=ROUNDS)
        rows = summary(times, "plain")
        bandwidth = 20 * V * D / (rows["torch SGD momentum (fused)"]["median_ms"] / 1e3)
        for name, row in rows.items():
            _, searched, touched = candidates[name]
            row["floor_ms"] = 1e3 * (4 * searched + 20 * touched) / bandwidth
        show(f"{cls.__name__}: one step of a {V} x {D} table, {ROUNDS} rounds", rows)
        results[cls.__name__] = rows
        dense, sparse = (
            rows["lazy, gradient in every row"]["ratio"],
            rows["lazy, sparse gradient of 2000 rows"]["ratio"],
        )
        print(f"lazy / plain where every row has a gradient: {dense:.3f} (target 1.10)")
        alone = {
            name: summary(interleave({name: candidates[name][0].step}, rounds=ROUNDS), name)[name]["median_ms"]
            for name in ("plain", "lazy, sparse gradient of 2000 rows")
        }
        results[cls.__name__] |= {f"{name}, repeated alone": {"median_ms": value} for name, value in alone.items()}
        print(f"plain / lazy with the sparse gradient: {1 / sparse:.1f} (target 8)")
        print(f"the same, each repeated alone: {alone['plain'] / alone['lazy, sparse gradient of 2000 rows']:.1f}")
    path = save("lazy_rows", {"rows": V, "columns": D, "touched": TOUCHED, "rounds": ROUNDS, "step": results})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
