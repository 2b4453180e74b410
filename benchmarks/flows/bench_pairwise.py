"""The pairwise step of a Wasserstein flow beside what it cannot do without: one distance matrix and one product.

2000 particles in 31 dimensions, float32, one thread, interleaved in one process. The floor counts the multiply-adds of
the products (N^2 D each for pairs, N D^2 each for the matched Gaussian) and the N^2 exponentials of a kernel, at the
best rates of the same run: that of the fastest round of a square matrix product, of several sizes, and of exponentials
of numbers that stay in the cache. Neither counts a byte of memory traffic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from _measure import interleave, run_tests, save, show, summary
from danlu.flows import KL, WassersteinFlow

ROUNDS = 25
N, D = 2000, 31
PAIRS, GAUSSIAN = N * N * D, N * D * D
# Multiply-adds and exponentials of one call.
WORK = {
    "torch.cdist + matmul": (2 * PAIRS, 0),
    "matmul alone": (PAIRS, 0),
    "danlu kde": (2 * PAIRS, N * N),
    "danlu blob": (3 * PAIRS, N * N),
    "danlu svgd": (2 * PAIRS, N * N),
    "danlu gaussian": (3 * GAUSSIAN, 0),
}


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
    sides = {f"product of {side} x {side}": torch.randn(side, side) for side in (256, 512, 1024)}
    numbers, results = torch.randn(2**16), torch.empty(2**16)
    outputs = {name: torch.empty_like(a) for name, a in sides.items()}
    rates = {name: lambda a=a, out=outputs[name]: torch.mm(a, a, out=out) for name, a in sides.items()}
    rates["exponentials"] = lambda: torch.exp(numbers, out=results)
    times = interleave(candidates | rates, rounds=ROUNDS)
    products = max(len(a) ** 3 / min(times[name]) for name, a in sides.items())
    exponentials = numbers.numel() / min(times["exponentials"])
    rows = summary({name: times[name] for name in candidates}, "torch.cdist + matmul")
    for name, row in rows.items():
        multiplied, exponents = WORK[name]
        row["floor_ms"] = 1e3 * (multiplied / products + exponents / exponentials)
        if row["floor_ms"] > row["median_ms"]:
            raise SystemExit(f"{name} takes {row['median_ms']:.3f} ms, less than its floor of {row['floor_ms']:.3f} ms")
    print(f"\nbest rates: {products / 1e9:.1f} G multiply-adds and {exponentials / 1e9:.2f} G exponentials per second")
    show(f"one step, {N} particles in {D} dimensions, {ROUNDS} rounds", rows)
    path = save(
        "flows_pairwise",
        {
            "particles": N,
            "dimensions": D,
            "rounds": ROUNDS,
            "multiply_adds_per_second": products,
            "exponentials_per_second": exponentials,
            "step": rows,
        },
    )
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
