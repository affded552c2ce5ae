"""Progress of a study on standard error, with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from safe_core.adapters.readable import readable_seconds

from .cells import Cell

__all__ = ["StudyBar", "study_bar"]


class StudyBar:
    """Counts epochs and runs; draws nothing by itself.

    Examples
    --------
    >>> bar = StudyBar(Progress(disable=True), runs=4, left=2, epochs=10)
    >>> bar.epoch()
    >>> bar.done
    2
    """

    def __init__(self, progress: Any, *, runs: int, left: int, epochs: int) -> None:
        self._progress, self._runs, self._epochs = progress, runs, epochs
        self._task = progress.add_task("runs", total=left * epochs, runs=f"{runs - left}/{runs}")
        self._start, self._left, self._finished = time.monotonic(), left, 0

    @property
    def done(self) -> int:
        """Runs that are finished, those of before with them."""
        return self._runs - self._left + self._finished

    def epoch(self) -> None:
        """An epoch of some run is over."""
        self._progress.advance(self._task)

    def finished(self, cell: Cell, result: dict[str, Any]) -> None:
        """A run is over; where nobody watches, such as in a log, a line says so."""
        self._finished += 1
        # Of a run that diverged some epochs are not run.
        skipped = self._epochs - len(result["losses"]) if result.get("diverged") else 0
        self._progress.update(self._task, advance=skipped, runs=f"{self.done}/{self._runs}")
        if self._progress.console.is_terminal:
            return
        each = (time.monotonic() - self._start) / self._finished
        left = readable_seconds(each * (self._runs - self.done))
        found = "diverged" if result.get("diverged") else f"{result['accuracy']:.2f}%"
        line = f"{self.done}/{self._runs} {cell.title}: {found}, {left} left"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def study_bar(runs: int, left: int, epochs: int) -> Iterator[StudyBar]:
    """A bar over the epochs of all runs that are left.

    Examples
    --------
    >>> with study_bar(runs=4, left=2, epochs=10) as bar:
    ...     bar.epoch()
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[runs]} runs"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield StudyBar(progress, runs=runs, left=left, epochs=epochs)
