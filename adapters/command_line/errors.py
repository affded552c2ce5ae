"""Turn errors that the user can fix into messages, and interruptions into a way to go on.

Wrong input, damaged files, missing packages, full memory and full disks end in one line without
a traceback. SIGTERM acts like Ctrl-C.
"""

from __future__ import annotations

import functools
import inspect
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import typer

from safe_core._installed import install_command
from safe_core.adapters.memory_errors import lacks_memory

from .output import printable

__all__ = ["INTERRUPTED", "clear_errors", "needs", "with_clear_errors"]

Command = TypeVar("Command", bound=Callable[..., Any])

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells report it."""

# Packages whose import name differs from the name that pip installs.
_INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def needs(*extras: str) -> Callable[[Command], Command]:
    """Name the extras that a command needs, for the error message if a package is missing.

    Examples
    --------
    >>> @needs("torch", "study")
    ... def train() -> None:
    ...     "Train."
    >>> train.extras
    ('torch', 'study')
    """

    def mark(command: Command) -> Command:
        command.extras = extras  # type: ignore[attr-defined]
        return command

    return mark


def with_clear_errors(command: Callable[..., Any], distribution: str) -> Callable[..., None]:
    """Return the command wrapped in `clear_errors`, with the same signature.

    Parameters
    ----------
    command : callable
    distribution : str
        The distribution that provides the command and that has the extras of `needs`.
    """
    extras = getattr(command, "extras", ())
    in_batches = "batch_size" in inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        with clear_errors(distribution, extras, in_batches=in_batches):
            command(*arguments, **options)

    return run


@contextmanager
def clear_errors(
    distribution: str, extras: tuple[str, ...] = (), *, in_batches: bool = False
) -> Iterator[None]:
    """Print errors that the user can fix as a message; let all others show their traceback.

    Parameters
    ----------
    distribution : str
        The distribution that provides the command.
    extras : tuple of str
        The extras that the command needs.
    in_batches : bool
        Whether the command has the option ``--batch-size``, which reduces memory.

    Examples
    --------
    >>> try:
    ...     with clear_errors("safe-core"):
    ...         raise ValueError("length must be positive, got 0")
    ... except typer.Exit as stop:
    ...     stop.exit_code
    1
    """
    try:
        with _terminated_like_interrupted():
            yield
    except KeyboardInterrupt as error:
        _fail(_with_notes("interrupted", error), INTERRUPTED)
    except ModuleNotFoundError as error:
        requiring = _extras_of(error.name, distribution)
        if requiring is None:
            raise  # a bug, such as a misspelled import
        if requiring and not requiring.intersection(extras):
            extras = (*extras, min(requiring))  # one that only some uses of the command need
        own = distribution == "safe-core"
        install = f'pip install "{distribution}[{",".join(extras)}]"'
        install = install_command(*extras) if own else install
        _fail(f"this command needs {error.name}" + (f": {install}" if extras else ""))
    except (ValueError, TypeError, OSError) as error:
        _fail(_with_notes(str(error), error))
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        message = f"out of memory: {str(error) or type(error).__name__}"
        if in_batches:
            message += "\nTry a smaller --batch-size."
        _fail(_with_notes(message, error))


def _with_notes(message: str, error: BaseException) -> str:
    return "\n".join([message, *getattr(error, "__notes__", ())])


def _fail(message: str, code: int = 1) -> None:
    lines = "\n".join(map(printable, message.split("\n")))
    typer.echo(f"safe-core: {lines}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM too, so that the same is cleaned up and said."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _extras_of(module: str | None, distribution: str) -> set[str] | None:
    """Return the extras of the distribution that require a module, or None if nothing does.

    The set is empty for a requirement of the distribution itself. Submodules do not count: if
    ``torch._C`` is missing, torch is broken, not absent.
    """
    if module is None:
        return None
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    wanted = _normalised(_INSTALLED_AS.get(module, module))
    found = [x for x in lines if _normalised(re.split(r"[^\w.-]", x, maxsplit=1)[0]) == wanted]
    named = [re.search(r"extra == ['\"]([^'\"]+)", line) for line in found]
    return {match[1] for match in named if match is not None} if found else None


def _normalised(name: str) -> str:
    """Return the name of a distribution in the form that package indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()
