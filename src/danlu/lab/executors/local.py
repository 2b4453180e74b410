"""Worker processes on this machine, or this process itself."""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue

from danlu.lab.errors import RunError
from danlu.lab.job import run_job

__all__ = ["LocalExecutor"]

_Tick = tuple[int, int, float]

_ticks: "Queue[_Tick] | None" = None


def _start_worker(ticks: "Queue[_Tick]", parent: int) -> None:
    """Prepare a worker: remember where progress goes, and end when the parent is gone (even by SIGKILL)."""
    global _ticks
    _ticks = ticks

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(index: int, job: str) -> str:
    ticks = _ticks

    def tick(step: int, loss: float) -> None:
        if ticks is not None:
            ticks.put((index, step, loss))

    return run_job(job, tick)


class LocalExecutor:
    """Runs jobs in `workers` processes of this machine, which start with the first job and stay until `close`.

    Args:
        workers: number of processes; 0 runs the jobs in this process, one after the other.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # Spawned workers start clean; forked ones would inherit torch's thread pools in an undefined state.
        self._context = multiprocessing.get_context("spawn")
        self._pool: ProcessPoolExecutor | None = None
        self._progress: Queue[_Tick] | None = None

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        jobs: Sequence[str],
        *,
        on_step: Callable[[int, int, float], None],
        on_result: Callable[[int, str], None],
    ) -> None:
        """Run `jobs` and hand over each result as it comes, in this process, with the index of its job.

        Args:
            jobs: lines of JSON for [`run_job`][danlu.lab.job.run_job].
            on_step: called with (index, step, loss).
            on_result: called with (index, result).

        Raises:
            RunError: a worker died; what it had checkpointed is kept.
        """
        if self.workers == 0:
            for index, job in enumerate(jobs):
                on_result(index, run_job(job, lambda step, loss, index=index: on_step(index, step, loss)))
            return
        try:
            pool, ticks = self._start()
            pending: dict[Future[str], int] = {pool.submit(_work, index, job): index for index, job in enumerate(jobs)}
            while pending:
                finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while True:
                    try:
                        on_step(*ticks.get_nowait())
                    except queue.Empty:
                        break
                for future in finished:
                    on_result(pending.pop(future), future.result())
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died (out of memory, or killed); the same command goes on from its last checkpoint"
            ) from error

    def _start(self) -> "tuple[ProcessPoolExecutor, Queue[_Tick]]":
        if self._pool is None or self._progress is None:
            self._progress = self._context.Queue()
            self._pool = ProcessPoolExecutor(
                max_workers=self.workers,
                mp_context=self._context,
                initializer=_start_worker,
                initargs=(self._progress, os.getpid()),
            )
        return self._pool, self._progress

    def close(self) -> None:
        """End the workers at once: fits are checkpointed and files are renamed into place, so nothing is lost."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._progress is not None:
            self._progress.close()
            self._progress.cancel_join_thread()
            self._progress = None
