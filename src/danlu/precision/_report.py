"""What a mode of precision gains and what it loses, measured on the user's own model and batches.

Source: "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28), whose table of gains this makes for any model.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from danlu._common.checks import check_choice, check_integer
from danlu.precision._compile import break_even, wait_for
from danlu.precision._modes import PRECISIONS, Precision, autocast_dtype
from danlu.precision._probe import MemoryPeak, largest_activations, parameter_gradients, unchanged, underflow
from danlu.precision._train_step import TrainStep

__all__ = ["ModeReport", "PrecisionReport", "precision_report"]

_BASE = "fp32"
_COMPILE = "+compile"


@dataclass(frozen=True)
class ModeReport:
    r"""What one mode gained and lost against float32 without compilation.

    Definition:
        With $t$ the median time of a step, `speed_up` $= t_{\text{fp32}} / t$; `break_even` is the number of steps
        after which the time that the first step took longer is won back; `loss_difference`
        $= \max_i |L_i - L_i^{\text{fp32}}| / |L_i^{\text{fp32}}|$ over the steps.

    Args:
        mode: such as "bf16+compile".
        step_seconds: median time of a step (seconds), without the first one.
        speed_up: above 1 is faster than fp32.
        first_step_seconds: time of the first step, compilation included.
        break_even: in steps; infinite if the mode is not faster.
        peak_memory: bytes of tensors alive at once in a step beyond those before it (activations, casts, gradients);
            None where the mode compiles on a CPU, which cannot be seen.
        losses: loss of every step.
        loss_difference: largest relative difference of a loss to that of fp32 in the same step.
        underflow: parameter name to the fraction of its gradient that is zero or subnormal in the mode and not in fp32
            (largest of the probed steps).
        activations: module path to its largest output, relative to the largest number of the mode's dtype.
        skipped: steps without an update.
        scale: the loss scale after the last step.

    Numerics:
        Half of `activations` at 0.5 means one doubling is left before an overflow.

    Source:
        As in [`precision_report`][danlu.precision.precision_report].

    Example:
        >>> from danlu.precision import ModeReport
        >>> ModeReport("fp32", 1.0, 1.0, 1.0, 0.0, None, (2.0,), 0.0, {}, {}, 0, 1.0).speed_up
        1.0
    """

    mode: str
    step_seconds: float
    speed_up: float
    first_step_seconds: float
    break_even: float
    peak_memory: int | None
    losses: tuple[float, ...]
    loss_difference: float
    underflow: dict[str, float]
    activations: dict[str, float]
    skipped: int
    scale: float


@dataclass(frozen=True)
class PrecisionReport:
    r"""The modes side by side; `print(report)` is a table, `report.to_dict()` plain data.

    Definition:
        One [`ModeReport`][danlu.precision.ModeReport] per mode, fp32 first.

    Args:
        modes: mode to what it gained and lost.
        device: on which it was measured, with the number of threads on a CPU.
        steps: steps per mode.

    Numerics:
        As in [`ModeReport`][danlu.precision.ModeReport].

    Source:
        As in [`precision_report`][danlu.precision.precision_report].

    Example:
        >>> from danlu.precision import PrecisionReport
        >>> PrecisionReport({}, "cpu", 20).to_dict()
        {'modes': {}, 'device': 'cpu', 'steps': 20}
    """

    modes: dict[str, ModeReport]
    device: str
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, such as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("mode", "step", "speed-up", "first step", "break-even", "memory", "loss diff.", "underflow", "max act.")
        rows = [(*head, "skipped", "scale"), *(_row(one) for one in self.modes.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"{self.steps} steps on {self.device}"]
        for row in rows:
            padded = zip(row, widths, strict=True)
            cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(padded)]
            lines.append("  ".join(cells).rstrip())
        for one in self.modes.values():
            worst = max(one.underflow, key=one.underflow.__getitem__, default=None)
            if worst is not None and one.underflow[worst] > 0:
                lines.append(f"{one.mode}: most underflow in {worst}, {one.underflow[worst]:.1%} of its gradient")
            full = max(one.activations, key=one.activations.__getitem__, default=None)
            if full is not None and not one.activations[full] <= 0.5:
                lines.append(f"{one.mode}: {full} reaches {one.activations[full]:.0%} of the largest number")
        return "\n".join(lines)


def precision_report(
    make_step: Callable[[Precision, bool], TrainStep],
    batches: Sequence[Any],
    *,
    modes: Sequence[str] = ("fp32", "tf32", "bf16", "fp16", "bf16+compile"),
    steps: int = 20,
) -> PrecisionReport:
    r"""Measure modes of precision against float32: what did I gain, and what did I lose?

    Definition:
        Every mode trains a model of its own on the same batches, step by step in turn, so that a busy machine slows
        all alike. Times, losses, skips and memory are those of these steps; gradients and activations are looked at
        beside the first, the middle and the last step. See [`ModeReport`][danlu.precision.ModeReport].

    Args:
        make_step: `(precision, compile) -> TrainStep`, a new one of a new model; it must seed the model's weights, so
            that all modes start alike.
        batches: what the steps are called with, in turn and from the start again.
        modes: "fp32", "tf32", "bf16", "fp16", "auto", each with or without "+compile"; fp32 is always measured. "tf32"
            is left out where the device is not CUDA.
        steps: at least 4.

    Returns:
        The report.

    Raises:
        TypeError: `make_step` does not return a [`TrainStep`][danlu.precision.TrainStep].
        ValueError: an unknown mode, no batches, `steps` < 4, or models that do not start alike.

    Numerics:
        A small loss difference after few steps says that a mode is right, not that a long run ends alike.

    Cost:
        `steps` training steps per mode, 3 forward and backward passes for the probes and one step for the memory; as
        many models, with optimizers, as there are modes.

    Source:
        "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28), table of speeds.

    Example:
        >>> import torch
        >>> from danlu.precision import TrainStep, precision_report
        >>> def make_step(precision, compile):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Linear(8, 8)
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     loss = lambda model, x: model(x).square().mean()
        ...     return TrainStep(model, loss, optimizer, precision=precision, compile=compile)
        >>> report = precision_report(make_step, [torch.ones(4, 8)], modes=("fp32", "bf16"), steps=4)
        >>> report.modes["bf16"].loss_difference < 0.01
        True
    """
    names = list(dict.fromkeys((_BASE, *modes)))
    for name in names:
        check_choice("a mode without '+compile'", name.removesuffix(_COMPILE), PRECISIONS)
    if not batches:
        raise ValueError("batches must have at least one batch, got none")
    check_integer("steps", steps, low=4)
    runs: dict[str, _Run] = {}
    for name in names:
        step = make_step(cast("Precision", name.removesuffix(_COMPILE)), name.endswith(_COMPILE))
        if not isinstance(step, TrainStep):
            raise TypeError(f"make_step must return a TrainStep, got {type(step).__name__}")
        if step.precision == "tf32" and step.device.type != "cuda":
            continue
        runs[name] = _Run(name, step)
    base = runs[_BASE]
    for run in runs.values():
        _check_start(base.step, run.step, run.name)
    for index in range(steps):
        batch = batches[index % len(batches)]
        # Probes before any of the steps: the modes then still have the weights of the same number of updates.
        if index in (0, steps // 2, steps - 1):
            exact = base.probe(batch)
            for run in runs.values():
                run.compare(exact, exact if run is base else run.probe(batch))
        for run in runs.values():
            run.advance(batch)
    for run in runs.values():
        run.measure_memory(batches[0])
    return PrecisionReport({name: run.report(base) for name, run in runs.items()}, _device(base.step.device), steps)


def _check_start(first: TrainStep, second: TrainStep, name: str) -> None:
    state = first.model.state_dict()
    other = second.model.state_dict()
    alike = state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    if not alike:
        raise ValueError(f"make_step must seed the weights: the models of modes 'fp32' and {name!r} do not start alike")


class _Run:
    """One mode under way."""

    def __init__(self, name: str, step: TrainStep) -> None:
        self.name = name
        self.step = step
        self.dtype = autocast_dtype(step.precision) or torch.float32
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.skipped = 0
        self.scale = step.scale
        self.underflow: dict[str, float] = {}
        self.activations: dict[str, float] = {}
        self.peak_memory: int | None = None

    def probe(self, batch: Any) -> dict[str, Tensor]:
        """Scaled gradients on `batch`, and on the way the activations; without the compiler and without a trace."""
        step = self.step
        with unchanged(step.model), step._environment(), largest_activations(step.model) as found:
            grads = parameter_gradients(step.model, lambda: step._loss(step.model, batch), step.scale)
        limit = torch.finfo(self.dtype).max
        for path, largest in found.items():
            self.activations[path] = max(self.activations.get(path, 0.0), largest / limit)
        return grads

    def compare(self, exact: dict[str, Tensor], scaled: dict[str, Tensor]) -> None:
        """Note what is lost of each gradient."""
        for name, fraction in underflow(exact, scaled, self.dtype).items():
            self.underflow[name] = max(self.underflow.get(name, 0.0), fraction)

    def advance(self, batch: Any) -> None:
        """One timed step."""
        wait_for(self.step.device)
        start = time.perf_counter()
        loss, record = self.step(batch)
        wait_for(self.step.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss))
        self.skipped += record.skipped
        self.scale = self.step.scale

    def measure_memory(self, batch: Any) -> None:
        """One more step, with an eye on the memory."""
        device = self.step.device
        self.step._clear()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.step(batch)
            self.peak_memory = torch.cuda.max_memory_allocated(device) - before
        elif self.step.compile_report.kept == "eager":
            with MemoryPeak() as memory:
                self.step(batch)
            self.peak_memory = memory.peak

    def report(self, base: "_Run") -> ModeReport:
        """The mode against float32."""
        median = statistics.median(self.seconds[1:])
        slow = statistics.median(base.seconds[1:])
        differences = [
            abs(mine - theirs) / max(abs(theirs), 1e-30) for mine, theirs in zip(self.losses, base.losses, strict=True)
        ]
        return ModeReport(
            mode=self.name,
            step_seconds=median,
            speed_up=slow / median,
            first_step_seconds=self.seconds[0],
            break_even=0.0 if self is base else break_even(self.seconds[0] - base.seconds[0], slow, median),
            peak_memory=self.peak_memory,
            losses=tuple(self.losses),
            loss_difference=math.nan if any(math.isnan(one) for one in differences) else max(differences),
            underflow=self.underflow,
            activations=self.activations,
            skipped=self.skipped,
            scale=self.scale,
        )


def _row(one: ModeReport) -> tuple[str, ...]:
    worst = max(one.underflow.values(), default=0.0)
    fullest = max(one.activations.values(), default=0.0)
    return (
        one.mode,
        f"{one.step_seconds * 1e3:.1f} ms",
        f"{one.speed_up:.2f}x",
        f"{one.first_step_seconds:.2f} s",
        "never" if math.isinf(one.break_even) else f"{one.break_even:.0f}",
        "-" if one.peak_memory is None else f"{one.peak_memory / 2**20:.1f} MiB",
        f"{one.loss_difference:.1e}",
        f"{worst:.1%}",
        f"{fullest:.1g}",
        str(one.skipped),
        f"{one.scale:g}",
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
