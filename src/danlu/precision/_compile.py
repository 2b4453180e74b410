"""Whether to compile a model: measured times, the break-even step, and a fallback when the compiler fails.

Source: "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28), on XLA that may slow down or fail.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from danlu._common.checks import check_choice

__all__ = ["CompileReport", "Compiler", "break_even", "check_compile", "wait_for"]

# Calls that are timed on each side; the one before them is a warm-up.
_TIMED = 3
# Characters of a compiler error that a warning repeats.
_TOLD = 300
_OPTIONS = ("backend", "mode", "options", "fullgraph", "dynamic")


@dataclass
class CompileReport:
    r"""What compiling a training step cost and gained so far.

    Definition:
        The break-even count is $\lceil t_c / (t_e - t_f) \rceil$ calls with $t_c$ = `compile_seconds`, $t_e$ =
        `eager_seconds` and $t_f$ = `compiled_seconds`; infinite without a gain.

    Args:
        kept: "eager", "compiled", or "undecided" while `compile="auto"` still measures.
        reason: why, in words.
        compile_seconds: time of the first compiled call beyond a later one; None if nothing was compiled.
        eager_seconds: median time of forward and backward without the compiler; None if not measured.
        compiled_seconds: the same with it.
        break_even: calls after which compiling has paid for itself; None if not measured.
        graph_breaks: reason of each graph break to how often it occurred.

    Numerics:
        Times are seconds of wall clock after waiting for the device.

    Source:
        As in [`TrainStep`][danlu.precision.TrainStep].

    Example:
        >>> from danlu.precision import CompileReport
        >>> CompileReport(kept="eager", reason="compile=False").graph_breaks
        {}
    """

    kept: Literal["eager", "compiled", "undecided"]
    reason: str
    compile_seconds: float | None = None
    eager_seconds: float | None = None
    compiled_seconds: float | None = None
    break_even: float | None = None
    graph_breaks: dict[str, int] = field(default_factory=dict[str, int])


def check_compile(compile: object, total_steps: int | None) -> None:
    """Raise unless `compile` is False, True, "auto" (which needs `total_steps`) or options of `torch.compile`."""
    if isinstance(compile, Mapping):
        for name in compile:
            check_choice("an option in compile", name, _OPTIONS)
    elif not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile must be False, True, 'auto' or a dict of options of torch.compile, got {compile!r}")
    if compile == "auto" and total_steps is None:
        raise ValueError(
            "compile='auto' needs total_steps, the calls that are planned, to weigh the break-even against"
        )


def break_even(extra_seconds: float, slow_seconds: float, fast_seconds: float) -> float:
    """Steps after which a first step that took `extra_seconds` more has paid for itself; infinite without a gain."""
    gain = slow_seconds - fast_seconds
    if gain <= 0:
        return math.inf
    return float(max(0, math.ceil(extra_seconds / gain)))


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _snapshot(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that gives the model its buffers and the generators their states of now back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    on_device = None if module is None else module.get_rng_state(device)

    def undo() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(state)
        if module is not None:
            module.set_rng_state(on_device, device)

    return undo


class Compiler:
    """Runs a forward and backward pass with the model or its compiled form, and decides between them.

    Args:
        model: the model.
        compile: as in `TrainStep`.
        total_steps: calls that are planned.
        device: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        compile: bool | Literal["auto"] | Mapping[str, Any],
        total_steps: int | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._options: dict[str, Any] = dict(compile) if isinstance(compile, Mapping) else {}
        self._auto = compile == "auto"
        self._total = total_steps
        self._device = device
        self._compiled: Callable[..., Any] | None = None
        self._first: float | None = None
        self._eager_times: list[float] = []
        self._compiled_times: list[float] = []
        self._calls = 0
        if compile is False:
            self.report = CompileReport("eager", "compile=False")
        else:
            self.report = CompileReport("undecided", "measuring" if self._auto else "not called yet")

    def __call__(self, run: Callable[[Callable[..., Any]], Any], restart: Callable[[], None], first: bool) -> Any:
        """Return `run(model)`, where `model` is the eager or the compiled one.

        Args:
            run: forward and backward.
            restart: undoes a backward that failed half way.
            first: whether this is the first micro-batch of its cycle; only there can a failed attempt be undone.
        """
        self._calls += 1
        report = self.report
        if report.kept == "eager":
            return run(self._model)
        measuring = self._auto and len(self._eager_times) <= _TIMED
        if self._compiled is None and (measuring or not first):
            return self._timed(lambda: run(self._model), self._eager_times)
        if self._first is None:
            return self._attempt(run, restart)
        assert self._compiled is not None
        compiled = self._compiled
        if len(self._compiled_times) > _TIMED:
            return run(compiled)
        result = self._timed(lambda: run(compiled), self._compiled_times)
        if len(self._compiled_times) > _TIMED:
            self._decide()
        return result

    def _timed(self, run: Callable[[], Any], times: list[float]) -> Any:
        wait_for(self._device)
        start = time.perf_counter()
        result = run()
        wait_for(self._device)
        times.append(time.perf_counter() - start)
        return result

    def _attempt(self, run: Callable[[Callable[..., Any]], Any], restart: Callable[[], None]) -> Any:
        """The first compiled call; whatever fails in it and not in the eager call is the compiler's."""
        from torch._dynamo.utils import counters

        before = dict(counters["graph_break"])
        undo = _snapshot(self._model, self._device)
        took: list[float] = []
        try:
            self._compiled = torch.compile(self._model, **self._options)
            compiled = self._compiled
            result = self._timed(lambda: run(compiled), took)
        except Exception as error:
            restart()
            undo()
            result = run(self._model)
            # The first line names the backend, the second its error; some list every option there is.
            told = " ".join(line.strip() for line in str(error).splitlines()[:2])
            said = f"{type(error).__name__}: {told if len(told) < _TOLD else told[:_TOLD] + '...'}"
            self.report = CompileReport("eager", f"the compiler failed: {said}")
            warnings.warn(f"torch.compile failed and the model runs without it ({said})", stacklevel=5)
            return result
        self._first = took[0]
        self.report.graph_breaks = {
            reason: count - before.get(reason, 0)
            for reason, count in counters["graph_break"].items()
            if count > before.get(reason, 0)
        }
        if not self._auto:
            self.report.kept, self.report.reason = "compiled", "as asked for"
        return result

    def _decide(self) -> None:
        report = self.report
        assert self._first is not None
        report.compiled_seconds = statistics.median(self._compiled_times[1:])
        report.compile_seconds = max(0.0, self._first - report.compiled_seconds)
        if not self._auto:
            return
        assert self._total is not None
        report.eager_seconds = statistics.median(self._eager_times[1:])
        report.break_even = break_even(report.compile_seconds, report.eager_seconds, report.compiled_seconds)
        # Counted from the compiled call on, as the break-even is.
        remaining = self._total - self._calls + len(self._compiled_times) + 1
        if report.break_even > remaining:
            report.kept, self._compiled = "eager", None
            report.reason = f"the break-even of {report.break_even:g} calls is beyond the {remaining} that remained"
        else:
            report.kept = "compiled"
            report.reason = f"the break-even of {report.break_even:g} calls is within the {remaining} that remained"
