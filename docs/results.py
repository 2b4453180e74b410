"""Run the trials and write their pages for the site: `python docs/results.py [--size report] [--render-only]`.

Refuses rows from a working tree with local changes. What is stored is reused, so a second call only renders.
"""

import argparse
import os
from pathlib import Path

from danlu.lab.executors.local import LocalExecutor
from danlu.lab.outcome import Outcome
from danlu.lab.report import write_figure
from danlu.lab.runner import last_outcome, run_trial
from danlu.lab.store import Store, default_folder
from danlu.lab.trial import trial_names

FOLDER = Path(__file__).parent / "results"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def page(outcome: Outcome) -> str:
    """One trial as Markdown."""
    name = outcome.trial.replace("/", "-")
    lines = [
        f"# {outcome.trial}",
        "",
        f"**{outcome.verdict}**, over {len(outcome.seeds)} seeds; size `{outcome.size}`, {outcome.steps} steps.",
        "",
        f"Claim: {outcome.claim}",
        "",
        f"Source: {outcome.source}",
        "",
        f"![The scores of {outcome.trial}](../images/results-{name}.svg)",
        "",
        "The gain is the paired difference, positive where the candidate is better.",
        "",
        "| candidate | baseline | metric | claim needs | gain | 95 % interval | one-sided p |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in outcome.parts:
        one, gain = part.comparison, part.gain
        need = f"not worse by more than {one.margin:g}" if one.margin else f"{one.better}"
        interval = f"[{number(gain.low)}, {number(gain.high)}]"
        cells = (
            one.candidate,
            one.baseline,
            f"`{one.metric}`",
            need,
            number(gain.mean),
            interval,
            number(part.p_better),
        )
        lines.append(f"| {' | '.join(cells)} |")
    metrics = list(dict.fromkeys(metric for arm in outcome.arms for metric in arm.metrics))
    lines += ["", "Means over the seeds, on test data:", "", f"| arm | {' | '.join(f'`{m}`' for m in metrics)} |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for arm in outcome.arms:
        # An arm may lack a metric that does not apply to it.
        found = [list(arm.metrics.get(m, {}).values()) for m in metrics]
        cells = [number(sum(values) / len(values)) if values else "–" for values in found]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| arm | chosen by tuning | seconds per fit | optimizer state, bytes per parameter |",
        "|---|---|---|---|",
    ]
    for arm in outcome.arms:
        chosen = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in arm.chosen.items())
        costs = list(arm.costs.values())
        seconds = sum(cost.seconds for cost in costs) / len(costs)
        edge = f" (at the end of its grid: {', '.join(arm.edge)})" if arm.edge else ""
        state = costs[0].optimizer_state / costs[0].parameters
        lines.append(f"| {arm.name} | {chosen or 'nothing'}{edge} | {seconds:.1f} | {number(state)} |")
    environment = {k: outcome.environment[k] for k in ("commit", "torch", "python", "processor", "cores")}
    lines += ["", outcome.notes, "", f"Data: {outcome.data['name']}, SHA-256 `{outcome.data['sha256'][:16]}`.", ""]
    lines += [", ".join(f"{k} {v}" for k, v in environment.items()) + ".", ""]
    return "\n".join([*lines, "```text", outcome.command, "```", ""])


def main() -> None:
    """Run or load every trial, then write the pages and the index."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="report")
    parser.add_argument("--render-only", action="store_true")
    arguments = parser.parse_args()
    rows = ["# Results", "", "| trial | verdict | size | seeds |", "|---|---|---|---|"]
    with Store(default_folder()) as store, LocalExecutor(os.cpu_count() or 1) as executor:
        for name in trial_names():
            if arguments.render_only:
                # The page shows the size: one that was run at demo size only is better than none.
                outcome = last_outcome(name, store, arguments.size) or last_outcome(name, store, "demo")
            else:
                outcome = run_trial(name, size=arguments.size, store=store, executor=executor)
            if outcome is None:
                continue
            if not outcome.published:
                raise SystemExit(f"{name}: the rows come from a working tree with local changes; commit and run again")
            file = name.replace("/", "-")
            write_figure(outcome, FOLDER.parent / "images" / f"results-{file}.svg")
            (FOLDER / f"{file}.md").write_text(page(outcome), encoding="utf-8")
            rows.append(f"| [{name}]({file}.md) | {outcome.verdict} | {outcome.size} | {len(outcome.seeds)} |")
    text = "\n".join([*rows, "", "How to read a verdict: [the laboratory](../lab/index.md).", ""])
    (FOLDER / "index.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
