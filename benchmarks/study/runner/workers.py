"""Run the units of a study in processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .cells import Cell
from .recipe import Recipe
from .train import run_unit
from .units import check

__all__ = ["Outcome", "checked_in_process", "failure", "in_processes"]

Unit = tuple[Cell, ...]
Outcome = dict[Cell, Any] | str  # results, or an error
_CONTEXT = multiprocessing.get_context("spawn")


class Worker:
    """A process that runs one unit after another on one device."""

    def __init__(self, recipe: Recipe, device: str, settings: dict[str, Any]) -> None:
        self.device = device
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve, args=(theirs, recipe, device, settings), daemon=True
        )
        self._process.start()
        theirs.close()
        self.started = False
        self.unit: Unit | None = None

    def give(self, unit: Unit) -> None:
        """Start a unit."""
        self.unit = unit
        self.connection.send(("run", unit))

    def receive(self) -> tuple[str, Any]:
        """Return the next message, or ``"ended"`` with the exit code of a process that ended."""
        try:
            found: tuple[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return "ended", self._process.exitcode
        self.started = True
        return found

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


def in_processes(
    recipe: Recipe,
    units: Sequence[Unit],
    devices: Sequence[str],
    settings: dict[str, Any],
    advance: Callable[[], None],
) -> Iterator[tuple[Unit, Outcome]]:
    """Yield units as they finish, with their results or the error that they ended with.

    A process that fails is replaced: its device may be in a state that fails for ever.

    Parameters
    ----------
    devices : sequence of str
        The device of each process.
    settings : dict
        Arguments of `run_unit`.

    Raises
    ------
    ChildProcessError
        If a process ends before it has started to work.
    """
    waiting = deque(units)
    workers: list[Worker] = []
    with _shared_machine(len(devices)):
        try:
            for device in devices[: len(units)]:
                workers.append(Worker(recipe, device, settings))
                workers[-1].give(waiting.popleft())
            while workers:
                by_connection: dict[Any, Worker] = {w.connection: w for w in workers}
                for connection in wait(list(by_connection)):
                    worker = by_connection[connection]
                    kind, content = worker.receive()
                    if kind == "started":
                        continue
                    if kind == "epoch":
                        advance()
                        continue
                    unit, outcome = worker.unit, _outcome(worker, kind, content)
                    assert unit is not None
                    if isinstance(outcome, str) or not waiting:
                        worker.stop()
                        workers.remove(worker)
                        if waiting:
                            worker = Worker(recipe, worker.device, settings)
                            workers.append(worker)
                    if waiting:
                        worker.give(waiting.popleft())
                    yield unit, outcome
        finally:
            for worker in workers:
                worker.stop()


def _outcome(worker: Worker, kind: str, content: Any) -> Outcome:
    if kind != "ended":
        found: Outcome = content
        return found
    if not worker.started:
        raise ChildProcessError(
            f"a process of the study ended at its start, with exit code {content}; a script that "
            'calls run_study with jobs must do so under if __name__ == "__main__"'
        )
    if content == -getattr(signal, "SIGKILL", 9):
        return (
            "ChildProcessError: its process was killed, as happens for want of memory; run the "
            "same command again, perhaps with fewer --jobs"
        )
    return f"ChildProcessError: its process ended with exit code {content}"


def checked_in_process(
    recipe: Recipe, left: Sequence[Cell], folder: Path | None, device: str
) -> list[str]:
    """Return the hints of `check`, made in a process of its own, which frees the device after."""
    with _shared_machine(1):
        worker = Worker(recipe, device, {})
        try:
            worker.connection.send(("check", (tuple(left), folder)))
            kind, content = worker.receive()
            while kind == "started":
                kind, content = worker.receive()
        finally:
            worker.stop()
    if kind == "ended":
        _outcome(worker, kind, content)
        raise ChildProcessError(f"the process that checks a study ended with exit code {content}")
    if isinstance(content, Exception):
        raise content
    found: list[str] = content
    return found


def failure(error: BaseException) -> str:
    """Return the error and where it came from, as text that starts with the error."""
    notes = getattr(error, "__notes__", ())
    trace = "".join(traceback.format_exception(error))
    return "\n".join([f"{type(error).__name__}: {error}", *notes, "", trace])


def _serve(connection: Connection, recipe: Recipe, device: str, settings: dict[str, Any]) -> None:
    # Ctrl-C reaches all processes. Only the main process should print a message.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(("started", None))
    while True:
        try:
            kind, content = connection.recv()
        except EOFError:
            return
        connection.send((kind, _done(kind, content, connection, recipe, device, settings)))


def _done(
    kind: str,
    content: Any,
    connection: Connection,
    recipe: Recipe,
    device: str,
    settings: dict[str, Any],
) -> Any:
    try:
        if kind == "check":
            left, folder = content
            return check(recipe, left, folder, device)
        advance = lambda: connection.send(("epoch", None))  # noqa: E731
        return run_unit(recipe, content, device=device, advance=advance, **settings)
    except Exception as error:
        return failure(error) if kind == "run" else _sendable(error)


def _sendable(error: Exception) -> Exception:
    """Return an error of a built-in type with the same text, which any process can read."""
    known = next(t for t in type(error).__mro__ if t.__module__ == "builtins")
    try:
        found: Exception = known(str(error))
    except TypeError:
        found = RuntimeError(str(error))
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
