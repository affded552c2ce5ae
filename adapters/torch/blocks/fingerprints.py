"""Digests of tensors and descriptions of solvers and patterns, to tell one run from another."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch
from array_api_compat import is_array_api_obj
from torch import Tensor

__all__ = ["Description", "fingerprint", "identity", "sample_of"]

Description: TypeAlias = "str | dict[str, dict[str, Description]]"
"""A text, or a name with the descriptions of its arguments by their name or place, for JSON."""

_SAMPLED = 1024
_ADDRESS = " at 0x"  # in a repr that differs in every process


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of tensors: dtypes, shapes and every bit.

    Examples
    --------
    >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2, 1)])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_of(tensors: Iterable[Tensor]) -> str:
    """Return a digest of up to a thousand entries of every tensor, to compare checkpoints.

    Examples
    --------
    >>> sample_of([torch.zeros(10**5)]) == sample_of([torch.ones(10**5)])
    False
    """
    return fingerprint(t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLED)] for t in tensors)


def identity(value: Any) -> Description:
    """Return a description of a solver or pattern that is the same in every process.

    Another solver has another description. It is a text, or ``{name: {argument: description}}``
    for a value with parts, such as a dataclass. It holds the fields of dataclasses that count for
    equality, the names and closures of functions, and digests of arrays.

    Raises
    ------
    ValueError
        If a function has no name, or an instance has attributes that its class does not describe.

    Examples
    --------
    >>> identity(functools.partial(round, ndigits=2))
    {'partial': {'0': 'builtins.round', 'ndigits': '2'}}
    >>> class Keeper:
    ...     def __init__(self, share):
    ...         self.share = share
    >>> identity(Keeper(0.5))
    Traceback (most recent call last):
    ValueError: solver must be of functions with names and of dataclasses for work_dir, to tell \
whether a run goes on with the same one, got an instance of Keeper
    """
    if isinstance(value, functools.partial):
        given = dict(sorted(value.keywords.items()))
        return _called("partial", (value.func, *value.args), given)
    if isinstance(value, types.MethodType):
        return _called(_path(value), (value.__self__,))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _function(value)
    if is_dataclass(value):
        said = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
        # A cached property follows from the fields, and may not have been read yet.
        names = {f.name for f in fields(value)}
        more = {
            key: held
            for key, held in sorted(getattr(value, "__dict__", {}).items())
            if key not in names
            and not isinstance(getattr(type(value), key, None), functools.cached_property)
        }
        return _called(_path(type(value)), (), said | more)
    if isinstance(value, Mapping):
        return _called(type(value).__name__, tuple(value.items()))
    if isinstance(value, (list, tuple)):
        return _called(type(value).__name__, value)
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return identity(value.tolist())
    if is_array_api_obj(value) and not isinstance(value, np.generic):
        held = value if torch.is_tensor(value) else torch.as_tensor(np.array(value))
        return _called("array", (), {"digest": fingerprint([held])})
    if isinstance(value, (set, frozenset)):  # in another order in every process
        found = sorted(map(identity, value), key=repr)
        return {type(value).__name__: {str(i): x for i, x in enumerate(found)}}
    kept = getattr(value, "__dict__", None)
    own = type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
    shown = repr(value) if own else ""
    if isinstance(value, Enum) or (own and kept is None and _ADDRESS not in shown):
        return shown
    if kept == {} and _ADDRESS not in shown:
        # The value of an instance of a subclass of float is in its repr only.
        return {_path(type(value)): {"0": shown} if own else {}}
    raise _untold(f"an instance of {type(value).__name__}")


def _called(name: str, args: Iterable[Any], named: Mapping[str, Any] | None = None) -> Description:
    placed = {str(i): identity(x) for i, x in enumerate(args)}
    return {name: placed | {key: identity(x) for key, x in (named or {}).items()}}


def _function(value: Any) -> Description:
    if "<lambda>" in value.__qualname__:
        raise _untold(value.__qualname__)
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    closed = [x for x in cells if x is not value] + [*(getattr(value, "__defaults__", None) or ())]
    named = getattr(value, "__kwdefaults__", None) or {}
    return _called(_path(value), closed, named) if closed or named else _path(value)


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _untold(what: str) -> ValueError:
    return ValueError(
        "solver must be of functions with names and of dataclasses for work_dir, to tell whether "
        f"a run goes on with the same one, got {what}"
    )
