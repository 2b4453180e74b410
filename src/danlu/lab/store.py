"""The store: one SQLite file in WAL mode beside a folder of fitted weights.

One process writes; workers hand their rows to it. A folder on a network file system is not supported by WAL.
"""

import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from danlu.lab.errors import StoreError
from danlu.lab.trial import Scalar, canonical_json, digest

__all__ = ["FitRow", "RunRow", "ScoreRow", "Store", "default_folder"]

_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS environment (
    id TEXT PRIMARY KEY,
    json TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS source (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    text TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fit (
    key TEXT PRIMARY KEY,
    task TEXT NOT NULL,
    options TEXT NOT NULL,
    seed INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    data TEXT NOT NULL,
    code TEXT NOT NULL,
    threads INTEGER NOT NULL,
    parameters INTEGER NOT NULL,
    optimizer_state INTEGER NOT NULL,
    status TEXT NOT NULL,
    seconds REAL NOT NULL,
    peak_memory INTEGER,
    environment TEXT NOT NULL REFERENCES environment (id),
    finished TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS curve (
    fit TEXT NOT NULL REFERENCES fit (key),
    name TEXT NOT NULL,
    step INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (fit, name, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS score (
    key TEXT NOT NULL,
    fit TEXT NOT NULL REFERENCES fit (key),
    split TEXT NOT NULL,
    seed INTEGER NOT NULL,
    options TEXT NOT NULL,
    metric TEXT NOT NULL,
    position INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (key, metric)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run (
    id TEXT PRIMARY KEY,
    trial TEXT NOT NULL,
    size TEXT NOT NULL,
    plan TEXT NOT NULL,
    status TEXT NOT NULL,
    verdict TEXT,
    command TEXT NOT NULL,
    sources TEXT NOT NULL,
    environment TEXT NOT NULL REFERENCES environment (id),
    started TEXT NOT NULL,
    finished TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run_score (
    run TEXT NOT NULL REFERENCES run (id),
    arm TEXT NOT NULL,
    phase TEXT NOT NULL,
    seed INTEGER NOT NULL,
    score TEXT NOT NULL,
    PRIMARY KEY (run, arm, phase, score)
) WITHOUT ROWID;
"""


def default_folder() -> Path:
    """`$DANLU_STORE`, else `danlu-runs` in the current folder."""
    return Path(os.environ.get("DANLU_STORE") or "danlu-runs")


@dataclass(frozen=True)
class FitRow:
    """A finished fit. `status` is "complete"; a fit that failed or was cancelled leaves no row."""

    key: str
    task: str
    options: dict[str, Scalar]
    seed: int
    steps: int
    data: dict[str, str]
    code: str
    threads: int
    parameters: int
    optimizer_state: int
    seconds: float
    peak_memory: int | None
    environment: dict[str, Scalar]
    finished: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class ScoreRow:
    """The metrics of one evaluation of one fit."""

    key: str
    fit: str
    split: str
    seed: int
    options: dict[str, Scalar]
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunRow:
    """One run of a trial. `scores` maps (arm, phase, seed) to keys of scores."""

    id: str
    trial: str
    size: str
    plan: str
    status: str
    verdict: str | None
    command: str
    environment: dict[str, Scalar]
    started: str
    finished: str | None
    scores: tuple[tuple[str, str, int, str], ...]


class Store:
    """Rows in `<folder>/danlu.sqlite`, weights in `<folder>/fits`.

    Args:
        folder: made if it is missing.
        read_only: refuse to create anything; a missing store is then empty.

    Raises:
        StoreError: the folder or the file cannot be used; the message names the path and the cause.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder = folder
        self.file = folder / "danlu.sqlite"
        if read_only:
            self._connection = self._open_to_read()
        else:
            try:
                (folder / "fits").mkdir(parents=True, exist_ok=True)
                # SQLite would only say that it cannot open the file, not why.
                with tempfile.TemporaryFile(dir=folder):
                    pass
                self._connection = sqlite3.connect(self.file, timeout=30, isolation_level=None)
            except (OSError, sqlite3.Error) as error:
                raise StoreError(f"cannot open the store {folder}: {_cause(error)}") from error
        try:
            with self._guard():
                self._prepare(read_only)
        except StoreError:
            self._connection.close()
            raise

    def _open_to_read(self) -> sqlite3.Connection:
        if not self.file.exists():
            return sqlite3.connect(":memory:", isolation_level=None)
        address = f"{self.file.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
        try:
            connection.execute("PRAGMA user_version")
        except sqlite3.OperationalError:
            # Beside a file in WAL mode SQLite makes two more, which a read-only folder refuses; nobody can be
            # writing there, so the file may be read as it is.
            connection.close()
            connection = sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
        return connection

    def _prepare(self, read_only: bool) -> None:
        execute = self._connection.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise StoreError(f"the store {self.file} has schema {version}, this danlu reads {_VERSION}")
        if not read_only:
            self._use_wal()
            execute("PRAGMA synchronous = FULL")
            execute("PRAGMA foreign_keys = ON")
        if version == 0 and not (read_only and self.file.exists()):
            # Immediate: of two processes that make the store at once the second waits, and finds the tables.
            self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def _use_wal(self) -> None:
        """Switch to WAL; unlike other statements this one does not wait for a process that is doing the same."""
        for attempt in range(50):
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if attempt == 49 or "locked" not in str(error):
                    raise
                time.sleep(0.1)
            else:
                return

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"cannot use the store {self.file}: {_cause(error)}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                # After some errors, such as a full disk, SQLite has rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def weights(self, fit_key: str) -> Path:
        """Where the weights of a finished fit are."""
        return self.folder / "fits" / f"{fit_key}.safetensors"

    def partial(self, fit_key: str) -> Path:
        """Where the checkpoint of an unfinished fit is."""
        return self.folder / "fits" / f"{fit_key}.partial.safetensors"

    def add_fit(self, row: FitRow, scores: Iterable[ScoreRow]) -> None:
        """Add a fit and its evaluations in one transaction; rows that exist are kept."""
        with self._transaction() as connection:
            environment = self._add_environment(connection, row.environment)
            connection.execute(
                "INSERT OR IGNORE INTO fit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'complete', ?, ?, ?, ?)",
                (
                    row.key,
                    row.task,
                    canonical_json(row.options),
                    row.seed,
                    row.steps,
                    canonical_json(row.data),
                    row.code,
                    row.threads,
                    row.parameters,
                    row.optimizer_state,
                    row.seconds,
                    row.peak_memory,
                    environment,
                    row.finished,
                ),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO curve VALUES (?, ?, ?, ?)",
                [(row.key, name, step, value) for name, points in row.curves.items() for step, value in points],
            )
            self._add_scores(connection, scores)

    def add_scores(self, scores: Iterable[ScoreRow]) -> None:
        """Add evaluations of stored fits."""
        with self._transaction() as connection:
            self._add_scores(connection, scores)

    @staticmethod
    def _add_scores(connection: sqlite3.Connection, scores: Iterable[ScoreRow]) -> None:
        connection.executemany(
            "INSERT OR IGNORE INTO score VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (row.key, row.fit, row.split, row.seed, canonical_json(row.options), metric, position, value)
                for row in scores
                for position, (metric, value) in enumerate(row.metrics.items())
            ],
        )

    @staticmethod
    def _add_environment(connection: sqlite3.Connection, environment: Mapping[str, Scalar]) -> str:
        identity = digest(dict(environment))
        connection.execute(
            "INSERT OR IGNORE INTO environment VALUES (?, ?)", (identity, canonical_json(dict(environment)))
        )
        return identity

    def fits(self, keys: Iterable[str]) -> dict[str, FitRow]:
        """The finished fits among `keys`."""
        found: dict[str, FitRow] = {}
        with self._guard():
            for key in keys:
                row = self._connection.execute(
                    "SELECT fit.*, environment.json FROM fit JOIN environment ON environment.id = fit.environment "
                    "WHERE key = ?",
                    (key,),
                ).fetchone()
                if row is None:
                    continue
                curves: dict[str, list[tuple[int, float]]] = {}
                for name, step, value in self._connection.execute(
                    "SELECT name, step, value FROM curve WHERE fit = ? ORDER BY name, step", (key,)
                ):
                    curves.setdefault(name, []).append((step, _number(value)))
                (_, task, options, seed, steps, data, code, threads, parameters, state, _status) = row[:11]
                (seconds, peak, _environment, finished, environment) = row[11:]
                found[key] = FitRow(
                    key,
                    task,
                    json.loads(options),
                    seed,
                    steps,
                    json.loads(data),
                    code,
                    threads,
                    parameters,
                    state,
                    seconds,
                    peak,
                    json.loads(environment),
                    finished,
                    curves,
                )
        return found

    def scores(self, keys: Iterable[str]) -> dict[str, ScoreRow]:
        """The stored evaluations among `keys`."""
        found: dict[str, ScoreRow] = {}
        with self._guard():
            for key in keys:
                rows = self._connection.execute(
                    "SELECT fit, split, seed, options, metric, value FROM score WHERE key = ? ORDER BY position",
                    (key,),
                ).fetchall()
                if rows:
                    fit, split, seed, options = rows[0][:4]
                    metrics = {metric: _number(value) for *_, metric, value in rows}
                    found[key] = ScoreRow(key, fit, split, seed, json.loads(options), metrics)
        return found

    def add_run(self, row: RunRow, sources: Mapping[str, str]) -> None:
        """Add or replace a run with its references to scores and the sources it ran."""
        with self._transaction() as connection:
            environment = self._add_environment(connection, row.environment)
            listed = {name: digest(text) for name, text in sources.items()}
            connection.executemany(
                "INSERT OR IGNORE INTO source VALUES (?, ?, ?)",
                [(listed[name], name, text) for name, text in sources.items()],
            )
            connection.execute("DELETE FROM run_score WHERE run = ?", (row.id,))
            connection.execute(
                "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "status = excluded.status, verdict = excluded.verdict, finished = excluded.finished, "
                "environment = excluded.environment, command = excluded.command, sources = excluded.sources",
                (
                    row.id,
                    row.trial,
                    row.size,
                    row.plan,
                    row.status,
                    row.verdict,
                    row.command,
                    canonical_json(listed),
                    environment,
                    row.started,
                    row.finished,
                ),
            )
            connection.executemany(
                "INSERT INTO run_score VALUES (?, ?, ?, ?, ?)", [(row.id, *score) for score in row.scores]
            )

    def runs(self, trial: str | None = None) -> list[RunRow]:
        """All complete runs, newest first, of one trial or of all."""
        with self._guard():
            rows = self._connection.execute(
                "SELECT run.id, trial, size, plan, status, verdict, command, json, started, finished "
                "FROM run JOIN environment ON environment.id = run.environment "
                "WHERE status = 'complete' AND (?1 IS NULL OR trial = ?1) ORDER BY finished DESC, run.id",
                (trial,),
            ).fetchall()
            return [
                RunRow(
                    *cast("tuple[str, str, str, str, str, str | None, str]", row[:7]),
                    json.loads(row[7]),
                    row[8],
                    row[9],
                    tuple(
                        self._connection.execute(
                            "SELECT arm, phase, seed, score FROM run_score WHERE run = ? "
                            "ORDER BY arm, phase, seed, score",
                            (row[0],),
                        )
                    ),
                )
                for row in rows
            ]


def _number(value: float | None) -> float:
    """SQLite stores NaN as NULL."""
    return float("nan") if value is None else float(value)


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
