"""Functions of your own that a recipe names by file or module: methods, data and networks."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from safe_core.adapters.loading import digest, module_of

from .reach import reached

__all__ = ["Own", "Source", "load", "own_function"]


class Source(NamedTuple):
    """State where a recipe looks for code, and whether it may run it.

    Attributes
    ----------
    find : callable
        Maps the path of a file in the recipe to its location.
    folder : Path or None
        Code in this folder runs without being asked for; None for none.
    anywhere : bool
        Whether code of other folders and of installed modules runs too.
    runs : bool
        Whether code runs at all. A report reads it only, to compare versions.
    """

    find: Callable[[Path], Path]
    folder: Path | None = None
    anywhere: bool = False
    runs: bool = True


class Own(NamedTuple):
    """A function in a file or module of the user.

    Attributes
    ----------
    source : str
        The absolute path of a file, or the name of a module.
    function : str
    content : str
        A digest of the source code, which must not change while a study runs.
    code : str or None
        A digest of the parts of the code that the function uses; None if the code is not there.
    runs : bool
        Whether the code may run.

    Examples
    --------
    >>> Own("/home/mine/my_methods.py", "in_rounds", "3f", "5a").identity()
    {'source': 'my_methods.py', 'function': 'in_rounds', 'code': '5a'}
    """

    source: str
    function: str
    content: str
    code: str | None
    runs: bool = True

    @property
    def file(self) -> Path | None:
        """The file, or None for a module."""
        return Path(self.source) if self.source.endswith(".py") else None

    def identity(self) -> dict[str, str | None]:
        """Return what distinguishes the function from others, independent of the folder."""
        source = self.file.name if self.file else self.source
        return {"source": source, "function": self.function, "code": self.code}


def own_function(name: str, value: str, where: Source) -> Own:
    """Return the function that ``"my_methods.py:function"`` or ``"package.module:function"`` names.

    Nothing is run; see `load`.

    Parameters
    ----------
    name : str
        The key in the recipe, for messages.
    value : str
    where : Source

    Raises
    ------
    ValueError
        If the file or module does not exist, or its code may not run.

    Examples
    --------
    >>> where = Source(Path, anywhere=True)
    >>> own_function("method", "safe_core.methods:safe", where).function
    'safe'
    """
    source, _, function = value.rpartition(":")
    if not function.isidentifier():
        raise ValueError(f'{name} must end in a function, "my_methods.py:function", got {value!r}')
    file = source.endswith(".py")
    path = where.find(Path(source)).absolute() if file else _origin(source)
    if path is None or not path.is_file():
        if where.runs or file:
            raise ValueError(
                f"{name} must name an existing file, got {value!r}: {path}"
                if file
                else f'{name} must name a file, "my_methods.py:function", or a module that can be '
                f'imported, "package.module:function", got {value!r}'
            )
        return Own(source, function, "", None, runs=False)
    if where.runs and not (where.anywhere or _is_inside(path, where.folder)):
        raise ValueError(
            f"{name} must name a file in the folder of the recipe, because a study runs its code, "
            f"got {value!r}: {path}. If you trust it, allow it with --allow-code "
            "(allow_code=True in Python)"
        )
    content = path.read_bytes()
    named = str(path) if file else source
    return Own(named, function, digest(content), reached(content, function), where.runs)


def _is_inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder.resolve())


def _origin(module: str) -> Path | None:
    """Return the file of a module, without importing the packages that hold it."""
    places, spec = None, None
    parts = module.split(".")
    for i in range(len(parts)):
        try:
            # Installed editable packages have finders of their own, which find_spec knows.
            spec = (
                PathFinder.find_spec(".".join(parts[: i + 1]), places)
                if i
                else importlib.util.find_spec(parts[0])
            )
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None


@lru_cache(maxsize=64)
def load(own: Own) -> Callable[..., Any]:
    """Import the function.

    Raises
    ------
    ValueError
        If the code fails, has changed, or has no such function.

    Examples
    --------
    >>> where = Source(Path, anywhere=True)
    >>> load(own_function("method", "safe_core.methods:safe", where)).__name__
    'safe'
    """
    if not own.runs:
        raise ValueError(f"{own.source} must not run here")
    try:
        module = _executed(own) if own.file else importlib.import_module(own.source)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" (line {frame.lineno})" for frame in frames if frame.filename == own.source]
        raise ValueError(
            f"{own.source} must be importable, got {type(error).__name__}: {error}"
            f"{lines[-1] if lines else ''}"
        ) from error
    found = getattr(module, own.function, None)
    if not callable(found):
        there = [
            name
            for name, x in inspect.getmembers(module, inspect.isfunction)
            if x.__module__ == module.__name__ and name[0] != "_"
        ]
        raise ValueError(
            f"{own.source} must have the function {own.function!r}, got: {', '.join(there)}"
        )
    return found


def _executed(own: Own) -> ModuleType:
    """Import the file as a module, without writing bytecode beside it."""
    content = Path(own.source).read_bytes()
    if digest(content) != own.content:
        raise RuntimeError("the file changed while the study was running")
    return module_of(Path(own.source), content)
