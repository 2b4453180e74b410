"""Scaling laws on one CPU thread: a fit with its bootstrap beside scipy's multi-start fits, and the sampler's rate.

The fit: 20 points, 200 replicates. The peer does what a script does: L-BFGS-B with numerical gradients from a grid of
12 starts, once for every replicate; it is timed on a few replicates and scaled. With
the analytic gradient it is the strongest that scipy has. The sampler: samples of 32 bits beside plain numpy; the floor
is a copy of the bytes that a sample holds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import time

import numpy as np
import torch
from scipy.optimize import minimize

from _measure import interleave, run_tests, save, show, summary
from danlu.diagnostics import MultitaskSparseParity, fit_power_law

ROUNDS = 5
REPLICATES = 200
TIMED_REPLICATES = 10
DELTA = 1e-3
SAMPLES = 200_000


def points() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.logspace(3, 6, 20, dtype=torch.float64)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (1.7 + 30 * x**-0.34) * (1 + 0.002 * noise)


def scipy_fit(log_x: np.ndarray, log_y: np.ndarray, analytic: bool) -> tuple[float, np.ndarray]:
    """Best of 12 starts."""

    def value(theta: np.ndarray) -> float:
        size = np.abs(np.logaddexp(theta[0] - theta[1] * log_x, theta[2]) - log_y)
        return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).mean() / DELTA**2)

    def gradient(theta: np.ndarray) -> np.ndarray:
        power = theta[0] - theta[1] * log_x
        total = np.logaddexp(power, theta[2])
        pull = np.clip(total - log_y, -DELTA, DELTA) / DELTA**2 / len(log_x)
        share = pull * np.exp(power - total)
        return np.array([share.sum(), -(share * log_x).sum(), (pull * np.exp(theta[2] - total)).sum()])

    best = (np.inf, np.zeros(3))
    for alpha in (0.1, 0.3, 0.5, 1.0):
        for share in (0.1, 0.5, 0.9):
            floor = share * np.exp(log_y.min())
            start = [np.log(np.exp(log_y) - floor).mean() + alpha * log_x.mean(), alpha, np.log(floor)]
            found = minimize(
                value,
                start,
                jac=gradient if analytic else None,
                method="L-BFGS-B",
                options={"maxiter": 1000, "maxfun": 10_000, "ftol": 1e-13},
            )
            best = min(best, (float(found.fun), found.x), key=lambda one: one[0])
    return best


def scipy_bootstrap(x: torch.Tensor, y: torch.Tensor, analytic: bool) -> float:
    """Seconds of a fit with 200 replicates, from `TIMED_REPLICATES` of them."""
    log_x, log_y = x.log().numpy(), y.log().numpy()
    rng = np.random.default_rng(0)
    _, theta = scipy_fit(log_x, log_y, analytic)
    curve = np.logaddexp(theta[0] - theta[1] * log_x, theta[2])
    residual = log_y - curve
    start = time.perf_counter()
    for _ in range(TIMED_REPLICATES):
        scipy_fit(log_x, curve + rng.choice(residual, len(residual)), analytic)
    return (time.perf_counter() - start) / TIMED_REPLICATES * (REPLICATES + 1)


def numpy_sample(data: MultitaskSparseParity, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    task = rng.choice(data.n_tasks, size=count, p=data.probabilities.numpy())
    bits = rng.integers(0, 2, size=(count, data.n_bits), dtype=np.uint8)
    label = np.take_along_axis(bits, data.subsets.numpy()[task], axis=1).sum(1) % 2
    return task, bits, label


def main() -> None:
    run_tests("tests/diagnostics/test_power_law.py", "tests/diagnostics/test_sparse_parity.py")
    torch.set_num_threads(1)
    x, y = points()
    times: dict[str, list[float]] = {"danlu": [], "scipy, analytic gradient": [], "scipy, numerical gradient": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ours = fit_power_law(x, y, bootstrap=REPLICATES)
        times["danlu"].append(time.perf_counter() - start)
        times["scipy, analytic gradient"].append(scipy_bootstrap(x, y, analytic=True))
        times["scipy, numerical gradient"].append(scipy_bootstrap(x, y, analytic=False))
    fits = summary(times, "danlu")
    fits["danlu"]["objective"] = ours.objective
    for name, analytic in (("scipy, analytic gradient", True), ("scipy, numerical gradient", False)):
        fits[name]["objective"] = scipy_fit(x.log().numpy(), y.log().numpy(), analytic)[0]
    show(f"fit of 20 points with {REPLICATES} replicates, {ROUNDS} rounds (scipy scaled from {TIMED_REPLICATES})", fits)

    data = MultitaskSparseParity(n_tasks=200, n_bits=32, k=2, gamma=0.6)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    # A sample is 32 bytes of bits and two int64.
    block = torch.zeros(SAMPLES * 48, dtype=torch.uint8)
    target = torch.empty_like(block)
    rates = summary(
        interleave(
            {
                "danlu": lambda: data.sample(SAMPLES, generator=generator),
                "danlu, batches of 2048": lambda: [
                    data.sample(2048, generator=generator) for _ in range(SAMPLES // 2048)
                ],
                "numpy": lambda: numpy_sample(data, rng, SAMPLES),
                "floor (copy of the bytes)": lambda: target.copy_(block),
            },
            rounds=ROUNDS,
        ),
        "danlu",
    )
    for row in rates.values():
        row["million_samples_per_s"] = SAMPLES / row["median_ms"] / 1e3
    show(f"{SAMPLES} samples of 32 bits, {ROUNDS} rounds", rates)
    path = save("power_law", {"rounds": ROUNDS, "replicates": REPLICATES, "fit": fits, "sampler": rates})
    print(f"written to {path.relative_to(Path(__file__).parents[2])}")


if __name__ == "__main__":
    main()
