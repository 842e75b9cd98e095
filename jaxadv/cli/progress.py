"""What the command line shows: progress with the time left, tables, plain messages.

What lives here: `Progress` (bars on a terminal, now and then a plain line elsewhere), tables, and the one place
that prints. What does not: what is said (`commands.py`, `training.py`). Results go to standard output, everything
else to standard error.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

EVERY = 5.0
"""Seconds between two plain lines of one stage."""


_muted = False


def mute(quiet: bool) -> None:
    """Say nothing more from here on, as all processes of a run but the first; errors are shown all the same.

    Args:
      quiet: False speaks again.
    """
    global _muted
    _muted = quiet


def say(text: str) -> None:
    """Print a result to standard output.

    Args:
      text: one or more lines.
    """
    if not _muted:
        print(text, flush=True)


def note(text: str) -> None:
    """Print a remark to standard error.

    Args:
      text: one or more lines.
    """
    if not _muted:
        print(text, file=sys.stderr, flush=True)


class _Console(Console):
    """Rich's console, but a reader that has gone is reported as usual instead of by leaving with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Let the error pass; `main` knows it."""
        raise BrokenPipeError


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table to standard output; names of columns that start with `>` are set flush right.

    Args:
      title: above the table.
      columns: names of the columns.
      rows: their cells.
    """
    if _muted:
        return
    console = _Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    drawn = Table(title=title or None, title_justify="left", title_style="bold")
    for name in columns:
        drawn.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console.print(drawn)


def clock(seconds: float) -> str:
    """Write a span of time.

    Args:
      seconds: how long.

    Returns:
      E.g. `45s`, `3m20s`, `2h05m`.
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Shows how far the stages of a command are; use it in a `with` block and call it as a callback.

    `progress(done, total, stage)` may be called as often as one likes: a terminal gets a bar with the time "
    "left, anything else a
    line at the start, at the end, and every few seconds between.
    """

    def __init__(self, *, terminal: bool | None = None, every: float = EVERY):
        """Prepare the display.

        Args:
          terminal: draw bars; default whether standard error is a terminal.
          every: seconds between two plain lines of one stage.
        """
        self.console = Console(file=sys.stderr, highlight=False, markup=False)
        self.terminal = (self.console.is_terminal if terminal is None else terminal) and not _muted
        self.every = every
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.shown: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Progress":
        if self.terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[words]}"))
            self.bars = Bars(*columns, *left, console=self.console)
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, done: int, total: int, stage: str, words: str = "") -> None:
        """Show that `done` of `total` is reached in a stage; `words` are shown beside it."""
        done, total = int(done), int(total)
        if self.bars is not None:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=total, words=words)
            self.bars.update(self.tasks[stage], completed=done, total=total, words=words)
            return
        now = time.monotonic()
        start, at = self.began.setdefault(stage, (now, done))
        last = self.shown.get(stage)
        if last is not None and done < total and now - last[0] < self.every:
            return
        if last is not None and last[1] == done:
            return
        self.shown[stage] = (now, done)
        left = ""
        if at < done < total:
            left = f", {clock((now - start) * (total - done) / (done - at))} left"
        elif done >= total:
            left = f", {clock(now - start)}"
        note(f"{stage}: {done}/{total}{left}{'; ' + words if words else ''}")
