"""Side by side in one process: interleaved timing with medians, peak memory in fresh processes, JSON per benchmark."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round.

    The candidates take turns, so drift of the machine hits all alike, and in a new order every round: who follows pays
    for what its predecessor left in the cache to be written.
    """
    order, generator = list(candidates.items()), random.Random(0)
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        generator.shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds, and the median of the round-by-round ratio to `reference`."""
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [a / b for a, b in zip(values, times[reference], strict=True)]
        found[name] = {
            "median_ms": 1e3 * middle,
            "low_quartile_ms": 1e3 * low,
            "high_quartile_ms": 1e3 * high,
            "ratio": statistics.median(ratios),
        }
    return found


class PeakMemory:
    """Peak of the resident memory above its level at entry, sampled every millisecond and at the kernel's mark."""

    def __enter__(self) -> "PeakMemory":
        self.base = _resident()
        self.peak = self.base
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _resident())
        self.extra = self.peak - self.base


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_fresh_process(script: str, *arguments: str) -> dict[str, float]:
    """Run `script` with `arguments` and return the JSON of its last line of output."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, object]:
    """What the figures depend on; no host names or paths."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "processor": model,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, content: Mapping[str, object]) -> Path:
    """Write the results to `results/<name>.json` under a temporary name first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    temporary.replace(path)
    return path


def show(title: str, rows: Mapping[str, Mapping[str, object]]) -> None:
    """Print a table, one row per candidate."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n{title}")
    print(f"{'':34}" + "".join(f"{column:>24}" for column in columns))
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        print(
            f"{name:34}" + "".join(f"{cell:>24.3f}" if isinstance(cell, float) else f"{cell!s:>24}" for cell in cells)
        )


def run_tests(*paths: str) -> None:
    """Refuse to measure what is not right."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *paths], cwd=root, check=False)
    if done.returncode:
        raise SystemExit("the tests are red: no measurement")
