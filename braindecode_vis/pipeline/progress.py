"""Shows what a run does and how long it still takes: in a terminal, in a notebook, and in the log of a job.

Owns the listeners of `braindecode_vis.pipeline.runs.Run` that show something. The command line always uses
`ConsoleListener`; Python uses what `find_listener` returns, which shows nothing where nobody watches. Knows nothing of
what a stage computes. Importing it loads nothing heavy.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from braindecode_vis.base.store import Artifact
    from braindecode_vis.pipeline.runs import ProgressListener

#: Between lines about progress where there is no terminal, as in the log of a Slurm job.
_SECONDS_A_LINE = 60.0
#: From the first that a task tells, in which it tells what it has kept.
_KEPT_S = 2.0
#: Between two pictures of the same bar in a notebook, each of which is a message to the browser.
_SECONDS_A_DRAWING = 0.25


def make_console(*, stderr: bool = True) -> Console:
    """Return a console on standard error, or on standard output."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def find_listener(*, verbose: bool = True) -> ProgressListener:
    """Return what shows the progress of a call in Python: nothing in scripts without a terminal, and in tests.

    Parameters
    ----------
    verbose
        False shows nothing in a terminal and in a notebook either.
    """
    from braindecode_vis.pipeline.runs import SilentListener

    # Workers of joblib share the terminal, where their bars would overwrite each other.
    verbose = verbose and multiprocessing.parent_process() is None
    if verbose and is_notebook():
        return NotebookListener()
    # Both: whoever sends the output to a file, or the messages, does not watch bars.
    if verbose and sys.stdout.isatty() and sys.stderr.isatty():
        return ConsoleListener()
    return SilentListener()


def is_notebook() -> bool:
    """Say whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def describe_seconds(seconds: float) -> str:
    """Return a duration in a unit that fits: ``40 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Clock:
    """Decides without a display when a line of progress is due, and describes the progress."""

    def __init__(self, is_drawn: bool) -> None:
        self.is_drawn = is_drawn
        self.started = self.last = time.monotonic()
        self._first: float | None = None
        self._since = (self.started, 0)

    def strikes(self, done: int) -> bool:
        """Return whether a minute has passed since the last line."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if (
            now - self._first < _KEPT_S
        ):  # what an earlier call has done is told at once, and says nothing of the pace
            self._since = (now, done)
        if self.is_drawn or now - self.last < _SECONDS_A_LINE:
            return False
        self.last = now
        return True

    def describe(self, done: int, total: int | None) -> str:
        """Return the progress of a task, and the time left at the speed since it was continued."""
        if not total:
            return f"{done} done"
        began, before = self._since if done > self._since[1] else (self.started, 0)
        if 1000 * (done - before) < total - before:  # the pace of so little is that of opening files
            return f"{done / total:.0%}, time left not known yet"
        left = (time.monotonic() - began) * max(0, total - done) / max(1, done - before)
        return f"{min(done / total, 1):.0%}, about {describe_seconds(left)} left"


class ConsoleListener:
    """Prints on standard error what is computed and what is reused, and why."""

    def __init__(self) -> None:
        self.console = make_console()

    @property
    def is_drawn(self) -> bool:
        """Whether bars are drawn; otherwise a line is printed from time to time."""
        return self.console.is_terminal

    def finished(self, stage: str, artifact: Artifact, seconds: float) -> None:
        """Print one line about a stage."""
        from rich.markup import escape

        if artifact.reused:
            text = f"[dim]{stage:<18} reused    {escape(artifact.reason)}[/dim]"
        else:
            text = (
                f"{stage:<18} [green]computed[/green]  {seconds:6.1f} s  [dim]{escape(artifact.reason)}[/dim]"
            )
        self.console.print(text)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar while the context lasts."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        clock, done = _Clock(self.is_drawn), 0
        with self._open_bar(*columns) as bar:
            task = bar.add_task(description, total=total)

            def advance(n: int) -> None:
                nonlocal done
                done += n
                bar.advance(task, n)
                self._draw()
                if clock.strikes(done):
                    self._print(f"{description}: {clock.describe(done, total)}")

            yield advance

    @contextmanager
    def watch(self, description: str) -> Iterator[Callable[[int, int, str], None]]:
        """Show a bar with text while the context lasts; without a display, one line per minute."""
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[words]}", markup=False),
        )  # fmt: skip
        clock = _Clock(self.is_drawn)
        with self._open_bar(*columns) as bar:
            task = bar.add_task(description, total=None, words="")

            def show(done: int, total: int, text: str) -> None:
                if total:
                    bar.update(task, completed=done, total=total, words=text)
                    self._draw()
                    if not clock.strikes(done):
                        return
                    text = f"{clock.describe(done, total)}, {text}"
                self._print(f"{description} {text}")

            yield show

    @contextmanager
    def _open_bar(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Yield a bar that is shown in a terminal only; elsewhere it would leave empty lines."""
        from rich.progress import Progress

        with Progress(*columns, console=self.console, transient=True, disable=not self.is_drawn) as bar:
            yield bar

    def _print(self, text: str) -> None:
        """Keep a line in view."""
        self.console.print(text, markup=False)

    def _draw(self) -> None:
        """Draw the bars anew; a terminal does so by itself."""


class NotebookListener(ConsoleListener):
    """Shows the same below a cell of a notebook, in one output that is replaced as the work goes on.

    The bars are those of rich, which draws them in a notebook by itself only where ipywidgets is installed. At the end
    one line remains: the stages and their seconds.
    """

    is_drawn = True

    def __init__(self) -> None:
        super().__init__()
        self._bars: list[Progress] = []
        self._cell: Any = None
        self._start_output()

    def _start_output(self) -> None:
        """Begin a new output if another cell is running now, since a run outlives the cell that made it."""
        from IPython import get_ipython

        cell = get_ipython().execution_count
        if cell == self._cell:
            return
        self._cell = cell
        self._lines: list[str] = []
        self._stages: dict[str, tuple[int, float]] = {}  # number of artifacts, and seconds
        self._handle: Any = None
        self._drawn = 0.0

    def finished(self, stage: str, artifact: Artifact, seconds: float) -> None:
        """Add the seconds to those of the stage."""
        self._start_output()
        name = stage.partition(" ")[0]
        n, before = self._stages.get(name, (0, 0.0))
        self._stages[name] = (n + 1, before + seconds)
        self._draw()

    @contextmanager
    def _open_bar(self, *columns: ProgressColumn) -> Iterator[Progress]:
        from rich.progress import Progress

        self._start_output()
        # Disabled: it counts and computes the time left, and never writes anything itself.
        bar = Progress(*columns, console=self.console, disable=True)
        self._bars.append(bar)
        try:
            yield bar
        finally:
            self._bars.remove(bar)
            self._draw(at_once=True)

    def _print(self, text: str) -> None:
        self._start_output()
        self._lines.append(text)
        self._draw(at_once=True)

    def _draw(self, *, at_once: bool = False) -> None:
        from IPython.display import display
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        if not at_once and self._bars and now - self._drawn < _SECONDS_A_DRAWING:
            return
        self._drawn = now
        table = Table.grid()
        done = [
            f"{name} {seconds:.1f} s{f' ({n} parts)' if n > 1 else ''}"
            for name, (n, seconds) in self._stages.items()
        ]
        for row in (
            *map(Text, self._lines),  # as they are: brackets in them are no markup
            *([Text(", ".join(done))] if done else []),
            *(b.get_renderable() for b in self._bars),
        ):
            table.add_row(row)
        if self._handle is None:
            self._handle = display(table, display_id=True)
        else:
            self._handle.update(table)
