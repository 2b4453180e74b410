"""A trial to jobs to rows: tune every arm at equal cost, confirm on other seeds, weigh, remember.

Everything that is stored is reused, so the same command finishes a killed run and repeats a finished one in seconds.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import UTC, datetime
from typing import Literal, cast

from danlu.lab.errors import RunError, TrialError
from danlu.lab.executors.local import LocalExecutor
from danlu.lab.job import THREADS
from danlu.lab.outcome import ArmOutcome, FitCost, Outcome, TuningPoint
from danlu.lab.progress import Listener, Silence
from danlu.lab.provenance import code_version, environment, method_sources
from danlu.lab.stats import verdict, weigh
from danlu.lab.store import FitRow, RunRow, ScoreRow, Store
from danlu.lab.trial import Scalar, Task, Trial, canonical_json, digest, find_trial

__all__ = ["last_outcome", "run_trial"]

# Tuning seeds start here, so that no confirming seed is ever among them.
_FIRST_TUNING_SEED = 1_000_000

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of one fit."""

    key: str
    fit: str
    arm: str
    label: str
    phase: Literal["tune", "confirm"]
    seed: int
    split: Split
    fit_options: dict[str, Scalar]
    options: dict[str, Scalar]


class _Plan:
    """Names fits and evaluations by everything that can change their result."""

    def __init__(self, name: str, trial: Trial, size: str) -> None:
        self.name, self.trial, self.size = name, trial, size
        self.budget = trial.sizes[size]
        self.data = dict(trial.task.data())
        self._identity = {
            "task": _identity(trial.task),
            "data": self.data,
            "code": code_version(),
            "steps": self.budget.steps,
            "threads": THREADS,
        }

    def tuning(self, arm: str, point: Mapping[str, Scalar]) -> list[_Evaluation]:
        """The evaluations that score one point of an arm's grid."""
        varied = self.trial.varied(arm)
        what = " ".join(f"{option}={point[option]}" for option in varied)
        return [
            self._evaluation(arm, f"{what} seed {i}", "tune", _FIRST_TUNING_SEED + i, point)
            for i in range(self.budget.tuning_seeds)
        ]

    def confirming(self, arm: str, seed: int, chosen: Mapping[str, Scalar]) -> _Evaluation:
        """The evaluation of an arm's chosen point on one confirming seed."""
        return self._evaluation(arm, f"seed {seed}", "confirm", seed, chosen)

    def _evaluation(
        self, arm: str, label: str, phase: Literal["tune", "confirm"], seed: int, options: Mapping[str, Scalar]
    ) -> _Evaluation:
        fit_options, evaluate_options = self.trial.split(options)
        fit = digest({**self._identity, "options": fit_options, "seed": seed})
        split: Split = "validation" if phase == "tune" else "test"
        key = digest({"fit": fit, "split": split, "options": evaluate_options})
        return _Evaluation(key, fit, arm, label, phase, seed, split, fit_options, evaluate_options)

    def key(self, seeds: Sequence[int]) -> str:
        declaration = {
            "arms": {name: asdict(arm) for name, arm in self.trial.arms.items()},
            "decides": [asdict(part) for part in self.trial.decides],
            "selects": list(self.trial.selects),
            "budget": asdict(self.budget),
        }
        return digest({**self._identity, **declaration, "trial": self.name, "size": self.size, "seeds": list(seeds)})


def _identity(task: Task) -> dict[str, object]:
    fields = asdict(task) if is_dataclass(task) and not isinstance(task, type) else {}
    return {"type": f"{type(task).__module__}.{type(task).__qualname__}", "name": task.name, **fields}


