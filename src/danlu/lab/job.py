"""One job: one fit with all its evaluations. It runs in a worker and touches only its own files."""

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from danlu.lab.checkpoint import load_state, save_state, state_bytes
from danlu.lab.errors import LabError
from danlu.lab.trial import find_trial

__all__ = ["run_job"]

# One thread per fit: the result then does not depend on the machine's number of cores.
THREADS = 1

_base_memory = 0


def run_job(text: str, tick: Callable[[int, float], None]) -> str:
    """Run the job described by the JSON `text` and return its result as JSON.

    The result has either `error` (one line) or the parts of a `FitRow` and the metrics of every evaluation. A fit
    goes on from its checkpoint if there is one, bit for bit.
    """
    try:
        return json.dumps(_run(json.loads(text), tick))
    except LabError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def _run(job: dict[str, object], tick: Callable[[int, float], None]) -> dict[str, object]:
    previous_threads, previous_mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # cuBLAS is deterministic only with a fixed workspace, and reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        return _fit_and_evaluate(job, tick)
    finally:
        torch.set_num_threads(previous_threads)
        torch.use_deterministic_algorithms(previous_mode)


def _fit_and_evaluate(job: dict[str, object], tick: Callable[[int, float], None]) -> dict[str, object]:
    _, trial = find_trial(cast("str", job["trial"]))
    seed, steps = cast("int", job["seed"]), cast("int", job["steps"])
    finished, partial = Path(cast("str", job["weights"])), Path(cast("str", job["partial"]))
    every = cast("int", job["checkpoint_every"])
    options = cast("dict[str, bool | int | float | str]", job["options"])

    global _base_memory
    level = _reset_peak_memory()
    # Later fits of a process reuse the memory of earlier ones, so all are counted from the level before the first.
    _base_memory = _base_memory or level
    base = _base_memory
    fit = trial.task.start(seed=seed, steps=steps, options=options)
    curves: dict[str, list[tuple[int, float]]] = {}
    done, seconds, peak = 0, 0.0, 0
    for path in (finished, partial):
        if path.exists():
            saved = cast("dict[str, object]", load_state(path))
            fit.load(cast("dict[str, object]", saved["fit"]))
            curves = cast("dict[str, list[tuple[int, float]]]", saved["curves"])
            done, seconds = cast("int", saved["step"]), cast("float", saved["seconds"])
            peak = cast("int", saved["peak_memory"])
            break

    def snapshot(path: Path) -> None:
        elapsed = seconds + time.perf_counter() - started
        memory = max(peak, _peak_memory() - base)
        save_state(
            path, {"fit": fit.state(), "curves": curves, "step": done, "seconds": elapsed, "peak_memory": memory}
        )

    started = time.perf_counter()
    # About sixty points draw a curve; the last step is always one.
    stride = max(1, steps // 60)
    last_tick = 0.0
    while done < steps:
        point = fit.step(done)
        done += 1
        for name, value in point.items():
            if name != "train_loss" or done % stride == 0 or done == steps:
                curves.setdefault(name, []).append((done, value))
        if time.perf_counter() - last_tick > 0.2:
            last_tick = time.perf_counter()
            tick(done, point["train_loss"])
        if done % every == 0 and done < steps:
            snapshot(partial)
    seconds_all = seconds + time.perf_counter() - started
    memory = max(peak, _peak_memory() - base)
    if not finished.exists():
        snapshot(finished)
    partial.unlink(missing_ok=True)

    evaluations = cast("list[dict[str, object]]", job["evaluations"])
    metrics = {
        cast("str", one["key"]): dict(
            trial.task.evaluate(
                fit,
                seed=seed,
                split=cast("str", one["split"]),  # pyrefly: ignore[bad-argument-type]
                options={**options, **cast("dict[str, bool | int | float | str]", one["options"])},
            )
        )
        for one in evaluations
    }
    return {
        "parameters": sum(p.numel() for p in fit.model.parameters() if p.requires_grad),
        "optimizer_state": state_bytes(fit.optimizer_state()),
        "seconds": seconds_all,
        "peak_memory": memory if base else None,
        "curves": curves,
        "metrics": metrics,
    }


def _reset_peak_memory() -> int:
    """Resident bytes now, after resetting the kernel's high-water mark; 0 where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status_bytes("VmRSS")


def _peak_memory() -> int:
    return _status_bytes("VmHWM") if os.path.exists("/proc/self/status") else 0


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
