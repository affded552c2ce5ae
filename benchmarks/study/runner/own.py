"""Methods of your own: functions that a recipe names by file or module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from safe_core.adapters.loading import digest, module_of

__all__ = ["Own", "load", "own_method"]

Find = Callable[[Path], Path]


class Own(NamedTuple):
    """A function that returns a `safe_core.Method`.

    Attributes
    ----------
    source : str
        The absolute path of a file, or the name of a module.
    function : str
    code : str
        A digest of the source code.

    Examples
    --------
    >>> Own("/home/mine/my_methods.py", "in_rounds", "3f").identity()
    ('my_methods.py', 'in_rounds', '3f')
    """

    source: str
    function: str
    code: str

    @property
    def file(self) -> Path | None:
        """The file, or None for a module."""
        return Path(self.source) if self.source.endswith(".py") else None

    def identity(self) -> tuple[str, str, str]:
        """Return what distinguishes the function from others, independent of the folder."""
        return (self.file.name if self.file else self.source, self.function, self.code)


def own_method(name: str, value: str, find: Find) -> Own:
    """Return the function that ``"my_methods.py:function"`` or ``"package.module:function"`` names.

    Parameters
    ----------
    name : str
        The key in the recipe, for messages.
    value : str
    find : callable
        Maps the path of a file in the recipe to its location.

    Raises
    ------
    ValueError
        If the file or module does not exist.

    Examples
    --------
    >>> own_method("method", "safe_core.methods:safe", find=Path).function
    'safe'
    """
    source, _, function = value.rpartition(":")
    if not function.isidentifier():
        raise ValueError(f'{name} must end in a function, "my_methods.py:function", got {value!r}')
    if source.endswith(".py"):
        path = find(Path(source)).absolute()
        if not path.is_file():
            raise ValueError(f"{name} must name an existing file, got {value!r}: {path}")
        return Own(str(path), function, digest(path.read_bytes()))
    try:
        spec = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(
            f'{name} must name a file, "my_methods.py:function", or a module that can be imported, '
            f'"package.module:function", got {value!r}'
        )
    return Own(source, function, digest(Path(spec.origin).read_bytes()))


@lru_cache(maxsize=64)
def load(own: Own) -> Callable[..., Any]:
    """Import the function.

    Raises
    ------
    ValueError
        If the code fails, has changed, or has no such function.

    Examples
    --------
    >>> load(own_method("method", "safe_core.methods:safe", find=Path)).__name__
    'safe'
    """
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
    if digest(content) != own.code:
        raise RuntimeError("the file changed while the study was running")
    return module_of(Path(own.source), content)
