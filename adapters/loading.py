"""Objects that a text names, for settings that are given as text."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["load_named", "names_object"]


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

    This runs the code of the file or module.

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
        module = _from_file(Path(source)) if source.endswith(".py") else _imported(source)
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


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module, without files of bytecode beside it.

    The name of the module depends on the content, so that code that was changed is told apart.
    """
    content = path.read_bytes()
    module = ModuleType(f"{path.stem}_{hashlib.sha256(content).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for their types
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module


def _imported(name: str) -> ModuleType:
    return importlib.import_module(name)
