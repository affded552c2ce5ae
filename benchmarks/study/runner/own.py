"""Methods of a user: functions of a file or a module that a recipe names."""

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
        A digest of the file, or that of the module.

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
        """The file; None of a module."""
        return Path(self.source) if self.source.endswith(".py") else None

    def identity(self) -> tuple[str, str, str]:
        """What tells it from others, wherever the file is."""
        return (self.file.name if self.file else self.source, self.function, self.code)


def own_method(name: str, value: str, find: Find) -> Own:
    """Return the function that ``"my_methods.py:function"`` or ``"package.module:function"`` names.

    Parameters
    ----------
    name : str
        Of the key, for messages.
    value : str
    find : callable
        From the path of a file, as given, to where it is.

    Raises
    ------
    ValueError
        If there is no such file or module.

    Examples
    --------
    >>> own_method("method", "safe_core.method:safe", find=Path).function
    'safe'
    """
    source, _, function = value.rpartition(":")
    if not function.isidentifier():
        raise ValueError(f'{name} must end in a function, "my_methods.py:function", got {value!r}')
    if source.endswith(".py"):
        path = find(Path(source)).absolute()
        if not path.is_file():
            raise ValueError(f"{name} must name a file that is there, got {value!r}: no {path}")
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
    """Return the function itself.

    Raises
    ------
    ValueError
        If the code fails, was changed, or has no such function.

    Examples
    --------
    >>> load(own_method("method", "safe_core.method:safe", find=Path)).__name__
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
    """The file as a module, without files of bytecode beside it."""
    content = Path(own.source).read_bytes()
    if digest(content) != own.code:
        raise RuntimeError("it was changed while the study ran")
    return module_of(Path(own.source), content)
