"""The pairwise step of a Wasserstein flow beside what it cannot do without: one distance matrix and one product.

2000 particles in 31 dimensions, float32, one thread, interleaved in one process. The floor counts the multiply-adds of
the pairwise terms (N^2 D each) at the rate of a matrix product of these shapes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from _measure import interleave, run_tests, save, show, summary
from danlu.flows import KL, WassersteinFlow

ROUNDS = 25
N, D = 2000, 31


def main() -> None:
    run_tests("tests/flows")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(N, D)
    square = torch.randn(N, N)

    def log_prob(points: torch.Tensor) -> torch.Tensor:
        return -points.square().sum(-1) / 2

    flows = {name: WassersteinFlow(KL(log_prob), density=name, bandwidth=4.0) for name in ("kde", "blob", "svgd")}
    flows["gaussian"] = WassersteinFlow(KL(log_prob), density="gaussian")
    candidates = {
        "torch.cdist + matmul": lambda: torch.cdist(x, x) @ x,
        "matmul alone": lambda: square @ x,
    }
    candidates |= {f"danlu {name}": lambda f=flow: f.step(x, 0.01) for name, flow in flows.items()}
    rows = summary(interleave(candidates, rounds=ROUNDS), "torch.cdist + matmul")
    product = rows["matmul alone"]["median_ms"]
    products = {"torch.cdist + matmul": 2, "matmul alone": 1, "danlu kde": 2, "danlu blob": 3, "danlu svgd": 2}
    for name, row in rows.items():
        row["floor_ms"] = product * products.get(name, 0)
    show(f"one step, {N} particles in {D} dimensions, {ROUNDS} rounds", rows)
    path = save("flows_pairwise", {"particles": N, "dimensions": D, "rounds": ROUNDS, "step": rows})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
