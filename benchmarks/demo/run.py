"""Run the demo: one process per framework, a progress bar, a table and files."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_core._installed import require

require("the demo", "sklearn", "scipy", "matplotlib", "rich", extra="demo")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import figures, report
from .recipe import Recipe
from .study import Cell, count_runs, study

__all__ = ["demo"]

# The networks are small, so one thread each is fastest. Sums over several threads could also
# differ from run to run.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_ONE_THREAD_IN_XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def demo(
    recipe: Recipe, frameworks: Sequence[str], folder: Path, *, device: str = "cpu"
) -> list[Cell]:
    """Train dense networks, prune by magnitude, GMP, ADMM and SAFE, and compare.

    Parameters
    ----------
    recipe : Recipe
        The protocol.
    frameworks : sequence of {"torch", "jax"}
        The frameworks to train with, each in its own process.
    folder : Path
        Folder for the table (``table.md``, ``results.json``) and the figures (``accuracy.png``,
        ``weights.png``, ``landscape.png``); created if missing.
    device : str
        Device to train on, such as ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    list of Cell

    Raises
    ------
    RuntimeError
        If a framework fails. The message contains its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    cells = _train(recipe, frameworks, device, console)
    console.print(*report.as_rich(cells))
    files = report.write(cells, recipe, folder) + figures.draw(cells, recipe, folder)
    console.print("written: " + ", ".join(str(file) for file in files), soft_wrap=True)
    return cells


def _train(recipe: Recipe, frameworks: Sequence[str], device: str, console: Console) -> list[Cell]:
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_THREAD_IN_XLA}".strip()
    settings = {**_ONE_THREAD, "XLA_FLAGS": flags}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)  # workers read these at their start
    workers = [
        context.Process(target=_work, args=(recipe, framework, device, queue), daemon=True)
        for framework in frameworks
    ]
    try:
        for worker in workers:
            worker.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    found: dict[str, list[Cell]] = {framework: [] for framework in frameworks}
    with Progress(
        TextColumn("{task.fields[framework]:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    ) as progress:
        bars = {
            framework: progress.add_task("starting", total=count_runs(recipe), framework=framework)
            for framework in frameworks
        }
        running = set(frameworks)
        while running:
            framework, event, content = _receive(queue, workers)
            if event == "failed":
                raise RuntimeError(f"the demo failed in {framework}:\n{content}")
            if event == "run":
                progress.update(bars[framework], advance=1, description=content)
            elif event == "cell":
                found[framework].append(content)
            else:
                progress.update(bars[framework], description="done")
                running.remove(framework)
    for worker in workers:
        worker.join()
    return [cell for framework in frameworks for cell in found[framework]]


def _receive(queue: Any, workers: Sequence[Any]) -> tuple[str, str, Any]:
    """Return the next event; raise an error if a worker died instead of waiting for it."""
    while True:
        try:
            event: tuple[str, str, Any] = queue.get(timeout=1)
            return event
        except Exception as error:
            if type(error).__name__ != "Empty":
                raise
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(
                    f"a worker of the demo ended with exit code {dead[0].exitcode}"
                ) from None


def _work(recipe: Recipe, framework: str, device: str, queue: Any) -> None:
    try:
        for cell in study(
            recipe, framework, device, lambda text: queue.put((framework, "run", text))
        ):
            queue.put((framework, "cell", cell))
        queue.put((framework, "done", None))
    except Exception:
        queue.put((framework, "failed", traceback.format_exc()))
