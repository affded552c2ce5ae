"""Solvers by name, or of one's own: a name of a file or a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from safe_core.solvers import Solver, as_solver, named_solver, named_solvers

__all__ = ["find_solver"]


def find_solver(method: str) -> Solver:
    """Return the solver that ``--method`` names.

    Parameters
    ----------
    method : str
        A registered name, or ``"file.py:Name"`` or ``"package.module:Name"`` of a function, a
        class or an instance.

    Raises
    ------
    TypeError, ValueError
        If it is not found, its code fails, or it is not a solver.

    Examples
    --------
    >>> find_solver("safe+").name, find_solver("safe_core.solvers:Wanda").name
    ('safe+', 'wanda')
    """
    source, colon, name = method.rpartition(":")
    if not colon:
        if method not in named_solvers():
            raise ValueError(
                f"method must be one of {', '.join(named_solvers())}, or your own solver as "
                f"file.py:Name or package.module:Name, got {method!r}"
            )
        return named_solver(method)
    module = _module(source, method)
    if not hasattr(module, name):
        raise ValueError(f"method must name something that {source} defines, got {method!r}")
    return as_solver(getattr(module, name))


def _module(source: str, method: str) -> Any:
    path = Path(source).absolute()
    if source.endswith(".py") and not path.is_file():
        raise ValueError(f"method must name a file that exists, got {method!r}: no {path}")
    try:
        return _executed(path) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        raise ValueError(
            f"method must name code that can be imported, got {method!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _executed(path: Path) -> ModuleType:
    """Run a file as a module whose name changes with its content.

    A run in a work folder is then not resumed with other code, since solvers are compared by
    the name of their module.
    """
    content = path.read_bytes()
    module = ModuleType(f"{path.stem}_{hashlib.sha256(content).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look it up there
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module
