"""Show the progress of a study on standard error, with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
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

from safe_core._readable import readable_seconds

from .cells import Cell

__all__ = ["StudyBar", "study_bar"]


class StudyBar:
    """Counts the epochs and runs of a study for a progress bar.

    Examples
    --------
    >>> left = {Cell("jax", 0.0, "dense", None, seed): 10 for seed in (2, 3)}
    >>> bar = StudyBar(Progress(disable=True), runs=4, left=left)
    >>> bar.epoch()
    >>> bar.done
    2
    """

    def __init__(self, progress: Any, *, runs: int, left: Mapping[Cell, int]) -> None:
        self._progress, self._runs, self._left = progress, runs, dict(left)
        self._task = progress.add_task("runs", total=sum(left.values()), runs=f"{self.done}/{runs}")
        self._start, self._run = time.monotonic(), 0

    @property
    def done(self) -> int:
        """Number of finished runs, including those of earlier sessions."""
        return self._runs - len(self._left)

    def epoch(self) -> None:
        """Record the end of an epoch."""
        self._progress.advance(self._task)

    def finished(self, cell: Cell, result: dict[str, Any] | str) -> None:
        """Record the end of a run. Without a terminal, such as in a log, print a line.

        A text is the error of a run that failed, which is always printed.
        """
        epochs = self._left.pop(cell)
        self._run += epochs
        # A run that diverged or failed skips the rest of its epochs.
        if isinstance(result, str):
            skipped, found = 0, f"failed, {result.splitlines()[0]}"
        elif result.get("diverged"):
            skipped, found = max(0, epochs - len(result["losses"])), "diverged"
        else:
            skipped, found = 0, f"{result['accuracy']:.2f}%"
        self._progress.update(self._task, advance=skipped, runs=f"{self.done}/{self._runs}")
        if self._progress.console.is_terminal and not isinstance(result, str):
            return
        each = (time.monotonic() - self._start) / max(1, self._run)
        left = readable_seconds(each * sum(self._left.values()))
        line = f"{self.done}/{self._runs} {cell.title}: {found}, {left} left"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def study_bar(runs: int, left: Mapping[Cell, int]) -> Iterator[StudyBar]:
    """Show a bar over the epochs that are left, given as a mapping of run to epochs.

    Examples
    --------
    >>> with study_bar(runs=4, left={Cell("jax", 0.0, "dense", None, 3): 10}) as bar:
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
        yield StudyBar(progress, runs=runs, left=left)
