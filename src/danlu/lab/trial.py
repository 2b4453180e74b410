"""What a trial is: plain frozen data, one file per trial under `danlu/lab/trials/<family>/<method>.py`.

A trial file defines one `Trial` named `TRIAL`. Its name on the command line is `<family>/<method>`, or `<method>`
alone while that is unique.
"""

import difflib
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from torch import Tensor, nn

from danlu.lab.errors import TrialError

__all__ = [
    "Arm",
    "Budget",
    "Comparison",
    "Fit",
    "Options",
    "Scalar",
    "Task",
    "Trial",
    "canonical_json",
    "digest",
    "find_trial",
    "trial_names",
]

Scalar = bool | int | float | str
Options = Mapping[str, Scalar]
Size = Literal["ci", "demo", "report", "gpu"]
SIZES: tuple[Size, ...] = ("ci", "demo", "report", "gpu")

# The fewest confirming seeds for which a paired t interval says anything.
_MIN_SEEDS = 3


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def digest(value: object) -> str:
    """The first 20 hexadecimal digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]


class Fit(Protocol):
    """One training run in progress. Its state must be complete: a restored fit goes on bit for bit."""

    model: nn.Module

    def step(self, index: int) -> Mapping[str, float]:
        """Do optimizer step `index` (from 0) and return points of the learning curves, at least `train_loss`."""
        ...

    def state(self) -> dict[str, object]:
        """Everything that `step` changes, as nested dicts, lists and tuples of tensors, numbers and strings."""
        ...

    def load(self, state: dict[str, object]) -> None:
        """Restore what `state` returned."""
        ...

    def optimizer_state(self) -> Iterator[Tensor]:
        """The optimizer's state tensors, for the account of memory."""
        ...


