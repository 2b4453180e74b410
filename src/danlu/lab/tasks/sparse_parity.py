"""Families of small networks on multitask sparse parity: how the loss falls with steps, parameters and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.diagnostics import (
    MultitaskSparseParity,
    PowerLawFit,
    QuantaModel,
    check_quanta_relation,
    fit_power_law,
    learning_times,
)
from danlu.lab.errors import TrialError
from danlu.lab.tasks.family import FamilyFit, Member, record_steps
from danlu.lab.tasks.training import generator, training_device
from danlu.lab.trial import Fit, Options, Scalar

__all__ = ["ParityNet", "SparseParityScaling", "SparseParitySteps"]

_OPTIONS: Mapping[str, Scalar] = {
    "tasks": 200,
    "bits": 32,
    "k": 2,
    "batch_size": 2048,
    "lr": 2e-3,
    "records": 40,
    "samples_per_task": 64,
    "device": "cpu",
}
# As many points give an exponent.
_FEWEST = 4


class ParityNet(nn.Module):
    """One hidden ReLU layer on the bits and the task; the embedding is the layer's part for a one-hot task code.

    Args:
        tasks: number of tasks.
        bits: number of bits.
        width: of the hidden layer.
    """

    def __init__(self, tasks: int, bits: int, width: int) -> None:
        super().__init__()
        self.task = nn.Embedding(tasks, width)
        self.bits = nn.Linear(bits, width)
        self.out = nn.Linear(width, 1)
        # As large as the weights of a linear layer on one-hot codes and bits together.
        nn.init.uniform_(self.task.weight, -((tasks + bits) ** -0.5), (tasks + bits) ** -0.5)

    def forward(self, task: Tensor, bits: Tensor) -> Tensor:
        """Logits of label 1, `(S,)`, of task ids `(S,)` and bits `(S, bits)`."""
        return self.out(F.relu(self.task(task) + self.bits(bits.to(self.out.weight.dtype))))[:, 0]


@dataclass(frozen=True)
class SparseParitySteps:
    r"""The loss of networks trained on fresh samples, one network for each $\gamma$ in `gammas`.

    Measured: the slope of log mean loss over log steps, from the step at which the most frequent task is learned to
    the last. `law` says what answers for it: "measured" itself; "quanta", $\gamma/(\gamma+1)$; "quanta_q",
    $\gamma/(q(\gamma+1))$ with $q$ from the learning times of this network; "staircase", the slope of the staircase
    of all tasks at the learning times that $t_k = c\,p_k^{-q}$ gives them; "same_for_all", the mean of the measured
    slopes.

    Metrics: `exponent@g` by the law and `relative_error@g` to the measured slope for each $\gamma$ = g;
    `relative_error`, their mean; `smallest_increase` of the exponent from one $\gamma$ to the next; `q@g` and
    `learned@g` (tasks learned) of the network; `test_loss`, mean.
    """

    gammas: tuple[float, ...] = (0.3, 0.6, 1.0)

    @property
    def name(self) -> str:
        """Name for tables."""
        return "sparse_parity_steps"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {**_OPTIONS, "width": 256}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"law": "measured"}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return _data()

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        sets = [_data_set(options, gamma, seed) for gamma in self.gammas]
        torch.manual_seed(seed)
        members = []
        for data in sets:
            model = ParityNet(data.n_tasks, data.n_bits, int(options["width"])).to(device)
            members.append(_member(model, _fresh(data, model, options), options))
        return FamilyFit(
            members,
            records=record_steps(steps, int(options["records"]), first=max(1, min(10, steps // 10))),
            record=lambda model, i: (
                sets[i].evaluate(_on(device, model), samples_per_task=int(options["samples_per_task"])).loss
            ),
        )

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics. Samples are fresh, so there is but one split."""
        family, law = _family(fit), str(options["law"])
        steps = torch.tensor(family.records, dtype=torch.float64)
        measured: list[float] = []
        laws: dict[str, list[float]] = {"quanta": [], "quanta_q": [], "staircase": []}
        metrics: dict[str, float] = {}
        losses: list[float] = []
        for i, gamma in enumerate(self.gammas):
            frequency = _data_set(options, gamma, seed).probabilities
            curves = family.recorded(i)
            times = learning_times(steps, curves)
            scale, q = _learning_law(frequency, times)
            first = float(times[0]) if bool(times[0].isfinite()) else 0.0
            measured.append(_slope(steps, curves @ frequency, first))
            exponents = QuantaModel(gamma).exponents
            laws["quanta"].append(exponents().steps)
            laws["quanta_q"].append(exponents(q).steps)
            expected = scale * frequency.pow(-q)
            stairs = ((expected > steps[:, None]) * frequency).sum(1)
            laws["staircase"].append(_slope(steps, stairs, float(expected[0])))
            metrics[f"q@{gamma:g}"] = q
            metrics[f"learned@{gamma:g}"] = float(times.isfinite().sum())
            losses.append(float(curves[-1] @ frequency))
        laws |= {"measured": measured, "same_for_all": [sum(measured) / len(measured)] * len(measured)}
        if law not in laws:
            raise TrialError(f"unknown law {law!r}; known: {', '.join(sorted(laws))}")
        errors = [abs(a / b - 1) for a, b in zip(laws[law], measured, strict=True)]
        for gamma, exponent, error in zip(self.gammas, laws[law], errors, strict=True):
            metrics |= {f"exponent@{gamma:g}": exponent, f"relative_error@{gamma:g}": error}
        steps_up = [b - a for a, b in zip(laws[law], laws[law][1:], strict=False)]
        return metrics | {
            "relative_error": sum(errors) / len(errors),
            "smallest_increase": min(steps_up),
            "test_loss": sum(losses) / len(losses),
        }


