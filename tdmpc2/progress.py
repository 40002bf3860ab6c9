"""The display of long work: bars on a terminal, lines at intervals elsewhere, or nothing.

    with Progress(Console()) as progress:
        with progress.add("training", total=500_000, unit="steps") as stage:
            stage.advance()
            stage.note("return 512.3")
        progress.print("the teacher is in runs/walker-walk/1")

Functions report to the `Progress` that they are given, and know no display. A finished stage leaves one line.
"""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import rich.progress
import rich.table
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.text import Text

INTERVAL = 30.0  # seconds between two lines of a running stage


class Table(NamedTuple):
    """A table as plain text; `Progress.table` shows it."""

    columns: Sequence[str]  # titles
    rows: Sequence[Sequence[str]]
    title: str | None = None
    words: int = 1  # the first so many columns hold words, the others hold numbers


class Stage:
    """A named piece of work, from `Progress.add`; as a context manager it ends itself."""

    def __init__(self, bars: rich.progress.Progress, task: rich.progress.Task, print_: Callable[[str], None]):
        self._bars, self._task, self._print = bars, task, print_

    def advance(self, done: float = 1) -> None:
        """Advance by `done` units."""
        self._bars.advance(self._task.id, done)

    def at(self, done: float, total: float | None = None) -> None:
        """Set the units done so far, and `total` if it is known now."""
        self._bars.update(self._task.id, completed=done, total=total)

    def complete(self) -> None:
        """What is done is all that there was to do."""
        self._bars.update(self._task.id, total=self._task.completed)

    def note(self, text: str) -> None:
        """Show a text beside the bar, e.g. "return 512.3"; 30 characters fit on a terminal."""
        self._bars.update(self._task.id, note=text)

    def end(self, line: str | None = None) -> None:
        """End the stage, and leave `line`, by default its count and note. A second call does nothing."""
        if self._task.id in self._bars.task_ids:
            self._bars.remove_task(self._task.id)
            self._print(_line(self._task, f"in {_duration(self._task.elapsed)}") if line is None else line)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


class Progress:
    """The display of running stages, a context manager.

    Args:
        console: None shows nothing; a terminal shows bars, others show lines.
        interval: seconds between two lines of a running stage.
    """

    def __init__(self, console: Console | None = None, interval: float = INTERVAL):
        self._console, self._interval = console, interval
        bars = console is not None and console.is_interactive
        self._bars = rich.progress.Progress(
            TextColumn("{task.description}"),
            # The bar fills the rest of a line, so a narrow terminal cuts the bar, not the text.
            BarColumn(None, table_column=rich.table.Column(ratio=1)),
            _Count(),
            TextColumn("{task.fields[note]}", markup=False),
            _Pace(),
            console=console,
            expand=True,
            transient=True,
            disable=not bars,
            speed_estimate_period=120,
        )
        self._over = threading.Event()
        lines = console is not None and not bars
        self._teller = threading.Thread(target=self._tell, daemon=True) if lines else None

    def add(self, name: str, total: float | None = None, *, unit: str = "", done: float = 0) -> Stage:
        """Begin a stage.

        Args:
            name: e.g. "pretraining".
            total: units to do; None: unknown.
            unit: e.g. "updates".
            done: units done before.
        """
        task_id = self._bars.add_task(name, total=total, completed=int(done), note="", unit=unit)
        task = next(task for task in self._bars.tasks if task.id == task_id)
        if self._teller is not None:
            self.print(_line(task))
        return Stage(self._bars, task, self.print)

    def print(self, line: str) -> None:
        """Show a line permanently."""
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Show a table that stays, at least 110 columns wide: Rich cuts, a terminal only wraps."""
        if self._console is not None:
            width, self._console.width = self._console.width, max(self._console.width, 110)
            self._console.print(_drawn(table))
            self._console.width = width

    def __enter__(self) -> "Progress":
        self._bars.start()
        if self._teller is not None:
            self._teller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        for task in self._bars.tasks:
            Stage(self._bars, task, self.print).end()
        self._bars.stop()

    def _tell(self) -> None:
        """Print the running stages at intervals, even if they do not advance."""
        while not self._over.wait(self._interval):
            for task in self._bars.tasks:
                self.print(_line(task, _left(task)))


class _Count(rich.progress.ProgressColumn):
    """`12,345/500,000`"""

    def render(self, task: rich.progress.Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total}")


class _Pace(rich.progress.ProgressColumn):
    """`9.8/s 13:28:22`: speed, and the time left, or spent if the time left is unknown."""

    def render(self, task: rich.progress.Task) -> Text:
        seconds = task.elapsed if task.time_remaining is None else task.time_remaining
        return Text(f"{_speed(task)} {_duration(seconds)}".lstrip())


def _drawn(table: Table) -> rich.table.Table:
    """The table as Rich prints it. Words of more than 14 letters may be folded; brackets are no markup."""
    title = None if table.title is None else Text(table.title)
    out = rich.table.Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(table.columns):
        if i < table.words:
            longest = max((len(row[i]) for row in table.rows), default=0)
            out.add_column(Text(name), min_width=min(longest, 14), overflow="fold")
        else:
            out.add_column(Text(name), justify="right", no_wrap=True)
    for row in table.rows:
        out.add_row(*map(Text, row))
    return out


def _line(task: rich.progress.Task, time: str = "") -> str:
    """`training: 12,345 of 500,000 steps, return 512.3, 9.8/s, 13:28:22 left`"""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    count = f"{task.completed:,.0f}{total} {task.fields['unit']}".rstrip()
    return f"{task.description}: " + ", ".join(filter(None, [count, task.fields["note"], _speed(task), time]))


def _left(task: rich.progress.Task) -> str:
    if task.time_remaining is None:
        return f"{_duration(task.elapsed)} so far"
    return f"{_duration(task.time_remaining)} left"


def _speed(task: rich.progress.Task) -> str:
    speed = task.finished_speed or task.speed
    return "" if not speed else f"{speed:.1f}/s" if speed < 10 else f"{speed:,.0f}/s"


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


SILENT = Progress()
