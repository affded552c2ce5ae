"""Run what is left of a study, in one or more processes, and save every result."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safe_core import _checks

from .cells import Cell, append_result, cells, mend_results, read_results
from .progress import study_bar
from .recipe import Recipe, keep_recipe, parse_recipe
from .train import run_cell

__all__ = ["RESULTS", "run_study"]

RESULTS = "results.jsonl"
_POLL = 0.2  # seconds
Advance = Callable[[], None]


def run_study(
    source: str,
    out: Path,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    data: Path | None = None,
    device: str = "cpu",
) -> dict[Cell, Any]:
    """Run what is left of a study.

    Every finished run becomes a line of ``results.jsonl`` in ``out`` before the next one starts.
    After an interruption, the same call runs only what is left.

    Parameters
    ----------
    source : str
        The text of a recipe; see `parse_recipe`. ``out`` keeps a copy of it and of method files.
    out : Path
        Folder for the results; created if missing.
    folder : Path, optional
        Folder to look up files of methods in, before the current folder.
    jobs : int
        Number of processes.
    data : Path, optional
        Folder of the data files; by default that of the recipe.
    device : str
        Device to train on, such as "cpu" or "cuda".

    Returns
    -------
    dict of Cell to dict
        All results, old and new; see `run_cell`.

    Raises
    ------
    ValueError
        If the recipe is invalid, or ``out`` is in use or holds results of another recipe.
    ChildProcessError
        If a process is killed. Finished runs are kept, as they are when a run raises.

    Examples
    --------
    >>> import tempfile
    >>> source = '''
    ... title = "tiny"
    ... sparsities = [0.9]
    ... seeds = [0]
    ... frameworks = ["torch"]
    ... data = {name = "digits", train_images = 64}
    ... model = {name = "lenet-300-100", width = 0.1}
    ... training = {epochs = 1, batch_size = 32, learning_rate = 0.1}
    ... methods = [{method = "admm"}]
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = run_study(source, Path(folder))
    >>> [cell.title for cell in found]
    ['admm at 0.9, seed 0, torch']
    """
    _checks.integer("jobs", jobs, low=1)
    recipe = parse_recipe(source, folder)
    planned = cells(recipe)
    out.mkdir(parents=True, exist_ok=True)
    with _held(out / ".lock"):
        found = read_results(out / RESULTS, recipe)
        mend_results(out / RESULTS)
        recipe = keep_recipe(recipe, source, out)
        left = [cell for cell in planned if cell not in found]
        epochs = {cell: recipe.training_of(cell.method).epochs for cell in left}
        with study_bar(len(planned), epochs) as bar:
            results = _results(recipe, left, jobs, data, device, bar.epoch)
            for cell, result in results:
                append_result(out / RESULTS, recipe, cell, result)
                found[cell] = result
                bar.finished(cell, result)
    return {cell: found[cell] for cell in planned}


def _results(
    recipe: Recipe, left: list[Cell], jobs: int, data: Path | None, device: str, advance: Advance
) -> Iterator[tuple[Cell, Any]]:
    """Yield the runs as they finish."""
    settings = {"folder": data, "device": device}
    if jobs > 1 and len(left) > 1:
        yield from _in_processes(recipe, left, min(jobs, len(left)), settings, advance)
        return
    for cell in left:
        with _named(cell):
            yield cell, run_cell(recipe, cell, advance=advance, **settings)  # type: ignore[arg-type]


def _in_processes(
    recipe: Recipe, left: list[Cell], jobs: int, settings: dict[str, Any], advance: Advance
) -> Iterator[tuple[Cell, Any]]:
    context = multiprocessing.get_context("spawn")
    ticks: Any = context.Queue()
    with (
        _shared_machine(jobs),
        ProcessPoolExecutor(jobs, context, _start_worker, (ticks,)) as pool,
    ):
        running: dict[Future[Any], Cell] = {
            pool.submit(_work, recipe, cell, settings): cell for cell in left
        }
        failed: list[tuple[Cell, Future[Any]]] = []
        try:
            while running:
                done, _ = wait(running, _POLL, FIRST_COMPLETED)
                _drain(ticks, advance)
                for future in done:
                    cell = running.pop(future)
                    if future.exception() is None:
                        yield cell, future.result()
                        continue
                    failed.append((cell, future))
                    # Save the runs that have started; start no others.
                    running = {f: c for f, c in running.items() if not f.cancel()}
                    print(f"{cell.title} failed; finishing {len(running)} more", file=sys.stderr)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for cell, future in failed:
        with _named(cell):
            future.result()


_ticks: Any = None


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    # Ctrl-C reaches all processes. Only the main process should print a message.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _work(recipe: Recipe, cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    return run_cell(recipe, cell, advance=lambda: _ticks.put(None), **settings)


def _drain(ticks: Any, advance: Advance) -> None:
    while True:
        try:
            ticks.get_nowait()
        except queue.Empty:
            return
        advance()


@contextmanager
def _shared_machine(jobs: int) -> Iterator[None]:
    """Set the environment of workers so that each uses its share of processors and memory."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    settings = {"OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Name the run in an error."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process of the study was ended from outside, as for want of memory; run the same "
            "command again to go on, perhaps with fewer --jobs"
        ) from None
    except Exception as error:
        error.add_note(f"in {cell.title}; the runs before it are kept")
        raise


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock a folder against other studies. The system frees the lock when a process ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path.parent} is in use by another study") from None
        yield
