"""Show progress on standard error with rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safe_core._readable import readable_seconds
from safe_core.adapters.torch.blocks.report import Progress as PruningProgress

__all__ = ["counted", "pruning_bar"]


_PARTS = 20  # lines of a log for a whole count
_SILENCE = 10.0  # seconds between two lines


@contextmanager
def counted(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress as a bar, given how many are done and how many in total.

    Without a terminal, such as in a log, it prints a line now and then instead.

    Examples
    --------
    >>> with counted("windows") as progress:
    ...     progress(1, 2)
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    started = told = time.monotonic()
    shown = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)

        def show(done: int, total: int) -> None:
            nonlocal told, shown
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            due = done - shown >= total / _PARTS and now - told >= _SILENCE
            if console.is_terminal or done >= total or not due:
                return
            told, shown = now, done
            left = readable_seconds((now - started) * (total - done) / done)
            console.print(f"{done:,} of {total:,} {unit}, {left} left", highlight=False)

        yield show


@contextmanager
def pruning_bar() -> Iterator[Callable[[PruningProgress], None]]:
    """Yield a function that shows pruning progress: a bar with the time left.

    It shows the loss of an epoch, and the relative error of a finished block. Without a terminal,
    such as in a log, it prints one line per block instead.

    Examples
    --------
    >>> with pruning_bar() as progress:
    ...     progress(PruningProgress(0, 2, epoch=3, epochs=30, loss=1e-3, seconds_left=60.0))
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pruning", total=None, left="")

        def show(at: PruningProgress) -> None:
            left, text = f"{readable_seconds(at.seconds_left)} left", _text(at)
            bar.update(task, description=text, completed=at.done, total=at.blocks, left=left)
            if at.epoch is None and not console.is_terminal:
                console.print(f"{text}, {left}", highlight=False)

        yield show


def _text(at: PruningProgress) -> str:
    text = f"block {at.block + 1} of {at.blocks}"
    if at.epoch is None:
        error = at.relative_error
        text += "" if error is None else f", relative error {error:.3g}"
        kept = ", start kept: training did not improve it"
        return text + kept if at.training_kept is False else text
    text += f", epoch {at.epoch + 1} of {at.epochs}, training loss {at.loss:.3g}"
    return text if at.sparse_loss is None else f"{text}, {at.sparse_loss:.3g} when sparse"
