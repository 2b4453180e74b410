"""The command line: what it prints, its exit codes, and that the user's mistakes cost one line each."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from danlu.lab import cli

TINY = str(Path(__file__).with_name("tiny_trial.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}


def danlu(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "danlu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, **options)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The same as `danlu`, in this process."""
    monkeypatch.setattr(sys, "argv", ["danlu", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("cli") / "store"
    return folder, danlu("run", TINY, "--size", "ci", "--workers", "2", "--store", str(folder))


def test_run_prints_progress_table_and_report(ran):
    folder, done = ran
    assert done.returncode == 0, done.stderr
    assert "local/tiny_trial: tune: 4 fits of 40 steps" in done.stderr
    assert "fast vs slow, error" in done.stdout
    assert "local/tiny_trial: holds (3 seeds, size ci)" in done.stdout
    assert re.search(r"fast vs slow, error +\+\d\S* +\[\+\d\S*, \+\d\S*\] *$", done.stdout, flags=re.MULTILINE)
    # Every metric of every arm, not only those that decide.
    assert re.search(r"^ +metric +slow +fast +fast_biased *$", done.stdout, flags=re.MULTILINE)
    for metric in ("error", "error@twice", "seconds_per_fit"):
        assert re.search(rf"^  {metric}( +\d\S*){{3}} *$", done.stdout, flags=re.MULTILINE)
    report = Path(re.search(r"^report: (.*)$", done.stdout, flags=re.MULTILINE)[1])
    assert report.exists()
    assert report.parent == folder / "report"
    assert (report.parent / "local-tiny_trial.html").exists()


def test_run_again_is_quick_and_json_is_json(ran):
    folder, _ = ran
    start = time.perf_counter()
    done = danlu("run", TINY, "--size", "ci", "--store", str(folder), "--json")
    assert time.perf_counter() - start < 30
    assert done.returncode == 0
    (outcome,) = json.loads(done.stdout)
    assert outcome["verdict"] == "holds"
    assert outcome["arms"][0]["metrics"]["error"].keys() == {"0", "1", "2"}
    assert "NaN" not in done.stdout


def test_show_and_list(ran, monkeypatch, capsys):
    folder, _ = ran
    code, out, _ = call(monkeypatch, capsys, "show", TINY, "--store", str(folder))
    assert code == 0
    assert "A larger step size is better here." in out
    assert "holds (3 seeds, size ci)" in out
    code, out, _ = call(monkeypatch, capsys, "show", "tiger", "--store", str(folder))
    assert code == 0
    assert "Not run yet. Run it with: danlu run tiger" in out
    code, out, _ = call(monkeypatch, capsys, "list", "--store", str(folder))
    assert code == 0
    for name in ("optim/tiger", "losses/tailr", "attention/rerope", "not run yet"):
        assert name in out
    code, out, _ = call(monkeypatch, capsys, "list", "--json", "--store", str(folder))
    rows = {row["trial"]: row for row in json.loads(out)}
    assert rows["attention/rerope"]["family"] == "attention"
    assert rows["attention/rerope"]["verdict"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "tigr"], 2, "danlu: there is no trial 'tigr'; did you mean 'tiger'?"),
        (["show", "rerop"], 2, "danlu: there is no trial 'rerop'; did you mean 'rerope'?"),
        (["run", "tiger", "--workers", "0"], 2, "danlu: --workers must be at least 1, got 0"),
        (["run", TINY, "--size", "report"], 2, "danlu: trial local/tiny_trial has no size 'report'; it has ci, demo"),
        (
            ["run", TINY, "--size", "ci", "--seeds", "2"],
            2,
            "danlu: size 'ci' has 2 seeds; a paired interval needs at least 3",
        ),
        (["run", "/nowhere/trial.py"], 2, "danlu: cannot read the trial file /nowhere/trial.py"),
        (["report", "tiger"], 2, "danlu: there is no stored run to report; start with: danlu run NAME"),
    ],
)
def test_mistakes_cost_one_line(monkeypatch, capsys, tmp_path, arguments, code, line):
    found, out, err = call(monkeypatch, capsys, *arguments, "--store", str(tmp_path / "store"))
    assert (found, out, err.strip()) == (code, "", line)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rum", "tiger"], "run"),
        (["run", "tiger", "--sise", "ci"], "--size"),
        (["run", "tiger", "--size", "dmeo"], "demo"),
    ],
)
def test_misspelt_commands_and_options(monkeypatch, capsys, arguments, hint):
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert hint in err
    assert "Traceback" not in err


def test_store_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    code, _, err = call(monkeypatch, capsys, "run", TINY, "--store", str(tmp_path / "file"))
    assert code == 1
    assert err.startswith("danlu: cannot open the store")
    assert len(err.strip().splitlines()) == 1


def test_full_disk_ends_in_one_line_and_goes_on_elsewhere(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        done = danlu("run", TINY, "--size", "demo", "--workers", "1", "--store", str(disk))
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("danlu: ")
        assert re.search("No space left on device|full", last)
        assert "Traceback" not in done.stderr
        assert not list(disk.glob("**/.*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        done = danlu("run", TINY, "--size", "demo", "--workers", "1", "--store", str(disk))
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_interrupt_says_how_to_go_on(tmp_path):
    slow = tmp_path / "slow_trial.py"
    slow.write_text(Path(TINY).read_text().replace("slow: float = 0.0", "slow: float = 0.05"))
    command = [sys.executable, "-m", "danlu", "run", str(slow), "--size", "ci", "--store", str(tmp_path / "store")]
    # A shell starts what runs in the background with the signal ignored, and children inherit that.
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("store/fits/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "danlu: stopped; the same command goes on from here"


def test_missing_extra_is_one_line():
    code = "import sys; sys.modules['typer'] = None\nfrom danlu.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "danlu: the command line needs typer; install it with: pip install 'danlu[lab]'\n"


def test_options_are_frozen():
    """What is run belongs into the trial; a new option needs a reason that is better than that."""
    command = typer.main.get_command(cli.app)
    options = {
        name: sorted(option for parameter in sub.params for option in parameter.opts if option.startswith("--"))
        for name, sub in command.commands.items()
    }
    assert options == {
        "list": ["--json", "--store"],
        "run": ["--json", "--seeds", "--size", "--store", "--workers"],
        "report": ["--output", "--size", "--store"],
        "show": ["--json", "--size", "--store"],
    }
    root = sorted(option for parameter in command.params for option in parameter.opts)
    assert root == ["--install-completion", "--show-completion", "--version"]
