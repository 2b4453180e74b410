"""The command line: `danlu list | run | report | show`.

What is run belongs into the trial, so the options are few, and a test keeps them so. Tables go to standard output,
progress and errors to standard error. Exit codes: 0 done, 1 a run or the store failed, 2 a wrong request, 130 stopped
by the user.
"""

import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from danlu.lab.errors import LabError, MissingExtraError, TrialError
from danlu.lab.executors.local import LocalExecutor
from danlu.lab.outcome import Outcome
from danlu.lab.progress import LiveProgress, PlainProgress
from danlu.lab.runner import last_outcome, run_trial
from danlu.lab.store import Store, default_folder
from danlu.lab.trial import find_trial, trial_names

__all__ = ["app", "main"]

app = typer.Typer(
    name="danlu",
    help="Training methods, tried: a baseline against a method at equal budget, over paired seeds, with a verdict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class _Size(StrEnum):
    CI = "ci"
    DEMO = "demo"
    REPORT = "report"
    GPU = "gpu"


_StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of stored runs [default: $DANLU_STORE or danlu-runs].")
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"danlu {importlib.metadata.version('danlu')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Training methods, tried on real data."""


@app.command("list")
def list_trials(store: _StoreOption = None, as_json: _JsonOption = False) -> None:
    """Every trial: its claim, its family and its last verdict."""
    rows: list[dict[str, str | None]] = []
    with Store(store or default_folder(), read_only=True) as opened:
        runs = opened.runs()
    for name in trial_names():
        _, trial = find_trial(name)
        last = next((run for run in runs if run.trial == name), None)
        rows.append(
            {
                "trial": name,
                "family": name.split("/")[0],
                "claim": trial.claim,
                "verdict": last.verdict if last else None,
                "size": last.size if last else None,
                "finished": last.finished if last else None,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold")
    table.add_column("trial", no_wrap=True)
    table.add_column("claim", ratio=1)
    table.add_column("last verdict")
    for row in rows:
        verdict = f"{row['verdict']} ({row['size']})" if row["verdict"] else "not run yet"
        table.add_row(row["trial"], row["claim"], verdict)
    Console().print(table)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Trials, by name or as a file.")],
    size: Annotated[_Size, typer.Option(help="How much to spend.")] = _Size.DEMO,
    seeds: Annotated[int | None, typer.Option(help="Confirming seeds, at least 3 [default: the size's own].")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes [default: the number of cores].")] = None,
    store: _StoreOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Run trials, or what is left of them, print the verdicts and write the report."""
    if workers is not None and workers < 1:
        raise TrialError(f"--workers must be at least 1, got {workers}")
    # A misspelt name is said before any work is done.
    for name in names:
        find_trial(name)
    progress = Console(stderr=True)
    outcomes: list[Outcome] = []
    try:
        with Store(store or default_folder()) as opened, LocalExecutor(workers or os.cpu_count() or 1) as executor:
            listener = LiveProgress(progress) if progress.is_terminal else PlainProgress(progress)
            with listener.show() if isinstance(listener, LiveProgress) else nullcontext():
                outcomes += [
                    run_trial(
                        name,
                        size=size.value,
                        seeds=seeds,
                        store=opened,
                        executor=executor,
                        listener=listener,
                    )
                    for name in names
                ]
            report = _write_report(opened, opened.folder / "report", outcomes)
    except KeyboardInterrupt:
        sys.stderr.write("danlu: stopped; the same command goes on from here\n")
        raise typer.Exit(130) from None
    _print(outcomes, as_json, report)


@app.command()
def report(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Trials [default: all].")] = None,
    size: Annotated[_Size | None, typer.Option(help="Only runs of this size [default: the newest].")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder [default: report/ in the store].")] = None,
    store: _StoreOption = None,
) -> None:
    """Write the HTML report of stored runs, one page per trial and an index."""
    with Store(store or default_folder(), read_only=True) as opened:
        outcomes = [
            outcome
            for name in names or _stored(opened)
            if (outcome := last_outcome(name, opened, size.value if size else None)) is not None
        ]
        if not outcomes:
            raise TrialError("there is no stored run to report; start with: danlu run NAME")
        written = _write_report(opened, output or opened.folder / "report", outcomes)
    if written is None:
        raise typer.Exit(1)
    typer.echo(str(written))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The trial.")],
    size: Annotated[_Size | None, typer.Option(help="Only a run of this size [default: the newest].")] = None,
    store: _StoreOption = None,
    as_json: _JsonOption = False,
) -> None:
    """One trial: what it claims and how, and its last stored result."""
    full, trial = find_trial(name)
    with Store(store or default_folder(), read_only=True) as opened:
        outcome = last_outcome(name, opened, size.value if size else None)
    if as_json:
        typer.echo(_json([outcome] if outcome else []))
        return
    console = Console()
    console.print(f"[bold]{full}[/bold]", highlight=False)
    console.print(trial.claim, highlight=False)
    console.print(f"[dim]Source: {trial.source}[/dim]", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("arm", "tunes", "under test"):
        table.add_column(heading)
    for arm, declared in trial.arms.items():
        tunes = ", ".join(str(dict(point)) for point in declared.grid if point)
        table.add_row(arm, tunes or "nothing", declared.method or "baseline")
    console.print(table)
    for one, budget in trial.sizes.items():
        console.print(f"[dim]{one}: {budget.steps} steps, {budget.seeds} seeds[/dim]", highlight=False)
    if outcome is None:
        console.print(f"Not run yet. Run it with: danlu run {name}", highlight=False)
    else:
        _print([outcome], False, None)


def _stored(store: Store) -> list[str]:
    names = trial_names()
    return sorted({run.trial for run in store.runs()} & set(names))


def _write_report(store: Store, folder: Path, outcomes: list[Outcome]) -> Path | None:
    """Write the pages of `outcomes` and of every other stored run; None where the plotting library is missing."""
    from danlu.lab.report import write_report

    fresh = {outcome.trial for outcome in outcomes}
    others = [last_outcome(name, store) for name in _stored(store) if name not in fresh]
    try:
        return write_report([*outcomes, *(one for one in others if one is not None)], folder)
    except MissingExtraError as error:
        # The runs are stored, and the report can be made later or elsewhere.
        sys.stderr.write(f"danlu: no report: {error}\n")
        return None


def _print(outcomes: list[Outcome], as_json: bool, report: Path | None) -> None:
    if as_json:
        typer.echo(_json(outcomes))
        return
    console = Console()
    for outcome in outcomes:
        spent = f"{len(outcome.seeds)} seeds, size {outcome.size}"
        console.print(f"[bold]{outcome.trial}: {outcome.verdict}[/bold] ({spent})", highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("  comparison", overflow="fold")
        table.add_column("gain", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
        for part in outcome.parts:
            one, gain = part.comparison, part.gain
            against = f"  {one.candidate} vs {one.baseline}, {one.metric}"
            if one.margin:
                against += f" (within {one.margin:g})"
            places = _places(gain.low, gain.high)
            interval = f"\\[{gain.low:+.{places}f}, {gain.high:+.{places}f}]"
            table.add_row(against, f"{gain.mean:+.{places}f}", interval)
        console.print(table)
        console.print(_arms(outcome))
    console.print("[dim]gain: paired difference, positive where the candidate is better[/dim]", highlight=False)
    console.print("[dim]metrics: means over the seeds[/dim]", highlight=False)
    if report is not None:
        # Plain, so that the path can be copied whatever the width of the terminal.
        typer.echo(f"report: {report.resolve()}")


# Arms that fit beside each other on a terminal of 80 columns; more of them become rows.
_COLUMNS = 6


def _arms(outcome: Outcome) -> Table:
    """What was measured of every arm: the numbers behind the comparisons, and the costs."""
    # In the order of the arm that has most of them; one may lack what does not apply to it.
    fullest = sorted(outcome.arms, key=lambda arm: -len(arm.metrics))
    rows = {
        metric: [_mean(arm.metrics.get(metric, {}).values()) for arm in outcome.arms]
        for metric in dict.fromkeys(metric for arm in fullest for metric in arm.metrics)
    }
    rows["seconds_per_fit"] = [_mean(cost.seconds for cost in arm.costs.values()) for arm in outcome.arms]
    names = [arm.name for arm in outcome.arms]
    corner = "  metric"
    if len(names) > _COLUMNS:
        corner, names, rows = "  arm", list(rows), dict(zip(names, zip(*rows.values(), strict=True), strict=True))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(corner, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(f"  {name}", *cells)
    return table


def _mean(values: Iterable[float]) -> str:
    """Mean with four digits; a dash where there is nothing to average."""
    numbers = list(values)
    return f"{sum(numbers) / len(numbers):.4g}" if numbers else "-"


def _places(low: float, high: float) -> int:
    """Decimal places that show two digits of the interval's width."""
    width = high - low
    if not math.isfinite(width) or width <= 0:
        return 3
    return min(8, max(0, 1 - math.floor(math.log10(width))))


def _json(outcomes: list[Outcome]) -> str:
    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in cast("dict[object, object]", value).items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in cast("Sequence[object]", value)]
        # JSON has no NaN.
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([clean(asdict(outcome)) for outcome in outcomes], ensure_ascii=False)


def main() -> None:
    """Run the command line; what the user can mend is said in one line, without a traceback."""
    try:
        app()
    except TrialError as error:
        sys.stderr.write(f"danlu: {error}\n")
        raise SystemExit(2) from None
    except LabError as error:
        sys.stderr.write(f"danlu: {error}\n")
        raise SystemExit(1) from None
