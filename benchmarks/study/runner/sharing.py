"""Hold the folder of a study: which folders are studies, and who works in them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from safe_core.adapters.locks import try_lock

from .recipe_files import RECIPE, replace_file

__all__ = ["held", "read_shard", "refuse_foreign", "stopped_by_signal"]

MARKER = ".safe-core-study"  # which is also the lock
Shard = tuple[int, int]


def read_shard(value: str) -> Shard:
    """Return the part of a study that ``"2/8"`` names: the second of eight.

    Examples
    --------
    >>> read_shard("2/8")
    (2, 8)
    """
    part, _, count = value.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f'shard must be "i/n" with i from 1 to n, such as "2/8", got {value!r}')
    return int(part), int(count)


@contextmanager
def held(out: Path, source: str, shard: Shard | None) -> Iterator[None]:
    """Hold a folder for a study, or for one part of it beside others with the same recipe.

    Raises
    ------
    ValueError
        If the folder holds anything but a study, or another process works in it.
    """
    refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((out / MARKER).open("a"))
        if shard is None:
            if try_lock(lock) is False:
                raise ValueError(
                    f"{out} is in use by another study; processes can share a folder if each "
                    'takes a part, shard="1/2" and so on'
                )
        else:
            if try_lock(lock, shared=True) is False:
                raise ValueError(f"{out} is in use by a study that is not in parts")
            name = f"{MARKER}-{shard[0]}-of-{shard[1]}"
            if try_lock(stack.enter_context((out / name).open("a"))) is False:
                raise ValueError(f"part {shard[0]}/{shard[1]} of {out} is in use")
            _refuse_other_recipe(out, source, lock)
        yield


def refuse_foreign(out: Path) -> None:
    """Refuse a path that is not a folder, and a folder that holds anything but a study.

    Raises
    ------
    ValueError
        With what the folder holds.
    """
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise ValueError(f"out must be a folder, got {out}")
        return
    content = sorted(path.name for path in out.iterdir())
    if content and not (out / MARKER).is_file():  # opening a FIFO would block
        shown = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
        raise ValueError(
            f"out must be a new or empty folder, or that of an earlier study, got {out}, which "
            f"holds {shown}"
        )


def _refuse_other_recipe(out: Path, source: str, lock: IO[Any]) -> None:
    """Allow a new recipe only where no other process works with the old one."""
    kept = out / RECIPE
    if not kept.is_file() or kept.read_bytes() == source.encode():
        return
    if try_lock(lock) is False:
        raise ValueError(f"{out} is in use by parts of a study with another recipe")
    replace_file(kept, source.encode())
    try_lock(lock, shared=True)


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Let SIGTERM stop a study as Ctrl-C does, as schedulers send it at the end of their time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
