"""Objects that a text names, for settings that are given as text."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["digest", "load_named", "module_of", "names_object"]


def names_object(text: str) -> bool:
    """Return whether a text has the form ``"file.py:name"`` or ``"package.module:name"``.

    Examples
    --------
    >>> names_object("my_parts.py:SOLVER"), names_object("2:4"), names_object("alps")
    (True, False, False)
    """
    source, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and not source.strip().isdecimal()


def load_named(argument: str, text: str) -> Any:
    """Return the object that ``"file.py:name"`` or ``"package.module:name"`` names.

    This runs the code of the file or module. A module may lie in the current folder.

    Parameters
    ----------
    argument : str
        What the text was given for, for messages.
    text : str

    Raises
    ------
    ValueError
        If there is no such file, module or name, or its code fails.

    Examples
    --------
    >>> load_named("method", "safe_core.solvers:Wanda").name
    'wanda'
    """
    source, _, name = text.rpartition(":")
    try:
        module = _loaded(source)
    except Exception as error:
        raise ValueError(
            f"{argument} must name a file or a module that can be run, got {text!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        there = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise ValueError(
            f"{argument} must name an object of {source}, got {name!r}: it has {there}"
        )
    return getattr(module, name)


def module_of(path: Path, content: bytes) -> ModuleType:
    """Run the content of a file as a module, without writing bytecode beside the file.

    The name of the module depends on the content, so that changed code is a different module.
    """
    module = ModuleType(f"{path.stem}_{digest(content)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for their types
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module


def digest(content: bytes) -> str:
    """Return a short digest of code, by which two versions of it differ."""
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Find modules in the current folder last, because scripts of packages leave it out."""
    here, before = str(Path.cwd()), list(sys.path)
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path[:] = before


def _loaded(source: str) -> ModuleType:
    if not source.endswith(".py"):
        with _current_folder_on_path():
            return importlib.import_module(source)
    path = Path(source)
    return module_of(path, path.read_bytes())