def run_trial(
    name: str,
    *,
    size: str = "demo",
    seeds: int | None = None,
    store: Store,
    executor: LocalExecutor | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Run a trial, or what is left of it, and return its outcome.

    Args:
        name: `family/method`, `method`, or the path of a trial file.
        size: "ci", "demo", "report" or "gpu".
        seeds: number of confirming seeds, at least 3; None takes the size's own.
        store: where rows and weights are kept.
        executor: runs the fits; None runs them in this process. The result does not depend on it.
        listener: told of the progress.

    Raises:
        TrialError: no such trial or size, or a bad number of seeds.
        RunError: a fit failed or a worker died.
        StoreError: the store cannot be used.
    """
    full, trial = find_trial(name)
    if size not in trial.sizes:
        raise TrialError(f"trial {full} has no size {size!r}; it has {', '.join(trial.sizes)}")
    if seeds is not None:
        # `Trial` checks the number.
        trial = replace(trial, sizes={**trial.sizes, size: replace(trial.sizes[size], seeds=seeds)})
    listener, executor = listener or Silence(), executor or LocalExecutor(0)
    plan = _Plan(full, trial, size)
    started = _now()
    reference = name if name.endswith(".py") else full

    grids = {arm: trial.points(arm, size) for arm in trial.arms}
    tuning = [
        one for arm, points in grids.items() if len(points) > 1 for point in points for one in plan.tuning(arm, point)
    ]
    _execute(plan, reference, tuning, f"{full}: tune", executor, store, listener)
    scores = store.scores({one.key for one in tuning})
    chosen = {arm: _choose(plan, arm, points, scores) for arm, points in grids.items()}

    seed_list = range(plan.budget.seeds)
    confirming = [plan.confirming(arm, seed, chosen[arm]) for seed in seed_list for arm in trial.arms]
    _execute(plan, reference, confirming, f"{full}: confirm", executor, store, listener)

    command = f"danlu run {reference} --size {size}" + (f" --seeds {seeds}" if seeds is not None else "")
    row = RunRow(
        id=plan.key(seed_list),
        trial=full,
        size=size,
        plan=plan.key(seed_list),
        status="complete",
        verdict=None,
        command=command,
        environment=dict(environment()),
        started=started,
        finished=_now(),
        scores=tuple(sorted({(one.arm, one.phase, one.seed, one.key) for one in [*tuning, *confirming]})),
    )
    outcome = _outcome(trial, row, store)
    store.add_run(replace(row, verdict=outcome.verdict), method_sources(trial))
    return outcome


def last_outcome(name: str, store: Store, size: str | None = None) -> Outcome | None:
    """The outcome of the newest stored run of a trial, of any size or of one; None if there is none.

    The rows speak for the code that made them: the report shows its commit.
    """
    full, trial = find_trial(name)
    needed = {arm for part in trial.decides for arm in (part.candidate, part.baseline)}
    for row in store.runs(full):
        # A run of an earlier declaration with other arms cannot answer for this one.
        if (size is None or row.size == size) and needed <= {arm for arm, *_ in row.scores}:
            return _outcome(trial, row, store)
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _execute(
    plan: _Plan,
    reference: str,
    evaluations: Sequence[_Evaluation],
    title: str,
    executor: LocalExecutor,
    store: Store,
    listener: Listener,
) -> None:
    """Do what the store does not hold yet: one job per fit, with all evaluations of that fit."""
    stored = store.scores({one.key for one in evaluations})
    missing = [one for one in evaluations if one.key not in stored]
    by_fit: dict[str, dict[str, _Evaluation]] = {}
    owners: dict[str, list[_Evaluation]] = {}
    for one in missing:
        by_fit.setdefault(one.fit, {})[one.key] = one
        owners.setdefault(one.fit, []).append(one)
    groups = list(by_fit.items())
    labels = [_label(owners[fit]) for fit, _ in groups]
    if not evaluations:
        return
    listener.phase(title, labels, plan.budget.steps, len({one.key for one in evaluations}) - _count(groups))
    if not groups:
        return
    jobs = [_job(plan, reference, store, fit, list(group.values())) for fit, group in groups]

    def on_result(index: int, text: str) -> None:
        result = json.loads(text)
        if "error" in result:
            raise RunError(f"{labels[index]} failed: {result['error']}")
        fit, group = groups[index]
        row = _fit_row(plan, fit, next(iter(group.values())), result)
        store.add_fit(row, [_score_row(one, result["metrics"][one.key]) for one in group.values()])
        listener.done(labels[index], row.seconds)

    executor.run(
        jobs,
        on_step=lambda index, step, loss: listener.step(labels[index], step, loss),
        on_result=on_result,
    )


def _count(groups: Iterable[tuple[str, dict[str, _Evaluation]]]) -> int:
    return sum(len(group) for _, group in groups)


def _label(owners: Sequence[_Evaluation]) -> str:
    """Arms of one fit and what tells it from the others; arms that only read the same weights share a label."""
    arms = "+".join(dict.fromkeys(one.arm for one in owners))
    what = list(dict.fromkeys(one.label for one in owners))
    return f"{arms} {what[0]}" if len(what) == 1 else f"{arms} seed {what[0].rsplit(' ', 1)[1]}"


def _job(plan: _Plan, reference: str, store: Store, fit: str, evaluations: Sequence[_Evaluation]) -> str:
    first = evaluations[0]
    return canonical_json(
        {
            "trial": reference,
            "seed": first.seed,
            "steps": plan.budget.steps,
            "checkpoint_every": plan.budget.checkpoint_every,
            "options": first.fit_options,
            "weights": str(store.weights(fit).absolute()),
            "partial": str(store.partial(fit).absolute()),
            "evaluations": [{"key": one.key, "split": one.split, "options": one.options} for one in evaluations],
        }
    )


def _fit_row(plan: _Plan, fit: str, one: _Evaluation, result: Mapping[str, object]) -> FitRow:
    curves = cast("dict[str, list[tuple[int, float]]]", result["curves"])
    return FitRow(
        key=fit,
        task=plan.trial.task.name,
        options=one.fit_options,
        seed=one.seed,
        steps=plan.budget.steps,
        data=plan.data,
        code=code_version(),
        threads=THREADS,
        parameters=cast("int", result["parameters"]),
        optimizer_state=cast("int", result["optimizer_state"]),
        seconds=cast("float", result["seconds"]),
        peak_memory=cast("int | None", result["peak_memory"]),
        environment=dict(environment()),
        finished=_now(),
        curves={name: [(step, value) for step, value in points] for name, points in curves.items()},
    )


def _score_row(one: _Evaluation, metrics: dict[str, float]) -> ScoreRow:
    return ScoreRow(one.key, one.fit, one.split, one.seed, one.options, metrics)


def _choose(
    plan: _Plan, arm: str, points: Sequence[dict[str, Scalar]], scores: Mapping[str, ScoreRow]
) -> dict[str, Scalar]:
    """The point with the best mean score over the tuning seeds; the first one of equals."""
    if len(points) == 1:
        return points[0]
    means = [_tuning_score(plan, arm, point, scores) for point in points]
    worst = math.inf if plan.trial.selects[1] == "lower" else -math.inf
    sign = 1.0 if plan.trial.selects[1] == "lower" else -1.0
    return min(zip(points, means, strict=True), key=lambda pair: sign * (worst if math.isnan(pair[1]) else pair[1]))[0]


def _tuning_score(plan: _Plan, arm: str, point: Mapping[str, Scalar], scores: Mapping[str, ScoreRow]) -> float:
    metric = plan.trial.selects[0]
    keys = [one.key for one in plan.tuning(arm, point)]
    return sum(scores[key].metrics[metric] for key in keys) / len(keys)


def _outcome(trial: Trial, row: RunRow, store: Store) -> Outcome:
    """Assemble the outcome of a run from stored rows alone."""
    scores = store.scores({key for *_, key in row.scores})
    fits = store.fits({score.fit for score in scores.values()})
    confirming = [(arm, seed, scores[key]) for arm, phase, seed, key in row.scores if phase == "confirm"]
    seeds = sorted({seed for _, seed, _ in confirming})
    users: dict[str, set[str]] = {}
    for arm, _, score in confirming:
        users.setdefault(score.fit, set()).add(arm)
    names = [name for name in trial.arms if any(arm == name for arm, *_ in confirming)]
    arms = tuple(_arm_outcome(trial, row, name, scores, fits, users) for name in names)
    by_name = {arm.name: arm for arm in arms}
    parts = tuple(
        weigh(
            part,
            [by_name[part.candidate].metrics[part.metric][seed] for seed in seeds],
            [by_name[part.baseline].metrics[part.metric][seed] for seed in seeds],
        )
        for part in trial.decides
    )
    used = [fits[score.fit] for _, _, score in confirming]
    return Outcome(
        trial=row.trial,
        claim=trial.claim,
        source=trial.source,
        equation=trial.equation,
        notes=trial.notes,
        size=row.size,
        seeds=tuple(seeds),
        steps=used[0].steps,
        verdict=verdict(parts),
        parts=parts,
        arms=arms,
        data=used[0].data,
        environment=row.environment,
        command=row.command,
        finished=row.finished or "",
        # Keys hold the hash of the code, so rows that a clean tree found again are rows of the clean tree.
        published=not row.environment.get("dirty", True),
    )


def _arm_outcome(
    trial: Trial,
    row: RunRow,
    name: str,
    scores: Mapping[str, ScoreRow],
    fits: Mapping[str, FitRow],
    users: Mapping[str, set[str]],
) -> ArmOutcome:
    mine = {
        phase: [(seed, scores[key]) for arm, which, seed, key in row.scores if arm == name and which == phase]
        for phase in ("tune", "confirm")
    }
    confirmed = mine["confirm"]
    options = {**fits[confirmed[0][1].fit].options, **confirmed[0][1].options}
    varied = trial.varied(name)
    tried: dict[str, list[float]] = {}
    for _, score in mine["tune"]:
        point = {**fits[score.fit].options, **score.options}
        key = canonical_json({option: point[option] for option in varied})
        tried.setdefault(key, []).append(score.metrics.get(trial.selects[0], math.nan))
    # In the order of the grid, which the rows do not keep.
    grid = [canonical_json({option: point[option] for option in varied}) for point in trial.points(name, row.size)]
    tuning = tuple(
        TuningPoint(json.loads(key), sum(tried[key]) / len(tried[key]))
        for key in dict.fromkeys([*grid, *tried])
        if key in tried
    )
    metrics: dict[str, dict[int, float]] = {}
    for seed, score in confirmed:
        for metric, value in score.metrics.items():
            metrics.setdefault(metric, {})[seed] = value
    chosen = {option: options[option] for option in varied}
    return ArmOutcome(
        name=name,
        method=trial.arms[name].method,
        chosen=chosen,
        options=options,
        tuning=tuning,
        edge=_edge(chosen, tuning),
        metrics=metrics,
        costs={
            seed: FitCost(
                seconds=fits[score.fit].seconds,
                peak_memory=fits[score.fit].peak_memory,
                optimizer_state=fits[score.fit].optimizer_state,
                parameters=fits[score.fit].parameters,
                shared=len(users[score.fit]) > 1,
            )
            for seed, score in confirmed
        },
        curves={seed: fits[score.fit].curves for seed, score in confirmed},
    )


def _edge(chosen: Mapping[str, Scalar], tuning: Sequence[TuningPoint]) -> tuple[str, ...]:
    """Numeric options whose chosen value is the smallest or the largest that was tried, of at least two."""
    found: list[str] = []
    for option, value in chosen.items():
        tried = {point.options[option] for point in tuning if option in point.options}
        if isinstance(value, bool | str) or len(tried) < 2:
            continue
        numbers = [float(one) for one in tried if not isinstance(one, bool | str)]
        if float(value) in (min(numbers), max(numbers)):
            found.append(option)
    return tuple(found)
