"""Trials to rows: equal budgets, reuse, resume after SIGKILL, and errors."""

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import danlu.lab.runner as runner
from danlu.lab.errors import RunError, StoreError, TrialError
from danlu.lab.executors.local import LocalExecutor
from danlu.lab.runner import last_outcome, run_trial
from danlu.lab.store import Store

FOLDER = Path(__file__).parent
TINY = str(FOLDER / "tiny_trial.py")

# Everything but times and peak memory, which are measurements of the machine.
_STORED = {
    "fit": "SELECT key, task, options, seed, steps, data, code, threads, parameters, optimizer_state, status FROM fit",
    "curve": "SELECT fit, name, step, value FROM curve",
    "score": "SELECT key, fit, split, seed, options, metric, position, value FROM score",
    "run": "SELECT id, trial, size, plan, status, verdict, command, sources FROM run",
    "run_score": "SELECT * FROM run_score",
}


def stored_rows(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    connection = sqlite3.connect(folder / "danlu.sqlite")
    try:
        return {table: sorted(connection.execute(query).fetchall(), key=repr) for table, query in _STORED.items()}
    finally:
        connection.close()


class Record:
    """A listener that remembers."""

    def __init__(self):
        self.phases: list[tuple[str, list[str], int, int]] = []
        self.finished: list[str] = []
        self.steps: list[tuple[str, int]] = []

    def phase(self, title, labels, steps, reused):
        self.phases.append((title, labels, steps, reused))

    def step(self, label, step, loss):
        self.steps.append((label, step))

    def done(self, label, seconds):
        self.finished.append(label)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with an undisturbed run at demo size."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Store(folder) as store:
        outcome = run_trial(TINY, size="demo", store=store)
    return folder, outcome


def test_outcome(finished):
    folder, outcome = finished
    assert outcome.trial == "local/tiny_trial"
    assert outcome.verdict == "holds"
    assert outcome.seeds == (0, 1, 2, 3, 4, 5)
    assert [arm.name for arm in outcome.arms] == ["slow", "fast", "fast_biased"]
    slow, fast = outcome.arm("slow"), outcome.arm("fast")
    assert slow.chosen == {"lr": 0.001}
    assert slow.edge == ("lr",)
    assert [point.options for point in slow.tuning] == [{"lr": 0.0005}, {"lr": 0.001}]
    assert fast.metrics.keys() == {"error", "error@twice"}
    (part,) = outcome.parts
    differences = [slow.metrics["error"][seed] - fast.metrics["error"][seed] for seed in outcome.seeds]
    assert part.gain.mean == pytest.approx(sum(differences) / 6)
    assert part.gain.sign_flip == pytest.approx(2 / 64)
    cost = fast.costs[0]
    assert cost.parameters == 5
    assert cost.optimizer_state == 2 * 4 * 5
    assert cost.seconds > 0
    assert [step for step, _ in fast.curves[0]["train_loss"]][-1] == 60
    assert outcome.environment["torch"]
    assert outcome.command == f"danlu run {TINY} --size demo"
    with Store(folder, read_only=True) as store:
        again = last_outcome(TINY, store)
        assert again == outcome
        assert last_outcome(TINY, store, "ci") is None
    connection = sqlite3.connect(folder / "danlu.sqlite")
    (source,) = connection.execute("SELECT text FROM source WHERE name = 'danlu.simplex.softmax'").fetchone()
    connection.close()
    assert "def softmax" in source


def test_tuning_costs_every_arm_the_same_and_uses_other_seeds(finished):
    folder, outcome = finished
    connection = sqlite3.connect(folder / "danlu.sqlite")
    query = (
        "SELECT arm, phase, run_score.seed, split, fit FROM run_score JOIN score ON score.key = run_score.score "
        "GROUP BY arm, phase, score.key"
    )
    rows = connection.execute(query).fetchall()
    connection.close()
    for arm in ("slow", "fast", "fast_biased"):
        tuning = {fit for name, phase, *_, fit in rows if name == arm and phase == "tune"}
        assert len(tuning) == 4  # two points, two tuning seeds
    seeds = {phase: {seed for _, which, seed, *_ in rows if which == phase} for phase in ("tune", "confirm")}
    assert not seeds["tune"] & seeds["confirm"]
    assert {(phase, split) for _, phase, _, split, _ in rows} == {("tune", "validation"), ("confirm", "test")}
    # Arms that differ only in evaluation share their fits.
    shared = {fit for name, *_, fit in rows if name == "fast"} & {
        fit for name, *_, fit in rows if name == "fast_biased"
    }
    assert len(shared) >= 4
    assert outcome.arm("slow").costs[0].shared is False


def test_second_run_reuses_everything(finished):
    folder, outcome = finished
    before = stored_rows(folder)
    record = Record()
    with Store(folder) as store:
        again = run_trial(TINY, size="demo", store=store, listener=record)
    assert record.finished == []
    assert [(labels, reused) for _, labels, _, reused in record.phases] == [([], 12), ([], 18)]
    assert stored_rows(folder) == before
    assert again.parts == outcome.parts


def test_result_does_not_depend_on_workers(finished, tmp_path):
    folder, _ = finished
    record = Record()
    with Store(tmp_path) as store, LocalExecutor(2) as executor:
        run_trial(TINY, size="demo", store=store, executor=executor, listener=record)
    assert stored_rows(tmp_path) == stored_rows(folder)
    assert len(record.finished) == 8 + 18
    assert "fast+fast_biased lr=0.05 seed 0" in record.finished


def test_more_seeds_reuse_the_fewer(tmp_path):
    with Store(tmp_path) as store:
        run_trial(TINY, size="ci", store=store)
        record = Record()
        outcome = run_trial(TINY, size="ci", seeds=4, store=store, listener=record)
    assert outcome.seeds == (0, 1, 2, 3)
    assert all("seed 3" in label for label in record.finished)
    assert outcome.command.endswith("--seeds 4")


def test_a_fit_goes_on_from_its_checkpoint_bit_for_bit(finished, tmp_path, monkeypatch):
    """Stop inside every fit once, by an exception at a random step; then finish."""
    folder, _ = finished
    import danlu.lab.tasks.training as training

    choose = random.Random(0)
    step, stopped = training.GradientFit.step, set()

    def interrupted(self, index):
        seed = float(next(iter(self.model.parameters())).detach().sum())
        key = (round(seed, 3) if index == 0 else None, index)
        if index > 5 and choose.random() < 0.02 and len(stopped) < 30:
            stopped.add((key, len(stopped)))
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(training.GradientFit, "step", interrupted)
    for _ in range(100):
        try:
            with Store(tmp_path) as store:
                run_trial(TINY, size="demo", store=store)
            break
        except KeyboardInterrupt:
            continue
    assert len(stopped) > 10
    assert stored_rows(tmp_path) == stored_rows(folder)
    assert list((tmp_path / "fits").glob("*partial*")) == []


@pytest.mark.timeout(240)
def test_killed_at_ten_random_moments(tmp_path):
    """SIGKILL to the whole command, ten times, then the same command: the rows of an undisturbed run."""
    slow = tmp_path / "slow_trial.py"
    text = (FOLDER / "tiny_trial.py").read_text().replace("slow: float = 0.0", "slow: float = 0.014")
    slow.write_text(text)
    command = [sys.executable, "-m", "danlu", "run", str(slow), "--size", "demo", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DANLU_TEST_MARK": str(tmp_path)}

    with Store(tmp_path / "undisturbed") as store:
        run_trial(str(slow), size="demo", store=store)

    choose, kills, fits = random.Random(1), 0, []
    disturbed = tmp_path / "disturbed"
    while kills < 10:
        process = subprocess.Popen(
            [*command, "--store", str(disturbed)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Half of the moments lie anywhere in the start of the command, half among the fits, however slow the machine.
        if kills % 2:
            known, deadline = set(disturbed.glob("fits/*")), time.monotonic() + 60
            while set(disturbed.glob("fits/*")) == known and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        try:
            process.wait(choose.uniform(0.0, 0.8 if kills % 2 else 4.0))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            fits.append(len(list(disturbed.glob("fits/*.safetensors"))))
    time.sleep(1.5)  # orphaned workers notice within half a second
    assert _processes_with(f"DANLU_TEST_MARK={tmp_path}") == []
    if kills < 10:
        pytest.fail(f"the run finished after {kills} kills; make it slower")
    done = subprocess.run(
        [*command, "--store", str(disturbed)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert fits[-1] > 0
    assert stored_rows(disturbed) == stored_rows(tmp_path / "undisturbed")


def _processes_with(variable: str) -> list[str]:
    """Command lines of the processes that inherited an environment variable of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return found


def test_broken_arm_is_one_line_and_stores_nothing_of_it(tmp_path):
    broken = tmp_path / "broken.py"
    text = Path(TINY).read_text().replace('Arm(options={"lr": 0.001}', 'Arm(options={"lr": 0.001, "broken": True}')
    broken.write_text(text)
    with Store(tmp_path / "store") as store:
        with pytest.raises(
            RunError, match=r"^slow lr=0.0005 seed 0 failed: RuntimeError: this arm is broken on purpose$"
        ):
            run_trial(str(broken), size="ci", store=store)
        assert store.runs() == []
    assert list((tmp_path / "store" / "fits").iterdir()) == []


def test_dead_worker_is_said(tmp_path):
    deadly = tmp_path / "deadly.py"
    text = (
        Path(TINY)
        .read_text()
        .replace('raise RuntimeError("this arm is broken on purpose")', "__import__('os')._exit(9)")
    )
    deadly.write_text(text.replace('Arm(options={"lr": 0.001}', 'Arm(options={"lr": 0.001, "broken": True}'))
    with (
        Store(tmp_path / "store") as store,
        LocalExecutor(1) as executor,
        pytest.raises(RunError, match="a worker process died"),
    ):
        run_trial(str(deadly), size="ci", store=store, executor=executor)


def test_full_disk_in_a_fit_is_one_line(tmp_path, monkeypatch):
    def full(path, state):
        raise StoreError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("danlu.lab.job.save_state", full)
    with Store(tmp_path) as store, pytest.raises(RunError, match=r"No space left on device$"):
        run_trial(TINY, size="ci", store=store)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"size": "report"}, "no size 'report'; it has ci, demo"), ({"size": "ci", "seeds": 2}, "needs at least 3")],
)
def test_bad_requests(tmp_path, arguments, match):
    with Store(tmp_path) as store, pytest.raises(TrialError, match=match):
        run_trial(TINY, store=store, **arguments)


def test_change_of_code_or_data_is_a_change_of_key(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        run_trial(TINY, size="ci", store=store)
        record = Record()
        monkeypatch.setattr(runner, "code_version", lambda: "other code")
        run_trial(TINY, size="ci", store=store, listener=record)
        assert len(record.finished) == 4 + 6  # two arms share the confirming fits


def test_dirty_tree_is_not_published(finished, monkeypatch):
    folder, _ = finished
    for dirty in (True, False):
        environment = {**runner.environment(), "dirty": dirty}
        monkeypatch.setattr(runner, "environment", lambda environment=environment: environment)
        with Store(folder) as store:
            assert run_trial(TINY, size="demo", store=store).published is not dirty


def test_diverging_arm_gets_a_verdict(tmp_path):
    wild = tmp_path / "wild.py"
    wild.write_text(
        Path(TINY).read_text().replace('({"lr": 0.05}, {"lr": 0.1}), method', '({"lr": 1e30}, {"lr": 2e30}), method')
    )
    with Store(tmp_path / "store") as store:
        outcome = run_trial(str(wild), size="ci", store=store)
    assert outcome.verdict == "does not hold"
    assert re.fullmatch("nan", str(outcome.parts[0].gain.mean))
    assert replace(outcome, verdict="holds").published is outcome.published
