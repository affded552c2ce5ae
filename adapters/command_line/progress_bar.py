"""Show progress on standard error with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safe_core._readable import readable_seconds
from safe_core.adapters.torch.blocks.report import Progress as PruningProgress

__all__ = ["counted", "pruning_bar"]


@contextmanager
def counted(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress as a bar, given how many are done and how many in total.

    Examples
    --------
    >>> with counted("windows") as progress:
    ...     progress(1, 2)
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def pruning_bar() -> Iterator[Callable[[PruningProgress], None]]:
    """Yield a function that shows pruning progress: a bar with the loss and the time left.

    Without a terminal, such as in a log, it prints one line per block instead.

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
            left = f"{readable_seconds(at.seconds_left)} left"
            within = "" if at.epoch is None else f", epoch {at.epoch + 1} of {at.epochs}"
            text = f"block {at.block + 1} of {at.blocks}{within}, loss {at.loss:.3g}"
            if within and at.sparse_loss is not None:
                text += f", {at.sparse_loss:.3g} when sparse"
            bar.update(task, description=text, completed=at.done, total=at.blocks, left=left)
            if at.epoch is None and not console.is_terminal:
                console.print(f"{text}, {left}", highlight=False)

        yield show