@dataclass(frozen=True)
class SparseParityScaling:
    r"""Networks of several widths on fresh samples, and the widest on training sets of several sizes.

    The loss of a network is the lowest of its recorded mean losses (early stopping), of which half of the samples
    choose the step and the other half are the loss. Both curves are fitted by $E + A x^{-\alpha}$: what remains at
    infinite width is what the steps did not suffice for.

    `law` says what answers for $\alpha_D$: "measured" itself; "quanta", $\alpha_N/(1+\alpha_N)$; "equal", $\alpha_N$.

    Metrics: `exponent` of the data by the law, `error` (absolute) to the measured one; `alpha_params`, `alpha_data`;
    `half_width_params`, `half_width_data` of their 95 % intervals, relative; `consistent` (1 or 0), whether the
    interval of $\alpha_D - \alpha_N/(1+\alpha_N)$ holds 0, and `excludes_equality`, whether that of
    $\alpha_D - \alpha_N$ does not; `loss@width_w` and `loss@samples_D`, every point, and `test_loss`, their mean.
    """

    widths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    samples: tuple[int, ...] = (2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000)
    gamma: float = 0.6

    @property
    def name(self) -> str:
        """Name for tables."""
        return "sparse_parity_scaling"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {**_OPTIONS, "sizes": len(self.widths)}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"law": "measured"}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        return _data()

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        data = _data_set(options, self.gamma, seed)
        widths, samples = self._sizes(options)
        torch.manual_seed(seed)
        members = []
        for width in widths:
            model = ParityNet(data.n_tasks, data.n_bits, width).to(device)
            members.append(_member(model, _fresh(data, model, options), options))
        for count in samples:
            model = ParityNet(data.n_tasks, data.n_bits, max(widths)).to(device)
            members.append(_member(model, _pool(data, model, count, seed, options), options))
        chunk = int(options["samples_per_task"])

        def record(model: nn.Module, index: int) -> Tensor:
            scores = [
                data.evaluate(_on(device, model), samples_per_task=chunk, generator=generator("held out", seed, half))
                for half in ("validation", "test")
            ]
            return torch.tensor([score.mean_loss for score in scores], dtype=torch.float64)

        return FamilyFit(members, records=record_steps(steps, int(options["records"])), record=record)

    def _sizes(self, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
        count = int(options["sizes"])
        return self.widths[:count], self.samples[:count]

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics."""
        family, law = _family(fit), str(options["law"])
        widths, samples = self._sizes(options)
        losses: list[float] = []
        for i in range(len(family.members)):
            chosen, tested = family.recorded(i).unbind(1)
            losses.append(float(tested[chosen.argmin()]))
        params = [float(sum(p.numel() for p in member.model.parameters())) for member in family.members[: len(widths)]]
        by_params = fit_power_law(params, losses[: len(widths)], seed=seed)
        by_data = fit_power_law(list(map(float, samples)), losses[len(widths) :], seed=seed)
        relation = check_quanta_relation(by_params, by_data)
        laws = {"measured": relation.alpha_data, "quanta": relation.predicted, "equal": relation.alpha_params}
        if law not in laws:
            raise TrialError(f"unknown law {law!r}; known: {', '.join(sorted(laws))}")
        metrics = {
            "exponent": laws[law],
            "error": abs(laws[law] - relation.alpha_data),
            "alpha_params": relation.alpha_params,
            "alpha_data": relation.alpha_data,
            "half_width_params": _half_width(by_params),
            "half_width_data": _half_width(by_data),
            "consistent": float(relation.consistent),
            "excludes_equality": float(relation.excludes_equality),
            "test_loss": sum(losses) / len(losses),
        }
        names = [f"loss@width_{width}" for width in widths] + [f"loss@samples_{count}" for count in samples]
        return metrics | dict(zip(names, losses, strict=True))


def _data() -> Mapping[str, str]:
    return {
        "name": "multitask sparse parity",
        "sha256": "generated",
        "license": "none needed",
        "split": "fresh samples; the tasks' sets of bits are drawn anew for every seed",
    }


def _data_set(options: Options, gamma: float, seed: int) -> MultitaskSparseParity:
    return MultitaskSparseParity(int(options["tasks"]), int(options["bits"]), int(options["k"]), gamma, seed=seed)


def _family(fit: Fit) -> FamilyFit:
    if not isinstance(fit, FamilyFit):
        raise TypeError(f"expected a FamilyFit, got {type(fit).__name__}")
    return fit


def _member(model: nn.Module, loss: "_Loss", options: Options) -> Member:
    # One call for all tensors: the networks are so small that the calls are what Adam costs.
    return Member(model, torch.optim.Adam(model.parameters(), lr=float(options["lr"]), foreach=True), loss)


def _on(device: torch.device, model: nn.Module) -> "_Predict":
    return _Predict(device, model)


@dataclass(frozen=True, eq=False)
class _Predict:
    """A model on another device than its samples."""

    device: torch.device
    model: nn.Module

    def __call__(self, task: Tensor, bits: Tensor) -> Tensor:
        """Logits."""
        return self.model(task.to(self.device), bits.to(self.device))


@dataclass(frozen=True, eq=False)
class _Loss:
    """Binary cross entropy on the samples that `draw` gives for a step."""

    model: nn.Module
    data: MultitaskSparseParity
    batch_size: int
    device: torch.device
    pool: tuple[Tensor, Tensor, Tensor] | None
    seed: int

    def __call__(self, step: int) -> Tensor:
        """Loss of the batch of a step."""
        if self.pool is None:
            task, bits, label = next(self.data.batches(self.batch_size, start=step))
        else:
            count = len(self.pool[0])
            rows = torch.randint(count, (self.batch_size,), generator=generator("rows", self.seed, count, step))
            task, bits, label = (column[rows] for column in self.pool)
        logits = self.model(task.to(self.device), bits.to(self.device))
        return F.binary_cross_entropy_with_logits(logits, label.to(logits))


def _fresh(data: MultitaskSparseParity, model: nn.Module, options: Options) -> _Loss:
    return _Loss(model, data, int(options["batch_size"]), training_device(options), None, 0)


def _pool(data: MultitaskSparseParity, model: nn.Module, count: int, seed: int, options: Options) -> _Loss:
    pool = data.sample(count, generator=generator("pool", seed, count))
    return _Loss(model, data, int(options["batch_size"]), training_device(options), pool, seed)


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Height at 1 and exponent of the least-squares line of log y over log x.

    Not the robust fit: on a staircase that would follow one step and ignore the others.
    """
    log_x, log_y = x.log(), y.clamp(min=1e-12).log()
    centered = log_x - log_x.mean()
    exponent = (centered * log_y).sum() / centered.square().sum()
    return float((log_y.mean() - exponent * log_x.mean()).exp()), float(exponent)


def _slope(steps: Tensor, losses: Tensor, first: float) -> float:
    """Exponent of the fall of the losses from step `first` on (at least the last four records)."""
    count = max(_FEWEST, int((steps >= first).sum()))
    return -_line(steps[-count:], losses[-count:])[1]


def _learning_law(frequency: Tensor, times: Tensor) -> tuple[float, float]:
    r"""$A$ and $q$ of $t_k = A\,p_k^{-q}$, fitted to the learned tasks before the first that is not.

    Those after it were lucky: with them $q$ would be too small. With fewer than four, the theory's $q = 1$ stands.
    """
    missed = torch.nonzero(~times.isfinite())
    count = int(missed[0]) if len(missed) else len(times)
    if count < _FEWEST:
        return float(times[0] * frequency[0]) if count else 1.0, 1.0
    return _line(1 / frequency[:count], times[:count])


def _half_width(fit: PowerLawFit) -> float:
    low, high = fit.intervals["alpha"]
    return (high - low) / 2 / abs(fit.alpha)
