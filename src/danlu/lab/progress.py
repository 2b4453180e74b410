"""What the runner says while it works, and the two ways of showing it: a live display, or plain lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Listener", "LiveProgress", "PlainProgress", "Silence"]


class Listener(Protocol):
    """Told by the runner what happens. Jobs are known by their label (arm and seed)."""

    def phase(self, title: str, labels: list[str], steps: int, reused: int) -> None:
        """A phase begins with these jobs of `steps` steps each; `reused` evaluations were found in the store."""
        ...

    def step(self, label: str, step: int, loss: float) -> None:
        """A job has done `step` steps."""
        ...

    def done(self, label: str, seconds: float) -> None:
        """A job has ended."""
        ...


class Silence:
    """Shows nothing."""

    def phase(self, title: str, labels: list[str], steps: int, reused: int) -> None:
        """Ignore."""

    def step(self, label: str, step: int, loss: float) -> None:
        """Ignore."""

    def done(self, label: str, seconds: float) -> None:
        """Ignore."""


class PlainProgress:
    """One line per phase and per finished job, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._left = 0

    def phase(self, title: str, labels: list[str], steps: int, reused: int) -> None:
        """Print what is to be done."""
        self._left = len(labels)
        stored = f", {reused} evaluations reused" if reused else ""
        self.console.print(f"{title}: {len(labels)} fits of {steps} steps{stored}", highlight=False)

    def step(self, label: str, step: int, loss: float) -> None:
        """Ignore."""

    def done(self, label: str, seconds: float) -> None:
        """Print the job and how many are left."""
        self._left -= 1
        self.console.print(f"  {label}: {seconds:.1f} s, {self._left} left", highlight=False)


class LiveProgress:
    """A live table of the running fits (arm, seed, step, loss) over a bar with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._steps = 0
        self._running: dict[str, tuple[int, float]] = {}
        self._live: Live | None = None

    @contextmanager
    def show(self) -> Iterator["LiveProgress"]:
        """Keep the display on the terminal while the block runs."""
        with Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True) as live:
            self._live = live
            yield self
        self._live = None

    def _render(self) -> Table:
        layout = Table.grid(expand=True)
        if self._running:
            table = Table(box=None, padding=(0, 2), header_style="dim")
            for heading, justify in (("fit", "left"), ("step", "right"), ("loss", "right")):
                table.add_column(heading, justify="right" if justify == "right" else "left")
            for label, (step, loss) in list(self._running.items()):
                table.add_row(label, f"{step}/{self._steps}", f"{loss:.4f}")
            layout.add_row(table)
        layout.add_row(self._bar)
        return layout

    def phase(self, title: str, labels: list[str], steps: int, reused: int) -> None:
        """Start a bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._running.clear()
        self._steps = steps
        self._task = self._bar.add_task(title, total=max(1, len(labels) * steps))
        if reused:
            self.console.print(f"[dim]{title}: {reused} evaluations reused[/dim]", highlight=False)

    def step(self, label: str, step: int, loss: float) -> None:
        """Move the bar and the fit's row."""
        before = self._running.get(label, (0, 0.0))[0]
        self._running[label] = (step, loss)
        if self._task is not None:
            self._bar.advance(self._task, max(0, step - before))

    def done(self, label: str, seconds: float) -> None:
        """Take the fit's row away."""
        before = self._running.pop(label, (0, 0.0))[0]
        if self._task is not None:
            self._bar.advance(self._task, max(0, self._steps - before))
