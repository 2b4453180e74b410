"""The byte-level language model of `byte_lm`, trained by `TrainStep` in one precision, with the report of that mode."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_lm import ByteTransformer
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.precision import TrainStep, precision_report

__all__ = ["PrecisionLM"]

_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class PrecisionLM:
    """Next-byte prediction on Python source in one precision.

    `loss_scale` is "auto", "none", "dynamic" or a number; the loss is multiplied by `loss_weight`, as if it were a
    small part of a sum, and reported without it. `compile` is for the report: arms that differ in it share their fits.
    `backend` is that of `torch.compile`.

    Metrics: `bits_per_byte` on held-out text, with the weights evaluated in float32. The others are those of
    `precision_report` on `report_steps` steps of a new model, side by side with float32 in the same process:
    `step_milliseconds`, `speed_up`, `first_step_seconds`, `break_even_steps` (only where there is a gain),
    `peak_memory_mib` (not where a CPU runs compiled code), `loss_gap_percent` (largest difference of a loss),
    `underflow_percent` (of the gradient that suffers most), `activation_percent` (the largest activation, relative to
    the largest number), `skipped_steps`.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "precision_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "precision": "fp32",
            "loss_scale": "auto",
            "loss_weight": 1.0,
            "context": 64,
            "batch_size": 16,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"windows": 128, "report_steps": 12, "compile": False, "backend": "inductor"}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        corpus = _corpus()
        return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        step = _train_step(seed, options, str(options["precision"]))
        return _PrecisionFit(step, options, seed, steps)

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        metrics = {"bits_per_byte": _bits(fit.model, split, options)}
        if int(options["report_steps"]):
            metrics |= _report(seed, options)
        return metrics


class _PrecisionFit:
    """A model trained by a `TrainStep`."""

    def __init__(self, step: TrainStep, options: Options, seed: int, steps: int) -> None:
        self.model = step.model
        self._optimizer = step.optimizer
        self._step = step
        self._options = options
        self._seed = seed
        self._steps = steps

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        self.model.train()
        set_learning_rate(self._optimizer, self._options, index, self._steps)
        loss, record = self._step(_batch(self._options, self._seed, index))
        return {
            "train_loss": float(loss) / float(self._options["loss_weight"]),
            "log2_loss_scale": math.log2(record.scale),
        }

    def state(self) -> dict[str, object]:
        """Model, optimizer and loss scale."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step.state_dict(),
        }

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        self.model.load_state_dict(cast("Mapping[str, Tensor]", state["model"]))
        self._optimizer.load_state_dict(cast("dict[str, object]", state["optimizer"]))
        self._step.load_state_dict(cast("dict[str, object]", state["step"]))

    def optimizer_state(self) -> Iterator[Tensor]:
        """Tensors that the optimizer keeps; step counters are left out."""
        for entries in self._optimizer.state.values():
            for value in cast("dict[str, object]", entries).values():
                if isinstance(value, Tensor) and value.ndim > 0:
                    yield value


def _train_step(seed: int, options: Options, precision: str, compile: bool = False) -> TrainStep:
    """A model seeded by `seed` with its optimizer."""
    if precision not in _PRECISIONS:
        raise TrialError(f"unknown precision {precision!r}; known: {', '.join(_PRECISIONS)}")
    torch.manual_seed(seed)
    model = ByteTransformer(width=int(options["width"]), layers=int(options["layers"]), heads=int(options["heads"]))
    model.to(training_device(options))
    optimizer: Optimizer = make_optimizer(model, options)
    set_learning_rate(optimizer, {**options, "warmup": 0.0}, 0, 1)
    weight = float(options["loss_weight"])

    def loss(model: Any, window: Tensor) -> Tensor:
        logits = model(window[:, :-1]).flatten(0, 1).float()
        return weight * F.cross_entropy(logits, window[:, 1:].flatten())

    return TrainStep(
        model,
        loss,
        optimizer,
        precision=cast("Any", precision),
        loss_scale=_loss_scale(options["loss_scale"]),
        compile={"backend": str(options["backend"])} if compile else False,
    )


@contextmanager
def _fresh_compiler(backend: str) -> Iterator[None]:
    """No graphs of earlier models in dynamo, which counts them against its limit, and an empty cache of code."""
    torch.compiler.reset()
    if backend == "inductor":
        from torch._inductor.utils import fresh_cache

        with fresh_cache():
            yield
    else:
        yield
    torch.compiler.reset()


def _loss_scale(value: Scalar) -> Any:
    if value in ("auto", "dynamic"):
        return value
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise TrialError(f"unknown loss_scale {value!r}; known: auto, none, dynamic, a number") from None


def _report(seed: int, options: Options) -> dict[str, float]:
    precision, compiled = str(options["precision"]), bool(options["compile"])
    mode = precision + "+compile" * compiled
    batches = [_batch(options, seed, index) for index in range(int(options["report_steps"]))]

    def make_step(precision: str, compile: bool) -> TrainStep:
        # The loss scale under test is for the mode, and not for float32 beside it.
        own = precision == options["precision"] and compile == compiled
        return _train_step(seed, options if own else {**options, "loss_scale": "none"}, precision, compile)

    # Times of compilation are those of a first run.
    with _fresh_compiler(str(options["backend"])) if compiled else nullcontext():
        report = precision_report(make_step, batches, modes=(mode,), steps=len(batches)).modes[mode]
    metrics = {
        "step_milliseconds": report.step_seconds * 1e3,
        "speed_up": report.speed_up,
        "first_step_seconds": report.first_step_seconds,
    }
    if mode != "fp32" and math.isfinite(report.break_even):
        metrics["break_even_steps"] = report.break_even
    if report.peak_memory is not None:
        metrics["peak_memory_mib"] = report.peak_memory / 2**20
    return metrics | {
        "loss_gap_percent": 100 * report.loss_difference,
        "underflow_percent": 100 * max(report.underflow.values()),
        "activation_percent": 100 * max(report.activations.values()),
        "skipped_steps": float(report.skipped),
    }


@cache
def _corpus() -> TextCorpus:
    return python_source()


@cache
def _split(name: Literal["train", "validation", "test"]) -> Tensor:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[name]
    return torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)


def _windows(text: Tensor, options: Options, count: int, source: torch.Generator) -> Tensor:
    context = int(options["context"])
    starts = torch.randint(len(text) - context, (count, 1), generator=source)
    return text[starts + torch.arange(context + 1)].long().to(training_device(options))


def _batch(options: Options, seed: int, step: int) -> Tensor:
    return _windows(_split("train"), options, int(options["batch_size"]), generator("batch", seed, step))


@torch.no_grad()
def _bits(model: nn.Module, split: Literal["validation", "test"], options: Options) -> float:
    """Mean loss in bits on fixed windows, the same for every arm and seed."""
    model.eval()
    windows = _windows(_split(split), options, int(options["windows"]), generator("test", int(options["context"])))
    loss = sum(
        float(F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        for part in windows.split(16)
    )
    return loss / (windows.shape[0] * (windows.shape[1] - 1)) / math.log(2)
