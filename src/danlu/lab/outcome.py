"""What a run of a trial ends in: plain data from which the table, the report and `--json` are made."""

from dataclasses import dataclass
from typing import Literal

from danlu.lab.stats import Part, Verdict
from danlu.lab.trial import Scalar

__all__ = ["ArmOutcome", "FitCost", "Outcome", "TuningPoint"]


@dataclass(frozen=True)
class TuningPoint:
    """One point of an arm's grid: what it sets, and its mean score on the validation split."""

    options: dict[str, Scalar]
    score: float


@dataclass(frozen=True)
class FitCost:
    """What one confirming fit cost.

    Args:
        seconds: wall time of the fit's steps.
        peak_memory: bytes of resident memory at its peak, above the level of its process before the first fit; None
            if not measurable.
        optimizer_state: bytes of optimizer state.
        parameters: number of trained parameters.
        shared: whether another arm uses the same fitted weights.
    """

    seconds: float
    peak_memory: int | None
    optimizer_state: int
    parameters: int
    shared: bool


@dataclass(frozen=True)
class ArmOutcome:
    """One arm.

    Args:
        name: the arm's name.
        method: import path of the public object under test, or "".
        chosen: the options that tuning chose, restricted to those that the grid varies.
        options: all options of the confirming fits.
        tuning: the points tried; empty if the arm has only one.
        edge: numeric options whose chosen value lies at the end of its grid, where a better one may lie beyond.
        metrics: test metric -> seed -> value.
        costs: seed -> cost.
        curves: seed -> curve name -> list of (step, value).
    """

    name: str
    method: str
    chosen: dict[str, Scalar]
    options: dict[str, Scalar]
    tuning: tuple[TuningPoint, ...]
    edge: tuple[str, ...]
    metrics: dict[str, dict[int, float]]
    costs: dict[int, FitCost]
    curves: dict[int, dict[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Outcome:
    """A finished run of one trial at one size.

    Args:
        trial: `family/method`.
        size: the budget that was spent.
        seeds: the confirming seeds.
        steps: optimizer steps of every fit.
        verdict: the word.
        parts: the comparisons that decide, in the order of the trial.
        arms: the arms in the order of the trial.
        data: name, content hash, license and split rule of the data.
        environment: versions, hardware, commit, dirty flag.
        command: the command that runs this again.
        finished: UTC time in ISO form.
        published: False if the rows come from a working tree with local changes.
    """

    trial: str
    claim: str
    source: str
    equation: str
    notes: str
    size: str
    seeds: tuple[int, ...]
    steps: int
    verdict: Verdict
    parts: tuple[Part, ...]
    arms: tuple[ArmOutcome, ...]
    data: dict[str, str]
    environment: dict[str, Scalar]
    command: str
    finished: str
    published: bool

    @property
    def family(self) -> str:
        """The family of the method."""
        return self.trial.split("/")[0]

    def arm(self, name: str) -> ArmOutcome:
        """The arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def direction(self, metric: str) -> Literal["lower", "higher"] | None:
        """Which direction of `metric` is better, if a deciding comparison says so (conditions share one direction)."""
        stem = metric.split("@")[0]
        for part in self.parts:
            if part.comparison.metric.split("@")[0] == stem:
                return part.comparison.better
        return None