class Task(Protocol):
    """Data, model and loop. A task is a frozen dataclass, so that its fields are its identity."""

    @property
    def name(self) -> str:
        """Short name for tables."""
        ...

    @property
    def fit_options(self) -> Options:
        """Every option of `start` with its default."""
        ...

    @property
    def evaluate_options(self) -> Options:
        """Every option of `evaluate` with its default; the names differ from those of `fit_options`."""
        ...

    def data(self) -> Mapping[str, str]:
        """Name, content hash, license and split rule of the data."""
        ...

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit; all randomness comes from `seed`."""
        ...

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics of a finished fit on one split, given all options; keys are `metric` or `metric@condition`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One competitor.

    Args:
        options: options of the task, for the fit and for the evaluation alike (a task's option names are unique).
        grid: the points that tuning tries, each laid over `options`. All arms of a trial have grids that cost the
            same number of fits, so an arm with extra knobs gets no extra tries.
        method: import path of the public object under test, for provenance and the report.
    """

    options: Options = field(default_factory=dict)
    grid: tuple[Options, ...] = field(default_factory=lambda: (dict[str, Scalar](),))
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    r"""One part of a claim: `candidate` is better than `baseline` in `metric`, by more than `-margin`.

    With `margin` 0 the part says "better"; a positive margin says "not worse by more than this".
    """

    candidate: str
    baseline: str
    metric: str
    better: Literal["lower", "higher"]
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much one size of a trial spends. It is the same for every arm.

    Args:
        steps: optimizer steps of every fit.
        seeds: confirming seeds 0, 1, ...; at least 3.
        tuning_seeds: seeds of the tuning fits; they are never confirming seeds.
        options: options of the task at this size (width, context, ...), for all arms.
        grid: how many points of each arm's grid are tried; None means all.
        checkpoint_every: steps between two checkpoints of a fit.
    """

    steps: int
    seeds: int = 5
    tuning_seeds: int = 1
    options: Options = field(default_factory=dict)
    grid: int | None = None
    checkpoint_every: int = 100


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A claim about a method and everything needed to test it.

    Args:
        claim: the sentence under test.
        source: where the sentence comes from.
        task: data, model and loop.
        arms: the competitors by name; a baseline arm is named after the method that it is.
        decides: the parts of the claim; the verdict follows from these comparisons and from nothing else.
        selects: metric on the validation split by which tuning chooses, with its direction.
        sizes: budgets by size.
        equation: LaTeX of the method, for the report.
        notes: what a reader of the verdict must know.
    """

    claim: str
    source: str
    task: Task
    arms: Mapping[str, Arm]
    decides: tuple[Comparison, ...]
    selects: tuple[str, Literal["lower", "higher"]]
    sizes: Mapping[str, Budget]
    equation: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        """Refuse a declaration that contradicts itself."""
        if not self.decides:
            raise TrialError("a trial needs at least one comparison that decides")
        for part in self.decides:
            for arm in (part.candidate, part.baseline):
                if arm not in self.arms:
                    raise TrialError(f"unknown arm {arm!r} in a comparison{_nearest(arm, self.arms)}")
        known = {**self.task.fit_options, **self.task.evaluate_options}
        if len(known) != len(self.task.fit_options) + len(self.task.evaluate_options):
            raise TrialError(f"task {self.task.name!r} uses one name for a fit option and an evaluation option")
        named = {f"arm {name!r}": [arm.options, *arm.grid] for name, arm in self.arms.items()}
        named |= {f"size {name!r}": [budget.options] for name, budget in self.sizes.items()}
        for owner, several in named.items():
            for options in several:
                for option in options:
                    if option not in known:
                        hint = _nearest(option, known)
                        raise TrialError(f"{owner} sets {option!r}, which task {self.task.name!r} lacks{hint}")
        for name, budget in self.sizes.items():
            if name not in SIZES:
                raise TrialError(f"unknown size {name!r}{_nearest(name, SIZES)}")
            if budget.seeds < _MIN_SEEDS:
                raise TrialError(
                    f"size {name!r} has {budget.seeds} seeds; a paired interval needs at least {_MIN_SEEDS}"
                )
            counts = {arm: len(self.tuning_fits(arm, name)) for arm in self.arms}
            if len(set(counts.values())) > 1:
                raise TrialError(f"size {name!r} gives the arms unequal numbers of tuning fits: {counts}")

    def points(self, arm: str, size: str) -> tuple[dict[str, Scalar], ...]:
        """The full option sets that tuning tries for `arm` at `size`."""
        budget, one = self.sizes[size], self.arms[arm]
        defaults = {**self.task.fit_options, **self.task.evaluate_options}
        return tuple({**defaults, **budget.options, **one.options, **point} for point in one.grid[: budget.grid])

    def varied(self, arm: str) -> list[str]:
        """The options that the arm's grid varies, in the order of their first appearance."""
        return list(dict.fromkeys(option for point in self.arms[arm].grid for option in point))

    def tuning_fits(self, arm: str, size: str) -> set[str]:
        """The distinct fits, by their options, that tuning costs `arm`."""
        return {canonical_json(self.split(point)[0]) for point in self.points(arm, size)}

    def split(self, options: Options) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Divide options into those of the fit and those of the evaluation."""
        fit = {name: value for name, value in options.items() if name in self.task.fit_options}
        evaluate = {name: value for name, value in options.items() if name in self.task.evaluate_options}
        return fit, evaluate


def _nearest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def trial_names() -> list[str]:
    """All trials as `family/method`, found as files; nothing is imported."""
    folder = Path(__file__).parent / "trials"
    files = folder.glob("*/*.py")
    return sorted(f"{file.parent.name}/{file.stem}" for file in files if not file.stem.startswith("_"))


def full_name(name: str) -> str:
    """`family/method` of a trial given by that or by `method` alone; raise `TrialError` with the nearest name."""
    names = trial_names()
    if name in names:
        return name
    matches = [full for full in names if full.split("/")[1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise TrialError(f"trial {name!r} is not unique: {', '.join(matches)}")
    short = {full.split("/")[1]: full for full in names}
    close = difflib.get_close_matches(name, [*short, *names], n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known trials: {', '.join(names)}"
    raise TrialError(f"there is no trial {name!r}; {hint}")


def find_trial(name: str) -> tuple[str, Trial]:
    """The full name and the trial called `name`, which may also be the path of a file that defines `TRIAL`.

    Raises:
        TrialError: there is no such trial (the message suggests the nearest name), or its file is not usable.
    """
    if name.endswith(".py"):
        return f"local/{Path(name).stem}", _trial_of(_load_file(Path(name)), name)
    full = full_name(name)
    return full, _trial_of(importlib.import_module(f"danlu.lab.trials.{full.replace('/', '.')}"), full)


def _load_file(path: Path) -> ModuleType:
    name = f"danlu_local_trial_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TrialError(f"cannot read the trial file {path}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except TrialError:
        raise
    except Exception as error:
        raise TrialError(f"the trial file {path} fails: {type(error).__name__}: {error}") from error
    return module


def _trial_of(module: ModuleType, name: str) -> Trial:
    trial = getattr(module, "TRIAL", None)
    if not isinstance(trial, Trial):
        raise TrialError(f"{name} does not define a Trial named TRIAL")
    return trial
