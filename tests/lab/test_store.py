"""The store keeps rows exactly, in one transaction each, and says in one line what is wrong with its folder."""

import math
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from danlu.lab.errors import StoreError
from danlu.lab.store import FitRow, RunRow, ScoreRow, Store, default_folder

FIT = FitRow(
    key="f" * 20,
    task="regression",
    options={"lr": 0.1, "name": "x", "flag": True},
    seed=3,
    steps=10,
    data={"name": "made", "sha256": "0"},
    code="c" * 20,
    threads=1,
    parameters=5,
    optimizer_state=40,
    seconds=0.25,
    peak_memory=None,
    environment={"torch": "2.13", "dirty": False},
    finished="2026-01-01T00:00:00+00:00",
    curves={"train_loss": [(1, 0.5), (10, 1 / 3)], "other": [(5, math.nan)]},
)
SCORE = ScoreRow("s" * 20, FIT.key, "test", 3, {"bias": 0.5}, {"z": 1 / 3, "a": 2.0, "m@10x": 1.0, "m@2x": math.nan})
RUN = RunRow(
    id="r" * 20,
    trial="optim/tiger",
    size="ci",
    plan="r" * 20,
    status="complete",
    verdict="holds",
    command="danlu run tiger",
    environment={"torch": "2.13", "dirty": False},
    started="2026-01-01T00:00:00+00:00",
    finished="2026-01-01T00:01:00+00:00",
    scores=(("adamw", "confirm", 3, SCORE.key),),
)


def test_rows_round_trip(tmp_path):
    with Store(tmp_path / "new" / "store") as store:
        store.add_fit(FIT, [SCORE])
        store.add_run(RUN, {"danlu.optim.Tiger": "class Tiger: ..."})
    with Store(tmp_path / "new" / "store", read_only=True) as store:
        fit = store.fits([FIT.key, "missing"])[FIT.key]
        score = store.scores([SCORE.key, "missing"])[SCORE.key]
        assert list(score.metrics) == list(SCORE.metrics)
        assert score.metrics["z"] == 1 / 3
        assert math.isnan(score.metrics["m@2x"])
        assert math.isnan(fit.curves["other"][0][1])
        assert replace(fit, curves={}) == replace(FIT, curves={})
        assert fit.curves["train_loss"] == FIT.curves["train_loss"]
        assert store.runs() == [RUN]
        assert store.runs("losses/tailr") == []


def test_adding_twice_keeps_the_first_and_replaces_the_run(tmp_path):
    with Store(tmp_path) as store:
        store.add_fit(FIT, [SCORE])
        store.add_fit(replace(FIT, seconds=99.0), [replace(SCORE, metrics={"z": 7.0})])
        assert store.fits([FIT.key])[FIT.key].seconds == 0.25
        assert store.scores([SCORE.key])[SCORE.key].metrics["z"] == 1 / 3
        store.add_run(RUN, {})
        store.add_run(replace(RUN, verdict="does not hold", scores=()), {})
        assert [(run.verdict, run.scores) for run in store.runs()] == [("does not hold", ())]


def test_a_transaction_is_whole_or_absent(tmp_path):
    with Store(tmp_path) as store:
        bad = replace(SCORE, key="t" * 20, fit="no such fit")
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            store.add_fit(FIT, [SCORE, bad])
        assert store.fits([FIT.key]) == {}
        assert store.scores([SCORE.key]) == {}
        store.add_fit(FIT, [SCORE])


def test_wal_and_schema_version(tmp_path):
    with Store(tmp_path):
        pass
    connection = sqlite3.connect(tmp_path / "danlu.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="schema 99"):
        Store(tmp_path)


def test_missing_store_reads_as_empty_and_is_not_made(tmp_path):
    with Store(tmp_path / "none", read_only=True) as store:
        assert store.runs() == []
    assert not (tmp_path / "none").exists()


def test_unusable_folders(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot open the store .*file"):
        Store(tmp_path / "file")
    (tmp_path / "danlu.sqlite").write_text("this is not a database, whatever its name says " * 50)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path)


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_read_only_folder(disk):
    with Store(disk) as store:
        store.add_fit(FIT, [SCORE])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(disk)
    with Store(disk, read_only=True) as store:
        assert store.scores([SCORE.key]).keys() == {SCORE.key}


def test_full_disk(disk):
    with Store(disk) as store:
        store.add_fit(FIT, [SCORE])
        big = replace(FIT, key="g" * 20, curves={"train_loss": [(i, float(i)) for i in range(50_000)]})
        with pytest.raises(StoreError, match="full"):
            store.add_fit(big, [])
        assert store.fits([FIT.key, big.key]).keys() == {FIT.key}
    with Store(disk, read_only=True) as store:
        assert store.scores([SCORE.key]).keys() == {SCORE.key}


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DANLU_STORE", raising=False)
    assert str(default_folder()) == "danlu-runs"
    monkeypatch.setenv("DANLU_STORE", str(tmp_path))
    assert default_folder() == tmp_path


def test_two_readers_and_a_writer(tmp_path):
    with Store(tmp_path) as writer, Store(tmp_path, read_only=True) as reader:
        writer.add_fit(FIT, [SCORE])
        assert reader.fits([FIT.key]).keys() == {FIT.key}
        code = (
            "import sys; from pathlib import Path; from danlu.lab.store import Store;"
            "print(len(Store(Path(sys.argv[1]), read_only=True).scores([sys.argv[2]])))"
        )
        command = [sys.executable, "-c", code, str(tmp_path), SCORE.key]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


def test_many_processes_may_make_the_store_at_once(tmp_path):
    code = "import sys; from pathlib import Path; from danlu.lab.store import Store; Store(Path(sys.argv[1])).close()"
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate(timeout=120)[1] for process in started] == [b""] * 4
